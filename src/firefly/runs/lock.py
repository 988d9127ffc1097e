"""One run at a time writes into an output folder."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from firefly.errors import UsageError
from firefly.files import Held, hold
from firefly.ranks import is_first

LOCK_FILE = ".firefly.lock"


@contextmanager
def only_run(output_dir: Path) -> Iterator[None]:
    """Keep other runs out of `output_dir` (which exists) during a `with` block. Rank 0 holds the lock for all ranks.

    Raises:
        UsageError: another run is in there; names its process, host and start.
    """
    with ExitStack() as stack:
        if is_first():
            try:
                stack.enter_context(hold(output_dir / LOCK_FILE))
            except Held as held:
                who = held.holder
                raise UsageError(
                    "run.locked",
                    "output_dir = {path} is in use by another run (process {pid} on {host}, started {started}). Wait "
                    "for it, stop it, or choose another output_dir.",
                    path=output_dir,
                    pid=who.pid,
                    host=who.host,
                    started=who.started,
                ) from None
        yield


def stop_run(output_dir: Path) -> None:
    """Ask the run in a folder to stop, as SIGTERM does: it finishes its step and saves a checkpoint.

    Raises:
        UsageError: no run is in there, or it is another machine's.
    """
    try:
        with hold(output_dir / LOCK_FILE):
            pass
    except Held as held:
        who = held.holder
        if isinstance(who.pid, int) and who.host == socket.gethostname():
            os.kill(who.pid, signal.SIGTERM)
            return
        raise UsageError(
            "runs.elsewhere",
            "the run in {path} is process {pid} on {host}; stop it there.",
            path=output_dir,
            pid=who.pid,
            host=who.host,
        ) from None
    raise UsageError("runs.not_running", "no run is in {path} at this time.", path=output_dir)
