"""The seams of data: what a record, a conversation and its tokens are on the way to a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Role = Literal["system", "user", "assistant"]

IGNORE = -100
"""The label of a token without a loss (the convention of PyTorch's cross-entropy and of transformers)."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a record stands: file and line (for a JSON array: the line its object starts on)."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One object of a data file, or the problem that kept it from being one."""

    source: Source
    value: Any = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `trained` is false for a reply that its record excludes with `"loss": false`."""

    role: Role
    content: str
    trained: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order; a system message, if any, comes first."""

    messages: tuple[Message, ...]

    def as_dicts(self, upto: int | None = None) -> list[dict[str, str]]:
        """The first `upto` messages as chat templates take them."""
        return [{"role": message.role, "content": message.content} for message in self.messages[:upto]]


@dataclass(frozen=True, slots=True)
class Rendered:
    """Text as the model sees it and the character spans that carry loss, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Tokens:
    """One training example.

    `input_ids` and `labels` are int32 arrays of one length; `labels[i]` is `input_ids[i]` where token i is trained
    and `IGNORE` elsewhere (unshifted: the loss of token i is read from position i - 1).
    """

    input_ids: np.ndarray
    labels: np.ndarray

    @property
    def num_targets(self) -> int:
        """Trained tokens; the first token of an example has no position that could predict it."""
        return int(np.count_nonzero(self.labels[1:] != IGNORE))
