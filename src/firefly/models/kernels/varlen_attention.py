"""All segments of a row in one call of torch's flash attention for sequences of unequal length: 16 bit, sm80 and above.

A segment with a prefix gets its keys gathered behind the prefix's: [prompt], [prompt, chosen], [prompt, rejected].
Queries stand at the end of their keys, which is how `varlen_attn` aligns its causal mask and its windows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from firefly.segments import Segment

WIDEST_HEAD = 256
LARGEST = 1 << 31
"""Offsets into queries and gradients are 32-bit numbers in the kernel's backward pass."""


def is_supported(query: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes queries like these, (heads, tokens, width), beside values, (key heads, tokens, value
    width); whichever are narrower are padded."""
    width = max(query.shape[-1], value.shape[-1])
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and width <= WIDEST_HEAD
        and width % 8 == 0
        and query.shape[0] * query.shape[1] * width < LARGEST
        and device_has_kernel(query.device)
    )


@lru_cache
def device_has_kernel(device: torch.device) -> bool:
    """Flash attention needs sm80."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) and _kernel() is not None


@lru_cache
def _kernel() -> Callable[..., Tensor] | None:
    """torch's function, called alike whichever version this is; None where torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known:  # torch before 2.11
        return None
    function: Any = varlen_attn
    if "enable_gqa" in known:
        return function
    return lambda *args, enable_gqa, **kwargs: function(*args, **kwargs)  # there the kernel groups heads unasked


class Gathering(NamedTuple):
    """How keys are gathered.

    Attributes:
        order: (keys,) int64, the token that each key is of.
        own: (tokens,) int64, which key is a token's in its own segment.
        shared: for the second, third, … segment that sees a token: (the tokens, which keys are theirs there).
    """

    order: Tensor
    own: Tensor
    shared: tuple[tuple[Tensor, Tensor], ...]


class Layout(NamedTuple):
    """The kernel's description of the segments: borders of their queries and keys, (segments + 1,) int32 on the device,
    the longest of both, and how keys are gathered from the row; None where queries and keys are the same."""

    queries: Tensor
    keys: Tensor
    longest_queries: int
    longest_keys: int
    gathering: Gathering | None


@lru_cache(maxsize=16)  # every layer asks for the same row
def layout_of(segments: tuple[Segment, ...], device: torch.device) -> Layout:
    """Lay the segments out for the kernel, on `device`; the copies wait for nothing."""
    lengths = [segment.end - segment.start for segment in segments]
    prefixes = [segment.prefix_end - segment.prefix_start for segment in segments]
    keys = [prefix + length for prefix, length in zip(prefixes, lengths, strict=True)]
    gathering = _gathering(segments, device) if any(prefixes) else None
    return Layout(_borders(lengths, device), _borders(keys, device), max(lengths), max(keys), gathering)


def _gathering(segments: tuple[Segment, ...], device: torch.device) -> Gathering:
    seen = [(np.r_[one.prefix_start : one.prefix_end], np.r_[one.start : one.end]) for one in segments]
    order = np.concatenate([part for parts in seen for part in parts]).astype(np.int64)
    is_own = np.concatenate([np.full(len(part), own) for parts in seen for own, part in enumerate(parts)]).astype(bool)
    own, shared = np.flatnonzero(is_own), np.flatnonzero(~is_own)  # segments lie in the order of their tokens
    rounds = []
    while len(shared):
        tokens, first = np.unique(order[shared], return_index=True)
        rounds.append((_sent(tokens, device), _sent(shared[first], device)))
        shared = np.delete(shared, first)
    return Gathering(_sent(order, device), _sent(own, device), tuple(rounds))


class _Gather(torch.autograd.Function):
    """Keys or values of tokens, (tokens, heads, width), laid out for the kernel; a gather in both directions, where
    autograd's own backward adds number by number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gathering: Gathering) -> Tensor:
        ctx.gathering = gathering
        return x.index_select(0, gathering.order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = grad.index_select(0, ctx.gathering.own)
        for tokens, keys in ctx.gathering.shared:
            total.index_copy_(0, tokens, total.index_select(0, tokens) + grad.index_select(0, keys))
        return total, None


def _borders(counts: list[int], device: torch.device) -> Tensor:
    return _sent(np.cumsum([0, *counts]).astype(np.int32), device)


def _sent(values: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], scale: float, window: int | None
) -> Tensor:
    """As `segment_attention.attend`, without soft cap and dropout, which the kernel does not have."""
    kernel = _kernel()
    assert kernel is not None
    layout = layout_of(tuple(segments), query.device)
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    if layout.gathering is not None:
        k, v = (_Gather.apply(x, layout.gathering) for x in (k, v))
    width = v.shape[-1]
    # The kernel knows one width. Zeros behind queries and keys add nothing to a score, those behind values are cut off.
    widest = max(q.shape[-1], width)
    q, k, v = (F.pad(x, (0, widest - x.shape[-1])) if x.shape[-1] < widest else x for x in (q, k, v))
    reach = -1 if window is None or window >= layout.longest_keys else window - 1
    out = kernel(
        q,
        k,
        v,
        layout.queries,
        layout.keys,
        layout.longest_queries,
        layout.longest_keys,
        scale=scale,
        window_size=(reach, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[..., :width].transpose(0, 1)
