"""A step is its examples' mean loss per target: as one padded batch gives it, however it is cut up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from firefly.data.schema import IGNORE, Tokens
from firefly.models.adapters import transformers_model
from firefly.models.attention import choose_layout
from firefly.models.heads import install_target_head
from firefly.runs.progress import Counts
from firefly.tasks.base import shares
from tiny import (
    ListedExamples,
    assert_same,
    gradients,
    padded_batch,
    padded_loss,
    prepared,
    random_examples,
    tiny_model,
    tiny_tokenizer,
    with_our_lora,
)
from trials import make_trial

EIGHT = random_examples(5, 33, 12, 70, 2, 21, 40, 9)
ONE_EACH, ALL_IN_ONE = 1, 10**6


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize(
    "name", ["llama", "llama_tied", "qwen2_window", "gemma2", "granite", "mixtral", "bloom", "gptj"]
)
def test_a_step_has_the_loss_and_gradients_of_one_padded_batch(name: str, mode: str, tmp_path: Path) -> None:
    model, layout, own = prepared(name, mode)
    loss, found, count = make_trial(model, tmp_path, EIGHT, budget=64, layout=layout, mode=mode).one_step()
    assert count > 1
    expected = padded_loss(own, EIGHT) + balance_loss(own, EIGHT)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    assert_same(found, gradients(own), 2e-5)


def beginning_alike(*lengths: int) -> list[Tokens]:
    """Examples that all begin with the same 30 tokens, which are trained in some of them."""
    common = random_examples(30, seed=50)[0]
    made = []
    for number, rest in enumerate(random_examples(*lengths, seed=60)):
        first = common.input_ids if number % 2 else common.labels
        ids = np.concatenate([common.input_ids, rest.input_ids])
        made.append(Tokens(ids, np.concatenate([first, rest.labels]).astype(np.int32)))
    return made


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name", ["llama", "qwen2_window", "gemma2", "granite", "mixtral"])
def test_what_is_computed_once_for_several_examples_counts_for_each(name: str, mode: str, tmp_path: Path) -> None:
    alike = beginning_alike(5, 33, 12, 70, 2, 21)
    model, layout, own = prepared(name, mode)
    trial = make_trial(model, tmp_path, alike, budget=ALL_IN_ONE, layout=layout, mode=mode)
    (batch,) = trial.step().microbatches
    assert batch.input_ids.numel() == sum(len(each.input_ids) for each in alike) - 5 * 30
    loss, found, _ = trial.one_step()
    expected = padded_loss(own, alike) + balance_loss(own, alike)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    assert_same(found, gradients(own), 2e-5)


def test_nothing_is_shared_where_dropout_is_drawn_for_each_example(tmp_path: Path) -> None:
    alike = beginning_alike(5, 33)
    model = with_our_lora(tiny_model("llama"), dropout=0.1)
    choose_layout(transformers_model(model))
    trial = make_trial(model, tmp_path, alike, budget=ALL_IN_ONE, mode="lora", held_out=alike)
    (batch,) = trial.step().microbatches
    assert batch.input_ids.numel() == sum(len(each.input_ids) for each in alike)
    assert (shares(trial.model, False), shares(trial.model, True)) == (False, True)  # nothing is drawn in evaluation
    packed = trial.task.packing(True, False, True)(ListedExamples(alike), [0, 1], [])
    assert packed.input_ids.numel() == 30 + 5 + 33


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding-free"])
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name", ["llama", "qwen2_window"])
def test_a_step_has_the_loss_and_gradients_of_trls_trainer(
    name: str, mode: str, padding_free: bool, tmp_path: Path
) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model, layout, own = prepared(name, mode)
    loss, found, _ = make_trial(model, tmp_path, EIGHT, budget=64, layout=layout, mode=mode).one_step()
    trainer = trl.SFTTrainer(
        model=own,
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=len(EIGHT),
            train_sampling_strategy="sequential",
            completion_only_loss=True,
            max_length=None,
            padding_free=padding_free,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(
            [{"input_ids": e.input_ids.tolist(), "completion_mask": (e.labels != IGNORE).tolist()} for e in EIGHT]
        ),
        processing_class=tiny_tokenizer(),
    )
    (batch,) = list(trainer.get_train_dataloader())
    assert batch["input_ids"].shape[0] == (1 if padding_free else len(EIGHT))
    assert (batch["labels"] != IGNORE).sum() >= sum(e.num_targets for e in EIGHT)
    own.zero_grad()
    # As its training loop calls it: the mean over all targets of the step.
    expected = trainer.compute_loss(trainer.model, batch, num_items_in_batch=sum(e.num_targets for e in EIGHT))
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=0)
    assert_same(found, gradients(trainer.model), 1e-4)


def balance_loss(model: Any, examples: list[Tokens]) -> Tensor:
    """transformers' router loss over all tokens that are no padding, times its coefficient; 0 without experts."""
    inner = transformers_model(model)
    coefficient = getattr(inner, "router_aux_loss_coef", None)
    if not coefficient:
        return torch.zeros(())
    batch = padded_batch(examples)
    batch.pop("labels")
    return coefficient * model(**batch, use_cache=False, output_router_logits=True).aux_loss


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_the_router_loss_is_the_whole_steps_however_it_is_cut(name: str, tmp_path: Path) -> None:
    model, layout, own = prepared(name, "full")
    assert balance_loss(own, EIGHT) > 1e-4
    expected = padded_loss(own, EIGHT) + balance_loss(own, EIGHT)
    expected.backward()
    for budget in (ONE_EACH, 70, ALL_IN_ONE):
        loss, found, _ = make_trial(model, tmp_path, EIGHT, budget, layout=layout).one_step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
        assert_same(found, gradients(own), 2e-5)


