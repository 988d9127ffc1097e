"""`firefly compare`: from what the user named to a report, and its files."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from firefly.config import DataConfig, bad_choice
from firefly.data.formats import FORMATS
from firefly.data.sources import find_sources
from firefly.errors import UsageError
from firefly.evaluation.asking import find_questions
from firefly.evaluation.comparing import Material, compare_measurements, pair_losses
from firefly.evaluation.endpoints import Endpoint
from firefly.evaluation.judge import judge_answers
from firefly.evaluation.measurement import Measurement, Question
from firefly.evaluation.page import write_page
from firefly.evaluation.probes import probe_questions, probe_texts
from firefly.evaluation.progress import Progress
from firefly.evaluation.report import JudgeResult, Report, RowChange, SuspectRow
from firefly.evaluation.subjects import (
    Asked,
    LoadingOptions,
    LocalModel,
    Measured,
    is_endpoint,
    measure_endpoint,
    measure_local,
    name_model,
)
from firefly.evaluation.worst_rows import RowText, find_suspects, texts_of_rows
from firefly.models.loading import read_config
from firefly.models.serving_memory import context_of
from firefly.runs.manifest import write_json
from firefly.translation import Phrase, translate

PAGE, FACTS = "report.html", "report.json"
MOST_SOURCES = 20
"""Files that have a line each in the table of losses; of more, what was named has one."""


@dataclass(frozen=True)
class ComparisonRequest:
    """Two models, and what they are compared on.

    Attributes:
        base, tuned: a model's folder or hub id, an adapter's folder, or the address of an OpenAI-compatible server.
        names, api_keys: of the models at such servers, of base and tuned; "": the only one there, no key.
        eval_files: held-out rows.
        train_files: rows the tuned model was trained on, of which the worst are looked for.
        questions: held-out prompts that are answered.
        limit: rows of each file whose losses are compared, from its beginning; None: all.
        probes: whether the fixed questions and texts are asked, too.
        judge: a model that compares answers.
        threshold: see `Forgetting`.
    """

    base: str
    tuned: str
    eval_files: tuple[str, ...] = ()
    train_files: tuple[str, ...] = ()
    names: tuple[str, str] = ("", "")
    api_keys: tuple[str, str] = ("", "")
    questions: int = 32
    max_new_tokens: int = 128
    max_seq_length: int = 2048
    data_format: str = "auto"
    limit: int | None = None
    probes: bool = True
    judge: Endpoint | None = None
    judge_tokens: int = 512
    threshold: float = 0.05
    loading: LoadingOptions = LoadingOptions()  # noqa: RUF009  (frozen)


def compare_models(request: ComparisonRequest) -> Report:
    """Ask both models and compare what they said.

    Raises:
        UsageError: a model, a server or a file is not what it should be, or there is nothing to compare. Servers are
            asked for their models, and files looked for, before anything is computed.
    """
    if not request.eval_files and not request.train_files and not request.probes:
        raise UsageError(
            "compare.nothing", "there is nothing to compare: give --eval_file or --train_file, or leave probes on."
        )
    if request.train_files and (is_endpoint(request.base) or is_endpoint(request.tuned)):
        raise UsageError(
            "compare.no_losses", "--train_file asks for the loss of each row, which a server does not tell."
        )
    if request.data_format not in ("auto", *FORMATS):
        raise bad_choice("data_format", json.dumps(request.data_format), ("auto", *FORMATS))
    held_out = files_of(request.eval_files, "eval_file", request)
    trained = files_of(request.train_files, "train_file", request)
    servers = {
        role: Endpoint(address, name, key).named()
        for role, address, name, key in zip(
            ("base", "tuned"), (request.base, request.tuned), request.names, request.api_keys, strict=True
        )
        if is_endpoint(address)
    }
    judge = None if request.judge is None else request.judge.named()
    questions = find_questions(held_out, request.questions, request.data_format)
    asked = Asked(
        rows=rows_of(request.eval_files, held_out, request),
        trained=rows_of(request.train_files, trained, request),
        questions=(*questions, *(probe_questions() if request.probes else ())),
        texts=probe_texts() if request.probes else (),
        max_new_tokens=request.max_new_tokens,
    )
    base, tuned = measure_both(request, asked, servers)
    votes, notes = None, []
    if judge is not None:
        votes, notes = ask_judge(judge, questions or asked.questions, base, tuned, request.judge_tokens)
    suspects: tuple[SuspectRow, ...] = ()
    if trained:
        paired = pair_losses(base.trained, tuned.trained, "token").finite
        suspects = find_suspects(paired, trained, request.data_format)
    material = Material(asked.questions, request.threshold)
    report = compare_measurements(material, base.measurement, tuned.measurement, votes, suspects, notes)
    return with_texts(report, held_out, request.data_format)


def files_of(given: Sequence[str], key: str, request: ComparisonRequest) -> list[Path]:
    """The files that were named.

    Raises:
        UsageError: a place without any.
    """
    sources = find_sources(list(given), key, request.loading.hub) if given else []
    return [file for source in sources for file in source.files]


def rows_of(given: Sequence[str], files: Sequence[Path], request: ComparisonRequest) -> DataConfig | None:
    """The rows of files as training reads them, each file a source of its own unless there are many; None of none."""
    if not given:
        return None
    names = [file.name for file in files]
    if len(files) > MOST_SOURCES:
        sources = [{"path": each} for each in given]
    else:
        paths = [str(file) for file in files]
        shown = [name if names.count(name) == 1 else path for name, path in zip(names, paths, strict=True)]
        sources = [{"path": path, "name": name} for path, name in zip(paths, shown, strict=True)]
    limit = {} if request.limit is None else {"max_rows": request.limit}
    return DataConfig(
        train_file=tuple(source | limit for source in sources),
        data_format=request.data_format,
        max_seq_length=request.max_seq_length,
    )


def measure_both(request: ComparisonRequest, asked: Asked, servers: dict[str, Endpoint]) -> tuple[Measured, Measured]:
    """What base and tuned say. Models that run here are loaded together where they share their weights."""
    given = {"base": request.base, "tuned": request.tuned}
    here = [name_model(role, name, request.loading) for role, name in given.items() if role not in servers]
    measured: dict[str, Measured] = {}
    if here:
        longest = shortest_context(here, request.max_seq_length)
        of_here = replace(asked, rows=_cut_at(asked.rows, longest), trained=_cut_at(asked.trained, longest))
        found = measure_local(here, of_here, request.loading)
        measured = dict(zip([model.role for model in here], found, strict=True))
    for role, server in servers.items():
        measured[role] = measure_endpoint(server, asked)
    return measured["base"], measured["tuned"]


def _cut_at(rows: DataConfig | None, longest: int) -> DataConfig | None:
    return None if rows is None else replace(rows, max_seq_length=longest)


def shortest_context(models: Sequence[LocalModel], longest: int) -> int:
    """The most tokens that all models take: rows are cut alike for all of them."""
    contexts = [context_of(read_config(model.model)) for model in models]
    return min([longest, *(context for context in contexts if context)])


def ask_judge(
    judge: Endpoint, questions: Sequence[Question], base: Measured, tuned: Measured, tokens: int
) -> tuple[JudgeResult | None, list[Phrase]]:
    """Its votes; where it gives none, what was measured is worth a report without them, and a note says why."""
    sides: tuple[Measurement, Measurement] = (base.measurement, tuned.measurement)
    try:
        with Progress(judge.model, sys.stderr).count(translate("judgements"), 2 * len(questions)) as tick:
            votes = judge_answers(judge, questions, sides[0].answers, sides[1].answers, lambda: tick(1), tokens)
    except UsageError as error:
        return None, [error.phrase]
    return votes, []


def with_texts(report: Report, files: Sequence[Path], data_format: str) -> Report:
    """The report with question and reference of all rows that it lists, not only of those that were asked."""
    missing = {change.key for change in (*report.worst, *report.best) if not change.question}
    if not missing or not files:
        return report
    texts = texts_of_rows(files, missing, data_format)
    return replace(
        report,
        worst=tuple(_with_text(change, texts) for change in report.worst),
        best=tuple(_with_text(change, texts) for change in report.best),
    )


def _with_text(change: RowChange, texts: dict[str, RowText]) -> RowChange:
    text = texts.get(change.key)
    return change if text is None else replace(change, question=text.question, reference=text.answer)


def write_report(report: Report, folder: Path) -> Path:
    """Write report.html and report.json into a folder; the path of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FACTS, report.as_dict())
    write_page(report, folder / PAGE)
    return folder / PAGE
