"""Causal attention of packed segments: exact isolation, no mask of tokens × tokens.

A segment may have a prefix: both answers of a preference pair see one prompt.

On GPUs from sm80, in 16 bit, all segments go through one kernel (`varlen_attention`). Elsewhere they are computed one
by one, each in one of three ways (see `pick`):
    gemm   batched matrix products with grouped heads folded into rows, keeping the probabilities. Forward and
           backward 1.5–4.8 times `scaled_dot_product_attention` where bf16 matrix products are fast, 1.2–1.5 times in
           fp32; up to which length is measured on the CPU at hand (`measure_crossover`).
    sdpa   torch's `scaled_dot_product_attention`, which keeps no probabilities.
    plain  differentiable tensor operations, for attention soft caps and dropout.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from firefly.models.kernels.varlen_attention import attend_varlen, device_has_kernel, is_supported
from firefly.segments import Segment
from firefly.translation import translate


class Blocks(NamedTuple):
    """How many queries of a segment are computed together: keys beyond a block's last query are never touched."""

    rows: int
    whole: int
    """Segments of up to so many tokens are one block: fewer calls outweigh keys that no query sees."""

    def of(self, length: int) -> int:
        """Queries of a block in a segment of `length` queries."""
        return length if length <= self.whole else self.rows


BLOCKS = {torch.bfloat16: Blocks(192, 256), torch.float32: Blocks(128, 128)}
"""Where bf16 products are fast, a segment of 245 tokens took 1.2 times as long in blocks of 192 as in one, and one of
1,000 tokens 1.07 to 1.12 times as long in blocks of 256 on a slower machine, 0.95 on a faster one. In fp32 blocks of
192 and 256 took 1.03 to 1.14 times as long as of 128 for 200 to 512 tokens."""

SDPA_BLOCK = 256
"""Queries of a block for `sdpa`, which is given a mask for each block."""

GEMM_LONGEST = {torch.bfloat16: 1024, torch.float32: 512}
"""Above this many tokens the kept probabilities outweigh the speed."""

NARROWEST = 256
"""Width of all heads together, below which attention takes too little time for the two ways to be told apart: runs that
measured it anew would choose by chance."""

MASKS, MASK_BYTES = 256, 1 << 26
"""How many additive masks a model keeps at most, and of what size together."""


Masks = dict[tuple[Any, ...], Tensor]


@dataclass(eq=False)
class AttentionSettings:
    """How one model attends to segments. Each model has its own: two in a process do not interfere.

    Attributes:
        crossover: tokens up to which a CPU computes a segment by matrix products, longer ones by `sdpa`; never more
            than `GEMM_LONGEST`.
        masks: additive masks of recent shapes (see `_mask`).
    """

    crossover: int = max(GEMM_LONGEST.values())
    masks: Masks = field(default_factory=dict)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    settings: AttentionSettings | None = None,
) -> Tensor:
    """Attention in which a token sees itself, earlier tokens of its own segment and the segment's prefix, at most
    `window` of them counted backwards: positions in a segment go on where its prefix ends.

    Args:
        query: (heads, tokens, width); key: (key heads, tokens, width); value: (key heads, tokens, value width), which
            latent attention (DeepSeek-V2, arXiv:2405.04434) makes narrower than queries.
        segments: one after another over all tokens; a prefix is the beginning of an earlier segment.
        settings: the model's own; None for those that a model begins with.

    Returns:
        (heads, tokens, value width).
    """
    if not softcap and not dropout and is_supported(query, value):
        return attend_varlen(query, key, value, segments, scale, window)
    settings = settings or AttentionSettings()
    sizes = [segment.end - segment.start for segment in segments]
    # Models hand over views of (tokens, heads, width). Cut and joined along that, neither pass moves numbers about.
    queries, keys, values = (
        [piece.transpose(0, 1) for piece in x.transpose(0, 1).split(sizes)] for x in (query, key, value)
    )
    at = {segment.start: number for number, segment in enumerate(segments)}
    pieces = []
    for segment, q, k, v in zip(segments, queries, keys, values, strict=True):
        prefix = segment.prefix_end - segment.prefix_start
        if prefix:
            opening = at[segment.prefix_start]
            k = torch.cat([keys[opening][:, :prefix], k], dim=1)
            v = torch.cat([values[opening][:, :prefix], v], dim=1)
        near = window if window is not None and window < k.shape[1] else None
        way = pick(q, near, softcap, dropout, settings.crossover)
        pieces.append(way(q, k, v, scale, near, settings.masks, softcap, dropout))
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat([piece.transpose(0, 1) for piece in pieces]).transpose(0, 1)


def pick(query: Tensor, window: int | None, softcap: float | None, dropout: float, crossover: int) -> Any:
    """The way to compute one segment. Each takes the queries of a segment and the keys of its prefix and itself."""
    if softcap or dropout:
        return _plain
    by_products = query.shape[1] <= min(crossover, GEMM_LONGEST.get(query.dtype, 0))
    if query.device.type == "cpu" and (window is not None or by_products):
        return _gemm
    return _sdpa


