"""`firefly runs`: list, show and diff, of what runs left. Nothing heavy is imported, so the commands answer at once."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from firefly.commands.options import JsonOption
from firefly.console import print_json, stdout_console
from firefly.runs.jobs import WAITING
from firefly.runs.lock import stop_run
from firefly.runs.records import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    RUNNING,
    RunRecord,
    disk_used,
    find_runs,
    finite,
    finite_values,
    mapping,
    message_of,
    read_run,
    remove_run,
    series,
)
from firefly.translation import Phrase, translate

STYLES = {WAITING: "dim", RUNNING: "bold cyan", FINISHED: "green", INTERRUPTED: "yellow", FAILED: "bold red"}

COUNTS = ("rows", "kept", "cut", "train_examples", "held_out_examples", "tokens", "target_tokens")
HARDWARE = ("device", "gpu", "cpu", "cpu_capability", "threads")

Pairs = dict[str, tuple[Any, Any]]

DIFF_PARTS = {
    "settings": Phrase("settings"),
    "data": Phrase("model and data"),
    "choices": Phrase("chosen for this run"),
    "versions": Phrase("versions and hardware"),
    "results": Phrase("results"),
}
"""The parts of what differs between two runs, and what stands above each."""

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command("list")
def list_command(
    folders: Annotated[
        list[str] | None, typer.Argument(help="Folders to search: output, if there is one, or here.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The runs in some folders, newest first: state, steps, losses, duration."""
    folders = folders or (["output"] if Path("output").is_dir() else ["."])
    records = find_runs(folders)
    if as_json:
        print_json(json.dumps([record.as_dict() for record in records], ensure_ascii=False))
        return
    if not records:
        print(
            translate(
                "no runs in: {folders}. A run is a folder with the run.json that firefly train writes; name other "
                "folders to search there.",
                folders=", ".join(folders),
            )
        )
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(translate("run"), overflow="fold", ratio=1)
    table.add_column(translate("state"), no_wrap=True)
    for title in (translate("steps"), "loss", "eval_loss"):
        table.add_column(title, no_wrap=True, justify="right")
    table.add_column(translate("started"), no_wrap=True)
    table.add_column(translate("took"), no_wrap=True, justify="right")
    for record in records:
        table.add_row(
            nearby(record.folder),
            Text(state_name(record.state), STYLES[record.state]),
            steps_of(record),
            number(record.loss),
            number(record.eval_loss),
            moment(record.started, "%m-%d %H:%M"),
            clock(record.seconds),
        )
    stdout_console().print(table)


@app.command("show")
def show_command(
    run: Annotated[str, typer.Argument(help="The output_dir of a run.")], as_json: JsonOption = False
) -> None:
    """Everything of one run: configuration, choices, data, loss, results, checkpoints, notes, versions."""
    record = read_run(run)
    if as_json:
        print_json(json.dumps(describe_run(record), ensure_ascii=False))
    else:
        show_run(record, stdout_console())


def describe_run(record: RunRecord) -> dict[str, Any]:
    """What the list says of a run, and its files."""
    return record.as_dict() | {
        "changed": changed_keys(record.config),
        "manifest": record.manifest,
        "data": {name: value for name, value in record.data.items() if name != "findings"},
        "results": finite_values(record.results),
        "curves": {
            name: [[step, finite(loss)] for step, loss in series(record.metrics, name).items()]
            for name in ("loss", "eval_loss")
        },
        "checkpoints": [{"step": step, "complete": complete} for step, complete in record.checkpoints],
        "evaluations": record.evaluations,
        "samples": record.samples,
    }


