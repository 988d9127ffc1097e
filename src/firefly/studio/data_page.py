"""Data: what a run would train on, row by row, before any run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from firefly.commands.templates import describe_templates
from firefly.config.loading import parse_overrides
from firefly.studio.page import Studio
from firefly.studio.roots import DATA_SUFFIXES
from firefly.translation import translate

ROWS = 10
"""Rows that are shown at a time."""
TASKS = ("auto", "pretrain", "sft", "dpo", "kto", "reward")


def build(studio: Studio, page: gr.Blocks) -> tuple[gr.Dropdown, gr.Dropdown]:
    """The part "Data"; returns the fields of file and task, which other parts fill in."""
    files = studio.roots.files(DATA_SUFFIXES)
    templates = ["auto", *(item["name"] for item in describe_templates())]
    with gr.Row():
        file = gr.Dropdown(
            files,
            value=None,
            label=translate("Training rows"),
            info=translate("Any format that training reads; a path or a glob can be typed."),
            allow_custom_value=True,
            elem_id="data-file",
            scale=4,
        )
        held_out = gr.Dropdown(
            files,
            value=None,
            label=translate("Held-out rows"),
            info=translate("Rows that overlap with them are named."),
            allow_custom_value=True,
            scale=3,
        )
        upload = gr.UploadButton(translate("Upload files"), file_count="multiple", elem_id="upload", scale=1)
    with gr.Row():
        model = gr.Textbox("smollm2-135m-instruct", label=translate("Model whose tokenizer counts"), scale=3)
        template = gr.Dropdown(templates, value="auto", label=translate("Chat template"), elem_id="template", scale=2)
        task = gr.Dropdown(TASKS, value="auto", label=translate("Task"), scale=1)
        longest = gr.Number(1024, label=translate("Longest example, in tokens"), minimum=2, precision=0, scale=1)
        look = gr.Button(translate("Check"), variant="primary", elem_id="check", scale=1)
    verdict = gr.Markdown(elem_id="verdict")
    with gr.Row():
        lengths = empty_plot("tokens", translate("tokens per example"))
        shares = empty_plot("share", translate("share of trained tokens per example"))
    findings = gr.Dataframe(
        headers=[translate("place"), translate("cause"), translate("message")],
        label=translate("Findings"),
        wrap=True,
        interactive=False,
        visible=False,
        elem_id="findings",
    )
    with gr.Row(visible=False) as turning:
        back = gr.Button("◀", min_width=60, elem_id="rows-back")
        start = gr.Number(1, label=translate("Examples from"), minimum=1, precision=0)
        forth = gr.Button("▶", min_width=60, elem_id="rows-forth")
    rows = gr.HTML(elem_id="rows")
    fields = [file, held_out, model, template, task, longest]

    def check(chosen: str, beside: str, name: str, chat: str, kind: str, most: float, first: float) -> list[Any]:
        if not chosen:
            raise gr.Error(translate("Choose a file, or upload one."))
        config = {"train_file": chosen, "eval_file": beside, "model_name_or_path": name, "template_name": chat}
        config |= {"max_seq_length": str(int(most or 1024)), "task_type": "" if kind == "auto" else kind}
        # As options, not as a file: without one, the rows tell what they are for.
        given = [f"--{key}={value}" for key, value in config.items() if value]
        studio.roots.check(parse_overrides(given))
        begin = max(int(first or 1), 1) - 1
        found = studio.ask(["check", "--rows", f"{begin}:{begin + ROWS}", *given])
        table = [
            [f"{Path(item['file']).name}:{item['line']}", item["cause"], item["message"]] for item in found["findings"]
        ]
        return [
            describe(found),
            bar_plot(found["lengths"], "tokens"),
            bar_plot(found["target_share"], "share"),
            gr.Dataframe(table, visible=bool(table)),
            gr.Row(visible=found["train_examples"] > ROWS),
            examples_as_html(found["examples"]),
        ]

    shown = [verdict, lengths, shares, findings, turning, rows]
    checked = {"fn": studio.handler(check), "inputs": [*fields, start], "outputs": shown}
    gr.on([look.click, template.input, start.submit], **checked, api_visibility="private")
    for button, change in ((back, -ROWS), (forth, ROWS)):
        moved = button.click(lambda now, by=change: max(int(now or 1) + by, 1), start, start, api_visibility="private")
        moved.then(**checked, api_visibility="private")

    def take(uploads: Sequence[str]) -> list[Any]:
        taken = [studio.roots.shown(studio.roots.take(Path(upload))) for upload in uploads]
        choices = studio.roots.files(DATA_SUFFIXES)
        return [gr.Dropdown(choices, value=taken[0]), gr.Dropdown(choices)]

    upload.upload(studio.handler(take), upload, [file, held_out], api_visibility="private")
    studio.remember(page, "data", fields)
    return file, task


def describe(found: Mapping[str, Any]) -> str:
    """The ledger in a table, and above it what would stop a run."""
    lost = sum(found["lost"].values())
    shared = translate("{format}; task {task}; template {template}", **_said(found))
    numbers = {
        translate("rows"): found["rows"],
        translate("kept rows"): found["kept"],
        translate("cut rows"): found["cut"],
        translate("lost rows"): f"{lost:,}"
        + (f" ({', '.join(f'{c} {n}' for c, n in found['lost'].items())})" if lost else ""),
        translate("examples"): found["train_examples"],
        translate("tokens"): found["tokens"],
        translate("trained"): f"{found['target_tokens'] / max(found['tokens'], 1):.0%}",
    }
    head = "|".join(numbers)
    values = "|".join(f"{value:,}" if isinstance(value, int) else value for value in numbers.values())
    lines = [shared, "", f"|{head}|", "|" + "---|" * len(numbers), f"|{values}|"]
    if found["problem"]:
        quoted = "\n> ".join(escape(found["problem"]).splitlines())
        lines = [f"**{translate('A run would not start:')}**\n> {quoted}", "", *lines]
    return "\n".join(lines)


def _said(found: Mapping[str, Any]) -> dict[str, str]:
    names = {"format": ", ".join(found["formats"]) or "–", "task": found["task"], "template": found["template"] or "–"}
    return {name: escape(value) for name, value in names.items()}


def empty_plot(name: str, title: str) -> gr.BarPlot:
    """The place of a histogram, which is shown when there is one."""
    return gr.BarPlot(
        x=name, y="rows", title=title, x_title=" ", y_title=translate("rows"), height=220, visible=False
    )  # fmt: skip


def bar_plot(found: Sequence[Mapping[str, Any]], name: str) -> gr.BarPlot:
    """A histogram of `firefly check`, its bars in their order."""
    import pandas

    def label(item: Mapping[str, Any]) -> str:
        if name == "share":
            return f"≤{item['to']:.0%}"
        return f"{item['from']:,}" if item["from"] == item["to"] else f"{item['from']:,}–{item['to']:,}"

    labels = [label(item) for item in found]
    table = pandas.DataFrame({name: labels, "rows": [int(item["count"]) for item in found]})
    return gr.BarPlot(table, sort=labels, x_label_angle=-40, visible=True)


def examples_as_html(examples: Sequence[Mapping[str, Any]]) -> str:
    """Examples as the model sees them, trained tokens marked. Whatever a row holds is text here."""
    made = []
    for example in examples:
        place = f"{Path(example['file']).name}:{example['line']}"
        verdict = {True: translate("a good answer"), False: translate("a bad answer")}.get(example["desirable"], "")
        names = (translate("chosen"), translate("rejected")) if len(example["sides"]) > 1 else (verdict,)
        for name, tokens, side in zip(names, example["tokens"], example["sides"], strict=False):
            text = "".join(
                f"<mark>{escape(part['text'])}</mark>" if part["trained"] else escape(part["text"]) for part in side
            )
            size = translate("{tokens} tokens", tokens=f"{tokens:,}")
            head = " · ".join(filter(None, (f"#{example['index'] + 1}", escape(place), name, size)))
            made.append(f"<figure><figcaption>{head}</figcaption><pre>{text}</pre></figure>")
    return f"<div class='examples'>{''.join(made)}</div>"
