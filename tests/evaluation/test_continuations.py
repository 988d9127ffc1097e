"""Continuations that share a context are scored as each alone behind it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from firefly.evaluation.continuations import score_continuations
from tiny import VOCABULARY, tiny_model

LENGTHS = ((7, (1, 1, 1, 1)), (30, (1, 5, 2)), (1, (9,)), (12, (3, 3)), (3, (0, 4)))


def requests() -> list[tuple[list[int], list[int]]]:
    random = np.random.default_rng(3)
    found = []
    for context, continuations in LENGTHS:
        ids = random.integers(4, VOCABULARY, context).tolist()
        found += [(ids, random.integers(4, VOCABULARY, length).tolist()) for length in continuations]
    return [*found[::2], *found[1::2]]


def alone(model: Any, context: list[int], continuation: list[int]) -> tuple[np.ndarray, list[bool]]:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*context, *continuation][: -1 if continuation else None]])).logits[0]
    wanted = torch.tensor(continuation, dtype=torch.long)
    rows = logits.double()[len(logits) - len(continuation) :]
    return rows.log_softmax(-1)[range(len(wanted)), wanted].numpy(), (rows.argmax(-1) == wanted).tolist()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mamba", "llama4"])
@pytest.mark.parametrize("pass_tokens", [20, 2048])
def test_scores_are_those_of_each_continuation_alone(name: str, pass_tokens: int) -> None:
    ticks: list[int] = []
    found = score_continuations(tiny_model(name), requests(), pass_tokens, ticks.append)
    assert sum(ticks) == len(found) == len(requests())
    for one, (context, continuation) in zip(found, requests(), strict=True):
        logps, likeliest = alone(tiny_model(name), context, continuation)
        np.testing.assert_allclose(one.logps, logps, atol=1e-5)
        assert one.likeliest.tolist() == likeliest


def test_a_context_as_long_as_the_models_may_be_continued_by_one_token() -> None:
    """GPT-2 has no position for a token more."""
    model = tiny_model("gpt2")
    longest = model.config.n_positions
    ids = np.random.default_rng(1).integers(4, VOCABULARY, longest + 1).tolist()
    (found,) = score_continuations(model, [(ids[:-3], ids[-3:])])
    np.testing.assert_allclose(found.logps, alone(model, ids[:-3], ids[-3:])[0], atol=1e-5)
