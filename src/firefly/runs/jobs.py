"""Commands that run on their own: started by a page or a queue, owned by nobody, their folder their only state.

A job's folder holds job.json (what is run), log.txt (what it says), and, written by the process that runs it,
started.json and ended.json. That process (`python -m firefly.runs.jobs FOLDER`) starts the command without a shell,
waits for it and writes down how it ended; whoever asked for the job may be gone by then.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from firefly.errors import UsageError
from firefly.files import atomic_file
from firefly.runs.records import FAILED, FINISHED, INTERRUPTED, RUNNING, message_of, read_object, record_in
from firefly.translation import chinese

WAITING = "waiting"
"""The state of a job that nothing has started yet. The others are a run's."""

NICENESS = 10
"""Jobs give way to whoever works on the machine: to the page that shows them first of all."""

KILLED = 128
"""Exit codes of commands that a signal ended begin here, as shells have it."""

CONFIG_FILE = "config.json"
"""What a job trains, in its folder: a copy, so that editing the file that it was made from changes nothing."""

LOG_BYTES = 64 << 10
"""As much of a log's end is read."""

ERRORS = ("error:", chinese()["error:"])
"""How the line begins that says why a command failed."""

FIREFLY = (sys.executable, "-m", "firefly")
"""The command line, whatever the path has."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is run.

    Attributes:
        folder: the job's own.
        kind: the verb: "train", "merge", …
        arguments: of `firefly`, the verb among them.
        cwd: where it runs; relative paths in a configuration are meant from there.
        output: the folder or file that it writes; "" if it writes none.
        queued: it waits for the queue, instead of having been started at once.
        created: seconds since the epoch.
    """

    folder: Path
    kind: str
    arguments: tuple[str, ...]
    cwd: str
    output: str = ""
    queued: bool = False
    created: float = 0.0

    @cached_property
    def started(self) -> dict[str, Any]:
        """pid and start of the process that runs the job, and of the command itself; empty before."""
        return read_object(self.folder / "started.json")

    @cached_property
    def ended(self) -> dict[str, Any]:
        """The command's exit code and the time; empty as long as it runs, or where its process was killed."""
        return read_object(self.folder / "ended.json")

    @property
    def state(self) -> str:
        """waiting, running, finished, interrupted (also: killed without a word) or failed."""
        if self.ended:
            code = self.ended.get("code")
            return FINISHED if code == 0 else INTERRUPTED if isinstance(code, int) and code >= KILLED else FAILED
        if not self.started:
            return WAITING
        alive = any(is_process(self.started.get(name)) for name in ("runner", "command"))
        return RUNNING if alive else INTERRUPTED

    @property
    def log(self) -> str:
        """The end of what the command said, without the redrawings of progress bars."""
        try:
            with (self.folder / "log.txt").open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(size - LOG_BYTES, 0))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        return "\n".join(line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n"))

    @property
    def seconds(self) -> float | None:
        """How long it took; None as long as it runs."""
        began, ended = self.started.get("time"), self.ended.get("time")
        return ended - began if began and ended else None

    def problem(self) -> str:
        """Why it failed: of a run what its run.json says, else the last error in the log, else its last line; "" of a
        job that did not."""
        if self.state not in (FAILED, INTERRUPTED):
            return ""
        record = record_in(Path(self.cwd, self.output)) if self.kind == "train" and self.output else None
        if record is not None and record.error and (record.started or 0) >= (self.started.get("time") or 0) - 1:
            return message_of(record.error)
        lines = [line for line in self.log.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(ERRORS)]
        return (errors or lines or [""])[-1]

    def as_dict(self) -> dict[str, Any]:
        """One element of what `firefly queue list --json` prints."""
        return {
            "id": self.folder.name,
            "kind": self.kind,
            "state": self.state,
            "arguments": list(self.arguments),
            "output": self.output,
            "queued": self.queued,
            "created": self.created,
            "started": self.started.get("time"),
            "ended": self.ended.get("time"),
            "exit_code": self.ended.get("code"),
            "problem": self.problem() or None,
            "log": str(self.folder / "log.txt"),
        }


def new_job(
    jobs: Path,
    arguments: Sequence[str],
    *,
    config: Mapping[str, Any] | None = None,
    name: str = "",
    output: str = "",
    cwd: str = "",
    queued: bool = False,
) -> Job:
    """Write down a job in a folder of its own below `jobs`; nothing is started yet.

    Args:
        arguments: of `firefly`, beginning with the verb.
        config: a configuration, which is written down beside the job and is the verb's first argument.
        name: part of the folder's name, for people.
    """
    moment = time.time()
    readable = re.sub(r"[^\w.-]+", "-", name or Path(output).name)[:40].strip("-.")
    # Names sort as jobs were made, also within a second.
    stamp = f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(moment))}-{int(moment * 10**6) % 10**6:06}"
    folder = jobs.absolute() / "-".join(filter(None, (stamp, arguments[0], readable, secrets.token_hex(2))))
    folder.mkdir(parents=True)
    if config is not None:
        _write(folder / CONFIG_FILE, config)
        arguments = [arguments[0], str(folder / CONFIG_FILE), *arguments[1:]]
    job = Job(
        folder=folder,
        kind=arguments[0],
        arguments=tuple(arguments),
        cwd=cwd or os.getcwd(),
        output=output,
        queued=queued,
        created=moment,
    )
    _write(folder / "job.json", {name: value for name, value in asdict(job).items() if name != "folder"})
    return job


