"""Files to records. A record keeps its file and line; a line that is no record becomes a problem, never a crash."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from firefly.data.schema import RawRecord, Source
from firefly.errors import UsageError
from firefly.messages import render


def read_records(path: Path) -> Iterator[RawRecord]:
    """Yield the records of one .jsonl or .json file (a list, or one object) in file order; blank lines are skipped.

    Raises:
        UsageError: the file is missing, a folder, empty, of an unknown kind, or not text.
    """
    if not path.exists():
        raise UsageError("data.no_file", path=path)
    if path.is_dir():
        raise UsageError("data.is_folder", path=path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError("data.unknown_suffix", path=path, suffix=path.suffix, known=", ".join(READERS))
    return reader(path)


def read_json_lines(path: Path) -> Iterator[RawRecord]:
    """One JSON object a line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                _refuse_binary(path, line)
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _parse(Source(str(path), number), line)


def read_json(path: Path) -> Iterator[RawRecord]:
    """A JSON array of objects, or one object; some files named .json hold one object a line, and are read as such."""
    data = path.read_bytes()
    _refuse_binary(path, data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        yield RawRecord(Source(str(path), line), problem=render("row.not_utf8", position=error.start))
        return
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "[":
        yield from _read_array(path, text, start + 1)
        return
    try:
        value = _loads(text)
    except (ValueError, RecursionError):
        yield from read_json_lines(path)
        return
    yield RawRecord(Source(str(path), text.count("\n", 0, start) + 1), value)


def _read_array(path: Path, text: str, position: int) -> Iterator[RawRecord]:
    """Decode the elements one by one, so that each knows its line and one broken element is named where it stands."""
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    while True:
        position = _skip(text, position, " \t\r\n,")
        line, counted = line + text.count("\n", counted, position), position
        source = Source(str(path), line)
        if position >= len(text):
            yield RawRecord(source, problem=render("row.array_not_closed"))
            return
        if text[position] == "]":
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            yield RawRecord(
                Source(str(path), error.lineno), problem=render("row.bad_json", problem=error.msg, column=error.colno)
            )
            return
        except RecursionError:
            yield RawRecord(source, problem=render("row.too_deep"))
            return
        yield RawRecord(source, value)


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position


def _parse(source: Source, line: bytes) -> RawRecord:
    try:
        return RawRecord(source, _loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return RawRecord(source, problem=render("row.not_utf8", position=error.start))
    except json.JSONDecodeError as error:
        return RawRecord(source, problem=render("row.bad_json", problem=error.msg, column=error.colno))
    except RecursionError:
        return RawRecord(source, problem=render("row.too_deep"))
    except ValueError as error:  # an integer of thousands of digits
        return RawRecord(source, problem=render("row.bad_json", problem=str(error), column=1))


def _loads(text: str) -> object:
    return json.loads(text)


def _refuse_binary(path: Path, head: bytes) -> None:
    """A model file, an archive or UTF-16 text given as data is one mistake, not thousands of malformed rows."""
    if b"\0" in head[:4096] or head[:4] in (b"PK\x03\x04", b"PAR1") or head[:2] == b"\x1f\x8b":
        raise UsageError("data.not_text", path=path)


READERS = {".jsonl": read_json_lines, ".json": read_json}
