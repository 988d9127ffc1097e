"""loss.png: drawn at a run's end, whole or not at all."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from firefly.console import take_notices
from firefly.runs.plots import draw_loss, drawn_at_end, paint_loss, smoothed
from run_folders import log_lines, write_run

PNG = b"\x89PNG"


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is painted: of each panel its title and the curves by label."""
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    painted: list[dict[str, Any]] = []

    def record(figure: Figure, path: Path, **_: Any) -> None:
        Path(path).write_bytes(PNG)
        painted.extend({"title": axes.get_ylabel(), "curves": curves(axes)} for axes in figure.axes)

    def curves(axes: Axes) -> dict[str, Any]:
        return {str(line.get_label()): list(line.get_ydata()) for line in axes.lines}

    monkeypatch.setattr(Figure, "savefig", record)
    return painted


def test_a_run_that_ends_is_drawn_however_it_ends(tmp_path):
    folder = write_run(tmp_path / "run", eval_losses={10: 2.5})
    take_notices()
    with pytest.raises(KeyError), drawn_at_end(folder):
        raise KeyError
    assert (folder / "loss.png").read_bytes().startswith(PNG)
    assert [path.name for path in folder.glob(".*")] == []
    assert take_notices() == []


def test_another_rank_draws_nothing(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    monkeypatch.setenv("RANK", "1")
    with drawn_at_end(folder):
        pass
    assert not (folder / "loss.png").exists()


def test_a_drawing_that_fails_is_a_notice_and_leaves_the_earlier_picture(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (folder / "loss.png").mkdir()  # which cannot be replaced by a file
    take_notices()
    draw_loss(folder)
    (given,) = take_notices()
    assert given["code"] == "plots.failed"
    assert "loss.png" in given["message"]
    assert (folder / "loss.png").is_dir()


def test_without_a_loss_nothing_is_painted(tmp_path, panels):
    paint_loss([{"step": 1, "learning_rate": 0.1}], tmp_path / "loss.png")
    assert panels == []
    assert list(tmp_path.iterdir()) == []


def test_short_curves_are_painted_as_they_are(tmp_path, panels):
    paint_loss(log_lines({1: 3.0, 2: 1.0}, {2: 2.0}), tmp_path / "loss.png")
    assert panels == [{"title": "loss", "curves": {"loss": [3.0, 1.0], "eval_loss": [2.0]}}]


def test_long_curves_are_painted_smoothed_over_the_points_themselves(tmp_path, panels):
    losses = {step: 2.0 + (-1) ** step for step in range(1, 101)}
    paint_loss(log_lines(losses), tmp_path / "loss.png")
    ((raw, values), (label, smooth)) = panels[0]["curves"].items()
    assert values == list(losses.values())
    assert raw.startswith("_")  # stands in no legend
    assert label == "loss (smoothed)"
    assert max(smooth[5:-5]) - min(smooth[5:-5]) < 0.5  # of 2 between neighbours


def test_preference_training_has_margins_and_accuracies_too(tmp_path, panels):
    lines = [
        {"step": 1, "loss": 0.69, "rewards/margins": 0.0, "rewards/accuracies": 0.5},
        {"step": 2, "loss": 0.5, "rewards/margins": 0.4, "rewards/accuracies": 1.0, "eval_rewards/margins": 0.3},
    ]
    paint_loss(lines, tmp_path / "loss.png")
    assert [panel["title"] for panel in panels] == ["loss", "rewards/margins", "rewards/accuracies"]
    assert panels[1]["curves"] == {"rewards/margins": [0.0, 0.4], "eval_rewards/margins": [0.3]}


def test_smoothing_bends_no_trend_and_steps_over_what_is_not_finite():
    slope = [float(step) for step in range(200)]
    assert smoothed(slope) == pytest.approx(slope)
    found = smoothed([float("nan"), 1.0, float("inf"), 1.0, 1.0, 4.0])
    assert math.isnan(found[0])
    assert found[1:] == pytest.approx([1.0, 1.0, 1.75, 2.0, 4.0])
