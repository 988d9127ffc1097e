"""Rows of the training data that look wrong: what a trained model still finds unlikely, and what contradicts or repeats
other rows."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from firefly.data.formats.prompts import Prompt
from firefly.data.schema import Conversation, Document, Message
from firefly.evaluation.comparing import PairedRow
from firefly.evaluation.report import SuspectRow
from firefly.generation.files import read_rows
from firefly.translation import Phrase

MOST = 20
"""Rows that are named."""
FAR = 3.5
"""Robust standard deviations above the median from which on a row's loss is far from the others' (Iglewicz and Hoaglin,
How to Detect and Handle Outliers, 1993)."""
SHOWN_CHARACTERS = 600


@dataclass(frozen=True)
class RowText:
    """What a row asks and answers, as far as it is shown."""

    question: str
    answer: str


@dataclass(frozen=True)
class RowTexts:
    """The texts of rows, and which of them say the same.

    Attributes:
        by_key: of each row, by its place.
        answers: of each question, as it is normalized, its answers with the places of their rows.
    """

    by_key: dict[str, RowText] = field(default_factory=dict)
    answers: dict[str, dict[str, list[str]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))


def read_texts(files: Sequence[Path], data_format: str = "auto") -> RowTexts:
    """Questions and answers of the rows of some files.

    Raises:
        UsageError: see `read_records`.
    """
    texts = RowTexts()
    for row in read_rows(files, data_format):
        if row.prompt is None:
            continue
        question, answer = _texts_of(row.prompt)
        key = str(row.source)
        texts.by_key.setdefault(key, RowText(question[-SHOWN_CHARACTERS:], answer[:SHOWN_CHARACTERS]))
        places = texts.answers[_normal(question)][_normal(answer)]
        if key not in places:
            places.append(key)
    return texts


def _texts_of(prompt: Prompt) -> tuple[str, str]:
    """All messages before the answer, and the answer; a document is an answer to nothing."""
    if isinstance(prompt.asked, Conversation):
        question = "\n".join(message.text for message in prompt.asked.messages)
        return question, prompt.reference.text if isinstance(prompt.reference, Message) else ""
    return ("", prompt.asked.text) if isinstance(prompt.asked, Document) else ("", repr(prompt))


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def find_suspects(rows: Sequence[PairedRow], texts: RowTexts) -> tuple[SuspectRow, ...]:
    """The rows that a person should look at, likely mislabelled ones first: those that answer a question otherwise than
    other rows do, and those that the tuned model, which was trained on them, still finds far less likely than others of
    their source. Then rows that repeat others, and behind them those of which it has learnt least."""
    far = {row.key: score for source in _by_source(rows).values() for row, score in _outliers(source)}
    reasons: dict[str, list[Phrase]] = defaultdict(list)
    rank: Counter[str] = Counter()
    for row in rows:
        if row.key in far:
            rank[row.key] += 2
            reasons[row.key].append(Phrase("its loss is still far above that of the other rows"))
        if row.tuned > row.base:
            rank[row.key] += row.key in far
            reasons[row.key].append(Phrase("its loss rose, though the model was trained on it"))
    for key, others in _contradicting(texts).items():
        rank[key] += 2
        reasons[key].insert(0, Phrase("the same question has another answer in {places}", places=_listed(others)))
    for key, others in _repeating(texts).items():
        rank[key] += 1
        reasons[key].append(Phrase("the same as {place}", place=_listed(others)))
    known = {row.key: row for row in rows}
    chosen = [key for key in rank if key in known and rank[key] > 0]
    chosen.sort(key=lambda key: (-rank[key], -known[key].tuned / known[key].weight))
    by_loss = sorted(rows, key=lambda row: -row.tuned / row.weight)
    least_learnt = [row.key for row in by_loss[:MOST] if row.key not in chosen]
    for key in least_learnt:
        reasons[key].insert(0, Phrase("its loss is among the highest"))
    chosen += least_learnt
    return tuple(_suspect(known[key], texts.by_key.get(key), reasons[key]) for key in chosen[:MOST])


def _suspect(row: PairedRow, text: RowText | None, reasons: Sequence[Phrase]) -> SuspectRow:
    shown = text or RowText("", "")
    base, tuned = row.base / row.weight, row.tuned / row.weight
    return SuspectRow(row.key, row.source, base, tuned, shown.question, shown.answer, tuple(reasons))


def _by_source(rows: Iterable[PairedRow]) -> Mapping[str, list[PairedRow]]:
    groups: dict[str, list[PairedRow]] = defaultdict(list)
    for row in rows:
        groups[row.source].append(row)
    return groups


def _outliers(rows: Sequence[PairedRow]) -> Iterable[tuple[PairedRow, float]]:
    """Rows whose mean loss is far above the median of their source, with how far.

    A loss is compared on the scale of its logarithm, on which losses of rows are nearly normal: on their own scale the
    easy rows lie so close together that every tenth row would be far.
    """
    values = np.log(np.maximum([row.tuned / row.weight for row in rows], 1e-6))
    median = np.median(values)
    spread = 1.4826 * np.median(np.abs(values - median))
    if not spread > 0:
        return []
    scores = (values - median) / spread
    return [(row, float(score)) for row, score in zip(rows, scores, strict=True) if score > FAR]


def _contradicting(texts: RowTexts) -> dict[str, list[str]]:
    """Rows whose question has another answer elsewhere, with the places of those."""
    found: dict[str, list[str]] = {}
    for question, answers in texts.answers.items():
        if not question or len(answers) < 2:
            continue
        for answer, places in answers.items():
            others = [place for other, theirs in answers.items() if other != answer for place in theirs]
            found |= dict.fromkeys(places, others)
    return found


def _repeating(texts: RowTexts) -> dict[str, list[str]]:
    """Rows that say what an earlier one says, with its place."""
    found: dict[str, list[str]] = {}
    for answers in texts.answers.values():
        for places in answers.values():
            found |= dict.fromkeys(places[1:], places[:1])
    return found


def _listed(places: Sequence[str], most: int = 3) -> str:
    named = ", ".join(places[:most])
    return named if len(places) <= most else f"{named}, …"
