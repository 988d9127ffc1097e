"""Preference pairs into microbatches: [prompt][chosen][rejected], both answers behind one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from firefly.data.batching import PackedBatch, empty_row, moved
from firefly.data.schema import IGNORE, TokenPair, Tokens
from firefly.segments import Segment


@dataclass(frozen=True)
class PairBatch:
    """One microbatch of pairs.

    Attributes:
        rows: what the model is called with, one after another: one row of all pairs, or in the solo layout a row for
            either answer of one pair.
        owner: (targets of all rows,) int64: whose log-probability each target's is: pair i's chosen answer has the
            number i, its rejected answer pairs + i, its prompt (if that is trained, too) 2 · pairs + i.
        counts: (3, pairs) fp32: targets of the chosen answers, the rejected ones, the prompts.
        reference: (2, pairs) fp32 log-probabilities of the answers under the reference, if computed beforehand.
    """

    rows: tuple[PackedBatch, ...]
    owner: Tensor
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
        # As many passes as a pair takes: ranks whose weights are divided have to call the model equally often.
        rows = [empty_row()] if shared else [empty_row(), empty_row()]
        owners = [np.zeros(0, np.int64)] * len(rows)
    elif shared:
        rows, owners = _one_row(laid)
    else:
        rows, owners = _row_each(pairs, prompts)
    owner = torch.from_numpy(np.concatenate(owners).astype(np.int64))
    counts = torch.bincount(owner, minlength=3 * len(pairs)).view(3, len(pairs)).float()
    kept = None if reference is None else torch.from_numpy(np.ascontiguousarray(reference.T, dtype=np.float32))
    return PairBatch(tuple(rows), owner, counts, kept)


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


def _one_row(laid: Sequence[_Laid]) -> tuple[list[PackedBatch], list[np.ndarray]]:
    segments, indices, owners, start = [], [], [], 0
    for number, item in enumerate(laid):
        pair = item.pair
        middle, end = start + pair.prompt + pair.chosen, start + len(pair.input_ids)
        segments += [Segment(start, middle), Segment(middle, end, start, start + pair.prompt)]
        indices.append(item.index + start)
        owners.append(item.side * len(laid) + number)
        start = end
    ids, targets = (np.concatenate(parts) for parts in zip(*((i.pair.input_ids, i.targets) for i in laid), strict=True))
    return [PackedBatch.of(ids, segments, np.concatenate(indices), targets)], owners


def _row_each(pairs: Sequence[TokenPair], prompts: bool) -> tuple[list[PackedBatch], list[np.ndarray]]:
    rows, owners = [], []
    for number, pair in enumerate(pairs):
        for side, tokens in enumerate(pair.sides):
            row, owner = _alone(tokens, pair.prompt if prompts and side == 0 else 0)
            rows.append(row)
            owners.append(np.where(owner == 2, 2, side) * len(pairs) + number)
    return rows, owners


def _alone(tokens: Tokens, prompt: int) -> tuple[PackedBatch, np.ndarray]:
    """One answer behind its prompt, of which the first `prompt` tokens are targets, too (marked 2)."""
    trained = np.flatnonzero(tokens.labels != IGNORE)
    trained = np.concatenate([np.arange(1, prompt), trained[trained > 0]])
    length = len(tokens.input_ids)
    row = PackedBatch.of(tokens.input_ids, [Segment(0, length)], trained - 1, tokens.input_ids[trained])
    return row, np.where(np.arange(len(trained)) < max(prompt - 1, 0), 2, 0)
