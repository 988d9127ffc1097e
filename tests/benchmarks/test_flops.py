"""Necessary FLOPs against numbers computed by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

SMOLLM2 = SimpleNamespace(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    vocab_size=49152,
)
# A layer of one 2 → 3 linear, twice; a 2 → 5 head: N = 12, N_h = 10, and rank-1 adapters have 2 · (2 + 3) = 10.
SMALL = {"layers": 2, "linears": ((2, 3),), "head": (2, 5)}


def test_shape_is_read_from_a_configuration() -> None:
    from flops import shape_of

    shape = shape_of(SMOLLM2)
    layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536
    assert shape.body == 30 * layer == 106_168_320
    assert shape.head_parameters == 576 * 49152 == 28_311_552
    assert shape.adapter(16) == 30 * 16 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536)) == 4_884_480


@pytest.mark.parametrize(
    ("task", "mode", "checkpointing", "expected"),
    [
        ("sft", "full", False, 7 * 6 * 12 + 4 * 6 * 10),
        ("sft", "full", True, 7 * 8 * 12 + 4 * 6 * 10),
        ("sft", "lora", False, 7 * (4 * 12 + 6 * 10) + 4 * 4 * 10),
        ("sft", "qlora", True, 7 * (6 * 12 + 8 * 10) + 4 * 4 * 10),
        ("dpo", "lora", False, 7 * (6 * 12 + 6 * 10) + 4 * 6 * 10),
    ],
)
def test_flops_are_those_of_the_formulas(task: str, mode: str, checkpointing: bool, expected: int) -> None:
    from flops import Shape, Tokens, necessary_flops

    tokens = Tokens(computed=7, targets=4)
    found = necessary_flops(Shape(**SMALL), tokens, task=task, mode=mode, rank=1, checkpointing=checkpointing)
    assert found == expected


def test_flops_per_token_of_the_model_on_the_cpu_are_those_written_down() -> None:
    """511 to 567 MFLOP a token with half and with all tokens trained (the range of the arithmetic's own notes)."""
    from flops import Tokens, necessary_flops, shape_of

    def per_token(targets: int) -> float:
        tokens = Tokens(computed=2, targets=targets)
        return necessary_flops(shape_of(SMOLLM2), tokens, task="sft", mode="lora", rank=16, checkpointing=False) / 2

    assert per_token(1) / 1e6 == pytest.approx(510.6, abs=0.1)
    assert per_token(2) / 1e6 == pytest.approx(567.2, abs=0.1)


def test_what_need_not_be_computed_twice_counts_once_and_a_rows_first_token_is_no_target() -> None:
    from flops import Tokens, tokens_of

    pair: dict[str, Any] = {"prompt_ids": [1] * 5, "chosen_ids": [2] * 3, "rejected_ids": [3] * 4}
    assert tokens_of("dpo", [pair], 1) == Tokens(computed=12, targets=7)
    row: dict[str, Any] = {"input_ids": [1, 2, 3, 4], "labels": [1, -100, 3, 4]}
    assert tokens_of("sft", [row], 1) == Tokens(computed=4, targets=2)
    alike = [{"input_ids": [*range(20), last], "labels": [*range(20), last]} for last in (20, 30, 40)]
    assert tokens_of("sft", alike, 3) == Tokens(computed=21 + 1 + 1, targets=60)
    assert tokens_of("sft", alike, 2) == Tokens(computed=21 + 1 + 21, targets=60)
