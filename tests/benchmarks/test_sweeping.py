"""The search for an engine's fastest tuning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from measurements import result

FAST_BF16 = {"float32": 2e11, "bfloat16": 4.4e11, "float16": 2e10}
FAST_FP32 = {"float32": 3.3e11, "bfloat16": 1.85e11, "float16": 1e11}


class TimedSide:
    """A side whose rate depends on its tuning; a clock goes on by `process_seconds` a run."""

    name = "peer"

    def __init__(self, rate: Callable[[str], float], process_seconds: float = 10.0) -> None:
        self.rate, self.process_seconds, self.seconds = rate, process_seconds, 0.0
        self.tried: list[str] = []

    def run(self, tuning: Any, *, timeout_seconds: float | None = None) -> dict[str, Any]:
        from processes import SideFailed, SideStopped

        self.tried.append(tuning.name)
        rate = self.rate(tuning.name)
        if rate == 0.0:
            raise SideFailed("it crashed")
        takes = self.process_seconds / rate
        if timeout_seconds is not None and takes > timeout_seconds:
            self.seconds += timeout_seconds
            raise SideStopped(f"stopped after {timeout_seconds:.0f} s")
        self.seconds += takes
        return result(tokens_per_second=rate, process_seconds=takes)


def sweep(side: TimedSide, name: str, case: str, rates: dict[str, float], **options: Any) -> tuple[Any, list[Any]]:
    from cases import CASES
    from sweeping import Sweep

    recorded: list[Any] = []
    found = Sweep(side, recorded.append, now=lambda: side.seconds, **options)  # type: ignore[arg-type]
    found.run(name, CASES[case], rates)
    return found, recorded


def test_float32_wins_where_it_is_faster_whatever_the_flags_say() -> None:
    def rate(name: str) -> float:
        return (1.5 if name.startswith("float32") else 1.0) * (1.3 if "sdpa" in name else 1.0)

    found, _ = sweep(TimedSide(rate), "llamafactory", "dpo_lora", FAST_FP32)
    assert found.best.name.startswith("float32, padded, batch 1, sdpa")


def test_the_type_with_the_faster_products_need_not_win() -> None:
    def rate(name: str) -> float:
        return {"float32, padded, batch 1, sdpa, freed memory kept": 2.0}.get(name, 1.6 if "eager" in name else 1.0)

    found, _ = sweep(TimedSide(rate), "llamafactory", "dpo_lora", FAST_BF16)
    assert found.best.name == "float32, padded, batch 1, sdpa, freed memory kept"


def test_layouts_are_tried_in_the_best_precision_and_attention() -> None:
    def rate(name: str) -> float:
        return (
            (2.0 if "eager" in name else 1.0) * (2.0 if name.startswith("bfloat16") else 1.0) * (1 + ("packed" in name))
        )

    side = TimedSide(rate)
    found, _ = sweep(side, "trl", "sft_lora", FAST_BF16)
    assert found.best.arguments == "--precision bfloat16 --layout packed --batch_size 1 --attention eager"
    assert side.tried[0] == found.best.name, "the one known to be good comes first, and the others are held against it"
    assert "float32, packed, batch 1, sdpa, freed memory kept" not in side.tried


def test_no_tuning_is_begun_when_the_time_is_used_up() -> None:
    side = TimedSide(lambda name: 1.0)
    _, recorded = sweep(side, "trl", "sft_lora", FAST_BF16, seconds=25.0)
    assert len(side.tried) == 3
    assert {attempt["outcome"] for attempt in recorded[3:]} == {"not tried: the time was used up"}


def test_an_interrupted_sweep_goes_on_where_it_stopped() -> None:
    def rate(name: str) -> float:
        return 2.0 if "padded" in name else 0.0 if "sdpa" in name else 1.0

    first = TimedSide(rate)
    found, recorded = sweep(first, "trl", "sft_lora", FAST_BF16, seconds=15.0)
    assert not found.complete
    rest = TimedSide(rate)
    found, more = sweep(rest, "trl", "sft_lora", FAST_BF16, known=recorded)
    assert found.complete
    assert not set(first.tried) & {attempt["name"] for attempt in more if attempt["outcome"] == "measured"}
    assert "padded" in found.best.name


def test_a_tuning_that_cannot_win_is_stopped_and_one_that_fails_is_left() -> None:
    def rate(name: str) -> float:
        return 0.0 if "sdpa" in name else 1.0 if "bfloat16, padded, batch 1" in name else 0.2

    found, recorded = sweep(TimedSide(rate), "llamafactory", "dpo_lora", FAST_BF16)
    outcomes = {attempt["name"]: attempt["outcome"] for attempt in recorded}
    assert outcomes["bfloat16, padded, batch 1, sdpa, freed memory kept"] == "failed"
    assert "stopped after 30 s" in outcomes["float32, padded, batch 1, eager, freed memory kept"]
    assert found.best.name == "bfloat16, padded, batch 1, eager, freed memory kept"


def test_close_rivals_are_measured_again_and_their_mean_decides() -> None:
    noisy = {"bfloat16, padded, batch 1, eager, freed memory kept": [1.05, 0.8]}

    def rate(name: str) -> float:
        if name in noisy:
            return noisy[name].pop(0)
        return 1.0 if name == "autocast, padded, batch 1, eager, freed memory kept" else 0.5

    found, _ = sweep(TimedSide(rate), "llamafactory", "dpo_lora", FAST_BF16)
    assert found.best.name == "autocast, padded, batch 1, eager, freed memory kept"


def test_our_defaults_are_held_against_what_is_found_by_hand() -> None:
    from cases import CASES
    from engines import default_tuning

    side = TimedSide(lambda name: {"float32, 512 tokens a microbatch": 2.0, "float32": 1.5}.get(name, 1.0))
    found, _ = sweep(side, "firefly", "sft_lora", FAST_BF16)
    assert found.best.name == "float32, 512 tokens a microbatch"
    assert found.rate_of(default_tuning("firefly", CASES["sft_lora"], FAST_BF16)) / found.best_rate == 0.5
    assert "bfloat16, 512 tokens a microbatch" not in side.tried
    best = found.best.name
    assert side.tried[-4:] == [best, "default settings", "default settings", best], "in turns, since it is close"
