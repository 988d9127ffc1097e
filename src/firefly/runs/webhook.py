"""A notice to a URL when a run ends, however it ends: a small process beside the run sends it.

The run tells that process how it ended; where it dies without a word (killed, out of memory), the process sees its
parent gone and says so. It imports nothing heavy and computes nothing.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from firefly.console import notice
from firefly.files import first_line
from firefly.ranks import is_first
from firefly.runs.interruption import is_interruption
from firefly.runs.records import FAILED, FINISHED, INTERRUPTED, record_in
from firefly.translation import translate

DIED = "died"
"""What is told of a run that ended without a word."""

TRIES, PAUSE_SECONDS, TIMEOUT_SECONDS = 3, 2.0, 10.0
"""How often a notice is sent until the URL answers with a 2xx, the pause between, and how long an answer may take."""

LOOK_SECONDS = 1.0
"""How often the process beside the run looks whether the run is still there."""

WAIT_SECONDS = 15.0
"""How long a run that has ended waits for its notice to be sent: it may be the first process of a container, which ends
with it."""


@contextmanager
def told_of_end(url: str | None, output_dir: Path) -> Iterator[None]:
    """Send a notice to `url` (None: nowhere) when what is done inside ends, fails, is interrupted, or dies.

    An exception goes on as it came. The first rank tells.
    """
    if not url or not is_first():
        yield
        return
    # In a session of its own: Ctrl-C, which a terminal sends to all, is the run's to take.
    watcher = subprocess.Popen(
        [sys.executable, "-m", "firefly.runs.webhook", url, str(output_dir.absolute()), str(os.getpid())],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    end: dict[str, Any] = {"event": FINISHED}
    try:
        yield
    except BaseException as error:
        end = {"event": INTERRUPTED if is_interruption(error) else FAILED, "message": first_line(error)}
        raise
    finally:
        _hand_over(watcher, end)


def _hand_over(watcher: subprocess.Popen[str], end: dict[str, Any]) -> None:
    """Tell the process beside the run how it ended, and say if the URL does not take the notice."""
    try:
        _, problem = watcher.communicate(json.dumps(end) + "\n", timeout=WAIT_SECONDS)
    except subprocess.TimeoutExpired:
        return  # it goes on trying
    except OSError as error:
        problem = first_line(error)
    if watcher.returncode:
        lines = problem.strip().splitlines()
        notice(
            "webhook.failed",
            "the webhook did not take the notice of the run's end: {problem}.",
            problem=lines[-1] if lines else f"exit {watcher.returncode}",
        )


# ---- the process beside the run ----


def main(url: str, output_dir: str, run: int) -> int:
    """Wait for the end of the run, a process of this number, and send the notice; return the exit code."""
    told = wait_for_end(run)
    try:
        send(url, describe_end(Path(output_dir), told))
    except (OSError, ValueError) as error:
        print(first_line(error), file=sys.stderr)
        return 1
    return 0


def wait_for_end(run: int) -> dict[str, Any]:
    """What the run says on standard input of its end; `died` if it goes without a word.

    Workers that the run forked hold the other end of the pipe, too, and may outlive it: so the parent is looked at.
    """
    while os.getppid() == run:
        if select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:
            break
    ready = select.select([sys.stdin], [], [], 0)[0]  # it may have spoken and gone at once
    with suppress(ValueError):
        return json.loads(sys.stdin.readline()) if ready else {"event": DIED}
    return {"event": DIED}


def describe_end(output_dir: Path, told: dict[str, Any]) -> dict[str, Any]:
    """The notice: what the run said, what its folder says, and both in a sentence (`text`, which chats show)."""
    record = record_in(output_dir)
    found = {} if record is None else record.as_dict()
    event, message = told["event"], told.get("message") or ""
    said = {
        FINISHED: translate("{path}: the run is finished.", path=output_dir),
        INTERRUPTED: translate("{path}: the run was stopped.", path=output_dir),
        FAILED: translate("{path}: the run failed: {problem}", path=output_dir, problem=message),
        DIED: translate("{path}: the run died: its process is gone without a word.", path=output_dir),
    }
    return found | {
        "event": event,
        "text": said[event],
        "message": message or None,
        "path": str(output_dir),
        "host": socket.gethostname(),
        "time": time.time(),
    }


def send(url: str, notice: dict[str, Any]) -> None:
    """POST a notice as JSON, again if it is not taken.

    Raises:
        OSError: the URL did not take it, or did not answer.
    """
    body = json.dumps(notice, ensure_ascii=False).encode()
    for last in (*[False] * (TRIES - 1), True):
        request = urllib.request.Request(url, body, {"Content-Type": "application/json", "User-Agent": "firefly"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
                return
        except OSError:  # urllib's errors are such
            if last:
                raise
            time.sleep(PAUSE_SECONDS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
