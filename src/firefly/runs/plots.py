"""loss.png: training and held-out loss over steps and, of preference training, margins and accuracies below.

It is drawn in a process of its own, out of metrics.jsonl: a run never waits for matplotlib, and cannot fail by it.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import firefly
from firefly.console import notice
from firefly.files import atomic_file
from firefly.runs.records import read_metrics, series

LAST_DRAWING_SECONDS = 60
"""How long a finished run waits for its picture at most."""
NOISY = 30
"""From so many points on, a curve is shown smoothed, with the points themselves pale behind it."""


def draw_loss(folder: Path, wait_seconds: float = 0.0) -> subprocess.Popen[bytes] | None:
    """Start to draw loss.png of a run's metrics.jsonl; with `wait_seconds`, wait that long for it and say if it failed.

    A drawing that is not waited for takes only processor time that nothing else wants.
    """
    package = str(Path(firefly.__file__).parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "firefly.runs.plots", str(folder), *([] if wait_seconds else ["idle"])]
    try:
        process = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": path, "MPLBACKEND": "agg"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if wait_seconds else subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the training
        )
        _, complaint = process.communicate(timeout=wait_seconds) if wait_seconds else (None, b"")
    except (OSError, subprocess.SubprocessError) as error:
        notice(
            "plots.failed",
            "{path} could not be drawn: {problem}. The run itself is not affected; metrics.jsonl has the numbers.",
            path=folder / "loss.png",
            problem=error,
        )
        return None
    if process.returncode:
        lines = complaint.decode(errors="replace").strip().splitlines()
        notice(
            "plots.failed",
            "{path} could not be drawn: {problem}. The run itself is not affected; metrics.jsonl has the numbers.",
            path=folder / "loss.png",
            problem=lines[-1] if lines else process.returncode,
        )
    return process


def paint_loss(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Paint the losses of metrics.jsonl's lines into a PNG that appears whole; nothing without a loss."""
    losses = {name: series(metrics, name) for name in ("loss", "eval_loss")}
    if not any(losses.values()):
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Names are those of metrics.jsonl in every language: matplotlib's own font has no Chinese.
    panels = {"loss": losses}
    for name in ("rewards/margins", "rewards/accuracies"):
        panels[name] = {key: series(metrics, key) for key in (name, f"eval_{name}")}
    panels = {title: curves for title, curves in panels.items() if any(curves.values())}
    figure = Figure(figsize=(8, 1.5 + 3 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    every = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (title, curves) in zip(every, panels.items(), strict=True):
        for (name, points), color in zip(curves.items(), ("tab:blue", "tab:orange"), strict=True):
            if points:
                _plot(axes, name, points, color)
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        axes.legend()
    every[-1].set_xlabel("step")
    with atomic_file(path) as scratch:
        figure.savefig(scratch, dpi=120, format="png")


def _plot(axes: Any, name: str, points: dict[int, float], color: str) -> None:
    steps, values = list(points), list(points.values())
    if name.startswith("eval_") or len(points) < NOISY:
        axes.plot(steps, values, color=color, label=name, marker="o", markersize=3)
        return
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smoothed(values), color=color, label=f"{name} (smoothed)")


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over about a thirtieth of the curve around each point, fewer towards its ends, so that no trend is bent.

    What is not finite is left out; NaN where nothing else is there.
    """
    reach = max(2, len(values) // 60)
    result = []
    for place in range(len(values)):
        half = min(reach, place, len(values) - 1 - place)
        known = [value for value in values[place - half : place + half + 1] if math.isfinite(value)]
        result.append(sum(known) / len(known) if known else math.nan)
    return result


def _yield_to_all() -> None:
    """Run only where a processor has nothing else to do, or else at the lowest priority there is."""
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    elif hasattr(os, "nice"):
        os.nice(19)


if __name__ == "__main__":
    if "idle" in sys.argv[2:]:
        _yield_to_all()
    paint_loss(read_metrics(Path(sys.argv[1]) / "metrics.jsonl"), Path(sys.argv[1]) / "loss.png")
