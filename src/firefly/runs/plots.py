"""loss.png: training and held-out loss over steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw_loss(metrics: list[dict[str, Any]], path: Path) -> None:
    """Draw the losses of metrics.jsonl's lines into a PNG; nothing where there is nothing to draw."""
    series = {
        name: [(line["step"], line[name]) for line in metrics if isinstance(line.get(name), (int, float))]
        for name in ("loss", "eval_loss")
    }
    if not any(series.values()):
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in series.items():
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, label=name, marker="o" if len(points) < 30 else None, markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
