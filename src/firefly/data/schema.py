"""The seams of data: what a record, a conversation and its tokens are on the way to a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from firefly.translation import Phrase

Role = Literal["system", "user", "assistant", "tool"]

IGNORE = -100
"""The label of a token without a loss (the convention of PyTorch's cross-entropy and of transformers)."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a record stands: file and line (for a JSON array: the line its object starts on; for tables and archives
    the row)."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One object of a data file, the problem that kept it from being one, or a blank line (which is no row)."""

    source: Source
    value: Any = None
    problem: Phrase | None = None
    blank: bool = False


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text of a message."""

    text: str


Part = TextPart
"""What a message's content is made of; a union, once there are images."""


def as_parts(text: str) -> tuple[Part, ...]:
    """The content of a message of one text; none for an empty one."""
    return (TextPart(text),) if text else ()


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        content: its parts in order, with the borders that the record has; none for an empty text.
        trained: false for a reply that its record excludes with `"loss": false`.
        reasoning: what the model thought before the reply, where the record keeps it apart from `content`.
        tool_calls: functions the reply calls, each `{"type": "function", "function": {"name", "arguments": object}}`
            and an `id` where the record has one.
        name, tool_call_id: of a tool's answer: the function, and the call it answers.
    """

    role: Role
    content: tuple[Part, ...]
    trained: bool = True
    reasoning: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    name: str | None = None
    tool_call_id: str | None = None

    @classmethod
    def of(cls, role: Role, text: str, trained: bool = True, **fields: Any) -> Message:
        """A message of one text."""
        return cls(role, as_parts(text), trained, **fields)

    @property
    def text(self) -> str:
        """All of its text, with nothing between two parts."""
        return self.content[0].text if len(self.content) == 1 else "".join([part.text for part in self.content])

    def with_text(self, text: str) -> Message:
        """The same turn with another text."""
        return self if text == self.text else replace(self, content=as_parts(text))

    def as_dict(self) -> dict[str, Any]:
        """The message as chat templates take it; keys without a value are left out, as templates test for them.

        The content is one text: most templates add it to others. A list of parts makes them fail, lose it in silence or
        write its Python form, and those that take one do not agree on what stands between two texts.
        """
        if self.reasoning is None and not self.tool_calls and self.name is None and self.tool_call_id is None:
            return {"role": self.role, "content": self.text}
        # gpt-oss reads `thinking`; transformers gives both names, too.
        optional = {
            "reasoning_content": self.reasoning,
            "thinking": self.reasoning,
            "tool_calls": [dict(call) for call in self.tool_calls] or None,
            "name": self.name,
            "tool_call_id": self.tool_call_id,
        }
        present = {key: value for key, value in optional.items() if value is not None}
        return {"role": self.role, "content": self.text, **present}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order; a system message, if any, comes first. `tools` are JSON schemas of callable functions."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    def as_dicts(self, upto: int | None = None) -> list[dict[str, Any]]:
        """The first `upto` messages as chat templates take them."""
        return [message.as_dict() for message in self.messages[:upto]]


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two conversations that share their prompt; their last replies are the preferred one and the other.

    Attributes:
        margin: by how much the chosen answer is the better one, where the record says it.
    """

    chosen: Conversation
    rejected: Conversation
    margin: float | None = None


@dataclass(frozen=True, slots=True)
class Labelled:
    """A conversation and whether its last reply is a good one, with no other reply to compare it with (KTO).

    `conversation` has only those replies untrained that its record leaves out, whatever the label says.
    """

    conversation: Conversation
    desirable: bool

    def as_demonstration(self) -> Conversation:
        """The conversation for supervised training: nothing of it is trained where its last reply is a bad one."""
        if self.desirable:
            return self.conversation
        untrained = tuple(replace(message, trained=False) for message in self.conversation.messages)
        return replace(self.conversation, messages=untrained)


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text: every token of it is trained."""

    text: str


@dataclass(frozen=True, slots=True)
class Rendered:
    """Text as the model sees it and the character spans that carry loss, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Tokens:
    """One training example.

    `input_ids` and `labels` are int32 arrays of one length; `labels[i]` is `input_ids[i]` where token i is trained
    and `IGNORE` elsewhere (unshifted: the loss of token i is read from position i - 1). `starts` says where segments
    begin in it: a block of pretraining holds several documents that do not see each other. `desirable` is the verdict
    on its answer, where that is what is trained (KTO).
    """

    input_ids: np.ndarray
    labels: np.ndarray
    starts: tuple[int, ...] = (0,)
    desirable: bool | None = None

    @property
    def runs(self) -> np.ndarray:
        """Where each trained run (a reply with its stop token) begins and ends, int64 (runs, 2)."""
        trained = np.concatenate([[False], self.labels != IGNORE, [False]])
        return np.flatnonzero(trained[1:] != trained[:-1]).reshape(-1, 2)

    @property
    def num_targets(self) -> int:
        """Trained tokens; the first token of a segment has no position that could predict it."""
        trained = int(np.count_nonzero(self.labels != IGNORE))
        return trained - sum(int(self.labels[start] != IGNORE) for start in self.starts if start < len(self.labels))


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A preference pair as the model sees it: the tokens that both answers share, then what follows in each.

    `input_ids` and `labels` (int32) lie flat as [prompt][chosen][rejected]; `prompt` and `chosen` are the first two
    lengths. No token of the prompt is trained, and the first of an answer is predicted from the prompt's last. `margin`
    is by how much the record says that the chosen answer is better.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    prompt: int
    chosen: int
    margin: float | None = None

    @classmethod
    def of(cls, chosen: Tokens, rejected: Tokens, margin: float | None = None) -> TokenPair:
        """Share the longest common prefix that ends before the first trained token of either."""
        most = min(int(np.flatnonzero(np.append(side.labels, 0) != IGNORE)[0]) for side in (chosen, rejected))
        differ = np.flatnonzero(chosen.input_ids[:most] != rejected.input_ids[:most])
        prompt = int(differ[0]) if len(differ) else most
        ids = np.concatenate([chosen.input_ids, rejected.input_ids[prompt:]])
        labels = np.concatenate([chosen.labels, rejected.labels[prompt:]])
        return cls(ids, labels, prompt, len(chosen.input_ids) - prompt, margin)

    @property
    def rejected(self) -> int:
        """Tokens of the rejected answer."""
        return len(self.input_ids) - self.prompt - self.chosen

    @property
    def sides(self) -> tuple[Tokens, Tokens]:
        """Prompt and chosen answer, prompt and rejected answer: each as a model is fed without sharing."""
        border = self.prompt + self.chosen
        other = np.r_[0 : self.prompt, border : len(self.input_ids)]
        return (
            Tokens(self.input_ids[:border], self.labels[:border]),
            Tokens(self.input_ids[other], self.labels[other]),
        )

    @property
    def num_targets(self) -> int:
        """Trained tokens of both answers."""
        return sum(side.num_targets for side in self.sides)

    @property
    def chosen_targets(self) -> int:
        """Trained tokens of the chosen answer."""
        return self.sides[0].num_targets


Example = Tokens | TokenPair
