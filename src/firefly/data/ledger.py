"""The ledger: what became of every row, with file, line and cause. Nothing is cut or left out in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from firefly.data.schema import Source
from firefly.errors import UsageError
from firefly.translation import Phrase, translate

# Causes that lose a row. Malformed rows are the data's fault and stop a run; the others are limited by a share.
MALFORMED, REFUSED, NO_TARGET, TOO_LONG = "malformed", "refused", "no_target", "too_long"
# Causes of findings that lose nothing by themselves.
CUT = "cut"
DUPLICATE = "duplicate"
BLANK = "blank_line"
EMPTY_ANSWER = "empty_answer"
REPEATED_ANSWER = "repeated_answer"
IN_EVAL = "in_eval_file"
SAME_ANSWERS = "same_answers"
UNREAD_KEY = "unread_key"
UNHEEDED_KEY = "unheeded_key"
WRAPPED_TEXT = "wrapped_text"
JOINED = "joined_to_prompt"
REPLACED_IDS = "replaced_call_ids"
UNANSWERED_END = "unanswered_end"
OUTSCORED = "outscored"
MOST_FINDINGS = 10_000
"""Findings of one cause that are kept with their place; further ones are counted."""
MOST_KEYS = 8
"""Keys without a reader that the summary names."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing worth knowing about one row: a cause for programs, and a phrase that says it in the user's language."""

    file: str
    line: int
    cause: str
    phrase: Phrase

    @property
    def message(self) -> str:
        return str(self.phrase)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"

    def as_dict(self) -> dict[str, Any]:
        """What people read in data_report.json."""
        return {"file": self.file, "line": self.line, "cause": self.cause, "message": self.message}

    def stored(self) -> dict[str, Any]:
        """What a cache keeps: the same in every language."""
        return {"file": self.file, "line": self.line, "cause": self.cause, "phrase": self.phrase.as_json()}


