"""The comparison that every run makes by itself: of its model before the first step with the one that it leaves.

Held-out rows are evaluated and a few questions asked before the first step; what the model says is kept in a file, so
that a resumed run finds it. At the end the trained model is asked the same. None of it may cost a run its result: what
fails is a notice that names the command by which the comparison can be made later.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from firefly import ranks
from firefly.console import notice, stderr_console
from firefly.data.blocks import Blocks
from firefly.data.examples import Examples
from firefly.data.schema import Message, TextPart
from firefly.evaluation.comparing import Material, compare_measurements
from firefly.evaluation.comparison import FACTS, PAGE, write_report
from firefly.evaluation.held_out import Evaluation
from firefly.evaluation.in_run import (
    Asked,
    ask_model,
    asked_again,
    free_memory,
    held_out_losses,
    held_out_questions,
    seconds_for_asking,
    that_fit,
)
from firefly.evaluation.measurement import Measurement, Question
from firefly.evaluation.probes import ProbeText, probe_questions, probe_texts
from firefly.evaluation.report import Report, plain
from firefly.evaluation.subjects import shown_name
from firefly.evaluation.terminal import show_report
from firefly.files import first_line
from firefly.loop import Outcome, Training, evaluate_now, evaluate_result
from firefly.models.adapters import transformers_model
from firefly.models.serving_memory import context_of
from firefly.run import Run
from firefly.runs.interruption import stopped_at_once
from firefly.runs.manifest import record_comparison, write_json
from firefly.runs.plots import drawn_at_end
from firefly.runs.records import read_object
from firefly.samples import can_be_asked, served_in_run
from firefly.translation import Phrase, translate

FOLDER = "comparison"
BEFORE = "before.json"


@stopped_at_once()
def measure_before(training: Training) -> None:
    """Evaluate held-out rows and ask the model before its first step, and keep what it says for the end.

    A resumed run was measured when it began.

    Raises:
        Interrupted: a signal came.
    """
    run, folder = training.run, training.run.folder / FOLDER
    if run.checkpoint is not None:
        return
    if ranks.is_first():
        for name in (BEFORE, PAGE, FACTS):  # of an earlier run in this folder
            with suppress(OSError):
                (folder / name).unlink()
    if not run.config.evaluation.compare:
        return
    began = time.monotonic()
    if run.data.held_out is not None:
        stderr_console().print(
            translate(
                "evaluating {rows} held-out rows before the first step, which takes its time beside the questions",
                rows=len(run.data.held_out),
            ),
            soft_wrap=True,
        )
        evaluate_now(training)
    if ranks.is_first():
        material, asked = _Questions(), Asked()
        try:
            material = _material_of(training)
            if material.questions or material.texts:
                asked = _ask_first(training, material)
        except Exception as error:  # an engine, or a model's own code, may fail in any way: the run does not need it
            material = _Questions()
            notice(
                "compare.not_asked",
                "the model could not be asked before its first step ({problem}), so at the end held-out losses alone "
                "are compared. Training is not affected.",
                problem=first_line(error),
            )
        free_memory()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            described = _describe(run, run.config.adapter.name_or_path, 0)
            found = _measurement(training, _base_of(run), described, training.evaluations.get(0), asked, began)
            write_json(folder / BEFORE, _Before.of(found, material).as_dict())
        except OSError as error:
            notice(
                "compare.not_kept",
                "{path} could not be written ({problem}): at the end there will be nothing to compare with. Training "
                "is not affected.",
                path=folder / BEFORE,
                problem=first_line(error),
            )
    training.recorder.begin(training.progress.state.global_step, time.monotonic() - began)


def _ask_first(training: Training, material: _Questions) -> Asked:
    """What the model says before its first step, as far as time allows."""
    run, model = training.run, training.model
    seconds = seconds_for_asking(run.device)
    if model.ranks > 1:
        seconds = min(seconds, run.args.ddp_timeout / 3)  # the other ranks wait
    tqdm.write(
        translate(
            "asking the model before its first step, to compare the result with (about {seconds} s at most; compare: "
            "false leaves it out)",
            seconds=round(seconds),
        ),
        file=sys.stderr,
    )
    return ask_model(model, served_in_run(run, model), material.questions, material.texts, seconds)


def compare_with_before(training: Training, outcome: Outcome) -> None:
    """Ask the trained model the same, and say what differs: on the terminal, in comparison/ and in run.json.

    The result is saved and the run has ended: what fails here, or is stopped by a signal, is a notice.
    """
    run, folder = training.run, training.run.folder / FOLDER
    nothing_trained = not training.progress.counts.steps and (folder / PAGE).is_file()
    if not run.config.evaluation.compare or ranks.from_first(nothing_trained):
        return
    found = None
    try:
        with stopped_at_once():
            before = _read_before(run) if ranks.is_first() else None
            if ranks.from_first(before is not None):
                evaluation = outcome.evaluation
                if run.data.held_out is not None and evaluation is None:
                    with drawn_at_end(run.folder):
                        evaluation = evaluate_result(training)
                if before is not None:  # the first rank, which writes files
                    report = _compare(training, outcome, before, evaluation)
                    path = write_report(report, folder)
                    found = in_short(report)
                    show_report(report, stderr_console())
                    stderr_console().print(translate("comparison: {path}", path=path), soft_wrap=True)
            else:
                notice(
                    "compare.no_before",
                    "what the model said before its first step is not in {path}, so there is nothing to compare the "
                    "result with. {how}",
                    path=folder / BEFORE,
                    how=how_to_compare(run),
                )
    except (Exception, KeyboardInterrupt) as error:
        notice(
            "compare.failed",
            "the result is saved, but it could not be compared with the model before the run ({problem}). {how}",
            problem=first_line(error).rstrip(".。") or type(error).__name__,
            how=how_to_compare(run),
        )
    free_memory()
    with suppress(OSError):  # a full disk: the report was shown
        record_comparison(run.folder, found)


def _compare(training: Training, outcome: Outcome, before: _Before, evaluation: Evaluation | None) -> Report:
    began = time.monotonic()
    run, model = training.run, training.model
    questions = before.questions
    texts = asked_again(probe_texts(), [row.key for row in before.measurement.probe_losses or ()])
    asked = Asked()
    if questions or texts:
        asked = ask_model(model, served_in_run(run, model), questions, texts)
    adapter = None if model.full else str(run.folder)
    described = _describe(run, adapter, outcome.step)
    after = _measurement(training, str(run.folder), described, evaluation, asked, began)
    notes = [*before.notes]
    if outcome.step != training.progress.state.global_step:
        notes.append(
            Phrase("the tuned model is that of step {step}, the best evaluation of the run.", step=outcome.step)
        )
    if model.backend.shards_weights and run.task.HEAD != "score":
        how = how_to_compare(run)
        notice(
            "compare.sharded",
            "{engine} shards the weights, so held-out losses alone are compared: no answers, and nothing of what was "
            "forgotten. {how}",
            engine=model.backend.name,
            how=how,
        )
        notes.append(Phrase("no questions were asked, since the weights are sharded over processes. {how}", how=how))
    elif len(questions) + len(texts) < sum(before.offered):
        notes.append(
            Phrase(
                "{questions} of {all_questions} questions and {texts} of {all_texts} texts were put to both models, as "
                "many as the time for it within a run allows. {how}",
                questions=len(questions),
                all_questions=before.offered[0],
                texts=len(texts),
                all_texts=before.offered[1],
                how=how_to_compare(run),
            )
        )
    return compare_measurements(Material(questions), before.measurement, after, notes=notes)


# ---- what is asked, of whom


@dataclass(frozen=True)
class _Questions:
    """All that may be asked, in the order in which it is.

    Attributes:
        notes: what cannot be.
    """

    questions: tuple[Question, ...] = ()
    texts: tuple[ProbeText, ...] = ()
    notes: tuple[Phrase, ...] = ()


def _material_of(training: Training) -> _Questions:
    """Nothing for a model that cannot be asked."""
    run = training.run
    if not can_be_asked(run, training.model):
        return _Questions()
    held_out: tuple[Question, ...] = ()
    if run.data.held_out is not None:
        held_out = held_out_questions(run.data.held_out, run.config.data, run.encoder)
    context = context_of(transformers_model(training.model.module).config)
    questions, texts = (*held_out, *probe_questions()), probe_texts()
    fitting = that_fit(questions, run.encoder, run.chats, context), that_fit(texts, run.encoder, run.chats, context)
    left_out = len(questions) - len(fitting[0]), len(texts) - len(fitting[1])
    if not any(left_out):
        return _Questions(*fitting)
    note = Phrase(
        "{questions} question(s) and {texts} text(s) are left out: they are longer than the model's context of "
        "{context} tokens.",
        questions=left_out[0],
        texts=left_out[1],
        context=context,
    )
    return _Questions(*fitting, (note,))


def _measurement(
    training: Training,
    given: str,
    described: Mapping[str, Any],
    evaluation: Evaluation | None,
    asked: Asked,
    began: float,
) -> Measurement:
    run = training.run
    held_out: Examples | Blocks | None = run.data.held_out
    losses = None if held_out is None or evaluation is None else held_out_losses(held_out, evaluation)
    return Measurement(
        name=shown_name(given),
        described=described,
        unit=run.task.UNIT,
        losses=losses,
        probe_losses=asked.text_losses,
        answers=asked.answers,
        seconds=time.monotonic() - began,
    )


def _base_of(run: Run) -> str:
    """What a run starts from: a model, or an adapter that is trained on."""
    return run.config.adapter.name_or_path or run.config.model.name_or_path


def _describe(run: Run, adapter: str | None, step: int) -> dict[str, Any]:
    """What tells a model from others, for the report."""
    template = run.encoder.template if run.chats else None
    model = run.config.model.name_or_path
    return {
        "given": str(run.folder) if step else _base_of(run),
        "model": str(run.folder) if step and adapter is None else model,
        "adapter": adapter,
        "dtype": run.precision.name,
        "template": None if template is None else template.name,
        "template_hash": None if template is None else template.hash,
        "tokenizer_hash": run.encoder.tokenizer_hash,
        "step": step,
    }


@dataclass(frozen=True)
class _Before:
    """What before.json holds. The files of held-out rows may be others, or gone, when the run is at its end.

    Attributes:
        questions: that were asked.
        offered: how many questions and texts there were, had there been time for all.
        notes: what could not be asked.
    """

    measurement: Measurement
    questions: tuple[Question, ...]
    offered: tuple[int, int]
    notes: tuple[Phrase, ...]

    @classmethod
    def of(cls, measurement: Measurement, material: _Questions) -> _Before:
        asked = asked_again(material.questions, [answer.key for answer in measurement.answers])
        return cls(measurement, asked, (len(material.questions), len(material.texts)), material.notes)

    def as_dict(self) -> dict[str, Any]:
        return plain(self.measurement.as_dict()) | {
            "questions": plain(self.questions),
            "offered": list(self.offered),
            "notes": [note.as_json() for note in self.notes],
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> _Before:
        questions, texts = stored["offered"]
        return cls(
            Measurement.from_dict(stored),
            tuple(_question_from(row) for row in stored["questions"]),
            (questions, texts),
            tuple(Phrase.from_json(note) for note in stored["notes"]),
        )


def _question_from(row: Mapping[str, Any]) -> Question:
    messages = [
        Message(
            **message
            | {
                "content": tuple(TextPart(**part) for part in message["content"]),
                "tool_calls": tuple(message["tool_calls"]),
            }
        )
        for message in row["messages"]
    ]
    lists = {"messages": tuple(messages), "tools": tuple(row["tools"]), "accepted": tuple(row["accepted"])}
    return Question(**{**row, **lists})


def _read_before(run: Run) -> _Before | None:
    """What was measured when the run began; None where that is not there."""
    folders = [run.folder, *([] if run.checkpoint is None else [run.checkpoint.parent])]
    for folder in folders:
        try:
            return _Before.from_dict(read_object(folder / FOLDER / BEFORE))
        except (TypeError, KeyError, ValueError):
            continue
    return None


def how_to_compare(run: Run) -> Phrase:
    """How the result of a run is compared later with what it started from."""
    if run.task.HEAD == "score":
        return Phrase("There is no command for it: firefly compare takes no reward models.")
    config, data = run.config, run.config.data
    parts = ["firefly", "compare", "--base", _base_of(run), "--tuned", str(run.folder)]
    if isinstance(data.eval_file, str):
        parts += ["--eval_file", data.eval_file]
    for name, value, default in (
        ("max_seq_length", data.max_seq_length, 2048),
        ("data_format", data.data_format, "auto"),
        ("template_name", data.template_name if run.chats else "auto", "auto"),
        ("hub", config.model.hub, "huggingface"),
    ):
        if value != default:
            parts += [f"--{name}", str(value)]
    for name, needed in (
        ("trust_remote_code", config.model.trust_remote_code),
        ("load_in_4bit", config.adapter.mode == "qlora"),
    ):
        if needed:
            parts.append(f"--{name}")
    command = shlex.join([*parts, "--save_path", str(run.folder / FOLDER)])
    if run.data.held_out is None or isinstance(data.eval_file, str):
        return Phrase("To compare the result with its base: {command}", command=command)
    return Phrase(
        "To compare the result with its base: {command} (without the held-out rows of this run, which no single file "
        "holds; --eval_file FILE names others)",
        command=command,
    )


def in_short(report: Report) -> dict[str, Any]:
    """What run.json and train_results.json say of a comparison; sentences as run.json keeps notices."""
    overall = report.losses[0] if report.losses else None
    found: dict[str, Any] = {
        "learnt": report.learnt,
        "forgetting": None if report.forgetting is None else report.forgetting.verdict,
        "verdicts": [{"message": str(phrase), **phrase.as_json()} for phrase in report.verdicts],
        "report": f"{FOLDER}/{PAGE}",
    }
    if overall is not None:
        found |= {
            "loss_before": overall.base,
            "loss_after": overall.tuned,
            "loss_change": [overall.difference.value, overall.difference.low, overall.difference.high],
            "unit": report.unit,
            "rows": overall.rows,
        }
    return plain(found)
