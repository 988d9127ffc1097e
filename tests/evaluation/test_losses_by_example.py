"""An evaluation knows the loss of each example: that of the example alone in plain transformers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from firefly.config import PreferenceConfig
from firefly.data.schema import IGNORE, Tokens
from firefly.evaluation.held_out import Evaluation, evaluate
from firefly.models.attention import use_segments
from firefly.models.heads import install_target_head
from firefly.tasks.preference import PreferenceTask
from firefly.tasks.preference_losses import PREFERENCE_LOSSES
from firefly.tasks.reference import FrozenModel
from tiny import ListedExamples, prepared, random_examples, random_pairs, tiny_model
from trials import configuration, make_trial, preference_settings

HELD_OUT = random_examples(30, 4, 55, 17, 8, 23, 61, 12, 9, 40, 3, seed=9)
PAIRS = random_pairs((7, 5, 9), (40, 30, 3), (1, 12, 12), (20, 1, 1), (3, 2, 60))


def nll_alone(model: Any, example: Tokens) -> float:
    """Σ NLL of the targets, each segment computed alone."""
    borders = [*example.starts, len(example.input_ids)]
    total = 0.0
    for start, end in pairwise(borders):
        ids = torch.from_numpy(example.input_ids[start:end].astype(np.int64))[None]
        labels = torch.from_numpy(example.labels[start:end].astype(np.int64))[1:]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
        total += F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum").item()
    return total


def evaluated(module: Any, folder: Path, held_out: list[Any], sources: Any = (), **trial: Any) -> Evaluation:
    made = make_trial(module, folder, held_out[:2], held_out=held_out, **trial)
    return evaluate(made.task, made.model, ListedExamples(held_out, sources))


@pytest.mark.parametrize(
    ("name", "layout"), [("llama", "segments"), ("llama", "solo"), ("gemma2", "segments"), ("bloom", "solo")]
)
def test_the_loss_of_each_example_is_its_summed_nll(name: str, layout: str, tmp_path: Path) -> None:
    model, _, own = prepared(name, "full")
    found = evaluated(model, tmp_path, HELD_OUT, layout=layout)
    np.testing.assert_allclose(found.losses, [nll_alone(own, example) for example in HELD_OUT], rtol=2e-6, atol=1e-5)
    assert found.targets.tolist() == [example.num_targets for example in HELD_OUT]
    assert found.metrics["eval_loss"] == pytest.approx(found.losses.sum() / found.targets.sum(), rel=1e-12)
    assert found.metrics["eval_target_tokens"] == found.targets.sum()


@pytest.mark.parametrize("layout", ["segments", "solo"])
def test_a_block_of_documents_counts_as_one_example(layout: str, tmp_path: Path) -> None:
    ids = (np.arange(40) * 7 % 90 + 3).astype(np.int32)
    blocks = [Tokens(ids, ids, starts=(0, 11, 29)), Tokens(ids[:13], ids[:13], starts=(0, 12)), *HELD_OUT[:3]]
    model, _, own = prepared("llama", "full")
    found = evaluated(model, tmp_path, blocks, layout=layout)
    np.testing.assert_allclose(found.losses, [nll_alone(own, block) for block in blocks], rtol=2e-6, atol=1e-5)
    assert found.targets[:2].tolist() == [37, 11]


def test_losses_keep_their_places_when_sources_are_evaluated_apart(tmp_path: Path) -> None:
    model, _, own = prepared("llama", "full")
    sources = [number % 3 for number in range(len(HELD_OUT))]
    found = evaluated(model, tmp_path, HELD_OUT, sources)
    np.testing.assert_allclose(found.losses, [nll_alone(own, example) for example in HELD_OUT], rtol=2e-6, atol=1e-5)
    of_second = np.array(sources) == 1
    expected = found.losses[of_second].sum() / found.targets[of_second].sum()
    assert found.metrics["eval_loss/1"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", list(PREFERENCE_LOSSES))
def test_the_losses_of_pairs_have_the_loss_of_all_as_their_mean(loss: Any, tmp_path: Path) -> None:
    model, layout, _ = prepared("llama", "full")
    keys = preference_settings(PreferenceConfig(loss=loss, rpo_alpha=0.3 if loss == "sigmoid" else 0.0))
    config = configuration("dpo", train_mode="full", **{name: value for name, value in keys.items() if value})
    reference = FrozenModel(tiny_model("llama", seed=4), torch.float32)
    task = PreferenceTask(config, reference if PREFERENCE_LOSSES[loss].reference else None)
    install_target_head(reference.copy)
    use_segments(reference.copy)
    found = evaluated(model, tmp_path, PAIRS, layout=layout, task=task)
    alone = [evaluated(model, tmp_path, [pair], layout=layout, task=task).losses[0] for pair in PAIRS]
    assert found.metrics["eval_loss"] == pytest.approx(found.losses.mean(), rel=1e-9)
    assert found.targets.tolist() == [1] * len(PAIRS)
    if not task.nll_weight:  # which is a mean over tokens of them all
        np.testing.assert_allclose(found.losses, alone, rtol=1e-4)
