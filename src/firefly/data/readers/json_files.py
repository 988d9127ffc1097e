"""JSON lines, in bounded memory, and JSON files, read at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from firefly.data.readers.opening import not_utf8, open_text, stops_at_damage
from firefly.data.schema import RawRecord, Source
from firefly.errors import UsageError
from firefly.translation import Phrase

MOST_BYTES = 2 << 30
"""What is read at once of a JSON list: as text in memory it takes up to four times as much."""
SPACE = re.compile(r"[ \t\r\n]*")
SPACE_OR_COMMA = re.compile(r"[ \t\r\n,]*")

_decode = json.JSONDecoder().raw_decode


@stops_at_damage
def read_json_lines(path: Path) -> Iterator[RawRecord]:
    """One JSON object a line; blank lines are marked. A line that is no JSON is a problem of its own.

    Raises:
        UsageError: not a text file, or damaged (gzip).
    """
    name = str(path)
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            source = Source(name, number)
            yield _parse(source, stripped) if (stripped := line.rstrip()) else RawRecord(source, blank=True)


def _parse(source: Source, line: bytes) -> RawRecord:
    # json.loads does the same in twice the time around the scanner, and lets raw surrogates pass.
    try:
        text = line.decode()
        value, end = _decode(text)
        if end == len(text):
            return RawRecord(source, value)
    except (ValueError, RecursionError):
        pass
    return _parse_carefully(source, line)


def _parse_carefully(source: Source, line: bytes) -> RawRecord:
    """A line with spaces in front, or with a problem to be named."""
    try:
        return RawRecord(source, json.loads(line.decode()))
    except (ValueError, RecursionError) as error:
        return RawRecord(source, problem=_problem(error))


@stops_at_damage
def read_json(path: Path) -> Iterator[RawRecord]:
    """A JSON list of objects, or one object, read at once; some files named .json hold one object a line, and are read
    as such.

    Raises:
        UsageError: not a text file, not UTF-8, damaged (gzip), too large, or a list that breaks off: the rest of it
            cannot be told apart, so no count of malformed rows would be true.
    """
    name = str(path)
    with open_text(path) as file:
        pieces = iter(lambda: file.readline(MOST_BYTES + 1), b"")  # a list may be one line
        first = next((piece for piece in pieces if piece.strip()), b"")
    is_list = first.lstrip().startswith(b"[")
    if not is_list and _parse(Source(name, 1), first.rstrip()).problem is None:
        yield from read_json_lines(path)
        return
    with open_text(path) as file:
        data = file.read(MOST_BYTES + 1)
    if is_list and len(data) > MOST_BYTES:
        raise UsageError(
            "data.large_list",
            "{path}: a JSON list of more than {limit} GB is not read. Give one object a line (.jsonl), for example: "
            "jq -c '.[]' OLD.json > NEW.jsonl",
            path=path,
            limit=MOST_BYTES >> 30,
        )
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        if is_list:
            raise not_utf8(Source(name, 1 + data.count(b"\n", 0, error.start))) from None
        text = ""
    del data
    single = None if is_list else _read_single(name, text)
    yield from _read_list(name, text) if is_list else [single] if single else read_json_lines(path)


def _read_single(name: str, text: str) -> RawRecord | None:
    """The one value of a file, over several lines; None if it holds more, or none."""
    start = _skip(SPACE, text, 0)
    try:
        value, end = _decode(text, start)
    except (ValueError, RecursionError):
        return None
    is_more = _skip(SPACE, text, end) < len(text)
    return None if is_more else RawRecord(Source(name, 1 + text.count("\n", 0, start)), value)


def _read_list(name: str, text: str) -> Iterator[RawRecord]:
    position, line = text.index("[") + 1, 1 + text.count("\n", 0, text.index("["))
    while True:
        start = _skip(SPACE_OR_COMMA, text, position)
        line += text.count("\n", position, start)
        source = Source(name, line)
        if start == len(text):
            raise _broken_list(source, Phrase("the JSON list is not closed by ]"))
        if text[start] == "]":
            break
        try:
            value, position = _decode(text, start)
        except json.JSONDecodeError as error:
            raise _broken_list(Source(name, error.lineno), _problem(error)) from None
        except (ValueError, RecursionError) as error:
            raise _broken_list(source, _problem(error)) from None
        yield RawRecord(source, value)
        line += text.count("\n", start, position)
    rest = _skip(SPACE, text, start + 1)
    if rest < len(text):
        source = Source(name, line + text.count("\n", start, rest))
        raise _broken_list(source, Phrase("there is more text after the closing ]"))


def _skip(pattern: re.Pattern[str], text: str, position: int) -> int:
    """Behind what matches at `position`, if anything does."""
    match = pattern.match(text, position)
    return match.end() if match else position


def _broken_list(place: Source, problem: Phrase) -> UsageError:
    return UsageError(
        "data.broken_list",
        "{place}: {problem}. What follows in this JSON list cannot be read. Correct it, or give one object a line "
        "(.jsonl).",
        place=place,
        problem=problem,
    )


def _problem(error: ValueError | RecursionError) -> Phrase:
    """What is wrong with a text that json cannot read."""
    if isinstance(error, RecursionError):
        return Phrase("nested too deeply")
    if isinstance(error, UnicodeDecodeError):
        return Phrase("not UTF-8 text (byte {position})", position=error.start)
    if isinstance(error, json.JSONDecodeError):
        return Phrase("not valid JSON: {problem} (column {column})", problem=error.msg, column=error.colno)
    # An integer of thousands of digits.
    return Phrase("not valid JSON: {problem} (column {column})", problem=error, column=1)
