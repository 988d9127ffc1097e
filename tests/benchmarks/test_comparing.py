"""Ratios and the gate."""

from __future__ import annotations

import math
from typing import Any

import pytest
from measurements import result


def gate_of(ours: dict[str, Any], theirs: dict[str, Any], **changes: Any) -> dict[str, Any]:
    from cases import Thresholds
    from comparing import gate

    return gate(ours, theirs, theirs, task="sft", thresholds=Thresholds(), **changes)


def failed(found: dict[str, Any]) -> set[str]:
    return {name for name, check in found.items() if name != "passed" and not check["passed"]}


def test_ratio_is_the_median_of_the_ratios_within_each_pair() -> None:
    from comparing import ratios

    rates = ((2, 1), (9, 3), (4, 4))
    pairs = [(result(rows_per_second=ours), result(rows_per_second=theirs)) for ours, theirs in rates]
    assert ratios(pairs, "rows_per_second") == {"median": 2, "min": 1, "max": 3, "per_pair": [2, 3, 1]}


def test_memory_is_the_largest_peak_less_what_imports_took() -> None:
    from comparing import memory

    runs = [result(), result(peak_memory_bytes=700, memory_after_imports_bytes=450)]
    assert memory(runs) == {"peak_bytes": 700, "peak_less_imports_bytes": 300}


def test_gate_passes_equal_work() -> None:
    assert gate_of(result(), result())["passed"]


@pytest.mark.parametrize(
    ("check", "theirs"),
    [
        ("tokens", {"tokens": 101}),
        ("target_tokens", {"target_tokens": 61}),
        ("rows", {"rows": 7}),
        ("first_loss", {"losses": [2.01, 1.8, 1.6, 1.4]}),
        ("mean_of_last_losses", {"losses": [2.0, 1.8, 1.6, 1.43]}),
        ("first_gradient_norm", {"checks": {"gradient_norms": [3.01]}}),
        (
            "peer_first_step_against_its_rows_alone",
            {"checks": {"gradient_norms": [3.0], "first_step_loss_row_by_row": 2.1}},
        ),
    ],
)
def test_gate_names_what_differs(check: str, theirs: dict[str, Any]) -> None:
    found = gate_of(result(), result(**theirs))
    assert not found["passed"]
    assert failed(found) == {check}


def test_gate_fails_when_our_own_counts_are_not_the_dump_s() -> None:
    ours = result(checks={"gradient_norms": [3.0], "input_tokens_agree": False})
    assert failed(gate_of(ours, result())) == {"our_own_counts"}


def test_gate_allows_rounding_where_a_side_computes_in_16_bit() -> None:
    ours = result(settings={"precision": "bfloat16"})
    assert gate_of(ours, result(checks={"gradient_norms": [3.05]}))["passed"]


def test_pairs_begin_at_ln_2() -> None:
    from cases import Thresholds
    from comparing import gate

    found = gate(result(), result(), result(), task="dpo", thresholds=Thresholds())
    assert failed(found) == {"first_loss_is_ln_2"}


def test_short_runs_are_marked() -> None:
    from reporting import too_short_to_publish

    long = [(result(), result())] * 3
    assert too_short_to_publish(long) == []
    assert "2 pairs" in too_short_to_publish(long[:2])[0]
    assert "9 s" in too_short_to_publish([(result(steady_seconds=9.0), result())] * 3)[0]


def test_rounding_in_16_bit_may_move_the_first_loss() -> None:
    half = {"settings": {"precision": "bfloat16"}}
    assert gate_of(result(**half), result(**half, losses=[2.004, 1.8, 1.6, 1.4]))["passed"]
    assert failed(gate_of(result(**half), result(**half, losses=[2.01, 1.8, 1.6, 1.4]))) == {"first_loss"}


@pytest.mark.parametrize(("steps", "apart", "passes"), [(5, 0.06, True), (5, 0.08, False), (101, 0.02, False)])
def test_rounding_may_set_the_mean_loss_of_pairs_apart_by_what_their_number_leaves_of_it(
    steps: int, apart: float, passes: bool
) -> None:
    """Of 4 pairs a step: 3 * 0.1 / sqrt(16) is 0.075 nats, 3 * 0.1 / sqrt(400) is 0.015."""
    from cases import Thresholds
    from comparing import gate

    half = {"settings": {"precision": "bfloat16"}, "rows": 4 * steps}
    losses = [math.log(2), *[0.6, 0.7] * (steps // 2)]
    ours, theirs = result(**half, losses=losses), result(**half, losses=[losses[0], *(x + apart for x in losses[1:])])
    found = gate(ours, theirs, theirs, task="dpo", thresholds=Thresholds())
    assert found["passed"] == passes
    assert failed(found) == (set() if passes else {"mean_of_losses_behind_the_first"})
