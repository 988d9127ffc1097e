"""What is dropped: each number with the probability that was asked for, whatever becomes of the others."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from firefly.models.kernels import dropout
from firefly.models.kernels.dropout import BLOCK, MOST_BY_POINTS, draw, drop, drop_drawing, dropped

CHANCES = [0.001, 0.05, 0.3, 0.5, 0.8]


def kept(shape: tuple[int, int], chance: float, drawn: dropout.Drawn) -> Tensor:
    """1 where a number stays."""
    return drop(torch.ones(shape), dropped(drawn, shape, chance), chance) * (1 - chance)


@pytest.mark.parametrize("chance", CHANCES)
def test_each_number_is_dropped_with_its_probability(chance: float) -> None:
    torch.manual_seed(5)
    shape, rounds = (700, 40), 60  # more than one block of rows
    count = shape[0] * shape[1] * rounds
    gone = sum(1 - kept(shape, chance, draw(shape, chance, torch.ones(1))) for _ in range(rounds))
    share, error = gone.mean().item() / rounds, math.sqrt(chance * (1 - chance) / count)
    assert abs(share - chance) < 5 * error
    # A number's own count is binomial over the rounds, anywhere in the array: mean and variance.
    expected = rounds * chance * (1 - chance)
    assert gone.var().item() == pytest.approx(
        expected, rel=5 * math.sqrt(2 / gone.numel()) + 3 / gone.numel() / expected
    )
    for part in (gone[:BLOCK], gone[BLOCK:], gone[:, :20], gone[:, 20:]):
        error = math.sqrt(chance * (1 - chance) / (part.numel() * rounds))
        assert abs(part.mean().item() / rounds - chance) < 5 * error


@pytest.mark.parametrize("chance", [0.05, 0.5])
def test_numbers_are_dropped_independently(chance: float) -> None:
    """Neighbours along and across rows, the totals of blocks, and two draws do not go together."""
    torch.manual_seed(6)
    shape = (4 * BLOCK, 64)
    first, second = (kept(shape, chance, draw(shape, chance, torch.ones(1))) - (1 - chance) for _ in range(2))
    bound = 5 / math.sqrt(first.numel())
    variance = chance * (1 - chance)
    pairs = {
        "along a row": (first[:, 1:], first[:, :-1]),
        "across rows": (first[1:], first[:-1]),
        "blocks": (first[:BLOCK], first[BLOCK : 2 * BLOCK]),
        "draws": (first, second),
    }
    for name, (one, other) in pairs.items():
        assert abs((one * other).mean().item()) / variance < 2.5 * bound, name
    totals = torch.stack([1 - kept((BLOCK, 8), chance, draw((BLOCK, 8), chance, torch.ones(1))) for _ in range(800)])
    spread = totals.sum((1, 2)).var().item() / (BLOCK * 8 * variance)  # a fixed number of points would have less than 1
    assert abs(spread - 1) < 5 * math.sqrt(2 / 800)


@pytest.mark.parametrize("chance", CHANCES)
@pytest.mark.parametrize("rows", [1, BLOCK - 1, BLOCK, 3 * BLOCK + 7])
def test_parts_and_the_whole_drop_the_same(rows: int, chance: float) -> None:
    torch.manual_seed(7)
    shape = (rows, 24)
    drawn = draw(shape, chance, torch.ones(1))
    x = torch.randn(shape)
    whole = drop(x, dropped(drawn, shape, chance), chance)
    for size in (BLOCK, 2 * BLOCK):
        parts = [slice(start, start + size) for start in range(0, rows, size)]
        cut = [drop(x[part], dropped(drawn, shape, chance, part), chance) for part in parts]
        assert torch.equal(torch.cat(cut), whole)
    assert torch.equal(drop(x, dropped(drawn, shape, chance), chance), whole)
    stays = whole != 0
    torch.testing.assert_close(whole[stays], x[stays] / (1 - chance))


def test_the_seed_of_torch_decides() -> None:
    def once() -> Tensor:
        return drop_drawing(torch.ones(600, 30), 0.1)[0]

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second = once(), once()
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(once(), first)
    assert torch.equal(once(), second)


def test_what_is_kept_for_backward_is_a_seed_on_a_cpu_and_a_mask_elsewhere() -> None:
    assert isinstance(draw((4, 4), MOST_BY_POINTS, torch.ones(1)), int)
    assert isinstance(draw((4, 4), 0.6, torch.ones(1)), Tensor)
    assert draw((4, 4), 0.0, torch.ones(1)) is None
    elsewhere = draw((4, 4), 0.1, torch.ones(1, device="meta"))
    assert isinstance(elsewhere, Tensor)
    assert (elsewhere.dtype, elsewhere.device.type) == (torch.bool, "meta")


def test_arrays_without_numbers_draw_nothing() -> None:
    state = torch.get_rng_state()
    with FakeTensorMode():
        x = torch.ones(5, 3)
        through, drawn = drop_drawing(x, 0.1)
    assert through.shape == (5, 3)
    assert drawn == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_all_or_nothing_and_no_rows() -> None:
    x = torch.randn(3, 5)
    assert drop_drawing(x, 0.0)[0] is x
    assert not drop_drawing(x, 1.0)[0].any()
    assert drop_drawing(x[:0], 0.1)[0].shape == (0, 5)


def test_rows_that_do_not_lie_one_behind_the_other() -> None:
    torch.manual_seed(8)
    x = torch.randn(30, 600).T
    drawn = draw(x.shape, 0.2, x)
    away = dropped(drawn, x.shape, 0.2)
    assert torch.equal(drop(x, away, 0.2), drop(x.contiguous(), away, 0.2))
