"""Liger's own kernels, on CPU arrays under Triton's interpreter: the results of the models' own modules.

`test_liger.py` runs this file in a process of its own, since TRITON_INTERPRET has to be set before Triton is imported
and must not reach other tests.
"""

from __future__ import annotations

import copy
import os
import sys
from typing import Any

import liger_kernel.ops.geglu
import liger_kernel.ops.rms_norm
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from triton.runtime import interpreter

from firefly.models.attention import choose_layout
from firefly.models.kernels import elementwise, liger, rotary
from firefly.models.kernels.gated_mlp import ACTIVATIONS, Gate, install_gated_mlps
from firefly.models.kernels.rms_norm import install_rms_norms
from firefly.models.kernels.rotary import NAME, install_rotary
from firefly.models.probing import decoder
from firefly.segments import Segment
from tiny import assert_same, gradients, tiny_model, with_our_lora

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_liger.py"

BY_NAME = {phi.name: phi for phi in ACTIVATIONS}

# ---- what Triton's interpreter lacks (seen in 3.7.1 and 3.9.0); `test_the_interpreter_still_needs_help` tells when not


@triton.jit
def rsqrt_of_tl(x):
    return tl.math.rsqrt(x)


@triton.jit
def tanh_of_tl(x):
    return 2 * tl.sigmoid(2 * x) - 1


OWN_CVT = interpreter._implicit_cvt


