"""loss.png: training and held-out loss over steps and, of preference training, margins and accuracies below."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from firefly.console import notice
from firefly.files import atomic_file, first_line
from firefly.ranks import is_first
from firefly.runs.records import read_metrics, series

NOISY = 30
"""From so many points on, a curve is shown smoothed, with the points themselves pale behind it."""


@contextmanager
def drawn_at_end(folder: Path) -> Iterator[None]:
    """Draw loss.png of a run when what is done inside ends, however it does. The first rank draws."""
    try:
        yield
    finally:
        if is_first():
            draw_loss(folder)


def draw_loss(folder: Path) -> None:
    """Draw loss.png out of metrics.jsonl. A drawing that fails is a notice: the run itself is done."""
    path = folder / "loss.png"
    try:
        paint_loss(read_metrics(folder / "metrics.jsonl"), path)
    except Exception as error:  # a full disk, or whatever matplotlib may raise
        notice(
            "plots.failed",
            "{path} could not be drawn: {problem}. The run itself is not affected; metrics.jsonl has the numbers.",
            path=path,
            problem=first_line(error),
        )


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
