"""A meta from config.json is the model that a run trains: the same parameters, the same forwards."""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch

from firefly.config import Config, load_config
from firefly.data.batching import pack
from firefly.errors import UsageError
from firefly.models.adapters import attach_adapter, transformers_model
from firefly.models.attention import choose_layout
from firefly.models.dry_run import dry_run
from firefly.models.forwards import install_training_forwards
from firefly.models.loading import load_model
from firefly.models.memory import Peak, forecast_memory
from firefly.models.meta_model import build_meta_model
from firefly.models.precision import Precision
from tiny import random_examples, save_tiny_model, tiny_config

FP32 = Precision(torch.float32)


def described(folder: Path, name: str, **changes: Any) -> Config:
    return load_config({"model_name_or_path": str(folder / name), "output_dir": "x", "train_file": "x", **changes})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama_tied", "gemma2", "bloom"):
        # NF4 has blocks of 64, and bitsandbytes packs 32 outputs together on some CPUs.
        save_tiny_model(folder / name, name, hidden_size=64, intermediate_size=128, num_key_value_heads=4)
    return folder


def loaded(config: Config) -> tuple[Any, str, str]:
    """(model, layout, head) as a run makes them."""
    model = load_model(config.model, config.adapter.mode, FP32, torch.device("cpu"))
    model = attach_adapter(model, config.adapter)
    # Behind our forwards: on some CPUs bitsandbytes' own packs 4-bit weights for inference.
    layout, _ = choose_layout(transformers_model(model))
    return model, layout, install_training_forwards(model)


def forwards(model: Any) -> dict[str, str]:
    """Which modules have a forward of ours, and which one."""
    modules = transformers_model(model).named_modules()
    own = {name: vars(module).get("forward") for name, module in modules}
    return {name: found.__func__.__qualname__ for name, found in own.items() if isinstance(found, MethodType)}


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
@pytest.mark.parametrize("name", ["llama_tied", "gemma2", "bloom"])
def test_a_meta_model_is_what_a_run_loads(models: Path, name: str, mode: str) -> None:
    config = described(models, name, train_mode=mode, lora_rank=4)
    meta, (model, layout, head) = build_meta_model(config, FP32), loaded(config)
    assert {p.device.type for p in meta.model.parameters()} == {"meta"}
    assert [(n, p.shape, p.dtype, p.requires_grad) for n, p in meta.model.named_parameters()] == [
        (n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()
    ]
    assert (meta.layout, meta.head) == (layout, head)
    assert forwards(meta.model) == forwards(model)
    rows = [pack(random_examples(40))]
    solo = layout == "solo"
    peaks = [dry_run(transformers_model(each), rows, solo=solo).total for each in (meta.model, model)]
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)
    sizes = [
        forecast_memory(each, torch.device("cuda"), Peak(0, 0, 0), optimizer=8, available=0).parts
        for each in (meta.model, model)
    ]
    assert sizes[0] == sizes[1]


def test_a_config_json_is_all_that_a_meta_model_needs(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path / "bare")
    meta = build_meta_model(described(tmp_path, "bare", train_mode="lora"), FP32)
    assert meta.architecture == "LlamaForCausalLM"
    assert meta.layout == "segments"


def test_more_tokens_than_rows_lengthen_the_embedding(models: Path) -> None:
    meta = build_meta_model(described(models, "llama_tied", train_mode="full"), FP32, rows=300)
    assert transformers_model(meta.model).get_input_embeddings().weight.shape[0] == 300


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"use_dora": True}, "use_dora"), ({"model_name_or_path": "/nowhere/at/all"}, "/nowhere/at/all")],
)
def test_what_has_no_meta_model_is_named(models: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        build_meta_model(described(models, "llama_tied", **{"train_mode": "lora"} | changes), FP32)


def test_quantizing_afterwards_still_works(models: Path) -> None:
    """bitsandbytes keeps a table of constants for the process: a meta must not leave an empty one behind."""
    config = described(models, "llama_tied", train_mode="qlora")
    build_meta_model(config, FP32)
    model = load_model(config.model, "qlora", FP32, torch.device("cpu"))
    assert torch.isfinite(model(input_ids=torch.arange(5)[None]).logits).all()
