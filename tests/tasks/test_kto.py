"""KTO is the mean over a step's labelled answers, with one KL estimate for all of it: as the paper and TRL have it."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_preference import logps_alone
from test_steps import assert_same, prepared
from torch import Tensor

from firefly.data.schema import IGNORE, Tokens
from firefly.distributed.backends import BACKENDS
from firefly.errors import UsageError
from firefly.evaluation.held_out import evaluate
from firefly.tasks.kto import KTO, LabelledPacking
from firefly.tasks.reference import AdapterOff, FrozenModel
from tiny import ListedExamples, gradients, random_pair, tiny_model, tiny_tokenizer
from trials import Trial, configuration, make_trial

BETA, GOOD, BAD = 0.3, 1.5, 0.8


def labelled(prompt: int, answer: int, desirable: bool, seed: int) -> Tokens:
    return replace(random_pair(prompt, answer, 1, seed).sides[0], desirable=desirable)


EXAMPLES = [
    labelled(prompt, answer, good, seed)
    for seed, (prompt, answer, good) in enumerate(
        [(7, 5, True), (40, 30, False), (1, 12, True), (20, 1, True), (3, 60, False), (11, 20, True)]
    )
]


def make_kto_trial(
    module: Any, folder: Path, reference: Any = None, budget: int = 60, layout: str = "segments", mode: str = "lora"
) -> Trial:
    keys = {"beta": BETA, "desirable_weight": GOOD, "undesirable_weight": BAD}
    reference = reference or (AdapterOff() if mode == "lora" else FrozenModel(module, torch.float32))
    task = KTO(configuration("kto", train_mode=mode, **keys), reference)
    return make_trial(module, folder, EXAMPLES, budget, layout, mode, held_out=EXAMPLES, task=task)


def textbook(policy: Any, reference: Any, examples: list[Tokens]) -> tuple[Tensor, Tensor]:
    """The loss and the KL estimate of a step of these examples in this order, each text computed alone."""
    packing = LabelledPacking(2048)
    cycled = [packing.with_answer_of(mine, examples[n - 1]) for n, mine in enumerate(examples)]

    def gained(texts: list[Tokens]) -> Tensor:
        with torch.no_grad():
            expected = torch.stack([logps_alone(reference, text).sum() for text in texts])
        return torch.stack([logps_alone(policy, text).sum() for text in texts]) - expected

    with torch.no_grad():
        kl = gained(cycled).mean().clamp_min(0)
    own = gained(examples)
    losses = [
        GOOD * (1 - torch.sigmoid(BETA * (ratio - kl)))
        if one.desirable
        else BAD * (1 - torch.sigmoid(BETA * (kl - ratio)))
        for ratio, one in zip(own, examples, strict=True)
    ]
    return torch.stack(losses).mean(), kl


def moved_model(name: str) -> Any:
    """A reference that is worse than the policy: the KL estimate is above 0."""
    model = copy.deepcopy(tiny_model(name))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(0.02 * noise)
    return model


def frozen(model: Any, weights: Any) -> FrozenModel:
    """A reference of the model's kind with the weights of another."""
    own = copy.deepcopy(model.state_dict())
    model.load_state_dict(weights.state_dict())
    reference = FrozenModel(model, torch.float32)
    model.load_state_dict(own)
    return reference


@pytest.mark.parametrize("budget", [1, 60, 10**6])
@pytest.mark.parametrize("name", ["llama_tied", "gemma3", "bloom"])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_loss_and_gradients_are_the_textbooks_however_the_step_is_cut(
    name: str, mode: str, budget: int, tmp_path: Path
) -> None:
    model, layout, own = prepared(name, mode)
    reference, base = None, tiny_model(name)
    if mode == "full":
        base = moved_model(name)
        reference = frozen(model, base)
    trial = make_kto_trial(model, tmp_path, reference, budget, layout, mode)
    loss, found, _ = trial.one_step()
    expected, kl = textbook(own, base, [EXAMPLES[row] for row in trial.step().examples])
    assert kl > 0 or (name, mode) != ("llama_tied", "full")
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-6)
    assert_same(found, gradients(own), 1e-4)


