"""Rotary positions by PyTorch's operations, in half as many passes over q and k as models' own functions take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Turn the halves of q and k by their positions' angles.

    Args:
        q: (rows, heads, tokens, width), as k, which may have fewer heads.
        cos: (rows or 1, tokens, width), as sin; the second half repeats the first.
        dtype: what is returned.
    """
    return _Rotation.apply(q, k, cos, sin, dtype)  # pyright: ignore[reportReturnType]


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        cos, sin = cos[:, None], sin[:, None]
        ctx.save_for_backward(cos, sin)
        ctx.types = q.dtype, k.dtype
        return _turned(q, cos, sin, 1, dtype), _turned(k, cos, sin, 1, dtype)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return (
            _turned(grad_q, cos, sin, -1, ctx.types[0]),
            _turned(grad_k, cos, sin, -1, ctx.types[1]),
            None,
            None,
            None,
        )


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: int, dtype: torch.dtype) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-direction)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=direction)
    return out.to(dtype)
