"""The words and numbers of a comparison, as its page and its lines on the terminal show them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Literal, get_args

from firefly.evaluation.intervals import Estimate, Verdict
from firefly.evaluation.measurement import Unit
from firefly.evaluation.report import MeasureName, Retention, RowChange
from firefly.translation import Phrase

Sign = Literal["good", "bad", "same", "unknown"]
Winner = Literal["base", "tuned", "tie", "order", "unread"]

VERDICTS: dict[Verdict, tuple[Sign, Phrase]] = {
    "better": ("good", Phrase("better")),
    "worse": ("bad", Phrase("worse")),
    "no_difference": ("same", Phrase("no difference")),
    "too_few": ("unknown", Phrase("too few to tell")),
}
RETENTIONS: dict[Retention, tuple[Sign, Phrase]] = {
    "kept": ("good", Phrase("kept")),
    "forgot": ("bad", Phrase("forgotten")),
    "unclear": ("unknown", Phrase("unclear")),
}
SIGNS: dict[Sign, str] = {"good": "✓", "bad": "✗", "same": "=", "unknown": "?"}

UNITS: dict[Unit, Phrase] = {
    "token": Phrase("nats per token"),
    "byte": Phrase("nats per byte"),
    "example": Phrase("per example"),
}

MEASURES: dict[MeasureName, tuple[Phrase, Phrase]] = {
    "stop_rate": (
        Phrase("Answers that end by themselves"),
        Phrase("Share of answers that the model ended; the others were cut off at the limit of tokens."),
    ),
    "tokens": (
        Phrase("Tokens per answer"),
        Phrase("Mean length of an answer. Neither longer nor shorter is better by itself."),
    ),
    "repetition": (
        Phrase("Repetition"),
        Phrase("Share of an answer that repeats what it said before. Much of it: the model runs in circles."),
    ),
    "language": (
        Phrase("Right language"),
        Phrase("Share of answers in the language that is asked for, as their letters tell it."),
    ),
    "exact_match": (
        Phrase("Same as the reference"),
        Phrase("Share of answers that are the reference, apart from case, white space and punctuation around them."),
    ),
    "chrf": (
        Phrase("chrF: characters in common"),
        Phrase("How many short strings of characters answer and reference share: 0 none, 100 all."),
    ),
    "bleu": (
        Phrase("BLEU: word sequences in common"),
        Phrase("How many sequences of one to four words of the answer stand in the reference: 0 none, 100 all."),
    ),
    "rouge_l": (
        Phrase("ROUGE-L: words in the same order"),
        Phrase("How long the longest series of words is that both hold in the same order: 0 none, 100 all."),
    ),
    "correct": (
        Phrase("Right answers"),
        Phrase("Share of answers that hold what a right one has to hold."),
    ),
    "prefers": (
        Phrase("Better answer preferred"),
        Phrase("Share of pairs whose better answer the model finds likelier than the other one."),
    ),
}
"""Names that a beginner understands, and what the figure says."""

SHARES: frozenset[MeasureName] = frozenset(get_args(MeasureName)) - {"tokens", "chrf", "bleu", "rouge_l"}
NEUTRAL: frozenset[MeasureName] = frozenset({"tokens"})
"""Figures of which neither more nor less is better."""

PROPERTIES: dict[str, Phrase] = {
    "given": Phrase("named as"),
    "endpoint": Phrase("server's address"),
    "model": Phrase("model"),
    "adapter": Phrase("adapter"),
    "dtype": Phrase("number type"),
    "template": Phrase("chat template"),
    "template_hash": Phrase("hash of the template"),
    "tokenizer_hash": Phrase("hash of the tokenizer"),
    "step": Phrase("training step"),
    "max_new_tokens": Phrase("longest answer, in tokens"),
}
"""What a side is said to be; others are shown by the name that report.json has."""

WINNERS: dict[Winner, Phrase] = {
    "tuned": Phrase("tuned wins"),
    "base": Phrase("base wins"),
    "tie": Phrase("tie"),
    "order": Phrase("went by the order"),
    "unread": Phrase("could not be read"),
}

HASH = re.compile(r"[0-9a-f]{32,}")
SHOWN_OF_HASH = 12

MINUS = "\N{MINUS SIGN}"


def number(value: float, digits: int = 3, signed: bool = False) -> str:
    """A number as people read it: a proper minus sign, no sign of zero, and what is no number as such."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 and not signed else f"{'+' if value > 0 else MINUS}∞"
    if abs(value) >= 1e7:
        mantissa, exponent = f"{value:{'+' if signed else ''}.1e}".split("e")
        return f"{mantissa} × 10^{int(exponent)}".replace("-", MINUS)
    text = f"{value:{'+' if signed else ''},.{digits}f}"
    if not text.strip("+-0.,"):
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def finite(drawn: Estimate | RowChange) -> bool:
    """Whether it can be drawn."""
    values = (drawn.base, drawn.tuned) if isinstance(drawn, RowChange) else (drawn.value, drawn.low, drawn.high)
    return all(math.isfinite(value) for value in values)


