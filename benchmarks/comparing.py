"""Compare measurements of two sides: ratios pair by pair, and whether they did the same work."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from cases import Thresholds
from processes import Result


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
        "peak_bytes": max(r["peak_memory_bytes"] for r in results),
        "peak_less_imports_bytes": max(r["peak_memory_bytes"] - r["memory_after_imports_bytes"] for r in results),
    }


def mean_of_last(losses: Sequence[float]) -> float:
    """Mean loss of the last quarter of the steps."""
    return statistics.fmean(losses[-max(1, len(losses) // 4) :])


def gate(
    ours: Result, theirs: Result, same_steps: Result, *, task: str, thresholds: Thresholds, same_start: bool = True
) -> dict[str, Any]:
    """Check that both sides trained the same thing; a speed may be quoted only when `passed`.

    Args:
        theirs: a run of the tuning compared with. Where it packs or sorts, its steps hold other rows than ours.
        same_steps: a run of the peer whose every step holds our rows; `theirs` itself where it is one.
        same_start: both began with the same adapter, which decides the first gradient.
    """
    exact = ours["settings"]["precision"] == same_steps["settings"]["precision"] == "float32"
    first_loss = thresholds.first_loss if exact else max(thresholds.first_loss, thresholds.first_loss_16_bit)
    own_counts = {name: value for name, value in ours["checks"].items() if name.endswith("_agree")}
    found = {
        "rows": compare_counts(ours, theirs, "rows"),
        "tokens": compare_counts(ours, theirs, "tokens"),
        "target_tokens": compare_counts(ours, theirs, "target_tokens"),
        "our_own_counts": own_counts | {"passed": bool(own_counts) and all(own_counts.values())},
        "first_loss": compare(ours["losses"][0], same_steps["losses"][0], first_loss),
        "first_gradient_norm": compare(
            ours["checks"]["gradient_norms"][0],
            same_steps["checks"]["gradient_norms"][0],
            thresholds.gradient_norm if exact and same_start else thresholds.gradient_norm_16_bit,
        ),
    }
    if task == "dpo" and not exact:
        pairs = round(ours["rows"] * (1 - 1 / len(ours["losses"])))
        found["mean_of_losses_behind_the_first"] = compare_noisy(
            ours["losses"][1:], same_steps["losses"][1:], thresholds.pair_loss_noise_16_bit / math.sqrt(pairs or 1)
        )
    else:
        found["mean_of_last_losses"] = compare(
            mean_of_last(ours["losses"]), mean_of_last(same_steps["losses"]), thresholds.last_losses
        )
    if task == "dpo":
        # Policy and reference are equal before training, whatever the pair.
        found["first_loss_is_ln_2"] = compare(ours["losses"][0], math.log(2), first_loss)
    if (alone := theirs["checks"].get("first_step_loss_row_by_row")) is not None:
        found["peer_first_step_against_its_rows_alone"] = compare(theirs["losses"][0], alone, first_loss)
    return {"passed": all(check["passed"] for check in found.values()), **found}


def compare(ours: float, theirs: float, tolerance: float) -> dict[str, Any]:
    """Relative difference of two losses, or norms, and whether it is small enough."""
    difference = abs(ours - theirs) / abs(theirs) if theirs else math.inf
    return {
        "ours": ours,
        "theirs": theirs,
        "relative": difference,
        "allowed": tolerance,
        "passed": difference <= tolerance,
    }


def compare_noisy(ours: Sequence[float], theirs: Sequence[float], noise: float) -> dict[str, Any]:
    """Whether two means differ by no more than three standard deviations of `noise`, as rounding alone may make them.

    The last quarter, which other losses are compared by, would be one step of four pairs, passed or failed by chance.
    """
    mine, other = (statistics.fmean(losses) if losses else math.nan for losses in (ours, theirs))
    return {
        "ours": mine,
        "theirs": other,
        "difference": abs(mine - other),
        "allowed_difference": 3 * noise,
        "passed": abs(mine - other) <= 3 * noise,
    }


def compare_counts(ours: Result, theirs: Result, name: str) -> dict[str, Any]:
    """Whether both sides saw as many."""
    return {"ours": ours[name], "theirs": theirs[name], "passed": ours[name] == theirs[name]}


def version_differences(ours: Result, theirs: Result) -> dict[str, tuple[str, str]]:
    """Name the packages that both sides have in different versions."""
    mine, other = ours["versions"], theirs["versions"]
    return {name: (mine[name], other[name]) for name in mine if name in other and mine[name] != other[name]}
