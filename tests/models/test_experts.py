"""Experts of a mixture are adapted, quantized and merged as if each were a linear layer of its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from firefly.config import AdapterConfig, ModelConfig
from firefly.data.batching import pack
from firefly.errors import UsageError
from firefly.export.layers import merge_layers
from firefly.export.merge import load_base
from firefly.models import loading
from firefly.models.adapter_loading import load_adapter
from firefly.models.adapters import attach_adapter, count_parameters
from firefly.models.attention import choose_layout
from firefly.models.experts import dequantize_experts, expert_parameters, expert_stacks, quantize_experts
from firefly.models.forwards import install_training_forwards
from firefly.models.kernels import expert_linear
from firefly.models.kernels.expert_linear import QuantizedExperts, expert_factors
from firefly.models.loading import load_model
from firefly.models.precision import Precision
from firefly.models.saved_adapter import open_adapter
from tiny import (
    assert_same,
    gradients,
    random_examples,
    randomise_adapters,
    save_tiny_model,
    tiny_model,
    with_our_lora,
    with_plain_lora,
)

IDS = torch.arange(40)[None] * 7919 % 264
CPU = torch.device("cpu")
KNOWN = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe_window", "deepseek_v3", "hunyuan_moe", "gpt_oss"]
BOTH = ["experts.down_proj", "experts.gate_up_proj"]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    out = model(IDS).logits
    out.square().mean().backward()
    return out.detach(), gradients(model)


@pytest.mark.parametrize("name", [*KNOWN, "llama4"])
def test_experts_are_found_by_their_stacked_weights(name: str) -> None:
    assert expert_parameters(tiny_model(name)) == BOTH


def test_a_dense_model_has_no_experts() -> None:
    assert expert_parameters(tiny_model("llama")) == []


@pytest.mark.parametrize("name", [*KNOWN, "llama4"])
def test_every_expert_and_linear_layer_but_routers_and_the_head_is_adapted(name: str) -> None:
    model = tiny_model(name)
    stacks = {f"{path}.{leaf}" for path, _, leaf in expert_stacks(model)}
    routers = ("gate", "router", "wg", "shared_expert_gate", "lm_head")
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    linear = {path for path in linear if path.rpartition(".")[2] not in routers}
    wrapped = attach_adapter(model, AdapterConfig(mode="lora", rank=2))
    adapted = set()
    for path, module in wrapped.get_base_model().named_modules():
        if not hasattr(module, "lora_A"):
            continue
        assert module.r["default"] == 2
        own = path.replace(".base_layer", "")
        dense = isinstance(module.get_base_layer(), nn.Linear)
        adapted.add(own if dense else f"{own}.{module.parameter_name}")  # type: ignore[operator]
    assert adapted == linear | stacks


@pytest.mark.parametrize("name", [*KNOWN, "llama4"])
def test_logits_and_gradients_are_those_of_peft(name: str) -> None:
    found, expected = step(with_our_lora(tiny_model(name))), step(with_plain_lora(tiny_model(name)))
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    assert_same(found[1], expected[1], 1e-5)


def explicit_experts(experts: Any, factors: dict[str, Any], x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Every token through every expert W + s·B·A, weighted by its share, in one line of algebra each."""

    def full(name: str) -> Tensor:
        a, b, scale = factors[name]
        return getattr(experts, name) + scale * torch.stack([high @ low for low, high in zip(a, b, strict=True)])

    gate, up = torch.einsum("td,eod->teo", x, full("gate_up_proj")).chunk(2, dim=-1)
    out = torch.einsum("tei,eoi->teo", F.silu(gate) * up, full("down_proj"))
    share = torch.zeros(len(x), experts.num_experts).scatter(1, index, weights)
    return torch.einsum("te,teo->to", share, out)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_every_expert_that_is_routed_to_gets_the_gradient_of_its_own_matrices(name: str) -> None:
    wrapped = with_our_lora(tiny_model(name))
    outer = next(module for module in wrapped.modules() if isinstance(module, ParamWrapper))
    wrappers = [outer, outer.base_layer]
    experts: Any = outer.get_base_layer()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 32, generator=generator, requires_grad=True)
    index = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(20)])  # the fourth gets none
    weights = torch.rand(20, 2, generator=generator, requires_grad=True)
    inputs = [x, weights, *(p for p in outer.parameters() if p.requires_grad)]

    found = outer(x, index, weights)
    factors = {wrapper.parameter_name: expert_factors(wrapper) for wrapper in wrappers}
    expected = explicit_experts(experts, factors, x, index, weights)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    direction = torch.randn(found.shape, generator=generator)
    ours, theirs = torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction)
    assert_same(dict(enumerate(ours)), dict(enumerate(theirs)), 1e-5)  # type: ignore[arg-type]
    for wrapper in wrappers:
        gradient = ours[[id(p) for p in inputs].index(id(wrapper.lora_A["default"].weight))].view(4, 4, -1)
        assert (gradient.abs().amax(dim=(1, 2)) > 0).tolist() == [True, True, True, False]


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "hunyuan_moe", "gpt_oss", "llama4"])
def test_a_saved_adapter_gives_the_same_logits_in_plain_peft(name: str, tmp_path: Path) -> None:
    base = tiny_model(name)
    plain = copy.deepcopy(base)
    wrapped = randomise_adapters(attach_adapter(base, AdapterConfig(mode="lora", rank=4, dropout=0.05))).eval()
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    torch.testing.assert_close(logits(loaded), logits(wrapped), rtol=0, atol=1e-5)


