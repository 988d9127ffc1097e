"""Find the tuning under which a peer is fastest on this machine: only that one is a fair opponent."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict

from processes import Result, Side, SideFailed, SideStopped, Tuning

# What SFTTrainer does when its user sets nothing but the batch size.
TRL_DEFAULT = Tuning(name="default", arguments="--precision autocast --batch_size 8 --gradient_checkpointing")

PRECISIONS = ("float32", "bfloat16", "autocast")

PACKED = "--packing --batch_size 1"
OTHER_LAYOUTS = {
    "packed, batch 2": "--packing --batch_size 2",
    "padding-free, batch 8": "--padding_free --batch_size 8",
    "padding-free, batch 2": "--padding_free --batch_size 2",
    "grouped by length, batch 8": "--group_by_length --batch_size 8",
    "padded, batch 8": "--batch_size 8",
    "padded, batch 4": "--batch_size 4",
    "padded, batch 2": "--batch_size 2",
    "alone, batch 1": "--batch_size 1",
}

# glibc hands large blocks back to the kernel at once, so every step pays for its pages again.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}

# A tuning that needs this many times the best one's time is not waited for.
PATIENCE = 3.0
START_UP_SECONDS = 60.0


class Sweep(ABC):
    """Tunings tried so far; `best` is the one with the most rows per second.

    Choices are improved one after the other: every combination would take a day. A winner that needs two
    choices made together can be missed; whoever suspects one passes it as the tuning to run.
    """

    def __init__(self, side: Side, record: Callable[[dict], None]) -> None:
        self.side = side
        self.record = record
        self.results: dict[str, Result] = {}
        self.best: Tuning | None = None

    @abstractmethod
    def run(self) -> Tuning:
        """Try tunings and return the fastest."""

    def attempt_attention_and_allocator(self) -> None:
        """Try eager attention on the best so far, then glibc keeping freed memory on whichever won."""
        best = self.winner()
        eager = f"{best.arguments} --attention eager"
        self.attempt(Tuning(name=f"{best.name}, eager attention", arguments=eager))
        best = self.winner()
        name = f"{best.name}, freed memory kept"
        self.attempt(Tuning(name=name, arguments=best.arguments, environment=KEEP_FREED_MEMORY))

    def attempt(self, tuning: Tuning) -> None:
        """Measure one tuning; one that fails or cannot win is recorded as such and left."""
        try:
            result = self.side.run(tuning, timeout_seconds=self.time_limit())
        except SideStopped as stopped:
            self.record(asdict(tuning) | {"outcome": f"{stopped}, {PATIENCE:g} times what the best took"})
            return
        except SideFailed as failed:
            self.record(asdict(tuning) | {"outcome": "failed", "log": str(failed)})
            return
        self.results[tuning.name] = result
        if self.best is None or result["rows_per_second"] > self.winning_result()["rows_per_second"]:
            self.best = tuning
        self.record(asdict(tuning) | {"outcome": "measured", "result": result})

    def time_limit(self) -> float | None:
        """Seconds after which a run can no longer beat the best; none while there is nothing to beat."""
        if self.best is None:
            return None
        best = self.winning_result()
        return START_UP_SECONDS + PATIENCE * best["rows"] / best["rows_per_second"]

    def winner(self) -> Tuning:
        """Return the best tuning; it is an error when none ran at all."""
        if self.best is None:
            raise SystemExit(f"no tuning of {self.side.name} ran to its end; the logs are in the result file's `sweep`")
        return self.best

    def winning_result(self) -> Result:
        """Return what the best tuning measured."""
        return self.results[self.winner().name]

    def best_setting(self, name: str) -> str:
        """Read one setting of the best tuning from its result."""
        self.winner()
        return self.winning_result()["settings"][name]


class SftSweep(Sweep):
    """The tunings of TRL's `SFTTrainer`."""

    def run(self) -> Tuning:
        """Improve precision, then layout, then attention and allocator."""
        for precision in PRECISIONS:
            name = f"{precision}, packed, batch 1"
            self.attempt(Tuning(name=name, arguments=f"--precision {precision} {PACKED}"))
        precision = self.best_setting("precision")
        for layout, arguments in OTHER_LAYOUTS.items():
            with_precision = f"--precision {precision} {arguments}"
            self.attempt(Tuning(name=f"{precision}, {layout}", arguments=with_precision))
        self.attempt(TRL_DEFAULT)
        self.attempt_attention_and_allocator()
        return self.winner()


class PreferenceSweep(Sweep):
    """The tunings of a peer's DPO trainer, which all pad and run the reference in every step."""

    def __init__(
        self,
        side: Side,
        record: Callable[[dict], None],
        *,
        precisions: Sequence[str],
        default: Tuning | None,
        limit: int | None = None,
    ) -> None:
        """`default` is what the peer's user gets who sets only the batch size; `limit` ends a trial run early."""
        super().__init__(side, record)
        self.precisions = precisions
        self.default = default
        self.left = limit

    def run(self) -> Tuning:
        """Improve precision, then batch size, then attention and allocator."""
        for precision in self.precisions:
            self.attempt(Tuning(name=f"{precision}, batch 1", arguments=f"--precision {precision} --batch_size 1"))
        precision = self.best_setting("precision")
        self.attempt(Tuning(name=f"{precision}, batch 2", arguments=f"--precision {precision} --batch_size 2"))
        self.attempt_attention_and_allocator()
        if self.default is not None:
            self.attempt(self.default)
        return self.winner()

    def attempt(self, tuning: Tuning) -> None:
        """Measure one tuning, unless the limit is reached."""
        if self.left is None or self.left > 0:
            super().attempt(tuning)
        if self.left is not None:
            self.left -= 1