def percent(share: float, digits: int = 1, signed: bool = False) -> str:
    return f"{number(share * 100, digits, signed)}\N{NO-BREAK SPACE}%"


def perplexity(loss: float) -> str:
    """Of a loss in nats per token: as from so many equally likely tokens the model has to choose."""
    value = math.inf if loss > 700 else math.exp(loss)
    return number(value, 2 if value < 100 else 1 if value < 1000 else 0)


MOST_DIGITS = 6


def interval(change: Estimate, digits: int = 3, scale: float = 1.0) -> str:
    """The ends of an interval, with a sign between that no minus runs into.

    Whether it holds 0 decides the verdict: an end that would be rounded to 0 gets the digits that show its sign.
    """
    return f"{end_of_interval(change.low * scale, digits)} … {end_of_interval(change.high * scale, digits)}"


def end_of_interval(value: float, digits: int) -> str:
    shown = (number(value, more, True) for more in range(digits, MOST_DIGITS + 1))
    return next((text for text in shown if text.strip("0.")), number(value, digits, True))


def measured(name: MeasureName, value: float) -> str:
    """A figure of answers in its unit."""
    return percent(value) if name in SHARES else number(value, 1)


def measured_change(name: MeasureName, change: Estimate) -> tuple[str, str]:
    """The change of such a figure, shares in points of 100, and its interval."""
    scale = 100.0 if name in SHARES else 1.0
    return number(change.value * scale, 1, True), interval(change, 1, scale)


def measure_verdict(name: MeasureName, verdict: Verdict) -> tuple[Sign, Phrase] | None:
    """Sign and word; None of a figure that has no better and worse."""
    return None if name in NEUTRAL else VERDICTS[verdict]


def without_rest(value: str) -> str:
    """The beginning of a hash, which tells it from others; any other value is whole."""
    return value[:SHOWN_OF_HASH] + "…" if HASH.fullmatch(value) else value


PLACE = re.compile(r"(?s:(?P<file>.+)):(?P<line>\d+(?:#\d+)?)")


def short_places(places: Iterable[str]) -> dict[str, str]:
    """Places of rows by the names of their files, with as many of the folders before them as tell two files apart.

    What is no place of a row stays whole.
    """
    found = {place: PLACE.fullmatch(place) for place in places}
    files = {match["file"]: match["file"].split("/") for match in found.values() if match}
    ends = Counter("/".join(parts[at:]) for parts in files.values() for at in range(len(parts)))
    names = {}
    for file, parts in files.items():
        shorter = ("/".join(parts[at:]) for at in range(len(parts) - 1, 0, -1))
        names[file] = next((name for name in shorter if name and ends[name] == 1), file)
    return {place: f"{names[match['file']]}:{match['line']}" if match else place for place, match in found.items()}


_STEERING = (*(code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"), 0x202D, 0x202E)
"""Control characters, and the two marks that let letters be read in another order than they stand in."""


def visible(text: str) -> str:
    """A text of models and rows without what steers a terminal or a page: control characters are shown, not sent.

    Halves of characters, which no file can hold, become U+FFFD.
    """
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return whole.replace("\r\n", "\n").translate({code: f"[U+{code:04X}]" for code in _STEERING})
