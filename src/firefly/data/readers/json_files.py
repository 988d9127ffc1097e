"""JSON lines and JSON files, in bounded memory."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from firefly.data.readers.opening import open_text, stops_at_damage
from firefly.data.schema import RawRecord, Source
from firefly.errors import UsageError
from firefly.translation import Phrase

CHUNK = 1 << 16
"""Bytes that a window reads at a time."""
TAIL = 16
"""Characters at a window's end that may be the beginning of something longer: a number, -Infinity, an escape."""
CLOSED = ('"', "}", "]")
"""The last character of a value that cannot go on behind the window's end, as a number can."""
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
    """A JSON list of objects, or one object; some files named .json hold one object a line, and are read as such.

    Raises:
        UsageError: not a text file, damaged (gzip), or a list that breaks off: the rest of it cannot be told apart, so
            no count of malformed rows would be true.
    """
    with open_text(path) as file:
        window = _Window(path, file)
        if window.skip(SPACE) == "[":
            yield from _read_list(window)
            return
        record = _read_single(window)
    if record is not None:
        yield record
    else:
        yield from read_json_lines(path)


def _read_list(window: _Window) -> Iterator[RawRecord]:
    window.advance(window.position + 1)
    while (character := window.skip(SPACE_OR_COMMA)) != "]":
        source = window.source
        if not character:
            raise _broken_list(source, Phrase("the JSON list is not closed by ]"))
        yield RawRecord(source, _decode_element(window))
    window.advance(window.position + 1)
    if window.skip(SPACE):
        raise _broken_list(window.source, Phrase("there is more text after the closing ]"))


def _decode_element(window: _Window) -> Any:
    try:
        return window.decode()
    except json.JSONDecodeError as error:
        source, column = window.place(error.pos)
        raise _broken_list(source, _problem(error, column)) from None
    except (ValueError, RecursionError) as error:
        raise _broken_list(window.source, _problem(error)) from None


def _broken_list(place: Source, problem: Phrase) -> UsageError:
    return UsageError(
        "data.broken_list",
        "{place}: {problem}. What follows in this JSON list cannot be read. Correct it, or give one object a line "
        "(.jsonl).",
        place=place,
        problem=problem,
    )


def _read_single(window: _Window) -> RawRecord | None:
    """The one value of a file; None if it holds more, or none: then its lines are looked at one by one."""
    source = window.source
    try:
        value = window.decode()
        return RawRecord(source, value) if not window.skip(SPACE) else None
    except (UsageError, ValueError, RecursionError):
        return None


class _Window:
    """The part of a file that is being decoded. It slides on, and grows only while one value does not fit.

    Attributes:
        text: what is held of the file.
        position: where in `text` reading goes on.
        line: the line of the file at `position`.
    """

    def __init__(self, path: Path, file: io.BufferedReader) -> None:
        self.text, self.position, self.line = "", 0, 1
        self._name, self._file, self._ended = str(path), file, False
        self._cut = 0  # characters of its first line that `text` no longer holds
        self._undecodable: Source | None = None  # where `text` ends, if that is because no UTF-8 follows
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    @property
    def source(self) -> Source:
        return Source(self._name, self.line)

    def place(self, position: int) -> tuple[Source, int]:
        """Line and column (from 1) of a position that lies ahead."""
        line = self.line + self.text.count("\n", self.position, position)
        newline = self.text.rfind("\n", 0, position)
        column = position - newline if newline >= 0 else self._cut + position + 1
        return Source(self._name, line), column

    def advance(self, position: int) -> None:
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def skip(self, pattern: re.Pattern[str]) -> str:
        """Pass over what matches; return the next character, "" at the end of the file."""
        while True:
            match = pattern.match(self.text, self.position)
            self.advance(match.end() if match else self.position)
            if self.position < len(self.text) or self._ended:
                return self.text[self.position : self.position + 1]
            self._grow()

    def decode(self) -> Any:
        """The JSON value at `position`, and advance behind it.

        Raises:
            ValueError, RecursionError: there is none.
            UsageError: bytes that are not UTF-8.
        """
        while True:
            try:
                value, end = _decode(self.text, self.position)
            except json.JSONDecodeError as error:
                if not self._may_go_on(error):
                    raise
            else:
                if self._ended or self.text[end - 1] in CLOSED or end + TAIL <= len(self.text):
                    self.advance(end)
                    return value
            self._grow()

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Whether the text is not wrong, as far as the window shows it, but cut off."""
        cut_off = error.msg.startswith("Unterminated string") or error.pos + TAIL > len(self.text)
        return cut_off and not self._ended

    def _grow(self) -> None:
        """Drop what has been read and read on: as much again as is left, so that a long value is tried few times."""
        if self._undecodable:
            raise UsageError(
                "data.not_utf8",
                "{place}: the text is not UTF-8. Save the file as UTF-8 (for example: iconv -f GB18030 -t UTF-8 OLD > "
                "NEW).",
                place=self._undecodable,
            )
        newline = self.text.rfind("\n", 0, self.position)
        self._cut = self.position - newline - 1 if newline >= 0 else self._cut + self.position
        kept, self.position = self.text[self.position :], 0
        data = self._file.read(max(CHUNK, len(kept)))
        try:
            self.text = kept + self._decoder.decode(data, final=not data)
            self._ended = not data
        except UnicodeDecodeError as error:
            self.text = kept + error.object[: error.start].decode()
            self._undecodable = Source(self._name, self.line + self.text.count("\n"))


def _problem(error: ValueError | RecursionError, column: int | None = None) -> Phrase:
    """What is wrong with a text that json cannot read."""
    if isinstance(error, RecursionError):
        return Phrase("nested too deeply")
    if isinstance(error, UnicodeDecodeError):
        return Phrase("not UTF-8 text (byte {position})", position=error.start)
    if isinstance(error, json.JSONDecodeError):
        return Phrase("not valid JSON: {problem} (column {column})", problem=error.msg, column=column or error.colno)
    # An integer of thousands of digits.
    return Phrase("not valid JSON: {problem} (column {column})", problem=error, column=1)
