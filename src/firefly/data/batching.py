"""Steps drawn first, then packed.

One optimizer step is the next `examples_per_step` examples of the seeded order, whatever the hardware. Only then are
they laid into microbatches under a token budget, flat, without padding, each example a segment of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from firefly.data.dataset import Examples
from firefly.data.schema import IGNORE, Tokens


@dataclass(frozen=True)
class PlannedStep:
    """One optimizer step: which examples lie in which microbatch, and how many targets and tokens it has in all."""

    microbatches: tuple[tuple[int, ...], ...]
    targets: int
    tokens: int


@dataclass(frozen=True)
class PackedBatch:
    """One microbatch, flat.

    Attributes:
        input_ids: (1, tokens) int64.
        position_ids: (1, tokens) int64, restarted at 0 in every segment.
        borders: token positions where segments begin, and the total: 0 = b0 < b1 < … = tokens.
        target_index: (targets,) int64, positions whose hidden state predicts a trained token.
        targets: (targets,) int64, the trained tokens.
    """

    input_ids: Tensor
    position_ids: Tensor
    borders: tuple[int, ...]
    target_index: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> PackedBatch:
        """The batch on `device`; copies from pinned memory do not wait."""
        names = ("input_ids", "position_ids", "target_index", "targets")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return PackedBatch(borders=self.borders, **moved)

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of a model prepared by `models.heads` and `models.attention`."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "segment_borders": self.borders,
            "target_index": self.target_index,
            "targets": self.targets,
        }


@dataclass(frozen=True)
class Step:
    """A packed step: what the data loader yields and `training_step` consumes."""

    microbatches: tuple[PackedBatch, ...]
    targets: int
    tokens: int


def pack(examples: Sequence[Tokens]) -> PackedBatch:
    """Lay examples one after another. The last token of a segment predicts nothing."""
    lengths = [len(example.input_ids) for example in examples]
    borders = np.cumsum([0, *lengths])
    ids = np.concatenate([example.input_ids for example in examples]).astype(np.int64)
    labels = np.concatenate([example.labels for example in examples]).astype(np.int64)
    labels[borders[:-1]] = IGNORE
    trained = np.flatnonzero(labels != IGNORE)
    positions = np.arange(len(ids)) - np.repeat(borders[:-1], lengths)
    return PackedBatch(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(positions)[None],
        borders=tuple(int(border) for border in borders),
        target_index=torch.from_numpy(trained - 1),
        targets=torch.from_numpy(labels[trained]),
    )


def plan_microbatches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Share examples out among as few microbatches as fit under `budget` tokens, of sizes as even as may be.

    An example longer than the budget gets a microbatch to itself. Returns lists of positions in `lengths`, each in
    ascending order. First-fit-decreasing finds the number; placing the longest first into the emptiest evens them out
    (and lowers the peak), unless that breaks the budget.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    bins: list[list[int]] = []
    loads: list[int] = []
    for i in order:
        place = next((b for b, load in enumerate(loads) if load + lengths[i] <= budget), None)
        if place is None:
            bins.append([i])
            loads.append(lengths[i])
        else:
            bins[place].append(i)
            loads[place] += lengths[i]
    even: list[list[int]] = [[] for _ in bins]
    even_loads = [0] * len(bins)
    for i in order:
        place = even_loads.index(min(even_loads))
        even[place].append(i)
        even_loads[place] += lengths[i]
    keeps_budget = all(load <= budget or len(items) == 1 for items, load in zip(even, even_loads, strict=True))
    chosen = even if keeps_budget else bins
    return sorted(sorted(items) for items in chosen)


class StepPlan(Sampler[PlannedStep]):
    """The seeded order of examples, cut into steps: a batch sampler whose items are whole optimizer steps.

    An epoch's last step may be smaller, unless `drop_last`. The order of epoch e depends on (seed, e) alone.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        targets: np.ndarray,
        examples_per_step: int,
        budget: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        solo: bool = False,
    ) -> None:
        self.lengths = lengths
        self.targets = targets
        self.examples_per_step = examples_per_step
        self.budget = budget
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.solo = solo
        self.epoch = 0

    def __len__(self) -> int:
        whole, rest = divmod(len(self.lengths), self.examples_per_step)
        return whole + (1 if rest and not (self.drop_last and whole) else 0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self) -> np.ndarray:
        """Example indices in this epoch's order."""
        if not self.shuffle:
            return np.arange(len(self.lengths))
        return np.random.default_rng((self.seed, self.epoch)).permutation(len(self.lengths))

    def __iter__(self) -> Iterator[PlannedStep]:
        order = self.order()
        for number in range(len(self)):
            yield self.plan(order[number * self.examples_per_step : (number + 1) * self.examples_per_step])

    def plan(self, rows: np.ndarray) -> PlannedStep:
        """Plan the step that holds exactly these examples."""
        lengths = [int(length) for length in self.lengths[rows]]
        groups = [[i] for i in range(len(rows))] if self.solo else plan_microbatches(lengths, self.budget)
        return PlannedStep(
            microbatches=tuple(tuple(int(rows[i]) for i in group) for group in groups),
            targets=int(self.targets[rows].sum()),
            tokens=sum(lengths),
        )


class PackedExamples(Dataset[Tokens]):
    """Examples as the data loader sees them: asked for a planned step, it returns the step packed."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Tokens:
        return self.examples[index]

    def __getitems__(self, step: PlannedStep) -> Step:
        batches = tuple(pack([self.examples[i] for i in rows]) for rows in step.microbatches)
        return Step(batches, step.targets, step.tokens)


class StepLoader(DataLoader[Tokens]):
    """A loader of whole steps that passes the epoch on to its plan."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def keep_step(step: Step) -> Step:
    """The identity, as a collate function: a step arrives packed."""
    return step


def step_loader(examples: Examples, plan: StepPlan, **options: Any) -> StepLoader:
    """A loader over `plan`. Its generator is its own, so that iterating leaves the training's random state alone."""
    return StepLoader(
        PackedExamples(examples),
        batch_sampler=plan,  # type: ignore[arg-type]
        collate_fn=keep_step,  # type: ignore[arg-type]
        generator=torch.Generator(),
        **options,
    )
