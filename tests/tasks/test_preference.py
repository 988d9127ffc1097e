"""Pairs behind one prompt: the same log-probabilities as two passes, the same losses as the textbook and TRL."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from firefly.config import PreferenceConfig
from firefly.console import take_notices
from firefly.data.batching import StepSettings
from firefly.data.dataset import Split
from firefly.data.pair_batching import pack_pairs
from firefly.data.schema import IGNORE, TokenPair, Tokens
from firefly.models.adapters import transformers_model
from firefly.models.attention import choose_layout
from firefly.models.forwards import install_training_forwards
from firefly.tasks.base import disable_dropout
from firefly.tasks.preference import PreferenceTask
from firefly.tasks.preference_losses import PREFERENCE_LOSSES, PairLogps, nll_weight
from firefly.tasks.reference import AdapterOff, FrozenAdapter, FrozenModel, Untrained
from tiny import (
    assert_same,
    gradients,
    prepared,
    random_pairs,
    tiny_model,
    tiny_tokenizer,
    with_plain_lora,
)
from trials import Trial, configuration, make_trial

# Prompts of 1 and 40 tokens, answers of 1, shorter and longer ones first.
PAIRS = random_pairs((7, 5, 9), (40, 30, 3), (1, 12, 12), (20, 1, 1), (3, 2, 60), (11, 70, 20))
ARCHITECTURES = [
    "llama_tied",
    "qwen2_window",
    "qwen3",
    "gemma3",
    "phi3",
    "gemma2",
    "mixtral",
    "gpt_neox",
    "bloom",
    "minicpm3",
]


def make_pairs_trial(
    module: Any,
    folder: Path,
    pairs: Sequence[TokenPair] = PAIRS,
    reference: Any = None,
    budget: int = 100,
    layout: str = "segments",
    mode: str = "lora",
    held_out: Sequence[TokenPair] | None = None,
    use_cpu: bool = True,
    **settings: Any,
) -> Trial:
    preference = PreferenceConfig(**settings)
    if reference is None and PREFERENCE_LOSSES[preference.loss].reference:
        reference = AdapterOff() if mode == "lora" else FrozenModel(module, torch.float32)
    config = replace(configuration("dpo", train_mode=mode), preference=preference)
    task = PreferenceTask(config, reference)
    return make_trial(module, folder, pairs, budget, layout, mode, held_out=held_out, task=task, use_cpu=use_cpu)


def logps_alone(model: Any, tokens: Tokens) -> Tensor:
    """Log-probabilities of one answer's tokens from the logits of an untouched transformers model."""
    ids, labels = (torch.from_numpy(array).long() for array in (tokens.input_ids, tokens.labels))
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    chosen = labels[1:] != IGNORE
    return -F.cross_entropy(logits[chosen], labels[1:][chosen], reduction="none")


def textbook(policy: Any, reference: Any, pairs: Sequence[TokenPair], config: PreferenceConfig) -> Tensor:
    """A step's loss from two separate passes a pair, under the untouched policy and reference."""
    rows: list[list[Any]] = []
    for pair in pairs:
        chosen, rejected = (logps_alone(policy, side) for side in pair.sides)
        with torch.no_grad():
            expected = [logps_alone(reference, side).sum() for side in pair.sides]
        if not PREFERENCE_LOSSES[config.loss].reference:
            expected = [torch.zeros(()), torch.zeros(())]
        counts = [torch.tensor(float(len(side))) for side in (chosen, rejected)]
        rows.append([chosen.sum(), rejected.sum(), *expected, *counts])
    stacked = PairLogps(*(torch.stack(column) for column in zip(*rows, strict=True)))
    loss = PREFERENCE_LOSSES[config.loss].loss(stacked, config).mean()
    if nll_weight(config):
        sides = [pair.sides[0] for pair in pairs]
        if PREFERENCE_LOSSES[config.loss].trains_prompt:
            sides = [Tokens(side.input_ids, side.input_ids) for side in sides]
        logps = torch.cat([logps_alone(policy, side) for side in sides])
        loss = loss - nll_weight(config) * logps.mean()
    return loss


