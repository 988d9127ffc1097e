"""The small matmuls of an adapter and its casts, in few passes over memory and few calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

CAST = "firefly_cast"
"""Attribute of an adapter's master inside `casts_kept`: (where its numbers lay, what they were cast to), or None."""


@contextmanager
def casts_kept(masters: Iterable[Tensor]) -> Iterator[None]:
    """Within the block master weights do not change: each is cast to the compute type once, not once per pass.

    An optimizer may write past autograd's version counter, so that only whoever runs it can tell.
    """
    masters = list(masters)
    for master in masters:
        setattr(master, CAST, None)
    try:
        yield
    finally:
        for master in masters:
            delattr(master, CAST)


def in_type(master: Tensor, dtype: torch.dtype) -> Tensor:
    """An adapter's matrix in the compute type."""
    if master.dtype == dtype or not hasattr(master, CAST) or torch.compiler.is_compiling():
        return master.to(dtype)
    address = master.data_ptr()  # a reference adapter is swapped in within a step (`FrozenAdapter`)
    found: tuple[int, Tensor] | None = getattr(master, CAST)
    if found is not None and found[0] == address and (found[1].dtype, found[1].device) == (dtype, master.device):
        return found[1]
    kept = master.detach().to(dtype)
    setattr(master, CAST, (address, kept))
    return kept


def scaled_matmul(left: Tensor, right: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """scale · left right; left: (n, k), right: (k, m)."""
    if scale == 1:
        return torch.mm(left, right, out=out)
    nothing = left.new_empty(()) if out is None else out
    return torch.addmm(nothing, left, right, beta=0, alpha=scale, out=out)


def wide_matmul(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left right in `dtype`: a GPU writes a 16-bit matmul's fp32 accumulator as cheaply as its rounded value."""
    if left.is_cuda and dtype == torch.float32 and left.dtype != dtype and hasattr(torch.ops.aten.mm, "dtype"):
        mm: Any = torch.mm
        return mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


def graph_is_kept() -> bool:
    """Whether autograd may run the backward that is running now once more (retain_graph, create_graph)."""
    autograd: Any = getattr(torch._C, "_autograd", None)
    ask = getattr(autograd, "_get_current_graph_task_keep_graph", None)  # what torch.compile asks, too
    return ask is None or bool(ask())
