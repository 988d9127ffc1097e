"""Reading what a model wrote piece by piece: literal markers, JSON, and values as Python or a template writes them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Generator, Mapping
from typing import Any, NoReturn, TypeVar

from firefly.generation.replies.markers import split_words, white_end

T = TypeVar("T")
Step = Generator[None, None, T]
"""A part of the parser and what it returns; each `yield` waits for more text."""

_WHITE = re.compile(r"\s*")
_SCALAR = re.compile(r"[^\s,:}\]\"{\[]*")
_BARE = re.compile(r"[^\s,:}\])]*")
_INSIDE_STRING = re.compile(r"(?:[^\"\\]|\\[^\x00-\x1f])+")
_OUTSIDE_STRING = re.compile(r"[\s\d:,.+\-eEtrufalsn]+")
_INSIDE_QUOTES = {char: re.compile(rf"(?:[^{char}\\]|\\.)+", re.DOTALL) for char in "\"'"}
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_CONTROLS = {number: f"\\u{number:04x}" for number in range(32)}


class Malformed(Exception):
    """What looked like a call is none."""


class Reader:
    """A text that grows, and ways to read on from a place in it.

    They are written as if all of the text were there, and wait where the next characters decide.
    """

    def __init__(self) -> None:
        self._text, self._ended = "", False

    def _literal(self, literal: str, at: int, least: int | None = None) -> Step[int | None]:
        """The end of a marker that stands at a place; None: it does not stand there.

        White space inside it and before it may be more or less than the template's. Of white space at its end, as much
        is taken as is there: what follows may be a text.

        Args:
            least: so many words of it are enough where the text ends.
        """
        for number, word in enumerate(split_words(literal)):
            place = yield from self._skip(at)
            while len(self._text) - place < len(word) and word.startswith(self._text[place:]) and not self._ended:
                yield
            if not self._text.startswith(word, place):
                is_cut = self._ended and word.startswith(self._text[place:])
                return len(self._text) if least is not None and number >= least and is_cut else None
            at = place + len(word)
        return (yield from self._white(white_end(literal), at))

    def _white(self, white: str, at: int) -> Step[int]:
        """Behind as much of given white space as stands at a place."""
        for char in white:
            if not (yield from self._is_there(at)) or self._text[at] != char:
                break
            at += 1
        return at

    def _skip(self, at: int) -> Step[int]:
        """Behind white space."""
        while True:
            match = _WHITE.match(self._text, at)
            at = match.end() if match else at
            if at < len(self._text) or self._ended:
                return at
            yield

    def _is_there(self, at: int) -> Step[bool]:
        """Whether the text goes on at a place."""
        while at >= len(self._text) and not self._ended:
            yield
        return at < len(self._text)

    def _expect(self, char: str, at: int) -> Step[int]:
        at = yield from self._skip(at)
        if self._text[at : at + 1] != char:
            raise Malformed
        return at + 1

    def _run(self, pattern: re.Pattern[str], at: int) -> Step[int]:
        """The end of what a pattern matches, which goes on until something else stands there."""
        while True:
            match = pattern.match(self._text, at)
            end = match.end() if match else at
            if end < len(self._text) or self._ended:
                return end
            yield

    def _find(self, marker: str, at: int, most: int | None = None) -> Step[int]:
        """The next place of a marker; at most so far on."""
        end = None if most is None else at + most
        sought = at
        while (place := self._text.find(marker, sought, end)) < 0:
            if self._ended or (end is not None and len(self._text) >= end):
                raise Malformed
            sought = max(at, len(self._text) - len(marker) + 1)
            yield
        return place

    def _value(self, at: int, quote: str) -> Step[tuple[Any, int]]:
        """A value as JSON, Python or Gemma writes it, with texts in quotes."""
        at = yield from self._skip(at)
        if not (yield from self._is_there(at)):
            raise Malformed
        if quote not in ('"', "'") and (start := (yield from self._literal(quote, at))) is not None:
            place = yield from self._find(quote, start)
            return self._text[start:place], place + len(quote)
        char = self._text[at]
        if char in "\"'":
            end = at + 1
            while True:
                match = _INSIDE_QUOTES[char].match(self._text, end)
                end = match.end() if match else end
                if self._text.startswith(char, end):
                    return _unquoted(self._text[at : end + 1]), end + 1
                if self._ended:
                    raise Malformed
                yield
        if char in "{[(":
            return (yield from self._container(at, quote))
        end = yield from self._run(_BARE, at)
        return _constant(self._text[at:end]), end

    def _container(self, at: int, quote: str) -> Step[tuple[Any, int]]:
        opened = self._text[at]
        closed = {"{": "}", "[": "]", "(": ")"}[opened]
        values: list[Any] = []
        items: dict[str, Any] = {}
        at += 1
        while True:
            at = yield from self._skip(at)
            if self._text[at : at + 1] == closed:
                return (items if opened == "{" else values), at + 1
            if opened == "{":
                starts_quoted = self._text[at : at + 1] in "\"'" or (yield from self._literal(quote, at)) is not None
                if starts_quoted:
                    key, at = yield from self._value(at, quote)
                else:
                    end = yield from self._run(_BARE, at)
                    key, at = self._text[at:end], end
                at = yield from self._expect(":", at)
                items[str(key)], at = yield from self._value(at, quote)
            else:
                value, at = yield from self._value(at, quote)
                values.append(value)
            at = yield from self._skip(at)
            if self._text[at : at + 1] == ",":
                at += 1
            elif self._text[at : at + 1] != closed:
                raise Malformed

    def _json(self, at: int, deliver: Callable[[str], None] | None = None) -> Step[tuple[Any, int]]:
        """A JSON value and its end; its text is delivered as it comes.

        Line breaks within strings, which models write and JSON does not allow, are escaped.
        """
        written: list[str] = []
        sent = 0
        depth, inside = 0, False
        if not (yield from self._is_there(at)):
            raise Malformed
        if self._text[at] not in '"{[':
            end = yield from self._run(_SCALAR, at)
            return json.loads(self._text[at:end], parse_constant=_refuse), end
        while True:
            if inside and (match := _INSIDE_STRING.match(self._text, at)):
                written.append(match.group().translate(_CONTROLS))
                at = match.end()
            elif not inside and (match := _OUTSIDE_STRING.match(self._text, at)):
                written.append(match.group())
                at = match.end()
            char = self._text[at : at + 1]
            if not char or (inside and char == "\\" and at + 1 == len(self._text)):
                if self._ended:
                    raise Malformed
                if deliver:
                    deliver("".join(written[sent:]))
                    sent = len(written)
                yield
                continue
            written.append(char)
            at += 1
            if char == '"':
                inside = not inside
            elif char in "{[":
                depth += 1
            elif char in "}]":
                depth -= 1
            else:  # no JSON
                raise Malformed
            if not depth and not inside:
                break
        value = json.loads("".join(written), parse_constant=_refuse)
        if deliver:
            deliver("".join(written[sent:]))
        return value, at


def read_value(text: str, schema: Any) -> Any:
    """A value that is written without quotes, as a parameter's schema has it; without one, as JSON if it is that."""
    types = types_of(schema)
    value = text.strip()
    readers: list[Callable[[str], Any]] = [json.loads]
    if value[:1] in ("{", "[") or value in ("True", "False", "None"):
        readers.append(ast.literal_eval)  # what a template writes that has no `tojson`
    for read in readers:
        try:
            found = _plain(read(value))
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        kind = _type_of(found)
        if kind != "string" and (not types or kind in types or (kind == "integer" and "number" in types)):
            return found
    return text


