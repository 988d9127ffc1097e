"""Tasks by name and files as tasks, run by lm-eval on one model or two, and what the two differ by.

Imports lm-eval: `guest.require_harness` comes first.
"""

from __future__ import annotations

import difflib
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from lm_eval.api.group import Group
from lm_eval.api.metrics import mean, nanmean
from lm_eval.api.registry import get_metric
from lm_eval.api.task import Task
from lm_eval.config.group import AggMetricConfig
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from firefly.console import notice
from firefly.data.readers import known_suffix
from firefly.errors import UsageError
from firefly.evaluation.guest import SEEDS, as_guest, is_debugging
from firefly.evaluation.harness import HarnessModel
from firefly.evaluation.intervals import Estimate, Verdict, decide, mean_change
from firefly.evaluation.own_tasks import KINDS, OwnTask, open_task
from firefly.files import cache_folder, first_line, make_cache

RESAMPLES, FEW_RESAMPLES = 1000, 100
"""Of lm-eval's bootstrap and ours, where a metric is no mean; few of one that reads all answers anew each time."""
CORPUS = ("bleu", "chrf", "ter")
NORMAL = 1.96
YAML = (".yaml", ".yml")
AGGREGATE = "_compute_task_aggregations"
"""lm-eval's function that makes one figure of all answers, with its `task`."""


# ---- what is asked


@dataclass(frozen=True)
class OwnSettings:
    """How files are asked.

    Attributes:
        examples: a file whose first rows are shown as examples.
        metrics: of written answers.
        max_new_tokens: of them.
    """

    examples: Path | None = None
    metrics: tuple[str, ...] = ("exact_match",)
    max_new_tokens: int = 256


@dataclass
class FoundTasks:
    """Tasks, by the names that they were asked for by.

    Attributes:
        asked: as it was asked for → names of its tasks, and of its groups before them.
        own: what the files among them were read as.
    """

    tasks: dict[str, Task] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    asked: dict[str, list[str]] = field(default_factory=dict)
    own: dict[str, OwnTask] = field(default_factory=dict)

    def add(self, name: str, tasks: Sequence[tuple[str, Task]], groups: Mapping[str, Group]) -> None:
        """
        Raises:
            UsageError: there is one of that name: lm-eval keeps results by name.
        """
        counts = Counter((*self.groups, *self.tasks, *groups, *(task for task, _ in tasks)))
        twice = [each for each, count in counts.items() if count > 1]
        if twice or name in self.asked:
            raise UsageError(
                "eval.same_task",
                "--tasks names {task} twice. Name it once, or give one of the files another name.",
                task=twice[0] if twice else name,
            )
        self.tasks |= dict(tasks)
        self.groups |= groups
        self.asked[name] = [*groups, *dict(tasks)]


def find_tasks(
    names: Sequence[str], own: OwnSettings, num_fewshot: int | None = None, include_path: Path | None = None
) -> FoundTasks:
    """Tasks of files, of .yaml files and by their names in lm-eval's registry or in `include_path`.

    Raises:
        UsageError: there is none of a name, its data are not on this machine, or a file has rows that are no questions.
    """
    if not names:
        raise UsageError("eval.no_tasks", "--tasks names none. Give names of tasks or files, with commas between them.")
    found = FoundTasks()
    registry: list[str] = []
    for name in names:
        path = Path(name).expanduser()
        files = _files_of(name)
        if files is None:
            registry.append(name)
            continue
        shots = num_fewshot or 0
        root = path if path.is_dir() else path.parent
        with as_guest():
            opened = [
                open_task(_task_name(each, root), each, own.examples, own.metrics, own.max_new_tokens, shots)
                for each in files
            ]
        found.own |= {task.name: task for task in opened}
        for kind, described in KINDS.items():
            rows = sum(task.rows for task in opened if task.kind == kind)
            if rows:
                place = name if len(opened) > 1 else opened[0].path
                notice("eval.read_as", "{path}: {rows} rows, read as {kind}.", path=place, rows=rows, kind=described)
        folder = f"{path.resolve().name}/"  # as no task is called: a file in it may have its name
        groups = {folder: _average(folder, opened)} if path.is_dir() else {}
        asked = folder if path.is_dir() else opened[0].name
        found.add(asked, [(task.name, task.task) for task in opened], groups)
    if registry:
        _find_by_name(found, registry, include_path)
    for name, task in found.tasks.items():
        _refuse_unsuitable(name, task)
        if name not in found.own:
            with as_guest():
                _refuse_unknown_metrics(name, task)
            _set_examples(name, task, num_fewshot)
    return found


