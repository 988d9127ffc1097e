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


def drop_drawing(x: Tensor, probability: float) -> tuple[Tensor, Tensor | None]:
    """(x after dropout, the mask that was drawn for it); a card does both in one pass."""
    if probability and x.is_cuda:
        return torch.native_dropout(x, probability, True)
    mask = draw_mask(x.shape, probability, x.device)
    return drop(x, mask, probability), mask


def drop(x: Tensor, mask: Tensor | None, probability: float) -> Tensor:
    """x ∘ mask / (1 − probability)."""
    if mask is None:
        return x
    scale = 1 / (1 - probability) if probability < 1 else 0.0
    return torch.ops.aten.native_dropout_backward(x, mask, scale)
