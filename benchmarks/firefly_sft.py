"""Firefly's side of the LoRA benchmark: `firefly train` in this process on a dump, printing one JSON line.

Step times come from the run's own `metrics.jsonl` (the moment each step was logged), as TRL's come from its
log: neither side carries an instrument the other does not.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  (loaded before memory is read, as on TRL's side)
import peft
import torch
import transformers
from firefly_run import lora_configuration, parse_arguments, train_once
from measuring import (
    Work,
    current_rss,
    measure,
    print_measurement,
    read_dump,
    stdout_kept_for_the_result,
    work_of,
)


def main() -> None:
    """Train once as the command line says and print the measurement."""
    # The classes are lazy attributes: touching them finishes the import before memory is read.
    imported = (transformers.Trainer, transformers.AutoModelForCausalLM, peft.LoraConfig)
    assert all(imported)
    rss_after_imports = current_rss()
    arguments = parse_arguments(__doc__)
    torch.set_num_threads(arguments.threads)
    rows = read_dump(arguments.dump)
    with tempfile.TemporaryDirectory() as folder, stdout_kept_for_the_result():
        configuration = run_configuration(arguments, Path(folder, "run"))
        run = train_once(configuration)
    print_measurement(
        measure(
            framework="firefly",
            work=work_by_step(rows, arguments.examples_per_step),
            log_times=[entry["time"] for entry in run.log],
            losses=[entry["loss"] for entry in run.log],
            rss_after_imports=rss_after_imports,
            peak_rss=run.peak_rss,
            threads=torch.get_num_threads(),
            settings={
                "precision": "bfloat16" if configuration["bf16"] else "float32",
                "rows_of_a_step_are_consecutive": True,
                "configuration": configuration,
            },
            checks={"train_results": run.results} | check_counts(run.results, rows),
        )
    )


def run_configuration(arguments: argparse.Namespace, output_dir: Path) -> dict[str, Any]:
    """Add what belongs to supervised fine-tuning."""
    own = {"task_type": "sft", "template_name": "auto"}
    return lora_configuration(arguments, output_dir) | own | arguments.overrides


def work_by_step(rows: Sequence[dict[str, list[int]]], examples_per_step: int) -> list[Work]:
    """Count each step: exactly the next `examples_per_step` rows of the dump; the last may have fewer."""
    starts = range(0, len(rows), examples_per_step)
    return [work_of(rows[start : start + examples_per_step]) for start in starts]


def check_counts(results: dict[str, Any], rows: Sequence[dict[str, list[int]]]) -> dict[str, bool]:
    """Compare the tokens the run says it consumed with those of the dump."""
    wanted = work_of(rows)
    return {
        "input_tokens_agree": results.get("input_tokens") == wanted.tokens,
        "target_tokens_agree": results.get("target_tokens") == wanted.target_tokens,
    }


if __name__ == "__main__":
    main()
