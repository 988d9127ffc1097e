"""Log-probabilities of texts that are there already: what `echo` of the completions interface asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from firefly.generation.engine import Token
from firefly.generation.sampler import describe_tokens
from firefly.models.attention import segmented
from firefly.segments import Segment, segment_positions


def score_texts(model: Any, texts: Sequence[Sequence[int]], top: int, budget: int) -> list[list[Token]]:
    """Each token of each text with its log-probability behind those before it; the first of a text has none.

    Short texts are packed into one row of at most `budget` tokens, as in training, where the model can attend to
    segments; a longer one is read in parts of as many tokens, with a key-value cache.

    Args:
        model: transformers' model itself; `models.attention.choose_layout` has prepared it.
        top: of how many of the likeliest tokens in each place to tell.
    """
    packed = segmented(model) is not None
    packs: list[list[int]] = []
    for number, text in enumerate(texts):
        used = sum(len(texts[each]) for each in packs[-1]) if packs else 0
        if packs and used + len(text) <= budget and packed:
            packs[-1].append(number)
        else:
            packs.append([number])
    scored: list[list[Token]] = [[] for _ in texts]
    with torch.no_grad():
        for pack in packs:
            rows = [texts[number] for number in pack]
            found = _score_packed(model, rows, top) if len(rows) > 1 else [_score_long(model, rows[0], top, budget)]
            for number, tokens in zip(pack, found, strict=True):
                scored[number] = tokens
    return scored


def _score_packed(model: Any, rows: Sequence[Sequence[int]], top: int) -> list[list[Token]]:
    segments, start = [], 0
    for row in rows:
        segments.append(Segment(start, start + len(row)))
        start += len(row)
    ids = torch.tensor([[token for row in rows for token in row]], device=model.device)
    positions = torch.from_numpy(segment_positions(tuple(segments)))[None].to(ids.device)
    logits = model(input_ids=ids, position_ids=positions, segments=tuple(segments), use_cache=False).logits[0]
    return [
        _described(row, logits[segment.start : segment.end - 1], top)
        for row, segment in zip(rows, segments, strict=True)
    ]


def _score_long(model: Any, row: Sequence[int], top: int, budget: int) -> list[Token]:
    cache, tokens = None, [Token(row[0])]
    for start in range(0, len(row) - 1, budget):
        part = row[start : min(start + budget, len(row) - 1)]
        output = model(input_ids=torch.tensor([part], device=model.device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        following = row[start + 1 : start + 1 + len(part)]
        tokens += describe_tokens(output.logits[0].float(), following, [top] * len(part))
    return tokens


def _described(row: Sequence[int], logits: Tensor, top: int) -> list[Token]:
    return [Token(row[0]), *describe_tokens(logits.float(), row[1:], [top] * (len(row) - 1))]
