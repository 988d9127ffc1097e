"""The fixed probes: questions and texts of a general kind, in English and Chinese, by which forgetting is seen.

They are our own and stand in probes.json, in an order of which every beginning is balanced between languages and
subjects: a run on a slow machine asks only as many as its time allows.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from firefly.data.schema import Message
from firefly.evaluation.measurement import Question

PROBES = Path(__file__).with_name("probes.json")
LANGUAGES = {"en": "latin", "zh": "zh"}
"""Languages of the probes, and what `answers.language_of` calls them."""

READ_COLUMNS = 160
"""How far an answer is read for what is accepted: one that goes on to list every city is not right for that. A Chinese
character takes two columns."""


@dataclass(frozen=True)
class ProbeText:
    """A text whose loss tells what is left of general language.

    Attributes:
        language: "en" or "zh".
    """

    key: str
    language: str
    text: str


@cache
def probe_questions() -> tuple[Question, ...]:
    """All questions, each with the texts of which a right answer holds one."""
    return tuple(
        Question(
            key=f"probe/{row['key']}",
            kind="probe",
            messages=(Message.of("user", row["text"]),),
            accepted=tuple(row["accepted"]),
            language=LANGUAGES[row["language"]],
        )
        for row in _stored()["questions"]
    )


@cache
def probe_texts() -> tuple[ProbeText, ...]:
    """All texts, with their special characters and line breaks as they are to be scored."""
    return tuple(ProbeText(f"probe/{row['key']}", row["language"], row["text"]) for row in _stored()["texts"])


@cache
def _stored() -> dict[str, list[dict[str, Any]]]:
    return json.loads(PROBES.read_text(encoding="utf-8"))


def is_right(answer: str, question: Question) -> bool | None:
    """Whether the beginning of an answer holds what is accepted; None where nothing says what is right.

    Case, widths of characters and Markdown's emphasis do not matter. Words and numbers are found whole: "12" holds no
    "2", "Parisian" no "Paris", 二十二 no 十二. What an answer means is not understood: "not Paris" holds "Paris".
    """
    if not question.accepted:
        return None
    begun = _beginning(_plain(answer), READ_COLUMNS)
    return any(_bordered(_plain(text)).search(begun) is not None for text in question.accepted)


def _plain(text: str) -> str:
    """Compatible forms as one (①, Ｈ, ₂), without case, emphasis and what LaTeX puts around; blanks as one space."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    without_commands = re.sub(r"\\[a-z]+", " ", folded)
    return " ".join(re.sub(r"[*`_${}]", "", without_commands).split())


def _beginning(text: str, columns: int) -> str:
    for place, character in enumerate(text):
        columns -= 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if columns < 0:
            return text[:place]
    return text


_LETTER = r"[^\W\d_\u2e80-\u9fff\uf900-\ufaff]"
"""Of scripts that put borders between words: Chinese and Japanese do not."""
_NUMERAL = "[〇零一二三四五六七八九十百千万两]"


@cache
def _bordered(text: str) -> re.Pattern[str]:
    """Finds a text that is no part of a longer word or number, where it begins and ends with one."""

    def kind(character: str) -> str | None:
        return next((kind for kind in (r"\d", _LETTER, _NUMERAL) if re.fullmatch(kind, character)), None)

    # A unit may touch its number ("60min"), but not a letter in front ("H2").
    borders = {
        r"\d": (rf"(?<!\d)(?<!\d[.,])(?<!{_LETTER})", r"(?!\d|[.,]\d)"),
        _LETTER: (rf"(?<!{_LETTER})(?<!\d)", rf"(?!{_LETTER}|\d)"),
        _NUMERAL: (f"(?<!{_NUMERAL})", f"(?!{_NUMERAL})"),
        None: ("", ""),
    }
    return re.compile(borders[kind(text[0])][0] + re.escape(text) + borders[kind(text[-1])][1])
