"""An evaluation as `firefly eval` makes it: models loaded and measured, figures shown and kept beside the run.

Imports lm-eval: `guest.require_harness` comes first.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

import firefly
from firefly.config import ModelConfig
from firefly.console import notice
from firefly.errors import UsageError
from firefly.evaluation.benchmarks import Figure, FoundTasks, Score, figures_of, measure
from firefly.evaluation.harness import HarnessModel
from firefly.evaluation.intervals import Verdict
from firefly.evaluation.progress import Progress
from firefly.evaluation.wording import VERDICTS
from firefly.files import atomic_file
from firefly.generation.answering_type import answering_precision
from firefly.generation.loading import Loaded, load_for_generation, name_models, named_adapters
from firefly.models.memory import PRIMITIVES
from firefly.runs.memory import cap_onednn_cache
from firefly.runs.records import EVALUATIONS, finite, record_in
from firefly.translation import translate

UNSAFE = re.compile(r"[^\w.-]+")
"""What no name of a file should hold."""


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        adapter: unmerged over its base, which is measured from the same weights.
        base: another model to compare with, loaded before the one that is measured.
        with_base: of an adapter, measure its own base, too.
        with_template: ask with the chat templates that the models were trained with, where they have one.
    """

    model: ModelConfig
    adapter: str = ""
    base: str = ""
    with_base: bool = True
    template_name: str = "auto"
    with_template: bool = True
    load_in_4bit: bool = False
    dtype: str = "auto"
    force: bool = False

    @property
    def adapters(self) -> dict[str, str]:
        return named_adapters([self.adapter]) if self.adapter else {}


@dataclass(frozen=True)
class Side:
    """A model that was measured.

    Attributes:
        template: by which it was asked; None: in plain text.
    """

    name: str
    model: str
    adapter: str | None
    template: str | None
    template_hash: str | None
    dtype: str
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """What one or two models scored.

    Attributes:
        results: lm-eval's, by "base" and "tuned".
    """

    base: Side | None
    tuned: Side
    figures: tuple[Figure, ...]
    limit: int | None
    created: str
    results: Mapping[str, Mapping[str, Any]]


def evaluate_models(subject: Subject, found: FoundTasks, limit: int | None = None) -> Evaluation:
    """Measure a model, or two.

    Raises:
        UsageError: see `load_for_generation` and `measure`.
    """
    cap_onednn_cache(PRIMITIVES)
    other = replace(subject.model, name_or_path=subject.base)
    whole = name_models(subject.model, subject.adapters)
    named = whole.model
    if subject.base:  # two sets of weights: that both are there is known before the first is measured
        name_models(other, {})
        of_both = answering_precision(subject.dtype, named, whole.adapters.values(), subject.load_in_4bit)
        subject = replace(subject, dtype=of_both.name)
    sides: dict[str, Side] = {}
    results: dict[str, dict[str, Any]] = {}
    if subject.base:
        loaded = _load(replace(subject, model=other, adapter=""))
        sides["base"], results["base"] = _measured(loaded, _first(loaded), other, subject, found, limit)
        del loaded
    loaded = _load(subject)
    tuned = next((name for name, each in loaded.served.items() if each.adapter is not None), None)
    if tuned and not subject.base and subject.with_base:
        if base := next((name for name, each in loaded.served.items() if each.adapter is None), None):
            sides["base"], results["base"] = _measured(loaded, base, named, subject, found, limit)
        for name, reason in loaded.unserved.items():
            notice("eval.no_base", "{name} is not measured beside the adapter: {reason}.", name=name, reason=reason)
    sides["tuned"], results["tuned"] = _measured(loaded, tuned or _first(loaded), named, subject, found, limit)
    return Evaluation(
        sides.get("base"),
        sides["tuned"],
        figures_of(found, results.get("base"), results["tuned"]),
        limit,
        datetime.now().astimezone().isoformat("T", "seconds"),
        results,
    )


def _load(subject: Subject) -> Loaded:
    return load_for_generation(
        subject.model,
        subject.adapters,
        subject.template_name,
        subject.load_in_4bit,
        subject.force,
        with_base=subject.with_base,
        dtype=subject.dtype,
    )


def _first(loaded: Loaded) -> str:
    return next(iter(loaded.served))


def _measured(
    loaded: Loaded, name: str, model: ModelConfig, subject: Subject, found: FoundTasks, limit: int | None
) -> tuple[Side, dict[str, Any]]:
    began = time.monotonic()
    progress = Progress(name, sys.stderr)
    lm = HarnessModel(loaded, name, subject.with_template, progress.count, sys.stderr)
    results = measure(lm, found, limit)
    template = None if lm.encoder is None else lm.encoder.template
    side = Side(
        name,
        model.name_or_path,
        lm.served.adapter,
        None if template is None else template.name,
        None if template is None else template.hash,
        str(loaded.model.dtype).removeprefix("torch."),
        round(time.monotonic() - began, 3),
    )
    return side, results


# ---- what is shown and kept


def describe(evaluation: Evaluation, found: FoundTasks, tasks: Sequence[str] | None = None) -> dict[str, Any]:
    """What `firefly eval --json` prints; of some tasks, what their file holds before its samples."""
    own = {name: {"read_as": task.kind, "path": str(task.path), "rows": task.rows} for name, task in found.own.items()}
    value = {
        "created": evaluation.created,
        "firefly": firefly.__version__,
        "lm_eval": version("lm_eval"),
        "base": None if evaluation.base is None else asdict(evaluation.base),
        "tuned": asdict(evaluation.tuned),
        "limit": evaluation.limit,
        "figures": [asdict(each) for each in evaluation.figures if tasks is None or each.task in tasks],
        "files_read": {name: of for name, of in own.items() if tasks is None or name in tasks},
    }
    return _plain(value)


