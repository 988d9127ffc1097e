"""What serving takes: the cache that a forecast counts is the one that transformers makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from firefly.config import ModelConfig
from firefly.models.loading import load_model
from firefly.models.memory import bytes_of
from firefly.models.precision import Precision
from firefly.models.serving_memory import (
    BATCH_TOKENS,
    PAGE,
    REQUESTS,
    CacheShape,
    LayerCache,
    cache_shape,
    cache_shape_of,
    cache_tokens_for,
    default_cache_tokens,
    weight_bytes,
)
from tiny import WINDOW, save_tiny_model, tiny_config, tiny_model


def shape_of(name: str, **changes: Any) -> CacheShape:
    found = cache_shape(tiny_config(name, **changes), ModelConfig(name_or_path=name))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("llama", [LayerCache(2 * 2 * 8)] * 3),  # two heads of eight, keys and values
        ("gpt_neox", [LayerCache(2 * 4 * 8)] * 3),
        ("mistral_window", [LayerCache(32, WINDOW)] * 3),
        ("gemma2", [LayerCache(32, WINDOW), LayerCache(32), LayerCache(32, WINDOW)]),
        ("deepseek_v3", [LayerCache(16 + 8)] * 3),  # a latent of 16 and a rotated key of 8
        ("deepseek_v32", [LayerCache(16 + 8 + 16)] * 3),  # and a key of the indexer
        ("jamba", [LayerCache(0, None, 768), LayerCache(32), LayerCache(0, None, 768)]),
    ],
)
def test_each_layer_keeps_what_its_kind_keeps(name: str, layers: list[LayerCache]) -> None:
    assert list(shape_of(name).layers) == layers


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v2", "falcon_h1", "qwen3_moe"])
def test_the_twin_tells_what_the_model_keeps(name: str) -> None:
    changes = {} if name == "gemma2" else {"num_hidden_layers": 5}
    model = tiny_model(name, **changes)
    assert shape_of(name, **changes) == cache_shape_of(model, model.config)
    with torch.no_grad():
        cache = model(input_ids=torch.arange(3, 3 + WINDOW - 1)[None], use_cache=True).past_key_values
    numbers = sum(
        value.numel()
        for layer in cache.layers
        for value in (layer.keys, layer.values)
        if isinstance(value, torch.Tensor)
    )
    states = sum(layer.fixed for layer in shape_of(name, **changes).layers)
    assert shape_of(name, **changes).request(WINDOW - 1, 4) == 4 * (numbers + states)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral_window", "qwen2_moe_window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pool_and_the_masks_are_those_that_transformers_allocates(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name).to(dtype)
    tokens = 1000
    settings = ContinuousBatchingConfig(
        num_blocks=-(-tokens // PAGE),
        page_size=PAGE,
        max_batch_tokens=BATCH_TOKENS,
        max_requests_per_batch=REQUESTS,
        use_async_batching=False,
        use_cuda_graph=False,
        auto_switch_to_flash=False,
    )
    manager = model.init_continuous_batching(GenerationConfig(do_sample=False, eos_token_id=-1), settings)
    made = manager._create_batch_processor()
    shape = shape_of(name)
    pool, readable = shape.pool(tokens, dtype.itemsize)
    assert shape.paged
    assert pool == made.cache.cache_tensor.nbytes
    assert readable == made.cache.max_tokens_read
    static = [*made.inputs_and_outputs.attention_mask.values(), made.inputs_and_outputs.read_index_storage]
    assert shape.parts(tokens, dtype.itemsize, device="cuda")["masks"] == sum(tensor.nbytes for tensor in static)


def test_latents_and_states_are_not_batched_as_requests_arrive() -> None:
    assert not any(shape_of(name).paged for name in ("deepseek_v3", "jamba", "falcon_h1", "llama4"))


def test_adapters_have_caches_of_their_own() -> None:
    one, three = (shape_of("llama").parts(1000, 2, models) for models in (1, 3))
    assert three["kv_cache"] == 3 * one["kv_cache"]
    assert three["masks"] == 3 * one["masks"]
    assert three["work"] == one["work"]


@pytest.mark.parametrize("in_4_bits", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen3_moe"])
def test_weights_are_counted_as_they_are_held(name: str, in_4_bits: bool, tmp_path: Path) -> None:
    # wide enough for whole blocks of 64: smaller ones are padded
    sizes = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "vocab_size": 512}
    if name != "qwen3_moe":
        del sizes["moe_intermediate_size"]
    folder = save_tiny_model(tmp_path / "model", name, **sizes)
    model = ModelConfig(name_or_path=str(folder))
    loaded = load_model(model, "qlora" if in_4_bits else "lora", Precision(torch.float32), torch.device("cpu"))
    held = 0
    for parameter in loaded.parameters():
        states = getattr(parameter, "states", None)
        if states is None:
            held += bytes_of(parameter)
        else:  # stacked experts
            held += parameter.data.nbytes
            held += sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in states)
    counted = weight_bytes(loaded.config, model, torch.float32, in_4_bits)
    assert counted == pytest.approx(held, rel=0.01 if in_4_bits else 0)


def test_a_default_cache_holds_the_context_as_far_as_memory_goes() -> None:
    shape, gib = shape_of("llama"), 1 << 30
    assert default_cache_tokens(shape, gib, 512, 2) == 512 * REQUESTS  # many short requests
    assert default_cache_tokens(shape, 64 * gib, 131072, 2) == 131072
    some = default_cache_tokens(shape, gib // 32, 131072, 2)
    assert PAGE < some < 131072
    assert sum(shape.parts(some, 2).values()) <= gib // 32
    assert default_cache_tokens(shape, gib // 32, 131072, 2, models=4) < some
    assert default_cache_tokens(shape, 0, 131072, 2) == PAGE
    assert default_cache_tokens(shape_of("deepseek_v3"), gib, 4096, 2) == 4096  # one request at a time


def test_a_loaded_model_gets_a_cache_by_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    model, free = tiny_model("llama"), 1 << 27
    monkeypatch.setattr("firefly.models.serving_memory.free_memory", lambda device: free)
    assert cache_tokens_for(model, 131072, 3) == default_cache_tokens(shape_of("llama"), free, 131072, 4, 3)
    monkeypatch.setattr(model, "forward", lambda **given: None)
    assert cache_tokens_for(model, 131072) is None
