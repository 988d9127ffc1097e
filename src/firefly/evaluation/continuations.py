"""How likely each of several continuations of a text is, the text computed once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from firefly.data.batching import PackedBatch, plan_microbatches
from firefly.evaluation.scoring import PASS_TOKENS, PLANNED_TOGETHER, Scorer, TargetScores
from firefly.segments import Segment

Ids = tuple[int, ...]


def score_continuations(
    model: Any,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    pass_tokens: int = PASS_TOKENS,
    tick: Callable[[int], None] = lambda done: None,
) -> list[TargetScores]:
    """Scores of each continuation behind its context, in their order.

    Continuations of one context share it, where the model can attend to segments. The last token of a continuation is
    predicted and never computed, so a context and a continuation may have one token more than the model's context.

    Args:
        model: of `load_for_generation`, or peft's around one. Nothing else may be computing with it meanwhile.
        requests: contexts, of at least one token each, and continuations.
        tick: called with the number of requests that were scored since the last call.
    """
    scorer = Scorer.of(model)
    asked: dict[tuple[Ids, Ids | None], dict[Ids, list[int]]] = {}
    for number, (context, continuation) in enumerate(requests):
        wanted = tuple(continuation)
        shared = (tuple(context), wanted if scorer.solo else None)
        asked.setdefault(shared, {}).setdefault(wanted, []).append(number)
    # The longest first: where memory does not hold them, that is known at once.
    groups = sorted(
        ((context, list(wanted), list(wanted.values())) for (context, _), wanted in asked.items()),
        key=lambda group: -_tokens(group[0], group[1]),
    )
    found: dict[int, TargetScores] = {}
    for start in range(0, len(groups), PLANNED_TOGETHER):
        window = groups[start : start + PLANNED_TOGETHER]
        costs = [
            scorer.cost(_tokens(context, wanted), sum(map(len, wanted)), pass_tokens) for context, wanted, _ in window
        ]
        for places in plan_microbatches(costs, pass_tokens):
            chosen = [window[place] for place in places]
            for rows in ([each] for each in chosen) if scorer.solo else (chosen,):
                scores = scorer.score(
                    pack_continuations([(context, wanted) for context, wanted, _ in rows], scorer.solo)
                )
                flat = [(ids, numbers) for _, wanted, of in rows for ids, numbers in zip(wanted, of, strict=True)]
                for one, (_, numbers) in zip(scores.split([len(ids) for ids, _ in flat]), flat, strict=True):
                    found.update(dict.fromkeys(numbers, one))
                tick(sum(len(numbers) for _, numbers in flat))
    return [found[number] for number in range(len(requests))]


def _tokens(context: Ids, continuations: Sequence[Ids]) -> int:
    return len(context) + sum(max(0, len(each) - 1) for each in continuations)


def pack_continuations(groups: Sequence[tuple[Ids, Sequence[Ids]]], solo: bool = False) -> PackedBatch:
    """Contexts, each with its continuations behind it: these see the context, and not one another.

    The targets are the tokens of the continuations, in their order.

    Args:
        solo: there is one context with one continuation, and they make one segment.
    """
    ids: list[int] = []
    segments: list[Segment] = []
    index: list[int] = []
    targets: list[int] = []
    for context, continuations in groups:
        start = len(ids)
        end = start + len(context)
        ids += context
        segments.append(Segment(start, end))
        for wanted in continuations:
            begin = len(ids)
            read = wanted[:-1]
            ids += read
            if read:
                segments.append(Segment(begin, len(ids), start, end))
            index += [end - 1, *range(begin, len(ids))][: len(wanted)]
            targets += wanted
    segments = [Segment(0, len(ids))] if solo else segments
    arrays = [np.array(values, dtype=np.int64) for values in (ids, index, targets)]
    return PackedBatch.of(arrays[0], segments, arrays[1], arrays[2])
