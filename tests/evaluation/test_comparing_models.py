"""A report says what two measurements differ in, and no more than their rows allow."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from firefly.data.schema import Message
from firefly.evaluation.comparing import Material, compare_measurements, pair_losses
from firefly.evaluation.measurement import GivenAnswer, Measurement, Question, RowLoss
from firefly.evaluation.report import JudgeResult

ROWS = 60


def losses(mean: float, seed: int = 0, spread: float = 0.3, source: str = "rows", count: int = ROWS) -> list[RowLoss]:
    """Rows of unlike lengths, whose losses for each token lie around `mean`. One seed: the same rows."""
    generator = np.random.default_rng(seed)
    targets = generator.integers(5, 80, count)
    difficulty = generator.normal(0, spread, count)
    return [
        RowLoss(f"{source}.jsonl:{n + 1}", source, float(targets[n] * (mean + difficulty[n])), int(targets[n]), 4)
        for n in range(count)
    ]


def measured(
    held_out: list[RowLoss] | None = None, texts: list[RowLoss] | None = None, answers: tuple[GivenAnswer, ...] = ()
) -> Measurement:
    return Measurement(
        "model",
        losses=None if held_out is None else tuple(held_out),
        probe_losses=None if texts is None else tuple(texts),
        answers=answers,
    )


NOTHING = Material(())


def test_lower_losses_are_better_and_the_sentence_gives_both() -> None:
    report = compare_measurements(NOTHING, measured(losses(2.0)), measured(losses(1.2)))
    assert report.learnt == "better"
    overall = report.losses[0]
    assert overall.difference.high < 0
    assert (report.won, report.lost, report.tied) == (ROWS, 0, 0)
    assert f"from {overall.base:.3f} to {overall.tuned:.3f}" in str(report.verdicts[0])


def test_higher_losses_are_worse_and_the_worst_rows_come_first() -> None:
    report = compare_measurements(NOTHING, measured(losses(1.2)), measured(losses(2.0)))
    assert report.learnt == "worse"
    assert str(report.verdicts[0]).startswith("It did harm")
    changes = [change.difference for change in report.worst]
    assert changes == sorted(changes, reverse=True)
    assert len(changes) == 10
    assert report.best == ()


def test_rows_whose_labels_are_shuffled_show_no_difference() -> None:
    generator = np.random.default_rng(3)
    pairs = [(a, b) if generator.random() < 0.5 else (b, a) for a, b in zip(losses(2.0), losses(1.0), strict=True)]
    report = compare_measurements(NOTHING, measured([a for a, _ in pairs]), measured([b for _, b in pairs]))
    assert report.learnt == "no_difference"
    assert "which holds 0" in str(report.verdicts[0])


def test_a_few_rows_are_too_few() -> None:
    report = compare_measurements(NOTHING, measured(losses(2.0, count=3)), measured(losses(1.0, count=3)))
    assert report.learnt == "too_few"
    assert "eval_ratio" in str(report.verdicts[0])


def test_sources_are_compared_one_by_one() -> None:
    base = losses(2.0, source="a") + losses(2.0, source="b")
    tuned = losses(1.0, source="a") + losses(3.0, source="b")
    report = compare_measurements(NOTHING, measured(base), measured(tuned))
    assert [(each.source, each.verdict) for each in report.losses[1:]] == [("a", "better"), ("b", "worse")]
    assert report.losses[0].rows == 2 * ROWS


def test_a_mean_loss_is_the_sum_of_all_losses_over_the_sum_of_all_targets() -> None:
    rows = losses(2.0)
    report = compare_measurements(NOTHING, measured(rows), measured(rows))
    assert report.losses[0].base == pytest.approx(sum(r.total for r in rows) / sum(r.targets for r in rows))
    assert report.tied == ROWS


def test_models_with_other_tokens_are_compared_for_each_byte() -> None:
    ours = losses(2.0)
    theirs = [replace(row, targets=row.targets * 2) for row in losses(1.0)]
    report = compare_measurements(NOTHING, measured(ours), measured(theirs))
    assert report.unit == "byte"
    assert report.losses[0].base == pytest.approx(sum(row.total for row in ours) / sum(row.size for row in ours))
    assert any("byte" in str(note) for note in report.notes)


def test_examples_of_one_row_are_one_observation() -> None:
    first, *_ = losses(2.0)
    twice = pair_losses([first, first], [first, first], "token").finite
    assert len(twice) == 1
    assert twice[0].base == pytest.approx(2 * first.total)


def test_rows_that_one_model_lacks_are_left_out_and_said() -> None:
    found = pair_losses(losses(2.0), losses(1.0)[:-2], "token")
    assert len(found.finite) == ROWS - 2
    assert "2 row(s)" in str(found.notes[0])


def test_a_model_whose_losses_are_no_numbers_has_become_worse() -> None:
    broken = [replace(row, total=float("nan")) if n == 5 else row for n, row in enumerate(losses(1.0))]
    report = compare_measurements(NOTHING, measured(losses(2.0)), measured(broken))
    assert report.learnt == "worse"
    assert any("infinite or not a number" in str(note) for note in report.notes)


# ---- forgetting


def probe(number: int) -> Question:
    return Question(
        f"probe/{number}", "probe", (Message.of("user", f"Question {number}?"),), accepted=(f"answer{number}",)
    )


PROBES = tuple(probe(number) for number in range(40))


def answered(right: int) -> tuple[GivenAnswer, ...]:
    return tuple(
        GivenAnswer(each.key, each.accepted[0] if number < right else "no idea", 3, "stop")
        for number, each in enumerate(PROBES)
    )


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.0, "kept"), (1.02, "kept"), (0.9, "kept"), (1.2, "forgot"), (1.05, "unclear")]
)
def test_forgetting_is_judged_by_the_loss_on_general_texts(factor: float, verdict: str) -> None:
    before = losses(2.5, count=24)
    after = [replace(row, total=row.total * factor * (1 + 0.01 * (n % 3 - 1))) for n, row in enumerate(before)]
    report = compare_measurements(NOTHING, measured(texts=before), measured(texts=after))
    assert report.forgetting is not None
    assert report.forgetting.verdict == verdict
    assert report.learnt is None


def test_questions_that_are_no_longer_answered_are_forgotten() -> None:
    same = losses(2.5, count=24)
    first, second = measured(texts=same, answers=answered(30)), measured(texts=same, answers=answered(8))
    report = compare_measurements(Material(PROBES), first, second)
    assert report.forgetting is not None
    assert report.forgetting.verdict == "forgot"
    assert report.forgetting.lost == tuple(f"probe/{number}" for number in range(8, 30))
    assert "8 of 40 general questions" in str(report.verdicts[0])


def test_answers_stand_side_by_side_with_what_is_right() -> None:
    report = compare_measurements(Material(PROBES), measured(answers=answered(2)), measured(answers=answered(1)))
    assert [row.correct for row in report.side_by_side[:3]] == [(True, True), (True, False), (False, False)]
    assert report.as_dict()["side_by_side"][0]["question"] == "Question 0?"


def test_pairs_are_compared_by_how_often_the_better_answer_is_likelier() -> None:
    base = [replace(row, prefers=n % 2 == 0) for n, row in enumerate(losses(2.0))]
    tuned = [replace(row, prefers=True) for row in losses(2.0)]
    report = compare_measurements(NOTHING, measured(base), measured(tuned))
    (measure,) = [each for each in report.answers if each.name == "prefers"]
    assert (measure.base, measure.tuned, measure.verdict) == (0.5, 1.0, "better")


def test_of_a_model_that_was_still_thinking_nobody_can_tell_what_it_knows() -> None:
    thinking = tuple(GivenAnswer(each.key, "<think> Let me see", 24, "length") for each in PROBES)
    same = losses(2.5, count=24)
    first, second = measured(texts=same, answers=answered(30)), measured(texts=same, answers=thinking)
    report = compare_measurements(Material(PROBES), first, second)
    assert report.forgetting is not None
    assert report.forgetting.correct is None
    assert report.forgetting.verdict == "kept"


def test_who_knew_nothing_has_nothing_to_keep() -> None:
    report = compare_measurements(Material(PROBES), measured(answers=answered(2)), measured(answers=answered(2)))
    assert report.forgetting is not None
    assert report.forgetting.verdict == "unclear"


def test_of_probes_alone_nobody_can_tell_whether_it_helped() -> None:
    vote = JudgeResult("judge", "http://judge", (), None, "better")
    same = measured(answers=answered(20))
    assert compare_measurements(Material(PROBES), same, same, vote).learnt is None


def test_answers_that_are_missing_are_said() -> None:
    asked = [replace(each, kind="held_out", reference="x") for each in PROBES[:4]]
    good = [GivenAnswer(each.key, "x", 1, "stop") for each in asked]
    bad = [GivenAnswer(each.key, "", error="busy") for each in asked[:3]]
    report = compare_measurements(
        Material(tuple(asked)), measured(answers=tuple(good)), measured(answers=(*bad, good[3]))
    )
    assert any("0 of 4 of the base, 3 of the tuned" in str(note) for note in report.notes)
