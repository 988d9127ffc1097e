"""What comes of a reply: pieces of a stream, and the whole that they make."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from firefly.data.schema import Message


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of what is said."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what is thought."""

    text: str


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A call that begins (with `id` and `name`), or more of its arguments' JSON text."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class CallDropped:
    """A call that began was cut off or is broken: it is none, and its text follows as content."""

    index: int


Piece = ContentDelta | ReasoningDelta | CallDelta | CallDropped


@dataclass(frozen=True)
class Reply:
    """A parsed reply.

    Attributes:
        reasoning: None: it did not think.
        tool_calls: as `schema.Message` has them, each with an `id`.
    """

    content: str
    reasoning: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> Reply:
        """Put a stream together."""
        dropped = {piece.index for piece in pieces if isinstance(piece, CallDropped)}
        names: dict[int, tuple[str | None, str | None]] = {}
        arguments: dict[int, list[str]] = {}
        for piece in pieces:
            if isinstance(piece, CallDelta) and piece.index not in dropped:
                if piece.name is not None:
                    names[piece.index] = (piece.id, piece.name)
                arguments.setdefault(piece.index, []).append(piece.arguments)
        calls = [
            {"type": "function", "id": identifier, "function": {"name": name, "arguments": json.loads("".join(texts))}}
            for (identifier, name), texts in zip(names.values(), arguments.values(), strict=True)
        ]
        reasoning = "".join(piece.text for piece in pieces if isinstance(piece, ReasoningDelta))
        content = "".join(piece.text for piece in pieces if isinstance(piece, ContentDelta))
        return cls(content, reasoning or None, tuple(calls))

    def as_message(self) -> Message:
        """The reply as a turn of a conversation's history."""
        return Message.of("assistant", self.content, reasoning=self.reasoning, tool_calls=self.tool_calls)
