"""Two ways to compute an array agree if rounding alone is between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from firefly.models import attention
from firefly.models.probing import agree, attempt, disagreement
from tiny import tiny_model


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_in_another_order_agree(dtype: torch.dtype) -> None:
    x, weight = numbers(16, 512).to(dtype), numbers(512, 32).to(dtype) / 32
    whole = x @ weight
    parts = sum(x[:, i : i + 64] @ weight[i : i + 64] for i in range(0, 512, 64))
    assert agree(parts, whole)
    assert disagreement(whole, whole) == 0
    assert not agree(parts * 1.03, whole)


def test_an_fp32_result_of_16_bit_numbers_is_judged_by_these() -> None:
    exact = numbers(8, 64)
    rounded = exact.bfloat16().float()
    assert not agree(rounded, exact)
    assert agree(rounded, exact, computed=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("other", [F.relu, F.gelu, torch.tanh, lambda x: F.silu(x) * 1.1, lambda x: F.silu(x) + 0.1])
def test_another_form_does_not(other: Any, dtype: torch.dtype) -> None:
    x = numbers(8, 64).to(dtype)
    assert not agree(other(x), F.silu(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_wrong_number_of_a_hundred_is_seen(dtype: torch.dtype) -> None:
    expected = numbers(100).to(dtype)
    found = expected.clone()
    found[17] = -found[17]
    assert not agree(found, expected)


def test_what_is_of_another_kind_never_agrees() -> None:
    x = numbers(4, 4)
    assert not agree(x.bfloat16(), x, computed=torch.bfloat16)
    assert not agree(x[:2], x)
    assert not agree(x * float("nan"), x)
    assert not agree(x, x * float("nan"))
    assert not agree(x * float("inf"), x * float("inf"))
    assert not agree(None, x)
    assert not agree((x,), x)
    assert agree(None, None)
    assert not agree(x, torch.zeros_like(x))
    assert agree(torch.zeros_like(x), torch.zeros_like(x))


def test_a_scale_allows_as_many_tolerances() -> None:
    x = torch.ones(16)
    assert not agree(x + 3e-4, x)
    assert agree(x + 3e-4, x, scale=5)
    assert not agree(x + 3e-5, x, scale=0.1)


def test_a_refusal_is_an_answer_and_out_of_memory_is_none() -> None:
    def fail(error: BaseException) -> Any:
        raise error

    assert attempt(lambda: 3) == 3
    for refusal in (TypeError("takes 2 arguments"), RuntimeError("shapes"), KeyError("cache"), NotImplementedError()):
        assert attempt(lambda refusal=refusal: fail(refusal)) is None
    for other in (torch.OutOfMemoryError(), KeyboardInterrupt(), OSError("No space left on device")):
        with pytest.raises(type(other)):
            attempt(lambda other=other: fail(other))


def test_out_of_memory_while_probing_says_nothing_of_an_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(attention, "attend", full)
    with pytest.raises(torch.OutOfMemoryError):
        attention.choose_layout(tiny_model("llama"))
