"""Copies of 4-bit weights: bit for bit what is computed without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from firefly.config import AdapterConfig, ModelConfig
from firefly.data.batching import pack
from firefly.models.adapters import attach_adapter, transformers_model
from firefly.models.attention import choose_layout
from firefly.models.forwards import install_training_forwards
from firefly.models.kernels import lora_linear
from firefly.models.kernels.lora_linear import cache_sizes, cache_weights, cacheable_weights, weights_that_fit
from firefly.models.loading import load_model
from firefly.models.precision import Precision
from tiny import assert_same, gradients, random_examples, randomise_adapters, save_tiny_model

BATCH = pack(random_examples(9, 30, 21))


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """A tiny Llama in NF4 with adapters everywhere, prepared for training."""
    folder = save_tiny_model(tmp_path, "llama", hidden_size=64, intermediate_size=128)
    loaded = load_model(ModelConfig(name_or_path=str(folder)), "qlora", Precision(torch.float32), torch.device("cpu"))
    choose_layout(loaded)
    wrapped = randomise_adapters(attach_adapter(loaded, AdapterConfig(mode="qlora", rank=4, alpha=8, dropout=0.0)))
    install_training_forwards(wrapped)
    return wrapped


def loss_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**BATCH.model_inputs())["loss"]
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("count", [3, 100])
def test_nothing_changes_but_who_dequantizes(model: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes.functional as functional

    calls: list[int] = []
    original = functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *args: calls.append(1) or original(*args))
    expected_loss, expected = loss_and_gradients(model)
    without = len(calls)
    cache_weights(transformers_model(model), count, torch.float32)
    calls.clear()
    loss, found = loss_and_gradients(model)
    assert torch.equal(loss, expected_loss)
    assert_same(found, expected, 0)
    # The first three are the lowest layer's query, key and value, whose inputs need no gradient: used once a pass.
    assert len(calls) == (without - 3 if count == 3 else 0)


def test_every_adapted_4_bit_layer_can_be_cached_and_its_size_is_known(model: Any) -> None:
    sizes = cache_sizes(transformers_model(model), torch.float32)
    assert len(sizes) == 21
    copies = [lora_linear.dense(weight, torch.float32) for weight in cacheable_weights(model)]
    assert sizes == [copy.numel() * 4 for copy in copies]


def test_a_copy_of_another_type_is_not_used(model: Any) -> None:
    (weight, *_) = cacheable_weights(model)
    cache_weights(model, 1, torch.bfloat16)
    assert lora_linear.dense(weight, torch.float32).dtype == torch.float32
    assert lora_linear.dense(weight, torch.bfloat16) is getattr(weight, lora_linear.DENSE_COPY)


def test_saved_adapters_and_state_know_nothing_of_copies(model: Any) -> None:
    before = {name: value.shape for name, value in model.state_dict().items()}
    cache_weights(model, 100, torch.float32)
    assert {name: value.shape for name, value in model.state_dict().items()} == before


@pytest.mark.parametrize(("room", "expected"), [(0, 0), (9, 0), (10, 1), (29, 1), (30, 2), (1000, 3)])
def test_the_first_copies_that_fit(room: int, expected: int) -> None:
    assert weights_that_fit([10, 20, 30], room) == expected
