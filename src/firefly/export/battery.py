"""Conversations that an export is proved on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from firefly.data.schema import Message


@dataclass(frozen=True)
class BatteryRow:
    """One conversation as trained.

    Attributes:
        messages: they end in the assistant's reply.
        prompt: ids of the trained prompt, up to the reply.
        ids: prompt and reply.
        text: for a model without a chat template: plain text in place of messages.
    """

    name: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    text: str | None


@dataclass(frozen=True)
class Battery:
    """
    Attributes:
        stop_ids: tokens that end a reply as trained.
    """

    rows: tuple[BatteryRow, ...]
    stop_ids: tuple[int, ...]
