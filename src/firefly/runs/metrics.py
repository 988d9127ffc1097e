"""What a run says while it trains: a progress bar with tidy lines, metrics.jsonl, and at its end train_results.json.

None of it may end a run: what cannot be written is said once.
"""

from __future__ import annotations

import json
import os
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
from firefly.files import atomic_file, first_line
from firefly.runs.memory import memory_in_use, peak_memory
from firefly.runs.progress import Counts
from firefly.runs.records import HEARTBEAT_SECONDS, read_metrics
from firefly.translation import translate


class Pace:
    """How fast a run trains from one log to the next, and how long it still takes."""

    def __init__(self, counts: Counts) -> None:
        self.counts = counts
        self.begin(0)

    def begin(self, step: int) -> None:
        """Training begins now, behind `step`."""
        self.since = self.first = self.moment = time.time()
        self.first_step = step
        self.warm = False
        self.paused = 0.0
        self.tokens, self.targets = self.counts.tokens, self.counts.targets

    def trained(self, device: torch.device, control: Any) -> None:
        """A step or an epoch ends; what an evaluation or a checkpoint takes from here on is no training."""
        if device.type == "cuda" and (control.should_evaluate or control.should_save):
            torch.cuda.synchronize(device)  # which they would do first; the wait belongs to the steps
        self.moment = time.time()

    def resume(self) -> None:
        """An evaluation or a checkpoint is done."""
        now = time.time()
        self.paused += now - self.moment
        self.moment = now

    def measure(self, step: int, max_steps: int, device: torch.device) -> dict[str, float]:
        """Tokens a second and the share of them with a loss since the last log, bytes of memory, seconds left.

        The seconds left count evaluations and checkpoints in, and of the steps behind this one those after the first
        log, which had the warm-up.
        """
        now = time.time()
        tokens, targets = self.counts.tokens - self.tokens, self.counts.targets - self.targets
        per_step = (now - self.first) / max(step - self.first_step, 1)
        measured = {
            "tokens_per_second": tokens / max(now - self.since - self.paused, 1e-9),
            "target_share": targets / max(tokens, 1),
            "memory_bytes": memory_in_use(device),
            "seconds_left": per_step * (max_steps - step),
        }
        self.since, self.moment, self.paused = now, now, 0.0
        self.tokens, self.targets = self.counts.tokens, self.counts.targets
        if not self.warm:
            self.first, self.first_step, self.warm = now, step, True
        return measured


class RunRecorder(TrainerCallback):
    """Writes metrics.jsonl: one object a log, flushed at once.

    Put before the trackers' callbacks: it adds its measurements to each training log, so they reach every tracker.
    A resumed run drops the lines of steps that it is about to repeat, so a step stands there once.
    """

    def __init__(self, output_dir: Path, counts: Counts, started: float) -> None:
        self.path = output_dir / "metrics.jsonl"
        self.counts = counts
        self.pace = Pace(counts)
        self.started = started
        self.seconds_to_first_step: float | None = None
        self.training_began = 0.0
        self.beat = 0.0
        self.failed: set[str] = set()

    def begin(self, step: int, measured: float = 0.0) -> None:
        """Training begins now, behind `step`; what was done before is none of its time.

        Args:
            measured: seconds that the model was measured for the comparison, which are none of its way to the first
                step, either.
        """
        self.started += measured
        self.training_began = self.beat = time.time()
        self.pace.begin(step)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begin(state.global_step)
        if state.global_step >= state.max_steps or not state.is_world_process_zero:
            return  # nothing is left to train, and what was written stays
        lines = read_metrics(self.path) if state.global_step else []
        kept = [line for line in lines if line.get("step", 0) <= state.global_step and "train_loss" not in line]
        # Killed in between, the run still has its old lines.
        with self.reporting(self.path.name), atomic_file(self.path) as scratch:
            scratch.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.seconds_to_first_step is None:
            self.seconds_to_first_step = time.time() - self.started
        self.pace.trained(args.device, control)
        self._show_life()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.pace.trained(args.device, control)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._show_life()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.pace.resume()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or (state.global_step >= state.max_steps and not self.counts.steps):
            return
        logs = {} if logs is None else logs
        if "loss" in logs:
            logs.update(self.pace.measure(state.global_step, state.max_steps, args.device))
        now = self.beat = time.time()
        line = {
            "step": state.global_step,
            **logs,
            "time": now,
            "input_tokens": self.counts.tokens,
            "target_tokens": self.counts.targets,
            "input_tokens_per_second": self.counts.tokens / max(now - self.training_began, 1e-9),
        }
        torn = "\n" if self.path.name in self.failed else ""  # half a line may stand at the end
        with self.reporting(self.path.name), self.path.open("a", encoding="utf-8") as file:
            file.write(torn + json.dumps(line) + "\n")

    def _show_life(self) -> None:
        """Readers know a run that still goes on by the time of its metrics.jsonl."""
        now = time.time()
        if now - self.beat > HEARTBEAT_SECONDS:
            self.beat = now
            with suppress(OSError):
                os.utime(self.path)

    @contextmanager
    def reporting(self, what: str) -> Iterator[None]:
        """A `with` block whose failure is said the first time, and ends nothing."""
        try:
            yield
        except Exception as error:  # a full disk, or whatever a library that sends may raise
            if what not in self.failed:
                self.failed.add(what)
                notice(
                    "report.failed",
                    "{what} could not be written and is incomplete from now on: {problem}. Training goes on.",
                    what=what,
                    problem=first_line(error),
                )

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


class ProgressLine(TrainerCallback):
    """A line on stderr for each log. On a terminal it says how the model learns, and a bar below it how fast that goes;
    elsewhere (`show_bar` false) the line says both, and nothing is ever drawn over.

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
                smoothing=0,  # the time left by the whole run: evaluations come back
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
                file=sys.stderr,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            with suppress(OSError):
                self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        learnt = [f"{label} {logs[name]:{style}}" for name, (label, style) in SHOWN.items() if name in logs]
        pace = _pace(logs)
        if not learnt:
            return
        if self.bar is not None and self.show_bar:
            if pace:
                self.bar.set_postfix_str(", ".join(pace), refresh=False)
            pace = []
        elif pace:
            pace.append(translate("{time} left", time=tqdm.format_interval(logs["seconds_left"])))
        place = f"{translate('step')} {state.global_step}/{state.max_steps}"
        with suppress(OSError):
            tqdm.write("  ".join([place, *learnt, *pace]), file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            with suppress(OSError):
                self.bar.close()


# Metric → (what a line calls it, format). A line of preference training fits 80 columns, too.
SHOWN = {
    "loss": ("loss", ".4f"),
    "rewards/accuracies": ("accuracy", ".2f"),
    "rewards/margins": ("margin", ".3f"),
    "eval_loss": ("eval_loss", ".4f"),
    "eval_perplexity": ("eval_perplexity", ".3f"),
    "eval_rewards/accuracies": ("eval_accuracy", ".3f"),
    "eval_rewards/margins": ("eval_margin", ".4f"),
    "learning_rate": ("lr", ".2e"),
    "grad_norm": ("grad", ".3f"),
}


def _pace(logs: dict[str, Any]) -> list[str]:
    """How fast that goes, and on how much memory."""
    if "tokens_per_second" not in logs:
        return []
    return [
        translate("{speed} tokens/s", speed=f"{logs['tokens_per_second']:,.0f}"),
        translate("{share} targets", share=f"{logs['target_share']:.0%}"),
        f"{logs['memory_bytes'] / 2**30:.1f} GiB",
    ]
