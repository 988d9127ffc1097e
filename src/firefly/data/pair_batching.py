"""Preference pairs into microbatches: [prompt][chosen][rejected], both answers behind one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from firefly.data.batching import PackedBatch, empty_row, moved
from firefly.data.schema import IGNORE, TokenPair
from firefly.segments import Segment


@dataclass(frozen=True)
class PairBatch:
    """One microbatch of pairs.

    Attributes:
        rows: what the model is called with, one after another: one row of all pairs, or in the solo layout a row for
            either answer of one pair.
            Their channel `owner` says whose log-probability each target's is: pair i's chosen answer has the number i,
            its rejected answer pairs + i, its prompt (if that is trained, too) 2 · pairs + i.
        counts: (3, pairs) fp32: targets of the chosen answers, the rejected ones, the prompts.
        reference: (2, pairs) fp32 log-probabilities of the answers under the reference, if computed beforehand.
    """

    rows: tuple[PackedBatch, ...]
    counts: Tensor
    reference: Tensor | None = None

    @property
    def pairs(self) -> int:
        return self.counts.shape[1]

    def to(self, device: torch.device) -> PairBatch:
        """The batch on `device`."""
        return moved(self, device)


def pack_pairs(
    pairs: Sequence[TokenPair], shared: bool = True, prompts: bool = False, reference: np.ndarray | None = None
) -> PairBatch:
    """Pack pairs.

    Args:
        shared: lay a pair out once, the prompt before both answers; otherwise each answer behind its own prompt, a row
            each.
        prompts: the tokens of the prompt are targets, too (of the chosen answer's text).
        reference: (pairs, 2), kept with the batch.
    """
    laid = [_lay_out(pair, prompts) for pair in pairs] if shared else []
    if not pairs:
        # As many passes as a pair takes: ranks whose weights are sharded have to call the model equally often.
        rows = [empty_row(owner=np.zeros(0, np.int64)) for _ in range(1 if shared else 2)]
    elif shared:
        rows = [_one_row(laid)]
    else:
        rows = _row_each(pairs, prompts)
    owner = torch.cat([row.channels["owner"] for row in rows])
    counts = torch.bincount(owner, minlength=3 * len(pairs)).view(3, len(pairs)).float()
    kept = None if reference is None else torch.from_numpy(np.ascontiguousarray(reference.T, dtype=np.float32))
    return PairBatch(tuple(rows), counts, kept)


@dataclass(frozen=True)
class _Laid:
    """A pair's targets within [prompt][chosen][rejected]: the position that predicts each, and its side (0, 1, 2)."""

    pair: TokenPair
    index: np.ndarray
    targets: np.ndarray
    side: np.ndarray


def _lay_out(pair: TokenPair, prompts: bool) -> _Laid:
    border = pair.prompt + pair.chosen
    trained = np.flatnonzero(pair.labels != IGNORE)
    trained = trained[trained > 0]  # the first token is predicted by none
    index = trained - 1
    index[trained == border] = pair.prompt - 1  # the rejected answer follows the prompt, too
    side = (trained >= border).astype(np.int64)
    kept = index >= 0
    trained, index, side = trained[kept], index[kept], side[kept]
    if prompts:
        inside = np.arange(1, pair.prompt)
        trained, index = np.concatenate([trained, inside]), np.concatenate([index, inside - 1])
        side = np.concatenate([side, np.full(len(inside), 2)])
    return _Laid(pair, index, pair.input_ids[trained], side)


def _one_row(laid: Sequence[_Laid]) -> PackedBatch:
    segments, indices, owners, start = [], [], [], 0
    for number, item in enumerate(laid):
        pair = item.pair
        middle, end = start + pair.prompt + pair.chosen, start + len(pair.input_ids)
        segments += [Segment(start, middle), Segment(middle, end, start, start + pair.prompt)]
        indices.append(item.index + start)
        owners.append(item.side * len(laid) + number)
        start = end
    ids, targets = (np.concatenate(parts) for parts in zip(*((i.pair.input_ids, i.targets) for i in laid), strict=True))
    return PackedBatch.of(ids, segments, np.concatenate(indices), targets, owner=np.concatenate(owners))


def _row_each(pairs: Sequence[TokenPair], prompts: bool) -> list[PackedBatch]:
    """Each answer behind its prompt; of the chosen one's, the prompt's tokens may be targets, too."""
    rows = []
    for number, pair in enumerate(pairs):
        for side, tokens in enumerate(pair.sides):
            prompt = np.arange(1, pair.prompt if prompts and side == 0 else 1)
            trained = np.flatnonzero(tokens.labels != IGNORE)
            trained = np.concatenate([prompt, trained[trained > 0]])
            sides = np.where(np.arange(len(trained)) < len(prompt), 2, side)
            alone, ids = [Segment(0, len(tokens.input_ids))], tokens.input_ids
            rows.append(PackedBatch.of(ids, alone, trained - 1, ids[trained], owner=sides * len(pairs) + number))
    return rows