def ask(
    arguments: Sequence[str], config: Mapping[str, Any] | None, *, cwd: Path, spoken: str, seconds: float
) -> tuple[Any, str]:
    """The value that a command prints with --json (None: it printed none), and what it said besides. It gives way to
    what trains.

    Args:
        config: a configuration, which becomes a file and the verb's first argument.
        spoken: the language of its messages.

    Raises:
        subprocess.TimeoutExpired: it took longer; it is ended.
    """
    with tempfile.TemporaryDirectory(prefix="firefly-") as folder:
        file = Path(folder, CONFIG_FILE)
        if config is not None:
            _write(file, config)
        command = subprocess.Popen(
            [*FIREFLY, arguments[0], *([] if config is None else [str(file)]), *arguments[1:], "--json"],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"FIREFLY_LANG": spoken, "PYTHONIOENCODING": "utf-8"},
        )
        _give_way(command.pid)
        try:
            out, said = command.communicate(timeout=seconds)
        except BaseException:
            command.kill()
            command.wait()
            raise
    text = said.decode("utf-8", "replace")
    try:
        return json.loads(out), text
    except ValueError:
        return None, text


def _give_way(process: int) -> None:
    with suppress(OSError):  # it may have ended
        os.setpriority(os.PRIO_PROCESS, process, max(NICENESS, os.nice(0)))


def read_job(folder: Path) -> Job | None:
    """The job of a folder; None where there is none that can be read."""
    found: dict[str, Any] = read_object(folder / "job.json")
    try:
        found["arguments"] = tuple(found["arguments"])
        return Job(folder=folder, **found)
    except (KeyError, TypeError):
        return None


def list_jobs(jobs: Path) -> list[Job]:
    """All jobs below a folder, the oldest first."""
    folders = sorted(path for path in jobs.glob("*") if path.is_dir()) if jobs.is_dir() else []
    return [job for job in map(read_job, folders) if job is not None]


def start(job: Job) -> None:
    """Run a job in a process of its own, which outlives this one, its terminal and its session."""
    _start([sys.executable, "-m", "firefly.runs.jobs", str(job.folder)], Path(job.cwd))


def start_queue(folder: Path, cwd: Path) -> None:
    """Run the jobs that wait in a process of its own; where one runs already, it ends, and that one runs them all."""
    _start([*FIREFLY, "queue", "run", "--folder", str(folder)], cwd)


def _start(command: list[str], cwd: Path) -> None:
    nowhere = subprocess.DEVNULL
    subprocess.Popen(command, cwd=cwd, stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True)


def run(job: Job) -> int:
    """Run a job here and return the command's exit code; 128 + its number, where a signal ended it.

    Signals that ask this process to stop are handed on to the command, which saves what it has, and take effect when
    it has ended.
    """
    with (job.folder / "log.txt").open("ab") as log:
        command = subprocess.Popen(
            [*FIREFLY, *job.arguments],
            cwd=job.cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal of a queue comes by way of this process, once
        )
    _give_way(command.pid)
    processes = {"runner": describe_process(os.getpid()), "command": describe_process(command.pid)}
    _write(job.folder / "started.json", processes | {"time": time.time()})
    came: list[int] = []

    def hand_on(number: int, frame: Any) -> None:
        came.append(number)
        command.terminate()

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = command.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = KILLED - code if code < 0 else code
    _write(job.folder / "ended.json", {"code": code, "time": time.time()})
    if came:
        signal.raise_signal(came[0])
    return code


def stop(job: Job) -> None:
    """Ask the command of a running job to stop, as Ctrl-C does: training saves a checkpoint first.

    Raises:
        UsageError: it does not run.
    """
    process = job.started.get("command") or {}
    if job.ended or not is_process(process):
        raise UsageError("jobs.not_running", "{job} does not run.", job=job.folder.name)
    with suppress(ProcessLookupError):
        os.kill(process["pid"], signal.SIGTERM)


def remove(job: Job) -> None:
    """Delete what is known of a job, not what it wrote.

    Raises:
        UsageError: it runs.
    """
    if job.state == RUNNING:
        raise UsageError("jobs.running", "{job} runs; stop it first.", job=job.folder.name)
    shutil.rmtree(job.folder, ignore_errors=True)


def describe_process(pid: int) -> dict[str, Any]:
    """A process, as `is_process` knows it again."""
    return {"pid": pid, "born": _born(pid)}


def is_process(described: Any) -> bool:
    """Whether a process that `describe_process` described is still there: the number alone may be another's by now."""
    if not isinstance(described, Mapping) or not isinstance(pid := described.get("pid"), int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _born(pid) == described.get("born")


def _born(pid: int) -> int | None:
    """When a process started, in ticks since the machine did; None where the system does not say, or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def _write(path: Path, value: Any) -> None:
    with atomic_file(path) as scratch:
        scratch.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main(folder: str) -> int:
    """Run the job of a folder, once."""
    job = read_job(Path(folder))
    return 2 if job is None or job.state != WAITING else run(job)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