def _plain(value: Any) -> Any:
    """A value of Python as JSON has it.

    Raises:
        ValueError, TypeError: JSON has none like it.
    """
    return json.loads(json.dumps(value, allow_nan=False))


def json_text(value: Any) -> str:
    """A value as JSON that can be encoded."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(value)
    return text


def _type_of(value: Any) -> str:
    kinds = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}
    return "null" if value is None else kinds[type(value)]


def types_of(schema: Any) -> set[str]:
    """The types that a JSON schema allows; none: it does not say."""
    if not isinstance(schema, Mapping):
        return set()
    given = schema.get("type")
    if isinstance(given, str):
        return {given} | ({"null"} if schema.get("nullable") else set())
    if isinstance(given, list):
        return {item for item in given if isinstance(item, str)}
    for several in ("anyOf", "oneOf"):
        if isinstance(schema.get(several), list):
            inner = [types_of(item) for item in schema[several]]
            return set().union(*inner) if all(inner) else set()
    if isinstance(schema.get("enum"), list):
        return {_type_of(item) for item in schema["enum"]}
    return set()


def _constant(text: str) -> Any:
    known = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
    if text in known:
        return known[text]
    return _plain(json.loads(text, parse_constant=_refuse))


def _unquoted(text: str) -> str:
    """A quoted text of JSON or Python."""
    if text[0] == '"':
        try:
            return json.loads(text, strict=False)
        except ValueError:
            pass

    def known(escape: re.Match[str]) -> str:
        # Python keeps the backslash of an escape that it does not know, and warns.
        return escape.group() if escape.group(1) in "\\'\"abfnrtvxuUN01234567" else "\\" + escape.group()

    try:
        return ast.literal_eval(_ESCAPE.sub(known, text).replace("\n", "\\n"))
    except SyntaxError:
        raise Malformed from None


def _refuse(constant: str) -> NoReturn:
    """NaN and Infinity are no JSON."""
    raise Malformed


def shared_end(text: str, white: str) -> int:
    """How many characters at the end of a text are those at the end of white space that a template writes."""
    count = 0
    while count < min(len(text), len(white)) and text[-1 - count] == white[-1 - count]:
        count += 1
    return count
