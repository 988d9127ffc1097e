"""Attention of several requests in one row, each over the keys of its own cache: no mask of all queries × all keys.

In continuous batching most requests have one query, the last token. Laid out as one masked attention, a step of 32 such
requests would multiply each query with the keys of all 32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from firefly.models.kernels.segment_attention import AttentionSettings, pick


def attend_cached(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Sequence[int],
    keys: Sequence[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    settings: AttentionSettings | None = None,
) -> Tensor:
    """Attention in which the last query of a request stands at its last key, and sees at most `window` keys.

    Args:
        query: (heads, tokens, width); key: (key heads, cached tokens, width); value: (key heads, cached tokens, value
            width).
        queries, keys: how many of them each request has; one after another.

    Returns:
        (heads, tokens, value width).
    """
    settings = settings or AttentionSettings()
    rows = [piece.transpose(0, 1) for piece in query.transpose(0, 1).split(list(queries))]
    columns = [[piece.transpose(0, 1) for piece in x.transpose(0, 1).split(list(keys))] for x in (key, value)]
    pieces = []
    for q, k, v in zip(rows, *columns, strict=True):
        near = window if window is not None and window < k.shape[1] else None
        if q.shape[1] == 1:
            pieces.append(_one_query(q, k, v, scale, near, softcap))
        else:
            way = pick(q, near, softcap, 0.0, settings.crossover)
            pieces.append(way(q, k, v, scale, near, settings.masks, softcap, 0.0))
    return torch.cat([piece.transpose(0, 1) for piece in pieces]).transpose(0, 1)


def _one_query(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    if window is not None:
        k, v = k[:, -window:], v[:, -window:]
    grouped = q.reshape(k.shape[0], q.shape[0] // k.shape[0], q.shape[2])
    scores = torch.bmm(grouped, k.transpose(1, 2)).float() * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.bmm(torch.softmax(scores, dim=-1).to(v.dtype), v).reshape(q.shape[0], 1, v.shape[2])


def attend_padded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """One query for each request, whose keys are filled up to one length: all of them in one call.

    Args:
        query: (heads, requests, width); key: (key heads, requests · length, width); value likewise.
        mask: (requests, 1, 1, length), 0 or −∞, of the query's type.

    Returns:
        (heads, requests, value width).
    """
    requests, length = mask.shape[0], mask.shape[-1]
    heads, key_heads = query.shape[0], key.shape[0]
    # The queries that share a key head stand as rows of one query: none of them waits for another.
    q = query.transpose(0, 1).reshape(requests, key_heads, heads // key_heads, query.shape[2])
    k, v = (x.transpose(0, 1).reshape(requests, length, key_heads, -1).transpose(1, 2) for x in (key, value))
    out = F.scaled_dot_product_attention(q, k, v, mask.expand(-1, -1, q.shape[2], -1), scale=scale)
    return out.reshape(requests, heads, value.shape[2]).transpose(0, 1)