def test_the_reference_is_what_transformers_calls_the_loss() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        torch.testing.assert_close(padded_loss(model, EIGHT), model(**padded_batch(EIGHT)).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name", ["llama_tied", "qwen2_window", "gemma2"])
def test_the_token_budget_changes_neither_loss_nor_gradients(name: str, mode: str, tmp_path: Path) -> None:
    model, _, _ = prepared(name, mode)
    loss, expected, count = make_trial(model, tmp_path, EIGHT, ONE_EACH, mode=mode).one_step()
    assert count == len(EIGHT)
    for budget, least in ((ALL_IN_ONE, 1), (70, 3)):
        other_loss, found, count = make_trial(model, tmp_path, EIGHT, budget, mode=mode).one_step()
        assert count == least
        torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=0)
        assert_same(found, expected, 1e-5)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_solo_layout_changes_neither_loss_nor_gradients(mode: str, tmp_path: Path) -> None:
    model, _, _ = prepared("qwen2_window", mode)
    loss, expected, _ = make_trial(model, tmp_path, EIGHT, ALL_IN_ONE, mode=mode).one_step()
    transformers_model(model).set_attn_implementation("sdpa")
    solo_loss, found, count = make_trial(model, tmp_path, EIGHT, ALL_IN_ONE, layout="solo", mode=mode).one_step()
    assert count == len(EIGHT)
    torch.testing.assert_close(solo_loss, loss, rtol=1e-6, atol=0)
    assert_same(found, expected, 1e-5)


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name", ["llama_tied", "gemma2", "gpt_neox", "qwen2_moe"])
def test_activation_checkpointing_changes_neither_loss_nor_gradients(name: str, mode: str, tmp_path: Path) -> None:
    model, _, _ = prepared(name, mode)
    loss, expected, _ = make_trial(model, tmp_path, EIGHT, mode=mode).one_step()
    transformers_model(model).gradient_checkpointing_enable()
    other_loss, found, _ = make_trial(model, tmp_path, EIGHT, mode=mode).one_step()
    torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=0)
    assert_same(found, expected, 1e-5)


def test_full_training_in_16_bit_keeps_fp32_weights_and_gradients(tmp_path: Path) -> None:
    model, _, own = prepared("llama_tied", "full")
    loss, found, _ = make_trial(model, tmp_path, EIGHT, compute=torch.bfloat16).one_step()
    assert {p.dtype for p in model.parameters()} == {g.dtype for g in found.values()} == {torch.float32}
    expected = padded_loss(own, EIGHT)
    expected.backward()
    assert loss.item() != pytest.approx(expected.item(), rel=1e-7)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    assert_same(found, gradients(own), 5e-2)


def test_lora_in_16_bit_stays_near_fp32(tmp_path: Path) -> None:
    model, _, own = prepared("llama", "lora")
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    loss, found, _ = make_trial(model, tmp_path, EIGHT, mode="lora", compute=torch.bfloat16).one_step()
    expected = padded_loss(own, EIGHT)
    expected.backward()
    assert {g.dtype for g in found.values()} == {torch.float32}
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    assert_same(found, gradients(own), 8e-2)


def test_the_counts_are_those_of_the_examples(tmp_path: Path) -> None:
    model, _, _ = prepared("llama", "lora")
    trial = make_trial(model, tmp_path, EIGHT, mode="lora")
    counts = Counts()
    counts.add(trial.step().totals), counts.add(trial.step().totals)
    assert counts.steps == 2
    assert counts.examples == 16
    assert counts.tokens == 2 * sum(len(example.input_ids) for example in EIGHT)
    assert counts.targets == 2 * sum(int((example.labels[1:] != -100).sum()) for example in EIGHT)


def test_an_evaluation_is_the_mean_over_all_held_out_targets(tmp_path: Path) -> None:
    model, _, own = prepared("gemma2", "lora")
    held_out = random_examples(30, 4, 55, 17, 8, 23, 61, 12, 9, 40, 3, seed=9)
    trial = make_trial(model, tmp_path, EIGHT, held_out=held_out, mode="lora")
    before = torch.get_rng_state()
    metrics = trial.evaluate()
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        expected = padded_loss(own, held_out)
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(expected.exp().item(), rel=1e-4)
    assert metrics["eval_target_tokens"] == sum(example.num_targets for example in held_out)
    assert not gradients(model)


def test_dropout_rests_in_evaluation_and_is_back_in_the_next_step(tmp_path: Path) -> None:
    model = with_our_lora(tiny_model("llama"), dropout=0.5)
    choose_layout(transformers_model(model))
    install_target_head(transformers_model(model))
    trial = make_trial(model, tmp_path, EIGHT, held_out=EIGHT, mode="lora")
    assert trial.evaluate()["eval_loss"] == trial.evaluate()["eval_loss"]
    assert trial.one_step()[0] != trial.one_step()[0]
