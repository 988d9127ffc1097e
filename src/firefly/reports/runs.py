"""`firefly runs list` and `firefly runs show`: which runs there are, and everything that one of them was."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from firefly.config import TRAINING_DEFAULTS, own_fields
from firefly.runs.records import RunRecord, finite, finite_values, mapping, series
from firefly.runs.state import FAILED, FINISHED, INTERRUPTED, RUNNING
from firefly.translation import Phrase, translate

STYLES = {RUNNING: "bold cyan", FINISHED: "green", INTERRUPTED: "yellow", FAILED: "bold red"}
BLOCKS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 24


def default_folders() -> list[str]:
    """Where runs are looked for if nothing is said: `output`, as the configurations name it, else here."""
    return ["output"] if Path("output").is_dir() else ["."]


# ---- list ----


def list_as_json(records: Sequence[RunRecord]) -> str:
    return json.dumps([record.as_dict() for record in records], ensure_ascii=False)


def show_list(records: Sequence[RunRecord], folders: Sequence[str], console: Console) -> None:
    """Print two lines for each run: name, state, loss, time; and below them model, steps, held-out loss, duration."""
    if not records:
        console.print(
            translate(
                "no runs in: {folders}. A run is a folder with the run.json that firefly train writes; name other "
                "folders to search there.",
                folders=", ".join(folders),
            )
        )
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(translate("run"), overflow="fold", ratio=1)
    table.add_column(translate("state, steps"), no_wrap=True)
    table.add_column(translate("loss, eval"), no_wrap=True, justify="right")
    table.add_column(translate("started, took"), no_wrap=True)
    for record in records:
        table.add_row(
            two_lines(nearby(record.folder), f"  {describe_task(record)}", "bold"),
            two_lines(state_name(record.state), steps_of(record), STYLES[record.state]),
            two_lines(number(record.loss), number(record.eval_loss)),
            two_lines(moment(record.started), clock(record.seconds)),
        )
    console.print(table)


def two_lines(first: str, second: str, style: str = "") -> Text:
    return Text.assemble((first, style), "\n", (second, "dim"))


# ---- show ----


def show_as_json(record: RunRecord) -> str:
    """One object: what the list says of the run, and its files."""
    data = {name: value for name, value in record.data.items() if name != "findings"}
    value = record.as_dict() | {
        "changed": changed_keys(record.config),
        "passport": record.passport,
        "data": data,
        "results": finite_values(record.results),
        "curves": {
            name: [[step, finite(loss)] for step, loss in series(record.metrics, name).items()]
            for name in ("loss", "eval_loss")
        },
        "checkpoints": [{"step": step, "complete": complete} for step, complete in record.checkpoints],
    }
    return json.dumps(value, ensure_ascii=False)


def show_run(record: RunRecord, console: Console) -> None:
    """Print everything of a run that a person asks for."""
    passport = record.passport
    console.print(Text(nearby(record.folder), style="bold"))
    console.print(
        Text.assemble(
            (state_name(record.state), STYLES[record.state]),
            f"  {translate('step {steps}', steps=steps_of(record))}  {moment(record.started)}  {clock(record.seconds)}",
        )
    )
    console.print(describe_task(record))
    if record.error:
        code = record.error.get("code") or record.error.get("type")
        console.print(Text(f"{code}: {message_of(record.error)}", style="red"))
    if resumed := passport.get("resumed_from"):
        console.print(translate("resumed from {path}", path=resumed))
    section(console, translate("configuration, where it is not the default"), changed_keys(record.config))
    section(console, translate("chosen for this run"), mapping(passport.get("resolved")))
    show_data(record, console)
    show_curves(record, console)
    section(console, translate("results"), {k: readable(k, v) for k, v in record.results.items()})
    paragraph(console, translate("checkpoints"), checkpoint_names(record))
    notices = [message_of(mapping(item)) for item in passport.get("notices") or []]
    paragraph(console, translate("notes"), notices)
    paragraph(console, translate("versions and hardware"), environment(passport))


def message_of(recorded: Mapping[str, Any]) -> str:
    """A notice or an error of run.json in the reader's language; as the run wrote it, where it kept no phrase."""
    try:
        return str(Phrase.from_json(recorded))
    except (LookupError, TypeError, ValueError, AttributeError):
        return str(recorded.get("message"))


