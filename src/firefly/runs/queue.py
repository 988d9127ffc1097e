"""Trainings that wait for each other: jobs of one folder, run one after the other by one process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from firefly.errors import UsageError
from firefly.files import Held, hold
from firefly.runs import jobs
from firefly.runs.jobs import WAITING, Job

LOCK_FILE = ".queue.lock"
"""Held by the process that runs the queue of a folder."""


def enqueue(folder: Path, config: Mapping[str, Any], *, name: str = "", cwd: str = "") -> Job:
    """Write down a training that waits.

    Args:
        config: that has been checked.
        name: of the job, for people.
    """
    output = str(config["output_dir"])
    return jobs.new_job(folder, ["train"], config=config, name=name, output=output, cwd=cwd, queued=True)


def run_queue(folder: Path) -> Iterator[Job]:
    """Run the jobs that wait, also those that are added meanwhile; yields each before it runs, and again as it ended.

    Raises:
        UsageError: the queue of this folder runs already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with hold(folder / LOCK_FILE):
            while job := next_waiting(folder):
                yield job
                jobs.run(job)
                yield jobs.read_job(job.folder) or job
    except Held as held:
        raise UsageError(
            "queue.runs_already",
            "the queue in {path} runs already (process {pid} on {host}, since {started}); what is added to it is "
            "trained there.",
            path=folder,
            pid=held.holder.pid,
            host=held.holder.host,
            started=held.holder.started,
        ) from None


def next_waiting(folder: Path) -> Job | None:
    return next((job for job in jobs.list_jobs(folder) if job.queued and job.state == WAITING), None)
