"""What a run computes on, as far as memory and time depend on it: lengths, not texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from firefly.config import RECORDS_OF_TASK, Config
from firefly.data.batching import ExampleList, PackedBatch, pack
from firefly.data.examples import longest_sides
from firefly.data.pair_batching import pack_pairs
from firefly.data.schema import IGNORE, TokenPair, Tokens

ASSUMED_EXAMPLES = 1 << 16
"""As many rows of the greatest length as any step can draw stand for data that are not there."""


@dataclass(frozen=True)
class Work:
    """The examples of a run by their sizes, int64 (examples,) each.

    Attributes:
        lengths: tokens as they are laid out, a pair's prompt once.
        targets: trained tokens.
        prompt, chosen: tokens of a pair's prompt and chosen answer; 0 where examples are no pairs.
        segments: stretches that attend by themselves.
        known: whether they are the data's; else the greatest lengths are assumed.
    """

    lengths: np.ndarray
    targets: np.ndarray
    prompt: np.ndarray
    chosen: np.ndarray
    segments: np.ndarray
    known: bool

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    @property
    def sides(self) -> np.ndarray:
        """Tokens of the longest text in each example."""
        return longest_sides(self.lengths, self.prompt, self.chosen)

    def largest_step(self, examples: int) -> int:
        """Tokens of the largest step of so many examples that can be drawn."""
        return int(np.sort(self.lengths)[::-1][:examples].sum())

    def cut(self, limit: int) -> Work:
        """The same rows cut to `limit` tokens (a pair: either answer with its prompt); estimated by proportion."""
        share = np.minimum(1.0, limit / self.sides)
        scaled = {name: np.ceil(getattr(self, name) * share).astype(np.int64) for name in ("lengths", "targets")}
        pairs = {name: np.ceil(getattr(self, name) * share).astype(np.int64) for name in ("prompt", "chosen")}
        return replace(self, **scaled, **pairs)

    def heaviest(self, examples: int, budget: int) -> list[int]:
        """The examples of the largest microbatch under a budget that a step can draw: the longest one, and what of
        the next longest finds room beside it."""
        order = np.argsort(self.lengths)[::-1]
        chosen = [int(order[0])]
        room, rank = budget - int(self.lengths[order[0]]), 1
        descending = self.lengths[order]
        while len(chosen) < examples and rank < len(order) and room > 0:
            rank = max(rank, int(np.searchsorted(-descending, -room, side="left")))
            if rank < len(order):
                chosen.append(int(order[rank]))
                room -= int(descending[rank])
                rank += 1
        return chosen

    def rows(self, chosen: Sequence[int], solo: bool, prompts: bool = False) -> list[PackedBatch]:
        """A microbatch of these examples, of any tokens: what the model is called with, one after another."""
        if self.chosen[chosen[0]]:
            return list(pack_pairs([self._pair(index) for index in chosen], shared=not solo, prompts=prompts).rows)
        batch = pack([self._tokens(index) for index in chosen])
        return list(batch.apart()) if solo else [batch]

    def _tokens(self, index: int) -> Tokens:
        """Trained at its end; where the targets lie makes no difference to memory."""
        length, targets = int(self.lengths[index]), int(self.targets[index])
        ids = np.zeros(length, np.int32)
        return Tokens(ids, np.where(np.arange(length) < length - targets, IGNORE, ids).astype(np.int32))

    def _pair(self, index: int) -> TokenPair:
        length, prompt, chosen = (int(part[index]) for part in (self.lengths, self.prompt, self.chosen))
        ids = np.zeros(length, np.int32)
        labels = np.where(np.arange(length) < prompt, IGNORE, ids).astype(np.int32)
        return TokenPair(ids, labels, prompt, chosen)


def work_of(examples: ExampleList) -> Work:
    """The sizes of prepared examples."""
    counts = examples.counts
    pairs = counts.input_tokens > counts.lengths  # a pair's prompt counts twice there
    return Work(
        counts.lengths.astype(np.int64),
        counts.targets.astype(np.int64),
        np.where(pairs, counts.prompt, 0).astype(np.int64),
        counts.chosen.astype(np.int64),
        counts.segments,
        known=True,
    )


def assumed_work(config: Config) -> Work:
    """Rows as long as the configuration allows, trained in every token (pairs: in every token of their answers)."""
    limit = config.data.max_seq_length
    count = min(config.step.examples_per_rank, ASSUMED_EXAMPLES)
    same = np.ones(count, np.int64)
    if RECORDS_OF_TASK[config.task_type] != "pair":
        return Work(same * limit, same * (limit - 1), 0 * same, 0 * same, same, known=False)
    prompt = min(config.data.max_prompt_length or limit // 2, limit // 2)
    answer = limit - prompt
    return Work(same * (prompt + 2 * answer), same * 2 * answer, same * prompt, same * answer, 3 * same, known=False)
