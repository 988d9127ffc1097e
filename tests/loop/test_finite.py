"""No weight moves by a step whose loss or gradients are not numbers."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from firefly.config import load_config
from firefly.console import take_notices
from firefly.data.batching import StepPlan, StepSettings
from firefly.errors import UsageError
from firefly.loop import NAMED_ROWS, look_at, name_rows
from firefly.runs.checkpoints import checkpoints
from firefly.runs.metrics import read_metrics
from firefly.tasks.base import Task
from firefly.tasks.causal import TokenTask
from firefly.training import train
from tiny import ListedExamples, prepared, random_examples, run_settings, save_tiny_model, tiny_model, write_rows
from trials import Trial, make_trial

ROWS = 22


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Twelve steps of four rows, each row a microbatch."""
    place = tmp_path_factory.mktemp("finite")
    save_tiny_model(place / "model", "llama_tied")
    write_rows(place / "train.jsonl", ROWS)
    return run_settings(
        place / "model",
        place / "train.jsonl",
        place / "out",
        train_mode="lora",
        lora_rank=4,
        lora_dropout=0.1,
        per_device_train_batch_size=4,
        tokens_per_microbatch=1,
        learning_rate=0.01,
        num_train_epochs=2,
        save_strategy="steps",
        save_steps=1,
        seed=1,
    )


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firefly.runs.plots.draw_loss", lambda *_: None)


def poison(patch: pytest.MonkeyPatch, row: int, how: str) -> None:
    """Row `row` of the data has a loss or a gradient that is no number."""
    original, step_of = TokenTask.microbatch_loss, Task.backward
    running: list[tuple[int, ...]] = []

    def poisoned(self: Any, forward: Any, batch: Any, totals: Any, of_step: Any) -> Any:
        loss, measured = original(self, forward, batch, totals, of_step)
        if row not in running.pop(0):
            return loss, measured
        if how == "gradient":
            parameter = next(p for p in forward.module.parameters() if p.requires_grad)
            return loss + (parameter.sum() * 0).sqrt() * 0, measured  # finite, its gradient infinity times zero
        return loss * math.nan, measured

    def watched(self: Any, model: Any, step: Any) -> Any:
        running[:] = step.example_ids
        return step_of(self, model, step)

    patch.setattr(TokenTask, "microbatch_loss", poisoned)
    patch.setattr(Task, "backward", watched)


def rows_of_step(settings: dict[str, Any], epoch: int, step: int) -> list[int]:
    plan = StepPlan(ListedExamples(random_examples(*[9] * ROWS)).counts, StepSettings(4, settings["seed"]), 1)
    plan.epoch = epoch
    return [int(row) for row in plan.order()[4 * step : 4 * step + 4]]


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_such_a_step_stops_the_run_names_its_row_and_loses_nothing(
    how: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    whole = train(load_config(settings | {"output_dir": str(tmp_path / "whole"), "save_strategy": "no"}))
    bad = rows_of_step(settings, 0, 3)[1]  # first seen in step 4
    out = settings | {"output_dir": str(tmp_path / "out"), "save_steps": 100}
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, bad, how)
        with pytest.raises(UsageError) as refusal:
            train(load_config(out))
    said = str(refusal.value)
    assert "step 4:" in said
    assert f"{settings['train_file']}:{bad + 1}" in said
    named = 1 if how == "loss" else 4  # whose gradient it was is not known
    assert said.count("train.jsonl:") == named
    assert f"{tmp_path / 'out' / 'checkpoint-3'} is safe." in said
    assert "--on_nonfinite_loss skip" in said
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-3"]
    again = train(load_config(out | {"resume_from_checkpoint": True}))
    assert weights(again) == weights(whole)
    assert [line["loss"] for line in lines(again)] == [line["loss"] for line in lines(whole)]
    state, expected = (
        json.loads((folder / "checkpoint-12" / "trainer_state.json").read_text())
        for folder in (again, train(load_config(settings | {"output_dir": str(tmp_path / "third")})))
    )
    assert state["total_flos"] == expected["total_flos"]


