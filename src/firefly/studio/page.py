"""What all parts of the page share: handlers that speak the reader's language, and what survives a refresh."""

from __future__ import annotations

import functools
import inspect
import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from firefly.commands.runs import state_name
from firefly.config import ModelConfig
from firefly.errors import FireflyError
from firefly.models.saved_adapter import base_of_adapter
from firefly.runs import jobs
from firefly.runs.jobs import Job
from firefly.studio.roots import Roots
from firefly.translation import speaking, translate

ANSWER_SECONDS = 600
"""How long the page waits for a command that answers it, as a check of data does."""

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Of events that answer at once: nothing covers what they change, and no program calls them."""

JOB_LINES = 40
"""Lines of a log's end that the page shows."""

SAVE = """(...values) => {
  const text = JSON.stringify(values);
  for (const kept of [sessionStorage, localStorage]) kept.setItem(%s, text);
  return [];
}"""
RESTORE = """(...now) => {
  const key = %s, kept = JSON.parse(sessionStorage.getItem(key) ?? localStorage.getItem(key) ?? "null");
  return Array.isArray(kept) && kept.length === now.length ? kept : now;
}"""


@dataclass(frozen=True)
class Studio:
    """One page: what it may see, and its language."""

    roots: Roots
    spoken: str
    secret: str

    def handler(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """What Gradio calls for an event: an error of ours is shown as a message, in the page's language."""
        if inspect.isgeneratorfunction(work):

            @functools.wraps(work)
            def stream(*values: Any) -> Any:
                steps = work(*values)
                while True:
                    with speaking(self.spoken), _shown():
                        try:
                            step = next(steps)
                        except StopIteration:
                            return
                    yield step

            return stream

        @functools.wraps(work)
        def answer(*values: Any) -> Any:
            with speaking(self.spoken), _shown():
                return work(*values)

        return answer

    def remember(self, page: gr.Blocks, name: str, fields: Sequence[Any]) -> Any:
        """Keep what is typed into fields in the browser, so that a refresh loses nothing; returns the event that puts
        it back when the page is opened. All of it happens in the browser, with no way to here. Each of its pages keeps
        its own; a new one begins with what was typed last."""
        key = json.dumps(f"firefly-{name}-{self.spoken}")
        for field in fields:
            field.change(None, inputs=fields, js=SAVE % key, show_progress="hidden")
        return page.load(None, inputs=fields, outputs=fields, js=RESTORE % key, show_progress="hidden")

    def ask(self, arguments: Sequence[str], config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The value that a command of ours prints with --json, in the page's language; it gives way to what trains.

        Raises:
            gr.Error: it printed none, and says why.
        """
        try:
            value, said = jobs.ask(arguments, config, cwd=self.roots.first, spoken=self.spoken, seconds=ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            raise gr.Error(translate("no answer within {seconds} s.", seconds=ANSWER_SECONDS)) from None
        if value is None:
            lines = [line for line in said.splitlines() if line.strip()]
            raise gr.Error("\n".join(lines[-5:]), duration=None, print_exception=False)
        return value

    def base_of(self, folder: Path, given: str = "") -> ModelConfig:
        """The base that belongs to an adapter, or the one given; both have to lie where the page may read.

        Raises:
            UsageError: they do not, or there is none.
        """
        base = base_of_adapter(str(folder), ModelConfig(name_or_path=given))
        self.roots.check({"model_name_or_path": base.name_or_path})
        return base

    def begin(self, arguments: Sequence[str], **more: Any) -> Job:
        """Start a command that outlives the page."""
        job = jobs.new_job(self.roots.jobs, arguments, cwd=str(self.roots.first), **more)
        jobs.start(job)
        return job


@contextmanager
def _shown() -> Iterator[None]:
    """Turn errors of ours into messages on the page."""
    try:
        yield
    except FireflyError as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from None


def job_text(job: Job | None) -> str:
    """A job's state and the end of its log, as text."""
    if job is None:
        return ""
    lines = job.log.splitlines()[-JOB_LINES:]
    head = f"{job.kind}: {state_name(job.state)}"
    if problem := job.problem():
        head += f" ({problem})"
    return "\n".join([head, "", *lines])


def heading(text: str) -> None:
    gr.Markdown(f"### {text}")
