"""Kinds of machines, and what was found best on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def machine(**rates: float) -> Any:
    from machines import Machine

    given = {"float32": 200.0, "bfloat16": 440.0, "float16": 20.0} | rates
    return Machine(cpu="AMD EPYC", threads=2, instruction_sets=("avx2", "avx512_bf16"), rates=given)


def test_a_slower_clock_is_the_same_kind_and_another_fast_type_is_not() -> None:
    assert machine().is_like(machine(float32=100.0, bfloat16=200.0, float16=11.0))
    assert not machine().is_like(machine(bfloat16=180.0))
    assert not machine().is_like(machine(float16=200.0))


@pytest.mark.parametrize("change", [{"cpu": "Xeon"}, {"threads": 1}, {"instruction_sets": ("avx2",)}])
def test_another_cpu_is_another_kind(change: dict[str, Any]) -> None:
    from dataclasses import replace

    assert not machine().is_like(replace(machine(), **change))


@pytest.mark.parametrize(("bf16", "ahead"), [(440.0, "bf16"), (210.0, "even"), (120.0, "fp32")])
def test_a_kind_is_named_for_its_fast_type(bf16: float, ahead: str) -> None:
    assert machine(bfloat16=bf16).named(set()).name == f"amd_epyc_2_threads_{ahead}"


def test_a_sweep_is_found_again_on_the_same_kind_of_machine_alone(tmp_path: Path) -> None:
    from machines import KnownMachine

    known = KnownMachine(machine(), tmp_path)
    made = known.begin_sweep("sft_lora", "trl", {"model": "small"})
    known.save()
    made["best"] = {"name": "fast"}
    known.save()
    again = KnownMachine(machine(float32=150.0, bfloat16=300.0, float16=15.0), tmp_path)
    found = again.sweep("sft_lora", "trl", "/somewhere/small")
    assert found is not None
    assert found["best"] == {"name": "fast"}
    assert again.sweep("sft_lora", "trl", "large") is None
    assert again.sweep("sft_lora", "llamafactory", "small") is None
    other = KnownMachine(machine(bfloat16=1000.0), tmp_path)
    assert other.sweep("sft_lora", "trl", "small") is None
    assert other.machine.name == "amd_epyc_2_threads_bf16_2"
    assert again.content["machine"]["rates"]["float32"] == 200.0, "a kind keeps the rates that it was found by"