def balance_loss(model: Any, pairs: Sequence[TokenPair]) -> Tensor:
    """transformers' router loss over both sides of all pairs, each behind its own prompt; 0 without experts."""
    coefficient = getattr(transformers_model(model), "router_aux_loss_coef", None)
    if not coefficient:
        return torch.zeros(())
    batch = trl_batch(pairs)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return coefficient * model(**inputs, use_cache=False, output_router_logits=True).aux_loss


# ---- one prompt for two answers ----


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_shared_prompt_gives_the_loss_and_gradients_of_two_passes(name: str, mode: str, tmp_path: Path) -> None:
    model, layout, own = prepared(name, mode)
    base = tiny_model(name)
    if mode == "full":  # a policy that has moved away from its reference
        reference = FrozenModel(model, torch.float32)
        with torch.no_grad():
            for parameter, other in zip(model.parameters(), own.parameters(), strict=True):
                noise = 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                parameter.add_(noise)
                other.add_(noise)
    else:
        reference = AdapterOff()
    trial = make_pairs_trial(model, tmp_path, reference=reference, layout=layout, mode=mode)
    loss, found, count = trial.one_step()
    assert count > 1
    expected = textbook(own, base, PAIRS, PreferenceConfig()) + balance_loss(own, PAIRS)
    expected.backward()
    assert abs(loss.item() - math.log(2)) > 1e-3
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    assert_same(found, gradients(own), 2e-5)


@pytest.mark.parametrize("loss_name", list(PREFERENCE_LOSSES))
def test_every_loss_of_a_step_is_the_textbooks_over_all_its_pairs(loss_name: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"loss": loss_name, "rpo_alpha": 0.3 if loss_name in ("sigmoid", "simpo") else 0.0}
    settings |= {"label_smoothing": 0.1} if loss_name in ("robust", "cpo") else {}
    model, _, own = prepared("llama", "lora")
    loss, found, count = make_pairs_trial(model, tmp_path, **settings).one_step()
    assert count > 1
    expected = textbook(own, tiny_model("llama"), PAIRS, PreferenceConfig(**settings))
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    assert_same(found, gradients(own), 2e-5)


@pytest.mark.parametrize("loss_name", ["sigmoid", "orpo"])
def test_budget_and_layout_change_neither_loss_nor_gradients(loss_name: str, tmp_path: Path) -> None:
    model, _, _ = prepared("qwen2_window", "lora")
    loss, expected, count = make_pairs_trial(model, tmp_path, budget=10**6, loss=loss_name).one_step()
    assert count == 1
    other, found, count = make_pairs_trial(model, tmp_path, budget=1, loss=loss_name).one_step()
    assert count == len(PAIRS)
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-6)
    assert_same(found, expected, 2e-5)
    transformers_model(model).set_attn_implementation("sdpa")
    other, found, _ = make_pairs_trial(model, tmp_path, layout="solo", loss=loss_name).one_step()
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-6)
    assert_same(found, expected, 2e-5)


def test_a_packed_batch_says_whose_every_target_is() -> None:
    batch = pack_pairs(PAIRS, prompts=True)
    (row,) = batch.rows
    ids, owner = row.input_ids[0], row.channels["owner"]
    assert ids.tolist() == [token for pair in PAIRS for token in pair.input_ids.tolist()]
    assert batch.counts[0].tolist() == [pair.chosen for pair in PAIRS]
    assert batch.counts[1].tolist() == [pair.rejected for pair in PAIRS]
    assert batch.counts[2].tolist() == [pair.prompt - 1 for pair in PAIRS]
    for number, pair in enumerate(PAIRS):
        border = pair.prompt + pair.chosen
        told = [row.targets[owner == number + side * len(PAIRS)].tolist() for side in range(3)]
        assert told[0] == pair.input_ids[pair.prompt : border].tolist()
        assert told[1] == pair.input_ids[border:].tolist()
        assert told[2] == pair.input_ids[1 : pair.prompt].tolist()
    assert torch.equal(batch.counts, pack_pairs(PAIRS, shared=False, prompts=True).counts)


