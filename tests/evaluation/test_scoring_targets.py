"""Log-probabilities of targets are those of plain transformers, however examples are laid into passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from firefly.data.schema import IGNORE, Tokens
from firefly.evaluation.scoring import TargetScores, score_targets
from tiny import random_examples, tiny_model

LENGTHS = (5, 40, 2, 17, 33, 8)


def alone(model: Any, example: Tokens) -> TargetScores:
    """What the model's own logits say, without packing."""
    ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].double()
    labels = torch.from_numpy(example.labels.astype(np.int64))[1:]
    rows = torch.nonzero(labels != IGNORE)[:, 0]
    logps = logits.log_softmax(-1)[rows, labels[rows]]
    return TargetScores(logps.numpy(), (logits[rows].argmax(-1) == labels[rows]).numpy())


@pytest.mark.parametrize("name", ["llama", "gemma2", "mamba", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("pass_tokens", [1, 50, 2048])
def test_scores_are_those_of_each_example_alone(name: str, pass_tokens: int) -> None:
    examples = random_examples(*LENGTHS, seed=1)
    expected = [alone(tiny_model(name), example) for example in examples]
    found = list(score_targets(tiny_model(name), examples, pass_tokens))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logps, other.logps, atol=1e-5)
        assert one.likeliest.tolist() == other.likeliest.tolist()
        assert one.total == pytest.approx(-other.logps.sum(), abs=1e-4)


def test_an_example_without_targets_has_no_loss() -> None:
    ids = np.arange(4, 9, dtype=np.int32)
    nothing = Tokens(ids, np.full(5, IGNORE, dtype=np.int32))
    (found, _) = score_targets(tiny_model("llama"), [nothing, *random_examples(6)])
    assert found.total == 0
    assert len(found.logps) == 0
