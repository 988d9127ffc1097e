"""How sure a difference between two models is: intervals over rows, and a verdict that respects them.

Rows are what was drawn from the world, so rows are what intervals speak of: each is taken with both of its figures
(paired), whatever its length. Two methods, chosen by what simulations of such rows showed (`tests/evaluation`):

- Sums and means that change in every row: the symmetric studentized bootstrap, whose error in coverage falls with the
  square of the rows (P. Hall, "On symmetric bootstrap confidence intervals", J. R. Statist. Soc. B 50, 1988). Of 12
  rows whose lengths and losses are lognormal, the percentile bootstrap covers the truth 88 times of 100, Student's
  interval 91, this one 95. It is studentized by the jackknife, which knows that one long row weighs much, and is never
  narrower than Student's.
- Outcomes of which most do not change (right or wrong answers, above all): the adjusted Wald interval of D. G. Bonett
  and R. M. Price (J. Educ. Behav. Stat. 37, 2012), which counts one more change in each direction than was seen. So no
  change in 10 answers means "at most 26 of 100", not "none", and four answers lost with none gained prove nothing.

Scores that change in some rows only take the wider of both.

What neither can know are rows that were not drawn: where one row of ten becomes far worse and the others a little
better, or losses spread over orders of magnitude, 12 rows cover the truth 76 to 89 times of 100, 150 rows 91 or 92
times. No method without assumptions can promise more (R. R. Bahadur and L. J. Savage, Ann. Math. Statist. 27, 1956).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Verdict = Literal["better", "worse", "no_difference", "too_few"]
"""Of the tuned model beside the base. "no_difference": the interval holds 0. "too_few": too few rows to say."""

LEAST_ROWS = 8
"""Rows under which nothing is decided: of fewer, a tenth of all draws miss a kind of row that is a quarter of the world
(0.75**8), and no interval speaks of what was not drawn."""
RESAMPLES = 1999
CONFIDENCE = 0.95
NORMAL = 1.959963984540054
"""The 97.5 % point of the normal distribution."""
CELLS = 1 << 17
"""Drawn rows that are computed at a time, unless one resample has more: 1 MB an array, which stays in the cache."""


@dataclass(frozen=True)
class Estimate:
    """A figure, and the interval that covers the true one 95 times of 100."""

    value: float
    low: float
    high: float


def loss_change(base: Sequence[float], tuned: Sequence[float], weights: Sequence[float]) -> Estimate:
    """The change of the mean loss of a unit: Σtuned/Σweights - Σbase/Σweights.

    A loss that is infinite or not a number makes the mean of its model infinite: where only one model has such rows,
    the change is ±inf, and so are both ends of its interval; where both have, it is NaN, between -inf and inf.

    Args:
        base, tuned: the summed loss of each row under both models, nats.
        weights: units of each row: targets, bytes, or 1.

    Raises:
        ValueError: there are no rows, their numbers differ, or no row has a weight.
    """
    first, second, units = _arrays(base, tuned, weights)
    if not units.sum() > 0:
        raise ValueError("rows without a unit have no mean loss")
    return _change_of_sums(first, second, units)


def relative_change(base: Sequence[float], tuned: Sequence[float]) -> Estimate:
    """The change of a summed loss as a share of the base's: Σtuned/Σbase - 1, so 0.05 is five per cent worse.

    Infinite losses count as in `loss_change`. Of a base without any loss the change is 0 or inf.

    Args:
        base, tuned: the summed loss of each row under both models, nats, not below 0.

    Raises:
        ValueError: there are no rows, or their numbers differ.
    """
    first, second = _arrays(base, tuned)
    if first.sum() == 0:
        change = math.inf if second.sum() != 0 else 0.0
        return Estimate(change, change, change)
    return _change_of_sums(first, second, first)


def mean_change(base: Sequence[float], tuned: Sequence[float]) -> Estimate:
    """The mean of tuned - base, of questions that both answered: outcomes (0, 1), points, or counts.

    Raises:
        ValueError: there are none, their numbers differ, or one is not finite.
    """
    first, second = _arrays(base, tuned)
    # What an unseen change would be where none was seen: an outcome's 1, or the largest figure of a score.
    return _mean(second - first, unseen=max(1.0, float(np.abs([first, second]).max())))


def share(values: Sequence[float]) -> Estimate:
    """The mean of outcomes between 0 and 1, a half for a tie: the share of questions that one side wins.

    Raises:
        ValueError: there are none, or one is not finite.
    """
    (outcomes,) = _arrays(values)
    found = _mean(outcomes - 0.5, unseen=0.5)
    return Estimate(0.5 + found.value, max(0.0, 0.5 + found.low), min(1.0, 0.5 + found.high))


def decide(change: Estimate, count: int, lower_is_better: bool) -> Verdict:
    """What a change says of the tuned model.

    Args:
        count: rows, or questions, that it was taken over.
        lower_is_better: as of a loss.
    """
    if count < LEAST_ROWS:
        return "too_few"
    if change.low > 0:
        return "worse" if lower_is_better else "better"
    if change.high < 0:
        return "better" if lower_is_better else "worse"
    return "no_difference"


def _arrays(*columns: Sequence[float]) -> list[np.ndarray]:
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    if not len(arrays[0]) or any(array.shape != arrays[0].shape for array in arrays):
        raise ValueError(f"rows: {[len(array) for array in arrays]}; as many of each are needed, and at least one")
    return arrays


def _change_of_sums(base: np.ndarray, tuned: np.ndarray, weights: np.ndarray) -> Estimate:
    """Σ(tuned - base)/Σweights."""
    if not (np.isfinite(base).all() and np.isfinite(tuned).all()):
        broken = [not np.isfinite(column).all() for column in (base, tuned)]
        if all(broken):
            return Estimate(math.nan, -math.inf, math.inf)
        change = math.inf if broken[1] else -math.inf
        return Estimate(change, change, change)
    difference = tuned - base
    counted = (weights != 0) | (difference != 0)  # a row without a target is no row
    value, width = _studentized(difference[counted], weights[counted])
    return Estimate(value, value - width, value + width)


def _studentized(difference: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Σdifference/Σweights and half the width of its symmetric interval."""
    rows, total = len(difference), weights.sum()
    value = float(difference.sum() / total)
    residuals = difference - value * weights
    if not residuals.any():
        return value, 0.0 if rows > 1 else math.inf
    if rows == 1 or (weights == total).any():  # one row is all that there is
        return value, math.inf

    # Left out, a row moves the ratio by its residual over the other rows' weight.
    of_rows = math.sqrt((rows - 1) / rows * float(np.square(residuals / (total - weights)).sum()))
    random = np.random.default_rng(0)
    distances = np.empty(RESAMPLES)
    together = max(1, CELLS // rows)
    for start in range(0, RESAMPLES, together):
        drawn = random.integers(rows, size=(min(together, RESAMPLES - start), rows), dtype=np.int32)
        of_drawn, others = residuals[drawn], weights[drawn]
        totals = others.sum(axis=1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            moved = of_drawn.sum(axis=1, keepdims=True) / totals
            of_drawn -= moved * others
            of_drawn /= totals - others
            spread = np.sqrt((rows - 1) / rows * np.einsum("ij,ij->i", of_drawn, of_drawn))
            far = np.abs(moved[:, 0]) / spread
        # Where all drawn rows say the same, the spread is rounding: such a resample says nothing.
        distances[start : start + len(drawn)] = np.where(spread > 1e-9 * of_rows, far, 0.0)
    place = math.ceil((RESAMPLES + 1) * CONFIDENCE) - 1
    return value, of_rows * max(float(np.partition(distances, place)[place]), _student(rows - 1))


def _mean(difference: np.ndarray, unseen: float) -> Estimate:
    """The mean of differences; `unseen` is how large one would be, where all are 0."""
    if not np.isfinite(difference).all():
        raise ValueError("figures of answers are finite")
    rows, changed = len(difference), np.abs(difference[difference != 0])
    value = float(difference.mean())
    outcomes = not len(changed) or changed.max() - changed.min() <= 1e-9 * changed.max()  # changes of one size
    width = 0.0 if outcomes else _studentized(difference, np.ones(rows))[1]
    if len(changed) == rows and not outcomes:
        return Estimate(value, value - width, value + width)

    # Bonett and Price: with one more change each way.
    size = math.sqrt(float(np.square(changed).mean())) if len(changed) else unseen
    centre = float(difference.sum()) / (rows + 2)
    variance = (float(np.square(difference).sum()) + 2 * size**2) / (rows + 2) - centre**2
    deviation = math.sqrt(max(variance, 0.0) / (rows + 2))
    if outcomes:
        # Student's point, not the normal one: else 8 of 10 with 2 against would be a difference (exactly, p is 0.11).
        reach = _student(rows + 1) * deviation
        return Estimate(value, max(centre - reach, -size), min(centre + reach, size))
    # Scores of which some did not change: no sample of few tells how far the rare change goes, so the wider one.
    reach = NORMAL * deviation
    return Estimate(value, min(centre - reach, value - width), max(centre + reach, value + width))


def _student(freedom: int) -> float:
    """The 97.5 % point of Student's distribution (Abramowitz and Stegun, 26.7.5), to 0.001 from 5 degrees on."""
    x = NORMAL
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + sum(term / freedom**power for power, term in enumerate(terms, start=1))
