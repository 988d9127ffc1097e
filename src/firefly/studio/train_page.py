"""Train: a configuration as a form and as text, what it will take, and the queue."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from html import escape
from typing import Any

import gradio as gr

from firefly.commands.runs import clock, moment, state_name
from firefly.config.loading import read_config_file
from firefly.errors import UsageError
from firefly.runs import jobs
from firefly.runs.queue import enqueue
from firefly.studio import form
from firefly.studio.page import QUIET, Studio, heading
from firefly.studio.roots import CONFIGS
from firefly.translation import Phrase, translate

BEGINNING = {
    "model_name_or_path": "smollm2-135m-instruct",
    "train_file": "",
    "output_dir": "output/first-run",
    "task_type": "sft",
    "train_mode": "lora",
    "learning_rate": 2e-4,
    "num_train_epochs": 1,
}
"""What the form begins with."""

QUEUE_SECONDS = 3


def build(studio: Studio, page: gr.Blocks, watched: gr.Dropdown) -> None:
    """The part "Train"; a run that is begun is put into `watched`."""
    by_name = {key.name: key for key in form.fields()}
    defaults = {name: key.schema.get("default") for name, key in by_name.items()}

    def make(key: form.Field) -> Any:
        return key.make(BEGINNING.get(key.name), key.is_read(BEGINNING, defaults))

    with gr.Row():
        preset = gr.Dropdown(
            presets(studio), value=None, label=translate("Begin with"), elem_id="preset", scale=3,
            info=translate("Configurations in these folders."),
        )  # fmt: skip
        name = gr.Textbox("first-run", label=translate("Name"), elem_id="config-name", scale=2)
        save = gr.Button(translate("Save"), elem_id="config-save", scale=1)
    with gr.Row():
        with gr.Column(scale=3):
            inputs = {name: make(by_name[name]) for name in form.FIRST}
            for section, title in form.SECTIONS.items():
                with gr.Accordion(str(title), open=False, elem_id=f"section-{section}"):
                    keys = [key for key in by_name.values() if key.section == section and key.name not in inputs]
                    inputs |= {key.name: make(key) for key in keys}
        with gr.Column(scale=2):
            text = gr.Code(
                form.as_text(BEGINNING), language="json", label=translate("The same as text"), lines=12,
                interactive=True, elem_id="config",
            )  # fmt: skip
            verdict = gr.Markdown(elem_id="config-verdict")
            command = gr.Code(label=translate("On the command line"), language="shell", interactive=False, lines=1)
            planned = gr.Markdown(elem_id="planned")
            settled = gr.Textbox(visible="hidden", show_label=False)  # the text when a field was left: what is planned
            with gr.Row():
                start = gr.Button(translate("Start"), variant="primary", elem_id="start")
                resume = gr.Button(translate("Resume"), elem_id="resume")
                queue = gr.Button(translate("Add to the queue"), elem_id="enqueue")
    shown = list(inputs.values())

    def fill(written: str) -> list[Any]:
        """All fields, by the text."""
        config = form.parse(written)
        return [
            type(inputs[key])(value=by_name[key].shown(config.get(key)), visible=by_name[key].is_read(config, defaults))
            for key in inputs
        ]

    def reveal(written: str) -> list[Any]:
        """The fields that count, as they stand: one may be typed into at this moment."""
        config = form.parse(written)
        return [gr.update(visible=by_name[key].is_read(config, defaults)) for key in inputs]

    def restore(written: str) -> list[Any]:
        return [gr.skip()] * len(inputs) if written == form.as_text(BEGINNING) else fill(written)

    def judge(written: str, called: str) -> tuple[str, str]:
        config = form.parse(written)
        line = shlex.join(["firefly", "train", f"{CONFIGS}/{file_name(called)}"])
        try:
            studio.roots.check(config)
            notes = form.judge(config)
        except UsageError as error:
            return f"✗ {escape(str(error))}", line
        said = "\n".join(f"- {escape(note)}" for note in notes)
        return f"✓ {translate('The configuration is valid.')}\n{said}", line

    def checked(written: str) -> dict[str, Any]:
        config = form.parse(written)
        studio.roots.check(config)
        form.judge(config)
        return config

    def show_plan(written: str) -> str:
        """Nothing where the verdict says already what is wrong, or data are not named yet."""
        try:
            config = checked(written)
            return describe_plan(studio.ask(["plan"], config)) if config.get("train_file") else ""
        except UsageError:
            return ""
        except gr.Error as error:
            return escape(error.message)

    def begin(written: str, more: dict[str, Any]) -> list[str]:
        config = checked(written) | more
        output = str(config["output_dir"])
        studio.begin(["train"], config=config, output=output)
        gr.Info(translate("{path}: the run begins; Watch shows it. It goes on when this page is closed.", path=output))
        return [studio.roots.shown(studio.roots.inside(output))]

    def add(written: str) -> None:
        config = checked(written)
        enqueue(studio.roots.jobs, config, cwd=str(studio.roots.first))
        jobs.start_queue(studio.roots.jobs, studio.roots.first)
        gr.Info(translate("{path} is queued.", path=config["output_dir"]))

    def load(chosen: str) -> tuple[str, str]:
        path = studio.roots.inside(chosen)
        return form.as_text(read_config_file(path)), path.stem

    def keep(written: str, called: str) -> Any:
        path = studio.roots.inside(f"{CONFIGS}/{file_name(called)}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(form.as_text(form.parse(written)) + "\n", encoding="utf-8")
        gr.Info(translate("saved: {path}", path=studio.roots.shown(path)))
        return gr.Dropdown(presets(studio), value=studio.roots.shown(path))

    settling = {"inputs": text, "outputs": settled, "js": "(text) => text", **QUIET}
    for key, field in inputs.items():
        writing, is_choice = by_name[key].writing(), isinstance(field, gr.Dropdown)
        if not is_choice:
            field.input(None, [field, text], text, js=writing, **QUIET)
        # What is pasted counts when the field is left: Gradio's text fields do not report it as input.
        left = field.input if is_choice else field.blur
        left(None, [field, text], [text, settled], js=f"(...now) => Array(2).fill(({writing})(...now))", **QUIET)
    judging = {"fn": studio.handler(judge), "inputs": [text, name], "outputs": [verdict, command], **QUIET}
    gr.on([text.change, name.change], **judging, trigger_mode="always_last")
    gr.on([text.input, text.blur], studio.handler(fill), text, shown, **QUIET)
    kinds = [inputs["task_type"].change, inputs["train_mode"].change]
    gr.on(kinds, studio.handler(reveal), text, shown, trigger_mode="always_last", **QUIET)
    text.blur(None, **settling)
    settled.change(
        studio.handler(show_plan), settled, planned,
        trigger_mode="always_last", show_progress="minimal", api_visibility="private",
    )  # fmt: skip
    start.click(studio.handler(lambda now: begin(now, {})), text, watched, **QUIET)
    resume.click(studio.handler(lambda now: begin(now, {"resume_from_checkpoint": True})), text, watched, **QUIET)
    added = queue.click(studio.handler(add), text, **QUIET)
    loaded = preset.input(studio.handler(load), preset, [text, name], **QUIET)
    loaded.then(studio.handler(fill), text, shown, **QUIET).then(None, **settling)
    save.click(studio.handler(keep), [text, name], preset, **QUIET)
    restored = studio.remember(page, "train", [text, name])
    restored.then(studio.handler(restore), text, shown, **QUIET).then(**judging).then(None, **settling)
    build_queue(studio, page, added)


def build_queue(studio: Studio, page: gr.Blocks, added: Any) -> None:
    """What waits, runs and ran, and why one failed."""
    heading(translate("Queue"))
    headers = [translate("job"), translate("state"), translate("started"), translate("took"), translate("writes")]
    table = gr.Dataframe(
        headers=[*headers, translate("why")], interactive=False, wrap=True, elem_id="queue",
        column_widths=[320, 100, 110, 90, 180, 420],
    )  # fmt: skip
    with gr.Row():
        chosen = gr.Dropdown([], label=translate("Job"), elem_id="queue-job", scale=3)
        stop = gr.Button(translate("Stop (saves)"), elem_id="queue-stop", scale=1)
        remove = gr.Button(translate("Remove"), elem_id="queue-remove", scale=1)

    def look(kept: str | None) -> tuple[list[list[str]], Any]:
        found = [job for job in reversed(jobs.list_jobs(studio.roots.jobs)) if job.kind == "train"]
        names = [job.folder.name for job in found]
        return [row_of(job) for job in found], gr.Dropdown(names, value=kept if kept in names else None)

    def act(work: Any, chosen: str | None) -> None:
        found = {job.folder.name: job for job in jobs.list_jobs(studio.roots.jobs)}
        if chosen not in found:
            raise gr.Error(translate("Choose a job."))
        work(found[chosen])

    looked = studio.handler(look)
    gr.Timer(QUEUE_SECONDS).tick(looked, chosen, [table, chosen], **QUIET)
    page.load(looked, chosen, [table, chosen], **QUIET)
    added.then(looked, chosen, [table, chosen], **QUIET)
    for button, work in ((stop, jobs.stop), (remove, jobs.remove)):
        done = button.click(studio.handler(lambda name, work=work: act(work, name)), chosen, **QUIET)
        done.then(looked, chosen, [table, chosen], **QUIET)


def row_of(job: jobs.Job) -> list[str]:
    began = moment(job.started.get("time"), "%m-%d %H:%M")
    return [job.folder.name, state_name(job.state), began, clock(job.seconds), job.output, job.problem()]


def presets(studio: Studio) -> list[str]:
    """Configurations below the roots: files that name a model and data."""
    found = []
    for name in studio.roots.files((".json", ".yaml", ".yml")):
        path = studio.roots.inside(name)
        if path.stat().st_size < 64 << 10 and re.search(r'["\s]?train_file["\s]*:', path.read_text("utf-8", "replace")):
            found.append(name)
    return found


def file_name(name: str) -> str:
    """The name of a configuration's file."""
    return re.sub(r"[^\w.-]+", "-", name.rpartition("/")[2].removesuffix(".json")).strip("-.") + ".json"


NAMES = {
    True: Phrase("it fits: {total} GiB of {available} GiB."),
    False: Phrase("it does not fit: {total} GiB are needed, {available} GiB available."),
}


def describe_plan(plan: Mapping[str, Any]) -> str:
    """Memory by part and time, as `firefly plan` prints them."""
    from firefly.models.memory import PARTS

    numbers = {name: f"{plan[f'{name}_bytes'] / 2**30:.2f}" for name in ("total", "available")}
    verdict = translate(NAMES[plan["fits"]].text, **numbers)
    lines = [f"**{verdict}**", "", f"|{translate('memory')}|GiB|", "|---|---:|"]
    lines += [f"|{PARTS[name]}|{size / 2**30:.2f}|" for name, size in plan["parts"].items()]
    if plan["seconds"]:
        lines += ["", translate("about {time} for {steps} steps", time=clock(plan["seconds"]), steps=plan["steps"])]
    lines += ["", *(f"- {escape(note)}" for note in plan["notes"])]
    if plan["unknown"]:
        lines += ["", escape(plan["unknown"])]
    lines += [f"- `{hint['key']} = {hint['value']}`: {escape(hint['cost'])}" for hint in plan["advice"] if hint["key"]]
    return "\n".join(lines)
