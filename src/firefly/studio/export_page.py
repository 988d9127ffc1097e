"""Compare and export: did it help, and the files for other engines, each read back before it counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from firefly.models.saved_adapter import is_adapter
from firefly.runs import jobs
from firefly.runs.jobs import Job
from firefly.runs.records import RUNNING, read_object
from firefly.studio.page import QUIET, Studio, job_text
from firefly.studio.roots import DATA_SUFFIXES
from firefly.studio.talk_page import tuned_models
from firefly.translation import translate

KINDS = ("merge", "gguf", "ollama", "vllm")
TYPES = ("f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "f32")
SHOWN_KINDS = ("compare", "merge", "export", "serve")
SECONDS = 2
REPORT = "report.html"


def build(studio: Studio, page: gr.Blocks, tab: gr.Tab) -> None:
    """The part "Compare and export"."""
    with gr.Row():
        tuned = gr.Dropdown(
            tuned_models(studio), label=translate("Tuned: a run's folder, an adapter, or a merged model"),
            allow_custom_value=True, elem_id="export-tuned", scale=3,
        )  # fmt: skip
        base = gr.Textbox("", label=translate("Base; empty: the adapter's own"), elem_id="export-base", scale=3)
    with gr.Row():
        with gr.Column():
            held_out = gr.Dropdown(
                studio.roots.files(DATA_SUFFIXES), value=None, label=translate("Held-out rows"),
                allow_custom_value=True, elem_id="compare-file",
            )  # fmt: skip
            questions = gr.Number(16, label=translate("Questions that both answer"), minimum=0, precision=0)
            compare = gr.Button(translate("Compare"), variant="primary", elem_id="begin-compare")
        with gr.Column():
            with gr.Row():
                kind = gr.Dropdown(KINDS, value="gguf", label=translate("Export as"), elem_id="export-kind")
                number_type = gr.Dropdown(TYPES, value="q8_0", label=translate("Numbers (gguf, ollama)"))
            target = gr.Textbox("", label=translate("Write to; empty: beside the run"), elem_id="export-target")
            export = gr.Button(translate("Export and verify"), variant="primary", elem_id="begin-export")
    with gr.Row():
        chosen = gr.Dropdown([], label=translate("Job"), elem_id="export-job", scale=4)
        stop = gr.Button(translate("Stop"), elem_id="export-stop", scale=1)
    result = gr.HTML(elem_id="export-result")
    report = gr.HTML(elem_id="report")
    log = gr.Textbox(lines=10, max_lines=10, interactive=False, label=translate("Log"), elem_id="export-log")

    def begin_compare(of: str, against: str, rows: str, count: float) -> Any:
        folder = studio.roots.inside(of or "")
        base = studio.base_of(folder, against)
        studio.roots.check({"eval_file": rows or None})
        output = studio.roots.shown(unused(studio.roots.inside(folder.parent / f"{folder.name}-compared")))
        arguments = ["compare", f"--base={base.name_or_path}", f"--hub={base.hub}", "--tuned", str(folder)]
        arguments += ["--save_path", output]
        arguments += ["--questions", str(int(count or 0)), *([f"--eval_file={rows}"] if rows else [])]
        return offer(studio.begin(arguments, output=output).folder.name)

    def begin_export(of: str, against: str, form: str, numbers: str, where: str) -> Any:
        folder = studio.roots.inside(of or "")
        ending = ".gguf" if form == "gguf" else ""
        place = studio.roots.inside(where or folder.parent / f"{folder.name}-{form}{ending}")
        output = studio.roots.shown(unused(place) if not where else place)
        if against or is_adapter(str(folder)):
            studio.base_of(folder, against)  # which has to lie where the page may read
        return offer(studio.begin(export_arguments(folder, against, form, numbers, output), output=output).folder.name)

    def listed() -> list[str]:
        found = [job for job in jobs.list_jobs(studio.roots.jobs) if job.kind in SHOWN_KINDS]
        return [job.folder.name for job in reversed(found)]

    def offer(now: str | None) -> Any:
        names = listed()
        return gr.Dropdown(names, value=now if now in names else next(iter(names), None))

    def job_named(name: str | None) -> Job | None:
        return jobs.read_job(studio.roots.jobs / name) if name in listed() else None

    def look(name: str | None) -> list[Any]:
        job = job_named(name)
        return ["", "", None] if job is None else [describe(studio, job), job_text(job), f"{name} {job.state}"]

    def draw_report(name: str | None) -> str:
        job = job_named(name)
        return "" if job is None else frame(studio, job)

    def halt(name: str | None) -> None:
        if (job := job_named(name)) is not None:
            jobs.stop(job)

    ended = gr.State(None)
    looking = {"fn": studio.handler(look), "inputs": chosen, "outputs": [result, log, ended]}
    compare.click(studio.handler(begin_compare), [tuned, base, held_out, questions], chosen, **QUIET)
    export.click(studio.handler(begin_export), [tuned, base, kind, number_type, target], chosen, **QUIET)
    stop.click(studio.handler(halt), chosen, **QUIET)
    page.load(studio.handler(offer), chosen, chosen, **QUIET)
    chosen.change(**looking, **QUIET)
    gr.Timer(SECONDS).tick(**looking, **QUIET)
    # The report is drawn once, when its job has ended: anew every two seconds, nobody could read it.
    ended.change(studio.handler(draw_report), chosen, report, **QUIET)
    tab.select(studio.handler(lambda: gr.Dropdown(tuned_models(studio))), None, tuned, **QUIET)
    studio.remember(page, "export", [tuned, base, held_out, questions, kind, number_type, target])


def unused(path: Path) -> Path:
    """The path, or one with a number, where nothing lies yet."""
    number, found = 2, path
    while found.exists():
        found = path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
    return found


def export_arguments(folder: Path, base: str, kind: str, numbers: str, output: str) -> list[str]:
    """Of `firefly merge` or `firefly export`."""
    model = [f"--model_name_or_path={base}"] if base else []
    if is_adapter(str(folder)):
        model += ["--adapter_name_or_path", str(folder)]
    elif not base:
        model = ["--model_name_or_path", str(folder)]
    if kind == "merge":
        return ["merge", *model, "--save_path", output]
    return ["export", kind, *model, "--save_path", output, *(["--type", numbers] if kind != "vllm" else [])]


def describe(studio: Studio, job: Job) -> str:
    """What became of an export: the verdict and figures of its report."""
    place = Path(studio.roots.first, job.output)
    names = (place / "merge_report.json", place / "export_report.json", Path(f"{place}.json"))
    found = next((read_object(path) for path in names if path.is_file()), {})
    if job.state == RUNNING or not found:
        return ""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in flat(found) if len(value) < 200
    )
    verified = found.get("verified")
    mark = "" if verified is None else f"<p><strong>{'✓' if verified else '✗'} {translate('verified')}</strong></p>"
    return f"{mark}<table class='facts'>{rows}</table>"


def flat(found: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """The numbers and words of a report, each under its path of names; long lists are left to the file."""
    rows = []
    for name, value in found.items():
        if isinstance(value, Mapping) and len(before.split(".")) < 3:
            rows += flat(value, f"{before}{name}.")
        elif isinstance(value, float):
            rows.append((f"{before}{name}", f"{value:.4g}"))
        elif isinstance(value, (str, int, bool)):
            rows.append((f"{before}{name}", value if isinstance(value, str) else json.dumps(value)))
    return rows[:40]


def frame(studio: Studio, job: Job) -> str:
    """The report of a comparison, as a page within the page: what is in it cannot reach out of it."""
    path = Path(studio.roots.first, job.output, REPORT)
    if not path.is_file():
        return ""
    address = f"/report?path={quote(str(path.parent))}"
    return f"<iframe class='report' sandbox='allow-scripts' src='{escape(address)}' title='{REPORT}'></iframe>"
