"""Compare measurements of two sides: ratios pair by pair, and whether they did the same work."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from processes import Result

FIRST_LOSS_TOLERANCE = 1e-3
LAST_LOSSES_TOLERANCE = 1e-2
GRADIENT_NORM_TOLERANCE = 1e-3
GRADIENT_NORM_TOLERANCE_BF16 = 3e-2


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(pairs: Sequence[tuple[Result, Result]], name: str) -> dict[str, Any]:
    """Ours over theirs of one rate, within each pair, so that a slow minute of the machine hits both."""
    per_pair = [ours[name] / theirs[name] for ours, theirs in pairs]
    return spread(per_pair) | {"per_pair": per_pair}


def memory(results: Sequence[Result]) -> dict[str, int]:
    """Largest peak of a side's runs, whole and less what its imports had taken."""
    return {
        "peak_rss_bytes": max(r["peak_rss_bytes"] for r in results),
        "peak_less_imports_bytes": max(r["peak_rss_bytes"] - r["rss_after_imports_bytes"] for r in results),
    }


def mean_of_last(losses: Sequence[float]) -> float:
    """Mean loss of the last quarter of the steps."""
    return statistics.fmean(losses[-max(1, len(losses) // 4) :])


def gate(ours: Result, theirs: Result, same_steps: Result | None) -> dict[str, Any]:
    """Check that both sides trained the same thing; a speed may be quoted only when `passed`.

    `theirs` is a run of the tuning compared with. Where it packs, its steps hold other rows than ours, so
    losses are compared through two detours: TRL's loss on our first step's rows before training, and
    `same_steps`, a TRL run without packing whose every step holds our rows (None leaves the last losses
    unchecked).
    """
    checks = theirs["checks"]
    found = {
        "tokens": compare_counts(ours, theirs, "tokens"),
        "target_tokens": compare_counts(ours, theirs, "target_tokens"),
        "our_own_token_counts": {
            "passed": ours["checks"]["input_tokens_agree"] and ours["checks"]["target_tokens_agree"]
        },
        "first_step": compare_losses(
            ours["losses"][0], checks["loss_of_first_rows_before_training"], FIRST_LOSS_TOLERANCE
        ),
        "peer_first_step_against_its_rows_alone": compare_losses(
            checks["first_step_loss"], checks["first_step_loss_row_by_row"], FIRST_LOSS_TOLERANCE
        ),
    }
    if same_steps is not None:
        found["mean_of_last_steps"] = compare_losses(
            mean_of_last(ours["losses"]), mean_of_last(same_steps["losses"]), LAST_LOSSES_TOLERANCE
        )
    return {"passed": all(check["passed"] for check in found.values()), **found}


def preference_gate(ours: Result, theirs: Result, *, same_adapter: bool) -> dict[str, Any]:
    """Check that both sides trained the same pairs alike; a speed may be quoted only when `passed`.

    Every side takes the dump's pairs in order, so losses are of the same pairs step by step. Before training
    policy and reference are equal, and the loss of any pair is ln 2; so the first gradient is compared too, which
    the adapters' random halves decide (`same_adapter`: both started from the same).
    """
    own_counts = {name: value for name, value in ours["checks"].items() if name.endswith("_agree")}
    found = {
        "pairs": compare_counts(ours, theirs, "rows"),
        "tokens": compare_counts(ours, theirs, "tokens"),
        "target_tokens": compare_counts(ours, theirs, "target_tokens"),
        "our_own_counts": own_counts | {"passed": bool(own_counts) and all(own_counts.values())},
        "our_first_step_is_ln_2": compare_losses(ours["losses"][0], math.log(2), FIRST_LOSS_TOLERANCE),
        "their_first_step_is_ln_2": compare_losses(theirs["losses"][0], math.log(2), FIRST_LOSS_TOLERANCE),
        "mean_of_last_steps": compare_losses(
            mean_of_last(ours["losses"]), mean_of_last(theirs["losses"]), LAST_LOSSES_TOLERANCE
        ),
    }
    if same_adapter:
        exact = ours["settings"]["precision"] == theirs["settings"]["precision"] == "float32"
        found["first_gradient_norm"] = compare_losses(
            ours["checks"]["gradient_norms"][0],
            theirs["checks"]["gradient_norms"][0],
            GRADIENT_NORM_TOLERANCE if exact else GRADIENT_NORM_TOLERANCE_BF16,
        )
    return {"passed": all(check["passed"] for check in found.values()), **found}


def compare_losses(ours: float, theirs: float, tolerance: float) -> dict[str, Any]:
    """Relative difference of two losses, or norms, and whether it is small enough."""
    difference = abs(ours - theirs) / abs(theirs)
    return {"ours": ours, "theirs": theirs, "relative": difference, "passed": difference <= tolerance}


def compare_counts(ours: Result, theirs: Result, name: str) -> dict[str, Any]:
    """Whether both sides saw as many."""
    return {"ours": ours[name], "theirs": theirs[name], "passed": ours[name] == theirs[name]}


def version_differences(ours: Result, theirs: Result) -> dict[str, tuple[str, str]]:
    """Name the packages that both sides have in different versions."""
    mine, other = ours["versions"], theirs["versions"]
    return {name: (mine[name], other[name]) for name in mine if name in other and mine[name] != other[name]}
