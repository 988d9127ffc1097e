"""A run's folder, read back: what `firefly runs` lists, shows and compares.

Whatever is missing or damaged is None here, never an error: runs of earlier versions, runs that were killed, and runs
that write at this moment are read alike. Nothing heavy is imported, so the commands answer at once.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from firefly.errors import UsageError
from firefly.runs.folders import numbered_checkpoints
from firefly.translation import Phrase

RUNNING, FINISHED, INTERRUPTED, FAILED = "running", "finished", "interrupted", "failed"
"""run.json says "running" until the process that trains writes how it ended. One that was killed writes nothing: then
the age of its last sign of life tells."""

HEARTBEAT_SECONDS = 30
"""How often a run touches its metrics.jsonl at least, between steps."""
SILENCE_SECONDS = 5 * 60
"""After so long without a sign of life a run counts as interrupted. A step, or the writing of a checkpoint, may take
longer than a heartbeat."""

DEPTH = 3
"""Folders below the one that is searched in which a run may lie."""
EVALUATIONS = "evaluations"
"""The folder of a run in which `firefly eval` keeps what the result scored."""
SAMPLES = "samples.jsonl"
"""What the model said at checkpoints, where `checkpoint_samples` asked for it."""
SKIPPED = re.compile(r"\..*|checkpoint-\d+|earlier-.*|runs|node_modules|__pycache__|site-packages")
"""Folders that hold no run of their own; `runs` is where TensorBoard's events lie."""


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        manifest: run.json as it stands there.
        state: running, finished, interrupted or failed.
    """

    folder: Path
    manifest: dict[str, Any]
    state: str

    @property
    def config(self) -> dict[str, Any]:
        return mapping(self.manifest.get("config"))

    @property
    def model(self) -> str | None:
        return self.config.get("model_name_or_path")

    @cached_property
    def results(self) -> dict[str, Any]:
        """train_results.json, if it is of this run: a run that was started anew leaves the earlier one's in place."""
        return read_object(self.folder / "train_results.json") if self.state == FINISHED else {}

    @cached_property
    def data(self) -> dict[str, Any]:
        """data_report.json."""
        return read_object(self.folder / "data_report.json")

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_metrics(self.folder / "metrics.jsonl")

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """The lines of samples.jsonl."""
        return read_samples(self.folder / SAMPLES)

    @cached_property
    def _last(self) -> dict[str, float | None]:
        return last_values(self.folder / "metrics.jsonl", ("step", "loss", "eval_loss", "time"))

    @property
    def loss(self) -> float | None:
        """The training loss that was logged last."""
        return self._last["loss"]

    @property
    def eval_loss(self) -> float | None:
        return self._last["eval_loss"]

    @property
    def steps(self) -> int:
        """Steps that were trained, as far as a log or a checkpoint proves it."""
        logged = self._last["step"] or 0
        return int(max(logged, *(step for step, _ in self.checkpoints), 0))

    @property
    def total_steps(self) -> int | None:
        total = self.manifest.get("total_steps")
        return total if isinstance(total, int) else None

    @property
    def started(self) -> float | None:
        """Seconds since the epoch."""
        text = self.manifest.get("started")
        try:
            return datetime.fromisoformat(str(text)).timestamp()
        except ValueError:
            return time_of(self.folder / "run.json")

    @property
    def seconds(self) -> float | None:
        """How long the run took, or has taken so far; of an interrupted one, until its last sign of life."""
        if self.started is None:
            return None
        ended = self.manifest.get("ended")
        if self.state == RUNNING:
            end = time.time()
        elif isinstance(ended, (int, float)):
            end = float(ended)
        else:
            end = self._last["time"] or last_sign(self.folder)
        return max(end - self.started, 0.0)

    @property
    def error(self) -> dict[str, Any]:
        """Of a failed run: `code` (of the message, or None), `type` and `message`."""
        return mapping(self.manifest.get("error")) if self.state == FAILED else {}

    @cached_property
    def checkpoints(self) -> list[tuple[int, bool]]:
        """(step, complete) of each checkpoint, by step; plan.json is what is written last."""
        return [(step, (path / "plan.json").is_file()) for step, path in numbered_checkpoints(self.folder)]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The newest file of each task in `evaluations/`, without its samples, by task."""
        found: dict[str, dict[str, Any]] = {}
        for path in sorted((self.folder / EVALUATIONS).glob("*.json")):
            value = read_object(path)
            value.pop("samples", None)
            task, created = value.get("task"), str(value.get("created", ""))
            if isinstance(task, str) and created >= str(found.get(task, {}).get("created", "")):
                found[task] = value
        return [found[task] for task in sorted(found)]

    def as_dict(self) -> dict[str, Any]:
        """One element of what `firefly runs list --json` prints."""
        began = self.started
        return {
            "path": str(self.folder),
            "state": self.state,
            "started": None if began is None else datetime.fromtimestamp(began).astimezone().isoformat("T", "seconds"),
            "seconds": self.seconds,
            "task_type": self.config.get("task_type"),
            "train_mode": self.config.get("train_mode"),
            "model": self.model,
            "steps": self.steps,
            "total_steps": self.total_steps,
            "loss": finite(self.loss),
            "eval_loss": finite(self.eval_loss),
            "error": self.error or None,
        }


def read_run(path: str | Path) -> RunRecord:
    """The run of an output_dir (or of the run.json in it).

    Raises:
        UsageError: no run was recorded there.
    """
    folder = Path(path).expanduser()
    record = record_in(folder.parent if folder.is_file() and folder.name == "run.json" else folder)
    if record is None:
        raise UsageError(
            "runs.not_a_run",
            "{path} holds no run: there is no run.json of firefly train in it. Give the output_dir of a run; `firefly "
            "runs list` shows them.",
            path=path,
        )
    return record


def record_in(folder: Path) -> RunRecord | None:
    """The run in a folder; None where run.json is missing, or is somebody else's file of that name."""
    manifest = read_object(folder / "run.json")
    if not isinstance(manifest.get("config"), dict):
        return None
    return RunRecord(folder, manifest, run_state(folder, manifest))


