"""Files to records. A record keeps its file and line; a line that is no record becomes a problem, never a crash."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from firefly.data.schema import RawRecord, Source
from firefly.errors import UsageError
from firefly.messages import render


def read_records(path: Path, key: str = "train_file") -> Iterator[RawRecord]:
    """Yield the records of one .jsonl or .json file (a list, or one object) in file order; blank lines are skipped.

    Args:
        key: the configuration key that names the file, for messages.

    Raises:
        UsageError: at once, if the file is missing, a folder, unreadable or of an unknown kind; while reading, if it is
            not text, or a list that breaks off (nothing after that place can be told apart).
    """
    try:
        path.open("rb").close()
    except FileNotFoundError:
        raise UsageError("data.no_file", key=key, path=path) from None
    except IsADirectoryError:
        raise UsageError("data.is_folder", path=path) from None
    except OSError as error:
        raise UsageError("data.unreadable", key=key, path=path, problem=error.strerror or error) from None
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
            if line := line.rstrip():
                yield _parse(Source(str(path), number), line)


def read_json(path: Path) -> Iterator[RawRecord]:
    """A JSON array of objects, or one object; some files named .json hold one object a line, and are read as such."""
    data = path.read_bytes()
    _refuse_binary(path, data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        yield RawRecord(Source(str(path), line), problem=_problem(error))
        return
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "[":
        yield from _read_array(path, text, start + 1)
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        yield from read_json_lines(path)
        return
    yield RawRecord(Source(str(path), text.count("\n", 0, start) + 1), value)


def _read_array(path: Path, text: str, position: int) -> Iterator[RawRecord]:
    """Decode the elements one by one, so that each knows its line.

    Where one is broken, the rest of the list cannot be told apart: no count of malformed rows would be true, so the
    whole file is refused.
    """
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    while True:
        position = _skip(text, position, " \t\r\n,")
        line, counted = line + text.count("\n", counted, position), position
        source = Source(str(path), line)
        if position >= len(text):
            raise UsageError("data.broken_list", place=source, problem=render("row.array_not_closed"))
        if text[position] == "]":
            break
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            place = Source(str(path), error.lineno) if isinstance(error, json.JSONDecodeError) else source
            raise UsageError("data.broken_list", place=place, problem=_problem(error)) from None
        yield RawRecord(source, value)
    position = _skip(text, position + 1, " \t\r\n")
    if position < len(text):
        source = Source(str(path), line + text.count("\n", counted, position))
        raise UsageError("data.broken_list", place=source, problem=render("row.after_array"))


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position


def _parse(source: Source, line: bytes) -> RawRecord:
    try:
        return RawRecord(source, json.loads(line.decode("utf-8")))
    except (ValueError, RecursionError) as error:
        return RawRecord(source, problem=_problem(error))


def _problem(error: ValueError | RecursionError) -> str:
    """What is wrong with a text that json cannot read."""
    if isinstance(error, RecursionError):
        return render("row.too_deep")
    if isinstance(error, UnicodeDecodeError):
        return render("row.not_utf8", position=error.start)
    if isinstance(error, json.JSONDecodeError):
        return render("row.bad_json", problem=error.msg, column=error.colno)
    return render("row.bad_json", problem=error, column=1)  # an integer of thousands of digits


def _refuse_binary(path: Path, head: bytes) -> None:
    """A model file, an archive or UTF-16 text given as data is one mistake, not thousands of malformed rows."""
    if b"\0" in head[:4096] or head[:4] in (b"PK\x03\x04", b"PAR1") or head[:2] == b"\x1f\x8b":
        raise UsageError("data.not_text", path=path)


READERS = {".jsonl": read_json_lines, ".json": read_json}
