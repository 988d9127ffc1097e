"""Plain text: documents for pretraining."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from firefly.data.readers.opening import open_text, stops_at_damage
from firefly.data.schema import RawRecord, Source
from firefly.translation import Phrase

SHORT_LINE, FEWEST_LINES, UNENDED_SHARE = 160, 12, 0.5
"""A file is taken for hard-wrapped if it has that many lines, and that share of them is at most that many characters
long and does not end a sentence. Lines are wrapped at 60 to 120 characters; documents that short are rare."""
ENDS = tuple(".!?…。！？；;:：")
CLOSING = "\"'”’»)]}」』）】》*_ \t\r"
"""What may follow the end of a sentence on its line."""


@dataclass
class WrappedLines:
    """Looks at the lines of a file for signs that they are parts of longer documents.

    Attributes:
        first: the first line that is short and ends within a sentence.
    """

    lines: int = 0
    unended: int = 0
    first: Source | None = None

    def see(self, source: Source, line: str) -> None:
        self.lines += 1
        if len(line) <= SHORT_LINE and not line.rstrip(CLOSING).endswith(ENDS):
            self.unended += 1
            self.first = self.first or source

    @property
    def are_wrapped(self) -> bool:
        return self.lines >= FEWEST_LINES and self.unended >= UNENDED_SHARE * self.lines


@stops_at_damage
def read_text(path: Path, documents: Literal["line", "file"] = "line") -> Iterator[RawRecord]:
    """Records `{"text": …}`: one for each line, blank ones marked, or one for the whole file. Line ends at a document's
    end are left out.

    Raises:
        UsageError: not a text file.
    """
    name = str(path)
    with open_text(path) as file:
        for number, data in enumerate(file, start=1) if documents == "line" else [(1, file.read())]:
            if data.strip():
                yield _document(name, number, data.rstrip(b"\r\n"))
            elif documents == "line":
                yield RawRecord(Source(name, number), blank=True)


def _document(name: str, line: int, data: bytes) -> RawRecord:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        source = Source(name, line + data.count(b"\n", 0, error.start))
        position = error.start - (data.rfind(b"\n", 0, error.start) + 1)
        return RawRecord(source, problem=Phrase("not UTF-8 text (byte {position})", position=position))
    if "\0" in text:
        return RawRecord(
            Source(name, line + text[: text.index("\0")].count("\n")),
            problem=Phrase("{field} has a NUL byte, which is no text", field="text"),
        )
    return RawRecord(Source(name, line), {"text": text})
