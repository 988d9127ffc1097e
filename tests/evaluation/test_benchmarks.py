"""What two models differ by: from the questions' own differences where a metric is their mean, else by resampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.group import Group
from lm_eval.api.metrics import weighted_perplexity
from lm_eval.config.group import AggMetricConfig
from scipy import stats

from firefly.errors import UsageError
from firefly.evaluation.benchmarks import FoundTasks, OwnSettings, figures_of, find_tasks
from firefly.evaluation.guest import as_guest
from firefly.evaluation.own_tasks import open_task

COUNT = 60


def write_rows(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"question": "q", "choices": ["a", "b"], "answer": 0}] * 3
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def found(tmp_path: Path) -> FoundTasks:
    tasks = {}
    for name in ("one", "two"):
        with as_guest():
            tasks[name] = open_task(name, write_rows(tmp_path / f"{name}.jsonl")).task
    group = Group("both", aggregate_metric_list=[AggMetricConfig("acc")])
    for task in tasks.values():
        group.add(task)
    return FoundTasks(tasks, {"both": group}, {"both": ["both", *tasks]})


def results(metric: str, **values: Any) -> dict[str, Any]:
    """lm-eval's, of what a metric made of each question of a task."""
    of_tasks = {
        name: {f"{metric},none": float(np.mean([np.ravel(value)[0] for value in each])), "sample_len": len(each)}
        for name, each in values.items()
    }
    every = [value for each in values.values() for value in each]
    of_group = {f"{metric},none": float(np.mean([np.ravel(value)[0] for value in every])), "sample_len": len(every)}
    samples = {
        name: [{"doc_id": number, "filter": "none", metric: value} for number, value in enumerate(each)]
        for name, each in values.items()
    }
    return {"results": {"both": of_group, **of_tasks}, "samples": samples, "n-shot": {"one": 2}}


def outcomes(seed: int, rate: float) -> list[float]:
    return np.random.default_rng(seed).binomial(1, rate, COUNT).astype(float).tolist()


def test_the_standard_error_is_that_of_paired_differences(found: FoundTasks) -> None:
    base, tuned = ([outcomes(seed, 0.5), outcomes(seed + 1, 0.6)] for seed in (1, 10))
    whole, one, two = figures_of(
        found, results("acc", one=base[0], two=base[1]), results("acc", one=tuned[0], two=tuned[1])
    )
    changes = [np.subtract(right, left) for left, right in zip(base, tuned, strict=True)]
    for figure, change in ((one, changes[0]), (two, changes[1]), (whole, np.concatenate(changes))):
        assert figure.difference is not None
        assert figure.difference.value == pytest.approx(change.mean())
        assert figure.error == pytest.approx(stats.sem(change))
        assert figure.difference.low <= change.mean() <= figure.difference.high
    assert (one.shots, one.count, whole.count, whole.is_group) == (2, COUNT, 2 * COUNT, True)


def test_verdicts_follow_the_interval_and_not_the_figure(found: FoundTasks) -> None:
    worse, better = [0.0] * 40 + [1.0] * 20, [0.0] * 10 + [1.0] * 50
    few = {"one": [0.0] * 4, "two": [1.0] * 4}
    for left, right, verdict in ((worse, better, "better"), (better, worse, "worse"), (worse, worse, "no_difference")):
        _, one, _ = figures_of(found, results("acc", one=left, two=left), results("acc", one=right, two=right))
        assert one.verdict == verdict
    slightly = [*worse[:-1], 0.0]
    _, one, _ = figures_of(found, results("acc", one=worse, two=worse), results("acc", one=slightly, two=worse))
    assert one.verdict == "no_difference"
    _, one, _ = figures_of(found, results("acc", **few), results("acc", **few))
    assert one.verdict == "too_few"


