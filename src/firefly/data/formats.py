"""Record shapes. Each entry of FORMATS recognises its records by their keys and turns one into a `Conversation`.

A new format is one class and one line in the table. A record that fits none, or two, is reported, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from firefly.data.schema import IGNORE, Conversation, Message, Tokens
from firefly.messages import render

Record = Mapping[str, Any]


class MalformedRecord(Exception):
    """The record has its format's keys but not its shape; the text says what is wrong with which field."""

    def __init__(self, code: str, **values: object) -> None:
        super().__init__(render(code, **values))


class Format(Protocol):
    def recognises(self, record: Record) -> bool: ...

    def parse(self, record: Record) -> Conversation | Tokens: ...


@dataclass(frozen=True)
class FireflyFormat:
    """The tutorial's: `conversation: [{human, assistant}, …]`, optional `system`; other keys are ignored."""

    def recognises(self, record: Record) -> bool:
        return "conversation" in record

    def parse(self, record: Record) -> Conversation:
        turns = record["conversation"]
        if not isinstance(turns, list):
            raise MalformedRecord("row.wrong_type", field="conversation", expected="list", got=_kind(turns))
        if not turns:
            raise MalformedRecord("row.empty_field", field="conversation")
        messages = _system(record.get("system"))
        for number, turn in enumerate(turns):
            if not isinstance(turn, Mapping):
                raise MalformedRecord(
                    "row.wrong_type", field=f"conversation[{number}]", expected="object", got=_kind(turn)
                )
            messages.append(Message("user", _text(turn, "human", f"conversation[{number}].human")))
            content = _text(turn, "assistant", f"conversation[{number}].assistant")
            messages.append(Message("assistant", content, _trained(turn, f"conversation[{number}]")))
        return Conversation(tuple(messages))


@dataclass(frozen=True)
class AlpacaFormat:
    """`instruction`, `output`, optional `input` and `system`; the question is instruction, newline, input."""

    def recognises(self, record: Record) -> bool:
        return "instruction" in record and "output" in record

    def parse(self, record: Record) -> Conversation:
        if record.get("history"):
            raise MalformedRecord("row.not_yet", field="history")
        question = _text(record, "instruction", "instruction")
        if record.get("input") is not None and (extra := _text(record, "input", "input")):
            question = f"{question}\n{extra}"
        answer = _text(record, "output", "output")
        return Conversation((*_system(record.get("system")), Message("user", question), Message("assistant", answer)))


@dataclass(frozen=True)
class MessagesFormat:
    """OpenAI's `messages: [{role, content}, …]`, with `"loss": false` on a reply that is not to be trained."""

    def recognises(self, record: Record) -> bool:
        return "messages" in record

    def parse(self, record: Record) -> Conversation:
        items = record["messages"]
        if not isinstance(items, list):
            raise MalformedRecord("row.wrong_type", field="messages", expected="list", got=_kind(items))
        if not items:
            raise MalformedRecord("row.empty_field", field="messages")
        if record.get("tools"):
            raise MalformedRecord("row.not_yet", field="tools")
        messages = []
        for number, item in enumerate(items):
            place = f"messages[{number}]"
            if not isinstance(item, Mapping):
                raise MalformedRecord("row.wrong_type", field=place, expected="object", got=_kind(item))
            for name in ("tool_calls", "reasoning_content"):
                if item.get(name):
                    raise MalformedRecord("row.not_yet", field=f"{place}.{name}")
            messages.append(
                Message(_role(item, place), _text(item, "content", f"{place}.content"), _trained(item, place))
            )
        _check_order(messages)
        return Conversation(tuple(messages))


@dataclass(frozen=True)
class TokensFormat:
    """Already tokenised: `input_ids`, and `labels` with -100 where there is no loss. Taken as it is, never rendered."""

    def recognises(self, record: Record) -> bool:
        return "input_ids" in record and "labels" in record

    def parse(self, record: Record) -> Tokens:
        ids, labels = _integers(record, "input_ids"), _integers(record, "labels")
        if len(ids) != len(labels):
            raise MalformedRecord("row.lengths_differ", ids=len(ids), labels=len(labels))
        if not len(ids):
            raise MalformedRecord("row.empty_field", field="input_ids")
        if ids.min() < 0:
            raise MalformedRecord("row.wrong_type", field="input_ids", expected="ids ≥ 0", got=str(ids.min()))
        if np.any((labels != IGNORE) & (labels != ids)):
            raise MalformedRecord("row.labels_differ")
        return Tokens(ids, labels)


FORMATS: dict[str, Format] = {
    "firefly": FireflyFormat(),
    "alpaca": AlpacaFormat(),
    "messages": MessagesFormat(),
    "tokens": TokensFormat(),
}


def parse_record(value: Any) -> tuple[str, Conversation | Tokens]:
    """Return the format's name and the parsed record.

    Raises:
        MalformedRecord: not an object, no known format, two formats at once, or a field that is missing or wrong.
    """
    if not isinstance(value, Mapping):
        raise MalformedRecord("row.not_an_object", got=_kind(value))
    fitting = [name for name, fmt in FORMATS.items() if fmt.recognises(value)]
    if not fitting:
        # repr: a key may hold anything, also what no terminal or file takes.
        keys = ", ".join(map(repr, sorted(value)[:8])) or "–"
        raise MalformedRecord("row.unknown_format", keys=keys, known=", ".join(FORMATS))
    if len(fitting) > 1:
        raise MalformedRecord("row.two_formats", formats=", ".join(fitting))
    return fitting[0], FORMATS[fitting[0]].parse(value)


def _text(record: Record, name: str, place: str) -> str:
    if name not in record:
        raise MalformedRecord("row.missing_field", field=place)
    value = record[name]
    if not isinstance(value, str):
        raise MalformedRecord("row.wrong_type", field=place, expected="text", got=_kind(value))
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise MalformedRecord("row.surrogate", field=place) from None
    return value


def _role(item: Record, place: str) -> Any:
    role = _text(item, "role", f"{place}.role")
    if role == "tool":
        raise MalformedRecord("row.not_yet", field=f"{place}.role = tool")
    if role not in ("system", "user", "assistant"):
        raise MalformedRecord("row.unknown_role", field=f"{place}.role", role=role)
    return role


def _check_order(messages: list[Message]) -> None:
    """System first, then user and assistant in turn: what every chat template of these families can render."""
    turns = messages[1:] if messages[0].role == "system" else messages
    for number, message in enumerate(turns):
        expected = "user" if number % 2 == 0 else "assistant"
        if message.role != expected:
            place = number + len(messages) - len(turns)
            raise MalformedRecord("row.role_order", field=f"messages[{place}]", expected=expected, got=message.role)


def _system(value: Any) -> list[Message]:
    """A system prompt that is absent, null or empty is no system prompt."""
    if value is None or value == "":
        return []
    return [Message("system", _text({"system": value}, "system", "system"))]


def _trained(item: Record, place: str) -> bool:
    flag = item.get("loss", True)
    if not isinstance(flag, bool):
        raise MalformedRecord("row.wrong_type", field=f"{place}.loss", expected="true or false", got=_kind(flag))
    return flag


def _integers(record: Record, name: str) -> np.ndarray:
    value = record[name]
    if not isinstance(value, list) or not all(type(item) is int and abs(item) < 2**31 for item in value):
        raise MalformedRecord("row.wrong_type", field=name, expected="list of integers", got=_kind(value))
    return np.asarray(value, dtype=np.int32)


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "true/false", type(None): "null", int: "number"}
    return names.get(type(value), "number" if isinstance(value, float) else type(value).__name__)