@dataclass
class Ledger:
    """Counts of one data file, or of several. rows = kept + cut + the sum of lost."""

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
    cut_turns: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """Findings by cause, those beyond MOST_FINDINGS included."""
    findings: list[Finding] = field(default_factory=list)
    unread_keys: Counter[str] = field(default_factory=Counter)
    """Rows that hold text (or a message's number) under a key that their format does not read, the key with
    most text first."""

    def lose(self, source: Source, cause: str, phrase: Phrase) -> None:
        """Account for a row that will not be trained."""
        self.lost[cause] += 1
        self.note(source, cause, phrase)

    def note(self, source: Source, cause: str, phrase: Phrase) -> None:
        self.counts[cause] += 1
        if self.counts[cause] <= MOST_FINDINGS:
            self.findings.append(Finding(source.file, source.line, cause, phrase))

    def as_dict(self) -> dict[str, Any]:
        """What data_report.json says, its findings in the language of now."""
        return {
            "file": self.file,
            "format": self.formats.most_common(1)[0][0] if self.formats else None,
            "formats": dict(self.formats),
            **{name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()},
            "findings": [finding.as_dict() for finding in self.findings],
        }

    def stored(self) -> dict[str, Any]:
        """What a cache keeps: the same in every language."""
        return self.as_dict() | {"findings": [finding.stored() for finding in self.findings]}

    @classmethod
    def from_stored(cls, stored: dict[str, Any]) -> Ledger:
        values = {name: value for name, value in stored.items() if name != "format"}
        values |= {name: Counter(values[name]) for name in ("lost", "formats", "counts", "unread_keys")}
        values["findings"] = [
            Finding(**finding | {"phrase": Phrase.from_json(finding["phrase"])}) for finding in values["findings"]
        ]
        return cls(**values)

    @classmethod
    def total(cls, ledgers: Sequence[Ledger]) -> Ledger:
        """The sum of several files' ledgers."""
        if len(ledgers) == 1:
            return ledgers[0]
        total = cls(", ".join(ledger.file for ledger in ledgers))
        for ledger in ledgers:
            for name, value in vars(ledger).items():
                if name != "file":
                    setattr(total, name, getattr(total, name) + value)
        return total

    def check(self, max_malformed_rows: int, max_lost_share: float, on_too_long: str = "cut_turns") -> None:
        """Stop the run before it starts if too much would be lost.

        Raises:
            UsageError: no example left, more malformed rows than allowed, a row too long where that is an error, or a
                larger share lost (one row is always allowed) than `max_lost_share`.
        """
        if self.lost[MALFORMED] > max_malformed_rows:
            raise UsageError(
                "data.malformed",
                "{count} malformed row(s) in {file}; max_malformed_rows allows {allowed}. Nothing was trained.{rows}\n"
                "Correct or remove them, or raise max_malformed_rows to leave them out.",
                count=self.lost[MALFORMED],
                file=self.file,
                rows=self.list(MALFORMED),
                allowed=max_malformed_rows,
            )
        if on_too_long == "error" and self.lost[TOO_LONG]:
            raise UsageError(
                "data.too_long",
                "{count} row(s) of {file} are longer than max_seq_length, and on_too_long is error. Nothing was "
                "trained.{rows}\n"
                "Raise max_seq_length, or set on_too_long to cut_turns, cut or drop.",
                count=self.lost[TOO_LONG],
                file=self.file,
                rows=self.list(TOO_LONG),
            )
        if not self.rows:
            raise UsageError(
                "data.no_rows",
                "{file} is empty: it holds no row. Write data into it, or name another file.",
                file=self.file,
            )
        if not self.examples:
            raise UsageError(
                "data.nothing_left",
                "no row of {file} can be trained.{rows}\nCheck the file, its format and max_seq_length.",
                file=self.file,
                rows=self.list(*self.lost),
            )
        lost = sum(self.lost.values()) - self.lost[MALFORMED]
        if lost > max(1, max_lost_share * self.rows):
            raise UsageError(
                "data.lost_share",
                "{lost} of {total} rows ({share}) of {file} would not be trained; max_lost_share allows "
                "{allowed}.{rows}\n"
                "Correct or leave out these rows, raise max_seq_length where they are too long, or raise "
                "max_lost_share.",
                lost=lost,
                total=self.rows,
                file=self.file,
                share=f"{lost / self.rows:.1%}",
                allowed=f"{max_lost_share:.1%}",
                rows=self.list(*self.lost),
            )

    def summary(self) -> str:
        """One line: rows kept, cut and lost, and tokens; below it the rows that lost something, and other findings."""
        lost = ", ".join(f"{cause} {count}" for cause, count in self.lost.items()) or "0"
        share = f"{self.target_tokens / max(self.tokens, 1):.0%}"
        line = translate(
            "data: {file}: {rows} rows, {kept} kept, {cut} cut, lost: {lost}; {tokens} tokens, {share} trained",
            file=self.file,
            rows=self.rows,
            kept=self.kept,
            cut=self.cut,
            lost=lost,
            tokens=f"{self.tokens:,}",
            share=share,
        )
        others = [cause for cause in self.counts if cause not in (*self.lost, CUT, UNREAD_KEY)]
        return line + self.list(*self.lost, CUT) + self._list_unread_keys() + self.list(*others, most=5)

    def _list_unread_keys(self) -> str:
        """One line for all of them: most are labels and identifiers, which no one needs to train on."""
        if not self.unread_keys:
            return ""
        keys = [translate("{key} ({rows} row(s))", key=key, rows=rows) for key, rows in self.unread_keys.items()]
        if (left := len(keys) - MOST_KEYS) > 0:
            keys[MOST_KEYS:] = [translate("… and {count} more", count=left)]
        return "\n  " + translate("not read: what stands under {keys}", keys=", ".join(keys))

    def list(self, *causes: str, most: int = 10) -> str:
        """Findings of some causes, a line each, lost rows before cut ones."""
        chosen = [str(finding) for cause in causes for finding in self.findings if finding.cause == cause]
        left = sum(self.counts[cause] for cause in causes) - min(len(chosen), most)
        more = [translate("… and {count} more", count=left)] if left else []
        return "".join(f"\n  {line}" for line in [*chosen[:most], *more])


def report(ledgers: Iterable[Ledger]) -> dict[str, Any]:
    """What data_report.json and `firefly check --json` say of some files: their sum and, if several, each one."""
    each = list(ledgers)
    total = Ledger.total(each).as_dict()
    if len(each) > 1:
        total["files"] = [
            {key: value for key, value in ledger.as_dict().items() if key != "findings"} for ledger in each
        ]
    return total
