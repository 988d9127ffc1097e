"""Who computes by element on which device: the choice and what it leads to, with a stand-in for Liger's kernels."""

from __future__ import annotations

import copy
import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import firefly.models.kernels
from firefly.console import take_notices
from firefly.models.forwards import install_training_forwards
from firefly.models.kernels import elementwise
from firefly.models.kernels.gated_mlp import ACTIVATIONS, Gate, gate_for, install_gated_mlps
from firefly.models.kernels.matmul import graph_is_kept
from firefly.models.kernels.rms_norm import FORMS, RMSNorm, install_rms_norms
from firefly.models.kernels.rotary import NAME, install_rotary
from tiny import assert_same, gradients, tiny_model, with_our_lora

CPU = torch.device("cpu")
SILU, GELU_TANH, GELU = ACTIVATIONS


class StandIn(SimpleNamespace):
    """Liger's functions as `kernels.liger` has them, in PyTorch: with the same places written to, counting calls."""

    GATES = {"silu": SILU, "gelu_tanh": GELU_TANH}  # noqa: RUF012
    WIDEST = 1 << 16

    def __init__(self) -> None:
        super().__init__(calls=[])

    def gated(self, kind: str, g: Tensor, u: Tensor) -> Tensor:
        self.calls.append("gated")
        return Gate(self.GATES[kind], liger=False).forward(g, u)

    def gated_backward(self, kind: str, g: Tensor, u: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append("gated_backward")
        plain = Gate(self.GATES[kind], liger=False)
        grad_g, grad_u = plain.backward(g.clone(), u.clone(), grad.clone(), plain.recomputed(g, u, False)[1], True)
        return g.data.copy_(grad_g), u.data.copy_(grad_u)

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float, offset: float, scales_in_fp32: bool) -> Tensor:
        self.calls.append("rms_norm")
        form = next(form for form in FORMS if form == (offset, scales_in_fp32))
        return RMSNorm.apply(x, weight, epsilon, form).to(x.dtype)  # type: ignore[union-attr]

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        self.calls.append("rotate")
        halves = lambda x: torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)  # noqa: E731
        return tuple((x * cos[:, None] + halves(x) * sin[:, None]).to(dtype) for x in (q, k))


@pytest.fixture(autouse=True)
def fresh() -> Any:
    """No choice is remembered from another test or for one."""
    elementwise._liger_works.cache_clear()
    take_notices()
    yield
    elementwise._liger_works.cache_clear()


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """CPU arrays count as a GPU's, and Liger is there."""
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "firefly.models.kernels.liger", stand_in)  # type: ignore[arg-type]
    monkeypatch.setattr(firefly.models.kernels, "liger", stand_in, raising=False)
    monkeypatch.setattr(elementwise, "is_cuda_device", lambda device: True)
    installed(monkeypatch, True)
    assert elementwise.implementation(CPU) == "liger"
    stand_in.calls.clear()
    return stand_in


def installed(monkeypatch: pytest.MonkeyPatch, is_there: bool) -> None:
    own = importlib.util.find_spec
    found = lambda name, *rest: (object() if is_there else None) if name == "liger_kernel" else own(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", found)


# ---- the choice ----


def test_a_cpu_has_pytorch_whatever_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, True)
    monkeypatch.setattr(elementwise, "trial", lambda device: pytest.fail("nothing is tried on a CPU"))
    assert elementwise.implementation(CPU) == "torch"
    install_training_forwards(tiny_model("llama"))
    assert not gate_for(SILU, CPU, 48).liger


def test_a_gpu_is_what_cuda_calls_one() -> None:
    assert elementwise.is_cuda_device(torch.device("cuda", 1))
    assert not any(elementwise.is_cuda_device(torch.device(name)) for name in ("cpu", "meta", "mps"))


def test_without_liger_a_gpu_has_pytorch_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, False)
    assert elementwise.implementation(torch.device("cuda", 0)) == "torch"
    assert not take_notices()


@pytest.mark.parametrize("fault", ["RMS norm in torch.float32 differs", RuntimeError("no C compiler\n found")])
def test_a_liger_that_fails_its_trial_is_named_once(monkeypatch: pytest.MonkeyPatch, fault: str | Exception) -> None:
    tried = []

    def trial(device: torch.device) -> str:
        tried.append(device)
        if isinstance(fault, Exception):
            raise fault
        return fault

    installed(monkeypatch, True)
    monkeypatch.setattr(elementwise, "trial", trial)
    gpu = torch.device("cuda", 0)
    assert [elementwise.implementation(gpu) for _ in range(3)] == ["torch"] * 3
    assert tried == [gpu]
    (said,) = take_notices()
    assert ("no C compiler found" if isinstance(fault, Exception) else fault) in said["message"]


