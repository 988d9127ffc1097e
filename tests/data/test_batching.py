"""A step is drawn first and packed after: what it holds never depends on how it is laid out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from firefly.data.batching import (
    SHORTEST_SHARED,
    PackedBatch,
    PackedExamples,
    PlannedStep,
    RowPacking,
    StepPlan,
    StepSettings,
    keep_step,
    pack,
    pack_owned,
    plan_microbatches,
    step_loader,
)
from firefly.data.schema import IGNORE, Tokens
from firefly.segments import Segment
from tiny import ListedExamples, apart

lengths_of_examples = st.lists(st.integers(1, 50), min_size=1, max_size=30)


def examples(count: int, seed: int = 0) -> ListedExamples:
    """Examples whose every token names its example: id = 100 × example + position."""
    random = np.random.default_rng(seed)
    result = []
    for number in range(count):
        ids = (100 * number + np.arange(random.integers(2, 20))).astype(np.int32)
        trained = random.random(len(ids)) < 0.5
        trained[-1] = True
        result.append(Tokens(ids, np.where(trained, ids, IGNORE).astype(np.int32)))
    return ListedExamples(result)


def plan_of(
    data: ListedExamples, examples_per_step: int = 4, budget: int = 40, solo: bool = False, **settings: Any
) -> StepPlan:
    return StepPlan(data.counts, StepSettings(examples_per_step, **settings), 0 if solo else budget)


def packed(data: ListedExamples) -> PackedExamples:
    return PackedExamples(data, RowPacking(share=False))


def rows(step: PlannedStep) -> list[int]:
    return sorted(row for microbatch in step.microbatches for row in microbatch)


# ---- packing ----


def test_a_packed_batch_lays_examples_one_after_another_without_padding():
    first = Tokens(np.array([11, 12, 13], np.int32), np.array([IGNORE, 12, 13], np.int32))
    second = Tokens(np.array([21, 22], np.int32), np.array([21, 22], np.int32))
    third = Tokens(np.array([31, 32, 33], np.int32), np.array([IGNORE, IGNORE, 33], np.int32))
    batch = pack([first, second, third])
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22, 31, 32, 33]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch.segments == apart(0, 3, 5, 8)
    # 21 is the first token of its segment: the last token of the segment before must not be asked for it
    assert batch.targets.tolist() == [12, 13, 22, 33]
    assert batch.target_index.tolist() == [0, 1, 3, 6]
    assert (
        batch.input_ids.dtype
        == batch.position_ids.dtype
        == batch.targets.dtype
        == batch.target_index.dtype
        == torch.int64
    )


def beginning_alike(beginnings: list[int], rest: list[int], seed: int) -> list[Tokens]:
    """Examples of which those with one number begin with the same 20 tokens and go on as they like."""
    random = np.random.default_rng(seed)
    made = []
    for beginning, length in zip(beginnings, rest, strict=True):
        ids = np.concatenate([100 * beginning + np.arange(20), random.integers(1000, 1004, length)]).astype(np.int32)
        trained = random.random(len(ids)) < 0.5
        trained[-1] = True
        made.append(Tokens(ids, np.where(trained, ids, IGNORE).astype(np.int32)))
    return made


def seen_by(batch: PackedBatch, place: int) -> list[int]:
    """The tokens that one at `place` sees, itself last: its prefix, and what of its segment came before."""
    segment = next(segment for segment in batch.segments if segment.start <= place < segment.end)
    ids = batch.input_ids[0].tolist()
    return ids[segment.prefix_start : segment.prefix_end] + ids[segment.start : place + 1]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12)), min_size=1, max_size=12), st.integers(0, 999)
)  # fmt: skip
def test_what_examples_begin_with_alike_is_laid_out_once_and_each_target_sees_its_own_example(made, seed):
    some = beginning_alike(*map(list, zip(*made, strict=True)), seed)
    plain, batch = pack_owned(some), pack_owned(some, share=True)
    assert batch.targets.tolist() == plain.targets.tolist()
    assert batch.channels["owner"].tolist() == plain.channels["owner"].tolist()
    for before, after in zip(plain.target_index.tolist(), batch.target_index.tolist(), strict=True):
        assert seen_by(batch, after) == seen_by(plain, before)
        assert batch.position_ids[0, after] == plain.position_ids[0, before]
    kinds = {beginning for beginning, _ in made}
    assert batch.input_ids.numel() <= plain.input_ids.numel() - 20 * (len(some) - len(kinds))
    # As many examples see each token as had it before: what the router loss weighs.
    assert batch.weights().sum() == plain.input_ids.numel()


def test_short_or_unlike_beginnings_and_packed_documents_are_laid_out_whole():
    short = [Tokens(ids, ids) for ids in np.arange(SHORTEST_SHARED + 1, dtype=np.int32)[None].repeat(2, 0)]
    assert pack([short[0], short[1]], share=True).input_ids.numel() == 2 * len(short[0].input_ids) - SHORTEST_SHARED
    cut = [Tokens(each.input_ids[:-1], each.labels[:-1]) for each in short]
    ids = np.arange(40, dtype=np.int32)
    for kept in (cut, [Tokens(ids, ids), Tokens(ids[::-1].copy(), ids)], [Tokens(ids, ids, starts=(0, 20))] * 2):
        assert pack(kept, share=True).input_ids.tolist() == pack(kept).input_ids.tolist()
        assert pack(kept, share=True).segments == pack(kept).segments


def test_the_same_example_twice_leaves_one_token_of_the_second():
    ids = np.arange(30, dtype=np.int32)
    batch = pack([Tokens(ids, ids)] * 2, share=True)
    assert batch.segments == (Segment(0, 30), Segment(30, 31, 0, 29))
    assert batch.target_index.tolist() == [*range(29), *range(29)]


@given(st.integers(1, 12), st.integers(0, 5))
def test_no_target_crosses_a_segment_and_each_is_the_next_token(count, seed):
    data = examples(count, seed)
    batch = pack(data.examples)
    ids, index = batch.input_ids[0], batch.target_index
    assert ids.tolist() == [token for tokens in data.examples for token in tokens.input_ids.tolist()]
    assert torch.equal(ids[index + 1], batch.targets)
    starts = torch.tensor([segment.start for segment in batch.segments])
    segment = torch.searchsorted(starts, index, right=True)
    assert torch.equal(segment, torch.searchsorted(starts, index + 1, right=True))
    assert len(batch.targets) == data.counts.targets.sum()
    assert batch.segments[-1].end == len(ids) == batch.position_ids.shape[1]


def test_a_batch_moves_whole_and_becomes_the_models_arguments():
    batch = pack(examples(3).examples).to(torch.device("cpu"))
    inputs = batch.model_inputs()
    assert inputs["segments"] == batch.segments
    assert set(inputs) == {"input_ids", "position_ids", "segments", "target_index", "targets"}
    assert set(inputs) - set(batch.model_inputs(solo=True)) == {"segments", "position_ids"}


# ---- microbatches ----


@given(lengths_of_examples, st.integers(1, 120))
def test_microbatches_hold_every_example_once_and_keep_the_budget(lengths, budget):
    groups = plan_microbatches(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(group == sorted(group) for group in groups)
    for group in groups:
        assert sum(lengths[i] for i in group) <= budget or len(group) == 1


@given(lengths_of_examples, st.integers(1, 120))
def test_no_two_microbatches_could_be_one(lengths, budget):
    loads = sorted(sum(lengths[i] for i in group) for group in plan_microbatches(lengths, budget))
    assert len(loads) == 1 or loads[0] + loads[1] > budget or len(loads) <= -(-sum(lengths) // budget)


def test_an_example_over_the_budget_stands_alone_and_does_not_lift_it_for_others():
    assert plan_microbatches([20, 3, 3, 2, 2, 2], 6) == [[0], [1, 2], [3, 4, 5]]


def test_microbatches_are_evened_out():
    groups = plan_microbatches([4, 4, 4, 4, 1, 1], 16)
    assert sorted(sum([4, 4, 4, 4, 1, 1][i] for i in group) for group in groups) == [9, 9]
    assert plan_microbatches([], 10) == []


# ---- steps ----


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 200), st.integers(0, 3), st.integers(0, 3))
def test_a_step_holds_exactly_the_next_examples_of_the_seeded_order(count, per_step, budget, seed, epoch):
    data = examples(count)
    plan = plan_of(data, per_step, budget, seed=seed)
    plan.epoch = epoch
    order = plan.order().tolist()
    assert sorted(order) == list(range(count))
    steps = list(plan)
    assert len(steps) == len(plan) == -(-count // per_step)
    for number, step in enumerate(steps):
        expected = order[number * per_step : (number + 1) * per_step]
        assert rows(step) == sorted(expected)
        assert step.totals.targets == data.counts.targets[expected].sum()
        assert step.totals.tokens == data.counts.lengths[expected].sum()


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    data = examples(30)

    def order(epoch: int = 0, **options: Any) -> list[int]:
        plan = plan_of(data, **options)
        plan.epoch = epoch
        torch.manual_seed(np.random.randint(1000))
        return plan.order().tolist()

    assert order(seed=1) == order(seed=1, examples_per_step=7, budget=1000, solo=True, drop_last=True)
    assert len({tuple(order(seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(seed=1, epoch=2) != order(seed=2, epoch=1)
    assert order(shuffle=False) == order(3, shuffle=False) == list(range(30))


def test_packing_budget_and_layout_change_no_step():
    data = examples(30)
    plans = [
        plan_of(data, 8, budget, seed=5, solo=solo)
        for budget, solo in ((1, False), (40, False), (10**6, False), (40, True))
    ]
    for steps in zip(*plans, strict=True):
        assert len({(tuple(rows(step)), step.totals) for step in steps}) == 1
    assert all(len(step.microbatches) == 1 for step in plans[2])
    for solo in (plans[0], plans[3]):
        assert all(len(microbatch) == 1 for step in solo for microbatch in step.microbatches)


def test_an_epochs_last_step_is_smaller_unless_it_is_dropped():
    data = examples(10)
    assert [len(rows(step)) for step in plan_of(data, 4)] == [4, 4, 2]
    assert [len(rows(step)) for step in plan_of(data, 4, drop_last=True)] == [4, 4]
    assert [len(rows(step)) for step in plan_of(data, 5, drop_last=True)] == [5, 5]
    assert [len(rows(step)) for step in plan_of(data, 64, drop_last=True)] == [10]  # or nothing would be trained


# ---- the loader ----


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_yields_whole_packed_steps_in_the_plans_order(workers):
    data = examples(11)
    plan = plan_of(data, 4, 30, seed=3)
    loader = step_loader(packed(data), plan, num_workers=workers)
    planned = list(plan)
    assert len(loader) == len(planned) == 3
    for step, expected in zip(loader, planned, strict=True):
        assert step.totals == expected.totals
        assert step.totals.targets == sum(len(batch.targets) for batch in step.microbatches)
        assert step.totals.tokens == sum(batch.input_ids.numel() for batch in step.microbatches)
        for batch, members in zip(step.microbatches, expected.microbatches, strict=True):
            starts = batch.input_ids[0, [segment.start for segment in batch.segments]].tolist()
            assert starts == [100 * row for row in members]


def test_the_loader_passes_the_epoch_on_and_leaves_the_training_seed_alone():
    data = examples(12)
    plan = plan_of(data, 4, seed=3)
    loader = step_loader(packed(data), plan)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = [step.microbatches[0].input_ids.tolist() for step in loader]
    second = [step.microbatches[0].input_ids.tolist() for step in loader.epoch(1)]
    assert [step.microbatches[0].input_ids.tolist() for step in loader.epoch(0)] == first != second
    assert torch.equal(before, torch.get_rng_state())
    step = next(iter(loader))
    assert keep_step(step) is step
