"""Watch: what runs write, as they write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr

from firefly.commands.runs import DIFF_PARTS, clock, describe_diff, moment, number, said, shown, state_name, steps_of
from firefly.runs import jobs
from firefly.runs.jobs import Job
from firefly.runs.lock import stop_run
from firefly.runs.records import RunRecord, find_runs, record_in, series
from firefly.studio.page import JOB_LINES, QUIET, Studio
from firefly.translation import Phrase, translate

CURVES: dict[str, tuple[str, ...]] = {
    "loss": ("loss", "eval_loss"),
    "learning_rate": ("learning_rate",),
    "grad_norm": ("grad_norm",),
    "tokens_per_second": ("tokens_per_second",),
    "memory": ("memory_bytes",),
    "rewards": ("rewards/margins", "rewards/accuracies", "eval_rewards/margins", "eval_rewards/accuracies"),
}
"""The plots, and what of metrics.jsonl is in each."""

TITLES = {
    "loss": Phrase("loss, training and held-out"),
    "learning_rate": Phrase("learning rate"),
    "grad_norm": Phrase("gradient norm"),
    "tokens_per_second": Phrase("tokens per second"),
    "memory": Phrase("memory in GiB"),
    "rewards": Phrase("rewards: margins and accuracies"),
}

SECONDS = 2
OFFER_SECONDS = 10
"""How often runs are looked for, while none is chosen."""
POINTS = 400
"""Points of a curve that are drawn: more are closer than a screen can tell apart."""


def run_field() -> gr.Dropdown:
    """The field that names the runs; other parts fill it in, and it is drawn here."""
    return gr.Dropdown(
        [],
        multiselect=True,
        allow_custom_value=True,
        label=translate("Runs"),
        info=translate("Several are drawn over each other."),
        elem_id="watched",
        scale=4,
        render=False,
    )


def build(studio: Studio, page: gr.Blocks, tab: gr.Tab, chosen: gr.Dropdown) -> None:
    """The part "Watch"; `chosen` names the runs."""
    with gr.Row():
        chosen.render()
        stop = gr.Button(translate("Stop (saves)"), elem_id="stop", scale=1)
        resume = gr.Button(translate("Resume"), elem_id="watch-resume", scale=1)
    state = gr.HTML(elem_id="run-state")
    plots = {}
    names = list(CURVES)
    for pair in (names[:2], names[2:4], names[4:]):
        with gr.Row():
            for name in pair:
                plots[name] = gr.LinePlot(
                    x="step", y="value", color="run", title=str(TITLES[name]), height=260, visible=name == "loss",
                    x_title=translate("step"), y_title=" ", color_title=translate("run"),
                    elem_id=f"plot-{name}",
                )  # fmt: skip
    with gr.Accordion(translate("What the model said at its checkpoints"), open=False):
        samples = gr.HTML(elem_id="samples")
    with gr.Accordion(translate("What differs between two runs"), open=False):
        differing = gr.Dataframe(headers=["", "", "A", "B"], interactive=False, wrap=True, elem_id="diff")
    with gr.Accordion(translate("Log"), open=False):
        log = gr.Textbox(lines=16, max_lines=16, interactive=False, show_label=False, elem_id="log", buttons=["copy"])
    drawn = [plots[name] for name in names]

    def offer(now: list[str] | None) -> Any:
        """The runs there are; the newest, where none is chosen."""
        found = [studio.roots.shown(record.folder) for record in find_runs(studio.roots.folders)]
        kept = [name for name in now or [] if name in found]
        return gr.Dropdown(found, value=kept or found[:1])

    def records(names: Sequence[str] | None) -> list[RunRecord]:
        """Of a run that was started a moment ago there is none yet."""
        found = [record_in(studio.roots.inside(name)) for name in names or []]
        return [record for record in found if record is not None]

    def look(names: list[str] | None) -> list[Any]:
        found = records(names)
        updates = []
        for name in CURVES:
            table = curve_table(found, name)
            updates.append(gr.LinePlot(table, visible=len(table) > 0 or name == "loss"))
        first = found[0] if found else None
        return [describe(found), *updates, samples_as_html(first), log_of(studio, first) if first else ""]

    def diff(names: list[str] | None) -> list[list[str]]:
        found = records(names)
        return diff_rows(describe_diff(*found)) if len(found) == 2 else []

    def halt(names: list[str] | None) -> None:
        for record in records(names)[:1]:
            stop_run(record.folder)
            gr.Info(translate("{path} finishes its step, saves a checkpoint and stops.", path=record.folder))

    def go_on(names: list[str] | None) -> None:
        for record in records(names)[:1]:
            file = studio.roots.inside(record.folder / "train_args.json")
            studio.begin(
                ["train", str(file), "--resume_from_checkpoint", "true"],
                name=record.folder.name,
                output=str(record.folder),
            )

    looking = {"fn": studio.handler(look), "inputs": chosen, "outputs": [state, *drawn, samples, log]}
    page.load(studio.handler(offer), chosen, chosen, **QUIET).then(**looking, **QUIET)
    gr.Timer(SECONDS).tick(**looking, **QUIET)
    gr.Timer(OFFER_SECONDS).tick(studio.handler(lambda now: gr.skip() if now else offer(now)), chosen, chosen, **QUIET)
    tab.select(studio.handler(offer), chosen, chosen, **QUIET)
    chosen.change(**looking, **QUIET)
    chosen.change(studio.handler(diff), chosen, differing, **QUIET)
    stop.click(studio.handler(halt), chosen, **QUIET)
    resume.click(studio.handler(go_on), chosen, **QUIET)


def curve_table(records: Sequence[RunRecord], plot: str) -> Any:
    """The points of one plot: step, value, and the run (with the curve's name, where there are several)."""
    import pandas

    rows: list[tuple[int, float, str]] = []
    for record in records:
        curves = {name: series(record.metrics, name) for name in CURVES[plot]}
        several = sum(map(bool, curves.values())) > 1
        for name, curve in curves.items():
            label = f"{record.folder.name} {name}" if several else record.folder.name
            points = list(curve.items())
            step = max(1, -(-len(points) // POINTS))
            kept = [*points[::step], *(points[-1:] if (len(points) - 1) % step else [])]
            scale = 2**-30 if name.endswith("_bytes") else 1.0
            rows += [(at, value * scale, label) for at, value in kept]
    return pandas.DataFrame(rows, columns=["step", "value", "run"])


def describe(records: Sequence[RunRecord]) -> str:
    """A line for each run: state, steps, losses, pace."""
    lines = []
    for record in records:
        last = next((line for line in reversed(record.metrics) if "tokens_per_second" in line), {})
        left = last.get("seconds_left") if record.state == "running" else None
        parts = [
            translate("step {steps}", steps=steps_of(record)),
            f"loss {number(record.loss)}" if record.loss is not None else "",
            f"eval_loss {number(record.eval_loss)}" if record.eval_loss is not None else "",
            translate("{rate} tokens/s", rate=f"{last['tokens_per_second']:,.0f}") if last else "",
            translate("{time} left", time=clock(left)) if left else "",
            f"{moment(record.started)}, {clock(record.seconds)}",
        ]
        why = f"<br><em>{escape(str(record.error.get('message')))}</em>" if record.error else ""
        name = escape(record.folder.name)
        badge = f"<b class='state {record.state}'>{state_name(record.state)}</b>"
        lines.append(f"<p>{badge} <strong>{name}</strong> {' · '.join(filter(None, map(escape, parts)))}{why}</p>")
    return "".join(lines) or f"<p>{translate('No run yet: start one under Train.')}</p>"


def samples_as_html(record: RunRecord | None) -> str:
    """Each prompt with what the model said to it at every checkpoint, the newest first."""
    lines = record.samples if record else []
    if not lines:
        return f"<p>{translate('Nothing: the key checkpoint_samples of a run asks for so many answers.')}</p>"
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_prompt.setdefault(str(line.get("key")), []).append(line)
    made = []
    for said_to in by_prompt.values():
        rows = [(translate("step {steps}", steps=line["step"]), said(line)) for line in reversed(said_to)]
        reference = said_to[0].get("reference")
        rows += [(translate("reference"), str(reference))] if reference else []
        cells = "".join(f"<tr><th>{name}</th><td>{escape(text)}</td></tr>" for name, text in rows)
        caption = escape(str(said_to[0].get("question")))
        made.append(f"<table class='facts'><caption>{caption}</caption>{cells}</table>")
    return "".join(made)


def log_of(studio: Studio, record: RunRecord) -> str:
    """The end of what a run said, where it was started here."""
    found = [job for job in jobs.list_jobs(studio.roots.jobs) if job.kind == "train" and _writes(studio, job, record)]
    return "\n".join(found[-1].log.splitlines()[-JOB_LINES:]) if found else ""


def _writes(studio: Studio, job: Job, record: RunRecord) -> bool:
    return bool(job.output) and (studio.roots.first / job.output).resolve() == record.folder.resolve()


def diff_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """What `firefly runs diff` says, a row for each value."""
    return [
        [str(title), name, *("–" if value is None else shown(name, value) for value in pair)]
        for part, title in DIFF_PARTS.items()
        for name, pair in found[part].items()
    ]
