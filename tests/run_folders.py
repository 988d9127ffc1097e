"""Folders as `firefly train` leaves them, written by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "task_type": "sft",
    "train_mode": "lora",
    "model_name_or_path": "models/tiny",
    "train_file": "data/train.jsonl",
    "output_dir": "output/run",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "lora_rank": 64,
    "learning_rate": 1e-4,
    "report_to": "none",
}
PASSPORT: dict[str, Any] = {
    "config": CONFIG,
    "defaults": {"weight_decay": 0.0, "num_train_epochs": 3.0, "data_seed": None},
    "resolved": {"precision": "float32", "layout": "segments", "tokens_per_microbatch": 512, "examples_per_step": 8},
    "template": {"name": "auto", "sha256": "1" * 64},
    "hashes": {
        "data": "2" * 32,
        "eval_data": None,
        "tokenizer": "3" * 64,
        "base_weights": {"method": "sha256", "sha256": "4" * 64},
    },
    "seed": 42,
    "versions": {"python": "3.11.7", "firefly-llm": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    "hardware": {"cpu": "AMD EPYC", "threads": 2, "device": "cpu", "memory_bytes": 2**33},
    "firefly_commit": "5" * 40,
    "git_commit": "6" * 40,
    "notices": [{"code": "precision.replaced", "message": "bf16 was asked for [here]."}],
    "total_steps": 20,
    "world_size": 1,
    "resumed_from": None,
    "started": "2026-11-25T10:00:00+0000",
    "state": "finished",
    "ended": 1795601000.0,
}
STARTED = 1795600800.0  # 2026-11-25T10:00:00+0000
DATA: dict[str, Any] = {
    "file": "data/train.jsonl",
    "formats": {"conversation": 40},
    "rows": 42,
    "kept": 38,
    "cut": 2,
    "lost": {"too_long": 2},
    "tokens": 10_000,
    "target_tokens": 4_000,
    "train_examples": 40,
    "findings": [],
}
RESULTS: dict[str, Any] = {
    "train_runtime": 180.0,
    "train_loss": 1.5,
    "steps": 20,
    "input_tokens": 10_000,
    "input_tokens_per_second": 55.5,
    "examples_per_second": 0.9,
    "peak_memory_bytes": 3 * 2**30,
    "seconds_to_first_step": 7.5,
}


def log_lines(losses: Mapping[int, float], eval_losses: Mapping[int, float] | None = None) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl by step."""
    lines = [("loss", step, value) for step, value in losses.items()]
    lines += [("eval_loss", step, value) for step, value in (eval_losses or {}).items()]
    return [
        {"step": step, name: value, "time": STARTED + 9 * step, "input_tokens_per_second": 50.0}
        for name, step, value in sorted(lines, key=lambda line: line[1])
    ]


def write_run(
    folder: Path,
    losses: Mapping[int, float] | None = None,
    eval_losses: Mapping[int, float] | None = None,
    without: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = RESULTS,
    **changes: Any,
) -> Path:
    """Write a run whose run.json is PASSPORT with changes, `without` some keys, and with another configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = PASSPORT | {"config": CONFIG | {"output_dir": str(folder)} | dict(config or {})} | changes
    kept = {name: value for name, value in manifest.items() if name not in without}
    (folder / "run.json").write_text(json.dumps(kept), encoding="utf-8")
    (folder / "data_report.json").write_text(json.dumps(DATA), encoding="utf-8")
    lines = log_lines(losses or {step: 3.0 - step / 10 for step in range(1, 21)}, eval_losses)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if results is not None:
        (folder / "train_results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


def age(folder: Path, seconds: float) -> None:
    """Make everything in a folder `seconds` older than it is."""
    for path in folder.iterdir():
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))