def test_a_checkpoint_is_read_into_the_adapter_that_is_there(tmp_path: Path) -> None:
    wrapped = with_our_lora(tiny_model("deepseek_v3"))
    wrapped.save_pretrained(tmp_path)
    fresh = attach_adapter(tiny_model("deepseek_v3"), AdapterConfig(mode="lora", rank=4, alpha=8))
    fresh.load_adapter(str(tmp_path), "default", is_trainable=True)
    found, expected = step(fresh.eval()), step(wrapped)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-6)
    assert_same(found[1], expected[1], 1e-5)


def test_the_reference_without_the_adapter_is_the_base() -> None:
    base = tiny_model("qwen2_moe")
    expected = logits(base)
    wrapped = with_our_lora(base)
    with wrapped.disable_adapter():
        torch.testing.assert_close(logits(wrapped), expected)


def test_dropout_reaches_the_adapters_of_experts() -> None:
    wrapped = attach_adapter(tiny_model("mixtral"), AdapterConfig(mode="lora", rank=4, dropout=0.5))
    randomise_adapters(wrapped)
    outer: Any = next(module for module in wrapped.modules() if isinstance(module, ParamWrapper))
    x, index, weights = torch.randn(20, 32), torch.zeros(20, 1, dtype=torch.long), torch.ones(20, 1)
    one, other = outer.train()(x, index, weights), outer(x, index, weights)
    assert not torch.equal(one, other)
    a, b = outer.eval()(x, index, weights), outer(x, index, weights)
    assert torch.equal(a, b)


def test_experts_without_a_place_for_dropout_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    attach_adapter(tiny_model("llama4"), AdapterConfig(mode="lora", rank=4, dropout=0.05))
    assert "lora_dropout does not apply to 6 stacks of experts" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "llama4"])
def test_merging_adds_every_adapter(name: str) -> None:
    wrapped = with_our_lora(tiny_model(name))
    expected = logits(wrapped)
    merge_layers(wrapped)
    merged = wrapped.unload()
    assert not [path for path, module in merged.named_modules() if hasattr(module, "lora_A")]
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)
    assert (logits(tiny_model(name)) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", KNOWN)
def test_experts_in_4_bit_compute_with_the_numbers_they_stand_for(name: str) -> None:
    model = quantize_experts(tiny_model(name), torch.float32)
    assert all(isinstance(getattr(module, leaf), QuantizedExperts) for _, module, leaf in expert_stacks(model))
    plain = copy.deepcopy(model)
    dequantize_experts(plain, torch.float32)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-5)
    assert count_parameters(model) == count_parameters(plain)
    original = dict(tiny_model(name).named_parameters())
    for path, parameter in plain.named_parameters():
        if path.endswith(tuple(BOTH)):
            assert 0 < (parameter - original[path]).abs().mean() < 0.12 * original[path].abs().mean()
        else:
            assert torch.equal(parameter, original[path])

    found, expected = step(with_our_lora(model)), step(with_plain_lora(plain))
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    assert_same(found[1], expected[1], 1e-5)


