"""The attention kernels against a masked softmax in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from firefly.models.kernels import segment_attention
from firefly.models.kernels.segment_attention import BLOCKS, GEMM_LONGEST, SDPA_BLOCK, attend
from firefly.segments import Segment
from tiny import apart

BLOCK = max(blocks.whole for blocks in BLOCKS.values())
END = 60 + 3 * BLOCK + 9
SEGMENTS = (
    *apart(0, 1, 8, 17, 18, 60, 60 + BLOCK, END),  # the last of several blocks by matmuls
    # Two pairs: an answer behind the beginning of the segment before it.
    *(Segment(END, END + 50), Segment(END + 50, END + 70, END, END + 30)),
    *(Segment(END + 70, END + BLOCK), Segment(END + BLOCK, END + BLOCK + SDPA_BLOCK + 5, END + 70, END + 71)),
)
KERNELS = ["_gemm", "_sdpa", "_plain"]
WIDTHS = [(12, 8), (8, 12), (24, 16)]
"""Of queries and of values: DeepSeek-V2 and V3, MiniCPM3 and LongCat have them narrower (192 and 128)."""


def naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The definition, one mask of tokens × tokens."""
    groups = query.shape[0] // key.shape[0]
    query, key, value = (
        query.double(),
        key.double().repeat_interleave(groups, 0),
        value.double().repeat_interleave(groups, 0),
    )
    tokens = query.shape[1]
    visible = torch.zeros(tokens, tokens, dtype=torch.bool)
    for start, end, prefix_start, prefix_end in segments:
        seen = [*range(prefix_start, prefix_end), *range(start, end)]
        for number, token in enumerate(range(start, end), prefix_end - prefix_start):
            visible[token, seen[max(0, number + 1 - (window or tokens)) : number + 1]] = True
    scores = query @ key.transpose(1, 2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1) @ value


def random_heads(
    heads: int,
    key_heads: int,
    tokens: int,
    width: int = 8,
    dtype: torch.dtype = torch.float32,
    value_width: int | None = None,
) -> list[Tensor]:
    """Query, key, value as a model hands them over: views of (tokens, heads, width)."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, heads, width), (tokens, key_heads, width), (tokens, key_heads, value_width or width)]
    made = [2 * torch.randn(shape, generator=generator) for shape in shapes]
    return [x.to(dtype).transpose(0, 1).requires_grad_() for x in made]


def outputs_and_gradients(function: Any, inputs: list[Tensor], *args: Any) -> list[Tensor]:
    out = function(*inputs, *args)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def assert_matches(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, one, other in zip(("output", "query", "key", "value"), found, expected, strict=True):
        size = max(1, other.abs().max().item())
        torch.testing.assert_close(
            one.double(), other.double(), rtol=0, atol=tolerance * size, msg=lambda m, n=name: f"{n}: {m}"
        )


def use_kernel(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    chosen = getattr(segment_attention, kernel)
    monkeypatch.setattr(segment_attention, "pick", lambda *_: chosen)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", [None, 1, 8, 40, BLOCK, 1000])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (3, 1)])
def test_a_kernel_gives_the_outputs_and_gradients_of_a_masked_softmax(
    kernel: str, window: int | None, heads: int, key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_kernel(monkeypatch, kernel)
    inputs = random_heads(heads, key_heads, SEGMENTS[-1].end)
    found = outputs_and_gradients(attend, inputs, SEGMENTS, 0.3, window)
    expected = outputs_and_gradients(naive, inputs, SEGMENTS, 0.3, window)
    assert_matches(found, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize(("width", "value_width"), WIDTHS)
def test_values_may_be_narrower_or_wider_than_queries(
    width: int, value_width: int, key_heads: int, kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_kernel(monkeypatch, kernel)
    scale, tolerance = width**-0.5 / 2, 1e-5 if dtype == torch.float32 else 3e-2
    inputs = random_heads(4, key_heads, SEGMENTS[-1].end, width, dtype, value_width)
    for window in (None, 40):
        found = outputs_and_gradients(attend, inputs, SEGMENTS, scale, window)
        assert found[0].shape == (4, SEGMENTS[-1].end, value_width)
        assert_matches(found, outputs_and_gradients(naive, inputs, SEGMENTS, scale, window), tolerance)


@pytest.mark.parametrize("window", [None, 5, 400])
def test_soft_caps_bend_the_scores_before_the_softmax(window: int | None) -> None:
    segments = SEGMENTS
    inputs = random_heads(4, 2, segments[-1].end)
    found = outputs_and_gradients(attend, inputs, segments, 0.5, window, 1.5)
    assert_matches(found, outputs_and_gradients(naive, inputs, segments, 0.5, window, 1.5), 1e-5)
    uncapped = naive(*inputs, segments, 0.5, window)
    assert (found[0] - uncapped).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 30])
def test_whatever_is_picked_by_itself_is_the_same_attention(dtype: torch.dtype, window: int | None) -> None:
    longest = GEMM_LONGEST[dtype]
    segments = (*apart(0, 100, 100 + longest + 10), Segment(110 + longest, 150 + longest, 0, 60))
    inputs = random_heads(2, 1, segments[-1].end, dtype=dtype)
    found = outputs_and_gradients(attend, inputs, segments, 0.35, window)
    expected = outputs_and_gradients(naive, inputs, segments, 0.35, window)
    assert_matches(found, expected, 1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_in_bf16_stays_near_float64(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernel(monkeypatch, kernel)
    segments = SEGMENTS
    for window in (None, 16):
        inputs = random_heads(4, 2, segments[-1].end, dtype=torch.bfloat16)
        found = outputs_and_gradients(attend, inputs, segments, 0.35, window)
        assert all(x.dtype == torch.bfloat16 for x in found)
        assert_matches(found, outputs_and_gradients(naive, inputs, segments, 0.35, window), 3e-2)


def test_a_segment_is_blind_to_every_other_one() -> None:
    segments = apart(0, 9, 20, 31)
    query, key, value = random_heads(4, 2, 31)
    before = attend(query, key, value, segments, 0.3)
    with torch.no_grad():
        for x in (query, key, value):
            x[:, 9:20] += 5
    after = attend(query, key, value, segments, 0.3)
    assert torch.equal(before[:, :9], after[:, :9])
    assert torch.equal(before[:, 20:], after[:, 20:])
    assert not torch.allclose(before[:, 9:20], after[:, 9:20])


def test_dropout_zeroes_a_share_of_the_probabilities_and_keeps_their_sum_on_average() -> None:
    length = 200
    query, key, _ = random_heads(2, 2, length)
    value = torch.ones(2, length, 1)
    torch.manual_seed(0)
    dropped = attend(query, key, value, apart(0, length), 0.3, dropout=0.5)
    assert dropped.std() > 0.1
    assert dropped.mean().item() == pytest.approx(1, abs=0.1)
