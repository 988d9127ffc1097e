"""report.html: one file that shows a comparison, with plots, and asks no host for anything."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from firefly.evaluation import wording
from firefly.evaluation.intervals import Estimate
from firefly.evaluation.measurement import QuestionKind
from firefly.evaluation.report import Measure, Report, SideBySide
from firefly.files import atomic_file
from firefly.translation import language, translate

TEMPLATE = "page.html.jinja"
FOLDED_FROM = 700
"""Characters from which on a text is folded, so that one answer does not push all others away."""
FOLDED_FROM_LINES = 14
EXCERPT = 360
EXCERPT_LINES = 6


def write_page(report: Report, path: Path) -> None:
    """Write the report as one HTML file in the user's language.

    It holds its styles, its drawings and a few lines of script for comfort; without script everything can be read.
    """
    text = _environment().get_template(TEMPLATE).render(_view(report))
    with atomic_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8", newline="\n")


def _view(report: Report) -> dict[str, Any]:
    """What the template knows: the report, and what is looked up or counted for it."""
    places = {row.key: f"q{number}" for number, row in enumerate(report.side_by_side, 1)}
    described = [report.base.described, report.tuned.described]
    changed = list(dict.fromkeys((*report.worst, *report.best)))
    return {
        "report": report,
        "lang": "zh-Hans" if language() == "zh" else "en",
        "loss_axis": Axis.over(0, *(end for row in report.losses for end in _ends(row.difference))),
        "rows": report.won + report.lost + report.tied,
        "changed": changed,
        "short": wording.short_places(row.key for row in (*changed, *report.suspects, *report.side_by_side)),
        "row_axis": Axis.over(*(loss for row in changed for loss in (row.base, row.tuned))),
        "gauge": _gauge(report),
        "asked": {row.key: row.question for row in report.side_by_side},
        "places": places,
        "kinds": _by_kind(report.side_by_side),
        "limit": report.tuned.described.get("max_new_tokens") or report.base.described.get("max_new_tokens"),
        "votes": Counter(vote.winner for vote in report.judge.votes) if report.judge else {},
        "properties": list(dict.fromkeys(name for side in described for name in side)),
    }


def _by_kind(rows: Sequence[SideBySide]) -> dict[QuestionKind, list[SideBySide]]:
    found: dict[QuestionKind, list[SideBySide]] = {"held_out": [], "probe": []}
    for row in rows:
        found[row.kind].append(row)
    return {kind: of_kind for kind, of_kind in found.items() if of_kind}


def _ends(change: Estimate) -> tuple[float, float, float]:
    return change.low, change.value, change.high


# ---- drawings


@dataclass(frozen=True)
class Axis:
    """A line of numbers as wide as its drawing. Places are per cent of the width, so text keeps its size on a phone."""

    low: float
    high: float

    @classmethod
    def over(cls, *values: float, margin: float = 0.06) -> Axis | None:
        """One that holds these values and some room beside them; None where fewer than two of them are numbers."""
        finite = [value for value in values if math.isfinite(value)]
        if len(finite) < 2:
            return None
        low, high = min(finite), max(finite)
        room = (high - low) * margin or abs(high) * margin or 1.0
        return cls(low - room, high + room)

    def at(self, value: float) -> str:
        place = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low) * 100
        return f"{place:.2f}%"

    def span(self, low: float, high: float) -> str:
        """How wide what reaches from one value to the other is."""
        return f"{float(self.at(high)[:-1]) - float(self.at(low)[:-1]):.2f}%"

    @property
    def step(self) -> float:
        rough = (self.high - self.low) / 6
        power = 10 ** math.floor(math.log10(rough))
        return next(unit * power for unit in (1, 2, 5, 10) if unit * power >= rough)

    @property
    def ticks(self) -> list[float]:
        first, last = math.ceil(self.low / self.step), math.floor(self.high / self.step)
        return [number * self.step for number in range(first, last + 1)]

    @property
    def digits(self) -> int:
        """Decimals that tell its ticks apart."""
        return max(0, -math.floor(math.log10(self.step)))


def _gauge(report: Report) -> Axis | None:
    """The change on general texts beside 0 and the threshold."""
    found = report.forgetting
    if found is None or found.change is None or not math.isfinite(found.change.value):
        return None
    return Axis.over(-found.threshold / 2, 1.6 * found.threshold, *_ends(found.change))


def measure_axis(measure: Measure) -> Axis | None:
    """From 0 to all there is, or to the larger of both for what has no end."""
    most = 1.0 if measure.name in wording.SHARES else 100.0
    if measure.name == "tokens":
        most = max(measure.base, measure.tuned)
    return Axis.over(0.0, most) if math.isfinite(measure.base) and math.isfinite(measure.tuned) else None


# ---- texts


def excerpt(text: str) -> str | None:
    """The beginning of a text that is too long to be shown at once; None of one that is not."""
    lines = text.split("\n")
    if len(text) <= FOLDED_FROM and len(lines) <= FOLDED_FROM_LINES:
        return None
    return "\n".join(lines[:EXCERPT_LINES])[:EXCERPT].rstrip() + " …"


def plain(value: Any) -> str:
    """A value of what a side is, as a line."""
    if value is None or value == "":
        return "–"
    if isinstance(value, (dict, list, tuple)):
        value = json.dumps(value, ensure_ascii=False, default=str)
    return wording.visible(str(value))


def integrity(script: str) -> str:
    """How the page's policy names its own script: nothing else may run, not even what escaping would have missed."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals |= {
        "translate": _said,
        "words": wording,
        "measure_axis": measure_axis,
        "excerpt": excerpt,
        "plain": plain,
    }
    environment.filters |= {
        "visible": lambda text: wording.visible(str(text)),
        "integrity": integrity,
        "together": together,
    }
    return environment


def _said(text: str, **values: object) -> str:
    return together(translate(text, **values))


def together(text: str) -> str:
    """A sentence whose numbers do not part from their per cent sign at the end of a line."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")
