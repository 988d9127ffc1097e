"""Rotary positions in our operations are those of the models' own function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, SmolLM3Config
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as own

from firefly.models.kernels import rotary
from firefly.models.kernels.rotary import install_rotary, rotate
from firefly.models.probing import first_call
from tiny import SHAPE, tiny_model


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


@pytest.mark.parametrize(("name", "taken"), [("llama", 3), ("cohere", 0)])
def test_it_is_taken_where_a_trial_finds_the_same(name: str, taken: int) -> None:
    """Cohere turns neighbours, not halves."""
    assert install_rotary(tiny_model(name)) == taken


def test_another_model_of_the_class_keeps_its_own_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the first one is tried: a forward of the other meets nothing of the trial."""
    patched, other = tiny_model("llama"), tiny_model("llama")
    ids = torch.arange(12)[None] + 3
    expected = other(ids).logits
    functions: list[Any] = []

    def beside(*args: Any) -> Any:
        functions.append(modeling_llama.apply_rotary_pos_emb)
        assert torch.equal(other(ids).logits, expected)
        return first_call(*args)

    def turning_nothing(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return q, k

    monkeypatch.setattr(rotary, "first_call", beside)
    assert install_rotary(patched) == 3
    monkeypatch.setattr(rotary, "rotate", turning_nothing)
    assert not torch.allclose(patched(ids).logits, expected)
    assert torch.equal(other(ids).logits, expected)
    assert functions == [own]
    assert modeling_llama.apply_rotary_pos_emb is own


def test_a_first_layer_that_turns_nothing_hides_no_other() -> None:
    config = SmolLM3Config(**SHAPE, no_rope_layers=[0, 1, 1])
    assert install_rotary(AutoModelForCausalLM.from_config(config)) == 3