def find_runs(folders: Sequence[str | Path]) -> list[RunRecord]:
    """The runs in some folders and DEPTH levels below them, newest first.

    Raises:
        UsageError: one of the folders does not exist.
    """
    found: dict[Path, RunRecord] = {}
    for name in folders:
        root = Path(name).expanduser()
        if not root.is_dir():
            raise UsageError("runs.no_folder", "{path} is no folder. Give folders that hold runs.", path=name)
        for folder in _folders(root):
            if record := record_in(folder):
                found[folder.resolve()] = record
    return sorted(found.values(), key=lambda record: record.started or 0, reverse=True)


def disk_used(folder: Path) -> int:
    """Bytes that a folder takes on its disk; what cannot be read counts as nothing."""
    used = 0
    for place, _, files in os.walk(folder):
        for name in files:
            try:
                used += os.lstat(os.path.join(place, name)).st_blocks * 512
            except OSError:
                continue
    return used


def remove_run(record: RunRecord) -> None:
    """Delete a run with all that its folder holds.

    Raises:
        UsageError: it runs at this time, or the folder cannot be deleted.
    """
    if record.state == RUNNING:
        raise UsageError("runs.still_running", "{path} is running; stop it first.", path=record.folder)
    try:
        shutil.rmtree(record.folder)
    except OSError as error:
        raise UsageError(
            "runs.not_removed",
            "{path} cannot be deleted: {problem}.",
            path=error.filename or record.folder,
            problem=error.strerror or error,
        ) from None


def _folders(root: Path) -> Iterator[Path]:
    """Folders that hold a run.json."""
    for place, below, files in os.walk(root):
        depth = len(Path(place).relative_to(root).parts)
        below[:] = sorted(name for name in below if depth < DEPTH and not SKIPPED.fullmatch(name))
        if "run.json" in files:
            yield Path(place)


def run_state(folder: Path, manifest: Mapping[str, Any]) -> str:
    """One of RUNNING, FINISHED, INTERRUPTED, FAILED, for a run's folder and its run.json."""
    recorded = manifest.get("state")
    if recorded in (FINISHED, INTERRUPTED, FAILED):
        return recorded
    return RUNNING if time.time() - last_sign(folder) < SILENCE_SECONDS else INTERRUPTED


def last_sign(folder: Path) -> float:
    """When a run last wrote something (seconds since the epoch); 0 if nothing can be read."""
    times = [time_of(folder / name) for name in ("metrics.jsonl", "run.json")]
    return max((moment for moment in times if moment is not None), default=0.0)


def time_of(path: Path) -> float | None:
    """When a file was last written, seconds since the epoch; None if it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if there is none that can be read."""
    try:
        return mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return {}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a crash cut short is left out."""
    return [line for text in _lines(path) if (line := _parse(text))]


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The lines of samples.jsonl that are whole."""
    lines = (_parse(line) for line in _lines(path))
    return [line for line in lines if isinstance(line.get("step"), int)]


def last_values(path: Path, names: Sequence[str]) -> dict[str, float | None]:
    """The last number under each name in a metrics.jsonl; only lines that hold a name are parsed."""
    found: dict[str, float | None] = dict.fromkeys(names)
    lines = _lines(path)
    for name in names:
        for text in reversed(lines):
            if f'"{name}":' in text and isinstance(value := _parse(text).get(name), (int, float)):
                found[name] = value
                break
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").split("\n")  # a text may hold other ends of lines
    except OSError:
        return []


def _parse(text: str) -> dict[str, Any]:
    try:
        return mapping(json.loads(text))
    except (ValueError, RecursionError):
        return {}


def mapping(value: Any) -> dict[str, Any]:
    """The value, if it is an object of JSON; otherwise an empty one."""
    return value if isinstance(value, dict) else {}


def message_of(recorded: Mapping[str, Any]) -> str:
    """A notice or an error of run.json in the reader's language; as the run wrote it, where it kept no phrase."""
    try:
        return str(Phrase.from_json(recorded))
    except (LookupError, TypeError, ValueError, AttributeError):
        return str(recorded.get("message"))


def series(metrics: Sequence[dict[str, Any]], name: str) -> dict[int, float]:
    """A number of metrics.jsonl by step."""
    return {
        line["step"]: float(line[name])
        for line in metrics
        if isinstance(line.get("step"), int) and isinstance(line.get(name), (int, float))
    }


def finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None


def finite_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with None for numbers that JSON does not have."""
    return {name: finite(value) if isinstance(value, float) else value for name, value in values.items()}
