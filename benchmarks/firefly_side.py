"""Firefly's side: `firefly train` in this process on a dump, printing one JSON line.

The dump's records are formats of Firefly's, so the run is a user's. Step times, losses and gradient norms come from its
own `metrics.jsonl`, as the peers' come from their logs: no side carries an instrument that the others do not.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from job import Job, read_job
from measuring import Work, measure, print_measurement, read_dump, stdout_kept_for_the_result, work_of, work_of_pairs
from random_weights import install_random_weights
from side import memory_now, peak_memory

from firefly.config import load_config
from firefly.threads import wait_by_load
from firefly.training import train


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run left: its training steps, `train_results.json`, the manifest's resolved values, its peak memory."""

    log: list[dict[str, float]]
    results: dict[str, Any]
    resolved: dict[str, Any]
    peak_memory: int


def main() -> None:
    """Train once as the job says and print the measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--overrides", type=json.loads, default={}, help="JSON object of configuration keys")
    arguments = parser.parse_args()
    job = read_job(arguments.job)
    memory_after_imports = memory_now(job.device)
    torch.set_num_threads(job.threads)
    if job.random_weights:
        install_random_weights()
    rows = read_dump(job.dump)
    with tempfile.TemporaryDirectory() as folder, stdout_kept_for_the_result(), wait_by_load():  # as the command does
        configuration = run_configuration(job, len(rows), Path(folder, "run")) | arguments.overrides
        run = train_once(configuration, job.device)
    work = work_by_step(job, rows)
    print_measurement(
        measure(
            framework="firefly",
            work=work,
            log_times=[entry["time"] for entry in run.log],
            losses=[entry["loss"] for entry in run.log],
            memory_after_imports=memory_after_imports,
            peak_memory=run.peak_memory,
            threads=torch.get_num_threads(),
            settings={
                "precision": run.resolved["precision"],
                "resolved": run.resolved,
                "rows_of_a_step_are_consecutive": True,
                "configuration": configuration,
            },
            checks={
                "gradient_norms": [entry["grad_norm"] for entry in run.log],
                "train_results": run.results,
                **check_counts(run.results, work),
            },
        )
    )


def run_configuration(job: Job, num_rows: int, output_dir: Path) -> dict[str, Any]:
    """Write out everything that could differ from a peer's side; the rest is Firefly's defaults."""
    configuration: dict[str, Any] = {
        "task_type": job.task,
        "train_mode": job.mode,
        "output_dir": str(output_dir),
        "model_name_or_path": job.model,
        "train_file": job.documents or job.dump,
        "per_device_train_batch_size": job.examples_per_step,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "max_seq_length": job.max_tokens,
        "gradient_checkpointing": job.checkpointing,
        "shuffle": False,
        "seed": job.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "compare": False,
        "report_to": "none",
        "use_cpu": job.device == "cpu",
        **job.training,
    }
    if job.mode != "full":
        configuration |= {"lora_rank": job.rank, "lora_alpha": job.alpha, "lora_dropout": job.dropout}
        if job.adapter:
            configuration["adapter_name_or_path"] = job.adapter
    if job.task == "dpo":
        configuration |= {"preference_loss": "sigmoid", "beta": job.beta, "max_prompt_length": None}
    if job.task == "pretrain":
        # The documents hold a little more text than the dump's blocks.
        configuration["max_steps"] = -(-num_rows // job.examples_per_step)
        configuration["document_attention"] = "isolated" if job.isolated else "joined"
    return configuration | job.firefly


def train_once(configuration: dict[str, Any], device: str) -> Run:
    """Train through the command line's own path: a file, read and checked as a user's would be."""
    output_dir = Path(configuration["output_dir"])
    path = output_dir.with_suffix(".json")
    path.write_text(json.dumps(configuration), encoding="utf-8")
    train(load_config(path))
    return Run(
        log=logged_steps(output_dir),
        results=json.loads((output_dir / "train_results.json").read_text(encoding="utf-8")),
        resolved=json.loads((output_dir / "run.json").read_text(encoding="utf-8"))["resolved"],
        peak_memory=peak_memory(device),
    )


def logged_steps(output_dir: Path) -> list[dict[str, float]]:
    """Return the entries of `metrics.jsonl` that are training steps, one for each step from the first on."""
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [entry for entry in map(json.loads, lines) if "loss" in entry]
    numbers = [entry["step"] for entry in steps]
    if numbers != list(range(1, len(steps) + 1)):
        raise RuntimeError(f"metrics.jsonl logs the steps {numbers}; every step must be there once")
    return steps


def work_by_step(job: Job, rows: Sequence[dict[str, list[int]]]) -> list[Work]:
    """Count each step: exactly the next `examples_per_step` examples of the dump; the last may have fewer."""
    count = work_of_pairs if job.task == "dpo" else work_of
    starts = range(0, len(rows), job.examples_per_step)
    return [count(rows[start : start + job.examples_per_step]) for start in starts]


def check_counts(results: dict[str, Any], work: Sequence[Work]) -> dict[str, bool]:
    """Compare the examples and tokens the run says it consumed with those of the dump."""
    return {
        "examples_agree": results.get("examples") == sum(step.rows for step in work),
        "input_tokens_agree": results.get("input_tokens") == sum(step.tokens for step in work),
        "target_tokens_agree": results.get("target_tokens") == sum(step.target_tokens for step in work),
    }


if __name__ == "__main__":
    main()
