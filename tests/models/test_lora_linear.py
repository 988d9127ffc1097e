"""The fused LoRA layer against peft's own forward, and which layers get an adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from firefly.config import AdapterConfig
from firefly.models.adapters import ALL_LINEAR, attach_adapter, count_parameters, target_layers
from firefly.models.kernels.lora_linear import install_lora_kernels
from tiny import assert_same, drop_as_we_do, gradients, random_examples, tiny_model

INNER, OUTER = 64, 48


class OneLayer(nn.Module):
    """The least that peft wraps: its input passes a trained layer first, so that gradients have to go through."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.before = nn.Linear(INNER, INNER)
        self.layer = nn.Linear(INNER, OUTER, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.before(x)))


def quantized(model: OneLayer) -> OneLayer:
    """The same with the layer in NF4 (its columns divide the block of 64)."""
    import bitsandbytes

    plain = model.layer
    layer = bitsandbytes.nn.Linear4bit(
        INNER,
        OUTER,
        bias=plain.bias is not None,
        compute_dtype=plain.weight.dtype,
        quant_type="nf4",
        compress_statistics=True,
    )
    layer.load_state_dict(plain.state_dict())
    model.layer = layer
    return model.to("cpu")


def wrap(model: nn.Module, dropout: float = 0.0, **settings: Any) -> Any:
    options = {"r": 4, "lora_alpha": 6, "lora_dropout": dropout, "target_modules": ["layer"]} | settings
    wrapped = get_peft_model(model, LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
            elif "before" in name:
                parameter.requires_grad_(True)
    return wrapped


def make_layer(
    bias: bool, dtype: torch.dtype, four_bit: bool, dropout: float = 0.0, **settings: Any
) -> tuple[Any, Any]:
    """(ours, peft's own): the same layer twice."""
    torch.manual_seed(0)
    model = OneLayer(bias).to(dtype)
    theirs = wrap(quantized(model) if four_bit else model, dropout, **settings)
    ours = copy.deepcopy(theirs)
    ours.installed = install_lora_kernels(ours)
    drop_as_we_do(theirs)
    return ours, theirs


def run(model: Any, x: Tensor, checkpointed: bool = False) -> dict[str, Tensor]:
    """Output and every gradient, dropout drawn from one seed."""
    model.zero_grad()
    torch.manual_seed(1)
    out = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    (out.float() * weights).sum().backward()
    return {"output": out.detach()} | gradients(model)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 7, INNER, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("four_bit", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("dropout", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fused_layer_has_the_output_and_gradients_of_peft(
    dtype: torch.dtype, bias: bool, dropout: float, four_bit: bool, checkpointed: bool
) -> None:
    ours, theirs = make_layer(bias, dtype, four_bit, dropout)
    assert ours.installed == 1
    found, expected = run(ours, inputs(dtype), checkpointed), run(theirs, inputs(dtype))
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == expected[name].dtype for name in expected)
    assert "base_model.model.layer.lora_A.default.weight" in found
    assert found["base_model.model.layer.lora_A.default.weight"].dtype == torch.float32
    exact = dtype == torch.float32
    assert_same(
        {name: x.float() for name, x in found.items()},
        {name: x.float() for name, x in expected.items()},
        1e-5 if exact else 3e-2,
    )


@pytest.mark.parametrize("four_bit", [False, True], ids=["dense", "nf4"])
def test_the_adapter_of_these_tests_matters(four_bit: bool) -> None:
    ours, _ = make_layer(True, torch.float32, four_bit)
    with_adapter = ours(inputs())
    with ours.disable_adapter():
        assert (ours(inputs()) - with_adapter).abs().max() > 0.05


def test_dropout_draws_anew_in_training_and_rests_in_evaluation() -> None:
    ours, theirs = make_layer(True, torch.float32, four_bit=False, dropout=0.5)
    assert not torch.equal(ours(inputs()), ours(inputs()))
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(inputs()), theirs(inputs()), rtol=0, atol=1e-6)


@contextmanager
def disabled(model: Any) -> Iterator[None]:
    with model.disable_adapter():
        yield


@pytest.mark.parametrize("four_bit", [False, True], ids=["dense", "nf4"])
def test_a_disabled_adapter_leaves_the_base_layer(four_bit: bool) -> None:
    ours, theirs = make_layer(True, torch.float32, four_bit)
    with disabled(ours), disabled(theirs):
        base = theirs.get_base_model()
        expected = base.layer.get_base_layer()(torch.tanh(base.before(inputs())))
        torch.testing.assert_close(ours(inputs()), expected)
        torch.testing.assert_close(theirs(inputs()), expected)


def test_a_merged_layer_and_a_second_adapter_are_left_to_peft() -> None:
    ours, theirs = make_layer(True, torch.float32, four_bit=False)
    expected = theirs(inputs())
    ours.merge_adapter()
    torch.testing.assert_close(ours(inputs()), expected, rtol=1e-5, atol=1e-5)
    ours.unmerge_adapter()
    for model in (ours, theirs):
        torch.manual_seed(3)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "other"])
    both = theirs(inputs())
    assert (both - expected).abs().max() > 1e-3
    torch.testing.assert_close(ours(inputs()), both, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_variants_keep_the_forward_of_peft(settings: dict[str, Any]) -> None:
    ours, theirs = make_layer(True, torch.float32, four_bit=False, **settings)
    assert ours.installed == 0
    assert_same(run(ours, inputs()), run(theirs, inputs()), 1e-6)


def test_under_autocast_a_layer_computes_in_16_bit_and_keeps_fp32_gradients() -> None:
    ours, theirs = make_layer(True, torch.float32, four_bit=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = run(ours, inputs()), run(theirs, inputs())
    assert found["output"].dtype == expected["output"].dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for name, x in found.items() if name != "output")
    assert_same({n: x.float() for n, x in found.items()}, {n: x.float() for n, x in expected.items()}, 3e-2)


def test_a_4_bit_weight_is_not_kept_in_16_bit_for_the_backward_pass() -> None:
    ours, _ = make_layer(False, torch.float32, four_bit=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        ours.get_base_model().layer(inputs())
    assert kept
    assert (OUTER, INNER) not in kept


# ---- which layers ----

ROUTERS = ("gate", "wg", "router", "shared_expert_gate")
PROJECTIONS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", PROJECTIONS),
        ("llama_tied", PROJECTIONS),
        ("phi3", ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]),
        ("gpt_neox", ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]),
        ("bloom", ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]),
        ("gpt2", ["c_attn", "c_fc", "c_proj"]),
    ],
)
def test_every_linear_layer_but_the_head_gets_an_adapter(name: str, expected: list[str]) -> None:
    model = tiny_model(name)
    assert target_layers(model, ALL_LINEAR) == expected
    wrapped = attach_adapter(model, AdapterConfig(mode="lora", rank=2))
    adapted = {path for path, module in wrapped.get_base_model().named_modules() if hasattr(module, "lora_A")}
    linear = {path for path, module in tiny_model(name).named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    assert adapted == linear - {"lm_head"}


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss", "hunyuan_moe"])
def test_routers_and_shared_gates_get_no_adapter(name: str) -> None:
    wrapped = attach_adapter(tiny_model(name), AdapterConfig(mode="lora", rank=2))
    adapted = [path for path, module in wrapped.named_modules() if hasattr(module, "lora_A")]
    assert any(path.endswith("q_proj") for path in adapted)
    assert not [path for path in adapted if path.rpartition(".")[2] in (*ROUTERS, "lm_head")]


def test_a_layer_that_shares_its_name_with_the_head_is_told_apart_by_its_path() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.lm_head = nn.Linear(32, 32)
    targets = target_layers(model, ALL_LINEAR)
    assert "model.layers.0.mlp.lm_head" in targets
    assert "lm_head" not in targets
    wrapped = attach_adapter(model, AdapterConfig(mode="lora", rank=2))
    assert not hasattr(wrapped.get_base_model().lm_head, "lora_A")


def test_only_adapters_train_and_their_masters_are_fp32() -> None:
    wrapped = attach_adapter(tiny_model("llama").bfloat16(), AdapterConfig(mode="lora", rank=2))
    trainable = {name: p.dtype for name, p in wrapped.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert set(trainable.values()) == {torch.float32}
    assert {p.dtype for p in wrapped.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_a_fresh_adapter_changes_nothing() -> None:
    model = tiny_model("llama")
    ids = torch.from_numpy(random_examples(20)[0].input_ids).long()[None]
    with torch.no_grad():
        before = model(ids).logits
        torch.testing.assert_close(attach_adapter(model, AdapterConfig(mode="lora"))(ids).logits, before)


def test_parameters_are_counted_as_the_numbers_they_stand_for() -> None:
    torch.manual_seed(0)
    model = quantized(OneLayer(bias=True))
    whole = INNER * INNER + INNER + OUTER * INNER + OUTER
    assert count_parameters(model)[1] == whole
    assert count_parameters(wrap(model))[1] == whole + 4 * (INNER + OUTER)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_an_output_may_be_changed_in_place(bias: bool, shape: tuple[int, ...]) -> None:
    """Gemma3n adds to its projections' outputs, Llama4 to its shared experts'."""
    ours, theirs = make_layer(bias, torch.float32, four_bit=False)
    x = torch.randn(*shape, INNER)
    found = []
    for model in (ours, theirs):
        out = model(x)
        out *= 2
        out += 1
        out.square().sum().backward()
        found.append(gradients(model))
    assert_same(found[0], found[1], 1e-5)
