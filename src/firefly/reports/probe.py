"""`firefly plan --probe`: two real steps on the longest rows, in a process of their own, beside what was predicted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from firefly.config import RECORDS_OF_TASK, Config
from firefly.data.batching import ExampleList
from firefly.data.dataset import Split
from firefly.data.schema import TokenPair
from firefly.errors import UsageError
from firefly.reports.plan import Plan, plan_with
from firefly.reports.work import Work

STEPS = 2


@dataclass(frozen=True)
class Probe:
    """What the steps were predicted to take, and took.

    Attributes:
        predicted, measured: bytes at the peak, over what the process had taken after its imports.
        step_seconds, predicted_seconds: of a step behind the first; None where it is not known.
    """

    steps: int
    examples: int
    longest: int
    predicted: int
    measured: int
    predicted_seconds: float | None
    step_seconds: float | None

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured: above 0, it was too high."""
        return self.predicted / self.measured - 1

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"error": self.error}


def probe(plan: Plan, data: Split | None, steps: int = STEPS) -> Probe:
    """Train so many steps on the longest rows and compare.

    Raises:
        UsageError: another machine is planned for, there are no data, or the steps failed; what they said is shown.
    """
    if not plan.machine.here or data is None or plan.choices is None:
        raise UsageError(
            "plan.no_probe",
            "--probe trains two steps, so it needs train_file, the model's tokenizer and weights, and this machine: "
            "leave --device and --memory out, or --probe.",
        )
    config, examples = plan.config, data.train
    count = min(steps * config.step.examples_per_rank, len(examples))
    # The longest last: it then finds a heap with the holes that others left, as in a run.
    longest = np.argsort(examples.counts.lengths, kind="stable")[-count:]
    with tempfile.TemporaryDirectory(prefix="firefly-probe-") as folder:
        job = probe_config(config, examples, longest, Path(folder), steps)
        found = run_probe(job, Path(folder))
    work = plan.work if RECORDS_OF_TASK[config.task_type] == "document" else _only(plan.work, longest)
    expected = plan_with(plan, replace(config, training={**config.training, "max_steps": steps}), work)
    predicted = expected.forecast.total
    if plan.machine.kind == "cuda":  # the context is none of the allocator's
        predicted -= expected.forecast.parts.get("libraries", 0)
    return Probe(
        steps=steps,
        examples=count,
        longest=plan.work.longest,
        predicted=predicted,
        measured=found["memory_bytes"],
        predicted_seconds=expected.duration.step_seconds,
        step_seconds=found["step_seconds"],
    )


def probe_config(config: Config, examples: ExampleList, rows: np.ndarray, folder: Path, steps: int) -> dict[str, Any]:
    """The user's configuration, on these examples alone, leaving nothing behind.

    Blocks of pretraining are of one length, so the documents stay as they are.
    """
    changes: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "max_steps": steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "shuffle": False,
        "max_lost_share": 1.0,
        "resume_from_checkpoint": None,
    }
    if RECORDS_OF_TASK[config.task_type] != "document":
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(_record(examples[int(row)])) + "\n" for row in rows), encoding="utf-8")
        changes |= {"train_file": str(path), "data_format": "auto"}
    unwanted = ("eval_file", "eval_ratio", "early_stopping_patience", "load_best_model_at_end", "num_train_epochs")
    unwanted += ("eval_on_start", "metric_for_best_model", "lr_scheduler_type", "lr_scheduler_kwargs")
    return {name: value for name, value in config.given.items() if name not in unwanted} | changes


def run_probe(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run the process; return what it printed.

    Raises:
        UsageError: it failed.
    """
    path = folder / "probe.json"
    path.write_text(json.dumps(dict(job)), encoding="utf-8")
    command = [sys.executable, "-m", "firefly.reports.probed", str(path)]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, capture_output=True, env=environment, encoding="utf-8", errors="replace")
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise UsageError(
            "plan.probe_failed",
            "the two steps of --probe ended with exit code {exit_code}: {problem}",
            exit_code=done.returncode,
            problem=_last_line(done.stderr),
        )
    return json.loads(lines[-1])


def _record(example: Any) -> dict[str, Any]:
    """An example in the record shapes for what is tokenised already."""
    if not isinstance(example, TokenPair):
        return {"input_ids": example.input_ids.tolist(), "labels": example.labels.tolist()}
    prompt, middle = example.prompt, example.prompt + example.chosen
    parts = {"prompt_ids": slice(prompt), "chosen_ids": slice(prompt, middle), "rejected_ids": slice(middle, None)}
    return {name: example.input_ids[part].tolist() for name, part in parts.items()}


def _only(work: Work, rows: np.ndarray) -> Work:
    chosen = {name: getattr(work, name)[rows] for name in ("lengths", "targets", "prompt", "chosen")}
    return replace(work, **chosen)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "–"
