"""Dropout in front of adapters, inside autograd functions, which keep as little of it as they can.

On a CPU that is a seed: the same numbers are dropped anew in backward. PyTorch draws a CPU's mask one number after
another on one thread, which for LoRA of all linear layers of SmolLM2-135M took half as long as the rest of a step, and
its product with the mask a fifth. Here only what is dropped is drawn. Points are thrown at the numbers of an array, as
many as a Poisson distribution gives, each at any of them. Then the points on each number are Poisson's too, and
independent: with −ln(1 − p) of them on average there is none with probability 1 − p.

Elsewhere, and where most is dropped, a mask of one byte a number is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from firefly.models.kernels.target_device import device_kind

BLOCK = 512
"""Rows whose points one generator draws: an array may come in blocks of them, one after another, or at once."""

MOST_BY_POINTS = 0.5
"""Probability above which there are so many points that a mask takes no longer."""

Drawn = int | Tensor | None
"""What decides which numbers are dropped: the seed of the points, the mask of what stays, or None: nothing is."""


def probability(dropout: nn.Module) -> float | None:
    """The probability with which the module drops now; None if it is no plain dropout."""
    if isinstance(dropout, nn.Identity):
        return 0.0
    if not isinstance(dropout, nn.Dropout):
        return None
    return dropout.p if dropout.training else 0.0


def draw(shape: Sequence[int], probability: float, like: Tensor) -> Drawn:
    """Decide which numbers are dropped from an array of `shape`, on the device of `like`. torch's generator decides."""
    if not probability:
        return None
    if torch.compiler.is_compiling() or device_kind(like.device) != "cpu" or probability > MOST_BY_POINTS:
        return torch.empty(shape, dtype=torch.bool, device=like.device).bernoulli_(1 - probability)
    return 0 if isinstance(like, FakeTensor) else int(torch.randint(1 << 62, ()))


def drop_drawing(x: Tensor, probability: float) -> tuple[Tensor, Drawn]:
    """(x after dropout, what was drawn for it); a GPU does both in one pass."""
    if probability and x.is_cuda:
        return torch.native_dropout(x, probability, True)
    drawn = draw(x.shape, probability, x)
    return drop(x, dropped(drawn, x.shape, probability), probability), drawn


def split(drawn: Drawn) -> tuple[Tensor | None, int | None]:
    """(mask, seed): what an autograd function saves for backward, and what it leaves in its context."""
    return (drawn, None) if isinstance(drawn, Tensor) else (None, drawn)


def dropped(drawn: Drawn, shape: Sequence[int], probability: float, rows: slice = slice(None)) -> Tensor | None:
    """For `drop`, of an array of `shape` or of those of its rows: the mask, or the points as indices of numbers.

    Args:
        rows: a multiple of `BLOCK`, and the end or another one.
    """
    if drawn is None:
        return None
    if isinstance(drawn, Tensor):
        return drawn[rows]
    first, last, _ = rows.indices(shape[0])
    assert first % BLOCK == 0
    blocks = []
    for start in range(first, last, BLOCK):
        count = min(BLOCK, last - start) * shape[1]
        generator = np.random.Generator(np.random.SFC64((drawn, start)))
        points = generator.integers(count, size=generator.poisson(-math.log1p(-probability) * count))
        if start > first:
            points += (start - first) * shape[1]
        blocks.append(points)
    return torch.from_numpy(blocks[0] if len(blocks) == 1 else np.concatenate(blocks or [np.empty(0, np.int64)]))


def drop(x: Tensor, dropped: Tensor | None, probability: float, spend: bool = False) -> Tensor:
    """x without what is dropped, over 1 − probability. x: (rows, width); `spend`: its memory may be taken for that."""
    if dropped is None:
        return x
    scale = 1 / (1 - probability) if probability < 1 else 0.0
    if dropped.dtype == torch.bool:
        return torch.ops.aten.native_dropout_backward(x, dropped, scale)
    out = torch.mul(x, scale, out=x if spend else torch.empty(x.shape, dtype=x.dtype, device=x.device))
    if not isinstance(x, FakeTensor):
        out.view(-1).index_fill_(0, dropped, 0)
    return out
