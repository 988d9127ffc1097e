"""What users read, in their language: English stands where it is raised, Chinese in locale/zh.json under the English.

A message is a template with named fields and their values, `Phrase("{path} does not exist.", path=path)`. It becomes
text when it is shown; what is stored of it (the ledger of prepared data, the notices of a run) is the same in every
language. `translate` is for text that is shown at once: headings, labels, lines of a table.

Errors and notices have a code before the template, which run.json records and which programs and tests go by:
`UsageError("config.no_file", "configuration file {path} does not exist.", path=path)`. It stays when the wording is
mended.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any

CHINESE = Path(__file__).parent / "locale" / "zh.json"


_spoken: ContextVar[str | None] = ContextVar("spoken", default=None)
"""The language that a `speaking` block sets, for its thread alone."""


@contextmanager
def speaking(chosen: str) -> Iterator[None]:
    """Messages inside in "en" or "zh", whatever the process's own language is: a page has readers of both."""
    token = _spoken.set(chosen)
    try:
        yield
    finally:
        _spoken.reset(token)


def language() -> str:
    """The language of messages: a `speaking` block's, FIREFLY_LANG, else Chinese for a Chinese locale, else English."""
    if spoken := _spoken.get():
        return spoken
    chosen = os.environ.get("FIREFLY_LANG", "").lower()
    if not chosen:
        chosen = next((os.environ[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if os.environ.get(name)), "")
    return "zh" if chosen.lower().startswith("zh") else "en"


@cache
def chinese() -> dict[str, str]:
    """English template → Chinese template."""
    return json.loads(CHINESE.read_text(encoding="utf-8"))


@dataclass(frozen=True, init=False)
class Phrase:
    """A message that becomes text when it is shown, in the language of that moment.

    Attributes:
        text: the English template, with named fields as `str.format` has them.
        values: of the fields. They are inserted as they are, never interpreted as a format: braces in user data stay
            braces. One may itself be a phrase. Of an exception its text is kept: it would keep its frames alive.
    """

    text: str
    values: Mapping[str, object]

    def __init__(self, text: str, /, **values: object) -> None:
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "values", {name: _said(value) for name, value in values.items()})

    def __str__(self) -> str:
        template = chinese().get(self.text, self.text) if language() == "zh" else self.text
        return template.format(**self.values)

    def as_json(self) -> dict[str, Any]:
        """What is stored: the same in every language. Values that JSON lacks are kept as their text."""
        return {"text": self.text, "values": {name: _plain(value) for name, value in self.values.items()}}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Phrase:
        """The phrase that `as_json` stored."""
        values = stored["values"].items()
        return cls(
            stored["text"],
            **{name: cls.from_json(value) if isinstance(value, dict) else value for name, value in values},
        )


def _said(value: object) -> object:
    if not isinstance(value, BaseException):
        return value
    return value.args[0] if len(value.args) == 1 and isinstance(value.args[0], Phrase) else str(value)


def _plain(value: object) -> Any:
    if isinstance(value, Phrase):
        return value.as_json()
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Integral):  # numpy's numbers, too: a field may ask for their digits
        return int(value)
    return float(value) if isinstance(value, Real) else str(value)


def translate(text: str, /, **values: object) -> str:
    """A message as text, now, in the user's language."""
    return str(Phrase(text, **values))
