"""A model whose weights are read as it computes answers as one that was loaded whole, and keeps none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from firefly.config import ModelConfig
from firefly.console import take_notices
from firefly.models.adapter_loading import load_adapter
from firefly.models.loading import load_model
from firefly.models.precision import Precision
from firefly.models.streaming import HELD, change_weight, held, is_streamed, load_streamed, separate_copy
from firefly.models.unread import UNREAD, read_here, unread_of
from tiny import OTHERS, randomise_adapters, save_tiny_model, tiny_model

CPU, FP32 = torch.device("cpu"), torch.float32
IDS = torch.tensor([[5, 9, 20, 31, 7, 44, 6]])
NAMES = ["llama", "llama_tied", "gemma2", "phi3", "qwen3_moe", "mixtral", "jetmoe", "gpt_oss", "gpt2", "bloom", *OTHERS]


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


def whole_and_streamed(folder: Path, dtype: torch.dtype = FP32) -> tuple[Any, Any]:
    source = ModelConfig(name_or_path=str(folder))
    return load_model(source, "lora", Precision(dtype), CPU).eval(), load_streamed(source, dtype, CPU)


@pytest.mark.parametrize("name", NAMES)
def test_a_streamed_model_answers_as_one_that_is_loaded_whole(name: str, tmp_path: Path) -> None:
    tiny_model(name).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    take_notices()
    for dtype in (FP32, torch.bfloat16):
        whole, streamed = whole_and_streamed(tmp_path, dtype)
        assert is_streamed(streamed), take_notices()
        assert torch.equal(logits(streamed), logits(whole))
        assert not any(hasattr(parameter, HELD) for parameter in streamed.parameters())
        assert all(parameter.isnan().all() for parameter in streamed.parameters() if hasattr(parameter, UNREAD))


ADAPTERS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "dora": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "pissa": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "biases": {"target_modules": ["q_proj"], "bias": "all", "lora_bias": True},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]},
    "token rows": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]},
    "token rows, saved whole": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5]}},
    "grown": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "experts": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_on_a_streamed_model_computes_as_on_one_that_is_loaded_whole(name: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", {"experts": "qwen3_moe", "biases": "qwen2"}.get(name, "llama"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if name == "grown":
        model.resize_token_embeddings(270, mean_resizing=False)
    made = randomise_adapters(get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **ADAPTERS[name])))
    made.save_pretrained(tmp_path / "adapter", save_embedding_layers=name == "token rows, saved whole" or "auto")
    whole, streamed = whole_and_streamed(tmp_path / "base")
    untrained = logits(whole)
    expected = logits(load_adapter(whole, str(tmp_path / "adapter")))
    found = load_adapter(streamed, str(tmp_path / "adapter"))
    assert torch.equal(logits(found), expected)
    assert (expected[..., : untrained.shape[-1]] - untrained).abs().max() > 1e-3
    assert bool(unread_of(found)) == (name != "pissa")  # which takes a part out of every weight


def test_a_weight_is_in_memory_while_it_is_held_and_by_whomever(tmp_path: Path) -> None:
    whole, streamed = whole_and_streamed(save_tiny_model(tmp_path, "llama_tied"))
    weight, other = streamed.lm_head.weight, streamed.model.norm.weight
    with held(weight, other):
        assert torch.equal(weight, whole.lm_head.weight)
        assert torch.equal(logits(streamed), logits(whole))  # which uses both
        assert torch.equal(weight, whole.lm_head.weight)
    assert weight.isnan().all()
    with pytest.raises(IndexError), torch.inference_mode():
        streamed(input_ids=torch.tensor([[10_000]]))
    assert weight.isnan().all()


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_changed_weight_is_the_same_in_memory_and_in_its_file(name: str, tmp_path: Path) -> None:
    whole, streamed = whole_and_streamed(save_tiny_model(tmp_path, name), torch.bfloat16)
    path = "model.layers.1.mlp.experts.down_proj" if name == "mixtral" else "model.layers.1.mlp.down_proj.weight"

    def change(rows: Tensor, first: int) -> Tensor:
        return rows * (1 + torch.arange(first, first + len(rows), dtype=rows.dtype).view(-1, *[1] * (rows.dim() - 1)))

    before = logits(whole)
    for model in (whole, streamed):
        change_weight(model.get_parameter(path), change, by_row=True)
        change_weight(model.get_parameter(path), lambda rows, _: -rows)
    assert torch.equal(logits(streamed), logits(whole))
    assert not torch.equal(logits(whole), before)
    unread = unread_of(streamed)[path]
    assert torch.equal(unread.rows(1, 3), whole.get_parameter(path)[1:3])


def test_one_expert_is_read_without_the_others(tmp_path: Path) -> None:
    from transformers.core_model_loading import revert_weight_conversion

    _, streamed = whole_and_streamed(save_tiny_model(tmp_path, "mixtral"))
    stack = streamed.get_parameter("model.layers.0.mlp.experts.gate_up_proj")
    asked: list[int] = []

    def change(rows: Tensor, first: int) -> Tensor:
        asked.append(first)
        return rows

    change_weight(stack, change, by_row=True)
    as_saved = revert_weight_conversion(streamed, dict(unread_of(streamed)))
    names = [name for name in as_saved if "layers.0" in name and "experts.2." in name]
    assert len(names) == 3
    saved: Any
    for saved in (as_saved[name] for name in names):
        saved.read()
    assert asked == [2, 2]  # gate and up; down is a stack of its own


def test_a_copy_of_a_tied_weight_goes_its_own_way(tmp_path: Path) -> None:
    for model in whole_and_streamed(save_tiny_model(tmp_path, "llama_tied")):
        model.lm_head.weight = separate_copy(model.lm_head.weight)
        change_weight(model.lm_head.weight, lambda rows, _: 2 * rows)
        read_here(model.parameters())
        assert torch.equal(model.lm_head.weight, 2 * model.model.embed_tokens.weight)


def test_a_model_that_cannot_be_streamed_is_loaded_whole_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from firefly.models import streaming

    def fail(*arguments: Any, unread: bool = False) -> Any:
        if unread:
            raise NotImplementedError("an odd operation")
        return load_model(*arguments)

    monkeypatch.setattr(streaming, "load_model", fail)
    take_notices()
    found = load_streamed(ModelConfig(name_or_path=str(save_tiny_model(tmp_path))), FP32, CPU)
    assert not unread_of(found)
    [said] = take_notices()
    assert said["code"] == "streaming.whole"
    assert "an odd operation" in said["message"]


def test_a_model_whose_code_takes_weights_from_elsewhere_is_read_whole_and_said(tmp_path: Path) -> None:
    from firefly.export.verification import all_logits

    whole, streamed = whole_and_streamed(save_tiny_model(tmp_path, "llama_tied"))
    for model in (whole, streamed):  # as remote code does that has a tied head in its own forward
        head, embedding = model.lm_head, model.model.embed_tokens
        head.forward = lambda hidden, embedding=embedding: torch.nn.functional.linear(hidden, embedding.weight)
        del head._parameters["weight"]
    assert logits(streamed).isnan().all()
    take_notices()
    [found], [expected] = (all_logits(model, IDS.tolist()) for model in (streamed, whole))
    assert torch.equal(found, expected)
    assert [said["code"] for said in take_notices()] == ["streaming.whole"]