def test_a_metric_that_is_no_mean_is_resampled_by_question(found: FoundTasks) -> None:
    for task in found.tasks.values():
        task._aggregation_list["byte_perplexity"] = weighted_perplexity
        task._higher_is_better["byte_perplexity"] = False
    draw = np.random.default_rng(0)
    base = [(-float(value), 10) for value in draw.normal(20, 3, COUNT)]
    tuned = [(logp + float(shift), size) for (logp, size), shift in zip(base, draw.normal(2, 1, COUNT), strict=True)]
    reports = []
    for rows in (base, tuned):
        report = results("byte_perplexity", one=rows, two=rows)
        report["results"]["one"]["byte_perplexity,none"] = weighted_perplexity(rows)
        reports.append(report)
    _, one, _ = figures_of(found, *reports)
    expected = weighted_perplexity(tuned) - weighted_perplexity(base)
    assert one.difference is not None
    assert one.difference.value == pytest.approx(expected)
    # By the delta method: the derivative of exp(-Σlogp / Σsize).
    derivative = [weighted_perplexity(rows) * -np.array([logp for logp, _ in rows]) / 10 for rows in (base, tuned)]
    assert one.error == pytest.approx(stats.sem(derivative[1] - derivative[0]), rel=0.15)
    assert one.verdict == "better"  # a lower perplexity


def test_a_metric_that_fails_when_questions_are_drawn_again_has_no_verdict(found: FoundTasks) -> None:
    def combine(items: list[float]) -> float:
        raise RuntimeError("a class has no rows")

    found.tasks["one"]._aggregation_list["acc"] = combine
    both = [results("acc", one=outcomes(seed, 0.5), two=outcomes(seed, 0.5)) for seed in (1, 2)]
    _, one, two = figures_of(found, *both)
    assert (one.difference, one.verdict) == (None, None)
    assert one.tuned is not None
    assert two.verdict == "no_difference"


@pytest.mark.parametrize(
    ("directions", "verdict", "of_tasks"),
    [
        ((None, False), "worse", [None, "worse"]),  # the first task has no such metric
        ((True, False), None, ["better", "worse"]),
        ((False, False), "worse", ["worse", "worse"]),
    ],
)
def test_a_group_has_the_direction_of_its_tasks_and_none_where_they_disagree(
    found: FoundTasks, directions: tuple[bool | None, ...], verdict: str | None, of_tasks: list[str | None]
) -> None:
    base, tuned = [0.0] * 40 + [1.0] * 20, [0.0] * 10 + [1.0] * 50
    reports = [results("score", one=each, two=each) for each in (base, tuned)]
    for (name, task), direction in zip(found.tasks.items(), directions, strict=True):
        if direction is not None:
            task._higher_is_better["score"] = direction
            continue
        for report in reports:
            del report["results"][name]["score,none"]
            report["samples"][name] = []
    found.groups["both"].aggregate_metric_list = [AggMetricConfig("score")]
    figures = {figure.task: figure for figure in figures_of(found, *reports)}
    assert figures["both"].verdict == verdict
    assert figures["both"].difference is not None
    assert (figures["both"].higher_is_better is None) == (verdict is None)
    assert [figures[name].verdict if name in figures else None for name in found.tasks] == of_tasks


def test_one_model_alone_has_no_verdict(found: FoundTasks) -> None:
    figures = figures_of(found, None, results("acc", one=outcomes(1, 0.5), two=outcomes(2, 0.5)))
    assert all(figure.base is None and figure.difference is None and figure.verdict is None for figure in figures)


def test_files_of_a_folder_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for name in ("en/math", "zh/math", "ev"):
        write_rows(tmp_path / "ev" / f"{name}.jsonl")
    found = find_tasks([str(tmp_path / "ev")], OwnSettings())
    assert list(found.tasks) == list(found.own) == ["en/math", "ev", "zh/math"]
    assert found.asked == {"ev/": ["ev/", "en/math", "ev", "zh/math"]}
    assert found.groups["ev/"].child_names == ["en/math", "ev", "zh/math"]


@pytest.mark.parametrize(
    ("files", "asked", "name"),
    [
        (["ev/math.jsonl", "ev/math.json"], ["ev"], "math"),
        (["ev/math.jsonl", "math.jsonl"], ["ev", "math.jsonl"], "math"),
        (["one/ev/math.jsonl", "two/ev/physics.jsonl"], ["one/ev", "two/ev"], "ev/"),
    ],
)
def test_two_tasks_of_one_name_are_refused(tmp_path: Path, files: list[str], asked: list[str], name: str) -> None:
    for file in files:
        write_rows(tmp_path / file)
    with pytest.raises(UsageError, match=f"names {name} twice"):
        find_tasks([str(tmp_path / each) for each in asked], OwnSettings())
