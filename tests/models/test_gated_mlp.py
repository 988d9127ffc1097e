"""The fused gated block: the same output and gradients as the model's own operations, whatever is trained of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Phi3Config, Qwen2Config, Qwen2MoeConfig

from firefly.models.kernels import dropout, gated_mlp
from firefly.models.kernels.gated_mlp import install_gated_mlps
from firefly.models.kernels.lora_linear import install_lora_kernels
from tiny import drop_as_we_do

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def tiny(config_class: Any = LlamaConfig, **settings: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_class(**SIZES, **settings))


def adapted(model: Any, targets: Any = "all-linear", **settings: Any) -> Any:
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped


def gradients(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Loss and gradients of all that is trained and of the input's embeddings, by name."""
    embedded = model.get_input_embeddings()(x).detach().requires_grad_()
    states = model(inputs_embeds=embedded, output_hidden_states=True).hidden_states[-1]
    loss = (states * torch.linspace(-1, 1, states.numel()).view(states.shape)).sum()
    model.zero_grad()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach(), "input": embedded.grad}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], rel: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert (ours[name] - expected).abs().max() <= rel * expected.abs().max(), name


IDS = torch.arange(75).view(3, 25) * 7 % 64


TARGETS = {
    "lora": "all-linear",
    "lora on attention": ["q_proj"],
    "lora on gate and down": ["gate_proj", "down_proj"],
}


@pytest.mark.parametrize("rows", [512, 16, 75, 74])
@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config, GemmaConfig])
@pytest.mark.parametrize("trained", ["all", *TARGETS])
def test_same_gradients_as_the_block_itself(monkeypatch, config, trained, rows):
    monkeypatch.setattr(gated_mlp, "CPU_ROWS", rows)
    targets = {
        "lora": "all-linear",
        "lora on attention": ["q_proj"],
        "lora on gate and down": ["gate_proj", "down_proj"],
    }
    model = tiny(config) if trained == "all" else adapted(tiny(config), targets[trained])
    fused = copy.deepcopy(model)
    install_lora_kernels(fused)
    assert install_gated_mlps(fused) == 2
    assert_same(gradients(fused, IDS), gradients(model, IDS))


def test_without_its_adapter_it_is_the_base():
    base, wrapped = tiny(), adapted(tiny())
    install_lora_kernels(wrapped)
    install_gated_mlps(wrapped)
    with torch.no_grad(), wrapped.disable_adapter():
        assert torch.allclose(wrapped(IDS).logits, base(IDS).logits, atol=1e-6)


def test_an_adapter_that_adds_nothing_changes_no_bit():
    wrapped = get_peft_model(tiny(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    install_lora_kernels(wrapped)
    install_gated_mlps(wrapped)
    with torch.no_grad():
        on = wrapped(IDS).logits
        with wrapped.disable_adapter():
            assert torch.equal(on, wrapped(IDS).logits)


def test_what_is_kept_is_two_arrays_of_the_inner_width():
    model = adapted(tiny())
    install_lora_kernels(model)
    install_gated_mlps(model)
    kept: list[Tensor] = []
    x = torch.randn(1, 25, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.get_base_model().model.layers[0].mlp(x)
    assert sum(t.shape == (25, 48) for t in kept) == 2


def test_autocast_over_fp32_weights_is_the_block_under_autocast():
    model = tiny()
    fused = copy.deepcopy(model)
    install_gated_mlps(fused)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = gradients(fused, IDS), gradients(model, IDS)
    assert ours["model.layers.0.mlp.up_proj.weight"].dtype == torch.float32
    assert_same(ours, theirs, rel=0.05)


@pytest.mark.parametrize("shape", [(6, 32), (2, 3, 32)], ids=str)
def test_an_output_may_be_changed_in_place(shape: tuple[int, ...]) -> None:
    block = tiny().model.layers[0].mlp
    own = copy.deepcopy(block)
    assert install_gated_mlps(nn.ModuleList([block])) == 1
    x = torch.linspace(-1, 1, 192).view(shape).sin()
    found = []
    for each in (block, own):
        out = each(x)
        out += x
        out.square().sum().backward()
        found.append({name: p.grad for name, p in each.named_parameters()})
    assert_same(*found)


def assert_same_in_training(fused: Any, model: Any) -> dict[str, Tensor]:
    """Return the fused one's gradients, dropout drawn from one seed in both."""
    for each in (model, fused):
        each.train()
    torch.manual_seed(3)
    ours = gradients(fused, IDS)
    torch.manual_seed(3)
    assert_same(ours, gradients(model, IDS))
    return ours


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("chance", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("rows", [16, 32, 80])
def test_dropout_reaches_each_layer_s_adapter(monkeypatch, targets, chance, rows):
    """In one chunk or several, of blocks of points that are smaller than either."""
    monkeypatch.setattr(dropout, "BLOCK", 16)
    monkeypatch.setattr(gated_mlp, "CPU_ROWS", rows)
    model = adapted(tiny(), TARGETS[targets], lora_dropout=chance)
    fused = copy.deepcopy(model)
    drop_as_we_do(model)
    install_gated_mlps(fused)
    install_lora_kernels(fused)
    ours = assert_same_in_training(fused, model)
    assert (gradients(fused, IDS)["loss"] - ours["loss"]).abs() > 1e-4, "drawn anew"


def test_trained_weights_take_all_rows_at_once_and_drop_the_same(monkeypatch):
    """Backward is then in one chunk, where forward was in several."""
    monkeypatch.setattr(dropout, "BLOCK", 16)
    monkeypatch.setattr(gated_mlp, "CPU_ROWS", 16)
    model = adapted(tiny(), lora_dropout=0.3).requires_grad_(True)
    drop_as_we_do(model)
    fused = copy.deepcopy(model)
    install_gated_mlps(fused)
    assert_same_in_training(fused, model)


def test_blocks_of_another_make_keep_their_forward():
    assert install_gated_mlps(tiny(Phi3Config, pad_token_id=0)) == 0  # gate and up are one layer
    assert install_gated_mlps(tiny(mlp_bias=True)) == 0
    assert install_gated_mlps(tiny(hidden_act="relu")) == 0
    model = tiny()
    for layer in model.model.layers:
        layer.mlp.__class__ = type("ScaledMLP", (type(layer.mlp),), {"forward": scaled})
    assert install_gated_mlps(model) == 0


def scaled(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 2


def test_a_shared_expert_is_a_gated_block():
    model = tiny(Qwen2MoeConfig, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=24)
    fused = copy.deepcopy(model)
    assert install_gated_mlps(fused) == 2
    assert_same(gradients(fused, IDS), gradients(model, IDS))
