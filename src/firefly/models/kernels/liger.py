"""Liger's Triton kernels as the functions we call. Imported only where `elementwise` chose them.

Three of them write into what they are given; here none does, but for `gated_backward`, which says so.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from liger_kernel.ops import geglu, swiglu  # pyright: ignore[reportMissingImports]
from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # pyright: ignore[reportMissingImports]
from liger_kernel.ops.rope import rope_backward, rope_forward  # pyright: ignore[reportMissingImports]
from torch import Tensor

WIDEST = 1 << 16
"""Numbers in a row that a kernel can take."""

GATES = {
    "silu": (swiglu.swiglu_forward, swiglu.swiglu_backward),
    "gelu_tanh": (geglu.geglu_forward, geglu.geglu_backward),
}


def gated(kind: str, g: Tensor, u: Tensor) -> Tensor:
    """φ(g) ∘ u, all (rows, width) and contiguous; `kind` is a name in GATES."""
    with _on_device_of(g):
        return GATES[kind][0](g, u)[-1]


def gated_backward(kind: str, g: Tensor, u: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of g and u, written in their places, from that of φ(g) ∘ u."""
    with _on_device_of(g):
        return GATES[kind][1](g, u, grad)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float, scales_in_fp32: bool) -> Tensor:
    """x / rms(x) · (offset + weight) over the last dimension, in the type of x; forms as in `kernels.rms_norm`.

    A frozen weight costs no gradient in Liger 0.8.5 (0.8.0 computes one that is thrown away).
    """
    casting = "gemma" if scales_in_fp32 else "llama"
    with _on_device_of(x):
        # Not in place: the gradient that comes in may belong to the residual stream, too.
        return LigerRMSNormFunction.apply(x, weight, epsilon, offset, casting, False)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Turn the halves of q and k by their positions' angles.

    Args:
        q: (rows, heads, tokens, width), as k, which may have fewer heads.
        cos: (rows or 1, tokens, width), as sin; the second half repeats the first, and the type is not narrower than
            that of q.
        dtype: what is returned.
    """
    return _Rotation.apply(q, k, cos, sin, dtype)  # pyright: ignore[reportReturnType]


class _Rotation(torch.autograd.Function):
    # Liger turns q and k where they lie. A projection's output may be needed elsewhere, and a gradient may be shared
    # with another branch, so copies are turned, in the layout that the kernel wants: it makes no second one.

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.types = q.dtype, k.dtype
        with _on_device_of(q):
            turned = rope_forward(_copy(q, dtype), _copy(k, dtype), cos, sin)
        return turned[0], turned[1]

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        with _on_device_of(grad_q):
            grad_q, grad_k = rope_backward(_copy(grad_q, grad_q.dtype), _copy(grad_k, grad_k.dtype), cos, sin)
        return grad_q.to(ctx.types[0]), grad_k.to(ctx.types[1]), None, None, None


def _copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, heads, tokens, width) on memory of its own, in which a token's heads lie side by side."""
    side_by_side = x.transpose(1, 2)
    return torch.empty(side_by_side.shape, dtype=dtype, device=x.device).copy_(side_by_side).transpose(1, 2)


def _on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton starts kernels on the current GPU, whatever GPU the arrays are on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