def blocks_in(dtype: torch.dtype) -> Blocks:
    """The blocks that matmuls of a type go in."""
    return BLOCKS.get(dtype, BLOCKS[torch.float32])


def measure_crossover(heads: int, key_heads: int, width: int, value_width: int, dtype: torch.dtype) -> int:
    """The longest of a few lengths up to which matmuls beat `sdpa` on this CPU, forward and backward; 0: none."""
    longest = 0
    if heads * width < NARROWEST:
        return longest
    for length in (128, 256, 512, 1024):
        if length > GEMM_LONGEST.get(dtype, 0):
            break
        shapes = [(heads, length, width), (key_heads, length, width), (key_heads, length, value_width)]
        inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
        products, fused = (_seconds(way, inputs, width**-0.5) for way in (_gemm, _sdpa))
        if products >= fused:
            break
        longest = length
    return longest


def _seconds(way: Any, inputs: list[Tensor], scale: float) -> float:
    """The least of some runs: other programs may be busy."""
    found, masks = [], {}
    for _ in range(7):
        started = time.perf_counter()
        torch.autograd.grad(way(*inputs, scale, None, masks).sum(), inputs)
        found.append(time.perf_counter() - started)
    return min(found)


def describe_attention(device: torch.device, dtype: torch.dtype, crossover: int) -> str:
    """In a few words, how segments are computed on `device`; `crossover` as in `AttentionSettings`."""
    if dtype in (torch.bfloat16, torch.float16) and device_has_kernel(device):
        return "varlen_attn"
    if device.type == "cpu" and crossover and dtype in GEMM_LONGEST:
        return translate("matmuls up to {tokens} tokens, else sdpa", tokens=min(crossover, GEMM_LONGEST[dtype]))
    return translate("sdpa per segment")


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, masks: Masks, *_: Any) -> Tensor:
    grouped = q.shape[0] != k.shape[0]
    if grouped and q.is_cuda:  # there grouped heads rule out the one kernel that takes fp32, and GPUs before sm80
        k, v, grouped = *_repeated(q, k, v), False
    if window is None and q.shape[1] == k.shape[1]:
        return F.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=grouped
        )[0]
    outputs = []
    for block in _blocks(q.shape[1], k.shape[1], window, SDPA_BLOCK):
        mask = _mask(masks, block, window, 1, q.dtype, q.device)
        rows, columns = slice(block.first, block.last), slice(block.low, block.high)
        part = F.scaled_dot_product_attention(
            q[None, :, rows], k[None, :, columns], v[None, :, columns], mask, scale=scale, enable_gqa=grouped
        )
        outputs.append(part[0])
    return torch.cat(outputs, dim=1)


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values once for every head of queries."""
    groups = q.shape[0] // k.shape[0]
    return k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, _: Masks, softcap: float | None, dropout: float
) -> Tensor:
    k, v = _repeated(q, k, v)
    outputs = []
    for block in _blocks(q.shape[1], k.shape[1], window, SDPA_BLOCK):
        scores = q[:, block.first : block.last] @ k[:, block.low : block.high].transpose(1, 2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        mask = _visible(block, window, q.device)
        p = torch.softmax(scores.float().masked_fill(~mask, -torch.inf), dim=-1).to(q.dtype)
        outputs.append(F.dropout(p, dropout) @ v[:, block.low : block.high])
    return torch.cat(outputs, dim=1)


def _gemm(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, masks: Masks, *_: Any) -> Tensor:
    return (_OneBlock if q.shape[1] <= blocks_in(q.dtype).whole else _GemmAttention).apply(
        q, k, v, scale, window, masks
    )


class _OneBlock(torch.autograd.Function):
    """A segment that is one block: the whole of each product at once, nothing cut or put together."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, masks: Masks) -> Tensor:
        (block,) = _blocks(q.shape[1], k.shape[1], window, q.shape[1])
        if block.low:
            k, v = k[:, block.low :], v[:, block.low :]
        k, v = k.contiguous(), v.contiguous()
        folded = _fold(q, q.shape[0] // k.shape[0])
        p = _probabilities(folded, k, scale, block, window, masks)
        ctx.save_for_backward(folded, k, v, p)
        ctx.scale, ctx.low = scale, block.low
        return torch.bmm(p, v).view(*q.shape[:2], v.shape[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        folded, k, v, p = ctx.saved_tensors
        grads = _fold(grad, grad.shape[0] // k.shape[0])
        grad_p = torch.bmm(grads, v.transpose(1, 2))
        grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
        nothing = grad.new_empty(())
        grad_q = torch.baddbmm(nothing, grad_scores, k, beta=0, alpha=ctx.scale).view(*grad.shape[:2], k.shape[2])
        grad_k = torch.baddbmm(nothing, grad_scores.transpose(1, 2), folded, beta=0, alpha=ctx.scale)
        grad_v = torch.bmm(p.transpose(1, 2), grads)
        if ctx.low:  # keys before the window
            grad_k, grad_v = (torch.nn.functional.pad(each, (0, 0, ctx.low, 0)) for each in (grad_k, grad_v))
        return grad_q, grad_k, grad_v, None, None, None


class _GemmAttention(torch.autograd.Function):
    """One segment. Query heads that share a key head are rows of one product: (key heads, group · rows, width)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, masks: Masks) -> Tensor:
        heads, length, _ = q.shape
        groups = heads // k.shape[0]
        k, v = k.contiguous(), v.contiguous()  # five products read them, two of them 1.2 times as fast
        out = q.new_empty(heads, length, v.shape[2])
        kept = []
        for block in _blocks(length, k.shape[1], window, blocks_in(q.dtype).rows):
            rows, columns = slice(block.first, block.last), slice(block.low, block.high)
            folded = _fold(q[:, rows], groups)
            p = _probabilities(folded, k[:, columns], scale, block, window, masks)
            out[:, rows] = torch.bmm(p, v[:, columns]).view(heads, block.last - block.first, v.shape[2])
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
        for p, block in zip(kept, _blocks(length, k.shape[1], ctx.window, blocks_in(q.dtype).rows), strict=True):
            rows, columns = slice(block.first, block.last), slice(block.low, block.high)
            folded, grads = _fold(q[:, rows], groups), _fold(grad[:, rows], groups)
            grad_v[:, columns].add_(torch.bmm(p.transpose(1, 2), grads))  # `+=` would write it to itself once more
            grad_p = torch.bmm(grads, v[:, columns].transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_q[:, rows] = (
                torch.bmm(grad_scores, k[:, columns]).mul_(ctx.scale).view(heads, block.last - block.first, width)
            )
            grad_k[:, columns].add_(torch.bmm(grad_scores.transpose(1, 2), folded), alpha=ctx.scale)
        return grad_q, grad_k, grad_v, None, None, None


def _probabilities(folded: Tensor, k: Tensor, scale: float, block: _Block, window: int | None, masks: Masks) -> Tensor:
    """softmax(scale · q kᵀ) of a block over the keys that its queries see: (key heads, group · rows, keys).

    Where earlier keys are seen by all of its queries, the mask is added to the block's own keys alone: a product that
    adds one takes a fifth longer.
    """
    own = block.last - block.first
    groups = folded.shape[1] // own
    if window is not None or k.shape[1] <= 2 * own:
        mask = _mask(masks, block, window, groups, k.dtype, k.device)
        return torch.softmax(torch.baddbmm(mask, folded, k.transpose(1, 2), alpha=scale), dim=-1)
    scores = torch.baddbmm(folded.new_empty(()), folded, k.transpose(1, 2), beta=0, alpha=scale)
    triangle = _Block(0, own, 0, own)
    scores[:, :, -own:].add_(_mask(masks, triangle, None, groups, k.dtype, k.device))
    return torch.softmax(scores, dim=-1)


def _fold(x: Tensor, groups: int) -> Tensor:
    heads, length, width = x.shape
    return x.reshape(heads // groups, groups * length, width)


class _Block(NamedTuple):
    """Queries `first` … `last - 1` of a segment and the keys `low` … `high - 1` that any of them sees."""

    first: int
    last: int
    low: int
    high: int


def _blocks(length: int, keys: int, window: int | None, rows: int) -> list[_Block]:
    """The blocks, `rows` each, of a segment of `length` queries; what there are more `keys` of is its prefix."""
    prefix = keys - length
    blocks = []
    for first in range(0, length, rows):
        last = min(first + rows, length)
        low = 0 if window is None else max(0, prefix + first - window + 1)
        blocks.append(_Block(first, last, low, prefix + last))
    return blocks


def _visible(block: _Block, window: int | None, device: torch.device) -> Tensor:
    """Which keys a block's queries see: 0 ≤ q − k < window; the last query stands at the last key."""
    rows, columns = block.last - block.first, block.high - block.low
    distance = torch.arange(rows, device=device)[:, None] + columns - rows - torch.arange(columns, device=device)[None]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _mask(
    masks: Masks, block: _Block, window: int | None, groups: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """0 where a query sees a key, −∞ elsewhere, (groups · rows, columns). A few recent shapes are kept in `masks`."""
    key = (block.last - block.first, block.high - block.low, window, groups, dtype, device)
    if key not in masks:
        if len(masks) >= MASKS or sum(mask.nbytes for mask in masks.values()) > MASK_BYTES:
            masks.clear()
        visible = _visible(block, window, device)
        mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, -torch.inf)
        masks[key] = mask.repeat(groups, 1)
    return masks[key]
