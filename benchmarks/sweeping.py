"""Find the tuning under which an engine is fastest on this machine: only that one is a fair opponent."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cases import Case
from engines import (
    OWN_TOKENS,
    PRODUCTS,
    default_tuning,
    layouts,
    own_tuning,
    peer_tuning,
    precisions,
)
from processes import Result, Side, SideFailed, SideStopped, Tuning

# A tuning that needs this many times the best one's time, start-up included, is not waited for.
PATIENCE = 2.0
GRACE_SECONDS = 10.0
NOT_TRIED = "not tried: the time was used up"
# Less than this behind the best is worth a second look: the same run varies by as much from one minute to the next.
CLOSE = 0.9
# A precision this far behind with the better attention is not tried with the other one.
BEHIND = 0.75


class Sweep:
    """Tunings tried so far, and how fast each was: input tokens per second of the steady steps.

    Tokens, not rows: packs hold other rows in a step, and with few steps it is chance how long those are. Choices are
    improved one after the other, the ones known to be good first, until the time is used up; every combination would
    take a day. A winner that needs two choices made together can be missed.
    """

    def __init__(
        self,
        side: Side,
        record: Callable[[dict[str, Any]], None],
        *,
        seconds: float = math.inf,
        known: Sequence[Mapping[str, Any]] = (),
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """No new tuning is begun after `seconds`; `record` is handed every attempt, and what was left out.

        `known` are attempts recorded before, by a sweep that was interrupted: they are not made again.
        """
        self.known = list(known)
        self.complete = True
        self.side = side
        self.record = record
        self.now = now
        self.end = now() + seconds
        self.rates: dict[str, list[float]] = {}
        self.tunings: dict[str, Tuning] = {}
        self.longest_wait = math.inf

    def run(self, name: str, case: Case, rates: Mapping[str, float]) -> Tuning:
        """Try an engine's tunings where products have these `rates`; return the best."""
        if name == "firefly":
            self._try_own(case, rates)
        else:
            self._try_peer(name, case, rates)
        self.look_again()
        return self.best

    def _try_peer(self, name: str, case: Case, rates: Mapping[str, float]) -> None:
        """Attention in the fastest type, the other types, layouts, that type otherwise, the allocator, the defaults.

        Freed memory is kept from the start: eager attention, the fastest where bf16 products are fast, is slow without.
        """
        (first, *others), (layout, *other_layouts) = precisions(case, rates), layouts(name, case)
        attentions = ["eager", "sdpa"]
        for attention in attentions:
            self.attempt(peer_tuning(first, layout, attention))
        attentions.sort(key=lambda attention: -self.rate_of(peer_tuning(first, layout, attention)))
        with_own_products = [other for other in others if PRODUCTS[other] != PRODUCTS[first]]
        for other in with_own_products:
            found = self.attempt(peer_tuning(other, layout, attentions[0]))
            if found >= BEHIND * self.best_rate:  # what is best in one type need not be in another
                self.attempt(peer_tuning(other, layout, attentions[1]))
        precision, attention = max(
            ((precision, attention) for precision in (first, *with_own_products) for attention in attentions),
            key=lambda found: self.rate_of(peer_tuning(found[0], layout, found[1])),
        )
        for other in other_layouts:
            self.attempt(peer_tuning(precision, other, attention))
        layout = max(layouts(name, case), key=lambda x: self.rate_of(peer_tuning(precision, x, attention)))
        for other in others:
            if other not in with_own_products:
                self.attempt(peer_tuning(other, layout, attention))
        if self.best_rate:
            best = max((first, *others), key=lambda x: self.rate_of(peer_tuning(x, layout, attention)))
            self.attempt(peer_tuning(best, layout, attention, keep_memory=False))
        self.attempt(default_tuning(name, case, rates))

    def _try_own(self, case: Case, rates: Mapping[str, float]) -> None:
        """Our defaults, then what could be chosen by hand: the precision, and tokens of a microbatch in the better."""
        default = default_tuning("firefly", case, rates)
        self.attempt(default)
        chosen = [name for name in ("bfloat16", "float32") if name in {PRODUCTS[x] for x in precisions(case, rates)}]
        for precision in chosen:
            self.attempt(own_tuning(precision))
        precision = max(chosen, key=lambda name: self.rate_of(own_tuning(name)))
        for tokens in OWN_TOKENS:
            self.attempt(own_tuning(precision, tokens))
        by_hand = [tuning for name, tuning in self.tunings.items() if name != default.name]
        if by_hand:  # in turns: the question is one of a few percent
            rival = max(by_hand, key=self.rate_of)
            for tuning in (rival, default, default, rival):
                self.attempt(tuning, again=True)

    def attempt(self, tuning: Tuning, *, again: bool = False) -> float:
        """Measure one tuning and return its rate; one that fails or cannot win is recorded as such and has none."""
        described = asdict(tuning)
        if (before := self._made_before(tuning)) is not None:
            if "result" in before:
                self._measured(tuning, before["result"])
            return self.rate_of(tuning)
        if self.now() >= self.end:
            self.complete = False
            self.record(described | {"outcome": NOT_TRIED})
            return 0.0
        try:
            result = self.side.run(tuning, timeout_seconds=None if self.longest_wait == math.inf else self.longest_wait)
        except SideStopped as stopped:
            self.record(described | {"outcome": f"{stopped}, {PATIENCE:g} times what the best took"})
            return 0.0
        except SideFailed as failed:
            self.record(described | {"outcome": "failed", "log": str(failed)})
            return 0.0
        if not all(math.isfinite(loss) for loss in result["losses"]):
            self.record(described | {"outcome": "failed", "log": "its loss is not a number"})
            return 0.0
        self._measured(tuning, result)
        self.record(described | {"outcome": "measured again" if again else "measured", "result": brief(result)})
        return self.rate_of(tuning)

    def _made_before(self, tuning: Tuning) -> Mapping[str, Any] | None:
        for number, attempt in enumerate(self.known):
            if attempt["name"] == tuning.name and attempt["outcome"] != NOT_TRIED:
                return self.known.pop(number)
        return None

    def _measured(self, tuning: Tuning, result: Mapping[str, Any]) -> None:
        self.tunings[tuning.name] = tuning
        self.rates.setdefault(tuning.name, []).append(result["tokens_per_second"])
        if self.rate_of(tuning) == self.best_rate:
            self.longest_wait = GRACE_SECONDS + PATIENCE * result["process_seconds"]

    def look_again(self) -> None:
        """Measure the best once more where others came close to it, and those: the mean of both runs decides."""
        close = [name for name in self.rates if self.rate_of(self.tunings[name]) >= CLOSE * self.best_rate]
        close.sort(key=lambda name: self.rate_of(self.tunings[name]))
        if len(close) > 1:
            for name in close[-2:]:
                if len(self.rates[name]) == 1:
                    self.attempt(self.tunings[name], again=True)

    def rate_of(self, tuning: Tuning) -> float:
        """Mean of what a tuning measured; 0 without a measurement."""
        found = self.rates.get(tuning.name)
        return sum(found) / len(found) if found else 0.0

    @property
    def best_rate(self) -> float:
        """The rate of the best tuning so far."""
        return max((self.rate_of(tuning) for tuning in self.tunings.values()), default=0.0)

    @property
    def best(self) -> Tuning:
        """Return the best tuning; it is an error when none ran at all."""
        if not self.tunings:
            raise SideFailed(f"no tuning of {self.side.name} ran to its end; the logs are in the machine's file")
        return max(self.tunings.values(), key=self.rate_of)


def brief(result: Result) -> dict[str, Any]:
    """What is kept of a sweep's run."""
    names = ("rows", "tokens_per_second", "rows_per_second", "steady_seconds", "process_seconds", "losses", "versions")
    peak = result["peak_memory_bytes"] - result["memory_after_imports_bytes"]
    return {name: result[name] for name in names} | {"peak_less_imports_bytes": peak}
