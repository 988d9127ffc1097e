"""Segments in one kernel call, with a stand-in for the kernel: it runs on GPUs alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from firefly.models.kernels import segment_attention, varlen_attention
from firefly.models.kernels.segment_attention import attend
from firefly.segments import Segment
from models.test_segment_attention import (
    SEGMENTS,
    WIDTHS,
    assert_matches,
    naive,
    outputs_and_gradients,
    random_heads,
)
from tiny import apart


def stand_in(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What torch documents of `varlen_attn`: (tokens, heads, width), the mask aligned to the last key."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert window_size[1] == 0
    assert query.shape[2] == key.shape[2] == value.shape[2]  # flash attention knows one width
    assert enable_gqa == (query.shape[1] != key.shape[1])
    lengths = [(cu_seq_q.diff()).tolist(), (cu_seq_k.diff()).tolist()]
    assert [max_q, max_k] == [max(of_one) for of_one in lengths]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    assert [len(query), len(key)] == [sum(of_one) for of_one in lengths]
    pieces = []
    for q, k, v in zip(query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True):
        distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))[None]
        hidden = (distance < 0) | ((distance > window_size[0]) & (window_size[0] >= 0))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        p = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
        pieces.append(torch.einsum("hqk,khd->qhd", p, v))
    return torch.cat(pieces)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The stand-in in the kernel's place, for every query; counts its calls."""
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return stand_in(*args, **kwargs)

    monkeypatch.setattr(varlen_attention, "_kernel", lambda: counted)
    monkeypatch.setattr(segment_attention, "is_supported", lambda query, value: True)
    return calls


@pytest.mark.parametrize("window", [None, 1, 8, 40, 300, 1000])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (3, 1)])
def test_one_call_gives_the_outputs_and_gradients_of_a_masked_softmax(
    window: int | None, heads: int, key_heads: int, kernel: list[int]
) -> None:
    inputs = random_heads(heads, key_heads, SEGMENTS[-1].end)
    found = outputs_and_gradients(attend, inputs, SEGMENTS, 0.3, window)
    assert len(kernel) == 1
    assert_matches(found, outputs_and_gradients(naive, inputs, SEGMENTS, 0.3, window), 1e-5)


@pytest.mark.parametrize(("width", "value_width"), WIDTHS)
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2)])
def test_one_call_takes_values_narrower_or_wider_than_queries(
    width: int, value_width: int, heads: int, key_heads: int, kernel: list[int]
) -> None:
    inputs = random_heads(heads, key_heads, SEGMENTS[-1].end, width, value_width=value_width)
    found = outputs_and_gradients(attend, inputs, SEGMENTS, 0.3, 40)
    assert len(kernel) == 1
    assert found[0].shape == (heads, SEGMENTS[-1].end, value_width)
    assert_matches(found, outputs_and_gradients(naive, inputs, SEGMENTS, 0.3, 40), 1e-5)


def test_segments_without_prefixes_gather_no_keys() -> None:
    layout = varlen_attention.layout_of(apart(0, 3, 10), torch.device("cpu"))
    assert layout.gathering is None
    assert layout.queries.tolist() == layout.keys.tolist() == [0, 3, 10]
    assert (layout.longest_queries, layout.longest_keys) == (7, 7)


def test_a_pair_s_answers_get_the_keys_of_their_prompt() -> None:
    segments = (Segment(0, 4), Segment(4, 6, 0, 4), Segment(6, 9, 0, 3))
    layout = varlen_attention.layout_of(segments, torch.device("cpu"))
    assert layout.queries.tolist() == [0, 4, 6, 9]
    assert layout.keys.tolist() == [0, 4, 10, 16]
    assert layout.gathering is not None
    assert layout.gathering.order.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1, 2, 6, 7, 8]
    assert layout.gathering.own.tolist() == [0, 1, 2, 3, 8, 9, 13, 14, 15]
    again = [(tokens.tolist(), keys.tolist()) for tokens, keys in layout.gathering.shared]
    assert again == [([0, 1, 2, 3], [4, 5, 6, 7]), ([0, 1, 2], [10, 11, 12])]
    assert (layout.longest_queries, layout.longest_keys) == (4, 6)


def test_layers_share_the_layout_of_a_row() -> None:
    segments = apart(0, 5, 9)
    assert varlen_attention.layout_of(segments, torch.device("cpu")) is varlen_attention.layout_of(
        apart(0, 5, 9), torch.device("cpu")
    )