def test_4_bit_experts_give_the_same_gradients_under_checkpointing() -> None:
    model = with_our_lora(quantize_experts(tiny_model("qwen2_moe"), torch.float32)).train()
    loss, expected = step(model)
    model.zero_grad()
    model.get_base_model().gradient_checkpointing_enable()
    other_loss, found = step(model)
    torch.testing.assert_close(other_loss, loss, rtol=0, atol=1e-6)
    assert_same(found, expected, 1e-5)


def test_nothing_dequantized_is_kept_for_the_backward_pass() -> None:
    model = with_our_lora(quantize_experts(tiny_model("qwen2_moe"), torch.float32)).train()
    stacks = [getattr(module, leaf).dequantized(torch.float32) for _, module, leaf in expert_stacks(model)]
    matrices = [matrix for stack in stacks for matrix in stack]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        model(IDS)
    assert [x for x in kept if x.dtype == torch.uint8]
    assert not [x for x in kept if any(torch.equal(x, dense) for dense in (*stacks, *matrices))]


def test_an_architecture_whose_experts_stay_in_16_bit_is_refused() -> None:
    with pytest.raises(UsageError, match=r"Llama4TextExperts.* GiB would stay in 16 bit.*train_mode lora"):
        quantize_experts(tiny_model("llama4"), torch.bfloat16)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_are_quantized_as_they_are_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Delete `quantizing_while_loading` when transformers does this itself."""
    folder = save_tiny_model(tmp_path, name)
    with monkeypatch.context() as patched:
        patched.setattr(loading, "quantize_experts", lambda model, compute: model)
        model = load_model(ModelConfig(name_or_path=str(folder)), "qlora", Precision(torch.float32), CPU)
    after = quantize_experts(tiny_model(name), torch.float32)
    expected = {f"{path}.{leaf}": getattr(module, leaf) for path, module, leaf in expert_stacks(after)}
    for path, module, leaf in expert_stacks(model):
        weight = getattr(module, leaf)
        assert isinstance(weight, QuantizedExperts)
        assert torch.equal(weight.data, expected[f"{path}.{leaf}"].data)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_a_qlora_model_is_loaded_trained_saved_and_merged(name: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "base", name)
    config = ModelConfig(name_or_path=str(folder))
    model = load_model(config, "qlora", Precision(torch.float32), CPU)
    _, total = count_parameters(model)
    assert total == count_parameters(tiny_model(name))[1]
    wrapped = with_our_lora(model).eval()
    _, found = step(wrapped)
    assert all(gradient.isfinite().all() for gradient in found.values())
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = logits(wrapped)

    again = load_adapter(load_model(config, "qlora", Precision(torch.float32), CPU), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-6)
    saved = open_adapter(str(tmp_path / "adapter"))
    base = load_base(config, torch.float32, "dequantized", saved)
    assert not [p for p in base.parameters() if p.dtype == torch.uint8]
    dense = load_adapter(base, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(dense), expected, rtol=0, atol=1e-4)
    merge_layers(dense)
    torch.testing.assert_close(logits(dense.unload()), expected, rtol=0, atol=1e-4)
    load_adapter(load_base(config, torch.float32, "original", saved), saved)


def test_experts_without_their_adapters_are_computed_as_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference that is the adapter switched off must not differ from an untrained policy by rounding."""
    inner = tiny_model("mixtral").to(torch.bfloat16)
    choose_layout(inner)
    model = attach_adapter(inner, AdapterConfig(mode="lora", rank=4, alpha=8, dropout=0.0))
    install_training_forwards(model)
    inputs, own, calls = pack(random_examples(30, 21)).model_inputs(), expert_linear.run_experts, []
    monkeypatch.setattr(expert_linear, "run_experts", lambda *args: calls.append(len(args[1])) or own(*args))
    with torch.no_grad():
        policy = model(**inputs, per_token=True)["logps"]
        with model.disable_adapter():
            reference = model(**inputs, per_token=True)["logps"]
    assert calls == [2] * 3 + [0] * 3  # adapters of each layer's experts
    torch.testing.assert_close(policy, reference, rtol=0, atol=0)
