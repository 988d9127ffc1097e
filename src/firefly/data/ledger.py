"""The ledger: what became of every row, with file, line and cause. Nothing is cut or left out in silence."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from firefly.data.schema import Source
from firefly.errors import UsageError
from firefly.messages import render

# Causes that lose a row. "malformed" is the data's fault and stops a run; the others are policy.
MALFORMED, NO_TARGET, TOO_LONG = "malformed", "no_target", "too_long"


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing about one row."""

    file: str
    line: int
    cause: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


@dataclass
class Ledger:
    """Counts of one data file. rows = kept + cut + the sum of lost."""

    file: str
    rows: int = 0
    kept: int = 0
    cut: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    examples: int = 0
    tokens: int = 0
    target_tokens: int = 0
    cut_tokens: int = 0
    findings: list[Finding] = field(default_factory=list)

    def lose(self, source: Source, cause: str, message: str) -> None:
        """Account for a row that will not be trained."""
        self.lost[cause] += 1
        self.note(source, cause, message)

    def note(self, source: Source, cause: str, message: str) -> None:
        self.findings.append(Finding(source.file, source.line, cause, message))

    def as_dict(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "format": self.formats.most_common(1)[0][0] if self.formats else None,
            "formats": dict(self.formats),
            "rows": self.rows,
            "kept": self.kept,
            "cut": self.cut,
            "lost": dict(self.lost),
            "examples": self.examples,
            "tokens": self.tokens,
            "target_tokens": self.target_tokens,
            "cut_tokens": self.cut_tokens,
            "findings": [vars(finding) for finding in self.findings],
        }

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Ledger:
        values = {name: value for name, value in stored.items() if name != "format"}
        values["lost"], values["formats"] = Counter(values["lost"]), Counter(values["formats"])
        values["findings"] = [Finding(**finding) for finding in values["findings"]]
        return cls(**values)

    def check(self, max_malformed_rows: int, max_lost_share: float) -> None:
        """Stop the run before it starts if too much would be lost.

        Raises:
            UsageError: no example left, more malformed rows than allowed, or a larger share lost (one row is always
                allowed) than `max_lost_share`.
        """
        if self.lost[MALFORMED] > max_malformed_rows:
            raise UsageError(
                "data.malformed",
                count=self.lost[MALFORMED],
                file=self.file,
                rows=self._list(MALFORMED),
                allowed=max_malformed_rows,
            )
        if not self.examples:
            raise UsageError("data.nothing_left", file=self.file, rows=self._list(*self.lost) or "–")
        lost = sum(self.lost.values()) - self.lost[MALFORMED]
        if lost > max(1, max_lost_share * self.rows):
            raise UsageError(
                "data.lost_share",
                lost=lost,
                total=self.rows,
                file=self.file,
                share=f"{lost / self.rows:.1%}",
                allowed=f"{max_lost_share:.1%}",
                rows=self._list(*self.lost),
            )

    def summary(self) -> str:
        """One line: rows kept, cut and lost, and tokens."""
        lost = ", ".join(f"{cause} {count}" for cause, count in self.lost.items()) or "0"
        share = f"{self.target_tokens / max(self.tokens, 1):.0%}"
        return render(
            "data.summary",
            file=self.file,
            rows=self.rows,
            kept=self.kept,
            cut=self.cut,
            lost=lost,
            tokens=f"{self.tokens:,}",
            share=share,
        )

    def _list(self, *causes: str, most: int = 10) -> str:
        chosen = [str(finding) for finding in self.findings if finding.cause in causes]
        more = [render("data.more_rows", count=len(chosen) - most)] if len(chosen) > most else []
        return "".join(f"\n  {line}" for line in chosen[:most] + more)
