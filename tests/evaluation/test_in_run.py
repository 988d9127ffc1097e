"""Every run compares its model before the first step with the one that it leaves, and trains as if it did not."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from firefly import before_after
from firefly.cli import main
from firefly.config import DataConfig, load_config
from firefly.console import take_notices
from firefly.data.dataset import load_split
from firefly.data.encoding import Encoder
from firefly.data.schema import Message, TextPart
from firefly.data.templates import bind_template
from firefly.evaluation import in_run
from firefly.evaluation.held_out import evaluate
from firefly.evaluation.in_run import held_out_questions
from firefly.evaluation.measurement import Measurement, Question
from firefly.evaluation.probes import probe_questions, probe_texts
from firefly.evaluation.report import plain
from firefly.generation.batched import BatchedEngine, Unbatchable, _Lane
from firefly.runs.metrics import read_metrics
from firefly.training import train
from tiny import run_settings, save_tiny_model, tiny_tokenizer, write_rows

Run = Callable[..., Path]
ROWS, STEPS = 18, 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    for name in ("llama", "gptj"):
        save_tiny_model(folder / name, name)
    write_rows(folder / "sft.jsonl", ROWS)
    write_rows(folder / "held_out.jsonl", 6, seed=1)
    pairs = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": "bad"} for i in range(ROWS)]
    labelled = [{"prompt": f"question {i}", "completion": f"answer {i}", "label": i % 2 == 0} for i in range(ROWS)]
    texts = [{"text": f"document {i} tells of " + "many things " * (i % 5 + 1)} for i in range(3 * ROWS)]
    for name, rows in (("dpo", pairs), ("kto", labelled), ("pretrain", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Four steps that are compared, with a few short probes."""
    monkeypatch.setattr("firefly.runs.plots.draw_loss", lambda *_: None)
    monkeypatch.setattr(in_run, "HELD_OUT_TOKENS", 5)
    monkeypatch.setattr(in_run, "PROBE_TOKENS", 3)
    monkeypatch.setattr(before_after, "probe_questions", lambda: probe_questions()[:4])
    monkeypatch.setattr(before_after, "probe_texts", lambda: probe_texts()[:4])

    def train_into(name: str = "out", task: str = "sft", **changes: Any) -> Path:
        model = place / changes.pop("model", "llama")
        rows = place / f"{'dpo' if task == 'reward' else task}.jsonl"
        settings = run_settings(model, rows, tmp_path / name, task_type=task, train_mode="lora", lora_rank=4)
        settings |= {"compare": True, "eval_ratio": 0.3, "learning_rate": 0.01, "max_steps": STEPS, "seed": 1}
        settings |= {"per_device_train_batch_size": 4, "max_seq_length": 64 if task == "pretrain" else 512}
        return train(load_config(settings | changes))

    gc.freeze()  # accelerate collects garbage after each run
    yield train_into
    gc.unfreeze()


def before_of(folder: Path) -> Measurement:
    return Measurement.from_dict(json.loads((folder / "comparison/before.json").read_text(encoding="utf-8")))


def report_of(folder: Path) -> dict[str, Any]:
    assert (folder / "comparison/report.html").is_file()
    return json.loads((folder / "comparison/report.json").read_text(encoding="utf-8"))


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def codes(folder: Path) -> list[str]:
    return [notice["code"] for notice in manifest(folder)["notices"]]


def logged(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in read_metrics(folder / "metrics.jsonl") if name in line]


def state_of(folder: Path) -> dict[str, Any]:
    """All that a run's last checkpoint holds, and what it logged of its steps."""
    checkpoint = folder / f"checkpoint-{STEPS}"
    weights = load_file(next(checkpoint.glob("*model.safetensors")))
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    random = torch.load(checkpoint / "rng_state.pth", weights_only=False)
    return {
        "weights": weights,
        "moments": {f"{n} {name}": value for n, one in optimizer.items() for name, value in one.items()},
        "random": (random["python"], random["numpy"][1].tolist(), random["cpu"].tolist()),
        **{name: logged(folder, name) for name in ("loss", "grad_norm", "learning_rate")},
    }


