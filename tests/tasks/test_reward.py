"""A reward model's loss is Bradley-Terry's over the pairs of a step, however they are packed: as TRL has it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_steps import assert_same
from transformers import AutoModelForSequenceClassification

from firefly.data.schema import TokenPair
from firefly.models.attention import use_segments
from firefly.models.scores import install_score_head, padding_beside
from firefly.tasks.base import Forward
from firefly.tasks.reward import RewardTask, ScorePacking
from tiny import gradients, random_pairs, tiny_model, tiny_tokenizer
from trials import Trial, configuration, make_trial

SHAPES = ((7, 5, 9), (40, 30, 3), (1, 12, 12), (20, 1, 1), (3, 2, 60), (11, 70, 20))
PAIRS = random_pairs(*SHAPES)
WITH_MARGINS = [replace(pair, margin=number / 4) for number, pair in enumerate(PAIRS)]


def classifier(name: str) -> Any:
    """A tiny sequence classifier of an architecture, which pads with no token that occurs."""
    config = copy.deepcopy(tiny_model(name).config)
    config.num_labels, config.pad_token_id = 1, config.vocab_size - 1
    torch.manual_seed(3)
    return AutoModelForSequenceClassification.from_config(config).eval()


def make_reward_trial(
    module: Any,
    folder: Path,
    pairs: Sequence[TokenPair] = PAIRS,
    budget: int = 100,
    layout: str = "segments",
    **keys: Any,
) -> Trial:
    if layout == "segments":
        use_segments(module)
    install_score_head(module)
    task = RewardTask(configuration("reward", train_mode="full", **keys))
    return make_trial(module, folder, pairs, budget, layout, "full", held_out=pairs, task=task)


def scored_alone(model: Any, pairs: Sequence[TokenPair]) -> torch.Tensor:
    """The scores of both answers by an untouched transformers model, (pairs, 2)."""
    sides = [torch.from_numpy(side.input_ids).long()[None] for pair in pairs for side in pair.sides]
    return torch.cat([model(input_ids=side).logits[0] for side in sides]).view(-1, 2)


@pytest.mark.parametrize("coefficient", [0.0, 0.05])
@pytest.mark.parametrize(("layout", "budget"), [("segments", 1), ("segments", 100), ("segments", 10**6), ("solo", 0)])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_loss_and_gradients_are_the_textbooks_however_the_step_is_cut(
    name: str, layout: str, budget: int, coefficient: float, tmp_path: Path
) -> None:
    model, own = classifier(name), classifier(name)
    trial = make_reward_trial(model, tmp_path, WITH_MARGINS, budget, layout, center_rewards_coefficient=coefficient)
    loss, found, _ = trial.one_step()
    chosen, rejected = scored_alone(own, PAIRS).unbind(1)
    margins = torch.arange(len(PAIRS)) / 4
    expected = (-F.logsigmoid(chosen - rejected - margins) + coefficient * (chosen + rejected) ** 2).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-6)
    assert_same(found, gradients(own), 1e-4)


def test_loss_and_gradients_are_trls(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model, own = classifier("llama"), classifier("llama")
    loss, found, microbatches = make_reward_trial(
        model, tmp_path, WITH_MARGINS, center_rewards_coefficient=0.05
    ).one_step()
    assert microbatches > 1
    trainer = trl.RewardTrainer(
        model=own,
        args=trl.RewardConfig(
            output_dir=str(tmp_path / "trl"),
            center_rewards_coefficient=0.05,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([{"chosen": "a", "rejected": "b"}]),
        processing_class=tiny_tokenizer(),
    )
    padding = own.config.pad_token_id
    sides = [side.input_ids for turn in (0, 1) for side in (pair.sides[turn] for pair in PAIRS)]
    ids = torch.full((len(sides), max(map(len, sides))), padding)
    for row, side in enumerate(sides):
        ids[row, : len(side)] = torch.from_numpy(side)
    batch = {"input_ids": ids, "attention_mask": (ids != padding).long(), "margin": torch.arange(len(PAIRS)) / 4}
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-6)
    assert_same(found, gradients(trainer.model), 1e-4)


def test_metrics_of_a_step_and_of_an_evaluation_are_means_over_pairs(tmp_path: Path) -> None:
    model, own = classifier("llama"), classifier("llama")
    trial = make_reward_trial(model, tmp_path)
    trial.one_step()
    assert trial.computed is not None
    assert trial.computed.sums is not None
    logs = trial.task.training_metrics(trial.computed.sums.tolist(), len(PAIRS))
    with torch.no_grad():
        chosen, rejected = scored_alone(own, PAIRS).unbind(1)
    expected = {
        "accuracy": (chosen > rejected).float().mean(),
        "margin": (chosen - rejected).mean(),
        "reward/chosen": chosen.mean(),
        "reward/rejected": rejected.mean(),
    }
    evaluated = trial.evaluate()
    assert evaluated["eval_loss"] == pytest.approx(-F.logsigmoid(chosen - rejected).mean().item(), rel=1e-4)
    for name, value in expected.items():
        assert logs[name] == pytest.approx(value.item(), rel=1e-4)
        assert evaluated[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-4)


def test_a_rank_without_a_pair_computes_a_loss_of_nothing(tmp_path: Path) -> None:
    trial = make_reward_trial(classifier("llama"), tmp_path)
    empty = ScorePacking(True)(trial.held_out, (), ())  # type: ignore[arg-type]
    loss, sums = trial.task.microbatch_loss(Forward(trial.model), empty, trial.step().totals, None)
    assert loss.item() == 0
    assert loss.requires_grad
    assert not sums.any()
    assert pickle.loads(pickle.dumps(ScorePacking(True))) == ScorePacking(True)


def test_padding_is_a_token_that_no_text_ends_in() -> None:
    tokenizer = tiny_tokenizer()
    own = padding_beside(tokenizer, [])
    assert own == tokenizer.pad_token_id
    other = padding_beside(tokenizer, [own])
    assert other in tokenizer.all_special_ids
    assert other != own
    assert padding_beside(tokenizer, range(len(tokenizer))) is None
