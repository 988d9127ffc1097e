"""Plain text: documents for pretraining."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from firefly.data.readers.opening import open_text, stops_at_damage
from firefly.data.schema import RawRecord, Source
from firefly.messages import render


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
        return RawRecord(source, problem=render("row.not_utf8", position=position))
    if "\0" in text:
        return RawRecord(
            Source(name, line + text[: text.index("\0")].count("\n")), problem=render("row.nul", field="text")
        )
    return RawRecord(Source(name, line), {"text": text})
