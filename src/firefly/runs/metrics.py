"""What a run says while it trains: a progress bar with tidy lines, metrics.jsonl, and at its end train_results.json.

None of it may end a run: what cannot be written is said once.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from firefly.console import notice
from firefly.messages import render
from firefly.objectives.trainers import Counts
from firefly.runs.folders import first_line
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
        self.failed: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.training_began = time.time()
        # A checkpoint brings its own logging_steps, eval_steps and save_steps along: today's apply.
        state.compute_steps(args, state.max_steps)
        if state.global_step >= state.max_steps:
            return  # nothing is left to train, and what was written stays
        lines = read_metrics(self.path) if state.global_step else []
        kept = [line for line in lines if line.get("step", 0) <= state.global_step and "train_loss" not in line]
        with self.reporting(self.path.name):
            scratch = self.path.with_name(f".{self.path.name}")
            scratch.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            scratch.replace(self.path)  # killed in between, the run still has its old lines

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.seconds_to_first_step is None:
            self.seconds_to_first_step = time.time() - self.started

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if state.global_step >= state.max_steps and not self.counts.steps:
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
        torn = "\n" if self.path.name in self.failed else ""  # half a line may stand at the end
        with self.reporting(self.path.name), self.path.open("a", encoding="utf-8") as file:
            file.write(torn + json.dumps(line) + "\n")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.draw()

    def draw(self) -> None:
        """Draw loss.png from what metrics.jsonl has."""
        picture = self.path.with_name("loss.png")
        with self.reporting(picture.name):
            draw_loss(read_metrics(self.path), picture)

    @contextmanager
    def reporting(self, what: str) -> Iterator[None]:
        """A `with` block whose failure is said the first time, and ends nothing."""
        try:
            yield
        except Exception as error:  # a full disk, or whatever a library that draws or sends may raise
            if what not in self.failed:
                self.failed.add(what)
                notice("report.failed", what=what, problem=first_line(error))

    def results(self, metrics: dict[str, Any], skipped_steps: int, device: torch.device) -> dict[str, Any]:
        """The numbers of this process's training, for train_results.json."""
        seconds = metrics["train_runtime"]
        return {
            "train_runtime": seconds,
            "train_loss": metrics["train_loss"],
            "steps": self.counts.steps,
            "skipped_steps": skipped_steps,
            "examples": self.counts.examples,
            "input_tokens": self.counts.tokens,
            "target_tokens": self.counts.targets,
            "input_tokens_per_second": self.counts.tokens / seconds,
            "examples_per_second": self.counts.examples / seconds,
            "peak_memory_bytes": peak_memory(device),
            "seconds_to_first_step": self.seconds_to_first_step,
            "total_flos": metrics.get("total_flos"),
        }


class Guarded(TrainerCallback):
    """A callback that reports to the outside (TensorBoard, a service); after its first failure it is left alone."""

    def __init__(self, callback: TrainerCallback, recorder: RunRecorder) -> None:
        self.callback = callback
        self.recorder = recorder

    def call(self, event: str, *arguments: Any, **values: Any) -> Any:
        name = type(self.callback).__name__
        if name in self.recorder.failed:
            return None
        with self.recorder.reporting(name):
            return getattr(self.callback, event)(*arguments, **values)
        return None


def _guarded(event: str) -> Callable[..., Any]:
    return lambda self, *arguments, **values: self.call(event, *arguments, **values)


for _event in [name for name in dir(TrainerCallback) if name.startswith("on_")]:
    setattr(Guarded, _event, _guarded(_event))


class Progress(TrainerCallback):
    """A progress bar on stderr, and a line for each log above it. `disable_tqdm` leaves the lines alone.

    Where stderr is a file on a full disk, they are lost.
    """

    def __init__(self, show_bar: bool) -> None:
        self.show_bar = show_bar
        self.bar: tqdm[Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with suppress(OSError):
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
            with suppress(OSError):
                self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        shown = _shown(logs or {})
        if shown:
            with suppress(OSError):
                tqdm.write(f"{render('progress.step')} {state.global_step}/{state.max_steps}  {shown}", file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            with suppress(OSError):
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