def cvt_with_floats(value: Any) -> Any:
    """On a GPU a float argument is a fp32 scalar; the interpreter hands on Python's float, which has no `.to`."""
    if isinstance(value, float):
        return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
    return OWN_CVT(value)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    # libdevice's functions return None there: https://github.com/triton-lang/triton/issues/8825
    monkeypatch.setattr(liger_kernel.ops.rms_norm, "rsqrt", rsqrt_of_tl)
    monkeypatch.setattr(liger_kernel.ops.geglu, "tanh", tanh_of_tl)
    monkeypatch.setattr(interpreter, "_implicit_cvt", cvt_with_floats)
    monkeypatch.setattr(elementwise, "is_cuda_device", lambda device: True)
    for module in (elementwise, rotary):  # its arithmetic in bf16 is wrong: the bits are multiplied as integers
        monkeypatch.setattr(module, "has_bf16", lambda device: False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each of Liger's functions ran."""
    counted = dict.fromkeys(("gated", "gated_backward", "rms_norm", "rotate"), 0)

    def counting(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            counted[name] += 1
            return function(*args)

        return call

    assert elementwise.implementation(torch.device("cpu")) == "liger"  # whose trial is not counted
    for name in counted:
        monkeypatch.setattr(liger, name, counting(name, getattr(liger, name)))
    return counted


def test_the_interpreter_still_needs_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this fails, remove what stands above from this file."""
    monkeypatch.setattr(interpreter, "_implicit_cvt", OWN_CVT)
    with pytest.raises(interpreter.InterpreterError):
        liger.gated("silu", torch.ones(1, 4), torch.ones(1, 4))


# ---- the choice ----


def test_the_trial_passes_and_names_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    assert elementwise.trial(device) is None
    own = liger.rotate
    monkeypatch.setattr(liger, "rotate", lambda q, k, cos, sin, dtype: own(q, k, cos, -sin, dtype))
    assert elementwise.trial(device) == "rotary positions in torch.float32 differs"
    monkeypatch.setattr(liger, "rms_norm", lambda x, w, eps, offset, wide: nn.functional.rms_norm(x, w.shape, w))
    assert elementwise.trial(device) == "RMS norm of Gemma in torch.float32 differs"
    backward = liger.gated_backward
    monkeypatch.setattr(liger, "gated_backward", lambda *args: backward(*args)[::-1])
    assert elementwise.trial(device) == "SwiGLU in torch.float32 differs"


# ---- gates ----


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("spend", [False, True])
def test_a_gate_is_pytorchs(kind: str, dtype: torch.dtype, spend: bool) -> None:
    plain = Gate(BY_NAME[kind], liger=False)
    g, u, grad = (numbers(5, 50, seed=seed).to(dtype) for seed in range(3))
    kept = g.clone(), u.clone()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        Gate(BY_NAME[kind], liger=True).forward(g, u), plain.forward(g, u), rtol=tolerance, atol=tolerance
    )
    product, value = plain.recomputed(g, u, True)
    expected = plain.backward(g, u, grad.clone(), value, spend)
    again, value = Gate(BY_NAME[kind], liger=True).recomputed(g, u, True)
    torch.testing.assert_close(again, product, rtol=tolerance, atol=tolerance)
    found = Gate(BY_NAME[kind], liger=True).backward(g, u, grad.clone(), value, spend)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(g, kept[0]) is torch.equal(u, kept[1]) is not spend


@pytest.mark.parametrize("how", ["plain", "non-reentrant", "reentrant"])
def test_backward_may_run_twice(calls: dict[str, int], how: str) -> None:
    model = with_our_lora(tiny_model("llama"))
    fused = copy.deepcopy(model)
    install_gated_mlps(fused)
    x = numbers(1, 20, 32)
    found = []
    for each in (model, fused):
        mlp = each.get_base_model().model.layers[0].mlp
        leaf = x.clone().requires_grad_()
        out = mlp(leaf) if how == "plain" else checkpoint(mlp, leaf, use_reentrant=how == "reentrant")
        loss = (out * numbers(*out.shape, seed=1)).sum()
        passes = []
        for retain in (True, True, False):
            each.zero_grad()
            leaf.grad = None
            loss.backward(retain_graph=retain)
            passes.append(gradients(each) | {"x": leaf.grad.clone()})
        for later in passes[1:]:
            assert_same(later, passes[0], 0)
        found.append(passes[0])
    assert_same(found[1], found[0], 1e-5)
    assert calls["gated_backward"] >= 3


# ---- norms ----


@pytest.mark.parametrize("norm_class", [LlamaRMSNorm, GptOssRMSNorm, Gemma2RMSNorm])
@pytest.mark.parametrize("shape", [(1, 7, 24), (2, 3, 5, 24)])
@pytest.mark.parametrize("trained", [True, False])
def test_a_norm_is_the_models_own(
    calls: dict[str, int], monkeypatch: pytest.MonkeyPatch, norm_class: Any, shape: tuple[int, ...], trained: bool
) -> None:
    weight_gradients = []
    backward = liger_kernel.ops.rms_norm.rms_norm_backward

    def spy(*args: Any, **kwargs: Any) -> Any:
        found = backward(*args, **kwargs)
        weight_gradients.append(found[1])
        return found

    monkeypatch.setattr(liger_kernel.ops.rms_norm, "rms_norm_backward", spy)
    norm = norm_class(24, eps=1e-5)
    with torch.no_grad():
        norm.weight.add_(torch.linspace(-0.7, 0.9, 24))
    norm.requires_grad_(trained)
    ours = copy.deepcopy(norm)
    assert install_rms_norms(ours) == 1
    results = []
    for each in (ours, norm):
        x = numbers(*shape).requires_grad_()
        out = each(x)
        above = numbers(*shape, seed=1)  # the residual stream's gradient, too: nothing may write into it
        out.backward(above)
        assert torch.equal(above, numbers(*shape, seed=1))
        results.append([out, x.grad, *([each.weight.grad] if trained else [])])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    assert calls["rms_norm"] == 1
    assert (weight_gradients[0] is not None) is trained


@pytest.mark.parametrize("norm_class", [LlamaRMSNorm, GptOssRMSNorm, Gemma2RMSNorm])
@pytest.mark.parametrize(
    ("x_type", "weight_type"),
    [(torch.float16, torch.float16), (torch.float16, torch.float32), (torch.float32, torch.float16)],
)
def test_a_norm_gives_the_type_of_the_models_own(
    norm_class: Any, x_type: torch.dtype, weight_type: torch.dtype
) -> None:
    norm = norm_class(24).to(weight_type)
    ours = copy.deepcopy(norm)
    install_rms_norms(ours)
    x = numbers(1, 7, 24).to(x_type)
    torch.testing.assert_close(ours(x), norm(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("norm_class", [LlamaRMSNorm, GptOssRMSNorm, Gemma2RMSNorm])
def test_a_norm_rounds_where_the_models_own_does(norm_class: Any) -> None:
    """Llama rounds before it scales, the others after: a quarter of the numbers tell them apart in 16 bit."""
    norm = norm_class(24).half()
    with torch.no_grad():
        norm.weight.add_(torch.linspace(-0.7, 0.9, 24))
    ours = copy.deepcopy(norm)
    install_rms_norms(ours)
    x = numbers(1, 40, 24).half()
    assert (ours(x) == norm(x)).float().mean() > 0.99


# ---- rotary positions ----


def angles(*starts: int, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin (1, tokens, width) of examples of these lengths in one row."""
    positions = torch.cat([torch.arange(length) for length in starts]).float()
    turns = positions[:, None] * 10 ** -torch.linspace(0, 2, width // 2)
    turns = torch.cat((turns, turns), -1)[None]
    return turns.cos(), turns.sin()


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize(("heads", "width"), [((4, 2), 8), ((3, 1), 24), ((2, 2), 2)])
def test_rotation_is_the_models_own_and_writes_into_nothing(
    contiguous: bool, heads: tuple[int, int], width: int
) -> None:
    cos, sin = angles(5, 9, width=width)
    results = []
    for turn in (lambda *args: liger.rotate(*args, torch.float32), apply_rotary_pos_emb):
        leaves = [numbers(1, 14, count, width, seed=count).requires_grad_() for count in heads]
        q, k = (leaf.transpose(1, 2) for leaf in leaves)
        if contiguous:
            q, k = q.contiguous(), k.contiguous()
        before = q.detach().clone(), k.detach().clone()
        turned = turn(q, k, cos, sin)
        assert torch.equal(q, before[0])
        assert torch.equal(k, before[1])
        above = [numbers(*out.shape, seed=9).transpose(1, 2).contiguous().transpose(1, 2) for out in turned]
        kept = [each.clone() for each in above]
        torch.autograd.backward(turned, above, retain_graph=True)
        assert all(torch.equal(*pair) for pair in zip(above, kept, strict=True))
        first = [leaf.grad.clone() for leaf in leaves]
        torch.autograd.backward(turned, above)
        torch.testing.assert_close([leaf.grad for leaf in leaves], [2 * each for each in first])
        results.append([*turned, *first])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


ROTARY = {  # the architectures whose own function Liger's kernel may stand for
    "llama": 3,
    "qwen3": 3,
    "gemma2": 3,
    "gemma3": 3,
    "olmo2": 3,
    "minicpm3": 3,  # part of each head, cut out by the attention
    "phi3": 3,
    "cohere": 0,  # neighbours, not halves
    "gpt_neox": 0,  # the function turns a part of each head
    "gpt_oss": 0,  # angles of half the width
    "llama4": 0,  # complex numbers
    "gptj": 0,
    "bloom": 0,
}


@pytest.mark.parametrize(("name", "count"), ROTARY.items())
def test_where_the_kernel_stands_for_the_models_own_function(name: str, count: int) -> None:
    assert install_rotary(tiny_model(name)) == count


@pytest.mark.parametrize("name", ["llama", "olmo2"])
@pytest.mark.parametrize("x_type", [torch.float32, torch.float16])
@pytest.mark.parametrize("angle_type", [torch.float32, torch.float16])
def test_rotation_gives_the_type_of_the_models_own(name: str, x_type: torch.dtype, angle_type: torch.dtype) -> None:
    model = tiny_model(name)
    module = sys.modules[type(model).__module__]
    own = getattr(module, NAME)
    install_rotary(model)
    ours = model.model.layers[0].self_attn.forward.__func__.__globals__[NAME]
    cos, sin = (each.to(angle_type) for each in angles(5, 9, width=8))
    q, k = numbers(1, 4, 14, 8).to(x_type), numbers(1, 2, 14, 8).to(x_type)
    torch.testing.assert_close(ours(q, k, cos, sin), own(q, k, cos, sin), rtol=2e-2, atol=2e-2)


# ---- whole models ----


@pytest.mark.parametrize(
    ("name", "trained"),
    [("llama", "lora"), ("llama", "all"), ("qwen3", "lora"), ("gemma", "all"), ("gemma3", "lora")],
)
def test_a_packed_models_gradients_are_its_own(
    calls: dict[str, int], monkeypatch: pytest.MonkeyPatch, name: str, trained: str
) -> None:
    model: Any = tiny_gemma() if name == "gemma" else tiny_model(name)
    assert choose_layout(model)[0] == "segments"
    model = with_our_lora(model) if trained == "lora" else model.requires_grad_(True)
    fused = copy.deepcopy(model)

    def run(each: Any) -> dict[str, Tensor]:
        whole = each.get_base_model() if trained == "lora" else each
        ids = torch.arange(13)[None] * 7 % 200 + 3
        positions = torch.cat((torch.arange(5), torch.arange(8)))[None]
        segments = (Segment(0, 5), Segment(5, 13))
        states = decoder(whole)(ids, position_ids=positions, segments=segments, use_cache=False).last_hidden_state
        (states * numbers(*states.shape)).sum().backward()
        return gradients(each) | {"states": states.detach()}

    expected = run(model)
    assert not any(calls.values())
    whole = fused.get_base_model() if trained == "lora" else fused
    assert install_gated_mlps(fused) == 3
    assert install_rms_norms(fused) > 0
    assert install_rotary(whole) == 3
    calls.update(dict.fromkeys(calls, 0))
    assert_same(run(fused), expected, 1e-5)
    per_norm = sum(type(module).__name__.endswith("RMSNorm") for module in fused.modules())
    # Twice, as the gradient of the down projection's adapter or weight needs φ(g) ∘ u again.
    assert calls == {"gated": 2 * 3, "gated_backward": 3, "rms_norm": per_norm, "rotate": 3}


def tiny_gemma() -> Any:
    from transformers import AutoModelForCausalLM, GemmaConfig

    from tiny import SHAPE

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GemmaConfig(**SHAPE, head_dim=8, hidden_activation="gelu_pytorch_tanh"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.float().eval()