def test_only_the_prefix_before_the_first_trained_token_is_shared() -> None:
    labels = [IGNORE, IGNORE, 7, 8]
    chosen, rejected = (Tokens(_array(ids), _array(labels[:2] + ids[2:])) for ids in ([1, 2, 7, 8], [1, 2, 7, 9]))
    pair = TokenPair.of(chosen, rejected)
    assert (pair.prompt, pair.chosen, pair.rejected) == (2, 2, 2)
    merged = Tokens(_array([1, 3, 7, 9]), _array([IGNORE, IGNORE, 7, 9]))  # the prompt's end as another token
    pair = TokenPair.of(chosen, merged)
    assert (pair.prompt, pair.chosen, pair.rejected) == (1, 3, 3)
    assert [side.input_ids.tolist() for side in pair.sides] == [[1, 2, 7, 8], [1, 3, 7, 9]]
    assert pair.num_targets == 4


def _array(values: list[int]) -> Any:
    return torch.tensor(values, dtype=torch.int32).numpy()


# ---- the reference ----


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_the_first_loss_is_ln_2(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    layout, _ = choose_layout(model)
    from firefly.config import AdapterConfig
    from firefly.models.adapters import attach_adapter

    fresh = attach_adapter(copy.deepcopy(model), AdapterConfig(mode="lora", rank=4))
    install_training_forwards(fresh)
    assert make_pairs_trial(fresh, tmp_path, layout=layout).one_step()[0].item() == pytest.approx(math.log(2), abs=1e-6)
    install_training_forwards(model)
    model.requires_grad_(True)
    full = make_pairs_trial(model, tmp_path, layout=layout, mode="full").one_step()[0]
    assert full.item() == pytest.approx(math.log(2), abs=1e-6)
    started, _, _ = prepared(name, "lora")  # an adapter that is no longer fresh
    trial = make_pairs_trial(started, tmp_path, reference=FrozenAdapter(started), layout=layout)
    assert trial.one_step()[0].item() == pytest.approx(math.log(2), abs=1e-6)


def ask_beforehand(trial: Trial, parts: list[Any]) -> None:
    """Ask the reference of a trial before its steps, as a run does; the steps are packed with what it said."""
    examples: Any = trial.steps.dataset
    task: Any = trial.task
    task.config = replace(task.config, preference=replace(task.settings, precompute_reference=True))
    examples.examples.fingerprint = "train"
    if trial.held_out is not None:
        trial.held_out.fingerprint = "held out"
    task.ask_reference(trial.model, Split(examples.examples, trial.held_out), parts, None)  # type: ignore[arg-type]
    assert task.reference is None
    trial.steps = task.steps(examples.examples, StepSettings(len(examples)), trial.model)


def multiply_trained(model: Any, factor: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(factor)


def test_a_frozen_adapter_stays_while_the_trained_one_moves(tmp_path: Path) -> None:
    model, _, own = prepared("llama", "lora")
    trial = make_pairs_trial(model, tmp_path, reference=FrozenAdapter(model))
    multiply_trained(model, 1.5)
    before = {name: p.clone() for name, p in model.named_parameters()}
    loss, _, _ = trial.one_step()
    policy = with_plain_lora(tiny_model("llama"))
    policy.load_state_dict(model.state_dict())
    expected = textbook(policy, own, PAIRS, PreferenceConfig())
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    assert_same(dict(model.named_parameters()), before, 0)


def test_a_frozen_adapter_is_another_model_in_16_bit_too(tmp_path: Path) -> None:
    """Its numbers take the place of masters whose casts are kept for the step."""
    model, _, _ = prepared("llama", "lora")
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    trial = make_pairs_trial(model, tmp_path, reference=FrozenAdapter(model))
    multiply_trained(model, 2.0)
    exact, _, _ = prepared("llama", "lora")
    exact_trial = make_pairs_trial(exact, tmp_path, reference=FrozenAdapter(exact))
    multiply_trained(exact, 2.0)
    expected = exact_trial.one_step()[0].item()
    assert abs(expected - math.log(2)) > 0.05
    assert trial.one_step()[0].item() == pytest.approx(expected, rel=3e-2)


def test_a_frozen_model_computes_what_the_policy_computes_in_16_bit(tmp_path: Path) -> None:
    for name in ("llama_tied", "llama"):
        model, _, _ = prepared(name, "full")
        reference = FrozenModel(model, torch.bfloat16)
        trial = make_pairs_trial(model, tmp_path, reference=reference, mode="full")
        trial.model.autocast_type = torch.bfloat16
        assert torch.bfloat16 in {p.dtype for p in reference.copy.parameters()}
        assert trial.one_step()[0].item() == pytest.approx(math.log(2), abs=1e-6)


def test_precomputed_references_are_the_same_and_are_found_again(tmp_path: Path, monkeypatch: Any) -> None:
    model, _, _ = prepared("llama", "lora")
    expected, gradient, _ = make_pairs_trial(model, tmp_path).one_step()
    for turn in range(2):
        trial = make_pairs_trial(model, tmp_path, held_out=PAIRS[:3])
        if turn:
            monkeypatch.setattr(PreferenceTask, "_all_logps", None)  # a second computation would fail
        ask_beforehand(trial, [str(tmp_path)])
        loss, found, _ = trial.one_step()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        assert_same(found, gradient, 1e-5)
        assert trial.evaluate()["eval_loss"] == pytest.approx(
            make_pairs_trial(model, tmp_path, held_out=PAIRS[:3]).evaluate()["eval_loss"], rel=1e-5
        )


def test_the_untrained_model_can_be_its_own_reference_beforehand(tmp_path: Path) -> None:
    model, _, _ = prepared("llama", "full")
    trial = make_pairs_trial(model, tmp_path, reference=Untrained(), mode="full")
    ask_beforehand(trial, [str(tmp_path), "full"])
    assert trial.one_step()[0].item() == pytest.approx(math.log(2), abs=1e-6)


# ---- metrics ----


def test_metrics_are_means_over_the_pairs_of_a_step_and_of_an_evaluation(tmp_path: Path) -> None:
    model, _, own = prepared("llama", "lora")
    trial = make_pairs_trial(model, tmp_path, held_out=PAIRS)
    trial.one_step()
    assert trial.computed is not None
    assert trial.computed.sums is not None
    logs = trial.task.training_metrics(trial.computed.sums.tolist(), len(PAIRS))
    base = tiny_model("llama")
    with torch.no_grad():
        policy, reference = (
            torch.tensor([[logps_alone(m, side).sum() for side in pair.sides] for pair in PAIRS]) for m in (own, base)
        )
    chosen, rejected = (0.1 * (policy - reference)).T
    expected = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).float().mean(),
        "logps/chosen": policy[:, 0].mean(),
        "logps/rejected": policy[:, 1].mean(),
    }
    evaluated = trial.evaluate()
    for name, value in expected.items():
        assert logs[name] == pytest.approx(value.item(), rel=1e-4)
        assert evaluated[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-4)
    totals = trial.step().totals
    assert totals.input_tokens == sum(2 * pair.prompt + pair.chosen + pair.rejected for pair in PAIRS)
    assert totals.targets == sum(pair.chosen + pair.rejected for pair in PAIRS)
    assert totals.examples == len(PAIRS)


