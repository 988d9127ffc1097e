"""What an engine that read an export back has to offer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from firefly.export.battery import BatteryRow


@dataclass(frozen=True)
class Candidates:
    """
    Attributes:
        log_probs: token id → natural log-probability: the engine's likeliest, at least 256 of them (fewer: the whole
            vocabulary).
    """

    log_probs: dict[int, float]


class ReadBack(Protocol):
    """An engine that read the export back."""

    name: str

    def prompt_ids(self, row: BatteryRow) -> list[int]:
        """As the engine's own chat endpoint makes them; for `row.text`: of the text."""
        ...

    def ends_at(self, token: int) -> bool:
        """Whether generation stops at this token."""
        ...

    def candidates(self, ids: Sequence[int], positions: Sequence[int]) -> list[Candidates]:
        """For each position p the distribution of the token that follows ids[: p + 1]."""
        ...

    def tokens_per_second(self) -> float:
        """Of generation, measured on a short answer."""
        ...
