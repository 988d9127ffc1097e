"""Several adapters over one base: each computes as if it were alone, and the base as if there were none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from firefly.config import ModelConfig
from firefly.errors import UsageError
from firefly.models.adapter_loading import has_base, load_adapter, load_adapters, use_adapter
from firefly.models.loading import load_model
from firefly.models.precision import Precision
from firefly.models.saved_adapter import open_adapter
from tiny import VOCABULARY, save_tiny_model

IDS = torch.tensor([[5, 9, 20, 31, 7, 44, 6, 100, 250]])
ENDS = ["embed_tokens", "lm_head"]
ATTENTION: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
EXPERTS: dict[str, Any] = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}

KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "qwen2": {
        "plain": ATTENTION,
        "all linear": {"target_modules": "all-linear"},
        "dora": ATTENTION | {"use_dora": True},
        "rslora": ATTENTION | {"use_rslora": True, "r": 8},
        "ranks by layer": ATTENTION | {"rank_pattern": {r"layers\.1\.self_attn\.q_proj": 6}, "r": 3},
        "bias all": ATTENTION | {"bias": "all"},
        "bias lora_only": ATTENTION | {"bias": "lora_only"},
        "lora_bias": ATTENTION | {"lora_bias": True},
        "embedding and head": {"target_modules": ["q_proj", *ENDS]},
        "dora on the embedding": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
        "whole ends": ATTENTION | {"modules_to_save": ENDS},
        "whole norm": ATTENTION | {"modules_to_save": ["norm"]},
        "whole block": ATTENTION | {"modules_to_save": ["layers.1.mlp"]},
        "token rows": ATTENTION | {"trainable_token_indices": [5, 9]},
        "token rows of both ends": ATTENTION | {"trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [7]}},
    },
    "llama_tied": {
        "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
        "embedding, kept tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        "head": {"target_modules": ["q_proj", "lm_head"]},
        "whole head": ATTENTION | {"modules_to_save": ["lm_head"]},
        "token rows": ATTENTION | {"trainable_token_indices": [5, 9]},
        "plain": ATTENTION,
    },
    "qwen3_moe": {
        "experts": EXPERTS,
        "both stacks": EXPERTS | {"target_parameters": ["experts.down_proj", "experts.gate_up_proj"]},
        "attention alone": ATTENTION,
    },
    "gpt2": {
        "conv1d": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
        "bias all": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"},
    },
}


def train(folder: Path, base: Path, settings: dict[str, Any], seed: int) -> None:
    """Save an adapter as another tool makes it, of other numbers for each seed."""
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | settings
    trained: Any = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(trained.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    trained.save_pretrained(folder)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def loaded(base: Path, mode: str = "lora") -> Any:
    precision = Precision(torch.float32)
    return load_model(ModelConfig(name_or_path=str(base)), mode, precision, torch.device("cpu")).eval()


def check_turns(tmp_path: Path, name: str, mode: str, kinds: list[str]) -> None:
    """Each adapter alone, then all of them in turns."""
    base = save_tiny_model(tmp_path / "base", name)
    for seed, kind in enumerate(kinds):
        train(tmp_path / kind, base, KINDS[name][kind], seed)
    alone = {kind: logits(load_adapter(loaded(base, mode), str(tmp_path / kind))) for kind in kinds}
    model = loaded(base, mode)
    bare = logits(model)
    assert all((alone[kind] - bare).abs().max() > 1e-3 for kind in alone)
    served = load_adapters(model, {kind: open_adapter(str(tmp_path / kind)) for kind in kinds})
    assert served is model
    assert not hasattr(model, "peft_config")
    assert torch.equal(logits(served), bare)
    for kind in [*alone, *reversed(alone)]:
        use_adapter(served, kind)
        assert torch.equal(logits(served), alone[kind]), kind
        if len(kind) % 2:  # from one to the next, and over the base between them
            use_adapter(served, None)
            assert torch.equal(logits(served), bare), kind
    use_adapter(served, None)
    assert torch.equal(logits(served), bare)


@pytest.mark.parametrize("name", KINDS)
def test_each_adapter_and_the_base_compute_as_if_alone(name: str, tmp_path: Path) -> None:
    check_turns(tmp_path, name, "lora", list(KINDS[name]))


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("qwen2", ["all linear", "dora", "bias all", "whole ends", "token rows", "embedding and head"]),
        ("qwen3_moe", ["experts", "both stacks", "attention alone"]),
    ],
)
def test_each_adapter_and_the_base_compute_as_if_alone_in_4_bits(name: str, kinds: list[str], tmp_path: Path) -> None:
    check_turns(tmp_path, name, "qlora", kinds)


def adapters(folder: Path, base: Path, **kinds: dict[str, Any]) -> dict[str, Any]:
    for seed, (name, settings) in enumerate(kinds.items()):
        train(folder / name, base, settings, seed)
    return {name: open_adapter(str(folder / name)) for name in kinds}


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_changes_the_base_computes_alone_and_is_refused_beside_others(start: str, tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", "llama")
    found = adapters(tmp_path, base, changing=ATTENTION | {"init_lora_weights": start}, plain=ATTENTION)
    model = loaded(base)
    bare = logits(model)
    for order in (["changing", "plain"], ["plain", "changing"]):
        with pytest.raises(UsageError, match=f"changing.*{start}.*Serve it alone"):
            load_adapters(model, {name: found[name] for name in order})
    assert torch.equal(logits(model), bare)  # refused before anything was wrapped
    alone = load_adapters(model, {"changing": found["changing"]})
    assert torch.equal(logits(alone), logits(load_adapter(loaded(base), found["changing"])))
    assert not has_base(alone)
    use_adapter(alone, "changing")
    with pytest.raises(KeyError):
        use_adapter(alone, None)


def test_another_vocabulary_computes_alone_and_is_refused_beside_others(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", "llama")
    grown = AutoModelForCausalLM.from_pretrained(base)
    grown.resize_token_embeddings(VOCABULARY + 4, mean_resizing=False)
    grown.save_pretrained(tmp_path / "grown base")
    found = adapters(tmp_path, base, plain=ATTENTION)
    found |= adapters(tmp_path, tmp_path / "grown base", grown=ATTENTION | {"modules_to_save": ENDS})
    with pytest.raises(UsageError, match=f"grown.*{VOCABULARY + 4} rows.*{VOCABULARY}"):
        load_adapters(loaded(base), found)
    alone = load_adapters(loaded(base), {"grown": found["grown"]})
    assert logits(alone).shape[-1] == VOCABULARY + 4
    assert not has_base(alone)


def test_a_model_without_adapters_is_its_own_base(tmp_path: Path) -> None:
    model = loaded(save_tiny_model(tmp_path / "base", "llama"))
    assert has_base(model)
    use_adapter(model, None)
    with pytest.raises(KeyError):
        use_adapter(model, "none such")


def test_generation_in_batches_follows_the_switch(tmp_path: Path) -> None:
    """transformers' batched generation holds on to the model, not to its layers."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    base = save_tiny_model(tmp_path / "base", "llama")
    kinds = {"red": ATTENTION, "blue": {"target_modules": ["gate_proj", "o_proj"]}}
    found = adapters(tmp_path, base, **kinds)
    model = load_adapters(loaded(base), found)
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1)
    batching = ContinuousBatchingConfig(num_blocks=8, page_size=32, max_batch_tokens=64)

    def answer() -> list[int]:
        outputs = model.generate_batch(
            [IDS[0].tolist()], generation_config=settings, continuous_batching_config=batching, progress_bar=False
        )
        return next(iter(outputs.values())).generated_tokens

    answers = {}
    for name in (None, "red", "blue", "red"):
        use_adapter(model, name)
        plain = model.generate(IDS, generation_config=settings)[0, IDS.shape[1] :]
        answers[name] = answer()
        assert answers[name] == plain.tolist()
    assert len({tuple(tokens) for tokens in answers.values()}) == 3
