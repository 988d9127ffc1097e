"""Rotary positions in our operations are those of the models' own function."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as own

from firefly.models.kernels.rotary import NAME, install_rotary
from firefly.models.kernels.rotation import rotate
from tiny import tiny_model


@pytest.fixture(autouse=True)
def own_functions() -> Iterator[None]:
    yield
    for module in (modeling_llama, modeling_cohere):
        setattr(module, NAME, getattr(getattr(module, NAME), "own", getattr(module, NAME)))


def arrays(dtype: torch.dtype, angles: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 11, heads, 8, generator=generator).to(dtype).transpose(1, 2) for heads in (4, 2))
    turned = torch.randn(1, 11, 4, generator=generator).repeat(1, 1, 2)
    return [q.requires_grad_(), k.requires_grad_(), turned.cos().to(angles), turned.sin().to(angles)]


@pytest.mark.parametrize(
    ("dtype", "angles"),
    [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)],
    ids=["fp32", "bf16", "mixed"],
)
def test_outputs_and_gradients_are_those_of_the_models_own_function(dtype: torch.dtype, angles: torch.dtype) -> None:
    inputs = arrays(dtype, angles)
    expected, found = own(*inputs), rotate(*inputs, own(*inputs)[0].dtype)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
    weights = [torch.randn_like(each) for each in expected]
    wanted = [*expected, *torch.autograd.grad(expected, inputs[:2], weights)]
    got = [*found, *torch.autograd.grad(found, inputs[:2], weights)]
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize(("name", "module", "taken"), [("llama", modeling_llama, 1), ("cohere", modeling_cohere, 0)])
def test_it_is_taken_where_a_trial_finds_the_same(name: str, module: Any, taken: int) -> None:
    """Cohere turns neighbours, not halves."""
    assert install_rotary(tiny_model(name)) == taken
    assert hasattr(getattr(module, NAME), "own") is bool(taken)
