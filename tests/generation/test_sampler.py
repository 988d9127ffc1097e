"""Tokens are drawn from the distribution that transformers' warpers leave, by random numbers of their own request."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from firefly.generation.engine import Request
from firefly.generation.sampler import LIKELY, Sampler, choose_tokens
from firefly.generation.settings import GenerationSettings

VOCABULARY = 50


def sampler(prompt: tuple[int, ...] = (1, 2, 3), index: int = 0, **given: Any) -> Sampler:
    return Sampler(Request(prompt, GenerationSettings(**given), (), "m", index))


def logits_of(seed: int, rows: int = 1, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def drawn_shares(logits: Tensor, drawing: Sampler, numbers: int = 500) -> Tensor:
    """How often each token comes, over numbers that lie evenly in [0, 1)."""
    counts = torch.zeros(logits.shape[-1])
    for number in range(numbers):
        drawing.next_number = lambda number=number: (number + 0.5) / numbers  # type: ignore[method-assign]
        counts[choose_tokens(logits, [drawing])[0].id] += 1
    return counts / numbers


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.3, "top_p": 1.0, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.6, "top_k": 12},
        {"temperature": 1.0, "top_p": 1.0, "min_p": 0.1},
        {"temperature": 2.0, "top_p": 0.9, "min_p": 0.05, "top_k": 20},
    ],
    ids=str,
)
@pytest.mark.parametrize("vocabulary", [VOCABULARY, LIKELY + 900])
def test_the_distribution_is_the_one_that_transformers_draws_from(given: dict[str, Any], vocabulary: int) -> None:
    logits = logits_of(1, vocabulary=vocabulary)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(given["temperature"])])
    if given.get("top_k"):
        warpers.append(TopKLogitsWarper(given["top_k"]))
    if given["top_p"] < 1:
        warpers.append(TopPLogitsWarper(given["top_p"]))
    if given.get("min_p"):
        warpers.append(MinPLogitsWarper(given["min_p"]))
    expected = warpers(torch.tensor([[1]]), logits.clone()).softmax(-1)[0]
    found = drawn_shares(logits, sampler(**given))
    assert set(found.nonzero()[:, 0].tolist()) <= set(expected.nonzero()[:, 0].tolist())
    assert (found - expected).abs().max() < 3e-3


def test_a_flat_nucleus_reaches_beyond_the_likeliest_tokens_looked_at_first() -> None:
    logits = torch.zeros(1, 3 * LIKELY)
    found = drawn_shares(logits, sampler(temperature=1.0, top_p=0.9), numbers=3000)
    assert len(found.nonzero()) > 2 * LIKELY


def test_penalties_are_those_of_transformers_and_of_openai() -> None:
    logits, prompt = logits_of(3), (4, 9, 9, 17)
    drawing = sampler(prompt, temperature=0, repetition_penalty=1.4)
    expected = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([prompt]), logits.clone())
    changed = logits.clone()
    drawing.change_logits(changed[0])
    assert torch.equal(changed, expected)
    drawing = sampler(prompt, temperature=0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={7: 2.0})
    drawing.in_answer.update([5, 5, 6])
    changed = logits.clone()
    drawing.change_logits(changed[0])
    difference = (changed - logits)[0]
    assert difference[[4, 5, 6, 7]].tolist() == pytest.approx([0, -1.0, -0.75, 2.0], abs=1e-6)


def test_log_probabilities_are_the_models_own_whatever_is_drawn_by() -> None:
    logits = logits_of(5, rows=2)
    drawing = [sampler(temperature=0.3, top_k=1, logit_bias={8: 50.0}, logprobs=3), sampler(temperature=0)]
    first, second = choose_tokens(logits, drawing)
    expected = logits[0].log_softmax(-1)
    assert first.id == 8
    assert first.logprob == pytest.approx(float(expected[8]), abs=1e-5)
    values, places = expected.topk(3)
    assert [token for token, _ in first.top] == places.tolist()
    assert [logprob for _, logprob in first.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert (second.logprob, second.top) == (None, ())


@given(st.integers(0, 10_000), st.integers(1, 6))
@settings(deadline=None, max_examples=40)
def test_what_is_drawn_depends_on_no_neighbour(seed: int, neighbours: int) -> None:
    def answer(rows: int) -> list[int]:
        own = sampler(temperature=1.5, top_p=0.9, seed=seed)
        others = [sampler(index=number + 1, temperature=1.0, seed=seed) for number in range(rows - 1)]
        # Rounding differs with the size of the batch.
        steps = [logits_of(step, rows) * (1 + 1e-7 * rows) for step in range(4)]
        for step in range(4):
            steps[step][0] = logits_of(100 + step)[0] * (1 + 1e-7 * rows)
        return [choose_tokens(step, [own, *others])[0].id for step in steps]

    assert answer(1) == answer(1 + neighbours)


def test_seed_prompt_and_number_of_the_answer_decide_what_is_drawn() -> None:
    logits = torch.zeros(1, VOCABULARY)

    def answer(**given: Any) -> list[int]:
        drawing = sampler(**({"temperature": 1.0, "top_p": 1.0} | given))
        return [choose_tokens(logits, [drawing])[0].id for _ in range(8)]

    assert answer(seed=1) == answer(seed=1)
    assert len({tuple(answer(**each)) for each in ({"seed": 1}, {"seed": 2}, {"seed": 1, "index": 1})}) == 3
    assert answer(seed=1) != answer(seed=1, prompt=(1, 2, 4))
    assert answer() != answer()


def test_the_random_state_of_the_process_is_left_alone() -> None:
    state = torch.get_rng_state()
    choose_tokens(logits_of(1), [sampler(temperature=1.0)])
    assert torch.equal(torch.get_rng_state(), state)
