"""Intervals cover the truth 95 times of 100, and verdicts respect them."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binom, multinomial
from scipy.stats import t as student

from firefly.evaluation.intervals import (
    LEAST_ROWS,
    Estimate,
    _student,
    decide,
    loss_change,
    mean_change,
    relative_change,
    share,
)

Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, ...]]


def lengths(random: np.random.Generator, rows: int, spread: float = 0.8) -> np.ndarray:
    """Targets of rows: a median of 55, the longest some hundreds."""
    return np.maximum(1, np.round(np.exp(random.normal(4, spread, rows))))


def even_gain(random: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """Each row gains a share of its loss; short rows lose more a token."""
    units = lengths(random, rows)
    base = units * np.exp(random.normal(0.6, 0.5, rows)) * (units / 55) ** -0.3
    return base, base * random.normal(0.9, 0.15, rows), units


def unlike_lengths(random: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    units = lengths(random, rows, 1.2)
    base = units * np.exp(random.normal(0.6, 0.5, rows)) * (units / 55) ** -0.3
    return base, base * random.normal(0.9, 0.15, rows), units


def heavy_tails(random: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """Losses a token change by Student's distribution with 3 degrees, and independently of the length."""
    units = lengths(random, rows)
    base = units * 3
    return base, base + units * (0.2 * random.standard_t(3, rows) - 0.05), units