def _files_of(name: str) -> list[Path] | None:
    """Files of rows that a name means; None: it is the name of a task, or lm-eval's own description of one."""
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and known_suffix(file.name))
        if not files:
            raise UsageError(
                "eval.no_files", "{path} holds no files of questions. Give a folder of .jsonl or .csv files.", path=path
            )
        return files
    if _is_described(name):
        return None
    return [path] if path.exists() or known_suffix(path.name) else None


def _task_name(file: Path, root: Path) -> str:
    """Its path below the folder that was asked for: folders of one data set often hold files of the same names."""
    return file.relative_to(root).as_posix().removesuffix(known_suffix(file.name) or "")


def _average(name: str, tasks: Sequence[OwnTask]) -> Group:
    """The files of a folder, and the mean over all of their rows."""
    metrics = sorted({metric for task in tasks for metric in task.task.aggregation()})
    group = Group(name, aggregate_metric_list=[AggMetricConfig(metric) for metric in metrics])
    for task in tasks:
        group.add(task.task)
    return group


def _find_by_name(found: FoundTasks, names: Sequence[str], include_path: Path | None) -> None:
    if include_path is not None and not include_path.is_dir():
        raise UsageError("eval.no_include_path", "--include_path {path} is no folder.", path=include_path)
    include = None if include_path is None else str(include_path)
    with as_guest():
        manager = TaskManager(include_path=include, include_defaults=False)
    if any(not _is_known(manager, name) for name in names):
        notice("eval.indexing", "looking among lm-eval's own tasks, which takes some ten seconds.")
        with as_guest():
            manager = TaskManager(include_path=include)
    for name in names:
        if not _is_known(manager, name):
            near = difflib.get_close_matches(name, manager.all_tasks, 3, 0.6)
            raise UsageError(
                "eval.unknown_task",
                "--tasks {name}: no file and no task of that name{near}. Give a .jsonl or .csv file, a name that "
                "`lm-eval ls tasks` shows, or --include_path with a folder of task descriptions.",
                name=name,
                near=f" ({', '.join(near)}?)" if near else "",
            )
        matches = [name] if _is_described(name) else manager.match_tasks([name])
        with as_guest(), _explained(name, making=True):
            loaded = _load(manager, matches)
        found.add(
            Path(name).stem if _is_described(name) else name, [*loaded["tasks"].items()], loaded.get("groups", {})
        )


def _is_described(name: str) -> bool:
    """Whether it is the file of lm-eval's own description of a task."""
    return Path(name).suffix in YAML and Path(name).expanduser().is_file()


def _is_known(manager: TaskManager, name: str) -> bool:
    return _is_described(name) or bool(manager.match_tasks([name]))


def _load(manager: TaskManager, names: list[str]) -> Any:
    """Tasks with their data: what `datasets` prepares of local files lies in our cache, and what it prepared of data
    sets of the hub in its own."""
    from datasets import config

    before = config.HF_DATASETS_CACHE
    config.HF_DATASETS_CACHE = make_cache(cache_folder() / "datasets")
    try:
        return manager.load(names)
    except Exception as error:
        if _place_of(error.__traceback__)[1] is None:
            raise
    finally:
        config.HF_DATASETS_CACHE = before
    return manager.load(names)


