"""What a comparison of two models found, as it is shown and stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from firefly.evaluation.intervals import Estimate, Verdict
from firefly.evaluation.measurement import QuestionKind, Unit
from firefly.translation import Phrase

Retention = Literal["kept", "forgot", "unclear"]
MeasureName = Literal[
    "stop_rate", "tokens", "repetition", "language", "exact_match", "chrf", "bleu", "rouge_l", "correct", "prefers"
]


@dataclass(frozen=True)
class LossComparison:
    """Losses of the rows of one source.

    Attributes:
        source: its name; "" for all rows.
        base, tuned: mean loss in nats for each unit of `Report.unit`.
        difference: tuned less base, so that what is below 0 has become better.
    """

    source: str
    rows: int
    base: float
    tuned: float
    difference: Estimate
    verdict: Verdict


@dataclass(frozen=True)
class RowChange:
    """One row under both models.

    Attributes:
        base, tuned: its mean loss in nats for each unit.
        question, reference: its texts, where it is among those that were asked; else "".
    """

    key: str
    source: str
    base: float
    tuned: float
    question: str = ""
    reference: str = ""

    @property
    def difference(self) -> float:
        return self.tuned - self.base


@dataclass(frozen=True)
class Measure:
    """One figure of the answers of both models.

    Attributes:
        count: questions that it was taken over.
        base, tuned: shares of 1 (stop_rate, repetition, language, exact_match, correct, and prefers: of the pairs
            whose better answer the model finds likelier), tokens, or points of 100 (chrf, bleu, rouge_l).
        difference: tuned less base.
        verdict: "no_difference" for figures of which neither more nor less is better (tokens).
    """

    name: MeasureName
    count: int
    base: float
    tuned: float
    difference: Estimate
    verdict: Verdict


@dataclass(frozen=True)
class SideBySide:
    """One question with both answers.

    Attributes:
        correct: of base and tuned: whether the answer holds what is accepted; None where nobody can tell.
        finish: of both: "stop", "length", or None.
        errors: of both: why there is no answer.
    """

    key: str
    kind: QuestionKind
    question: str
    reference: str
    answers: tuple[str, str]
    finish: tuple[str | None, str | None]
    correct: tuple[bool | None, bool | None] = (None, None)
    errors: tuple[str | None, str | None] = (None, None)


@dataclass(frozen=True)
class Forgetting:
    """What became of what the base model knew, on the fixed probes.

    Attributes:
        losses: on the texts: of all, then of each language.
        change: of the loss on all texts, as a share of the base's: 0.05 is five per cent worse.
        threshold: the share from which on it counts as forgotten.
        correct: right answers to the questions; None where none was asked.
        lost, gained: keys of questions that one of the two alone answers.
    """

    losses: tuple[LossComparison, ...]
    change: Estimate | None
    threshold: float
    correct: Measure | None
    lost: tuple[str, ...]
    gained: tuple[str, ...]
    verdict: Retention


@dataclass(frozen=True)
class Vote:
    """What the judge said of one question, asked in both orders.

    Attributes:
        winner: "base", "tuned" or "tie" where both orders agree; "order" where the judge went by the order; "unread"
            where an answer of it could not be read.
        reasons: its words, of each order.
    """

    key: str
    winner: Literal["base", "tuned", "tie", "order", "unread"]
    reasons: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class JudgeResult:
    """The votes of a judge, and the share of decided questions that the tuned model wins (a tie counts half)."""

    model: str
    url: str
    votes: tuple[Vote, ...]
    share: Estimate | None
    verdict: Verdict


@dataclass(frozen=True)
class SuspectRow:
    """A row of the training data that the tuned model has not learnt, or that looks wrong.

    Attributes:
        base, tuned: its mean loss in nats for each unit.
        reasons: why it is named, most telling first.
    """

    key: str
    source: str
    base: float
    tuned: float
    question: str
    answer: str
    reasons: tuple[Phrase, ...]


@dataclass(frozen=True)
class Side:
    """One of the models: what a report calls it, and what it is."""

    name: str
    described: Mapping[str, Any]
    seconds: float


@dataclass(frozen=True)
class Report:
    """All that was found.

    Attributes:
        unit: what losses are given for: "token"; "byte" of text, where the tokenizers differ; "example" of pairs.
        losses: of all held-out rows, then of each source, if there are several; none without held-out rows.
        won, lost, tied: held-out rows that became better, worse, or neither (by less than 1e-6 nats).
        worst, best: rows that changed most.
        answers: figures of the answers to held-out questions.
        broken: held-out rows whose loss is infinite or not a number, of base and tuned.
        learnt: whether it helped; None where nothing was held out.
        verdicts: what a reader should take away, in sentences.
        notes: what was left out or may mislead.
    """

    base: Side
    tuned: Side
    unit: Unit
    losses: tuple[LossComparison, ...] = ()
    won: int = 0
    lost: int = 0
    tied: int = 0
    worst: tuple[RowChange, ...] = ()
    best: tuple[RowChange, ...] = ()
    answers: tuple[Measure, ...] = ()
    side_by_side: tuple[SideBySide, ...] = ()
    forgetting: Forgetting | None = None
    judge: JudgeResult | None = None
    suspects: tuple[SuspectRow, ...] = ()
    broken: tuple[int, int] = (0, 0)
    learnt: Verdict | None = None
    verdicts: tuple[Phrase, ...] = ()
    notes: tuple[Phrase, ...] = ()
    created: str = field(default="")

    def as_dict(self) -> dict[str, Any]:
        """What report.json holds: sentences in the user's language, null for what is infinite or not a number."""
        return plain(self)


def plain(value: Any) -> Any:
    """A value as JSON has it: dataclasses as objects, phrases as text, null for what is infinite or not a number."""
    if isinstance(value, Phrase):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no such number
    if is_dataclass(value):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    return value