# ---- TRL ----


def trl_batch(pairs: Sequence[TokenPair]) -> dict[str, Tensor]:
    """All chosen rows, then all rejected ones, padded on the right: how TRL's collator lays a batch out."""
    sides = [side for turn in (0, 1) for side in (pair.sides[turn] for pair in pairs)]
    longest = max(len(side.input_ids) for side in sides)
    batch = {name: torch.zeros(len(sides), longest, dtype=torch.long) for name in ("ids", "attention", "completion")}
    for row, side in enumerate(sides):
        size = len(side.input_ids)
        batch["ids"][row, :size] = torch.from_numpy(side.input_ids)
        batch["attention"][row, :size] = 1
        batch["completion"][row, :size] = torch.from_numpy((side.labels != IGNORE).astype("int64"))
    return {
        "input_ids": batch["ids"],
        "attention_mask": batch["attention"],
        "completion_mask": batch["completion"],
    }


def trl_rows() -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"loss": "sigmoid"}, {"loss_type": ["sigmoid"]}),
        ({"loss": "hinge"}, {"loss_type": ["hinge"]}),
        ({"loss": "ipo"}, {"loss_type": ["ipo"]}),
        ({"loss": "robust", "label_smoothing": 0.2}, {"loss_type": ["robust"], "label_smoothing": 0.2}),
        ({"loss": "apo_zero"}, {"loss_type": ["apo_zero"]}),
        ({"loss": "apo_down"}, {"loss_type": ["apo_down"]}),
        ({"loss": "sigmoid", "rpo_alpha": 0.7}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}),
    ],
    ids=lambda value: "-".join(map(str, value.values())),
)
def test_losses_with_a_reference_are_trls(ours: dict[str, Any], theirs: dict[str, Any], tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    model, _, _ = prepared("llama", "full")
    moved = copy.deepcopy(tiny_model("llama"))
    with torch.no_grad():
        for number, parameter in enumerate(moved.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(0.02 * noise)
    reference = FrozenModel(model, torch.float32)
    model.load_state_dict(moved.state_dict())
    loss, found, _ = make_pairs_trial(model, tmp_path, reference=reference, mode="full", beta=0.2, **ours).one_step()

    args = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"),
        beta=0.2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **theirs,
    )
    trainer = trl.DPOTrainer(
        model=moved,
        ref_model=tiny_model("llama"),
        args=args,
        train_dataset=trl_rows(),
        processing_class=tiny_tokenizer(),
    )
    expected = trainer.compute_loss(trainer.model, trl_batch(PAIRS))
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-6)
    assert_same(found, gradients(trainer.model), 1e-4)


