"""Optimizer steps are drawn first, then packed.

One optimizer step is the next `examples_per_step` examples of the seeded order, whatever the hardware. Only then are
they laid into microbatches under a token budget, flat, without padding, each example a segment of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from firefly.data.examples import ExampleCounts
from firefly.data.schema import IGNORE, Source, Tokens
from firefly.segments import Segment, segment_positions


@dataclass(frozen=True)
class StepTotals:
    """What a whole optimizer step holds, over all its microbatches.

    Attributes:
        targets: trained tokens.
        tokens: tokens as they are laid out, the prompt of a preference pair once.
        input_tokens: tokens as users count them, the prompt of a pair once for each answer.
        nll_targets: tokens of chosen answers whose NLL a preference loss adds; 0 in other tasks.
    """

    examples: int
    targets: int
    tokens: int
    input_tokens: int
    nll_targets: int = 0

    def __add__(self, other: StepTotals) -> StepTotals:
        names = [spec.name for spec in dataclasses.fields(self)]
        return StepTotals(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass(frozen=True)
class PlannedStep:
    """One optimizer step: which examples lie in which microbatch of this rank, and the totals over all ranks.

    A microbatch without examples is padding (see `empty_row`). `examples` are those of the whole step in its order,
    for tasks that look from one to the next.
    """

    microbatches: tuple[tuple[int, ...], ...]
    totals: StepTotals
    examples: tuple[int, ...] = ()


@dataclass(frozen=True)
class PackedBatch:
    """One microbatch, flat.

    Attributes:
        input_ids: (1, tokens) int64.
        position_ids: (1, tokens) int64, restarted at 0 in every segment without a prefix.
        segments: who sees whom.
        target_index: (targets,) int64, positions whose hidden state predicts a trained token.
        targets: (targets,) int64, the trained tokens.
        channels: by name, (targets,) each: per-token values of a task (the answer that a target belongs to, a weight,
            an advantage). They are not passed to the model.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: tuple[Segment, ...]
    target_index: Tensor
    targets: Tensor
    channels: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        ids: np.ndarray,
        segments: Sequence[Segment],
        index: np.ndarray,
        targets: np.ndarray,
        **channels: np.ndarray,
    ) -> PackedBatch:
        """From numpy arrays of any integer type; `channels` keep theirs."""
        return cls(
            input_ids=torch.from_numpy(ids.astype(np.int64))[None],
            position_ids=torch.from_numpy(segment_positions(segments).astype(np.int64))[None],
            segments=tuple(segments),
            target_index=torch.from_numpy(index.astype(np.int64)),
            targets=torch.from_numpy(targets.astype(np.int64)),
            channels={name: torch.from_numpy(values) for name, values in channels.items()},
        )

    def to(self, device: torch.device) -> PackedBatch:
        """The batch on `device`; copies from pinned memory do not wait."""
        return moved(self, device)

    @property
    def rows(self) -> tuple[PackedBatch, ...]:
        """What the model is called with: this one row."""
        return (self,)

    def apart(self) -> tuple[PackedBatch, ...]:
        """A row for each segment, for a model that cannot keep them apart in one (the solo layout).

        Segments without a target are left out: nothing sees them.
        """
        if len(self.segments) == 1:
            return (self,)
        rows = []
        for start, end, *_ in self.segments:
            inside = (self.target_index >= start) & (self.target_index < end)
            if inside.any():
                ids, positions = self.input_ids[:, start:end], self.position_ids[:, start:end]
                index, targets = self.target_index[inside] - start, self.targets[inside]
                channels = {name: values[inside] for name, values in self.channels.items()}
                rows.append(PackedBatch(ids, positions, (Segment(0, end - start),), index, targets, channels))
        return tuple(rows)

    def weights(self) -> Tensor:
        """How many examples' sides each token belongs to, fp32 (tokens,): the prompt of a pair counts for both.

        Zeros for a row that holds no example (see `empty_row`): every example has a target.
        """
        if not len(self.targets):
            return torch.zeros(self.input_ids.shape[1], device=self.input_ids.device)
        weights = torch.ones(self.input_ids.shape[1], device=self.input_ids.device)
        for segment in self.segments:
            weights[segment.prefix_start : segment.prefix_end] += 1
        return weights

    def model_inputs(self, solo: bool = False) -> dict[str, Any]:
        """Keyword arguments of a model prepared by `models.heads` and, unless `solo`, `models.attention`.

        A row alone has the positions that the model gives it itself: those of RoBERTa begin behind its padding's, and
        architectures without positions take none.
        """
        inputs = {"input_ids": self.input_ids, "target_index": self.target_index, "targets": self.targets}
        return inputs if solo else inputs | {"position_ids": self.position_ids, "segments": self.segments}


