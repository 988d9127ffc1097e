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
        "precision": {"firefly": "bfloat16", "trl": "autocast"},
        "caveats": [],
    } | changes


RATES = {"float32": 200e9, "bfloat16": 440e9, "float16": 20e9}
SHARE = {
    "flops_per_second": {"median": 220e9},
    "share_of_limit": {"median": 0.5},
    "limit_flops_per_second": 440e9,
    "limit_dtype": "bfloat16",
}


def test_a_result_is_one_line(tmp_path: Path) -> None:
    from table import render

    skipped = {"llamafactory": "not installed\nmore"}
    write(tmp_path, "sft_lora", {"summary": {"trl": summary()}, "skipped": skipped, "share_of_limit": SHARE})
    text = render(tmp_path)
    row = (
        "| sft_lora | TRL | 1.50 (1.40–1.60) | 3 | bf16, bf16 autocast | 2.00 : 4.00 GB | 50% of 440 GFLOP/s | passed "
        "| 2026-01-02, abcdef1 |"
    )
    assert row in text.splitlines()
    assert "sft_lora, not compared with LLaMA-Factory: not installed." in text
    assert "### a CPU, 2 cores, without bf16 matrix instructions" in text


def test_results_are_grouped_by_the_kind_of_machine(tmp_path: Path) -> None:
    from table import render

    (tmp_path / "machines").mkdir()
    machines = {"fast": RATES, "slow": RATES | {"bfloat16": 100e9}}
    swept = {
        "date": "2026-02-03T00:00:00",
        "git_commit": "fedcba9876",
        "complete": True,
        "best": {"name": "a tuning"},
        "best_tokens_per_second": 321.4,
        "default_over_best": 0.97,
    }
    failed = {"date": "2026-02-03", "git_commit": "fedcba9876", "complete": True, "failed": "it crashed\nhere"}
    for name, rates in machines.items():
        machine = {"cpu": f"a {name} CPU", "threads": 2, "rates": rates, "name": name}
        known = {"machine": machine, "sweeps": {"sft_lora": {"firefly": swept, "trl": swept, "llamafactory": failed}}}
        (tmp_path / "machines" / f"{name}.json").write_text(json.dumps(known))
        later = {"machine": machine | {"rates": {dtype: 1.1 * rate for dtype, rate in rates.items()}}}
        write(tmp_path, f"sft_lora@{name}", {"summary": {"trl": summary()}} | later)
    write(tmp_path, "sft_lora", {"summary": {"trl": summary()}})
    headings = [line for line in render(tmp_path).splitlines() if line.startswith("### ")]
    assert headings[:2] == [
        "### a fast CPU, 2 threads: products of the model's shapes at fp32 200–220, bf16 440–484, fp16 20–22 GFLOP/s",
        "### a slow CPU, 2 threads: products of the model's shapes at fp32 200–220, bf16 100–110, fp16 20–22 GFLOP/s",
    ]
    assert headings[2].startswith("### a CPU, 2 cores, without bf16")
    text = render(tmp_path)
    assert text.count("| sft_lora | TRL | 1.50") == 3
    assert text.count("Not measured here yet: sft_lora_long, ") == 2
    assert "| sft_lora | TRL | a tuning | 321 | 2026-02-03, fedcba9 |" in text
    assert "| sft_lora | LLaMA-Factory | none ran: it crashed |" in text
    assert "| sft_lora | a tuning | 321 | 97% | 2026-02-03, fedcba9 |" in text


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