def assert_bit_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("weights", "moments"):
        assert found[name].keys() == expected[name].keys()
        assert all(torch.equal(found[name][key], value) for key, value in expected[name].items()), name
    for name in ("random", "loss", "grad_norm", "learning_rate"):
        assert found[name] == expected[name], name


# ---- training is not touched


SAVING = {"save_strategy": "steps", "save_steps": 2}
CASES = [
    pytest.param({"train_mode": "full"}, id="full"),
    pytest.param({"lora_dropout": 0.2}, id="lora"),
    pytest.param({"lora_dropout": 0.2, "model": "gptj"}, id="solo"),
    pytest.param({"task": "dpo"}, id="dpo"),
    pytest.param({"train_mode": "qlora", "lora_dropout": 0.1}, id="qlora", marks=pytest.mark.slow),
    pytest.param({"task": "kto", "train_mode": "full"}, id="kto", marks=pytest.mark.slow),
    pytest.param({"train_mode": "full", "gradient_checkpointing": True}, id="recomputed", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("changes", CASES)
def test_a_run_trains_the_same_to_the_bit_whether_it_is_compared_or_not(changes: dict[str, Any], run: Run) -> None:
    found = run("compared", **SAVING, **changes)
    expected = run("not", **SAVING, **changes, compare=False)
    assert len(before_of(found).answers) == 4 + 5  # all rows that are held out
    assert not (expected / "comparison").exists()
    assert_bit_equal(state_of(found), state_of(expected))


def test_a_resumed_run_finds_what_was_measured_when_it_began(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("whole", **SAVING, lora_dropout=0.2)
    began = (whole / "comparison/before.json").read_bytes()
    steps_of = {step for step, _ in logged(whole, "eval_loss")}
    monkeypatch.setattr(before_after, "_ask_first", None)  # to measure again would fail
    again = run("whole", **SAVING, lora_dropout=0.2, resume_from_checkpoint=str(whole / "checkpoint-2"))
    assert (again / "comparison/before.json").read_bytes() == began
    assert {step for step, _ in logged(again, "eval_loss")} == steps_of >= {0, STEPS}
    assert report_of(again)["losses"][0]["rows"] == 5
    assert_bit_equal(state_of(again), state_of(run("other", **SAVING, lora_dropout=0.2, compare=False)))


def test_a_resumed_run_without_a_measurement_says_how_to_compare(run: Run, place: Path) -> None:
    out = run(**SAVING)
    (out / "comparison/before.json").unlink()
    (out / "comparison/report.html").unlink()
    run(**SAVING, resume_from_checkpoint=str(out / "checkpoint-2"))
    (said,) = [notice for notice in manifest(out)["notices"] if notice["code"] == "compare.no_before"]
    command = f"firefly compare --base {place / 'llama'} --tuned {out} --max_seq_length 512 --template_name default"
    assert f"{command} --save_path {out / 'comparison'} (without the held-out rows of this run" in said["message"]
    assert not (out / "comparison/report.html").exists()


@pytest.mark.parametrize("fails", [False, True])
def test_an_engines_memory_is_free_before_the_first_step(
    fails: bool, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes: list[int] = []
    gc.unfreeze()  # what is frozen is not looked at
    real = before_after.measure_before

    def measured(training: Any) -> None:
        real(training)
        lanes.append(sum(isinstance(thing, _Lane) for thing in gc.get_objects()))

    def fail(*_: Any) -> None:
        raise RuntimeError("no answers")

    monkeypatch.setattr("firefly.training.measure_before", measured)
    if fails:
        monkeypatch.setattr(in_run, "ask", fail)
    assert len(before_of(run()).answers) == (0 if fails else 9)
    assert lanes == [0]


# ---- what is measured


def test_held_out_rows_are_evaluated_before_the_first_step_and_at_the_end_once_each(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []
    monkeypatch.setattr("firefly.loop.evaluate", lambda *given: counted.append(1) or evaluate(*given))
    out = run(eval_on_start=True, eval_strategy="epoch")
    evaluations = logged(out, "eval_loss")
    assert [step for step, _ in evaluations] == [0, STEPS]
    assert len(counted) == 2
    report, before = report_of(out), before_of(out)
    assert before.unit == report["unit"] == "token"
    assert before.losses is not None
    assert [row.key.rpartition(":")[2] for row in before.losses] == sorted(
        (row.key.rpartition(":")[2] for row in before.losses), key=int
    )
    total, targets = sum(row.total for row in before.losses), sum(row.targets for row in before.losses)
    assert total / targets == pytest.approx(evaluations[0][1], rel=1e-9)
    assert report["losses"][0]["base"] == pytest.approx(evaluations[0][1], rel=1e-9)
    assert report["losses"][0]["tuned"] == pytest.approx(evaluations[1][1], rel=1e-9)
    assert report["losses"][0]["tuned"] < report["losses"][0]["base"]


def test_a_run_that_was_not_evaluated_at_its_end_is_when_it_is_saved(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[bool] = []
    real = before_after.evaluate_result

    def evaluated(training: Any) -> Any:
        saved.append((training.run.folder / "adapter_model.safetensors").is_file())
        return real(training)

    monkeypatch.setattr(before_after, "evaluate_result", evaluated)
    drawn: list[list[int]] = []
    monkeypatch.setattr(
        "firefly.runs.plots.draw_loss", lambda folder: drawn.append([step for step, _ in logged(folder, "eval_loss")])
    )
    out = run(eval_strategy="no")
    assert saved == [True]
    assert drawn[-1] == [0, STEPS]
    assert [step for step, _ in logged(out, "eval_loss")] == [0, STEPS]
    assert report_of(out)["losses"][0]["tuned"] == pytest.approx(logged(out, "eval_loss")[1][1])


def test_the_best_weights_are_compared_where_they_are_the_result(run: Run) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    out = run(save_strategy="steps", eval_strategy="steps", eval_steps=1, save_steps=1, **best)
    of_steps = dict(logged(out, "eval_loss"))
    assert max(of_steps, key=lambda step: of_steps[step] if step else 0) == 1 < STEPS  # the "best" is the worst
    report = report_of(out)
    assert report["losses"][0]["tuned"] == pytest.approx(of_steps[1], rel=1e-9)
    assert report["tuned"]["described"]["step"] == 1
    assert any("step 1" in note for note in report["notes"])
    alone = load_file(out / "adapter_model.safetensors")
    assert all(
        torch.equal(value, alone[name])
        for name, value in load_file(out / "checkpoint-1/adapter_model.safetensors").items()
    )


def test_what_differs_is_said_and_kept(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    out = run()
    said = capsys.readouterr().err
    assert "evaluating 5 held-out rows before the first step" in said
    assert "asking the model before its first step" in said
    assert f"comparison: {out / 'comparison/report.html'}" in said
    found = manifest(out)["comparison"]
    assert json.loads((out / "train_results.json").read_text())["comparison"] == found
    assert found["loss_after"] < found["loss_before"]
    assert found["learnt"] == report_of(out)["learnt"]
    assert [verdict["message"] for verdict in found["verdicts"]] == report_of(out)["verdicts"]
    assert main(["runs", "show", str(out)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert found["verdicts"][0]["message"] in shown
    assert manifest(out)["state"] == "finished"


def test_what_is_measured_before_the_first_step_is_no_time_of_the_run(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = before_after._ask_first

    def slowly(*given: Any) -> Any:
        time.sleep(1)
        return real(*given)

    monkeypatch.setattr(before_after, "_ask_first", slowly)
    began = time.time()
    out = run()
    took = time.time() - began
    results = json.loads((out / "train_results.json").read_text())
    assert results["train_runtime"] + results["seconds_to_first_step"] + before_of(out).seconds < took


def strict(path: Path) -> Any:
    """JSON as its standard has it."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{path.name} holds {constant}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_what_is_no_number_is_null_in_every_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    out = run(eval_ratio=0.06)  # one row, whose interval has no ends
    for name in ("run.json", "train_results.json", "comparison/report.json"):
        strict(out / name)
    assert manifest(out)["comparison"]["loss_change"][1:] == [None, None]
    real = before_after.held_out_losses

    def broken(*given: Any) -> Any:
        first, *others = real(*given)
        return (replace(first, total=float("nan")), *others)

    monkeypatch.setattr(before_after, "held_out_losses", broken)
    out = run("broken")
    assert strict(out / "comparison/before.json")["losses"][0]["total"] is None
    losses = before_of(out).losses
    assert losses is not None
    assert np.isnan(losses[0].total)
    assert report_of(out)["losses"][0]["rows"] == 4


def test_the_end_asks_what_was_asked_whatever_became_of_the_files(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = write_rows(tmp_path / "held_out.jsonl", 3, seed=1)
    asked: list[Any] = []
    real = before_after.ask_model

    def watched(model: Any, served: Any, questions: Any, *rest: Any) -> Any:
        asked.append(questions)
        held_out.unlink(missing_ok=True)
        return real(model, served, questions, *rest)

    monkeypatch.setattr(before_after, "ask_model", watched)
    out = run(eval_ratio=0.0, eval_file=str(held_out))
    assert asked[0] == asked[1]
    assert len(asked[0]) == 4 + 3
    assert asked[0][0].messages
    assert len([row for row in report_of(out)["side_by_side"] if row["kind"] == "held_out"]) == 3
    assert not [code for code in codes(out) if code.startswith("compare.")]


def test_a_stored_question_is_the_same_with_its_functions_and_calls() -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": [1, "二"]}}}
    messages = (
        Message.of("user", "where?"),
        Message("assistant", (), reasoning="perhaps here", tool_calls=(call,)),
        Message("tool", (TextPart("not "), TextPart("here")), name="look", tool_call_id="1"),
    )
    question = Question("rows.jsonl:1", "held_out", messages, tools=({"name": "look"},), reference="there")
    assert before_after._question_from(json.loads(json.dumps(plain(question)))) == question
    (probe, *_) = probe_questions()
    assert before_after._question_from(json.loads(json.dumps(plain(probe)))) == probe


def test_without_held_out_rows_the_probes_alone_are_compared(run: Run) -> None:
    out = run(eval_ratio=0.0)
    assert before_of(out).losses is None
    report = report_of(out)
    assert report["losses"] == []
    assert report["forgetting"]["losses"][0]["rows"] == 4
    assert len(report["side_by_side"]) == 4
    assert {row["kind"] for row in report["side_by_side"]} == {"probe"}


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_of_pairs_and_labelled_answers_prompts_are_asked_and_each_row_has_its_loss(task: str, run: Run) -> None:
    out = run(task=task)
    before, report = before_of(out), report_of(out)
    assert before.unit == "example"
    assert before.losses is not None
    assert {row.targets for row in before.losses} == {1}
    assert report["losses"][0]["base"] == pytest.approx(logged(out, "eval_loss")[0][1], rel=1e-6)
    asked = [row for row in report["side_by_side"] if row["kind"] == "held_out"]
    assert len(asked) == 5
    assert {row["question"].partition(" ")[0] for row in asked} == {"question"}
    good = {"dpo": "good", "kto": "answer"}[task]
    assert {row["reference"].partition(" ")[0] for row in asked} - {""} == {good}
    if task == "dpo":
        assert {row.prefers for row in before.losses} <= {True, False}
        assert any(measure["name"] == "prefers" for measure in report["answers"])


def test_a_reward_model_is_asked_nothing(run: Run) -> None:
    out = run(task="reward")
    before, report = before_of(out), report_of(out)
    assert before.answers == ()
    assert before.probe_losses is None
    assert report["forgetting"] is None
    assert report["losses"][0]["rows"] == 5
    assert not [code for code in codes(out) if code.startswith("compare.")]


def test_a_pretrained_model_goes_on_from_documents_and_plain_questions(run: Run) -> None:
    out = run(task="pretrain", train_mode="full", eval_ratio=0.2)
    report = report_of(out)
    losses = before_of(out).losses
    assert losses is not None
    assert [row.key.rpartition("#")[2] for row in losses] == [f"block{n + 1}" for n in range(len(losses))]
    held_out = [row for row in report["side_by_side"] if row["kind"] == "held_out"]
    assert held_out
    for row in held_out:
        assert row["question"].startswith("document")
        assert (row["question"] + row["reference"]).startswith("document")
        assert row["reference"].strip()
    assert len([row for row in report["side_by_side"] if row["kind"] == "probe"]) == 4
    assert not any(error for row in report["side_by_side"] for error in row["errors"])


def test_the_blocks_of_a_long_document_count_each(run: Run, tmp_path: Path) -> None:
    book = tmp_path / "book.jsonl"
    book.write_text(json.dumps({"text": "it was a dark and stormy night " * 60}) + "\n", encoding="utf-8")
    report = report_of(run(task="pretrain", eval_ratio=0.0, eval_file=str(book)))
    assert report["losses"][0]["rows"] > 10


def test_time_bounds_what_is_asked_and_the_end_asks_the_same(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_run, "CPU_SECONDS", 0.0)
    out = run()
    before, report = before_of(out), report_of(out)
    assert before.probe_losses is not None
    assert [len(before.probe_losses), len(before.answers)] == [1, 1 + 1]  # one of each in any case
    assert [row["key"] for row in report["side_by_side"]] == [answer.key for answer in before.answers]
    assert report["forgetting"]["losses"][0]["rows"] == 1
    (note,) = [note for note in report["notes"] if "firefly compare" in note]
    assert note.startswith("2 of 9 questions and 1 of 4 texts were put to both models")


@pytest.mark.parametrize("task", ["sft", "pretrain"])
def test_what_is_longer_than_the_context_is_not_asked(task: str, run: Run, tmp_path: Path) -> None:
    short = save_tiny_model(tmp_path / "short", "gptj", max_position_embeddings=100)
    lengths = [len(tiny_tokenizer()(text.text).input_ids) for text in probe_texts()[:4]]
    assert min(lengths) > 100  # its rotary positions are a table: what is longer fails
    out = run(task=task, model=short, max_seq_length=90)
    before, report = before_of(out), report_of(out)
    assert not before.probe_losses
    assert before.answers
    assert not [code for code in codes(out) if code.startswith("compare.")]
    assert any("4 text(s) are left out" in note and "100 tokens" in note for note in report["notes"])


def test_so_many_are_asked_at_a_time_as_will_be_done_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(in_run.time, "monotonic", lambda: now[0])

    def asked(end: float | None, most: int, seconds_each: float) -> list[int]:
        now[0], taken = 100.0, []
        for part in in_run._until(end, list(range(40)), most):  # type: ignore[type-var]
            taken.append(len(part))
            now[0] += seconds_each * len(part)
        return taken

    assert asked(None, 16, 1) == asked(1000, 16, 1) == [1, 4, 16, 16, 3]
    assert asked(109, 16, 1) == [1, 4, 4]  # to the second
    assert asked(109, 16, 5) == [1]
    assert asked(100, 8, 1) == asked(90, 8, 1) == [1]  # in any case


# ---- questions out of rows


def held_out(files: list[Path], **keys: Any) -> tuple[Any, DataConfig, Encoder]:
    tokenizer = tiny_tokenizer()
    encoder = Encoder(tokenizer, bind_template("default", tokenizer))
    data = DataConfig(train_file=tuple({"path": str(file)} for file in files), **keys)
    return load_split(data, encoder).train, data, encoder


def test_questions_are_of_each_source_in_turn_and_spread_over_it(place: Path, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", 30, seed=2)
    examples, data, encoder = held_out([place / "sft.jsonl", other])
    questions = held_out_questions(examples, data, encoder, 6)
    assert [Path(question.key.rpartition(":")[0]).name for question in questions] == ["sft.jsonl", "other.jsonl"] * 3
    rows = [json.loads(line) for line in other.read_text(encoding="utf-8").splitlines()]
    for question in questions[1::2]:
        turns = rows[int(question.key.rpartition(":")[2]) - 1]["conversation"]
        assert question.messages[-1].text == turns[-1]["human"]
        assert question.reference == turns[-1]["assistant"]
    lines = [int(question.key.rpartition(":")[2]) for question in questions[1::2]]
    assert lines[0] < 10 < lines[2]


def test_prompts_too_long_to_be_asked_are_left_to_others(tmp_path: Path) -> None:
    rows = [{"conversation": [{"human": "long " * 300 if i % 2 else f"short {i}", "assistant": "a"}]} for i in range(9)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    examples, data, encoder = held_out([file], max_seq_length=2048)
    asked = held_out_questions(examples, data, encoder, 4)
    assert len(asked) == 4
    assert all(question.shown.startswith("short") for question in asked)
    cut, data, encoder = held_out([file], max_seq_length=64, on_too_long="cut")  # the rows are as long as before
    assert all(question.shown.startswith("short") for question in held_out_questions(cut, data, encoder, 4))


def test_a_long_file_is_not_read_to_its_end(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples, data, encoder = held_out([place / "sft.jsonl"])
    monkeypatch.setattr(in_run, "LINES", 6)
    read: list[int] = []
    real = in_run.read_records

    def watched(*given: Any, **more: Any) -> Iterator[Any]:
        for record in real(*given, **more):
            read.append(record.source.line)
            yield record

    monkeypatch.setattr(in_run, "read_records", watched)
    assert len(held_out_questions(examples, data, encoder, 3)) == 3
    assert max(read) <= 6


def test_a_long_document_is_asked_by_its_beginning(tmp_path: Path) -> None:
    from firefly.data.templates import plain_template

    file = tmp_path / "documents.jsonl"
    file.write_text(json.dumps({"text": "one two three " * 2000}) + "\n", encoding="utf-8")
    encoder = Encoder(tiny_tokenizer(), plain_template())
    data = DataConfig(train_file=str(file), max_seq_length=256)
    blocks = load_split(data, encoder, "document").train
    (question,) = held_out_questions(blocks, data, encoder)
    assert question.text is not None
    assert len(question.text) <= in_run.DOCUMENT_CHARACTERS * 0.6


# ---- nothing of it costs a run


def test_a_comparison_that_fails_is_a_notice(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(before_after, "compare_measurements", fail)
    out = run()
    assert (out / "adapter_model.safetensors").is_file()
    assert manifest(out)["state"] == "finished"
    (said,) = [notice for notice in manifest(out)["notices"] if notice["code"] == "compare.failed"]
    assert "a fault" in said["message"]
    assert "firefly compare --base" in said["message"]


def test_the_command_for_later_has_what_the_run_needed(place: Path, tmp_path: Path) -> None:
    def command(task: str = "sft", held_out: bool = True, **changes: Any) -> str:
        settings = run_settings(place / "llama", place / f"{task}.jsonl", tmp_path / "out", task_type=task)
        config = load_config(settings | changes)
        kind = SimpleNamespace(HEAD="score" if task == "reward" else "lm")
        data = SimpleNamespace(held_out=[1] if held_out else None)
        run = SimpleNamespace(config=config, task=kind, data=data, folder=tmp_path / "out", chats=task != "pretrain")
        return str(before_after.how_to_compare(run))  # type: ignore[arg-type]

    rows = str(place / "held_out.jsonl")
    sound = {"template_name": "auto", "max_seq_length": 2048, "train_mode": "lora"}
    start = f"To compare the result with its base: firefly compare --base {place / 'llama'} --tuned {tmp_path / 'out'}"
    end = f" --save_path {tmp_path / 'out/comparison'}"
    assert command(held_out=False, **sound) == start + end
    assert command(eval_file=rows, **sound) == f"{start} --eval_file {rows}{end}"
    assert command("pretrain", False, **sound | {"max_seq_length": 99}) == f"{start} --max_seq_length 99{end}"
    needed = {"data_format": "alpaca", "hub": "modelscope", "trust_remote_code": True, "train_mode": "qlora"}
    options = "--data_format alpaca --hub modelscope --trust_remote_code --load_in_4bit"
    assert command(held_out=False, **sound | needed) == f"{start} {options}{end}"
    for other in ({"eval_ratio": 0.2}, {"eval_file": [rows, rows]}):
        assert command(**sound, **other).startswith(f"{start}{end} (without the held-out rows")
    assert command("reward") == "There is no command for it: firefly compare takes no reward models."


def test_stopping_the_comparison_at_the_end_leaves_a_finished_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(before_after, "_compare", stopped)
    out = run()
    assert manifest(out)["state"] == "finished"
    assert "compare.failed" in codes(out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_the_result_is_compared_leaves_a_finished_run(
    number: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = before_after._compare

    def compare(*given: Any) -> Any:
        (folder,) = [training.run.folder for training in given[:1]]
        assert manifest(folder)["state"] == "finished"
        monkeypatch.setattr(in_run, "ask", lambda *_: os.kill(os.getpid(), number))
        return real(*given)

    monkeypatch.setattr(before_after, "_compare", compare)
    handler = signal.getsignal(number)
    out = run()
    assert signal.getsignal(number) == handler
    assert manifest(out)["state"] == "finished"
    (said,) = [notice for notice in manifest(out)["notices"] if notice["code"] == "compare.failed"]
    assert f"(stopped by {signal.Signals(number).name})" in said["message"]
    assert "comparison" not in manifest(out)


def test_an_engine_that_fails_before_the_first_step_is_a_notice(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no engine")

    monkeypatch.setattr(in_run, "make_engine", fail)
    out = run()
    assert "compare.not_asked" in codes(out)
    report = report_of(out)
    assert report["losses"][0]["rows"] == 5
    assert report["side_by_side"] == []


def test_a_model_that_cannot_be_batched_is_asked_one_by_one_without_a_word(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = before_of(run("batched"))

    def refuse(*_: Any, **__: Any) -> None:
        raise Unbatchable("not here")

    monkeypatch.setattr(BatchedEngine, "_prove", refuse)
    found = before_of(run("plain"))
    assert [answer.text for answer in found.answers] == [answer.text for answer in expected.answers]
    assert "one after another" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "interrupted."), (signal.SIGTERM, 143, "stopped by SIGTERM.")],
)
def test_a_signal_while_the_model_is_asked_ends_the_run_at_once(
    number: int,
    code: int,
    said: str,
    place: Path,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(in_run, "ask", lambda *_: os.kill(os.getpid(), number))
    out = tmp_path / "stopped"
    settings = run_settings(place / "llama", place / "sft.jsonl", out, train_mode="lora", compare=True, eval_ratio=0.3)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(settings), encoding="utf-8")
    assert main(["train", str(file)]) == code
    assert capsys.readouterr().err.rstrip().endswith(said)
    assert manifest(out)["state"] == "interrupted"
    assert not (out / "comparison/before.json").exists()


def test_an_earlier_runs_report_does_not_stay_beside_another_result(run: Run) -> None:
    out = run()
    report_of(out)
    run(compare=False)
    assert not (out / "comparison/report.html").exists()
    assert not (out / "comparison/before.json").exists()
    take_notices()


def test_a_measurement_that_cannot_be_written_is_a_notice(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/comparison").write_text("a file in the way")
    out = run()
    assert manifest(out)["state"] == "finished"
    assert {"compare.not_kept", "compare.no_before"} <= set(codes(out))


# ---- several ranks


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_ranks_compare_what_one_does(engine: str, place: Path, tmp_path: Path) -> None:
    from test_ranks import ENGINES

    settings = run_settings(place / "llama", place / "sft.jsonl", tmp_path / "two", train_mode="full", compare=True)
    settings |= {"eval_ratio": 0.3, "max_steps": 2, "seed": 1, "tokens_per_microbatch": 200, "learning_rate": 1e-3}
    one = train(load_config(settings | {"output_dir": str(tmp_path / "one"), "per_device_train_batch_size": 4}))
    file = tmp_path / "configurations.json"
    file.write_text(json.dumps([settings | {"per_device_train_batch_size": 2} | ENGINES[engine]]), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    script = Path(__file__).resolve().parents[1] / "many_ranks.py"
    done = subprocess.run([*command, str(script), str(file)], capture_output=True, text=True, env=environment)
    two = tmp_path / "two"
    assert not list(two.glob("error-*")), done.stderr[-3000:]
    found, expected = before_of(two), before_of(one)
    assert found.losses is not None
    assert expected.losses is not None
    assert [row.key for row in found.losses] == [row.key for row in expected.losses]
    np.testing.assert_allclose([row.total for row in found.losses], [row.total for row in expected.losses], rtol=1e-4)
    report = report_of(two)
    assert report["losses"][0]["tuned"] == pytest.approx(report_of(one)["losses"][0]["tuned"], rel=1e-3)
    if engine in ("fsdp2", "zero3"):
        assert found.answers == ()
        assert report["forgetting"] is None
        (said,) = [notice for notice in manifest(two)["notices"] if notice["code"] == "compare.sharded"]
        command_line = f"firefly compare --base {place / 'llama'} --tuned {two} --max_seq_length "
        assert command_line in said["message"]
    else:
        assert [answer.text for answer in found.answers] == [answer.text for answer in expected.answers]
        assert done.stderr.count("comparison: ") == 1
