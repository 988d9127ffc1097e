"""What an engine that read an export back has to offer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from firefly.export.battery import BatteryRow


@dataclass(frozen=True)
class Candidates:
    """An engine's likeliest tokens at one position: natural log-probability by token, 256 or more of them where the
    vocabulary has so many."""

    log_probs: dict[int, float]


class ReadBack(Protocol):
    """An engine that has loaded what was exported."""

    @property
    def name(self) -> str:
        """The engine and its version."""
        ...

    def prompt_ids(self, row: BatteryRow) -> list[int]:
        """The ids that its own chat endpoint makes of the row's messages but the last; of a text, all its ids."""
        ...

    def ends_at(self, token: int) -> bool:
        """Whether an answer ends at this token."""
        ...

    def candidates(self, ids: Sequence[int], positions: Sequence[int]) -> list[Candidates]:
        """For each position p: of the token that follows `ids[: p + 1]`."""
        ...

    def tokens_per_second(self) -> float:
        """Of one short answer."""
        ...
