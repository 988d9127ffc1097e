"""Sampling from a model between two steps of its training: the tokens of an untouched model, and no trace."""

from __future__ import annotations

import copy
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig

from firefly.config import AdapterConfig, ModelConfig
from firefly.data.batching import pack
from firefly.models.adapters import attach_adapter, transformers_model
from firefly.models.attention import choose_layout
from firefly.models.checkpointing import Checkpointing, install_checkpointing
from firefly.models.forwards import install_training_forwards
from firefly.models.loading import load_model
from firefly.models.precision import Precision
from firefly.models.probing import decoder
from firefly.models.sampling import sampling
from tiny import gradients, prepared, random_examples, randomise_adapters, save_tiny_model, tiny_model, with_our_lora

PROMPTS = [[int(number) for number in example.input_ids] for example in random_examples(5, 12, 9)]
SOLO = ["gptj", "gpt_oss"]
ALWAYS = [("llama", "lora"), ("gemma3", "full"), ("gptj", "lora")]
NEW_TOKENS = 6
BATCHING = ContinuousBatchingConfig(num_blocks=16, page_size=16, max_batch_tokens=64)


def cases(always: list[tuple[str, str]], *others: str) -> list[Any]:
    """Architectures in both modes, of which those that are not always tried are marked slow."""
    every = [(name, mode) for name in others for mode in ("full", "lora")]
    return [*always, *(pytest.param(*case, marks=pytest.mark.slow) for case in every if case not in always)]


def settings(**changes: Any) -> GenerationConfig:
    return GenerationConfig(
        **{"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0} | changes
    )


def generated(model: Any, told: bool = True, **changes: Any) -> list[list[int]]:
    """The answers to all prompts, in one batch padded on the left. `told`: what is padding; else it is to be found."""
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    answers = model.generate(
        input_ids=ids, attention_mask=mask if told else None, generation_config=settings(**changes)
    )
    return answers[:, longest:].tolist()


def generated_by_batching(model: Any, **changes: Any) -> list[list[int]]:
    outputs = model.generate_batch(
        PROMPTS, generation_config=settings(**changes), continuous_batching_config=copy.deepcopy(BATCHING), warmup=False
    )
    assert not any(output.error for output in outputs.values())
    return [output.generated_tokens for output in outputs.values()]


@pytest.mark.parametrize(("name", "mode"), cases(ALWAYS, "llama", "gemma3", "qwen2_moe", *SOLO))
def test_generate_gives_the_tokens_of_an_untouched_model(name: str, mode: str) -> None:
    model, layout, own = prepared(name, mode)
    assert (layout == "solo") is (name in SOLO)
    expected = generated(own)
    assert generated(model.eval()) == generated(model, told=False) == expected
    with sampling(model.train()) as sampled:
        assert generated(sampled) == expected


@pytest.mark.parametrize(("name", "mode"), cases([("llama", "lora")], "llama", "qwen2_moe"))
def test_continuous_batching_gives_the_tokens_of_an_untouched_model(name: str, mode: str) -> None:
    model, _, own = prepared(name, mode)
    with sampling(model.train()) as sampled:
        assert generated_by_batching(sampled) == generated_by_batching(transformers_model(own)) == generated(own)


def test_a_static_cache_has_its_masks() -> None:
    """`generate` makes them itself, before it calls the model."""
    model, _, own = prepared("llama", "full")
    assert generated(model.eval(), cache_implementation="static") == generated(own)


def test_a_key_value_cache_is_used_and_nothing_is_dropped_or_recomputed() -> None:
    model, _ = made("llama", "lora")
    inner = transformers_model(model)
    inner.config.use_cache = False  # as in training
    lengths: list[int] = []
    decoder(inner).layers[1].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    with sampling(model.train()) as sampled:
        answers = generated(sampled)
    assert lengths == [max(map(len, PROMPTS))] + [1] * (NEW_TOKENS - 1)
    install_checkpointing(inner, Checkpointing(0))
    assert answers == generated(model.eval())


def quantized(folder: Path) -> tuple[Any, Any]:
    """(A tiny Llama in NF4 as `train` prepares it, the same without us.)"""
    from peft import LoraConfig, get_peft_model

    made = save_tiny_model(folder, "llama", hidden_size=64, intermediate_size=128)
    named = ModelConfig(name_or_path=str(made))
    ours, own = (load_model(named, "qlora", Precision(torch.float32), torch.device("cpu")) for _ in range(2))
    choose_layout(ours)
    ours = randomise_adapters(attach_adapter(ours, AdapterConfig(mode="qlora", rank=4, alpha=8, dropout=0.0)))
    install_training_forwards(ours)
    own = get_peft_model(own, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    return ours, randomise_adapters(own).eval()


@pytest.mark.slow
def test_qlora_gives_the_tokens_of_an_untouched_model(tmp_path: Path) -> None:
    ours, own = quantized(tmp_path)
    expected = generated(own)
    with sampling(ours.train()) as sampled:
        assert generated(sampled) == expected
        assert generated_by_batching(sampled) == expected


def trained(model: Any, layout: str, between: Any = None) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Two steps by hand, and `between` them what is to leave no trace: (losses, gradients of the second, weights)."""
    torch.manual_seed(1)
    losses = []
    for number in range(2):
        model.train()
        model.zero_grad(set_to_none=True)
        batch = pack(random_examples(9, 30, 21, seed=number)) if layout == "segments" else pack(random_examples(21))
        loss = model(**batch.model_inputs(layout == "solo"))["loss"]
        loss.backward()
        losses.append(loss.detach())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-3 * parameter.grad
        if between is not None and number == 0:
            between(model)
    return losses, gradients(model), {name: p.detach().clone() for name, p in model.named_parameters()}


def made(name: str, mode: str) -> tuple[Any, str]:
    inner = tiny_model(name, attention_dropout=0.1)
    layout, _ = choose_layout(inner)
    model = with_our_lora(inner, dropout=0.2) if mode == "lora" else inner.requires_grad_(True)
    install_training_forwards(model)
    install_checkpointing(inner, Checkpointing(1))
    return model, layout


def sampled_from(model: Any) -> None:
    """By chance, both ways, and with an accident."""
    inner = transformers_model(model)
    modes = [module.training for module in model.modules()]
    before = (
        inner.config._attn_implementation,
        inner.generation_config,
        copy.deepcopy(inner.generation_config).to_dict(),
    )
    draws = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    with sampling(model) as sampled:
        generated(sampled, do_sample=True)
        if inner.config.model_type == "llama":
            generated_by_batching(sampled, do_sample=True)
        sampled.generation_config.max_new_tokens = 3
        random.random(), np.random.rand()
    with suppress(InterruptedError), sampling(model) as sampled:
        sampled.set_attn_implementation("eager")
        raise InterruptedError
    assert [module.training for module in model.modules()] == modes
    after = inner.config._attn_implementation, inner.generation_config, inner.generation_config.to_dict()
    assert after[1] is before[1]
    assert (after[0], after[2]) == (before[0], before[2])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == draws  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "mode"), cases([("llama", "lora")], "llama", "gemma3", "qwen2_moe", "gpt_oss"))
def test_a_run_that_sampled_between_two_steps_is_bit_equal_to_one_that_did_not(name: str, mode: str) -> None:
    expected, found = trained(*made(name, mode)), trained(*made(name, mode), between=sampled_from)
    assert all(map(torch.equal, found[0], expected[0]))
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