@pytest.mark.parametrize(("softcap", "dropout"), [(2.0, 0.0), (None, 0.3)])
def test_what_the_kernel_lacks_never_reaches_it(softcap: float | None, dropout: float, kernel: list[int]) -> None:
    attend(*random_heads(2, 1, 20), apart(0, 20), 0.3, None, softcap, dropout)
    assert not kernel


@pytest.mark.parametrize(
    ("shape", "value_width", "dtype", "capability", "expected"),
    [
        ((2, 5, 64), 64, torch.bfloat16, (8, 0), True),
        ((2, 5, 64), 64, torch.float16, (9, 0), True),
        ((2, 5, 64), 64, torch.bfloat16, (7, 5), False),
        ((2, 5, 64), 64, torch.float32, (9, 0), False),
        ((2, 5, 320), 320, torch.bfloat16, (9, 0), False),
        ((2, 5, 20), 20, torch.bfloat16, (9, 0), False),
        ((40, 1 << 19, 128), 128, torch.bfloat16, (9, 0), False),
        ((2, 5, 192), 128, torch.bfloat16, (9, 0), True),
        ((2, 5, 64), 320, torch.bfloat16, (9, 0), False),
        ((2, 5, 20), 24, torch.bfloat16, (9, 0), True),
        ((40, 1 << 19, 64), 128, torch.bfloat16, (9, 0), False),
    ],
)
def test_the_kernel_is_taken_for_16_bit_heads_from_sm80_on(
    shape: tuple[int, ...],
    value_width: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = varlen_attention.device_has_kernel.__wrapped__(torch.device("cuda", 0))
    monkeypatch.setattr(varlen_attention, "device_has_kernel", lambda device: found)
    query = torch.empty(shape, dtype=dtype, device="meta")
    value = torch.empty((*shape[:2], value_width), dtype=dtype, device="meta")
    assert varlen_attention.is_supported(query, value) is expected


def test_a_cpu_has_no_such_kernel() -> None:
    query = torch.empty(2, 5, 64, dtype=torch.bfloat16)
    assert not varlen_attention.is_supported(query, query)
    assert varlen_attention._kernel() is not None  # but torch has one to offer


def test_torch_takes_the_arguments_that_we_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real function, up to the operator that only GPUs have."""
    q, k = torch.randn(6, 4, 8), torch.randn(9, 2, 8)
    borders = [torch.tensor(values, dtype=torch.int32) for values in ([0, 2, 6], [0, 2, 9])]
    kernel = varlen_attention._kernel()
    assert kernel is not None
    with pytest.raises((RuntimeError, NotImplementedError), match=r"flash_attention_forward"):
        kernel(q, k, k, *borders, 4, 7, scale=0.3, window_size=(-1, 0), enable_gqa=True)


def test_the_measured_crossover_decides_between_products_and_sdpa() -> None:
    for dtype, most in segment_attention.GEMM_LONGEST.items():
        longest = segment_attention.measure_crossover(4, 1, 64, 4, dtype)
        assert longest in (0, 128, 256, 512, 1024)
        assert longest <= most
    assert segment_attention.measure_crossover(4, 1, 64, 4, torch.float16) == 0


def test_attention_that_takes_no_time_is_not_left_to_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_attention, "_seconds", lambda way, *_: 1 + (way is segment_attention._sdpa))
    assert segment_attention.measure_crossover(4, 2, 8, 8, torch.float32) == 0
    assert segment_attention.measure_crossover(4, 2, 64, 64, torch.float32) == 512


def test_each_length_is_computed_as_the_crossover_says() -> None:
    query = torch.empty(2, 200, 8, dtype=torch.bfloat16)
    assert segment_attention.pick(query, None, None, 0.0, 256) is segment_attention._gemm
    assert segment_attention.pick(query, None, None, 0.0, 128) is segment_attention._sdpa
    assert segment_attention.pick(query, 100, None, 0.0, 128) is segment_attention._gemm
    assert segment_attention.pick(query.float(), None, None, 0.0, 256) is segment_attention._gemm
    assert segment_attention.pick(query.float(), None, None, 0.0, 128) is segment_attention._sdpa
    assert segment_attention.pick(torch.empty(2, 600, 8), None, None, 0.0, 1024) is segment_attention._sdpa
    assert segment_attention.pick(query.half(), None, None, 0.0, 256) is segment_attention._sdpa
