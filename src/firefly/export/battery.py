"""The conversations that an export is judged on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from firefly.data.schema import Message


@dataclass(frozen=True)
class BatteryRow:
    """One conversation, or one text of a model that has no chat template.

    Attributes:
        messages: as the template takes them; the last is the reply that is compared.
        prompt: ids up to that reply, as chat and training have them; of a text, its first token.
        ids: prompt and reply.
        text: the plain text in place of messages.
    """

    name: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    text: str | None = None


@dataclass(frozen=True)
class Battery:
    """What is compared, and the tokens that end a reply as it was trained."""

    rows: tuple[BatteryRow, ...]
    stop_ids: tuple[int, ...]
