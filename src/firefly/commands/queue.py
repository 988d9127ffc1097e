"""`firefly queue`: configurations that are trained one after the other, overnight, whoever is there.

Nothing heavy is imported but for `add`, which checks what is to run.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from firefly.commands.options import JsonOption, imports_without_gc
from firefly.commands.runs import STYLES, clock, moment, state_name
from firefly.console import print_json, stderr_console, stdout_console
from firefly.errors import UsageError, VerificationError
from firefly.runs import jobs
from firefly.runs.jobs import WAITING
from firefly.runs.queue import enqueue, run_queue
from firefly.runs.records import FINISHED, RUNNING
from firefly.translation import translate

app = typer.Typer(add_completion=False, no_args_is_help=True)

FolderOption = Annotated[str, typer.Option("--folder", help="Where the jobs are written down, with their logs.")]
DEFAULT_FOLDER = ".firefly/jobs"


@app.command("add")
def add_command(
    configs: Annotated[list[str], typer.Argument(help="JSON or YAML files, in the order of their training.")],
    folder: FolderOption = DEFAULT_FOLDER,
) -> None:
    """Put configurations at the queue's end. Each is checked and copied: changing its file later changes nothing."""
    with imports_without_gc():
        from firefly.config import load_config
        from firefly.config.loading import read_config_file
    found = {config: read_config_file(Path(config)) for config in configs}
    for values in found.values():  # all, before any is added
        load_config(values)
    for config, values in found.items():
        print(enqueue(Path(folder), values, name=Path(config).stem).folder.name)


@app.command("run")
def run_command(folder: FolderOption = DEFAULT_FOLDER) -> None:
    """Train what waits, one after the other, until nothing waits. Exit 3 if one failed; those behind it run all the
    same. Ctrl-C stops the one that runs, which saves a checkpoint, and leaves the others waiting."""
    show, failed = partial(stderr_console().print, soft_wrap=True), []  # paths stay whole
    for job in run_queue(Path(folder)):
        if job.state == WAITING:
            show(translate("{job} begins; its log: {path}", job=job.folder.name, path=job.folder / "log.txt"))
        elif job.state == FINISHED:
            show(translate("{job} is finished.", job=job.folder.name))
        else:
            failed.append(job)
            show(f"{job.folder.name}: {state_name(job.state)}: {job.problem()}")
    if failed:
        raise VerificationError(
            "queue.failed",
            "{count} of the queue did not finish: {jobs}. `firefly queue list` says why.",
            count=len(failed),
            jobs=", ".join(job.folder.name for job in failed),
        )


@app.command("list")
def list_command(folder: FolderOption = DEFAULT_FOLDER, as_json: JsonOption = False) -> None:
    """What waits, runs and ran: state, duration, and why one failed."""
    found = jobs.list_jobs(Path(folder))
    if as_json:
        print_json(json.dumps([job.as_dict() for job in found], ensure_ascii=False))
        return
    if not found:
        print(translate("nothing is queued in {path}: add configurations with `firefly queue add`.", path=folder))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(translate("job"), overflow="fold", ratio=1)
    table.add_column(translate("state"), no_wrap=True)
    table.add_column(translate("started"), no_wrap=True)
    table.add_column(translate("took"), no_wrap=True, justify="right")
    table.add_column(translate("writes"), overflow="fold", ratio=1)
    for job in found:
        state = Text(state_name(job.state), STYLES[job.state])
        began = moment(job.started.get("time"), "%m-%d %H:%M")
        table.add_row(job.folder.name, state, began, clock(job.seconds), job.output)
    stdout_console().print(table)
    for job in found:
        if problem := job.problem():
            stdout_console().print(Text(f"{job.folder.name}: {problem}", style=STYLES[job.state]), soft_wrap=True)


@app.command("stop")
def stop_command(folder: FolderOption = DEFAULT_FOLDER) -> None:
    """Stop the job that runs: it saves a checkpoint. The others go on waiting."""
    running = [job for job in jobs.list_jobs(Path(folder)) if job.queued and job.state == RUNNING]
    if not running:
        raise UsageError("queue.none_running", "no job of the queue in {path} runs.", path=folder)
    for job in running:
        jobs.stop(job)


@app.command("remove")
def remove_command(
    names: Annotated[list[str], typer.Argument(help="Jobs, as `firefly queue list` names them.")],
    folder: FolderOption = DEFAULT_FOLDER,
) -> None:
    """Take jobs out of the list, with their logs. What they trained stays."""
    found = {job.folder.name: job for job in jobs.list_jobs(Path(folder))}
    if unknown := [name for name in names if name not in found]:
        raise UsageError("queue.unknown", "there is no job {job} in {path}.", job=", ".join(unknown), path=folder)
    for name in names:
        jobs.remove(found[name])
