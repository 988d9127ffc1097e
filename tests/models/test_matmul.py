"""The small products of adapters, and casts that are kept for a step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from firefly.models.kernels.matmul import casts_kept, in_type, scaled_matmul, wide_matmul


def master() -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))


def test_a_master_is_cast_once_a_step_and_anew_in_the_next() -> None:
    a = master()
    with casts_kept([a]):
        first = in_type(a, torch.bfloat16)
        assert in_type(a, torch.bfloat16) is first
    a.data.add_(1)  # as an optimizer that goes past autograd's version counter
    with casts_kept([a]):
        assert torch.equal(in_type(a, torch.bfloat16), a.detach().bfloat16())


def test_outside_of_a_step_nothing_is_kept() -> None:
    a = master()
    first = in_type(a, torch.bfloat16)
    a.data.add_(1)
    assert not torch.equal(in_type(a, torch.bfloat16), first)
    assert in_type(a, torch.float32) is a


def test_numbers_that_take_a_master_s_place_within_a_step_are_cast_themselves() -> None:
    a = master()
    with casts_kept([a]):
        trained = in_type(a, torch.bfloat16)
        own, a.data = a.data, torch.zeros(3, 4)
        assert not in_type(a, torch.bfloat16).any()
        a.data = own
        assert torch.equal(in_type(a, torch.bfloat16), trained)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("given", [False, True])
def test_products_are_what_they_are_called(scale: float, given: bool) -> None:
    left, right = torch.randn(5, 3), torch.randn(3, 2)
    out = torch.full((5, 2), torch.nan) if given else None
    found = scaled_matmul(left, right, scale, out=out)
    assert out is None or found is out
    torch.testing.assert_close(found, scale * (left @ right))
    assert wide_matmul(left.bfloat16(), right.bfloat16(), torch.float32).dtype == torch.float32
