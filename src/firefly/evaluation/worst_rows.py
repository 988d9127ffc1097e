"""Rows of the training data that look wrong: what a trained model still finds unlikely, and what contradicts or repeats
other rows."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
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
PLACES = 4
"""Of other rows that a reason names."""
FAR = 3.5
"""Robust standard deviations above the median from which on a row's loss is far from the others' (Iglewicz and Hoaglin,
How to Detect and Handle Outliers, 1993)."""
SHOWN_CHARACTERS = 600


@dataclass(frozen=True)
class RowText:
    """What a row asks and answers, as far as it is shown."""

    question: str
    answer: str


@dataclass
class Said:
    """Where a question has one answer: its first places, as many as are named."""

    places: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)


Index = dict[bytes, dict[bytes, Said]]
"""Of each question, its answers; both as digests, since there may be millions of rows."""


def index_rows(files: Sequence[Path], data_format: str = "auto") -> Index:
    """Which rows say the same. A row without an answer, or with one that is labelled as bad, says nothing.

    Raises:
        UsageError: see `read_records`.
    """
    index: Index = defaultdict(lambda: defaultdict(Said))
    for row in read_rows(files, data_format):
        texts = None if row.prompt is None else _texts_of(row.prompt)
        if texts is None:
            continue
        said, key = index[_digest(texts.question)][_digest(texts.answer)], str(row.source)
        if not said.places:
            said.places.append(key)
        elif key not in said.places:
            said.repeated.append(key)
    return index


def texts_of_rows(files: Sequence[Path], keys: Collection[str], data_format: str = "auto") -> dict[str, RowText]:
    """The texts of the rows at these places, each of its first prompt."""
    found: dict[str, RowText] = {}
    for row in read_rows(files, data_format):
        key = str(row.source)
        if key in keys and key not in found and row.prompt is not None:
            texts = _texts_of(row.prompt) or RowText("", "")
            found[key] = RowText(texts.question[-SHOWN_CHARACTERS:], texts.answer[:SHOWN_CHARACTERS])
    return found


def _texts_of(prompt: Prompt) -> RowText | None:
    """All messages before the answer, and the answer; a document is an answer to nothing."""
    if isinstance(prompt.asked, Conversation) and isinstance(prompt.reference, Message):
        return RowText("\n".join(message.text for message in prompt.asked.messages), prompt.reference.text)
    return RowText("", prompt.asked.text) if isinstance(prompt.asked, Document) else None


def _digest(text: str) -> bytes:
    """Of a text without regard to case, width and white space; nothing of an empty one."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.blake2b(plain.encode("utf-8", "replace"), digest_size=16).digest() if plain else b""


def find_suspects(
    rows: Sequence[PairedRow], files: Sequence[Path], data_format: str = "auto"
) -> tuple[SuspectRow, ...]:
    """The rows that a person should look at, likely mislabelled ones first: those that answer a question otherwise than
    other rows do, and those that the tuned model, which was trained on them, still finds far less likely than others of
    their source. Then those that it finds less likely than before, unlike the others, and those that repeat others;
    behind them those of which it has learnt least.

    Args:
        files: of these rows.

    Raises:
        UsageError: see `read_records`.
    """
    index = index_rows(files, data_format)
    reasons: dict[str, list[Phrase]] = defaultdict(list)
    rank: Counter[str] = Counter()
    for group in _by_source(rows).values():
        fell = float(np.median([row.tuned - row.base for row in group])) < 0
        for row in _outliers(group):
            rank[row.key] += 2
            reasons[row.key].append(Phrase("its loss is still far above that of the other rows"))
        for row in group:
            if fell and row.tuned > row.base:
                rank[row.key] += 1
                reasons[row.key].append(Phrase("its loss rose, though the model was trained on it"))
    for key, others in _contradicting(index):
        rank[key] += 2
        reasons[key].insert(0, Phrase("the same question has another answer in {places}", places=_listed(others)))
    for key, first in _repeating(index):
        rank[key] += 1
        reasons[key].append(Phrase("the same as {place}", place=first))
    known = {row.key: row for row in rows}
    chosen = [key for key in rank if key in known]
    chosen.sort(key=lambda key: (-rank[key], -known[key].tuned / known[key].weight))
    by_loss = sorted(rows, key=lambda row: -row.tuned / row.weight)
    least_learnt = [row.key for row in by_loss[:MOST] if row.key not in rank]
    for key in least_learnt:
        reasons[key].append(Phrase("its loss is among the highest"))
    shown = [*chosen, *least_learnt][:MOST]
    texts = texts_of_rows(files, set(shown), data_format)
    return tuple(_suspect(known[key], texts.get(key, RowText("", "")), reasons[key]) for key in shown)


def _suspect(row: PairedRow, text: RowText, reasons: Sequence[Phrase]) -> SuspectRow:
    base, tuned = row.base / row.weight, row.tuned / row.weight
    return SuspectRow(row.key, row.source, base, tuned, text.question, text.answer, tuple(reasons))


def _by_source(rows: Iterable[PairedRow]) -> Mapping[str, list[PairedRow]]:
    groups: dict[str, list[PairedRow]] = defaultdict(list)
    for row in rows:
        groups[row.source].append(row)
    return groups


def _outliers(rows: Sequence[PairedRow]) -> list[PairedRow]:
    """Rows whose mean loss is far above the median of their source.

    A loss is compared on the scale of its logarithm, on which losses of rows are nearly normal: on their own scale the
    easy rows lie so close together that every tenth row would be far.
    """
    values = np.log(np.maximum([row.tuned / row.weight for row in rows], 1e-6))
    median = np.median(values)
    spread = 1.4826 * np.median(np.abs(values - median))
    if not spread > 0:
        return []
    return [row for row, value in zip(rows, values, strict=True) if (value - median) / spread > FAR]


def _contradicting(index: Index) -> Iterator[tuple[str, list[str]]]:
    """Rows whose question has another answer elsewhere, with the first places of those."""
    for question, answers in index.items():
        if not question or len(answers) < 2:
            continue
        for answer, said in answers.items():
            elsewhere = (place for other, there in answers.items() if other != answer for place in there.places)
            others = list(islice(elsewhere, PLACES))
            yield from ((place, others) for place in (*said.places, *said.repeated))


def _repeating(index: Index) -> Iterator[tuple[str, str]]:
    """Rows that say what an earlier one says, with its place."""
    for answers in index.values():
        for said in answers.values():
            yield from ((place, said.places[0]) for place in said.repeated)


def _listed(places: Sequence[str]) -> str:
    named = ", ".join(places[: PLACES - 1])
    return named if len(places) < PLACES else f"{named}, …"
