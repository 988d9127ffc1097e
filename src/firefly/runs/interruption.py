"""Signals that ask a run to stop, and how it is taken up again."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from firefly.errors import FireflyError
from firefly.translation import translate

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""Ctrl-C; what schedulers send before they kill; what Slurm sends ahead of time (`--signal=USR1@60`)."""

ECHO_SECONDS = 5
"""Ctrl-C reaches the ranks from the terminal, and from torchrun again: within this time that is one request."""


class Interrupted(FireflyError):
    """A signal ended the run between two steps. The exit code is 128 + its number, as shells have it."""

    def __init__(self, code: str, text: str, number: int, /, **values: object) -> None:
        super().__init__(code, text, signal=signal.Signals(number).name, **values)
        self.exit_code = 128 + number


def is_interruption(error: BaseException) -> bool:
    """Whether an exception says that a signal ended something: its exit code begins at 128, as shells have it."""
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, FireflyError) and error.exit_code >= 128)


class Interruption:
    """Remembers the first signal that asks the run to stop; after it, signals end the process at once.

    Attributes:
        signal: its number; None as long as there was none.
    """

    def __init__(self, ranks: int = 1) -> None:
        self.signal: int | None = None
        self._since = 0.0
        self._echo = ECHO_SECONDS if ranks > 1 else 0
        self._process = os.getpid()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Take signals during a `with` block. Only the main thread receives them: in another one, nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {number: signal.signal(number, self._remember) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if time.monotonic() - self._since > self._echo:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.signal, self._since = number, time.monotonic()
        if not self._echo:  # the kernel's own way of ending a process works even where Python hangs in a library
            for other in SIGNALS:
                signal.signal(other, signal.SIG_DFL)
        # Data workers were forked with this handler. They go on serving the step that is computed, without a word.
        if os.getpid() == self._process:
            said = translate(
                "{signal}: the present step is finished and a checkpoint saved. Another signal ends the run at once.",
                signal=signal.Signals(number).name,
            )
            # Not print: the signal may have come in the middle of one.
            os.write(2, f"\n{translate('note:')} {said}\n".encode())


@contextmanager
def stopped_at_once() -> Iterator[None]:
    """Let the other signals end what is done inside as Ctrl-C does: at once, where there is nothing to save.

    A second one ends the process. Only the main thread receives signals: in another one, nothing changes.

    Raises:
        Interrupted: one of them came. Ctrl-C stays the exception that it is in Python.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        for other in before:
            signal.signal(other, signal.SIG_DFL)
        raise KeyboardInterrupt  # which no library takes for a failure of its own

    before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS if number != signal.SIGINT}
    try:
        for number in before:
            signal.signal(number, stop)
        yield
    except KeyboardInterrupt:
        if not came:
            raise
        raise Interrupted("interrupted.at_once", "stopped by {signal}.", came[0]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def resume_command(output_dir: Path) -> str:
    """The command that takes the run in `output_dir` up again, from the same folder and with as many processes."""
    file = str(output_dir / "train_args.json")
    again = ["--resume_from_checkpoint", "true"]
    ranks, nodes = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("GROUP_WORLD_SIZE", "1")
    if ranks is None:
        return shlex.join(["firefly", "train", file, *again])
    several = [] if nodes == "1" else ["--nnodes", nodes]
    launcher = ["torchrun", *several, "--nproc_per_node", ranks, sys.argv[0]]
    return shlex.join([*launcher, "--train_args_file", file, *again])