def changed_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a configuration that are not at Firefly's defaults, Firefly's own first.

    Of transformers' keys run.json holds only those that somebody set.
    """
    defaults = own_defaults()
    return {name: value for name, value in config.items() if name not in defaults or value != defaults[name]}


def own_defaults() -> dict[str, Any]:
    """What a configuration that says nothing means, as JSON has it: lists where a configuration has tuples."""
    from firefly.config import TRAINING_DEFAULTS, own_fields

    defaults = {name: spec.default for name, (_, spec) in own_fields().items()} | TRAINING_DEFAULTS
    return json.loads(json.dumps(defaults))


def show_run(record: RunRecord, console: Console) -> None:
    """Print everything of a run that a person asks for."""
    manifest, data, config = record.manifest, record.data, record.config
    console.print(Text(nearby(record.folder), style="bold"))
    console.print(
        Text.assemble(
            (state_name(record.state), STYLES[record.state]),
            f"  {translate('step {steps}', steps=steps_of(record))}",
            f"  {moment(record.started)}  {clock(record.seconds)}",
        )
    )
    model = Path(record.model).name if record.model else "–"
    console.print(f"{config.get('task_type', '–')} {config.get('train_mode', '–')}, {model}")
    if record.error:
        code = record.error.get("code") or record.error.get("type")
        console.print(Text(f"{code}: {message_of(record.error)}", style="red"))
    if resumed := manifest.get("resumed_from"):
        console.print(translate("resumed from {path}", path=resumed))
    show_section(console, translate("configuration, where it is not the default"), changed_keys(config))
    show_section(console, translate("chosen for this run"), mapping(manifest.get("resolved")))
    counted = {name: value for name, value in data.items() if value and name not in ("findings", "files", "eval")}
    show_section(console, translate("data"), counted)
    curves = {name: series(record.metrics, name) for name in ("loss", "eval_loss", "rewards/margins")}
    show_section(console, translate("loss"), {name: describe_curve(curve) for name, curve in curves.items() if curve})
    results = {name: readable(name, value) for name, value in record.results.items() if name != "comparison"}
    show_section(console, translate("results"), results)
    verdicts = [message_of(mapping(item)) for item in mapping(manifest.get("comparison")).get("verdicts") or []]
    show_section(console, translate("comparison"), {str(number): message for number, message in enumerate(verdicts, 1)})
    show_section(console, translate("what the model said at its last checkpoint"), last_samples(record))
    show_section(console, translate("evaluations"), scored(record))
    steps = [
        str(step) if complete else translate("{step} (incomplete)", step=step) for step, complete in record.checkpoints
    ]
    show_section(console, translate("checkpoints"), {"": ", ".join(steps)} if steps else {})
    notices = [message_of(mapping(item)) for item in manifest.get("notices") or []]
    show_section(console, translate("notes"), {str(number): message for number, message in enumerate(notices, 1)})
    versions = {name: version for name, version in mapping(manifest.get("versions")).items() if version}
    commits = {name: manifest[name] for name in ("firefly_commit", "git_commit") if manifest.get(name)}
    show_section(console, translate("versions and hardware"), versions | mapping(manifest.get("hardware")) | commits)


def show_section(console: Console, title: str, values: Mapping[str, Any]) -> None:
    """A heading and a line for each value, if there is any."""
    if not values:
        return
    console.print()
    console.print(Text(title, style="bold"))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(Text(f"  {name}", style="dim"), Text(readable(name, value)))
    console.print(table)


def scored(record: RunRecord) -> dict[str, str]:
    """The newest figures of each task that `firefly eval` asked: base → tuned, and what that means."""
    if not record.evaluations:
        return {}
    from firefly.evaluation.wording import VERDICTS  # which brings numpy: not for runs that were not evaluated

    words: dict[str, str] = {name: str(word) for name, (_, word) in VERDICTS.items()}
    lines = {}
    for evaluation in record.evaluations:
        figures = evaluation.get("figures")
        listed = [mapping(figure) for figure in figures] if isinstance(figures, list) else []
        means = [figure for figure in listed if figure.get("is_group")]  # of a group its tasks would be many lines
        for figure in filter(None, means or listed):
            values = [mapping(figure.get(side)).get("value") for side in ("base", "tuned")]
            known = [number(value) for value in values if isinstance(value, (int, float))]
            verdict = words.get(str(figure.get("verdict")), "")
            name = f"{figure.get('task')} {figure.get('metric')}"
            if figure.get("filter") not in (None, "none"):
                name += f" ({figure['filter']})"
            lines[name] = "  ".join(filter(None, (" → ".join(known), verdict)))
    return lines


def last_samples(record: RunRecord) -> dict[str, str]:
    """The answers of the newest step in samples.jsonl, each by its question."""
    last = record.samples[-1]["step"] if record.samples else None
    return {str(line.get("question")): said(line) for line in record.samples if line["step"] == last}


def said(sample: Mapping[str, Any]) -> str:
    """What the model answered, or why it did not."""
    return str(sample.get("error") or sample.get("answer") or "")


def describe_curve(curve: Mapping[int, float]) -> str:
    """First value, last value, and the lowest with its step."""
    first, *_, last = list(curve.values()) * 2
    known = {step: value for step, value in curve.items() if math.isfinite(value)}
    text = f"{number(first)} → {number(last)}"
    if not known:
        return text
    step = min(known, key=known.__getitem__)
    return f"{text}  {translate('lowest {value} at step {step}', value=number(known[step]), step=step)}"


@app.command("stop")
def stop_command(run: Annotated[str, typer.Argument(help="The output_dir of a run.")]) -> None:
    """Ask a run to stop: it finishes its step, saves a checkpoint and ends. `--resume_from_checkpoint true` goes on."""
    stop_run(read_run(run).folder)


@app.command("remove")
def remove_command(
    runs: Annotated[list[str], typer.Argument(help="The output_dir of each run.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete runs with all that is in their folders: results, checkpoints, records."""
    records = [read_run(run) for run in runs]
    for record in records:
        size = f"{disk_used(record.folder) / 2**30:.2f}"
        if yes or typer.confirm(translate("Delete {path} ({size} GiB)?", path=record.folder, size=size)):
            remove_run(record)