def make_folder(subject: Subject, given: Path | None) -> Path | None:
    """Where results will be kept, made, and seen to take files before a model is loaded: in `given`, else beside the
    run that made the adapter or the model; None where there is neither.

    Raises:
        UsageError: it cannot be made or written; there is no such model.
    """
    named = name_models(subject.model, subject.adapters)
    measured = next(iter(named.adapters.values()), named.model.name_or_path)
    folder = given or _folder_of_run(Path(measured).expanduser())
    if folder is None:
        notice(
            "eval.not_kept",
            "the results are kept nowhere: {path} is no folder of a run. --save_path names a folder for them.",
            path=measured,
        )
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError):
        raise UsageError("eval.no_folder", "{path} is no folder, and cannot be made one.", path=folder) from None
    except OSError as error:
        raise UsageError(
            "eval.closed_folder",
            "results cannot be kept in {path}: {problem}. Name another folder with --save_path.",
            path=folder,
            problem=error.strerror or error,
        ) from None
    return folder


def write(evaluation: Evaluation, found: FoundTasks, folder: Path) -> Iterator[Path]:
    """A file for each task that was asked for, with its figures and what was answered.

    Raises:
        UsageError: one cannot be written.
    """
    moment = datetime.fromisoformat(evaluation.created).strftime("%Y%m%d-%H%M%S")
    for asked, tasks in found.asked.items():
        path = folder / f"{UNSAFE.sub('-', asked)}-{moment}.json"
        samples = {task: _samples(evaluation, task) for task in tasks if task in found.tasks}
        value = {"task": asked, **describe(evaluation, found, tasks), "samples": samples}
        text = json.dumps(_plain(value), ensure_ascii=False, indent=1) + "\n"
        try:
            with atomic_file(path) as scratch:
                scratch.write_text(text, encoding="utf-8", errors="backslashreplace")  # JSON's own for half a character
        except OSError as error:
            raise UsageError(
                "eval.not_written",
                "{path} could not be written: {problem}. The figures were printed, the answers are lost.",
                path=path,
                problem=error.strerror or error,
            ) from error
        yield path


def _folder_of_run(place: Path) -> Path | None:
    candidates = [place, place.parent] if re.fullmatch(r"checkpoint-\d+", place.name) else [place]
    return next((each / EVALUATIONS for each in candidates if each.is_dir() and record_in(each)), None)


def _plain(value: Any) -> Any:
    """What JSON knows: numpy's numbers as Python's, infinity and NaN as None, anything else as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float):
        return finite(value)
    return value if value is None or isinstance(value, (str, int)) else str(value)


def _samples(evaluation: Evaluation, task: str) -> list[dict[str, Any]]:
    """Each question with what both models made of it."""
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for side, results in evaluation.results.items():
        for sample in results["samples"].get(task, ()):
            doc = sample["doc"] if isinstance(sample["doc"], Mapping) else {}
            row = rows.setdefault(
                (sample["doc_id"], sample["filter"]),
                {
                    "index": sample["doc_id"],
                    "filter": sample["filter"],
                    **{key: doc[key] for key in ("place", "question", "prompt") if isinstance(doc.get(key), str)},
                    "target": sample["target"],
                },
            )
            row[side] = {
                "answers": sample["filtered_resps"],
                **{metric: sample[metric] for metric in sample["metrics"] if metric in sample},
            }
    return list(rows.values())


def show(evaluation: Evaluation, console: Console) -> None:
    """Print the models and a row for each figure."""
    labels = {"base": translate("base"), "tuned": translate("tuned")}
    if evaluation.base is None:
        labels["tuned"] = translate("model")
    for label, side in ((labels["base"], evaluation.base), (labels["tuned"], evaluation.tuned)):
        if side is not None:
            asked = translate("asked with its chat template") if side.template else translate("asked in plain text")
            console.print(Text.assemble((f"{label}  ", "bold"), side.name, (f"  {side.dtype}, {asked}", "dim")))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(translate("task"), overflow="fold")
    table.add_column(translate("metric"), overflow="fold")
    table.add_column(translate("questions"), justify="right")
    if evaluation.base is not None:
        table.add_column(labels["base"], justify="right", no_wrap=True)
    table.add_column(labels["tuned"], justify="right", no_wrap=True)
    if evaluation.base is not None:
        table.add_column(translate("difference"), justify="right", no_wrap=True)
        table.add_column(translate("verdict"), overflow="fold")
    for figure in evaluation.figures:
        metric = figure.metric if figure.filter == "none" else f"{figure.metric} ({figure.filter})"
        cells = [Text(figure.task, "bold" if figure.is_group else ""), Text(metric), Text(str(figure.count))]
        if evaluation.base is not None:
            cells.append(_cell(figure.base))
        cells.append(_cell(figure.tuned))
        if evaluation.base is not None:
            known = figure.difference is not None
            cells.append(_cell(Score(figure.difference.value, figure.error), "+") if figure.difference else Text("–"))
            cells.append(_verdict(figure.verdict) if known else Text("–"))
        table.add_row(*cells)
    console.print()
    console.print(table)


def _cell(score: Score | None, sign: str = "") -> Text:
    if score is None:
        return Text("–")
    digits = 4 if abs(score.value) < 10 else 2
    error = "" if score.error is None else f"\n±{score.error:.{digits}f}"
    return Text.assemble(f"{score.value:{sign}.{digits}f}", (error, "dim"))


STYLES: dict[Verdict, str] = {"better": "green", "worse": "red", "no_difference": "", "too_few": "yellow"}


def _verdict(verdict: Verdict | None) -> Text:
    return Text("–") if verdict is None else Text(str(VERDICTS[verdict][1]), STYLES[verdict])
