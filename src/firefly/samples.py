"""What the model in training answers at each of its checkpoints: the same few prompts every time.

`checkpoint_samples` asks for it. The answers stand in samples.jsonl, those of the model before its first step first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from firefly import ranks
from firefly.console import notice
from firefly.distributed.model import TrainableModel
from firefly.evaluation.in_run import ask_model, free_memory, held_out_questions, serve, that_fit
from firefly.evaluation.measurement import Question
from firefly.files import atomic_file, first_line
from firefly.generation.loading import ServedModel
from firefly.models.adapters import transformers_model
from firefly.models.loading import eos_ids
from firefly.models.serving_memory import context_of
from firefly.run import Run
from firefly.runs.metrics import RunRecorder
from firefly.runs.records import SAMPLES, read_samples


def served_in_run(run: Run, model: TrainableModel) -> ServedModel:
    """The model in training as an engine takes it: with the run's tokenizer, template and stop tokens."""
    settings = transformers_model(model.module).generation_config
    stops = run.encoder.template.stop_ids if run.chats else (run.tokenizer.eos_token_id,)
    return serve(run.encoder, list(dict.fromkeys((*stops, *eos_ids(settings)))), run.chats, run.folder)


def can_be_asked(run: Run, model: TrainableModel) -> bool:
    """Not a reward model, which writes no answers, nor one whose weights no process has whole."""
    return run.task.HEAD != "score" and not model.backend.shards_weights


def sample_writers(run: Run, model: TrainableModel, recorder: RunRecorder) -> list[TrainerCallback]:
    """The observer that asks at checkpoints, where the configuration wants one and the model can be asked."""
    count = run.config.evaluation.checkpoint_samples
    if not count or not ranks.is_first():
        return []
    if not can_be_asked(run, model):
        notice(
            "samples.impossible",
            "checkpoint_samples: nothing is asked: a reward model writes no answers, and of sharded weights no process "
            "holds a whole model.",
        )
        return []
    examples = run.data.train if run.data.held_out is None else run.data.held_out
    context = context_of(transformers_model(model.module).config)
    questions = that_fit(
        held_out_questions(examples, run.config.data, run.encoder, count), run.encoder, run.chats, context
    )
    if not questions:
        notice("samples.no_prompt", "checkpoint_samples: no row has a prompt that can be asked.")
        return []
    return [SampleWriter(run, model, recorder, questions)]


class SampleWriter(TrainerCallback):
    """Asks before the first step and at each checkpoint. What fails is said, and ends the asking, not the run."""

    def __init__(self, run: Run, model: TrainableModel, recorder: RunRecorder, questions: Sequence[Question]) -> None:
        self.run, self.model, self.recorder = run, model, recorder
        self.questions = tuple(questions)
        self.path = run.folder / SAMPLES

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            return  # nothing is left to train, and what was written stays
        began = time.monotonic()
        # A resumed run drops the answers of steps that it is about to repeat.
        lines = [line for line in read_samples(self.path) if state.global_step and line["step"] <= state.global_step]
        with self.recorder.reporting(SAMPLES), atomic_file(self.path) as scratch:
            scratch.write_text("".join(map(_as_line, lines)), encoding="utf-8")
        if not state.global_step:
            self._ask(0)
            self.recorder.begin(0, time.monotonic() - began)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._ask(state.global_step)
        self.recorder.pace.resume()

    def _ask(self, step: int) -> None:
        if not self.questions:
            return
        try:
            answers = ask_model(self.model, served_in_run(self.run, self.model), self.questions, ()).answers
        except Exception as error:  # an engine, or a model's own code, may fail in any way: the run does not need it
            self.questions = ()
            notice(
                "samples.failed",
                "the model could not be asked at step {step} ({problem}), and is not asked any more. Training goes on.",
                step=step,
                problem=first_line(error),
            )
            return
        finally:
            free_memory()
        lines = [
            {
                "step": step,
                "key": question.key,
                "question": question.shown,
                "reference": question.reference,
                "answer": answer.text,
                "finish_reason": answer.finish_reason,
                "error": answer.error,
            }
            for question, answer in zip(self.questions, answers, strict=True)
        ]
        with self.recorder.reporting(SAMPLES), self.path.open("a", encoding="utf-8") as file:
            file.writelines(map(_as_line, lines))


def _as_line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