@app.command("diff")
def diff_command(
    first: Annotated[str, typer.Argument(metavar="A", help="The output_dir of a run.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The output_dir of another.")],
    as_json: JsonOption = False,
) -> None:
    """What differs between two runs: settings, data, choices, versions; and their results side by side."""
    a, b = read_run(first), read_run(second)
    if as_json:
        print_json(json.dumps(describe_diff(a, b), ensure_ascii=False))
    else:
        show_diff(a, b, stdout_console())


def compare_runs(a: RunRecord, b: RunRecord) -> dict[str, Pairs]:
    """Name → (of the first run, of the second) of what differs, by part: settings, data, choices, versions. None stands
    for what is not set or was not recorded."""
    return {part: differing(value, facts_of(b)[part]) for part, value in facts_of(a).items()}


def facts_of(run: RunRecord) -> dict[str, dict[str, Any]]:
    """What a run was. Model, data, template and tokenizer are known by hashes: their paths say nothing."""
    manifest = run.manifest
    hashes, template = mapping(manifest.get("hashes")), mapping(manifest.get("template"))
    weights = mapping(hashes.get("base_weights"))
    settings = own_defaults() | mapping(manifest.get("defaults")) | run.config
    return {
        "settings": {name: value for name, value in settings.items() if name != "output_dir"},
        "data": {
            "base_weights": weights.get("sha256") or weights.get("commit"),
            **{name: hashes.get(name) for name in ("data", "eval_data", "tokenizer")},
            "template": template.get("sha256"),
            **{name: run.data.get(name) for name in COUNTS},
        },
        "choices": mapping(manifest.get("resolved")) | {"world_size": manifest.get("world_size")},
        "versions": mapping(manifest.get("versions"))
        | {name: mapping(manifest.get("hardware")).get(name) for name in HARDWARE}
        | {"firefly_commit": manifest.get("firefly_commit")},
    }


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> Pairs:
    return {name: (a.get(name), b.get(name)) for name in dict.fromkeys((*a, *b)) if a.get(name) != b.get(name)}