@contextmanager
def _explained(asked: str, making: bool) -> Iterator[None]:
    """Faults of tasks as messages: while they are made (`making`), any; later those of their own code, as metrics."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        if isinstance(error, ImportError):
            raise _missing_package(asked, error) from error
        task, data = _place_of(error.__traceback__)
        if data is None:
            if is_debugging() or not (making or task or isinstance(error, OSError)):
                raise
            raise UsageError(
                "eval.task_fails",
                "the task {task} fails: {type}: {problem}. FIREFLY_DEBUG=1 shows where.",
                task=task or asked,
                type=type(error).__name__,
                problem=first_line(error),
            ) from error
        raise UsageError(
            "eval.no_data",
            "the task {task} needs the data set {data}, which cannot be read on this machine: {problem}\n"
            "Nothing is downloaded here. Where the hub can be reached, run once\n"
            '  python -c "from datasets import load_dataset; load_dataset({call})"\n'
            "and, if that was elsewhere, copy its cache (HF_HOME, or ~/.cache/huggingface) here.",
            task=task or asked,
            data=" ".join(data),
            call=", ".join(repr(part) for part in data),
            problem=first_line(error),
        ) from error


def _missing_package(task: str, error: ImportError) -> UsageError:
    return UsageError(
        "eval.task_package",
        "the task {task} needs a package that is not installed: {problem}. Install it with pip.",
        task=task,
        problem=first_line(error),
    )


def _place_of(trace: TracebackType | None) -> tuple[str | None, tuple[str, ...] | None]:
    """The task whose code failed, and the data set, if that is what failed to load; no task where the model failed."""
    task: str | None = None
    while trace is not None:
        local = trace.tb_frame.f_locals
        maker = local.get("self")
        if isinstance(maker, HarnessModel):
            return None, None
        aggregated = local.get("task") if trace.tb_frame.f_code.co_name == AGGREGATE else None
        if isinstance(aggregated, Task):
            task = aggregated.task_name
        if isinstance(maker, Task):
            task = getattr(maker.config, "task", None) or task
            if trace.tb_frame.f_code.co_name == "download":
                return task, tuple(str(part) for part in (maker.DATASET_PATH, maker.DATASET_NAME) if part)
        trace = trace.tb_next
    return task, None


def _refuse_unsuitable(name: str, task: Task) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise UsageError(
            "eval.runs_code",
            "the task {task} runs code that the model writes, which firefly does not. Run it with lm-eval, in a "
            "container.",
            task=name,
        )
    if getattr(task, "MULTIMODAL", False):
        raise UsageError("eval.multimodal", "the task {task} asks about images or sound. Leave it out.", task=name)


def _refuse_unknown_metrics(name: str, task: Task) -> None:
    """lm-eval would leave them out, or fail when the answers are there."""
    listed = getattr(task.config, "metric_list", None) or ()
    if getattr(task.config, "process_results", None) is not None:
        return
    for each in listed:
        metric = each.get("metric")
        if isinstance(metric, str) and get_metric(metric, each.get("hf_evaluate") is True) is None:
            raise UsageError(
                "eval.unknown_metric",
                "the task {task} has a metric that neither lm-eval nor this machine knows: {metric}.",
                task=name,
                metric=metric,
            )


def _set_examples(name: str, task: Task, num_fewshot: int | None) -> None:
    """As lm-eval does it: a task that fixes 0 keeps it."""
    own = task.get_config("num_fewshot")
    if num_fewshot is None or own == 0:
        if num_fewshot:
            notice("eval.no_examples", "the task {task} is asked without examples: its description says so.", task=name)
        task.set_config("num_fewshot", own or 0)
    else:
        task.set_config("num_fewshot", num_fewshot)


# ---- what a model scores


def measure(model: HarnessModel, found: FoundTasks, limit: int | None = None) -> dict[str, Any]:
    """lm-eval's results of one model, with its samples. The same questions and examples for each that is measured.

    Raises:
        UsageError: a task asks for what firefly does not compute, or needs what is not there.
    """
    with as_guest(), _explained(", ".join(found.asked), making=False):
        for task in found.tasks.values():
            task.set_fewshot_seed(SEEDS[1])
        results = evaluate(
            lm=model,
            task_dict={
                "tasks": found.tasks,
                "groups": found.groups,
                "group_map": {name: group.child_names for name, group in found.groups.items()},
            },
            limit=limit,
            bootstrap_iters=RESAMPLES,
            apply_chat_template=model.encoder is not None,
            fewshot_as_multiturn=True,
        )
    assert results is not None
    return dict(results)


# ---- what two models differ by


@dataclass(frozen=True)
class Score:
    """A figure of one model, and its standard error where lm-eval knows one."""

    value: float
    error: float | None


@dataclass(frozen=True)
class Figure:
    """A metric of a task, or the mean of a group's.

    Attributes:
        filter: of lm-eval, by which an answer was read; "none" where it was taken as it is.
        count: questions.
        shots: examples in front of each.
        higher_is_better: None where a group's tasks disagree, or nothing says: then there is no verdict.
        difference: tuned less base.
        error: its standard error, of the questions' own differences where the metric is their mean.
    """

    task: str
    metric: str
    filter: str
    count: int
    shots: int
    is_group: bool
    higher_is_better: bool | None
    base: Score | None
    tuned: Score | None
    difference: Estimate | None = None
    error: float | None = None
    verdict: Verdict | None = None


def figures_of(
    found: FoundTasks, base: Mapping[str, Any] | None, tuned: Mapping[str, Any] | None
) -> tuple[Figure, ...]:
    """The metrics of one model, or of two with their differences: groups first, each before its tasks."""
    some = tuned or base
    assert some is not None
    figures = []
    for name in [name for names in found.asked.values() for name in names]:
        for key in some["results"].get(name, {}):
            metric, comma, filter_name = key.partition(",")
            value = some["results"][name][key]
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float, np.number)):
                continue
            group = found.groups.get(name)
            leaves = [task.task_name for task in group.get_all_tasks()] if group else [name]
            figure = Figure(
                task=name,
                metric=metric,
                filter=filter_name,
                count=int(some["results"][name]["sample_len"]),
                shots=int(some["n-shot"].get(name) or 0),
                is_group=group is not None,
                higher_is_better=_direction([found.tasks[leaf] for leaf in leaves], metric),
                base=_score(base, name, metric, filter_name),
                tuned=_score(tuned, name, metric, filter_name),
            )
            figures.append(figure)
            if base is not None and tuned is not None:
                pairs = {leaf: _pairs(base, tuned, leaf, metric, filter_name) for leaf in leaves}
                pairs = {leaf: of for leaf, of in pairs.items() if of[0]}
                figures[-1] = _compared(figure, found, group, pairs) if pairs else figure
    return tuple(figures)


def _direction(tasks: Sequence[Task], metric: str) -> bool | None:
    """Whether more of a metric is better, by those of some tasks that have it; yes where none lists it."""
    listed: list[Any] = [task.higher_is_better() for task in tasks]
    found = {of[metric] for of in listed if metric in of} or {True}
    return found.pop() if len(found) == 1 else None


def _score(results: Mapping[str, Any] | None, task: str, metric: str, filter_name: str) -> Score | None:
    if results is None:
        return None
    of_task = results["results"][task]
    error = of_task.get(f"{metric}_stderr,{filter_name}")
    known = isinstance(error, (int, float)) and math.isfinite(error)
    return Score(float(of_task[f"{metric},{filter_name}"]), float(error) if known else None)


Pairs = tuple[list[Any], list[Any]]


def _pairs(base: Mapping[str, Any], tuned: Mapping[str, Any], task: str, metric: str, filter_name: str) -> Pairs:
    """What a metric made of each question that both models answered."""
    by_model = [
        {
            sample["doc_id"]: sample[metric]
            for sample in results["samples"].get(task, ())
            if sample["filter"] == filter_name and metric in sample
        }
        for results in (base, tuned)
    ]
    both = [doc for doc in by_model[0] if doc in by_model[1]]
    return [by_model[0][doc] for doc in both], [by_model[1][doc] for doc in both]


def _compared(figure: Figure, found: FoundTasks, group: Group | None, pairs: Mapping[str, Pairs]) -> Figure:
    assert figure.base is not None
    assert figure.tuned is not None
    change = figure.tuned.value - figure.base.value
    weighted = group is None or all(
        each.weight_by_size for each in group.aggregate_metric_list or () if each.metric == figure.metric
    )
    means = {leaf: _is_mean(found.tasks[leaf], figure.metric, *of) for leaf, of in pairs.items()}
    estimate: Estimate | None
    if weighted and all(means.values()):
        base, tuned = ([value for of in pairs.values() for value in of[side]] for side in (0, 1))
        estimate, error = mean_change(base, tuned), _standard_error(base, tuned)
    else:
        # Of a group's mean: as wide as its tasks' differences make it, which were drawn apart.
        errors = [
            _standard_error(*of) if means[leaf] else _resampled(found.tasks[leaf], figure.metric, *of)
            for leaf, of in pairs.items()
        ]
        shares = _sizes(pairs) if weighted else np.full(len(errors), 1 / len(errors))
        known = [each for each in errors if each is not None]
        error = float(np.linalg.norm(shares * known)) if len(known) == len(errors) else None
        estimate = None if error is None else Estimate(change, change - NORMAL * error, change + NORMAL * error)
    if estimate is None or not math.isfinite(estimate.value):
        return figure
    higher = figure.higher_is_better
    verdict = None if higher is None else decide(estimate, figure.count, lower_is_better=not higher)
    return replace(figure, difference=estimate, error=error, verdict=verdict)


def _sizes(pairs: Mapping[str, Pairs]) -> np.ndarray:
    counts = np.array([len(of[0]) for of in pairs.values()], dtype=float)
    return counts / counts.sum()


def _is_mean(task: Task, metric: str, base: Sequence[Any], tuned: Sequence[Any]) -> bool:
    """Whether a metric is the mean of what it made of each question: a finite number."""
    if _aggregation(task, metric) not in (mean, nanmean):
        return False
    numbers = (*base, *tuned)
    return all(isinstance(value, (int, float, np.number)) and math.isfinite(float(value)) for value in numbers)


def _aggregation(task: Task, metric: str) -> Callable[[Sequence[Any]], float]:
    """What lm-eval makes one figure with."""
    known: Any = task.aggregation()
    return known.get(metric, mean)


def _standard_error(base: Sequence[Any], tuned: Sequence[Any]) -> float | None:
    """Of the mean of the questions' own differences."""
    differences = np.subtract(tuned, base, dtype=float)
    return float(differences.std(ddof=1) / math.sqrt(len(differences))) if len(differences) > 1 else None


def _resampled(task: Task, metric: str, base: Sequence[Any], tuned: Sequence[Any]) -> float | None:
    """The standard error of a difference of what is no mean, by drawing questions again; None where that fails."""
    combine = _aggregation(task, metric)
    generator = random.Random(0)
    count = len(base)
    if count < 2:
        return None
    found = []
    try:
        for _ in range(FEW_RESAMPLES if metric in CORPUS else RESAMPLES):
            rows = generator.choices(range(count), k=count)
            found.append(combine([tuned[row] for row in rows]) - combine([base[row] for row in rows]))
        return float(np.std(np.array(found, dtype=float), ddof=1))
    except Exception:  # a task's own code, or a metric that some questions alone do not have
        return None
