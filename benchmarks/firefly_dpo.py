"""Firefly's side of the DPO benchmark: `firefly train` in this process on a dump, printing one JSON line.

The dump's records are a preference format of Firefly's, so the run is a user's. Step times, losses and gradient
norms come from its own `metrics.jsonl`, as the peers' come from their logs.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  (loaded before memory is read, as on the peers' sides)
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
    work_of_pairs,
)


def main() -> None:
    """Train once as the command line says and print the measurement."""
    # The classes are lazy attributes: touching them finishes the import before memory is read.
    imported = (transformers.Trainer, transformers.AutoModelForCausalLM, peft.LoraConfig)
    assert all(imported)
    rss_after_imports = current_rss()
    arguments = parse_arguments(__doc__)
    torch.set_num_threads(arguments.threads)
    pairs = read_dump(arguments.dump)
    with tempfile.TemporaryDirectory() as folder, stdout_kept_for_the_result():
        configuration = run_configuration(arguments, Path(folder, "run"))
        run = train_once(configuration)
    print_measurement(
        measure(
            framework="firefly",
            work=work_by_step(pairs, arguments.examples_per_step),
            log_times=[entry["time"] for entry in run.log],
            losses=[entry["loss"] for entry in run.log],
            rss_after_imports=rss_after_imports,
            peak_rss=run.peak_rss,
            threads=torch.get_num_threads(),
            settings={
                "precision": "bfloat16" if configuration["bf16"] else "float32",
                "configuration": configuration,
            },
            checks={
                "gradient_norms": [entry["grad_norm"] for entry in run.log],
                "train_results": run.results,
                **check_counts(run.results, pairs),
            },
        )
    )


def run_configuration(arguments: argparse.Namespace, output_dir: Path) -> dict[str, Any]:
    """Add what belongs to preference training; beta and the adapter to start from come as overrides."""
    own = {
        "task_type": "dpo",
        "template_name": "auto",
        "preference_loss": "sigmoid",
        "max_prompt_length": None,
    }
    return lora_configuration(arguments, output_dir) | own | arguments.overrides


def work_by_step(pairs: Sequence[dict[str, list[int]]], pairs_per_step: int) -> list[Work]:
    """Count each step: exactly the next `pairs_per_step` pairs of the dump."""
    starts = range(0, len(pairs), pairs_per_step)
    return [work_of_pairs(pairs[start : start + pairs_per_step]) for start in starts]


def check_counts(results: dict[str, Any], pairs: Sequence[dict[str, list[int]]]) -> dict[str, bool]:
    """Compare the pairs and tokens the run says it consumed with those of the dump."""
    wanted = work_of_pairs(pairs)
    return {
        "pairs_agree": results.get("examples") == wanted.rows,
        "input_tokens_agree": results.get("input_tokens") == wanted.tokens,
        "target_tokens_agree": results.get("target_tokens") == wanted.target_tokens,
    }


if __name__ == "__main__":
    main()
