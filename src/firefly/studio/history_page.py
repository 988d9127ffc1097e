"""History: every run below the roots, with what it left, and what it takes of the disk."""

from __future__ import annotations

import io
from typing import Any

import gradio as gr
from rich.console import Console

from firefly.commands.runs import clock, moment, number, show_run, state_name, steps_of
from firefly.errors import UsageError
from firefly.runs.records import RunRecord, disk_used, find_runs, read_run, remove_run
from firefly.studio.page import QUIET, Studio
from firefly.translation import translate

WIDTH = 100
"""Characters of a line in what is shown of a run."""


def build(studio: Studio, tab: gr.Tab) -> None:
    """The part "History"."""
    headers = [translate("run"), translate("state"), translate("steps"), "loss", "eval_loss", translate("started")]
    table = gr.Dataframe(
        headers=[*headers, translate("took"), "GB"], interactive=False, wrap=True, elem_id="history",
        show_search="filter", column_widths=[240, 110, 110, 90, 90, 110, 90, 70],
    )  # fmt: skip
    again = gr.Button(translate("Look again"), elem_id="history-again")
    with gr.Row():
        chosen = gr.Dropdown([], label=translate("Run"), elem_id="history-run", scale=4)
        typed = gr.Textbox("", label=translate("To delete it, type its name"), elem_id="history-name", scale=2)
        delete = gr.Button(translate("Delete"), variant="stop", elem_id="history-delete", scale=1)
    details = gr.Textbox(
        lines=20, max_lines=40, interactive=False, show_label=False, elem_id="history-details", buttons=["copy"]
    )

    def look(now: str | None) -> tuple[list[list[str]], Any]:
        records = find_runs(studio.roots.folders)
        names = [studio.roots.shown(record.folder) for record in records]
        return [row_of(studio, record) for record in records], gr.Dropdown(names, value=now if now in names else None)

    def show(name: str | None) -> str:
        if not name:
            return ""
        text = io.StringIO()
        show_run(read_run(studio.roots.inside(name)), Console(file=text, width=WIDTH, color_system=None))
        return text.getvalue()

    def remove(name: str | None, confirmed: str) -> str:
        if not name:
            raise gr.Error(translate("Choose a run."))
        record = read_run(studio.roots.inside(name))
        if confirmed.strip() != record.folder.name:
            raise UsageError(
                "studio.not_confirmed",
                "to delete the run, type the name of its folder: {name}",
                name=record.folder.name,
            )
        if record.folder in studio.roots.folders:
            raise UsageError("studio.is_root", "{path} is a root of this page; it stays.", path=record.folder)
        remove_run(record)
        return ""

    looking = {"fn": studio.handler(look), "inputs": chosen, "outputs": [table, chosen]}
    tab.select(**looking, **QUIET)
    again.click(**looking, **QUIET)
    chosen.change(studio.handler(show), chosen, details, **QUIET)
    delete.click(studio.handler(remove), [chosen, typed], typed, **QUIET).success(**looking, **QUIET)


def row_of(studio: Studio, record: RunRecord) -> list[str]:
    return [
        studio.roots.shown(record.folder),
        state_name(record.state),
        steps_of(record),
        number(record.loss),
        number(record.eval_loss),
        moment(record.started, "%m-%d %H:%M"),
        clock(record.seconds),
        f"{disk_used(record.folder) / 1e9:.2f}",
    ]
