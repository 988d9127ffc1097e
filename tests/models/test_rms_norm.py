"""Our RMS norm: the output and gradients of the model's own, in every form that models have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from firefly.models.kernels.rms_norm import install_rms_norms
from tiny import tiny_model

OWN = [LlamaRMSNorm, Qwen3RMSNorm, GptOssRMSNorm, Gemma2RMSNorm]


def pair(norm_class: Any, weight_type: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """(a norm of the model's, the same with our forward)."""
    norm = norm_class(24, eps=1e-5).to(weight_type)
    with torch.no_grad():
        norm.weight.add_(torch.linspace(-0.7, 0.9, 24))
    ours = copy.deepcopy(norm)
    assert install_rms_norms(ours) == 1
    return norm, ours


def run(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = norm(x)
    (out.float() * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum().backward()
    assert x.grad is not None
    return out, x.grad, norm.weight.grad  # type: ignore[return-value]


@pytest.mark.parametrize("norm_class", OWN)
@pytest.mark.parametrize("shape", [(1, 7, 24), (2, 3, 5, 24)])
def test_output_and_gradients_are_the_models_own(norm_class: Any, shape: tuple[int, ...]) -> None:
    own, ours = pair(norm_class, torch.float32)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for found, expected in zip(run(ours, x), run(own, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm_class", OWN)
@pytest.mark.parametrize(("weights", "states"), [("bfloat16",) * 2, ("float32", "bfloat16"), ("float32",) * 2])
def test_types_are_the_models_own(norm_class: Any, weights: str, states: str) -> None:
    own, ours = pair(norm_class, getattr(torch, weights))
    x = torch.randn((1, 7, 24), generator=torch.Generator().manual_seed(0)).to(getattr(torch, states))
    for found, expected in zip(run(ours, x), run(own, x), strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found.float(), expected.float(), rtol=2e-2, atol=2e-2)


def test_rows_of_zeros_and_huge_ones_stay_finite() -> None:
    _, ours = pair(LlamaRMSNorm, torch.float32)
    x = torch.stack([torch.zeros(24), torch.full((24,), 1e15)])[None]
    assert all(part.isfinite().all() for part in run(ours, x))


def test_only_the_input_is_kept() -> None:
    _, ours = pair(LlamaRMSNorm, torch.float32)
    kept: list[Tensor] = []
    x = torch.randn(1, 50, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(x)
    assert sum(t.numel() for t in kept) == x.numel() + 50 + 24


@pytest.mark.parametrize(
    ("name", "count"), [("llama", 7), ("qwen3", 13), ("gemma3", 19), ("bloom", 0), ("gpt_neox", 0)]
)
def test_norms_of_real_architectures(name: str, count: int) -> None:
    assert install_rms_norms(tiny_model(name)) == count


def test_a_norm_of_another_make_keeps_its_forward() -> None:
    class HalvingRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) / 2

    assert install_rms_norms(HalvingRMSNorm(24)) == 0
