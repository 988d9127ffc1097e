"""Find the tuning under which a peer is fastest on this machine: only that one is a fair opponent."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from cases import Case
from engines import KEEP_FREED_MEMORY, Layout, default_tuning, layouts, precisions
from processes import Result, Side, SideFailed, SideStopped, Tuning

# A tuning that needs this many times the best one's time is not waited for.
PATIENCE = 3.0
START_UP_SECONDS = 60.0


class Sweep:
    """Tunings tried so far; `best` is the one with the most rows per second.

    Choices are improved one after the other: every combination would take a day. A winner that needs two choices made
    together can be missed.
    """

    def __init__(self, side: Side, record: Callable[[dict[str, Any]], None], limit: int | None = None) -> None:
        """`limit` ends a trial after so many tunings."""
        self.side = side
        self.record = record
        self.left = limit
        self.results: dict[str, Result] = {}
        self.best: Tuning | None = None

    def run(self, name: str, case: Case, has_bf16: bool) -> Tuning:
        """Precision with attention, then layout, then the allocator; try the engine's defaults; return the best.

        Freed memory is kept from the start: eager attention, the fastest where bf16 products are fast, is slow without.
        """
        first, *others = layouts(name, case)
        for attention in ("eager", "sdpa"):
            for precision in precisions(case, has_bf16):
                self.attempt(_tuning(precision, first, attention))
        settings = self.winning_result()["settings"]
        for layout in others:
            self.attempt(_tuning(settings["precision"], layout, settings["attention"]))
        best = self.winner()
        self.attempt(Tuning(name=f"{best.name}, freed memory given back", arguments=best.arguments))
        self.attempt(default_tuning(name, case, has_bf16))
        return self.winner()

    def attempt(self, tuning: Tuning) -> None:
        """Measure one tuning; one that fails or cannot win is recorded as such and left."""
        if self.left is not None:
            if self.left == 0:
                return
            self.left -= 1
        described = asdict(tuning)
        try:
            result = self.side.run(tuning, timeout_seconds=self.time_limit())
        except SideStopped as stopped:
            self.record(described | {"outcome": f"{stopped}, {PATIENCE:g} times what the best took"})
            return
        except SideFailed as failed:
            self.record(described | {"outcome": "failed", "log": str(failed)})
            return
        self.results[tuning.name] = result
        if self.best is None or result["rows_per_second"] > self.winning_result()["rows_per_second"]:
            self.best = tuning
        self.record(described | {"outcome": "measured", "result": result})

    def time_limit(self) -> float | None:
        """Seconds after which a run can no longer beat the best; none while there is nothing to beat."""
        if self.best is None:
            return None
        best = self.winning_result()
        return START_UP_SECONDS + PATIENCE * best["rows"] / best["rows_per_second"]

    def winner(self) -> Tuning:
        """Return the best tuning; it is an error when none ran at all."""
        if self.best is None:
            raise SideFailed(f"no tuning of {self.side.name} ran to its end; the logs are in the result file's `sweep`")
        return self.best

    def winning_result(self) -> Result:
        """Return what the best tuning measured."""
        return self.results[self.winner().name]


def _tuning(precision: str, layout: Layout, attention: str) -> Tuning:
    return Tuning(
        name=f"{precision}, {layout.name}, {attention}",
        arguments=f"--precision {precision} {layout.arguments} --attention {attention}",
        environment=KEEP_FREED_MEMORY,
    )
