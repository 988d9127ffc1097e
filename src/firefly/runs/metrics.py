"""What a run says while it trains: a progress bar with tidy lines, metrics.jsonl, and at its end train_results.json."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from firefly.messages import render
from firefly.objectives.trainers import Counts
from firefly.runs.memory import peak_memory
from firefly.runs.plots import draw_loss


class RunRecorder(TrainerCallback):
    """Writes metrics.jsonl (one object a log, flushed at once) and draws the loss.

    A resumed run drops the lines of steps that it is about to repeat, so a step stands there once.
    """

    def __init__(self, output_dir: Path, counts: Counts, started: float) -> None:
        self.path = output_dir / "metrics.jsonl"
        self.counts = counts
        self.started = started
        self.seconds_to_first_step: float | None = None
        self.training_began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.training_began = time.time()
        # A checkpoint brings its own logging_steps, eval_steps and save_steps along: today's apply.
        state.compute_steps(args, state.max_steps)
        if state.global_step >= state.max_steps or not state.is_world_process_zero:
            return  # nothing is left to train, and what was written stays
        lines = read_metrics(self.path) if state.global_step else []
        kept = [line for line in lines if line.get("step", 0) <= state.global_step and "train_loss" not in line]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.seconds_to_first_step is None:
            self.seconds_to_first_step = time.time() - self.started

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or (state.global_step >= state.max_steps and not self.counts.steps):
            return
        now = time.time()
        line = {
            "step": state.global_step,
            **(logs or {}),
            "time": now,
            "input_tokens": self.counts.tokens,
            "target_tokens": self.counts.targets,
            "input_tokens_per_second": self.counts.tokens / max(now - self.training_began, 1e-9),
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            draw_loss(read_metrics(self.path), self.path.with_name("loss.png"))

    def results(self, metrics: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """The numbers of this process's training, for train_results.json."""
        seconds = metrics["train_runtime"]
        return {
            "train_runtime": seconds,
            "train_loss": metrics["train_loss"],
            "steps": self.counts.steps,
            "examples": self.counts.examples,
            "input_tokens": self.counts.tokens,
            "target_tokens": self.counts.targets,
            "input_tokens_per_second": self.counts.tokens / seconds,
            "examples_per_second": self.counts.examples / seconds,
            "peak_memory_bytes": peak_memory(device),
            "seconds_to_first_step": self.seconds_to_first_step,
            "total_flos": metrics.get("total_flos"),
        }


class Progress(TrainerCallback):
    """A progress bar on stderr, and a line for each log above it. `disable_tqdm` leaves the lines alone."""

    def __init__(self, show_bar: bool) -> None:
        self.show_bar = show_bar
        self.bar: tqdm[Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            disable=not self.show_bar,
            dynamic_ncols=True,
            unit=render("progress.unit"),
            file=sys.stderr,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        shown = _shown(logs or {})
        if shown:
            tqdm.write(f"{render('progress.step')} {state.global_step}/{state.max_steps}  {shown}", file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


SHOWN = {
    "loss": ".4f",
    "rewards/accuracies": ".3f",
    "rewards/margins": ".4f",
    "eval_loss": ".4f",
    "eval_perplexity": ".3f",
    "eval_rewards/accuracies": ".3f",
    "eval_rewards/margins": ".4f",
    "learning_rate": ".2e",
    "grad_norm": ".3f",
}


def _shown(logs: dict[str, Any]) -> str:
    return "  ".join(f"{name} {logs[name]:{style}}" for name, style in SHOWN.items() if name in logs)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a crash cut short is left out."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
    return lines