def test_loss_and_gradients_are_trls_where_a_step_is_a_batch(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model, _, own = prepared("llama", "full")
    reference = moved_model("llama")
    trial = make_kto_trial(model, tmp_path, frozen(model, reference), mode="full")
    loss, found, microbatches = trial.one_step()
    assert microbatches > 1
    examples = [EXAMPLES[row] for row in trial.step().examples]
    trainer = trl.KTOTrainer(
        model=own,
        ref_model=reference,
        args=trl.KTOConfig(
            output_dir=str(tmp_path / "trl"),
            beta=BETA,
            desirable_weight=GOOD,
            undesirable_weight=BAD,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=len(examples),
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "completion": "b", "label": True}] * len(examples)),
        processing_class=tiny_tokenizer(),
    )
    cycled = [LabelledPacking(2048).with_answer_of(mine, examples[n - 1]) for n, mine in enumerate(examples)]
    batch: dict[str, Tensor] = {"label": torch.tensor([bool(one.desirable) for one in examples])}
    for prefix, texts in (("", examples), ("KL_", cycled)):
        longest = max(len(text.input_ids) for text in texts)
        shape = (len(texts), longest)
        rows = {
            name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "attention_mask", "completion_mask")
        }
        for row, text in enumerate(texts):
            size = len(text.input_ids)
            rows["input_ids"][row, :size] = torch.from_numpy(text.input_ids)
            rows["attention_mask"][row, :size] = 1
            rows["completion_mask"][row, :size] = torch.from_numpy((text.labels != IGNORE).astype("int64"))
        batch |= {prefix + name: values for name, values in rows.items()}
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-6)
    assert_same(found, gradients(trainer.model), 1e-4)


def test_metrics_of_a_step_and_of_an_evaluation_are_means_over_each_kind_of_answer(tmp_path: Path) -> None:
    model, layout, own = prepared("llama", "lora")
    trial = make_kto_trial(model, tmp_path, layout=layout)
    trial.one_step()
    assert trial.computed is not None
    assert trial.computed.sums is not None
    logs = trial.task.training_metrics(trial.computed.sums.tolist(), len(EXAMPLES))
    base = tiny_model("llama")
    with torch.no_grad():
        logps = torch.stack([logps_alone(own, one).sum() for one in EXAMPLES])
        gained = logps - torch.stack([logps_alone(base, one).sum() for one in EXAMPLES])
        loss, kl = textbook(own, base, EXAMPLES)
    good = torch.tensor([bool(one.desirable) for one in EXAMPLES])
    expected = {
        "rewards/chosen": BETA * gained[good].mean(),
        "rewards/rejected": BETA * gained[~good].mean(),
        "rewards/margins": BETA * (gained[good].mean() - gained[~good].mean()),
        "logps/chosen": logps[good].mean(),
        "logps/rejected": logps[~good].mean(),
    }
    found = evaluate(trial.task, trial.model, ListedExamples(EXAMPLES))
    signs = torch.where(good, 1.0, -1.0)
    losses = torch.where(good, GOOD, BAD) * (1 - torch.sigmoid(signs * BETA * (gained - kl)))
    torch.testing.assert_close(torch.from_numpy(found.losses), losses.double(), rtol=1e-4, atol=0)
    assert found.targets.tolist() == [1] * len(EXAMPLES)
    evaluated = found.metrics
    for name, value in expected.items():
        assert logs[name] == pytest.approx(value.item(), rel=1e-4)
        assert evaluated[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-4)
    assert evaluated["eval_loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert evaluated["eval_kl"] == pytest.approx(kl.item(), rel=1e-4, abs=1e-6)


def test_metrics_of_one_kind_of_answer_leave_the_other_out() -> None:
    logs = KTO(configuration("kto")).training_metrics([1.0, 0.5, 2.0, 4.0, -6.0, 0.0, 0.0, 0.0], 2)
    assert logs == {"kl": 0.25, "rewards/chosen": 2.0, "logps/chosen": -3.0}


def test_a_prompt_with_anothers_answer_is_cut_at_the_limit() -> None:
    packing = LabelledPacking(45)
    batch = packing(ListedExamples(EXAMPLES), (1, 4), (4, 1, 0))  # 4 is asked with the answer of 0, 1 with that of 4
    assert [tuple(segment)[:2] for segment in batch.mismatched[0].segments] == [(0, 45), (45, 45 + 3 + 5)]
    assert batch.mismatched[0].channels["owner"].tolist() == [0] * 5 + [1] * 5
    assert batch.desirable.tolist() == [False, False]
    assert not np.array_equal(batch.mismatched[0].targets, batch.rows[0].targets)
    assert pickle.loads(pickle.dumps(packing)) == packing


def test_a_step_of_one_example_is_refused() -> None:
    config = configuration("kto", per_device_train_batch_size=1, gradient_accumulation_steps=1)
    with pytest.raises(UsageError, match="a step holds one"):
        KTO.settle(config, BACKENDS["single"])


@pytest.mark.parametrize("keys", [{"train_mode": "full"}, {"train_mode": "lora", "adapter_name_or_path": "a"}])
def test_a_second_model_on_ranks_that_share_one_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="every rank would hold whole"):
        KTO.settle(configuration("kto", **keys), BACKENDS["fsdp2"])
    assert math.isclose(KTO.settle(configuration("kto", train_mode="lora"), BACKENDS["fsdp2"]).preference.beta, 0.1)
