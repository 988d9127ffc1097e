"""Reading the calls of a reply, in the form that its template writes."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from firefly.data.tool_calls import Identify
from firefly.generation.replies.markers import CallMarkers, Fields, Keys, split_words, white_end
from firefly.generation.replies.pieces import CallDelta, CallDropped, ContentDelta, Piece
from firefly.generation.replies.reader import Malformed, Reader, Step, json_text, read_value, shared_end, types_of

Tools = Sequence[Mapping[str, Any]]
"""JSON schemas of functions, as chat templates take them."""

_NAME = re.compile(r"[^\s<>\[\](){}\"'`|,=;]*")
_LONGEST_KEY = 256
BARE_TOKENS = ("<|python_tag|>", "<|python_start|>", "<|python_end|>")
"""Llama writes a call's object with one of these in front or without, with several separated by `;`: its template only
says how calls stand in a history."""


@dataclass
class Call:
    """A call that is being read.

    Attributes:
        place: where the text before it ends, but for white space; `gap`: what of that is not text.
        index: its number, once it has been handed out.
    """

    place: int
    gap: str = ""
    name: str | None = None
    identifier: str | None = None
    arguments: Any = None
    has_arguments: bool = False
    index: int | None = None


class CallReader(Reader):
    """The part of a reply's parser that reads calls.

    `_text` is what is not settled yet, and `_at` how far it has been handed out: within a call the text stays, in case
    that it is none after all.
    """

    def __init__(self, tools: Tools, identify: Identify | None, reply_id: str) -> None:
        super().__init__()
        self._identify, self._reply_id = identify, reply_id
        self._properties = dict(map(_described, tools))
        self._pieces: list[Piece] = []
        self._at = 0
        self._spoken = False
        """Whether the text since the last call is more than white space."""
        self._called = False
        self._identifiers: list[str] = []

    def _section(self, calls: CallMarkers, place: int) -> Step[bool]:
        """Calls between their first and their last marker; whether there was one."""
        at = yield from self._literal(calls.begin, place)
        found = False
        while at is not None:
            start = yield from self._literal(calls.head, at)
            end = None if start is None else (yield from self._call(calls, start, place))
            if end is None:
                break
            self._at, found = end, True
            place = end
            if calls.trigger and not calls.begin.strip():
                break  # the next call has a marker of its own
            at = yield from self._literal(calls.between, end)
        if found and (end := (yield from self._literal(calls.end, self._at, least=0))) is not None:
            self._at = end
        return found

    def _bare(self, calls: CallMarkers) -> Step[None]:
        """Calls that no marker announces, at the beginning of a reply."""
        announced = calls.begin.strip() and (yield from self._literal(calls.begin, self._at)) is not None
        if announced or not isinstance(calls.form, Keys):
            yield from self._section(calls, self._at)
            return
        at = yield from self._separators(self._at)
        while self._text.startswith("{", at):
            end = yield from self._call(calls, at, self._at)
            if end is None:
                return
            self._at = end
            at = yield from self._separators(end)
            if at == len(self._text):
                self._at = at

    def _separators(self, at: int) -> Step[int]:
        while True:
            at = yield from self._skip(at)
            if self._text[at : at + 1] and self._text[at] in "[];,":
                at += 1
                continue
            for token in BARE_TOKENS:
                if (end := (yield from self._literal(token, at))) is not None:
                    at = end
                    break
            else:
                return at

    def _call(self, calls: CallMarkers, start: int, place: int) -> Step[int | None]:
        """The end of a call that begins at `start`; None: it is none."""
        call = Call(place, calls.gap)
        at = start
        try:
            for literal, part in calls.parts:
                behind = yield from self._literal(literal, at)
                if behind is None:
                    if part == "id":  # some models leave it out
                        continue
                    raise Malformed
                at = behind
                if part == "object" and isinstance(calls.form, Keys):
                    at = yield from self._object(calls, calls.form, at, call)
                elif part == "arguments" and isinstance(calls.form, Fields):
                    self._check_name(calls, call)
                    at = yield from self._fields(calls, calls.form, at, call)
                elif part == "arguments":
                    self._check_name(calls, call)
                    at = yield from self._skip(at)
                    at = yield from self._arguments(at, call)
                else:
                    end = yield from self._run(_NAME, at)
                    word, at = self._text[at:end], end
                    if part == "id":
                        call.identifier = word or None
                        if calls.named_id:
                            call.name = _name_within(word, *calls.named_id)
                    else:
                        call.name = word
            if not isinstance(calls.form, Fields):
                behind = yield from self._literal(calls.tail, at, least=0)
                at = at if behind is None else behind
        except (Malformed, ValueError, RecursionError):
            if call.index is not None:
                self._pieces.append(CallDropped(call.index))
            return None
        self._spoken, self._called = False, True
        return at

    def _check_name(self, calls: CallMarkers, call: Call) -> None:
        """A call without a marker is one only if its function is known, where functions are."""
        if (
            not isinstance(call.name, str)
            or not call.name.encode()
            or (not calls.trigger and self._properties and call.name not in self._properties)
        ):
            raise Malformed

    def _begin(self, call: Call) -> None:
        """Hand out a call's identifier and name, if that is not done."""
        if call.index is not None:
            return
        white = self._text[self._at : call.place]
        kept = white[: len(white) - shared_end(white, call.gap)]
        if self._spoken and kept:
            self._pieces.append(ContentDelta(kept))
            self._at += len(kept)
        call.index = len(self._identifiers)
        identifier = call.identifier
        if not identifier or identifier in self._identifiers:
            identifier = "call_" + hashlib.sha256(f"{self._reply_id}/{call.index}".encode()).hexdigest()[:24]
            if self._identify:
                identifier = self._identify(identifier, call.name or "", call.index)
        self._identifiers.append(identifier)
        self._pieces.append(CallDelta(call.index, id=identifier, name=call.name))

    def _argue(self, call: Call, text: str) -> None:
        if call.index is not None and text:
            self._pieces.append(CallDelta(call.index, text))

    def _arguments(self, at: int, call: Call) -> Step[int]:
        """Arguments that are a JSON object."""
        if not (yield from self._is_there(at)) or self._text[at] != "{":
            raise Malformed
        self._begin(call)
        value, at = yield from self._json(at, functools.partial(self._argue, call))
        if not isinstance(value, dict):
            raise Malformed
        return at

    def _object(self, calls: CallMarkers, keys: Keys, at: int, call: Call, inner: bool = False) -> Step[int]:
        """A call that is one JSON object, its keys in any order."""
        at = yield from self._expect("{", at)
        sure = bool(calls.trigger or self._properties)
        while True:
            at = yield from self._skip(at)
            if self._text[at : at + 1] == "}":
                break
            key, at = yield from self._json(at)
            at = yield from self._skip((yield from self._expect(":", at)))
            char = self._text[at : at + 1]
            if key == keys.name and char == '"':
                call.name, at = yield from self._json(at)
                self._check_name(calls, call)
            elif key in (keys.arguments, "arguments", "parameters"):
                if call.has_arguments:
                    raise Malformed
                # An identifier comes first in a stream; here it may still follow.
                if char == "{" and call.name and sure and (not keys.id or call.identifier):
                    at = yield from self._arguments(at, call)
                else:
                    value, at = yield from self._json(at)
                    call.arguments = json.loads(value) if isinstance(value, str) else value
                call.has_arguments = True
            elif key in (keys.id, "id") and char == '"':
                call.identifier, at = yield from self._json(at)
            elif key == keys.within and char == "{" and not inner:
                at = yield from self._object(calls, keys, at, call, inner=True)
            elif calls.trigger or key == "type":
                _, at = yield from self._json(at)
            else:  # an object that answers a question
                raise Malformed
            at = yield from self._skip(at)
            if self._text[at : at + 1] != ",":
                break
            at += 1
        at = yield from self._expect("}", at)
        if inner:
            return at
        self._check_name(calls, call)
        if not calls.trigger and not call.has_arguments:
            raise Malformed
        if call.index is None:
            arguments = {} if call.arguments is None else call.arguments
            if not isinstance(arguments, dict):
                raise Malformed
            self._begin(call)
            self._argue(call, json_text(arguments))
        return at

    def _fields(self, calls: CallMarkers, form: Fields, at: int, call: Call) -> Step[int]:
        """Arguments that stand one by one, to the end of the call."""
        properties = self._properties.get(call.name or "", {})
        count = 0
        while (end := (yield from self._literal(calls.tail, at, least=1))) is None:
            opening = yield from self._literal((form.between if count else "") + form.key_open, at)
            if opening is None:
                raise Malformed
            stop = split_words(form.value_open)[0]
            place = yield from self._find(stop, opening, _LONGEST_KEY)
            key = self._text[opening:place].strip()
            start = yield from self._literal(form.value_open, place)
            schema = properties.get(key)
            if form.text_open and (behind := (yield from self._literal(form.text_open, place))) is not None:
                start, schema = behind, {"type": "string"}
            if start is None or not key or "\n" in key:
                raise Malformed
            self._begin(call)
            self._argue(call, ("{" if not count else ", ") + json_text(key) + ": ")
            if form.quote is not None:
                value, at = yield from self._value(start, form.quote)
                self._argue(call, json_text(value))
            else:
                at = yield from self._element(start, form.value_close, schema, call)
            count += 1
        self._begin(call)
        self._argue(call, "}" if count else "{}")
        return end

    def _element(self, at: int, close: str, schema: Any, call: Call) -> Step[int]:
        """A value without quotes, up to what closes it. A text is handed out as it comes."""
        # MiniCPM5 writes a text with < or & in it so.
        quoted = yield from self._literal("<![CDATA[", at)
        is_text = quoted is not None or types_of(schema) == {"string"}
        core = close.strip()
        white = close[: close.index(core)]
        if quoted is not None:
            at, core, white = quoted, "]]>", ""
        if is_text:
            self._argue(call, '"')
        sent = at
        while (place := self._text.find(core, at)) < 0:
            if self._ended:
                raise Malformed
            if is_text:
                ready = len(self._text[sent:].rstrip()) + sent
                ready -= max((n for n in range(len(core), 0, -1) if self._text.endswith(core[:n], 0, ready)), default=0)
                ready = sent + len(self._text[sent:ready].rstrip())
                self._argue(call, json_text(self._text[sent:ready])[1:-1])
                sent = ready
            at = max(sent, len(self._text) - len(core))
            yield
        rest = self._text[sent:place]
        rest = rest[: len(rest) - shared_end(rest, white)]
        if is_text:
            self._argue(call, json_text(rest)[1:-1] + '"')
        else:
            self._argue(call, json_text(read_value(rest, schema)))
        end = place + len(core)
        if quoted is None:
            return (yield from self._white(white_end(close), end))
        behind = yield from self._literal(close, end)
        if behind is None:
            raise Malformed
        return behind


def _described(tool: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """A function's name and the schemas of its parameters."""
    function = tool.get("function", tool)
    parameters = function.get("parameters") if isinstance(function, Mapping) else None
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return str(name or ""), properties if isinstance(properties, Mapping) else {}


def _name_within(identifier: str, before: str, behind: str) -> str:
    """The function's name in an identifier that holds it."""
    name = identifier.removeprefix(before)
    return name.rpartition(behind)[0] or name if behind else name
