"""A step that runs out of memory is begun again in smaller pieces: nothing is lost, nothing trained twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from firefly.config import load_config
from firefly.console import take_notices
from firefly.models.adapters import transformers_model
from firefly.models.attention import choose_layout
from firefly.models.checkpointing import decoder_layers
from firefly.models.forwards import install_training_forwards
from firefly.tasks.base import Forward, Task
from firefly.tasks.causal import TokenTask
from firefly.training import train
from tasks import test_preference
from tasks.test_steps import EIGHT
from tiny import assert_same, prepared, save_tiny_model, tiny_model, with_our_lora, write_rows
from trials import Trial, make_trial


def with_room_for(trial: Trial, tokens: int, late: bool = False) -> list[int]:
    """Let the trial's microbatches run out of memory above `tokens`; returns the sizes of those that ran.

    `late`: in the middle of backward, when some gradients are there already.
    """
    ran: list[int] = []
    original = trial.task.microbatch_loss

    def limited(forward: Forward, batch: Any, totals: Any, of_step: Any) -> Any:
        size = sum(row.input_ids.shape[1] for row in batch.rows)
        found = original(forward, batch, totals, of_step)
        if size <= tokens:
            ran.append(size)
            return found
        if not late:
            raise torch.OutOfMemoryError("no more")
        first = next(p for p in forward.module.parameters() if p.requires_grad)
        first.register_hook(fail_once())
        return found

    trial.task.microbatch_loss = limited  # type: ignore[method-assign]
    return ran


def fail_once() -> Any:
    def fail(gradient: Tensor) -> Tensor:
        if not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("no more")
        return gradient

    failed: list[int] = []
    return fail


@pytest.mark.parametrize("late", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_loss_and_gradients_are_those_of_a_step_that_had_the_room(mode: str, late: bool, tmp_path: Path) -> None:
    model, layout, _ = prepared("llama", mode)
    expected = make_trial(model, tmp_path, EIGHT, 10**6, layout, mode).one_step()
    trial = make_trial(model, tmp_path, EIGHT, 10**6, layout, mode)
    ran = with_room_for(trial, 100, late)
    loss, found, _ = trial.one_step()
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    assert_same(found, expected[1], 1e-6)
    assert sum(ran) == sum(len(example.input_ids) for example in EIGHT)
    assert max(ran) <= 100


def test_steps_after_it_are_planned_smaller_and_it_is_said(tmp_path: Path) -> None:
    take_notices()
    model, layout, _ = prepared("llama", "lora")
    trial = make_trial(model, tmp_path, EIGHT, 10**6, layout, "lora")
    with_room_for(trial, 100)
    trial.one_step()
    budget = trial.model.choices.tokens_per_microbatch
    assert budget == trial.steps.plan.budget == 192 // 2
    (planned,) = list(trial.steps.plan)
    assert len(planned.microbatches) > 1
    assert [entry["code"] for entry in take_notices()] == ["memory.halved"]


def test_a_single_example_gets_its_room_from_computing_layers_again(tmp_path: Path) -> None:
    take_notices()
    model, layout, _ = prepared("llama", "lora")
    inner = transformers_model(model)
    expected = make_trial(model, tmp_path, EIGHT, 1, layout, "lora").one_step()
    trial = make_trial(model, tmp_path, EIGHT, 1, layout, "lora")
    original = trial.task.microbatch_loss

    def limited(*args: Any) -> Any:
        if not all(layer.gradient_checkpointing for layer in decoder_layers(inner)):
            raise torch.OutOfMemoryError("no more")
        return original(*args)

    trial.task.microbatch_loss = limited  # type: ignore[method-assign]
    loss, found, _ = trial.one_step()
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    assert_same(found, expected[1], 1e-6)
    assert trial.model.choices.checkpointed_layers == 3
    assert [entry["code"] for entry in take_notices()] == ["memory.checkpointed"]


def test_when_nothing_is_left_to_save_the_run_stops(tmp_path: Path) -> None:
    model, layout, _ = prepared("llama", "lora")
    trial = make_trial(model, tmp_path, EIGHT, 10**6, layout, "lora")
    with_room_for(trial, 10)
    with pytest.raises(torch.OutOfMemoryError, match=r"one example of [0-9]+ tokens"):
        trial.one_step()


def test_dropout_draws_the_masks_of_the_first_attempt_again(tmp_path: Path) -> None:
    """One microbatch that fails late and is retried with the room it lacked: as if it had never failed."""

    model = tiny_model("llama")
    layout, _ = choose_layout(model)
    wrapped = with_our_lora(model, dropout=0.3)
    install_training_forwards(wrapped)
    trial = make_trial(wrapped, tmp_path, EIGHT[:1], 10**6, layout, "lora")
    torch.manual_seed(5)
    expected = trial.one_step()
    again = make_trial(wrapped, tmp_path, EIGHT[:1], 10**6, layout, "lora")
    original, attempts = again.task.microbatch_loss, []

    def once(*args: Any) -> Any:
        loss = original(*args)
        attempts.append(1)
        if len(attempts) == 1:
            raise torch.OutOfMemoryError("no more")
        return loss

    again.task.microbatch_loss = once  # type: ignore[method-assign]
    torch.manual_seed(5)
    found = again.one_step()
    assert len(attempts) == 2
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    assert_same(found[1], expected[1], 1e-6)


def test_the_pass_that_counts_experts_is_begun_again_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, layout, _ = prepared("mixtral", "lora")
    expected = make_trial(module, tmp_path, EIGHT, 120, layout, "lora").one_step()
    trial = make_trial(module, tmp_path, EIGHT, 120, layout, "lora")
    original, attempts = Task._count_experts, []

    def counting(*arguments: Any) -> Any:
        attempts.append(1)
        if len(attempts) == 1:
            raise torch.OutOfMemoryError("no more")
        return original(*arguments)

    monkeypatch.setattr(Task, "_count_experts", counting)
    loss, found, _ = trial.one_step()
    assert len(attempts) == 2
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=0)
    assert_same(found, expected[1], 1e-5)


def test_preference_metrics_count_each_pair_once(tmp_path: Path) -> None:
    model, layout, _ = prepared("llama", "lora")
    expected = test_preference.make_pairs_trial(model, tmp_path, budget=10**6, layout=layout)
    loss, wanted, _ = expected.one_step()
    trial = test_preference.make_pairs_trial(model, tmp_path, budget=10**6, layout=layout)
    with_room_for(trial, 150, late=True)
    found = trial.one_step()
    torch.testing.assert_close(found[0], loss, rtol=1e-6, atol=0)
    assert_same(found[1], wanted, 1e-5)
    assert trial.computed is not None
    assert expected.computed is not None
    assert trial.computed.sums is not None
    torch.testing.assert_close(trial.computed.sums, expected.computed.sums, rtol=1e-5, atol=1e-6)


def test_a_run_that_runs_out_of_memory_ends_as_one_that_had_the_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(tmp_path / "model", "llama_tied")
    write_rows(tmp_path / "train.jsonl", 12)
    settings = {
        "model_name_or_path": str(tmp_path / "model"),
        "train_file": str(tmp_path / "train.jsonl"),
        "template_name": "default",
        "train_mode": "lora",
        "per_device_train_batch_size": 4,
        "tokens_per_microbatch": 400,
        "lora_dropout": 0.0,
        "learning_rate": 0.5,
        "optim": "sgd",
        "num_train_epochs": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }
    monkeypatch.setattr("firefly.runs.plots.draw_loss", lambda *_: None)
    whole = train(load_config(settings | {"output_dir": str(tmp_path / "whole")}))
    original, failures = TokenTask.microbatch_loss, [0]

    def limited(self: Any, forward: Forward, batch: Any, totals: Any, of_step: Any) -> Any:
        if batch.input_ids.shape[1] > 200:
            failures[0] += 1
            raise torch.OutOfMemoryError("no more")
        return original(self, forward, batch, totals, of_step)

    monkeypatch.setattr(TokenTask, "microbatch_loss", limited)
    out = train(load_config(settings | {"output_dir": str(tmp_path / "out")}))
    assert failures[0] == 1  # the steps after it are cut smaller
    counts = [json.loads((folder / "train_results.json").read_text()) for folder in (whole, out)]
    for name in ("steps", "examples", "input_tokens", "target_tokens"):
        assert counts[0][name] == counts[1][name]
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (whole, out))
    assert_same(second, first, 1e-5)