def preference_pairs(random: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """One loss a pair, skewed."""
    base = np.full(rows, math.log(2))
    return base, random.exponential(0.6, rows), np.ones(rows)


def points(random: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """A score of 100 of answers, of which all change."""
    return random.beta(2, 3, rows) * 100, random.beta(3, 3, rows) * 100


def few_points(random: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """A score of answers, of which three of ten change."""
    base = random.beta(2, 3, rows) * 100
    return base, np.where(random.random(rows) < 0.3, random.beta(3, 3, rows) * 100, base)


METHODS: dict[Draw, Callable[..., Estimate]] = {
    even_gain: loss_change,
    unlike_lengths: loss_change,
    heavy_tails: loss_change,
    preference_pairs: loss_change,
    points: mean_change,
    few_points: mean_change,
}


def covered(draw: Draw, method: Callable[..., Estimate], truth: float, rows: int, draws: int, seed: int) -> float:
    random = np.random.default_rng(seed)
    found = [method(*draw(random, rows)) for _ in range(draws)]
    return sum(one.low <= truth <= one.high for one in found) / draws


def true_change(draw: Draw, method: Callable[..., Estimate]) -> float:
    columns = draw(np.random.default_rng(99), 2_000_000)
    totals = [column.sum() for column in columns]
    if method is relative_change:
        return totals[1] / totals[0] - 1
    return (totals[1] - totals[0]) / (totals[2] if len(totals) == 3 else len(columns[0]))


@pytest.mark.slow
@pytest.mark.parametrize("draw", METHODS, ids=lambda draw: draw.__name__)
def test_intervals_cover_the_truth_95_times_of_100(draw: Draw) -> None:
    truth = true_change(draw, METHODS[draw])
    found = {rows: covered(draw, METHODS[draw], truth, rows, 1000, rows) for rows in (LEAST_ROWS, 20, 60)}
    found[400] = covered(draw, METHODS[draw], truth, 400, 300, 400)
    print(draw.__name__, {rows: f"{part:.1%}" for rows, part in found.items()})
    # 1000 draws tell a share of 95 % to 1.4 points, 300 to 2.5.
    assert all(0.93 - 0.014 <= found[rows] <= 0.97 + 0.014 for rows in (LEAST_ROWS, 20, 60)), found
    assert 0.925 <= found[400] <= 0.98, found


@pytest.mark.slow
def test_intervals_of_a_relative_change_cover_the_truth() -> None:
    def both(random: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
        return even_gain(random, rows)[:2]

    truth = true_change(both, relative_change)
    found = [covered(both, relative_change, truth, rows, 1000, rows) for rows in (LEAST_ROWS, 60)]
    assert all(0.93 - 0.014 <= part <= 0.97 + 0.014 for part in found), found


@pytest.mark.slow
def test_rows_that_were_not_drawn_are_not_covered() -> None:
    # The limit that the module names: a tenth of all rows becomes much worse, the others a little better.
    def rare_harm(random: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
        units = lengths(random, rows)
        harmed = random.random(rows) < 0.1
        change = np.where(harmed, random.exponential(1.0, rows), random.normal(-0.15, 0.1, rows))
        return 3 * units, units * (3 + change), units

    truth = true_change(rare_harm, loss_change)
    found = [covered(rare_harm, loss_change, truth, rows, 500, rows) for rows in (12, 150)]
    print([f"{part:.1%}" for part in found])
    assert 0.7 < found[0] < 0.85 < found[1] < 0.95


def test_intervals_of_20_rows_cover_the_truth() -> None:
    truth = true_change(even_gain, loss_change)
    assert covered(even_gain, loss_change, truth, 20, 300, 5) == pytest.approx(0.95, abs=0.02 + 0.013)


@pytest.mark.parametrize("rows", [LEAST_ROWS, 20, 60])
def test_intervals_of_outcomes_cover_the_truth(rows: int) -> None:
    # Exactly, over all that may be drawn; where few outcomes change, more than 95 of 100 cannot be avoided.
    drawn = [(lost, gained) for lost in range(rows + 1) for gained in range(rows + 1 - lost)]
    found = []
    for lost, gained in drawn:
        base = [1.0] * lost + [0.0] * (rows - lost)
        tuned = [0.0] * lost + [1.0] * gained + [0.0] * (rows - lost - gained)
        found.append(mean_change(base, tuned))
    counts = np.array([(lost, gained, rows - lost - gained) for lost, gained in drawn])
    for lose, gain in itertools.product((0, 0.02, 0.1, 0.3, 0.49), repeat=2):
        likely = multinomial.pmf(counts, rows, [lose, gain, 1 - lose - gain])
        inside = [one.low <= gain - lose <= one.high for one in found]
        assert likely[inside].sum() >= 0.9296, (lose, gain)
        if lose + gain > 0.9:
            assert likely[inside].sum() <= 0.97


@pytest.mark.parametrize("rows", [LEAST_ROWS, 25, 100])
def test_intervals_of_a_share_cover_the_truth(rows: int) -> None:
    found = [share([1.0] * won + [0.0] * (rows - won)) for won in range(rows + 1)]
    for truth in (0.5, 0.6, 0.75, 0.9):
        inside = [one.low <= truth <= one.high for one in found]
        assert binom.pmf(range(rows + 1), rows, truth)[inside].sum() >= 0.9296, truth


@pytest.mark.parametrize("draw", [even_gain, heavy_tails, points], ids=lambda draw: draw.__name__)
def test_shuffled_labels_make_no_difference(draw: Draw) -> None:
    random, verdicts = np.random.default_rng(4), []
    base, tuned, *units = draw(random, 40)
    for _ in range(300):
        swapped = random.random(40) < 0.5
        change = METHODS[draw](np.where(swapped, tuned, base), np.where(swapped, base, tuned), *units)
        verdicts.append(decide(change, 40, lower_is_better=True))
    assert verdicts.count("no_difference") / 300 == pytest.approx(0.95, abs=0.03)
    assert decide(METHODS[draw](base, base, *units), 40, lower_is_better=True) == "no_difference"


@pytest.mark.parametrize("changed", range(15))
def test_shuffled_labels_of_outcomes_make_no_difference(changed: int) -> None:
    # Of each number of outcomes that differ, over all ways to shuffle them.
    for rows in (15, 60):
        wrong = 0.0
        for lost in range(changed + 1):
            base = [1.0] * lost + [0.0] * (rows - lost)
            tuned = [0.0] * lost + [1.0] * (changed - lost) + [0.0] * (rows - changed)
            if decide(mean_change(base, tuned), rows, lower_is_better=False) != "no_difference":
                wrong += binom.pmf(lost, changed, 0.5)
        assert wrong <= 0.0705


def test_estimates_are_the_ratios_of_sums() -> None:
    base, tuned, units = even_gain(np.random.default_rng(0), 50)
    assert loss_change(base, tuned, units).value == pytest.approx((tuned.sum() - base.sum()) / units.sum())
    assert relative_change(base, tuned).value == pytest.approx(tuned.sum() / base.sum() - 1)
    assert mean_change(base, tuned).value == pytest.approx((tuned - base).mean())
    assert share([1, 0, 0.5, 1]).value == 0.625


def test_an_interval_is_the_same_each_time_and_mirrored_when_models_are_swapped() -> None:
    base, tuned, units = unlike_lengths(np.random.default_rng(0), 30)
    found, swapped = loss_change(base, tuned, units), loss_change(tuned, base, units)
    assert loss_change(base.tolist(), tuned.tolist(), units.tolist()) == found
    np.testing.assert_allclose([-swapped.value, -swapped.high, -swapped.low], [found.value, found.low, found.high])


def test_no_change_in_few_outcomes_is_not_certainty() -> None:
    few, many = mean_change([1] * 10, [1] * 10), mean_change([0] * 1000, [0] * 1000)
    assert (few.value, many.value) == (0, 0)
    assert few.high == -few.low
    assert 0.2 < few.high < 0.3
    assert 0 < many.high < 0.004
    assert mean_change([40.0] * 10, [40.0] * 10).high == pytest.approx(40 * few.high)  # of points, the largest seen
    assert share([0.5] * 10).low > 0.3
    assert share([1] * 10) == Estimate(1.0, pytest.approx(0.741, abs=0.001), 1.0)


def test_four_answers_lost_prove_nothing_and_seven_do() -> None:
    def lost(number: int) -> Estimate:
        return mean_change([1] * 40, [0] * number + [1] * (40 - number))

    assert decide(lost(4), 40, lower_is_better=False) == "no_difference"
    assert decide(lost(7), 40, lower_is_better=False) == "worse"


def test_verdicts_respect_the_interval_and_the_number_of_rows() -> None:
    above, below, around = Estimate(0.2, 0.1, 0.3), Estimate(-0.2, -0.3, -0.1), Estimate(0.2, -0.1, 0.5)
    assert decide(above, 50, lower_is_better=True) == "worse"
    assert decide(above, 50, lower_is_better=False) == "better"
    assert decide(below, 50, lower_is_better=True) == "better"
    assert decide(below, 50, lower_is_better=False) == "worse"
    assert decide(around, 50, lower_is_better=True) == "no_difference"
    assert decide(Estimate(0.0, 0.0, 0.0), 50, lower_is_better=True) == "no_difference"
    assert decide(above, LEAST_ROWS, lower_is_better=True) == "worse"
    assert decide(above, LEAST_ROWS - 1, lower_is_better=True) == "too_few"


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_a_broken_loss_does_not_vanish(broken: float) -> None:
    whole, with_one = [2.0] * 20, [2.0] * 19 + [broken]
    for method in (relative_change, lambda base, tuned: loss_change(base, tuned, [1.0] * 20)):
        worse, better, both = method(whole, with_one), method(with_one, whole), method(with_one, with_one)
        assert (worse.value, better.value) == (math.inf, -math.inf)
        assert decide(worse, 20, lower_is_better=True) == "worse"
        assert decide(better, 20, lower_is_better=True) == "better"
        assert math.isnan(both.value)
        assert decide(both, 20, lower_is_better=True) == "no_difference"
    with pytest.raises(ValueError, match="finite"):
        mean_change(whole, with_one)


def test_what_has_no_rows_has_no_interval() -> None:
    for call in (
        lambda: loss_change([], [], []),
        lambda: relative_change([], []),
        lambda: mean_change([], []),
        lambda: share([]),
        lambda: mean_change([1.0], [1.0, 2.0]),
        lambda: loss_change([0.0, 0.0], [0.0, 0.0], [0, 0]),
    ):
        with pytest.raises(ValueError, match="row"):
            call()


def test_rows_without_a_target_count_for_nothing() -> None:
    base, tuned, units = even_gain(np.random.default_rng(2), 12)
    padded = [np.append(column, [0.0] * 30) for column in (base, tuned, units)]
    assert loss_change(*padded) == loss_change(base, tuned, units)


def test_one_row_and_a_base_without_loss_have_an_answer() -> None:
    assert loss_change([3.0], [4.0], [2]) == Estimate(0.5, -math.inf, math.inf)
    assert mean_change([3.0], [4.5]).value == 1.5
    assert relative_change([0.0, 0.0], [0.0, 0.0]) == Estimate(0.0, 0.0, 0.0)
    assert relative_change([0.0, 0.0], [1.0, 0.0]).low == math.inf
    for rows in range(2, 6):  # resamples of one row over and over say nothing
        found = mean_change([0.1] * rows, np.linspace(0.1, 0.7, rows).tolist())
        assert -10 < found.low < 0.3 < found.high < 10


def test_20000_rows_are_fast() -> None:
    columns = even_gain(np.random.default_rng(0), 20_000)
    started = time.perf_counter()
    found = loss_change(*columns)
    assert time.perf_counter() - started < 5  # a third of a second on an idle core
    assert found.high - found.low < 0.02


def test_students_point_is_near_enough() -> None:
    for freedom in (5, 7, 20, 1000):
        assert _student(freedom) == pytest.approx(student.ppf(0.975, freedom), abs=1e-3)
