"""Firefly's side of the LoRA benchmark: `firefly train` in this process on a dump, printing one JSON line.

Step times come from the run's own `metrics.jsonl` (the moment each step was logged), as TRL's come from its
log: neither side carries an instrument the other does not.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  (loaded before memory is read, as on TRL's side)
import peft
import torch
import transformers
from measuring import (
    Work,
    common_parser,
    current_rss,
    measure,
    peak_rss,
    print_measurement,
    read_dump,
    stdout_kept_for_the_result,
    work_of,
)

from firefly.config import load_config
from firefly.train import train


def main() -> None:
    """Train once as the command line says and print the measurement."""
    # The classes are lazy attributes: touching them finishes the import before memory is read.
    imported = (transformers.Trainer, transformers.AutoModelForCausalLM, peft.LoraConfig)
    assert all(imported)
    rss_after_imports = current_rss()
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    rows = read_dump(arguments.dump)
    with tempfile.TemporaryDirectory() as folder, stdout_kept_for_the_result():
        output_dir = Path(folder, "run")
        configuration = run_configuration(arguments, output_dir)
        path = Path(folder, "train_args.json")
        path.write_text(json.dumps(configuration), encoding="utf-8")
        train(load_config(path))
        peak = peak_rss()
        log = logged_steps(output_dir)
        results = json.loads((output_dir / "train_results.json").read_text(encoding="utf-8"))
    print_measurement(
        measure(
            framework="firefly",
            work=work_by_step(rows, arguments.examples_per_step),
            log_times=[entry["time"] for entry in log],
            losses=[entry["loss"] for entry in log],
            rss_after_imports=rss_after_imports,
            peak_rss=peak,
            threads=torch.get_num_threads(),
            settings={
                "precision": "bfloat16" if configuration["bf16"] else "float32",
                "rows_of_a_step_are_consecutive": True,
                "configuration": configuration,
            },
            checks={"train_results": results} | check_counts(results, rows),
        )
    )


def parse_arguments() -> argparse.Namespace:
    """Parse the command line: the same names as on TRL's side, then our own."""
    parser = common_parser(__doc__, torch.get_num_threads())
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--overrides", type=json.loads, default={}, help="JSON object of configuration keys")
    return parser.parse_args()


def run_configuration(arguments: argparse.Namespace, output_dir: Path) -> dict[str, Any]:
    """Write out everything that could differ from TRL's side; the rest is Firefly's defaults."""
    return {
        "output_dir": str(output_dir),
        "model_name_or_path": arguments.model,
        "train_file": str(arguments.dump),
        "template_name": "auto",
        "task_type": "sft",
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
    } | arguments.overrides


def work_by_step(rows: Sequence[dict[str, list[int]]], examples_per_step: int) -> list[Work]:
    """Count each step: exactly the next `examples_per_step` rows of the dump; the last may have fewer."""
    starts = range(0, len(rows), examples_per_step)
    return [work_of(rows[start : start + examples_per_step]) for start in starts]


def logged_steps(output_dir: Path) -> list[dict[str, float]]:
    """Return the entries of `metrics.jsonl` that are training steps, one for each step from the first on."""
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [entry for entry in map(json.loads, lines) if "loss" in entry]
    numbers = [entry["step"] for entry in steps]
    if numbers != list(range(1, len(steps) + 1)):
        raise RuntimeError(f"metrics.jsonl logs the steps {numbers}; every step must be there once")
    return steps


def check_counts(results: dict[str, Any], rows: Sequence[dict[str, list[int]]]) -> dict[str, bool]:
    """Compare the tokens the run says it consumed with those of the dump."""
    wanted = work_of(rows)
    return {
        "input_tokens_agree": results.get("input_tokens") == wanted.tokens,
        "target_tokens_agree": results.get("target_tokens") == wanted.target_tokens,
    }


if __name__ == "__main__":
    main()
