"""transformers' attention function for continuous batching on a CPU: each request of a step over its own keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from firefly.models.attention import WITHOUT_EFFECT, UnsupportedAttention
from firefly.models.kernels.cached_attention import attend_cached, attend_padded

NAME = "firefly_paged"
LAYOUT = "step_layout"
"""The argument of a pass that holds its `StepLayout`."""
OF_THE_BATCH = {"cu_seq_lens_q", "cu_seq_lens_k", "logits_indices", "logits_processor_args", "block_table"}
"""Tensors that say how a step is laid out."""
MOST_PADDING = 1.5
"""Keys that are read, as a multiple of those that are there, up to which requests are filled up to one length."""
FULL = "full_attention"


@dataclass(frozen=True)
class StepLayout:
    """How the requests of a step lie in its row and in the keys that its layers read.

    Attributes:
        queries: tokens of each request.
        keys: by kind of layer, what each request reads.
        mask: of one query for each request over keys filled up to one length (requests, 1, 1, length), in layers with
            full attention; None: keys lie one after another.
    """

    queries: list[int]
    keys: dict[str, list[int]]
    mask: Tensor | None


def lay_out(given: Mapping[str, Any], dtype: torch.dtype) -> StepLayout:
    """The layout of a step. Where every request has one token, it changes what layers with full attention are to read:
    every request as many keys, so that all of them are computed in one call.

    Args:
        given: what transformers' batch gives to the model; `read_index` is changed.
    """
    queries = given["cu_seq_lens_q"].diff().tolist()
    keys = {kind: sums.diff().tolist() for kind, sums in given["cu_seq_lens_k"].items()}
    lengths = keys.get(FULL, [])
    longest = max(lengths, default=0)
    if max(queries) > 1 or not lengths or len(lengths) * longest > MOST_PADDING * sum(lengths):
        return StepLayout(queries, keys, None)
    number = given["cache"].cache_allocators[FULL].index
    read = given["read_index"][number]
    ends = torch.tensor(list(accumulate(lengths)))[:, None]
    counts = torch.tensor(lengths)[:, None]
    places = torch.arange(longest)[None]
    given["read_index"][number] = read[(ends - counts + places).minimum(ends - 1)].flatten()
    mask = torch.zeros(len(lengths), longest, dtype=dtype).masked_fill_(places >= counts, -torch.inf)
    return StepLayout(queries, keys, mask[:, None, None])


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    cache: Any = None,
    step_layout: StepLayout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query (1, heads, tokens, width) → (1, tokens, heads, value width).

    Args:
        cache: transformers' PagedAttentionCache, which takes in the new keys and values and gives back those of all
            requests of the step, one after another.

    Raises:
        UnsupportedAttention: the module attends with more than these, or does not hand them on.
    """
    unread = {name for name, x in others.items() if isinstance(x, Tensor)} - WITHOUT_EFFECT - OF_THE_BATCH
    if attention_mask is not None:
        unread.add("attention_mask")
    if unread or cache is None or step_layout is None:
        raise UnsupportedAttention(f"{type(module).__name__} attends with {', '.join(sorted(unread)) or 'no cache'}")
    allocator = cache.layer_to_allocator[module.layer_idx]
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=others)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # The cache goes by the configuration, as masks do; some modules (PhiMoE) are not told of their window.
    window = sliding_window or getattr(allocator, "sliding_window", None)
    mask = step_layout.mask if allocator.layer_type == FULL else None
    if mask is not None and window is None and not softcap:
        out = attend_padded(query[0], key[0], value[0], mask, scale)
    else:
        keys = step_layout.keys[allocator.layer_type]
        if mask is not None:
            key, value = (_without_padding(x[0], keys, mask.shape[-1])[None] for x in (key, value))
        out = attend_cached(query[0], key[0], value[0], step_layout.queries, keys, scale, window, softcap)
    return out.transpose(0, 1).contiguous()[None], None


def _without_padding(x: Tensor, keys: list[int], length: int) -> Tensor:
    return torch.cat([x[:, number * length : number * length + count] for number, count in enumerate(keys)], dim=1)


AttentionInterface.register(NAME, paged_attention)
