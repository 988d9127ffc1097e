"""Two measurements → a report: what differs, and how sure that is."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from firefly.evaluation.answers import measure_answers, measure_correct
from firefly.evaluation.intervals import (
    LEAST_ROWS,
    Estimate,
    Verdict,
    decide,
    loss_change,
    mean_change,
    relative_change,
)
from firefly.evaluation.measurement import GivenAnswer, Measurement, Question, RowLoss, Unit
from firefly.evaluation.probes import is_right
from firefly.evaluation.report import (
    Forgetting,
    JudgeResult,
    LossComparison,
    Measure,
    Report,
    Retention,
    RowChange,
    Side,
    SideBySide,
    SuspectRow,
)
from firefly.evaluation.sentences import sentences, tells_preferences
from firefly.evaluation.text_metrics import has_text_metrics
from firefly.translation import Phrase

THRESHOLD = 0.05
"""The share by which the loss on general texts may grow before it counts as forgetting."""
TIE = 1e-6
"""Nats by which a row's loss differs at most between two computations of one model."""
SHOWN_ROWS = 10
SAME_SIZE = 0.02
"""The share by which the text of a row may differ in size between two tokenizers: beyond it, one of them was cut."""


@dataclass(frozen=True)
class Material:
    """What both models were asked.

    Attributes:
        threshold: see `Forgetting`.
    """

    questions: tuple[Question, ...]
    threshold: float = THRESHOLD


def compare_measurements(
    material: Material,
    base: Measurement,
    tuned: Measurement,
    judge: JudgeResult | None = None,
    suspects: Sequence[SuspectRow] = (),
    notes: Sequence[Phrase] = (),
) -> Report:
    """What two models said of the same material, side by side.

    Rows and questions are matched by their keys; what one side lacks is left out, and said.
    """
    held_out = pair_losses(base.losses, tuned.losses, base.unit)
    questions = {question.key: question for question in material.questions}
    changes = sorted((row.change(questions) for row in held_out.finite), key=lambda change: change.difference)
    differences = [change.difference for change in changes]
    asked = [question for question in material.questions if question.kind == "held_out"]
    answers = (*measure_preferences(base, tuned), *measure_answers(asked, base.answers, tuned.answers))
    told = (*notes, *held_out.notes, *note_answers(asked, base, tuned))
    if tells_preferences(held_out.unit, answers):
        told += (
            Phrase(
                "of pairs, the loss is that of the better answer, which training on preferences may well raise: "
                "whether it helped is told by how often the better answer is the likelier one."
            ),
        )
    forgetting = find_forgetting(material, base, tuned)
    losses = compare_losses(held_out.finite)
    report = Report(
        base=Side(base.name, base.described, base.seconds),
        tuned=Side(tuned.name, tuned.described, tuned.seconds),
        unit=held_out.unit,
        losses=losses,
        won=sum(difference < -TIE for difference in differences),
        lost=sum(difference > TIE for difference in differences),
        tied=sum(abs(difference) <= TIE for difference in differences),
        worst=tuple(change for change in changes[: -SHOWN_ROWS - 1 : -1] if change.difference > TIE),
        best=tuple(change for change in changes[:SHOWN_ROWS] if change.difference < -TIE),
        answers=answers,
        side_by_side=put_side_by_side(material.questions, base.answers, tuned.answers),
        forgetting=forgetting,
        judge=judge,
        suspects=tuple(suspects),
        broken=held_out.broken,
        notes=told,
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )
    report = replace(report, learnt=judge_learning(report))
    return replace(report, verdicts=tuple(sentences(report)))


# ---- losses


@dataclass(frozen=True)
class PairedRow:
    """The losses of one row under both models, in nats, over the same `weight`."""

    key: str
    source: str
    base: float
    tuned: float
    weight: int

    def change(self, questions: Mapping[str, Question]) -> RowChange:
        question = questions.get(self.key) or questions.get(f"{self.key}#1")
        texts = ("", "") if question is None else (question.shown, question.reference or "")
        return RowChange(self.key, self.source, self.base / self.weight, self.tuned / self.weight, *texts)


@dataclass(frozen=True)
class PairedLosses:
    """Rows that both models have a loss of.

    Attributes:
        finite: those whose losses are numbers.
        broken: rows whose loss is infinite or not a number under base and tuned.
    """

    unit: Unit
    finite: tuple[PairedRow, ...] = ()
    broken: tuple[int, int] = (0, 0)
    notes: tuple[Phrase, ...] = ()


