"""One `firefly train` in this process, for the sides of the LoRA benchmarks."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import common_parser, peak_rss

from firefly.config import load_config
from firefly.train import train


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run left: its training steps, its `train_results.json`, the largest resident memory."""

    log: list[dict[str, float]]
    results: dict[str, Any]
    peak_rss: int


def parse_arguments(description: str | None) -> argparse.Namespace:
    """Parse the command line: the same names as on the peers' sides, then our own."""
    parser = common_parser(description, torch.get_num_threads())
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--overrides", type=json.loads, default={}, help="JSON object of configuration keys")
    return parser.parse_args()


def lora_configuration(arguments: argparse.Namespace, output_dir: Path) -> dict[str, Any]:
    """Write out everything that could differ from a peer's side; the rest is Firefly's defaults."""
    return {
        "output_dir": str(output_dir),
        "model_name_or_path": arguments.model,
        "train_file": str(arguments.dump),
        "train_mode": "lora",
        "lora_rank": arguments.rank,
        "lora_alpha": 2 * arguments.rank,
        "lora_dropout": 0.0,
        "per_device_train_batch_size": arguments.examples_per_step,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "max_seq_length": arguments.max_seq_length,
        "shuffle": False,
        "learning_rate": arguments.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": arguments.bf16,
        "seed": arguments.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }


def train_once(configuration: dict[str, Any]) -> Run:
    """Train through the command line's own path: a file, read and checked as a user's would be."""
    output_dir = Path(configuration["output_dir"])
    path = output_dir.with_suffix(".json")
    path.write_text(json.dumps(configuration), encoding="utf-8")
    train(load_config(path))
    peak = peak_rss()
    results = json.loads((output_dir / "train_results.json").read_text(encoding="utf-8"))
    return Run(log=logged_steps(output_dir), results=results, peak_rss=peak)


def logged_steps(output_dir: Path) -> list[dict[str, float]]:
    """Return the entries of `metrics.jsonl` that are training steps, one for each step from the first on."""
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [entry for entry in map(json.loads, lines) if "loss" in entry]
    numbers = [entry["step"] for entry in steps]
    if numbers != list(range(1, len(steps) + 1)):
        raise RuntimeError(f"metrics.jsonl logs the steps {numbers}; every step must be there once")
    return steps
