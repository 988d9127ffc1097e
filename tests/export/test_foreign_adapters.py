"""Adapters made by plain peft, in the ways that other tools make them: merged, served and trained on as peft computes
them, or refused by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from firefly.config import AdapterConfig, ModelConfig
from firefly.export.merge import merge
from firefly.models.adapter_loading import load_adapter
from firefly.models.adapters import attach_adapter
from tiny import VOCABULARY, save_tiny_model

IDS = [5, 9, 20, 31, 7, 44, 6, 100, 250]
ENDS = ["embed_tokens", "lm_head"]


@dataclass(frozen=True)
class Kind:
    """How another tool made an adapter: on which base, with which vocabulary and settings, saved how."""

    settings: dict[str, Any]
    base: str = "llama"
    rows: int | None = None
    pad_to: int | None = None
    saving: dict[str, Any] = field(default_factory=dict)
    adapter_name: str = "default"


ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
KINDS = {
    "plain": Kind(ATTENTION),
    "all linear": Kind({"target_modules": "all-linear"}),
    "ranks by layer": Kind(ATTENTION | {"rank_pattern": {r"layers\.1\.self_attn\.q_proj": 6}, "r": 3}),
    "alphas by layer": Kind(ATTENTION | {"alpha_pattern": {"layers.0.self_attn.v_proj": 32}}),
    "some layers": Kind(ATTENTION | {"layers_to_transform": [0, 2]}),
    "rslora": Kind(ATTENTION | {"use_rslora": True}),
    "dora": Kind(ATTENTION | {"use_dora": True}),
    "gaussian start": Kind(ATTENTION | {"init_lora_weights": "gaussian"}),
    "pissa": Kind(ATTENTION | {"init_lora_weights": "pissa"}),
    "olora": Kind(ATTENTION | {"init_lora_weights": "olora"}),
    "conv1d": Kind({"target_modules": ["c_attn"], "fan_in_fan_out": True}, base="gpt2"),
    "bias all": Kind(ATTENTION | {"bias": "all"}, base="qwen2"),
    "bias lora_only": Kind(ATTENTION | {"bias": "lora_only"}, base="qwen2"),
    "lora_bias": Kind(ATTENTION | {"lora_bias": True}, base="qwen2"),
    "head": Kind({"target_modules": ["q_proj", "lm_head"]}),
    "embedding": Kind({"target_modules": ["q_proj", "embed_tokens"]}),
    "embedding and head": Kind({"target_modules": ["q_proj", *ENDS]}),
    "embedding, tied": Kind({"target_modules": ["q_proj", "embed_tokens"]}, base="llama_tied"),
    "embedding, kept tied": Kind(
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, base="llama_tied"
    ),
    "dora on the embedding": Kind({"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "whole ends": Kind(ATTENTION | {"modules_to_save": ENDS}),
    "head, tied": Kind({"target_modules": ["q_proj", "lm_head"]}, base="llama_tied"),
    "whole head, tied": Kind(ATTENTION | {"modules_to_save": ["lm_head"]}, base="llama_tied"),
    "whole norm": Kind(ATTENTION | {"modules_to_save": ["norm"]}),
    "grown, frozen": Kind(ATTENTION, rows=270),
    "grown, frozen, tied": Kind(ATTENTION, rows=270, base="llama_tied"),
    "grown and padded": Kind(ATTENTION, rows=270, pad_to=64),
    "grown, whole ends": Kind(ATTENTION | {"modules_to_save": ENDS}, rows=270),
    "grown, whole ends, tied": Kind(ATTENTION | {"modules_to_save": ENDS}, rows=270, base="llama_tied"),
    "grown, kept tied": Kind(
        ATTENTION | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, rows=270, base="llama_tied"
    ),
    "grown, adapted ends": Kind({"target_modules": ["q_proj", *ENDS]}, rows=270),
    "shrunk": Kind(ATTENTION, rows=VOCABULARY - 4),
    "shrunk, tied": Kind(ATTENTION, rows=VOCABULARY - 4, base="llama_tied"),
    "shrunk, adapted ends": Kind({"target_modules": ["q_proj", *ENDS]}, rows=VOCABULARY - 4),
    "shrunk, whole ends": Kind(ATTENTION | {"modules_to_save": ENDS}, rows=VOCABULARY - 4),
    "token rows": Kind(ATTENTION | {"trainable_token_indices": [5, 9]}),
    "token rows, tied": Kind(ATTENTION | {"trainable_token_indices": [5, 9]}, base="llama_tied"),
    "token rows of both ends": Kind(ATTENTION | {"trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [7]}}),
    "grown token rows": Kind(ATTENTION | {"trainable_token_indices": {"embed_tokens": [264, 265]}}, rows=266),
    "pickled": Kind(ATTENTION, saving={"safe_serialization": False}),
    "pickled, grown": Kind(ATTENTION | {"modules_to_save": ENDS}, rows=270, saving={"safe_serialization": False}),
    "named": Kind(ATTENTION, adapter_name="persona"),
    "named, grown": Kind(ATTENTION | {"modules_to_save": ENDS}, rows=270, adapter_name="persona"),
    "experts by bare names": Kind(
        {"target_modules": ["q_proj", "up_proj", "gate_proj", "down_proj"]}, base="qwen3_moe"
    ),
    "experts": Kind({"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}, base="qwen3_moe"),
}


def shaken(model: Any, seed: int = 1) -> Any:
    """Everything that is trained, as training might leave it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def made(folder: Path, kind: Kind) -> Any:
    """The trained model as the other tool has it in memory; its base and adapter lie in `folder`."""
    save_tiny_model(folder / "base", kind.base)
    torch.manual_seed(3)  # the rows of a grown vocabulary are drawn
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    if kind.rows:
        model.resize_token_embeddings(kind.rows, pad_to_multiple_of=kind.pad_to, mean_resizing=False)
    settings = LoraConfig(**({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | kind.settings))
    trained = shaken(get_peft_model(model, settings, adapter_name=kind.adapter_name))
    trained.save_pretrained(folder / "adapter", **kind.saving)
    return trained


def logits(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits.double()


def in_fp64(model: Any) -> Any:
    """The model with the weights that it has, computed in fp64."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(inner.config, "num_experts"):
        inner.set_experts_implementation("eager")  # the grouped products have no fp64
    return model.double()


def probe_ids(kind: Kind) -> list[int]:
    """Ids that both vocabularies have, and the last one of the larger."""
    return [*(token for token in IDS if token < (kind.rows or VOCABULARY)), (kind.rows or VOCABULARY) - 1]


@pytest.mark.parametrize("name", KINDS)
def test_a_merge_is_what_peft_computes_in_fp64(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    trained, ids = made(tmp_path, kind), probe_ids(kind)
    merged = merge(
        ModelConfig(name_or_path=str(tmp_path / "base")), str(tmp_path / "adapter"), str(tmp_path / "merged")
    )
    trained = in_fp64(trained)
    expected = logits(trained, ids)
    untrained = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), IDS[:4])
    assert (expected[:, :4, : untrained.shape[-1]] - untrained[..., : expected.shape[-1]]).abs().max() > 1e-2
    found = in_fp64(AutoModelForCausalLM.from_pretrained(merged))
    assert found.get_input_embeddings().weight.shape[0] == trained.get_input_embeddings().weight.shape[0]
    scale = expected.abs().max().item()
    torch.testing.assert_close(logits(found, ids), expected, atol=3e-6 * scale, rtol=0)
    if "tied" not in name:  # peft merges a tied embedding into the head as well, which is another model
        torch.testing.assert_close(
            logits(trained.merge_and_unload(), ids), logits(found, ids), atol=3e-6 * scale, rtol=0
        )


@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_is_served_and_trained_on_as_peft_computes_it(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    trained, ids = made(tmp_path, kind), probe_ids(kind)
    expected = logits(trained, ids)
    served = load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(served, ids), expected, atol=2e-5, rtol=1e-5)
    again = attach_adapter(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        AdapterConfig(mode="lora", dropout=0.0, name_or_path=str(tmp_path / "adapter")),
    )
    torch.testing.assert_close(logits(again.eval(), ids), expected, atol=2e-5, rtol=1e-5)
    shaken(again, seed=2)
    moved = logits(again, ids)
    assert (moved - expected).abs().max() > 1e-2
    again.save_pretrained(tmp_path / "second")
    reread = load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "second"))
    torch.testing.assert_close(logits(reread, ids), moved, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bias all", "bias lora_only", "lora_bias", "dora", "grown, whole ends"])
def test_training_on_has_the_gradients_of_peft(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    ids = torch.tensor([probe_ids(kind)])

    def gradients(model: Any) -> dict[str, Tensor]:
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(made(tmp_path, kind))
    again = attach_adapter(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        AdapterConfig(mode="lora", dropout=0.0, name_or_path=str(tmp_path / "adapter")),
    )
    found = gradients(again)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("base", ["qwen2", "gpt2"])
def test_trained_biases_compute_beside_16_bit_weights_from_fp32_masters(base: str, tmp_path: Path) -> None:
    targets = ["c_attn"] if base == "gpt2" else ["q_proj", "v_proj"]
    made(tmp_path, Kind({"target_modules": targets, "bias": "all"}, base=base))
    ids = torch.tensor([IDS])

    def gradients(dtype: torch.dtype) -> dict[str, Tensor]:
        model = attach_adapter(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype),
            AdapterConfig(mode="lora", dropout=0.0, name_or_path=str(tmp_path / "adapter")),
        ).eval()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if name.endswith("bias") and p.grad is not None}

    exact, found = gradients(torch.float32), gradients(torch.bfloat16)
    assert len(exact) == len(found) >= 9
    for name, value in exact.items():
        assert found[name].dtype == torch.float32
        scale = max(value.norm().item(), 1e-3)  # a key's bias moves no softmax: its gradient is rounding alone
        assert (found[name] - value).norm() < 0.1 * scale


@pytest.mark.parametrize("base", ["gpt_neox", "bloom", "gpt2", "mixtral"])
def test_models_with_layer_norms_and_experts_merge_in_16_bits(base: str, tmp_path: Path) -> None:
    targets = {"gpt_neox": "query_key_value", "bloom": "query_key_value", "gpt2": "c_attn", "mixtral": "q_proj"}
    made(tmp_path, Kind({"target_modules": [targets[base]]}, base=base))
    merged = merge(
        ModelConfig(name_or_path=str(tmp_path / "base")),
        str(tmp_path / "adapter"),
        str(tmp_path / "merged"),
        dtype="bfloat16",
    )
    assert AutoModelForCausalLM.from_pretrained(merged).dtype == torch.bfloat16