def pair_losses(base: Sequence[RowLoss] | None, tuned: Sequence[RowLoss] | None, unit: Unit) -> PairedLosses:
    """The rows of two measurements, in the order of the first.

    Tokens are the unit where both models have the same number of them in every row, bytes of text where they do not:
    then their tokenizers differ, and a loss for each token would favour the one with shorter tokens.
    """
    if base is None or tuned is None:
        return PairedLosses(unit)
    ours, theirs = rows_by_key(base), rows_by_key(tuned)
    common = [key for key in ours if key in theirs]
    notes: list[Phrase] = []
    if missing := len(ours.keys() ^ theirs.keys()):
        notes.append(
            Phrase(
                "{count} row(s) are left out of the losses: they can be fed to one of the two models only.",
                count=missing,
            )
        )
    weights = {key: (ours[key].targets, theirs[key].targets) for key in common}
    if any(first != second for first, second in weights.values()):
        unit = "byte"
        notes.append(
            Phrase("the models split texts into unlike tokens, so losses are given for each byte of the answers.")
        )
        sizes = {key: (ours[key].size, theirs[key].size) for key in common}
        weights = {key: pair for key, pair in sizes.items() if abs(pair[0] - pair[1]) <= SAME_SIZE * max(pair)}
        if cut := len(common) - len(weights):
            notes.append(
                Phrase("{count} row(s) are left out: one of the models reads less of them than the other.", count=cut)
            )
        common = list(weights)
    rows = [
        PairedRow(key, ours[key].source, ours[key].total, theirs[key].total, weights[key][0])
        for key in common
        if weights[key][0]
    ]
    finite = [row for row in rows if math.isfinite(row.base) and math.isfinite(row.tuned)]
    broken = sum(not math.isfinite(row.base) for row in rows), sum(not math.isfinite(row.tuned) for row in rows)
    if len(finite) < len(rows):
        notes.append(
            Phrase(
                "{count} row(s) are left out of the figures: their loss is infinite or not a number (base: {base}, "
                "tuned: {tuned}).",
                count=len(rows) - len(finite),
                base=broken[0],
                tuned=broken[1],
            )
        )
    return PairedLosses(unit, tuple(finite), broken, tuple(notes))


def rows_by_key(losses: Sequence[RowLoss]) -> dict[str, RowLoss]:
    """The losses of each row, those of its several examples taken together: they are no independent observations."""
    found: dict[str, RowLoss] = {}
    for row in losses:
        before = found.get(row.key)
        if before is not None:
            row = replace(
                row,
                total=before.total + row.total,
                targets=before.targets + row.targets,
                size=before.size + row.size,
            )
        found[row.key] = row
    return found


def compare_losses(rows: Sequence[PairedRow]) -> tuple[LossComparison, ...]:
    """Of all rows and, if there are several sources, of those of each."""
    sources = list(dict.fromkeys(row.source for row in rows))
    groups = {"": list(rows)} if rows else {}
    if len(sources) > 1:
        groups |= {source: [row for row in rows if row.source == source] for source in sources}
    return tuple(_compare_group(source, group) for source, group in groups.items())


def _compare_group(source: str, rows: Sequence[PairedRow]) -> LossComparison:
    base, tuned, weights = [row.base for row in rows], [row.tuned for row in rows], [row.weight for row in rows]
    change = loss_change(base, tuned, weights)
    verdict = decide(change, len(rows), lower_is_better=True)
    return LossComparison(source, len(rows), sum(base) / sum(weights), sum(tuned) / sum(weights), change, verdict)


def measure_preferences(base: Measurement, tuned: Measurement) -> tuple[Measure, ...]:
    """In how many pairs each model finds the better answer likelier; nothing where the rows are no pairs."""
    ours, theirs = ({row.key: row.prefers for row in side.losses or ()} for side in (base, tuned))
    common = [key for key, prefers in ours.items() if prefers is not None and theirs.get(key) is not None]
    if not common:
        return ()
    before, after = ([float(bool(side[key])) for key in common] for side in (ours, theirs))
    change = mean_change(before, after)
    shares = sum(before) / len(common), sum(after) / len(common)
    return (Measure("prefers", len(common), *shares, change, decide(change, len(common), lower_is_better=False)),)


# ---- answers


