"""MOSS-003's own files, plug-in calls included."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from firefly.data.formats.fields import (
    Fields,
    MalformedRecord,
    is_trained,
    optional_text,
    read_text,
    read_tools,
    system_messages,
    wrong_kind,
)
from firefly.data.formats.messages import as_record_says, behind_beginning
from firefly.data.schema import Conversation, Message


@dataclass(frozen=True)
class MossFormat:
    """`chat: {turn_1: {Human, MOSS, Commands, …}, …}`, with markers around every text."""

    def recognizes(self, record: Fields) -> tuple[str, ...]:
        return ("chat",) if isinstance(record.peek("chat"), dict) else ()

    def parse(self, record: Fields) -> Conversation:
        chat = record.inner(record["chat"], "chat")
        if not chat:
            raise MalformedRecord("{field} is empty", field="chat")
        messages = system_messages(record.get("meta_instruction"), "meta_instruction")
        parameters = dict(PARAMETERS)
        if messages:
            parameters |= re.findall(r"API:\s*(\w+)\((\w+)\)", messages[0].text)
        for name in sorted(chat, key=self._number):
            messages += self._turn(chat.inner(chat[name], f"chat.{name}"), parameters)
        messages = behind_beginning(record, messages, "chat")
        return Conversation(as_record_says(record, messages), read_tools(record))

    @staticmethod
    def _number(name: str) -> int:
        match = re.fullmatch(r"turn_(\d{1,9})", name)
        if match is None:
            raise wrong_kind("chat", "turn_1, turn_2, …", got=repr(name))
        return int(match[1])

    def _turn(self, turn: Fields, parameters: dict[str, str]) -> list[Message]:
        """The question; the thoughts; the plug-in's call and what it answered, if one was called; the reply."""
        thought, commands, results = (
            self._optional(turn, key) for key in ("Inner Thoughts", "Commands", "Tool Responses")
        )
        asked = Message.of("user", _unmark(read_text(turn, "Human")))
        trained = is_trained(turn)
        reply = Message.of("assistant", _unmark(read_text(turn, "MOSS")), trained)
        if commands is None and results is None:
            return [asked, replace(reply, reasoning=thought)]
        calls = [] if commands is None else _read_calls(commands, parameters)
        answers = None if results is None else _read_results(results, calls)
        if answers is None:
            raise MalformedRecord(
                '{field} is not a MOSS plug-in\'s call with its results, such as Search("x") and Search("x") => …',
                field=turn.at("Tool Responses" if commands is None else "Commands"),
            )
        called = Message.of("assistant", "", trained, reasoning=thought, tool_calls=tuple(call for _, call in calls))
        return [asked, called, *answers, reply]

    @staticmethod
    def _optional(turn: Fields, key: str) -> str | None:
        """The text of a field that says `None`, or is not there, where nothing was thought, called or answered."""
        text = _unmark(optional_text(turn, key) or "").strip()
        return None if text in ("", "None") else text


def _unmark(text: str) -> str:
    """`<|Human|>: text<eoh>\\n` is text."""
    text = re.sub(r"^\s*<\|[A-Za-z][\w ]*\|>:[ ]?", "", text)
    return re.sub(r"\s*<eo[hmtcr]>\s*$", "", text)


PARAMETERS = {"Search": "query", "Calculate": "expression", "Solve": "equation", "Text2Image": "description"}
"""What the plug-ins call their parameter where the instruction, which says it (`API: Search(query)`), is left out."""
CALL = re.compile(r"""\s*(\w+)\(\s*("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^"'()]*)\s*\)\s*[,;]?""", re.DOTALL)


def _read_calls(commands: str, parameters: dict[str, str]) -> list[tuple[str, dict[str, Any]]]:
    """The calls in `Search("a"), Calculate("1+1")`, each with its text; none in a text that is something else."""
    calls: list[tuple[str, dict[str, Any]]] = []
    position = 0
    while position < len(commands.rstrip()):
        match = CALL.match(commands, position)
        if match is None:
            return []
        name, given = match[1], match[2]
        if given[:1] in ('"', "'"):
            given = re.sub(r"\\([\"'\\])", r"\1", given[1:-1])
        function = {"name": name, "arguments": {parameters.get(name, "input"): given}}
        calls.append((match[0].strip(" \t\n,;"), {"type": "function", "function": function}))
        position = match.end()
    return calls


def _read_results(results: str, calls: list[tuple[str, dict[str, Any]]]) -> list[Message] | None:
    """What the calls answered, a message each: several stand in one text, each behind its call and `=>`."""
    if not calls:
        return None
    starts = [0]
    for text, _ in calls[1:]:
        starts.append(results.find(text, starts[-1] + 1))
    if min(starts) < 0:
        return None
    ends = [*starts[1:], len(results)]
    return [
        Message.of("tool", results[start:end].strip(), name=call["function"]["name"])
        for start, end, (_, call) in zip(starts, ends, calls, strict=True)
    ]