def test_the_trial_sees_a_wrong_kernel(liger: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    assert elementwise.trial(CPU) is None
    monkeypatch.setattr(liger, "gated", lambda kind, g, u: g * u)
    assert elementwise.trial(CPU) == "SwiGLU in torch.float32 differs"


# ---- gated blocks ----


def test_what_liger_lacks_is_pytorchs(liger: StandIn) -> None:
    assert gate_for(SILU, CPU, 48) == Gate(SILU, liger=True)
    assert gate_for(GELU_TANH, CPU, 1 << 16) == Gate(GELU_TANH, liger=True)
    assert gate_for(GELU, CPU, 48) == Gate(GELU, liger=False)
    assert gate_for(SILU, CPU, (1 << 16) + 1) == Gate(SILU, liger=False)


@pytest.mark.parametrize("gate", [Gate(SILU, liger=False), Gate(SILU, liger=True)])
def test_what_backward_reads_is_whole_afterwards_unless_it_may_be_spent(liger: StandIn, gate: Gate) -> None:
    g, u, grad = torch.randn(3, 4, 5)
    before = g.clone(), u.clone()
    _, value = gate.recomputed(g, u, False)
    expected = gate.backward(g, u, grad.clone(), value, spend=False)
    assert torch.equal(g, before[0])
    assert torch.equal(u, before[1])
    found = gate.backward(g, u, grad.clone(), gate.recomputed(g, u, False)[1], spend=True)
    torch.testing.assert_close(found, expected)
    assert not gate.liger or found[0].data_ptr() == g.data_ptr()


def test_autograd_tells_whether_it_keeps_the_graph() -> None:
    told = []
    x = torch.ones(3, requires_grad=True)
    loss = x.exp().sum()
    x.register_hook(lambda grad: told.append(graph_is_kept()))
    loss.backward(retain_graph=True)
    torch.autograd.grad(loss, x, create_graph=True)
    loss.backward()
    assert told == [True, True, False]


@pytest.mark.parametrize("how", ["none", "retained", "non-reentrant", "reentrant"])
def test_gradients_are_the_blocks_own_and_the_same_again(liger: StandIn, how: str) -> None:
    model = with_our_lora(tiny_model("llama"))
    fused = copy.deepcopy(model)
    assert install_gated_mlps(fused) == 3
    found = []
    for each in (model, fused):
        mlp = each.get_base_model().model.layers[0].mlp
        x = torch.linspace(-1, 1, 320).view(1, 10, 32).requires_grad_()
        passes = []
        again = torch.utils.checkpoint.checkpoint
        out = again(mlp, x, use_reentrant=how == "reentrant") if "reentrant" in how else mlp(x)
        for retain in (False,) if how == "none" else (True, True, False):
            each.zero_grad()
            x.grad = None
            out.backward(torch.ones_like(out), retain_graph=retain)
            assert x.grad is not None
            passes.append(gradients(each) | {"x": x.grad.clone()})
        for later in passes[1:]:
            assert_same(later, passes[0], 0)
        found.append(passes[0])
    assert_same(found[1], found[0], 1e-5)
    assert "gated_backward" in liger.calls


# ---- norms ----


def test_norms_go_to_liger_but_where_it_would_change_the_type(liger: StandIn) -> None:
    norm = LlamaRMSNorm(24)
    own = copy.deepcopy(norm)
    install_rms_norms(norm)
    x = torch.randn(1, 5, 24)
    torch.testing.assert_close(norm(x), own(x))
    assert liger.calls == ["rms_norm"]
    assert norm(x.bfloat16()).dtype == own(x.bfloat16()).dtype == torch.float32
    assert liger.calls == ["rms_norm"]


# ---- rotary positions ----


def test_attention_takes_ligers_rotation_and_only_where_it_fits(liger: StandIn) -> None:
    own = modeling_llama.apply_rotary_pos_emb
    model = tiny_model("llama")
    ids = torch.arange(12)[None] + 3
    expected = model(ids).logits
    assert install_rotary(model) == 3
    ours: Any = model.model.layers[0].self_attn.forward.__func__.__globals__[NAME]
    liger.calls.clear()
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert liger.calls == ["rotate"] * 3
    liger.calls.clear()
    q, k, cos = torch.randn(1, 5, 5, 8), torch.randn(1, 5, 5, 8), torch.randn(1, 5, 8)
    by_tokens = q.transpose(1, 2), k.transpose(1, 2), cos, cos  # of the same shape as by heads
    torch.testing.assert_close(ours(*by_tokens, unsqueeze_dim=2), own(*by_tokens, unsqueeze_dim=2))
    trained = cos.clone().requires_grad_()
    narrow = cos.bfloat16()
    for angles in (trained, narrow):
        torch.testing.assert_close(ours(q, k, angles, angles), own(q, k, angles, angles))
    assert not liger.calls
    ours(q, k, cos, cos)
    assert liger.calls == ["rotate"]


def test_without_a_gpu_the_installed_function_is_the_models_own(
    liger: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    install_rotary(model)
    liger.calls.clear()
    monkeypatch.setattr(elementwise, "is_cuda_device", lambda device: False)
    model(torch.arange(12)[None] + 3)
    assert not liger.calls


def test_a_rotation_that_differs_is_not_installed(liger: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    assert install_rotary(tiny_model("cohere")) == 0  # neighbours, not halves
    right = liger.rotate
    monkeypatch.setattr(liger, "rotate", lambda q, k, cos, sin, dtype: right(q, k, cos, -sin, dtype))
    assert install_rotary(tiny_model("llama")) == 0