def changed_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a configuration that are not at Firefly's defaults, Firefly's own first.

    Of transformers' keys run.json holds only those that somebody set.
    """
    own = own_fields()
    defaults = {name: spec.default for name, (_, spec) in own.items()} | TRAINING_DEFAULTS
    return {name: value for name, value in config.items() if name not in defaults or not same(value, defaults[name])}


def same(value: Any, default: Any) -> bool:
    """Whether a value of JSON is that of a configuration: JSON has lists where a configuration has tuples."""
    return value == (list(default) if isinstance(default, tuple) else default)


def show_data(record: RunRecord, console: Console) -> None:
    data, passport = record.data, record.passport
    if not data:
        return
    counts = {name: data.get(name, "–") for name in ("file", "rows", "kept", "cut")}
    tokens, targets = data.get("tokens"), data.get("target_tokens")
    lost = ", ".join(f"{cause} {count}" for cause, count in mapping(data.get("lost")).items()) or "0"
    share = f"{targets / tokens:.0%}" if isinstance(targets, int) and isinstance(tokens, int) and tokens else "–"
    lines = [
        translate(
            "data: {file}: {rows} rows, {kept} kept, {cut} cut, lost: {lost}; {tokens} tokens, {share} trained",
            **counts,
            lost=lost,
            tokens=grouped(tokens),
            share=share,
        )
    ]
    if isinstance(data.get("train_examples"), int):
        trained, held_out = data["train_examples"], data.get("held_out_examples", 0)
        lines.append(
            translate("{trained:,} examples to train, {held_out:,} held out", trained=trained, held_out=held_out)
        )
    formats = ", ".join(f"{name} {count}" for name, count in mapping(data.get("formats")).items()) or "–"
    template = mapping(passport.get("template")).get("name") or "–"
    lines.append(
        translate(
            "format: {formats}; task {task}; template {template}",
            formats=formats,
            task=record.config.get("task_type", "–"),
            template=template,
        ),
    )
    paragraph(console, translate("data"), lines)


def show_curves(record: RunRecord, console: Console) -> None:
    curves = {name: series(record.metrics, name) for name in ("loss", "eval_loss", "rewards/margins")}
    width = max((len(name) for name, points in curves.items() if points), default=0)
    lines = [describe_curve(f"{name:{width}}", points) for name, points in curves.items() if points]
    paragraph(console, translate("loss"), lines)


def describe_curve(name: str, points: Mapping[int, float]) -> str:
    """A curve in one line: first value, its shape, last value, and where it is lowest."""
    values = list(points.values())
    shape = f"{name} {number(values[0])} {sparkline(values)} {number(values[-1])}"
    known = {step: value for step, value in points.items() if math.isfinite(value)}
    if len(known) < 2 or "loss" not in name:
        return shape
    lowest = min(known, key=known.__getitem__)
    return f"{shape}  {translate('lowest {value} at step {step}', value=number(known[lowest]), step=lowest)}"


def sparkline(values: Sequence[float], width: int = CURVE_WIDTH) -> str:
    """The shape of a curve in at most `width` characters, each the mean of its part; × where that is not finite."""
    count = min(width, len(values))
    borders = [round(part * len(values) / count) for part in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(borders)]
    known = [mean for mean in means if math.isfinite(mean)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] if math.isfinite(mean) else "×" for mean in means)


def checkpoint_names(record: RunRecord) -> list[str]:
    """One line that names the checkpoints by step; those that were interrupted while they were saved are marked."""
    names = [
        str(step) if complete else translate("{step} (incomplete)", step=step) for step, complete in record.checkpoints
    ]
    return [", ".join(names)] if names else []


def environment(passport: Mapping[str, Any]) -> list[str]:
    """Packages, then the machine, then the commits."""
    versions, machine = mapping(passport.get("versions")), mapping(passport.get("hardware"))
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    parts = [machine.get("gpu"), machine.get("cpu"), machine.get("cpu_capability"), machine.get("platform")]
    if isinstance(machine.get("memory_bytes"), int):
        parts.insert(2, size(machine["memory_bytes"]))
    ranks = passport.get("world_size")
    if isinstance(ranks, int):
        parts.append(translate("{count} rank(s)", count=ranks))
    commits = [
        f"{name} {passport[name]}" for name in ("firefly_commit", "git_commit") if isinstance(passport.get(name), str)
    ]
    return [line for line in (packages, ", ".join(str(part) for part in parts if part), *commits) if line]


def section(console: Console, title: str, values: Mapping[str, Any]) -> None:
    """A heading and a line for each value, if there is any."""
    if not values:
        return
    console.print()
    console.print(Text(title, style="bold"))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(Text(f"  {name}", style="dim"), Text(compact(value)))
    console.print(table)


def paragraph(console: Console, title: str, lines: Iterable[str]) -> None:
    """A heading and indented lines, if there are any."""
    lines = list(lines)
    if not lines:
        return
    console.print()
    console.print(Text(title, style="bold"))
    table = Table.grid()
    table.add_column(width=2)
    table.add_column(overflow="fold")
    for line in lines:
        table.add_row("", Text(line))
    console.print(table)


# ---- how values read ----


def state_name(state: str) -> str:
    names = {
        RUNNING: translate("running"),
        FINISHED: translate("finished"),
        INTERRUPTED: translate("interrupted"),
        FAILED: translate("failed"),
    }
    return names[state]


def describe_task(record: RunRecord) -> str:
    """`sft lora, MODEL`; a model that lies in a folder by that folder's name."""
    config = record.config
    model = Path(record.model).name if record.model else "–"
    return f"{config.get('task_type', '–')} {config.get('train_mode', '–')}, {model}"


def steps_of(record: RunRecord) -> str:
    return f"{record.steps}/{record.total_steps}" if record.total_steps else str(record.steps)


def nearby(folder: Path) -> str:
    """A path as one would type it here."""
    path = os.path.relpath(folder)
    return str(folder) if path.startswith("..") else path


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def grouped(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "–"


def size(value: float) -> str:
    """Bytes in GiB."""
    return f"{value / 2**30:.2f} GiB"


def clock(seconds: float | None) -> str:
    """h:mm:ss, with days before them."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours}:{minutes:02}:{rest:02}"


def moment(seconds: float | None) -> str:
    return "–" if seconds is None else datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def compact(value: Any) -> str:
    """A value as it would stand in a configuration; text without quotation marks."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a number of steps that passed through a float
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def readable(name: str, value: Any) -> str:
    """A result, by the unit that its name ends with."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return compact(value)
    if name.endswith("_bytes"):
        return size(value)
    if name == "train_runtime":
        return clock(value)
    if name.endswith("_per_second"):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