def moved(batch: Any, device: torch.device) -> Any:
    """A copy of a batch (a dataclass) with its tensors, and those of batches in it, on `device`."""
    return _mapped(batch, lambda tensor: tensor.to(device, non_blocking=True))


def _mapped(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a dataclass with `function` of its tensors, also in its mappings and in dataclasses of its tuples."""
    changed: dict[str, Any] = {}
    for spec in dataclasses.fields(batch):
        value = getattr(batch, spec.name)
        if isinstance(value, Tensor):
            changed[spec.name] = function(value)
        elif isinstance(value, Mapping):
            changed[spec.name] = {name: function(tensor) for name, tensor in value.items()}
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            changed[spec.name] = tuple(_mapped(item, function) for item in value)
    return dataclasses.replace(batch, **changed)


Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Step(Generic[Batch]):
    """A packed step: what the data loader yields and `Task.backward` consumes.

    `example_ids` are the examples of each microbatch of this rank, by their numbers in the data set; `totals` and
    `examples` are all ranks'.
    """

    microbatches: tuple[Batch, ...]
    totals: StepTotals
    example_ids: tuple[tuple[int, ...], ...]
    examples: tuple[int, ...] = ()

    def pin_memory(self) -> Step[Batch]:
        """The step in pinned memory (called by the data loader), so that copies to a GPU are asynchronous."""
        return _mapped(self, Tensor.pin_memory)


def empty_row(**channels: np.ndarray) -> PackedBatch:
    """One token without a target: computed by a rank that has no examples left in a step, so that collectives match."""
    nothing = np.zeros(0, np.int64)
    return PackedBatch.of(np.zeros(1, np.int64), [Segment(0, 1)], nothing, nothing, **channels)


SHORTEST_SHARED = 16
"""Tokens from which on a common beginning is worth laying out once: what is saved of every layer has to outweigh the
keys that are put together in each."""


def pack(examples: Sequence[Tokens], share: bool = False) -> PackedBatch:
    """Lay examples one after another. The first token of a segment is predicted by none.

    Args:
        share: what an example has in common with the beginning of an earlier one, such as a system prompt, is not laid
            out again: the rest sees it as its prefix. Tokens that see the same come to the same, as long as nothing is
            drawn for each of them, as dropout is. Not for the solo layout, whose rows have no prefixes.
    """
    if not examples:
        return empty_row()
    ids, segments, indices, targets = [], [], [], []
    first_of: dict[bytes, tuple[int, np.ndarray]] = {}  # the first example that begins so, and where it lies
    start = 0
    for example in examples:
        tokens, opening, shared = example.input_ids, 0, 0
        if share and len(example.starts) == 1 and len(tokens) > SHORTEST_SHARED:
            opening, first = first_of.setdefault(tokens[:SHORTEST_SHARED].tobytes(), (start, tokens))
            shared = 0 if opening == start else common_beginning(first, tokens[:-1])
        trained = example.labels != IGNORE
        trained[list(example.starts)] = False
        place = np.flatnonzero(trained)
        before = place - 1
        indices.append(np.where(before < shared, opening + before, start - shared + before))
        targets.append(example.labels[place])
        ids.append(tokens[shared:])
        if shared:
            segments.append(Segment(start, start + len(tokens) - shared, opening, opening + shared))
        else:
            segments += [Segment(start + a, start + b) for a, b in pairwise([*example.starts, len(tokens)])]
        start += len(tokens) - shared
    return PackedBatch.of(np.concatenate(ids), segments, np.concatenate(indices), np.concatenate(targets))


def common_beginning(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two texts have in common at their beginning."""
    shorter = min(len(a), len(b))
    differing = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differing[0]) if len(differing) else shorter


def pack_owned(examples: Sequence[Tokens], share: bool = False) -> PackedBatch:
    """`pack`, with the number of its example beside each target, as the channel `owner`."""
    owner = np.repeat(np.arange(len(examples)), np.array([tokens.num_targets for tokens in examples], dtype=np.int64))
    return dataclasses.replace(pack(examples, share), channels={"owner": torch.from_numpy(owner)})


