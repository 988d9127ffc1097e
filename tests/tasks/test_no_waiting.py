"""A step asks the device for no number: every such question would wait until all work before it is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from firefly.data.batching import PackedBatch, Step, StepTotals, pack
from firefly.data.pair_batching import pack_pairs
from tasks import test_preference
from tasks.test_steps import EIGHT
from tiny import prepared, random_examples
from trials import make_trial

# Operators whose result, or whose result's size, a GPU has to send to the CPU before Python can go on.
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "bincount",
    "_unique2",
    "unique_dim",
    "repeat_interleave.Tensor",
}


class Questions(TorchDispatchMode):
    """Records every operator that would wait, and indexing by a mask, which counts its true values."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        masks = name.startswith("index") and any(
            getattr(x, "dtype", None) == torch.bool for part in args if isinstance(part, list | tuple) for x in part
        )
        if name in WAITING or name.partition(".")[0] in WAITING or masks:
            self.asked.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def questions() -> Iterator[list[str]]:
    with Questions() as mode:
        yield mode.asked


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2_window", "gpt_neox"])
def test_an_sft_step_waits_for_nothing(name: str, mode: str, tmp_path: Path) -> None:
    model, layout, _ = prepared(name, mode)
    trial = make_trial(model, tmp_path, EIGHT, 64, layout, mode)
    step = trial.step()
    with questions() as asked:
        trial.task.backward(trial.model, step)
    assert asked == []


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "orpo"])
def test_a_preference_step_waits_for_nothing(loss: str, tmp_path: Path) -> None:
    model, layout, _ = prepared("llama", "lora")
    trial = test_preference.make_pairs_trial(model, tmp_path, budget=100, layout=layout, loss=loss)
    step = trial.step()
    with questions() as asked:
        trial.task.backward(trial.model, step)
    assert asked == []


def test_such_questions_are_noticed() -> None:
    x = torch.arange(4)
    with questions() as asked:
        assert x.sum().item() == 6
        x[x > 1]
        x.nonzero()
    assert len(asked) == 3


def test_a_step_is_pinned_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    totals = StepTotals(2, 0, 0, 0)
    step = Step((pack(random_examples(4, 5)), pack(random_examples(6))), totals, ((0, 1), (2,)))
    again = step.pin_memory()
    assert isinstance(again.microbatches[0], PackedBatch)
    assert again.example_ids == step.example_ids
    assert again.totals == totals
    assert len(pinned) == 2 * 4
    pinned.clear()
    Step((pack_pairs(test_preference.PAIRS[:2]),), totals, ((0, 1),)).pin_memory()
    assert len(pinned) == 4 + 2  # of its one row; owners and counts
