"""`firefly compare`: from what the user named to a report, and its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from firefly.config import DataConfig
from firefly.data.sources import find_sources
from firefly.errors import UsageError
from firefly.evaluation.asking import find_questions
from firefly.evaluation.comparing import Material, compare_measurements, pair_losses
from firefly.evaluation.endpoints import Endpoint
from firefly.evaluation.judge import judge_answers
from firefly.evaluation.measurement import GivenAnswer, Measurement, Question
from firefly.evaluation.page import write_page
from firefly.evaluation.probes import probe_questions, probe_texts
from firefly.evaluation.report import Report, SuspectRow
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
from firefly.evaluation.worst_rows import find_suspects, read_texts
from firefly.models.loading import read_config
from firefly.models.serving_memory import context_of
from firefly.runs.manifest import write_json

PAGE, FACTS = "report.html", "report.json"


@dataclass(frozen=True)
class ComparisonRequest:
    """Two models, and what they are compared on.

    Attributes:
        base, tuned: a model's folder or hub id, an adapter's folder, or the address of an OpenAI-compatible server.
        names: of the models at such servers, of base and tuned; "": the only one there.
        eval_file: held-out rows.
        train_file: rows the tuned model was trained on, of which the worst are looked for.
        questions: held-out prompts that are answered.
        probes: whether the fixed questions and texts are asked, too.
        limit: rows of each file whose losses are compared, from its beginning; None: all.
        judge: a model that compares answers.
        threshold: see `Forgetting`.
    """

    base: str
    tuned: str
    eval_file: str = ""
    train_file: str = ""
    names: tuple[str, str] = ("", "")
    api_key: str = ""
    questions: int = 32
    max_new_tokens: int = 128
    max_seq_length: int = 2048
    data_format: str = "auto"
    limit: int | None = None
    probes: bool = True
    judge: Endpoint | None = None
    threshold: float = 0.05
    loading: LoadingOptions = LoadingOptions()  # noqa: RUF009  (frozen)


def compare_models(request: ComparisonRequest) -> Report:
    """Ask both models and compare what they said.

    Raises:
        UsageError: a model, a server or a file is not what it should be, or there is nothing to compare.
    """
    if not request.eval_file and not request.train_file and not request.probes:
        raise UsageError(
            "compare.nothing", "there is nothing to compare: give --eval_file or --train_file, or leave probes on."
        )
    if request.train_file and (is_endpoint(request.base) or is_endpoint(request.tuned)):
        raise UsageError(
            "compare.no_losses", "--train_file asks for the loss of each row, which a server does not tell."
        )
    held_out = (
        find_questions(files_of(request.eval_file, request), request.questions, request.data_format)
        if request.eval_file
        else ()
    )
    asked = Asked(
        rows=rows_of(request.eval_file, request),
        trained=rows_of(request.train_file, request),
        questions=(*held_out, *(probe_questions() if request.probes else ())),
        texts=probe_texts() if request.probes else (),
        max_new_tokens=request.max_new_tokens,
    )
    base, tuned = measure_both(request, asked)
    ours, theirs = base.measurement, tuned.measurement
    judge = None
    if request.judge is not None:
        judged = held_out or asked.questions
        judge = judge_answers(request.judge, judged, answers_to(judged, ours), answers_to(judged, theirs))
    suspects: tuple[SuspectRow, ...] = ()
    if request.train_file:
        paired = pair_losses(base.trained, tuned.trained, "token").finite
        suspects = find_suspects(paired, read_texts(files_of(request.train_file, request), request.data_format))
    return compare_measurements(Material(asked.questions, request.threshold), ours, theirs, judge, suspects)


def answers_to(questions: Sequence[Question], measured: Measurement) -> list[GivenAnswer]:
    by_key = {answer.key: answer for answer in measured.answers}
    return [by_key[question.key] for question in questions]


def files_of(given: str, request: ComparisonRequest) -> list[Path]:
    (source,) = find_sources(given, "input_file", request.loading.hub)
    return list(source.files)


def rows_of(given: str, request: ComparisonRequest) -> DataConfig | None:
    """The rows of a file as training reads them; None where none is named."""
    if not given:
        return None
    source = {"path": given} if request.limit is None else {"path": given, "max_rows": request.limit}
    return DataConfig(train_file=(source,), data_format=request.data_format, max_seq_length=request.max_seq_length)


def _cut_at(rows: DataConfig | None, longest: int) -> DataConfig | None:
    return None if rows is None else replace(rows, max_seq_length=longest)


def shortest_context(models: Sequence[LocalModel], longest: int) -> int:
    """The most tokens that all models take: rows are cut alike for all of them."""
    contexts = [context_of(read_config(model.model)) for model in models]
    return min([longest, *(context for context in contexts if context)])


def measure_both(request: ComparisonRequest, asked: Asked) -> tuple[Measured, Measured]:
    """What base and tuned say. Models that run here are loaded together where they share their weights."""
    given = {"base": request.base, "tuned": request.tuned}
    here = [name_model(role, name, request.loading) for role, name in given.items() if not is_endpoint(name)]
    measured: dict[str, Measured] = {}
    if here:
        longest = shortest_context(here, request.max_seq_length)
        asked = replace(asked, rows=_cut_at(asked.rows, longest), trained=_cut_at(asked.trained, longest))
        found = measure_local(here, asked, request.loading)
        measured = dict(zip([model.role for model in here], found, strict=True))
    for (role, address), name in zip(given.items(), request.names, strict=True):
        if role not in measured:
            measured[role] = measure_endpoint(Endpoint(address, name, request.api_key), asked)
    return measured["base"], measured["tuned"]


def write_report(report: Report, folder: Path) -> Path:
    """Write report.html and report.json into a folder; the path of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FACTS, report.as_dict())
    write_page(report, folder / PAGE)
    return folder / PAGE