def plan_microbatches(lengths: Sequence[int], budget: int, multiple: int = 1) -> list[list[int]]:
    """Assign examples to as few microbatches as fit under `budget` tokens, of sizes as even as possible.

    An example longer than the budget gets a microbatch to itself. Returns lists of positions in `lengths`, each in
    ascending order, in a number that is a multiple of `multiple`; some may be empty. First-fit-decreasing finds the
    number; placing the longest first into the emptiest evens them out (and lowers the peak), unless that breaks the
    budget.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    bins: list[list[int]] = []
    loads: list[int] = []
    for i in order:
        chosen = next((b for b, load in enumerate(loads) if load + lengths[i] <= budget), None)
        if chosen is None:
            bins.append([i])
            loads.append(lengths[i])
        else:
            bins[chosen].append(i)
            loads[chosen] += lengths[i]
    bins += [[] for _ in range(-len(bins) % multiple)]
    even: list[list[int]] = [[] for _ in bins]
    even_loads = [0] * len(bins)
    for i in order:
        lightest = even_loads.index(min(even_loads))
        even[lightest].append(i)
        even_loads[lightest] += lengths[i]
    keeps_budget = all(load <= budget or len(items) == 1 for items, load in zip(even, even_loads, strict=True))
    chosen = even if keeps_budget else bins
    return sorted(sorted(items) for items in chosen)


def assign(groups: Sequence[Sequence[int]], lengths: Sequence[int], ranks: int) -> list[list[list[int]]]:
    """Assign microbatches to ranks, the same number to each, with tokens as even as possible.

    `groups` are as many as a multiple of `ranks`. The heaviest goes first, to the rank with the least so far that has
    room for another.
    """
    loads = [sum(lengths[i] for i in group) for group in groups]
    assigned: list[list[list[int]]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for number in sorted(range(len(groups)), key=lambda n: -loads[n]):
        free = [r for r in range(ranks) if len(assigned[r]) < len(groups) // ranks]
        to = min(free, key=totals.__getitem__)
        assigned[to].append(list(groups[number]))
        totals[to] += loads[number]
    return [sorted(mine) for mine in assigned]


def steps_per_epoch(examples: int, examples_per_step: int, drop_last: bool = False) -> int:
    """Optimizer steps that some examples make."""
    whole, rest = divmod(examples, examples_per_step)
    return whole + (1 if rest and not (drop_last and whole) else 0)


@dataclass(frozen=True)
class StepSettings:
    """What a step is.

    Attributes:
        examples_per_step: over all ranks.
        seed: of the order of examples, if they are shuffled.
        drop_last: whether an epoch's last step is left out if it is smaller.
    """

    examples_per_step: int
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False


class StepPlan(Sampler[PlannedStep]):
    """The seeded order of examples (those at `rows`, or all), cut into steps: a batch sampler of whole optimizer steps.

    An epoch's last step may be smaller, unless `drop_last`. The order of epoch e depends on (seed, e) alone. Of many
    ranks each plans the whole step and takes its share: as many microbatches as the others, of about as many tokens.

    Attributes:
        start: the first step of the epoch that is yielded; a resumed run skips those before it.
    """

    def __init__(
        self,
        counts: ExampleCounts,
        settings: StepSettings,
        budget: int,
        *,
        nll_targets: np.ndarray | None = None,
        rows: np.ndarray | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """
        Args:
            budget: tokens of a microbatch, which a single longer example exceeds; 0 gives each its own.
            share: the number of this rank, and how many there are.
        """
        self.counts = counts
        self.settings = settings
        self.budget = budget
        self.nll_targets = nll_targets
        self.rows = np.arange(len(counts.lengths)) if rows is None else rows
        self.rank, self.ranks = share
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return steps_per_epoch(len(self.rows), self.settings.examples_per_step, self.settings.drop_last)

    def order(self) -> np.ndarray:
        """Example indices in this epoch's order."""
        if not self.settings.shuffle:
            return self.rows
        return self.rows[np.random.default_rng((self.settings.seed, self.epoch)).permutation(len(self.rows))]

    def __iter__(self) -> Iterator[PlannedStep]:
        order = self.order()
        size = self.settings.examples_per_step
        for number in range(self.start, len(self)):
            yield self.plan(order[number * size : (number + 1) * size])

    def plan(self, rows: np.ndarray) -> PlannedStep:
        """Plan the step that holds exactly these examples: this rank's microbatches, and what all ranks' hold."""
        lengths = [int(length) for length in self.counts.lengths[rows]]
        groups = plan_microbatches(lengths, self.budget, self.ranks)
        mine = groups if self.ranks == 1 else assign(groups, lengths, self.ranks)[self.rank]
        return PlannedStep(
            microbatches=tuple(tuple(int(rows[i]) for i in group) for group in mine),
            totals=StepTotals(
                examples=len(rows),
                targets=int(self.counts.targets[rows].sum()),
                tokens=sum(lengths),
                input_tokens=int(self.counts.input_tokens[rows].sum()),
                nll_targets=0 if self.nll_targets is None else int(self.nll_targets[rows].sum()),
            ),
            examples=tuple(rows.tolist()),
        )


