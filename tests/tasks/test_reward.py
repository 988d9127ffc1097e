"""A reward model's loss is Bradley-Terry's over the pairs of a step, however they are packed: as TRL has it."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_steps import assert_same
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from firefly.config import ModelConfig, load_config
from firefly.console import take_notices
from firefly.data.schema import TokenPair
from firefly.errors import UsageError
from firefly.evaluation.held_out import evaluate
from firefly.export.merge import merge
from firefly.generation import Generator
from firefly.models.attention import use_segments
from firefly.models.scores import install_score_head, padding_beside
from firefly.runs.metrics import read_metrics
from firefly.setup.plan import make_plan
from firefly.tasks.base import Forward
from firefly.tasks.reward import RewardTask, ScorePacking
from firefly.training import train
from tiny import ListedExamples, gradients, random_pairs, run_settings, save_tiny_model, tiny_model, tiny_tokenizer
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
    found = evaluate(trial.task, trial.model, ListedExamples(PAIRS))
    torch.testing.assert_close(
        torch.from_numpy(found.losses), -F.logsigmoid(chosen - rejected).double(), rtol=1e-4, atol=0
    )
    evaluated = found.metrics
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


# ---- whole runs ----


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and pairs, of which the better answer says good."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny_model(folder / "model", "llama_tied")
    rows = [
        {"prompt": f"question {i} " * (1 + i % 3), "chosen": "good " * (1 + i % 4), "rejected": "bad " * (1 + i % 5)}
        for i in range(24)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def train_rewards(place: Path, output: Path, **keys: Any) -> Path:
    settings = run_settings(
        place / "model",
        place / "pairs.jsonl",
        output,
        task_type="reward",
        lora_rank=4,
        per_device_train_batch_size=6,
        tokens_per_microbatch=200,
        learning_rate=0.02,
        num_train_epochs=6,
        eval_ratio=0.25,
        seed=1,
    )
    return train(load_config(settings | keys))


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_a_trained_reward_model_scores_in_transformers_what_it_scored_in_training(
    mode: str, place: Path, tmp_path: Path
) -> None:
    out = train_rewards(place, tmp_path / "out", train_mode=mode)
    lines = read_metrics(out / "metrics.jsonl")
    evaluated = [line for line in lines if "eval_accuracy" in line][-1]
    assert evaluated["eval_accuracy"] == 1.0
    result = out
    if mode != "full":
        onto = "dequantized" if mode == "qlora" else "original"
        result = merge(ModelConfig(), str(out), str(tmp_path / "merged"), onto=onto, dtype="float32")
    model: Any = AutoModelForSequenceClassification.from_pretrained(result)
    tokenizer = AutoTokenizer.from_pretrained(result)
    assert model.config.architectures == ["LlamaForSequenceClassification"]
    assert model.config.pad_token_id == tokenizer.pad_token_id
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "question 3"}, {"role": "assistant", "content": answer}], tokenize=False
        )
        for answer in ("good good good good", "bad")
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    assert int((batch["input_ids"][:, -1] == tokenizer.pad_token_id).sum()) == 1
    with torch.no_grad():
        together = model(**batch).logits[:, 0]
        alone = [
            model(input_ids=tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]).logits
            for text in texts
        ]
    torch.testing.assert_close(together, torch.cat(alone)[:, 0], rtol=1e-4, atol=1e-5)
    assert together[0] > together[1]


def test_a_reward_run_goes_on_from_its_checkpoint_bit_for_bit(place: Path, tmp_path: Path) -> None:
    keys = {"train_mode": "lora", "save_strategy": "steps", "save_steps": 4, "max_steps": 8, "eval_ratio": 0.0}
    whole = train_rewards(place, tmp_path / "whole", **keys)
    cut = Path(shutil.copytree(whole, tmp_path / "cut"))
    shutil.rmtree(cut / "checkpoint-8")
    (cut / "adapter_model.safetensors").unlink()
    resumed = train_rewards(place, cut, **keys, resume_from_checkpoint=True)
    assert_same(load_file(resumed / "adapter_model.safetensors"), load_file(whole / "adapter_model.safetensors"), 0)


def test_a_reward_model_is_trained_on_as_one_and_does_not_talk(place: Path, tmp_path: Path) -> None:
    first = train_rewards(place, tmp_path / "first", train_mode="full", max_steps=2)
    again = train_rewards(place, tmp_path / "again", train_mode="full", max_steps=2, model_name_or_path=str(first))
    assert (again / "model.safetensors").is_file()
    with pytest.raises(UsageError, match="scores texts"):
        Generator.load(ModelConfig(name_or_path=str(first)))
    with pytest.raises(UsageError, match="scores texts"):
        train_rewards(place, tmp_path / "talk", train_mode="full", task_type="dpo", model_name_or_path=str(first))


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_a_reward_model_in_16_bit_is_trained_on_and_planned(mode: str, place: Path, tmp_path: Path) -> None:
    take_notices()
    first = train_rewards(place, tmp_path / "first", train_mode="full", max_steps=2)
    keys = {"train_mode": mode, "max_steps": 2, "bf16": True, "model_name_or_path": str(first)}
    again = train_rewards(place, tmp_path / "again", **keys)
    assert (again / "adapter_model.safetensors").is_file()
    assert "adapter.reach_unknown" not in {entry["code"] for entry in take_notices()}
    plan = make_plan(
        "",
        {
            "task_type": "reward",
            "train_file": str(place / "pairs.jsonl"),
            **keys,
            "template_name": "default",
            "lora_rank": 4,
        },
    )
    assert plan.fits
    assert "head" not in plan.forecast.parts
    assert (
        plan.parameters[0] == sum(p.numel() for p in load_file(again / "adapter_model.safetensors").values())
        or mode == "qlora"
    )
