"""A step that runs out of memory is begun again in smaller pieces: nothing is lost, nothing trained twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from firefly.console import take_notices
from firefly.models.adapters import transformers_model
from firefly.models.attention import choose_layout
from firefly.models.checkpointing import decoder_layers
from firefly.models.forwards import install_training_forwards
from objectives import test_preference, test_steps
from objectives.test_steps import EIGHT
from tiny import assert_same, gradients, prepared, tiny_model, with_our_lora


def with_room_for(trainer: Any, tokens: int, late: bool = False) -> list[int]:
    """Let the trainer's microbatches run out of memory above `tokens`; returns the sizes of those that ran.

    `late`: in the middle of backward, when some gradients are there already.
    """
    ran: list[int] = []
    original = trainer.microbatch_loss

    def limited(model: Any, batch: Any, totals: Any) -> Tensor:
        size = sum(row.input_ids.shape[1] for row in batch.rows)
        loss = original(model, batch, totals)
        if size <= tokens:
            ran.append(size)
            return loss
        if not late:
            raise torch.OutOfMemoryError("no more")
        first = next(p for p in model.parameters() if p.requires_grad)
        first.register_hook(fail_once())
        return loss

    trainer.microbatch_loss = limited
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
    expected = test_steps.one_step(test_steps.make_trainer(model, tmp_path, EIGHT, 10**6, layout, mode))
    trainer = test_steps.make_trainer(model, tmp_path, EIGHT, 10**6, layout, mode)
    ran = with_room_for(trainer, 100, late)
    loss, found, _ = test_steps.one_step(trainer)
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    assert_same(found, expected[1], 1e-6)
    assert sum(ran) == sum(len(example.input_ids) for example in EIGHT)
    assert max(ran) <= 100
    assert trainer.counts.steps == 1
    assert trainer.counts.examples == len(EIGHT)


def test_steps_after_it_are_planned_smaller_and_it_is_said(tmp_path: Path) -> None:
    take_notices()
    model, layout, _ = prepared("llama", "lora")
    trainer = test_steps.make_trainer(model, tmp_path, EIGHT, 10**6, layout, "lora")
    with_room_for(trainer, 100)
    test_steps.one_step(trainer)
    budget = trainer.options.choices.tokens_per_microbatch
    assert budget == trainer.step_plan.budget == 192 // 2
    (planned,) = list(trainer.step_plan)
    assert len(planned.microbatches) > 1
    assert [entry["code"] for entry in take_notices()] == ["memory.halved"]


def test_a_single_example_gets_its_room_from_computing_layers_again(tmp_path: Path) -> None:
    take_notices()
    model, layout, _ = prepared("llama", "lora")
    inner = transformers_model(model)
    expected = test_steps.one_step(test_steps.make_trainer(model, tmp_path, EIGHT, 1, layout, "lora"))
    trainer = test_steps.make_trainer(model, tmp_path, EIGHT, 1, layout, "lora")
    original = trainer.microbatch_loss

    def limited(*args: Any) -> Tensor:
        if not all(layer.gradient_checkpointing for layer in decoder_layers(inner)):
            raise torch.OutOfMemoryError("no more")
        return original(*args)

    trainer.microbatch_loss = limited  # type: ignore[method-assign]
    loss, found, _ = test_steps.one_step(trainer)
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    assert_same(found, expected[1], 1e-6)
    assert trainer.options.choices.checkpointed_layers == 3
    assert [entry["code"] for entry in take_notices()] == ["memory.checkpointed"]


def test_when_nothing_is_left_to_save_the_run_stops(tmp_path: Path) -> None:
    model, layout, _ = prepared("llama", "lora")
    trainer = test_steps.make_trainer(model, tmp_path, EIGHT, 10**6, layout, "lora")
    with_room_for(trainer, 10)
    with pytest.raises(torch.OutOfMemoryError, match=r"one example of [0-9]+ tokens"):
        test_steps.one_step(trainer)


def test_dropout_draws_the_masks_of_the_first_attempt_again(tmp_path: Path) -> None:
    """One microbatch that fails late and is retried with the room it lacked: as if it had never failed."""

    model = tiny_model("llama")
    layout, _ = choose_layout(model)
    wrapped = with_our_lora(model, dropout=0.3)
    install_training_forwards(wrapped)
    trainer = test_steps.make_trainer(wrapped, tmp_path, EIGHT[:1], 10**6, layout, "lora")
    torch.manual_seed(5)
    expected = test_steps.one_step(trainer)
    again = test_steps.make_trainer(wrapped, tmp_path, EIGHT[:1], 10**6, layout, "lora")
    original, attempts = again.microbatch_loss, []

    def once(*args: Any) -> Tensor:
        loss = original(*args)
        attempts.append(1)
        if len(attempts) == 1:
            raise torch.OutOfMemoryError("no more")
        return loss

    again.microbatch_loss = once  # type: ignore[method-assign]
    torch.manual_seed(5)
    found = test_steps.one_step(again)
    assert len(attempts) == 2
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    assert_same(found[1], expected[1], 1e-6)


def test_preference_metrics_count_each_pair_once(tmp_path: Path) -> None:
    model, layout, _ = prepared("llama", "lora")
    expected = test_preference.make_trainer(model, tmp_path, budget=10**6, layout=layout)
    loss = test_preference.one_step(expected)[0]
    wanted = gradients(model)
    trainer = test_preference.make_trainer(model, tmp_path, budget=10**6, layout=layout)
    with_room_for(trainer, 150, late=True)
    found = test_preference.one_step(trainer)
    torch.testing.assert_close(found[0], loss, rtol=1e-6, atol=0)
    assert_same(found[1], wanted, 1e-5)
    torch.testing.assert_close(trainer._sums, expected._sums, rtol=1e-5, atol=1e-6)
    assert trainer._summed_pairs == expected._summed_pairs == len(test_preference.PAIRS)