class ExampleList(Protocol):
    """What a run trains on: examples by index, and what is known of them all without reading one."""

    @property
    def counts(self) -> ExampleCounts: ...

    @property
    def names(self) -> list[str]:
        """Of the sources that `counts.sources` numbers."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def place(self, index: int) -> Source: ...


class Packer(Protocol):
    """Makes microbatches. An object or function of a module, so that data workers can be started with it."""

    def __call__(self, examples: ExampleList, rows: Sequence[int], step: Sequence[int]) -> Any:
        """One microbatch of the examples with the numbers `rows`, out of a step that holds those of `step`."""
        ...


@dataclass(frozen=True)
class RowPacking:
    """`pack`, or `pack_owned`, as a `Packer`."""

    share: bool
    owned: bool = False

    def __call__(self, examples: ExampleList, rows: Sequence[int], step: Sequence[int]) -> PackedBatch:
        return (pack_owned if self.owned else pack)([examples[row] for row in rows], self.share)


class StepSource(Protocol):
    """A source of whole steps, an epoch at a time, drawn from files or generated by a model."""

    def __len__(self) -> int:
        """Steps of an epoch."""
        ...

    def epoch(self, number: int, done: int = 0) -> Iterator[Step[Any]]:
        """The steps of an epoch, without its first `done`."""
        ...

    def smaller(self, step: Step[Any], budget: int) -> Step[Any]:
        """The same step in microbatches of at most `budget` tokens; those after it are packed so, too."""
        ...


class PackedExamples(Dataset[Any]):
    """Examples as the data loader sees them: asked for a planned step, it returns the step packed."""

    def __init__(self, examples: ExampleList, pack: Packer) -> None:
        self.examples = examples
        self.pack = pack

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        return self.examples[index]

    def __getitems__(self, step: PlannedStep) -> Step[Any]:
        batches = tuple(self.pack(self.examples, rows, step.examples) for rows in step.microbatches)
        return Step(batches, step.totals, step.microbatches, step.examples)


class StepLoader(DataLoader[Any]):
    """A source of steps that are drawn from examples (see `StepSource`), packed by workers if there are any."""

    def __iter__(self) -> Any:
        """Without workers steps are packed on demand: torch's loader would double the time."""
        return map(self.packed, self.plan) if self.num_workers == 0 and not self.pin_memory else super().__iter__()

    @property
    def plan(self) -> StepPlan:
        """Which examples are in which step; its budget may change between two steps."""
        plan: Any = self.batch_sampler
        return plan

    def epoch(self, number: int, done: int = 0) -> Iterator[Step[Any]]:
        self.plan.epoch, self.plan.start = number, done
        return iter(self)

    def smaller(self, step: Step[Any], budget: int) -> Step[Any]:
        self.plan.budget = budget
        return self.packed(self.plan.plan(np.array(step.examples, dtype=np.int64)))

    def packed(self, planned: PlannedStep) -> Step[Any]:
        dataset: Any = self.dataset
        return dataset.__getitems__(planned)


def keep_step(step: Step[Any]) -> Step[Any]:
    """The identity, as a collate function: a step arrives packed."""
    return step


def step_loader(examples: PackedExamples, plan: StepPlan, **options: Any) -> StepLoader:
    """A loader over `plan`. Its generator is its own, so that iterating leaves the training's random state alone."""
    return StepLoader(
        examples,
        batch_sampler=plan,  # type: ignore[arg-type]
        collate_fn=keep_step,  # type: ignore[arg-type]
        generator=torch.Generator(),
        **options,
    )