@pytest.mark.parametrize(
    ("ours", "kind", "theirs"),
    [
        ({"loss": "cpo"}, "cpo", {"loss_type": "sigmoid", "cpo_alpha": 1.0}),
        ({"loss": "cpo", "cpo_alpha": 0.3, "label_smoothing": 0.1}, "cpo", {"cpo_alpha": 0.3, "label_smoothing": 0.1}),
        ({"loss": "simpo", "simpo_gamma": 0.4}, "cpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.4}),
        ({"loss": "orpo"}, "orpo", {}),
    ],
    ids=["cpo", "cpo-weighted", "simpo", "orpo"],
)
def test_losses_without_a_reference_are_trls(
    ours: dict[str, Any], kind: str, theirs: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    model, _, own = prepared("llama", "full")
    loss, found, _ = make_pairs_trial(model, tmp_path, mode="full", beta=0.2, **ours).one_step()
    config, trainer_class = (CPOConfig, CPOTrainer) if kind == "cpo" else (ORPOConfig, ORPOTrainer)
    args = config(
        output_dir=str(tmp_path / "trl"),
        beta=0.2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **theirs,
    )
    trainer = trainer_class(model=own, args=args, train_dataset=trl_rows(), processing_class=tiny_tokenizer())
    batch: dict[str, Tensor] = {}
    for name, turn in (("chosen", 0), ("rejected", 1)):
        sides = [pair.sides[turn] for pair in PAIRS]
        longest = max(len(side.input_ids) for side in sides)
        padded = {
            "input_ids": torch.zeros(len(sides), longest, dtype=torch.long),
            "attention_mask": torch.zeros(len(sides), longest, dtype=torch.long),
            "labels": torch.full((len(sides), longest), IGNORE),
        }
        for row, side in enumerate(sides):
            size = len(side.input_ids)
            padded["input_ids"][row, :size] = torch.from_numpy(side.input_ids)
            padded["attention_mask"][row, :size] = 1
            padded["labels"][row, :size] = torch.from_numpy(side.labels)
        batch |= {f"{name}_{key}": value for key, value in padded.items()}
    expected, _ = trainer.get_batch_loss_metrics(trainer.model, batch, train_eval="train")
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-6)
    assert_same(found, gradients(trainer.model), 1e-4)


def test_dropout_that_is_read_from_the_configuration_is_off_too() -> None:
    take_notices()
    model = tiny_model("gptj", attn_pdrop=0.5, resid_pdrop=0.5).train()
    disable_dropout(model)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
    (said,) = take_notices()
    assert said["code"] == "preference.no_dropout_in_config"