def results_of(run: RunRecord) -> dict[str, float | None]:
    """What came out of a run; of one that did not finish, what its last log said."""
    results = run.results
    held_out = [value for value in series(run.metrics, "eval_loss").values() if math.isfinite(value)]
    last = next((line for line in reversed(run.metrics) if "input_tokens_per_second" in line), {})
    return {
        "steps": run.steps,
        "loss": run.loss,
        "train_loss": results.get("train_loss"),
        "eval_loss": run.eval_loss,
        "lowest_eval_loss": min(held_out, default=None),
        "tokens_per_second": results.get("input_tokens_per_second", last.get("input_tokens_per_second")),
        "peak_memory_bytes": results.get("peak_memory_bytes", last.get("memory_bytes")),
        "seconds": run.seconds,
    }


def describe_diff(a: RunRecord, b: RunRecord) -> dict[str, Any]:
    """The value that `firefly runs diff --json` prints."""
    ours, theirs = results_of(a), results_of(b)
    results = {name: (finite(value), finite(theirs[name])) for name, value in ours.items()}
    return {"a": a.as_dict(), "b": b.as_dict(), **compare_runs(a, b), "results": results}


def show_diff(a: RunRecord, b: RunRecord, console: Console) -> None:
    """Print the parts that differ, and the results."""
    for label, run in (("A", a), ("B", b)):
        console.print(Text.assemble((f"{label}  ", "bold"), nearby(run.folder), (f"  {state_name(run.state)}", "dim")))
    found = compare_runs(a, b)
    if not any(found.values()):
        console.print(translate("settings, data, choices and versions are the same."))
    ours, theirs = results_of(a), results_of(b)
    results = {name: (value, theirs[name]) for name, value in ours.items() if (value, theirs[name]) != (None, None)}
    for part, pairs in (found | {"results": results}).items():
        if not pairs:
            continue
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for heading in (str(DIFF_PARTS[part]), "A", "B"):
            table.add_column(heading, overflow="fold")
        for name, values in pairs.items():
            table.add_row(f"  {name}", *(Text("–" if value is None else shown(name, value)) for value in values))
        console.print()
        console.print(table)


def shown(name: str, value: Any) -> str:
    """A value; of a hash or a commit, as much as tells it from others."""
    text = readable(name, value)
    match = re.fullmatch(r"([0-9a-f]{10})[0-9a-f]{22,}(.*)", text)
    return f"{match[1]}…{match[2]}" if match else text


# ---- how values read ----


def state_name(state: str) -> str:
    names = {
        WAITING: translate("waiting"),
        RUNNING: translate("running"),
        FINISHED: translate("finished"),
        INTERRUPTED: translate("interrupted"),
        FAILED: translate("failed"),
    }
    return names[state]


def steps_of(record: RunRecord) -> str:
    return f"{record.steps}/{record.total_steps}" if record.total_steps else str(record.steps)


def nearby(folder: Path) -> str:
    """A path as one would type it here."""
    path = os.path.relpath(folder)
    return str(folder) if path.startswith("..") else path


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def clock(seconds: float | None) -> str:
    """h:mm:ss, with days before them."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours}:{minutes:02}:{rest:02}"


def moment(seconds: float | None, form: str = "%Y-%m-%d %H:%M") -> str:
    return "–" if seconds is None else datetime.fromtimestamp(seconds).strftime(form)


def readable(name: str, value: Any) -> str:
    """A value, by the unit that its name ends with; of another kind as it would stand in a configuration."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if name.endswith("_bytes"):
            return f"{value / 2**30:.2f} GiB"
        if name.endswith(("runtime", "seconds")):
            return clock(value)
        if name.endswith("loss"):
            return number(value)
        if name.endswith("tokens"):
            return f"{value:,.0f}"
        return f"{value:.6g}" if isinstance(value, float) else str(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