def note_answers(asked: Sequence[Question], base: Measurement, tuned: Measurement) -> list[Phrase]:
    """What is missing among the answers to held-out questions."""
    notes = []
    keys = {question.key for question in asked}
    failed = [sum(answer.error is not None for answer in side.answers if answer.key in keys) for side in (base, tuned)]
    if any(failed):
        notes.append(
            Phrase(
                "questions without an answer are left out of the figures: {base} of {count} of the base, {tuned} of "
                "the tuned model.",
                base=failed[0],
                tuned=failed[1],
                count=len(keys),
            )
        )
    if any(question.reference for question in asked) and not has_text_metrics():
        notes.append(Phrase("chrF and BLEU are left out: pip install -e '.[eval]' brings them."))
    return notes


def put_side_by_side(
    questions: Sequence[Question], base: Sequence[GivenAnswer], tuned: Sequence[GivenAnswer]
) -> tuple[SideBySide, ...]:
    """The questions that both were asked, with what they answered."""
    first, second = ({answer.key: answer for answer in answers} for answers in (base, tuned))
    found = []
    for question in questions:
        if question.key not in first or question.key not in second:
            continue
        pair = (first[question.key], second[question.key])
        found.append(
            SideBySide(
                key=question.key,
                kind=question.kind,
                question=question.shown,
                reference=question.reference or "",
                answers=(pair[0].text, pair[1].text),
                finish=(pair[0].finish_reason, pair[1].finish_reason),
                correct=(_is_right(pair[0], question), _is_right(pair[1], question)),
                errors=(pair[0].error, pair[1].error),
            )
        )
    return tuple(found)


def _is_right(answer: GivenAnswer, question: Question) -> bool | None:
    """None where that cannot be told: there is no answer, or the model was still thinking when it was cut."""
    text = answer.text.strip()
    if answer.error is not None or (answer.finish_reason == "length" and (not text or text.startswith("<think>"))):
        return None
    return is_right(answer.text, question)


# ---- forgetting


def find_forgetting(material: Material, base: Measurement, tuned: Measurement) -> Forgetting | None:
    """What became of the probes; None where neither texts nor questions were put to both."""
    texts = pair_losses(base.probe_losses, tuned.probe_losses, "token").finite
    probes = [question for question in material.questions if question.kind == "probe"]
    rows = put_side_by_side(probes, base.answers, tuned.answers)
    judged = [(row.key, row.correct[0], row.correct[1]) for row in rows if None not in row.correct]
    if not texts and not judged:
        return None
    before, after = [bool(first) for _, first, _ in judged], [bool(second) for _, _, second in judged]
    change = relative_change([row.base for row in texts], [row.tuned for row in texts]) if texts else None
    correct = measure_correct(before, after) if judged else None
    return Forgetting(
        losses=compare_losses(texts),
        change=change,
        threshold=material.threshold,
        correct=correct,
        lost=tuple(key for key, first, second in judged if first and not second),
        gained=tuple(key for key, first, second in judged if second and not first),
        verdict=judge_retention(change, len(texts), correct, material.threshold),
    )


def judge_retention(change: Estimate | None, texts: int, correct: Measure | None, threshold: float) -> Retention:
    """Forgotten where texts are surely worse by more than the threshold, or where surely fewer questions are answered
    rightly; kept where texts are surely not; unclear where the interval holds the threshold."""
    if correct is not None and correct.verdict == "worse":
        return "forgot"
    if change is None:
        known = 0 if correct is None else round(correct.base * correct.count)
        return "kept" if known >= LEAST_ROWS else "unclear"  # who knew little has little to lose
    if decide(change, texts, lower_is_better=True) == "too_few":
        return "unclear"
    if change.low > threshold:
        return "forgot"
    return "kept" if change.high <= threshold else "unclear"


# ---- verdicts


def judge_learning(report: Report) -> Verdict | None:
    """Whether the tuned model is better at what it was tuned for: by its loss on held-out rows, of pairs by which
    answer it finds likelier; without losses (an endpoint) by a judge, or by how near answers come to references."""
    by_name: dict[str, Verdict] = {measure.name: measure.verdict for measure in report.answers}
    if report.broken[1] > report.broken[0]:
        return "worse"
    if tells_preferences(report.unit, report.answers):
        return by_name["prefers"]
    if report.losses:
        return report.losses[0].verdict
    if not any(row.kind == "held_out" for row in report.side_by_side):
        return None
    if report.judge is not None and report.judge.verdict != "too_few":
        return report.judge.verdict
    return by_name.get("chrf") or by_name.get("exact_match")
