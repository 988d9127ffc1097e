"""A resumed run is the uninterrupted one to the bit, or says what is different."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from firefly.config import load_config
from firefly.data import dataset, preparation
from firefly.data.batching import StepPlan, StepSettings
from firefly.data.examples import ExampleCounts
from firefly.data.schema import Tokens
from firefly.errors import UsageError
from firefly.runs.checkpoints import checkpoints
from firefly.runs.metrics import read_metrics
from firefly.saving import load_random_state
from firefly.setup import identity
from firefly.tasks.base import Task
from firefly.training import train
from runs.forking import Run
from tiny import prepared, random_examples, save_tiny_model, tiny_tokenizer, write_rows
from trials import make_trial


def result(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line}


def notices(folder: Path) -> dict[str, str]:
    return {item["code"]: item["message"] for item in json.loads((folder / "run.json").read_text())["notices"]}


def stopped_at(folder: Path, step: int, whole: Path) -> Path:
    """A copy of a whole run as it would be, had it been killed after the checkpoint at `step`."""
    shutil.copytree(whole, folder)
    for path in checkpoints(folder):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    (folder / "adapter_model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def whole(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("firefly.runs.plots.draw_loss", lambda *_: None)
        return train(load_config(settings | {"output_dir": str(tmp_path_factory.mktemp("whole") / "out")}))


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    return stopped_at(tmp_path / "out", 8, whole)


# ---- the same, to the bit ----


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_a_log_line_that_a_checkpoint_cut_in_two_is_whole(task: str, run: Run, place: Path, tmp_path: Path) -> None:
    """Checkpoints at every second step, a line at every fifth: both halves of its mean are in it."""
    changes: dict[str, Any] = {"logging_steps": 5}
    if task == "dpo":
        rows = [{"prompt": f"q {i}", "chosen": "good " * (1 + i % 3), "rejected": "bad"} for i in range(22)]
        (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        changes |= {"task_type": "dpo", "train_file": str(place / "pairs.jsonl")}
    first = run("first", **changes)
    stopped_at(tmp_path / "second", 8, first)
    second = run("second", resume_from_checkpoint=True, **changes)
    assert list(losses(second)) == [5, 10]
    assert losses(second) == losses(first)
    if task == "dpo":
        margins = [
            [line["rewards/margins"] for line in read_metrics(folder / "metrics.jsonl") if "rewards/margins" in line]
            for folder in (first, second)
        ]
        assert margins[0] == margins[1]
    results = json.loads((second / "train_results.json").read_text())
    assert results["train_loss"] == pytest.approx(
        np.mean([loss for step, loss in losses(run("each", **changes | {"logging_steps": 1})).items() if step > 8]),
        rel=1e-6,
    )


def test_an_evaluation_at_the_end_of_an_epoch_is_in_the_checkpoint_of_its_last_step(run: Run, place: Path) -> None:
    out = run(eval_file=str(place / "eval.jsonl"), eval_strategy="epoch")
    history = json.loads((out / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [6]
    assert [path.name for path in checkpoints(out)] == [f"checkpoint-{step}" for step in range(2, 13, 2)]


def test_steps_of_the_past_are_not_planned_again() -> None:
    """Ten thousand of 512 examples."""
    count = 10_010 * 512
    ones = np.ones(count, dtype=np.int64)
    counts = ExampleCounts(ones * 300, ones, ones, *[ones * 0] * 5)
    plan = StepPlan(counts, StepSettings(512, seed=1), 4096)
    expected = plan.plan(plan.order()[10_000 * 512 : 10_001 * 512])
    plan.start = 10_000
    began = time.perf_counter()
    steps = iter(plan)
    assert next(steps) == expected
    assert time.perf_counter() - began < 2


def test_a_resumed_run_identity_only_what_it_trains(run: Run, stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[int] = []
    original = StepPlan.plan

    def plan(self: StepPlan, rows: np.ndarray) -> Any:
        planned.append(len(rows))
        return original(self, rows)

    monkeypatch.setattr(StepPlan, "plan", plan)
    run(resume_from_checkpoint=True)
    assert planned == [4, 4, 4, 2]  # steps 9 to 12; the first two of the second epoch are skipped


def test_a_run_goes_on_with_the_day_on_which_it_began(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that prints today's date would print another one after midnight."""
    template = tmp_path / "dated.jinja"
    template.write_text(
        "{{ strftime_now('%d %b %Y') }}\n{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{{ eos_token if m.role == 'assistant' else '' }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    today = datetime.date.today()
    first = run("first", template_name=str(template))
    stopped_at(tmp_path / "second", 8, first)

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:  # pyright: ignore[reportIncompatibleMethodOverride]
            return today + datetime.timedelta(days=1)

    monkeypatch.setattr("firefly.data.templates.datetime", SimpleNamespace(date=Tomorrow))
    second = run("second", template_name=str(template), resume_from_checkpoint=True)
    assert json.loads((second / "run.json").read_text())["template"]["date"] == today.isoformat()
    assert result(second) == result(first)
    third = run("third", template_name=str(template))
    assert json.loads((third / "run.json").read_text())["template"]["date"] != today.isoformat()


def test_a_run_that_began_in_english_goes_on_in_chinese(
    run: Run, stopped: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert os.environ["FIREFLY_LANG"] == "en"
    monkeypatch.setenv("FIREFLY_LANG", "zh")
    out = run(resume_from_checkpoint=True)
    assert "继续训练" in notices(out)["resume.from"]
    assert result(out) == result(whole)
    assert losses(out) == losses(whole)


def count_preparations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    prepared: list[str] = []
    original = dataset.prepare

    def prepare(records: Any, file: str, *arguments: Any) -> None:
        prepared.append(file)
        original(records, file, *arguments)

    monkeypatch.setattr(dataset, "prepare", prepare)
    return prepared


def patch_data_code(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (dataset, identity):
        monkeypatch.setattr(module, "code_hash", lambda: "patched")


def test_a_patch_of_data_code_that_leaves_the_examples_alone_goes_on(
    run: Run, stopped: Path, whole: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_data_code(monkeypatch)
    prepared = count_preparations(monkeypatch)
    out = run(resume_from_checkpoint=True)
    assert prepared == [str(place / "train.jsonl")]  # the cache is of the old code
    assert result(out) == result(whole)


def test_a_patch_of_data_code_that_changes_the_examples_is_refused_as_such(
    run: Run, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIREFLY_CACHE", str(tmp_path / "cache"))
    patch_data_code(monkeypatch)
    original = preparation.fit

    def fit(tokens: Tokens, *arguments: Any) -> Tokens | None:
        return original(Tokens(tokens.input_ids[1:], tokens.labels[1:]), *arguments)

    monkeypatch.setattr(preparation, "fit", fit)
    with pytest.raises(UsageError) as refusal:
        run(resume_from_checkpoint=True)
    assert refusal.value.code == "resume.changed"
    assert "(code: " in str(refusal.value)
    assert "→ patched)" in str(refusal.value)


def test_the_same_rows_at_another_place_are_the_same_data(
    run: Run, stopped: Path, whole: Path, place: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved.jsonl"
    moved.write_text("\n" + (place / "train.jsonl").read_text())  # a blank line is no row
    assert result(run(resume_from_checkpoint=True, train_file=str(moved))) == result(whole)


# ---- what differs, by name ----


def folder_with_other_tokenizer(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|endoftext|>", "<|new|>"]})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("data", "{place}/train.jsonl: "),
        ("template", "template: "),
        ("tokenizer", "tokenizer: "),
        ("base weights", "base_weights: "),
        ("max_seq_length", "max_seq_length: 1024 → 60"),
        ("train_on", "train_on: all → last"),
        ("lr_scheduler_type", "lr_scheduler_type: linear → cosine"),
        ("warmup_steps", "warmup_steps: 0 → 3"),
        ("max_grad_norm", "max_grad_norm: 1.0 → 0.5"),
        ("lora_dropout", "lora_dropout: 0.1 → 0.2"),
        ("precision", "precision: float32 → bfloat16"),
    ],
)
def test_what_changed_is_named_and_nothing_else(
    what: str, named: str, run: Run, stopped: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {"max_seq_length": 60, "train_on": "last", "lr_scheduler_type": "cosine"}
    values |= {"warmup_steps": 3, "max_grad_norm": 0.5, "lora_dropout": 0.2}
    changes: dict[str, Any] = {what: values[what], "max_lost_share": 1.0} if what in values else {}
    if what == "data":
        changes = {}
        original = (place / "train.jsonl").read_bytes()
        write_rows(place / "train.jsonl", 22, seed=3)
    elif what == "template":
        changes = {"template_name": "chatml"}
    elif what == "tokenizer":
        changes = {"model_name_or_path": str(folder_with_other_tokenizer(place / "model", tmp_path / "model"))}
    elif what == "base weights":
        changes = {"model_name_or_path": str(save_tiny_model(tmp_path / "model", "llama_tied", seed=7))}
    elif what == "precision":
        monkeypatch.setattr("firefly.models.precision.has_bf16", lambda device: True)
        changes = {"bf16": True}
    try:
        with pytest.raises(UsageError) as refusal:
            run(resume_from_checkpoint=True, **changes)
    finally:
        if what == "data":
            (place / "train.jsonl").write_bytes(original)
    said = str(refusal.value)
    assert f"({named.format(place=place)}" in said
    assert said.count("→") == 1
    assert "resume_anyway: true" in said


def test_a_refused_run_leaves_the_records_of_the_earlier_one(run: Run, stopped: Path) -> None:
    names = ("template_certificate.json", "data_report.json", "run.json", "train_args.json")
    before = {name: (stopped / name).read_bytes() for name in names}
    with pytest.raises(UsageError, match="template"):
        run(resume_from_checkpoint=True, template_name="chatml")
    assert {name: (stopped / name).read_bytes() for name in names} == before


def test_told_to_a_run_goes_on_all_the_same_and_says_what_it_overrode(run: Run, stopped: Path) -> None:
    out = run(resume_from_checkpoint=True, resume_anyway=True, seed=2, max_grad_norm=0.5)
    assert "seed: 1 → 2" in notices(out)["resume.anyway"]
    assert "max_grad_norm: 1.0 → 0.5" in notices(out)["resume.anyway"]
    assert list(losses(out)) == list(range(1, 13))


@pytest.mark.parametrize("changes", [{"lora_rank": 8}, {"train_mode": "full"}, {"lora_target": ["q_proj"]}], ids=str)
def test_other_weights_cannot_be_overridden(changes: dict[str, Any], run: Run, stopped: Path) -> None:
    for anyway in (True, False):  # what would be refused next is not offered first
        with pytest.raises(UsageError, match="which nothing can override") as refusal:
            run(resume_from_checkpoint=True, resume_anyway=anyway, **changes)
        assert next(iter(changes)) in str(refusal.value)


@pytest.mark.parametrize(("epochs", "steps"), [(3, 18), (1.5, 9)])
def test_another_number_of_steps_is_allowed_and_said(epochs: float, steps: int, run: Run, stopped: Path) -> None:
    out = run(resume_from_checkpoint=True, num_train_epochs=epochs)
    assert f"the run has {steps} steps now, not 12" in notices(out)["resume.schedule"]
    assert list(losses(out)) == list(range(1, steps + 1))


def test_an_unchanged_run_says_nothing_of_the_kind(run: Run, stopped: Path, whole: Path) -> None:
    out = run(resume_from_checkpoint=True)
    assert not {"resume.schedule", "resume.ranks", "resume.anyway", "resume.kept"} & notices(out).keys()
    assert result(out) == result(whole)


def test_a_run_goes_on_with_its_threads_where_others_would_be_taken_today(
    run: Run, stopped: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = stopped / "checkpoint-8" / "plan.json"
    plan = json.loads(file.read_text())
    assert plan["threads"] == torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    today = plan["threads"] + 1  # of another machine
    computed, own = set(), Task.backward

    def backward(*given: Any) -> Any:
        computed.add(torch.get_num_threads())
        return own(*given)

    monkeypatch.setattr(Task, "backward", backward)
    torch.set_num_threads(today)
    try:
        out = run(resume_from_checkpoint=True)
        assert torch.get_num_threads() == today
    finally:
        torch.set_num_threads(plan["threads"])
    assert computed == {plan["threads"]}
    assert "as before the checkpoint" in notices(out)["resume.threads"]
    assert result(out) == result(whole)
    assert json.loads((out / "run.json").read_text())["hardware"]["threads"] == plan["threads"]


def test_a_plan_that_lists_no_files_is_none_of_a_complete_checkpoint(run: Run, stopped: Path) -> None:
    file = stopped / "checkpoint-8" / "plan.json"
    plan = json.loads(file.read_text())
    del plan["files"]
    file.write_text(json.dumps(plan))
    with pytest.raises(UsageError, match=r"missing: plan\.json"):
        run(resume_from_checkpoint=str(file.parent))


# ---- ranks ----


def test_other_ranks_are_said_and_take_random_states_that_depend_on_their_place(run: Run, stopped: Path) -> None:
    file = stopped / "checkpoint-8" / "plan.json"
    plan = json.loads(file.read_text()) | {"world_size": 2}
    del plan["files"]["rng_state.pth"]
    file.write_text(json.dumps(plan))
    for rank in range(2):
        shutil.copy(stopped / "checkpoint-8" / "rng_state.pth", stopped / "checkpoint-8" / f"rng_state_{rank}.pth")
    (stopped / "checkpoint-8" / "rng_state.pth").unlink()
    again = Path(shutil.copytree(stopped, stopped.with_name("again")))
    first, second = run(resume_from_checkpoint=True), run(again.name, resume_from_checkpoint=True)
    assert "of 2 rank(s), this run has 1" in notices(first)["resume.ranks"]
    assert result(first) == result(second)


def test_a_seeded_random_state_is_of_seed_rank_and_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, layout, _ = prepared("llama", "lora")
    trial = make_trial(model, tmp_path, random_examples(5, 6), 64, layout, "lora")

    def drawn(rank: int, step: int) -> tuple[float, ...]:
        monkeypatch.setattr(type(trial.model.args), "process_index", rank)
        load_random_state(trial.model, tmp_path, step)
        return tuple(torch.rand(3).tolist())

    found = [drawn(rank, step) for rank in (0, 1) for step in (2, 3)]
    assert len(set(found)) == 4
    assert drawn(1, 2) == found[2]
