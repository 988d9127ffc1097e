"""The proof that a template writes what a conversation holds: a copy of it in which everything is marked is rendered as
the conversation is, and the marks are looked for. A name that also stands in another text proves nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from firefly.data.schema import Conversation, Message

NUMBERS_FROM = 90_817_263_000
"""Marks that stand for numbers count on from here."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A text that stands in the copy for a part of the conversation, and which part that is.

    Attributes:
        index: the message; None for a tool.
    """

    text: str
    part: Literal["tool", "content", "reasoning", "call"]
    index: int | None = None


def is_plain(conversation: Conversation) -> bool:
    """Whether there are neither tools nor calls nor results."""
    return not conversation.tools and not any(item.tool_calls or item.role == "tool" for item in conversation.messages)


def mark(conversation: Conversation) -> tuple[Conversation, list[Mark]]:
    """A copy with a mark in every tool, content, thought and call, and those marks.

    Texts keep their beginning and the white space around them, by which some templates decide what becomes of them.
    """
    marker = _Marker()
    tools = tuple(marker.tool(tool) for tool in conversation.tools)
    messages = tuple(marker.message(item, index) for index, item in enumerate(conversation.messages))
    return Conversation(messages, tools), marker.marks


class _Marker:
    def __init__(self) -> None:
        self.marks: list[Mark] = []
        self._numbers: Iterator[int] = itertools.count()

    def message(self, item: Message, index: int) -> Message:
        content = self._text(item.text, "content", index)
        reasoning = item.reasoning and self._text(item.reasoning, "reasoning", index)
        calls = tuple(self._call(call, index) for call in item.tool_calls)
        return replace(item.with_text(content), reasoning=reasoning, tool_calls=calls)

    def tool(self, tool: Mapping[str, Any]) -> Mapping[str, Any]:
        """A function's name, description and parameters marked; what templates do not show of a schema is left."""
        function = dict(tool["function"])
        function["name"] = self._name(function["name"], "tool")
        if isinstance(function.get("description"), str):
            function["description"] = self._text(function["description"], "tool")
        parameters = function.get("parameters")
        if isinstance(parameters, Mapping) and isinstance(parameters.get("properties"), Mapping):
            renamed = {name: self._name(name, "tool") for name in parameters["properties"]}
            changed: dict[str, Any] = {
                "properties": {renamed[name]: schema for name, schema in parameters["properties"].items()}
            }
            if isinstance(parameters.get("required"), list | tuple):
                required = [name for name in parameters["required"] if isinstance(name, str)]
                changed["required"] = [renamed.get(name, name) for name in required]
            function["parameters"] = {**parameters, **changed}
        return {**tool, "function": function}

    def _call(self, call: Mapping[str, Any], index: int) -> Mapping[str, Any]:
        function = dict(call["function"])
        function["name"] = self._name(function["name"], "call", index)
        function["arguments"] = self._value(function["arguments"], index)
        return {**call, "function": function}

    def _value(self, value: Any, index: int) -> Any:
        """Names, texts and numbers inside an argument."""
        if isinstance(value, Mapping):
            return {self._name(name, "call", index): self._value(item, index) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._value(item, index) for item in value]
        if isinstance(value, str):
            return self._text(value, "call", index)
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = NUMBERS_FROM + next(self._numbers)
            self.marks.append(Mark(str(number), "call", index))
            return number
        return value

    def _text(self, text: str, part: Any, index: int | None = None) -> str:
        """A text with a mark behind its last character that is no white space; a blank one stays as it is."""
        stripped = text.rstrip()
        return self._name(stripped, part, index) + text[len(stripped) :] if stripped else text

    def _name(self, name: str, part: Any, index: int | None = None) -> str:
        made = f"fireflyq7x{next(self._numbers)}z"
        self.marks.append(Mark(made, part, index))
        return name + made
