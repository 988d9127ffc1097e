"""Causal attention of packed segments, one segment at a time: exact isolation, no mask of tokens × tokens.

Three ways to compute a segment, chosen per call by measurement on CPUs (see `pick`):
    gemm   batched matrix products with grouped heads folded into rows, keeping the probabilities. Where bf16
           matrix products are fast, 1.5–4.8 times `scaled_dot_product_attention` forward and backward.
    sdpa   torch's `scaled_dot_product_attention`, which keeps no probabilities.
    plain  differentiable tensor operations, for attention soft caps and dropout.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256
"""Query rows that are computed together; keys beyond a block's last query are never touched."""

GEMM_LONGEST = 1024
"""Above this many tokens the kept probabilities outweigh the speed."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: tuple[int, ...],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention in which a token sees itself and earlier tokens of its own segment, at most `window` of them.

    Args:
        query: (heads, tokens, width); key, value: (key heads, tokens, width).
        borders: segment borders, 0 = b0 < … < bn = tokens.

    Returns:
        (heads, tokens, width).
    """
    pieces = []
    for start, end in pairwise(borders):
        part = slice(start, end)
        q, k, v = query[:, part], key[:, part], value[:, part]
        near = window if window is not None and window < end - start else None
        pieces.append(pick(q, near, softcap, dropout)(q, k, v, scale, near, softcap, dropout))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def pick(query: Tensor, window: int | None, softcap: float | None, dropout: float) -> Any:
    """The way to compute one segment."""
    if softcap or dropout:
        return _plain
    length = query.shape[1]
    if query.device.type == "cpu" and (
        window is not None or (query.dtype == torch.bfloat16 and length <= GEMM_LONGEST)
    ):
        return _gemm
    return _sdpa


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: Any, dropout: float) -> Tensor:
    grouped = q.shape[0] != k.shape[0]
    if window is None:
        return F.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=grouped
        )[0]
    outputs = []
    for first, last, low in _blocks(q.shape[1], window):
        mask = _visible(last - first, last - low, first - low, window, q.device)
        part = F.scaled_dot_product_attention(
            q[None, :, first:last], k[None, :, low:last], v[None, :, low:last], mask, scale=scale, enable_gqa=grouped
        )
        outputs.append(part[0])
    return torch.cat(outputs, dim=1)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None, dropout: float
) -> Tensor:
    groups = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    outputs = []
    for first, last, low in _blocks(q.shape[1], window):
        scores = q[:, first:last] @ k[:, low:last].transpose(1, 2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        mask = _visible(last - first, last - low, first - low, window, q.device)
        p = torch.softmax(scores.float().masked_fill(~mask, -torch.inf), dim=-1).to(q.dtype)
        outputs.append(F.dropout(p, dropout) @ v[:, low:last])
    return torch.cat(outputs, dim=1)


def _gemm(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: Any, dropout: float) -> Tensor:
    return _GemmAttention.apply(q, k, v, scale, window)


class _GemmAttention(torch.autograd.Function):
    """One segment. Query heads that share a key head are rows of one product: (key heads, group · rows, width)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        heads, length, width = q.shape
        groups = heads // k.shape[0]
        out = torch.empty_like(q)
        kept = []
        for first, last, low in _blocks(length, window):
            rows = _fold(q[:, first:last], groups)
            bias = _bias(last - first, last - low, first - low, window, groups, q.dtype, q.device)
            scores = torch.baddbmm(bias, rows, k[:, low:last].transpose(1, 2), alpha=scale)
            p = torch.softmax(scores, dim=-1)
            out[:, first:last] = torch.bmm(p, v[:, low:last]).view(heads, last - first, width)
            kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale, ctx.window = scale, window
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, *kept = ctx.saved_tensors
        heads, length, width = q.shape
        groups = heads // k.shape[0]
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for p, (first, last, low) in zip(kept, _blocks(length, ctx.window), strict=True):
            rows, grads = _fold(q[:, first:last], groups), _fold(grad[:, first:last], groups)
            grad_v[:, low:last] += torch.bmm(p.transpose(1, 2), grads)
            grad_p = torch.bmm(grads, v[:, low:last].transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_q[:, first:last] = (
                torch.bmm(grad_scores, k[:, low:last]).mul_(ctx.scale).view(heads, last - first, width)
            )
            grad_k[:, low:last] += torch.bmm(grad_scores.transpose(1, 2), rows).mul_(ctx.scale)
        return grad_q, grad_k, grad_v, None, None


def _fold(x: Tensor, groups: int) -> Tensor:
    heads, length, width = x.shape
    return x.reshape(heads // groups, groups * length, width)


def _blocks(length: int, window: int | None) -> list[tuple[int, int, int]]:
    """(first query, end of queries, first key) of each block of a segment; keys end where the queries do."""
    starts = range(0, length, BLOCK)
    return [
        (first, min(first + BLOCK, length), 0 if window is None else max(0, first - window + 1)) for first in starts
    ]


def _visible(rows: int, columns: int, offset: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys a block's queries see: 0 ≤ q − k < window, where query row i stands at key column i + offset."""
    distance = torch.arange(rows, device=device)[:, None] + offset - torch.arange(columns, device=device)[None]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


_biases: dict[tuple[Any, ...], Tensor] = {}


def _bias(
    rows: int, columns: int, offset: int, window: int | None, groups: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """0 where a query sees a key, −∞ elsewhere, (groups · rows, columns). A few recent shapes are kept."""
    key = (rows, columns, offset, window, groups, dtype, device)
    if key not in _biases:
        if len(_biases) >= 256:
            _biases.clear()
        visible = _visible(rows, columns, offset, window, device)
        bias = torch.zeros(rows, columns, dtype=dtype, device=device).masked_fill_(~visible, -torch.inf)
        _biases[key] = bias.repeat(groups, 1)
    return _biases[key]
