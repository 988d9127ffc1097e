"""The tables are made of recorded files, old ones included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write(folder: Path, name: str, report: dict[str, Any]) -> None:
    common = {
        "date": "2026-01-02T03:04:05",
        "git_commit": "abcdef1234",
        "hardware": {"cpu": "a CPU", "cores": 2, "bf16_matrix_instructions": False},
    }
    (folder / f"{name}.json").write_text(json.dumps(common | report))


def summary(**changes: Any) -> dict[str, Any]:
    peaks = {"peak_less_imports_bytes": 2e9}
    return {
        "gate_passed": True,
        "ratio_examples_per_second": {"median": 1.5, "min": 1.4, "max": 1.6, "per_pair": [1.4, 1.5, 1.6]},
        "memory": {"firefly": peaks, "trl": {"peak_less_imports_bytes": 4e9}},
        "caveats": [],
    } | changes


def test_a_result_is_one_line(tmp_path: Path) -> None:
    from table import render

    write(tmp_path, "sft_lora", {"summary": {"trl": summary()}, "skipped": {"llamafactory": "not installed\nmore"}})
    text = render(tmp_path)
    row = "| sft_lora | TRL | 1.50 (1.40–1.60) | 3 | 2.00 : 4.00 GB | passed | 2026-01-02, abcdef1 |"
    assert row in text.splitlines()
    assert "sft_lora, not compared with LLaMA-Factory: not installed." in text
    assert "Not measured yet: sft_lora_long" in text


def test_a_failed_gate_shows_no_speed_and_a_short_run_is_called_a_trial(tmp_path: Path) -> None:
    from table import render

    write(tmp_path, "sft_lora", {"summary": {"trl": summary(gate_passed=False)}})
    write(tmp_path, "sft_full", {"summary": {"trl": summary(caveats=["not publishable: 1 pairs"])}})
    text = render(tmp_path)
    assert "| sft_lora | TRL | not to be quoted |" in text
    assert "1.50 (1.40–1.60), a trial" in text


def test_recorded_results_are_readable(benchmark_modules: Path) -> None:
    from table import render

    text = render(benchmark_modules / "results")
    assert "| sft_lora | TRL |" in text
    assert "| dpo_lora | LLaMA-Factory |" in text


def test_documentation_holds_the_table_of_the_recorded_results(benchmark_modules: Path) -> None:
    from table import render

    documentation = (benchmark_modules.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    missing = [line for line in render(benchmark_modules / "results").splitlines() if line not in documentation]
    assert missing == [], "run benchmarks/table.py and put what it prints into docs/performance.md"
