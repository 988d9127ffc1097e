"""Dropout inside autograd functions: what is kept of it is a mask of one byte a number, not the dropped input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def probability(dropout: nn.Module) -> float | None:
    """The probability with which the module drops now; None if it is no plain dropout."""
    if isinstance(dropout, nn.Identity):
        return 0.0
    if not isinstance(dropout, nn.Dropout):
        return None
    return dropout.p if dropout.training else 0.0


def draw_mask(shape: Sequence[int], probability: float, device: torch.device) -> Tensor | None:
    """Which numbers stay, bool of `shape`, drawn as `nn.Dropout` draws on a CPU; None if nothing is dropped."""
    if not probability:
        return None
    return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1 - probability)


def drop(x: Tensor, mask: Tensor | None, probability: float) -> Tensor:
    """x ∘ mask / (1 − probability)."""
    return x if mask is None else torch.ops.aten.native_dropout_backward(x, mask, _scale(probability))


def add_dropped(total: Tensor, x: Tensor, mask: Tensor, probability: float) -> Tensor:
    """total += x ∘ mask / (1 − probability), in one pass."""
    return total.addcmul_(x, mask, value=_scale(probability))


def _scale(probability: float) -> float:
    return 1 / (1 - probability) if probability < 1 else 0.0
