"""The small products of an adapter, with as few passes over memory, and as few calls, as they can be had with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

CAST = "firefly_cast"
"""Attribute of an adapter's master: ((the step it was cast in, where its numbers lay), what it was cast to)."""

_step: list[int] = [0, 0]
"""Number of the step that is computed, and how many `casts_kept` are entered: outside of any, nothing is kept."""


@contextmanager
def casts_kept() -> Iterator[None]:
    """Masters that do not change inside: each is cast to the compute type once, not once a pass.

    An optimizer may write past autograd's version counter, so that only whoever runs it can tell.
    """
    _step[0] += 1
    _step[1] += 1
    try:
        yield
    finally:
        _step[1] -= 1


def in_type(master: Tensor, dtype: torch.dtype) -> Tensor:
    """An adapter's matrix in the compute type."""
    if master.dtype == dtype or not _step[1] or torch.compiler.is_compiling():
        return master.to(dtype)
    now = _step[0], master.data_ptr()  # a reference adapter takes a master's place within a step (`FrozenAdapter`)
    found: tuple[tuple[int, int], Tensor] | None = getattr(master, CAST, None)
    if found is not None and found[0] == now and (found[1].dtype, found[1].device) == (dtype, master.device):
        return found[1]
    kept = master.detach().to(dtype)
    setattr(master, CAST, (now, kept))
    return kept


def scaled_product(left: Tensor, right: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """scale · left right; left: (n, k), right: (k, m)."""
    if scale == 1:
        return torch.mm(left, right, out=out)
    nothing = left.new_empty(()) if out is None else out
    return torch.addmm(nothing, left, right, beta=0, alpha=scale, out=out)


def wide_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left right in `dtype`: a card writes sums of 16-bit products in fp32 as cheaply as rounded ones."""
    if left.is_cuda and dtype == torch.float32 and left.dtype != dtype and hasattr(torch.ops.aten.mm, "dtype"):
        mm: Any = torch.mm
        return mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)