def test_the_first_step_stops_a_run_that_has_nothing_to_save(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, rows_of_step(settings, 0, 0)[0], "loss")
        with pytest.raises(UsageError, match="There is no complete checkpoint"):
            train(load_config(settings | {"output_dir": str(tmp_path)}))
    assert checkpoints(tmp_path) == []


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_skipped_it_changes_no_weight_and_is_counted(
    how: str, settings: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = rows_of_step(settings, 0, 3)[1]
    epoch, position = 1, next(step for step in range(6) if bad in rows_of_step(settings, 1, step))
    steps = [4, 6 * epoch + position + 1]
    take_notices()
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, bad, how)
        out = train(load_config(settings | {"output_dir": str(tmp_path), "on_nonfinite_loss": "skip"}))
    for step in range(2, 13):
        before, after = (weights(out / f"checkpoint-{number}") for number in (step - 1, step))
        assert (before == after) == (step in steps)
    said = capfd.readouterr().err
    for step in steps:
        assert f"step {step} is skipped" in said
    results = json.loads((out / "train_results.json").read_text())
    assert results["skipped_steps"] == 2
    assert math.isfinite(results["train_loss"])
    text = (out / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert [line["step"] for line in lines(out)] == [step for step in range(1, 13) if step not in steps]
    rates = {line["step"]: line["learning_rate"] for line in lines(out)}
    assert rates[5] == pytest.approx(0.01 * (1 - 4 / 12))  # the schedule went on


def test_means_are_over_the_steps_that_were_trained(settings: dict[str, Any], tmp_path: Path) -> None:
    bad = rows_of_step(settings, 0, 3)[1]
    outs = {}
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, bad, "loss")
        for every in (1, 6):
            changes = {"output_dir": str(tmp_path / str(every)), "on_nonfinite_loss": "skip", "logging_steps": every}
            outs[every] = train(load_config(settings | changes | {"max_steps": 6, "save_strategy": "no"}))
    each = [line["loss"] for line in lines(outs[1])]
    (mean,) = [line["loss"] for line in lines(outs[6])]
    assert len(each) == 5
    assert mean == pytest.approx(sum(each) / 5, rel=1e-6)
    results = [json.loads((out / "train_results.json").read_text())["train_loss"] for out in outs.values()]
    assert results == pytest.approx([mean, mean], rel=1e-6)


def test_a_run_killed_after_a_skipped_step_goes_on_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    bad = rows_of_step(settings, 0, 3)[1]
    changes = {"on_nonfinite_loss": "skip", "logging_steps": 4}
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, bad, "loss")
        whole = train(load_config(settings | changes | {"output_dir": str(tmp_path / "whole")}))
        stopped = Path(shutil.copytree(whole, tmp_path / "stopped"))
        for path in checkpoints(stopped):
            if int(path.name.split("-")[1]) > 5:
                shutil.rmtree(path)
        again = train(load_config(settings | changes | {"output_dir": str(stopped), "resume_from_checkpoint": True}))
    assert weights(again) == weights(whole)
    assert [line["loss"] for line in lines(again)] == [line["loss"] for line in lines(whole)]


def computed_step(tmp_path: Path, count: int = 8) -> Trial:
    """A trial that has computed a step."""
    module, layout, _ = prepared("llama", "lora")
    trial = make_trial(module, tmp_path, random_examples(*[5] * count), 5, layout, "lora")
    trial.one_step()
    return trial


def test_under_loss_scaling_infinite_gradients_are_left_to_the_scaler(tmp_path: Path) -> None:
    trial, infinite = computed_step(tmp_path), torch.tensor(math.inf)
    assert trial.computed is not None
    assert look_at(trial.model, trial.computed, infinite, 0) == (False, 0)
    trial.model.accelerator.scaler = object()  # type: ignore[assignment]
    assert look_at(trial.model, trial.computed, infinite, 0) == (True, 0)
    trial.computed.loss.fill_(math.nan)
    assert look_at(trial.model, trial.computed, torch.tensor(1.0), 0) == (False, 0)


def test_at_most_twenty_rows_are_named(tmp_path: Path) -> None:
    trial = computed_step(tmp_path, 25)
    examples: Any = trial.steps.dataset
    assert trial.computed is not None
    named = name_rows(examples.examples, trial.computed)
    assert named.count("listed:") == NAMED_ROWS == 20
    assert named.endswith("and 5 more")
    assert named.startswith("listed:1, listed:2, ")
    for part in trial.computed.parts[3:5]:
        part.fill_(math.inf)
    rows = sorted(row for rows in trial.computed.example_ids[3:5] for row in rows)
    assert name_rows(examples.examples, trial.computed) == ", ".join(f"listed:{row + 1}" for row in rows)


def test_the_one_question_of_a_step_comes_after_all_of_its_work(tmp_path: Path) -> None:
    from tasks.test_no_waiting import questions

    trial = computed_step(tmp_path)
    assert trial.computed is not None
    with questions() as asked:
        look_at(trial.model, trial.computed, trial.model.clip_gradients(1.0), 0)
    assert asked == ["_local_scalar_dense"] or asked == ["is_nonzero", "_local_scalar_dense"]


def test_tiny_models_are_finite() -> None:
    """Or the tests above would say nothing."""
    assert all(bool(parameter.isfinite().all()) for parameter in tiny_model("llama_tied").parameters())
