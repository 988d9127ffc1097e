"""Whole runs as real processes, without waiting for the libraries each time.

A server process has them imported and forks a child for each run; a child can be made to receive a signal, or be
killed, at a chosen moment.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import firefly

Run = Callable[..., Path]
"""Training in the process of the test itself: (name of the output folder, changes to the settings) → the folder."""

POINTS = {
    "prepare": ("firefly.data.dataset", "prepare"),
    "load": ("firefly.setup.build", "load_for_training"),
    "step": ("firefly.tasks.base", "Task.backward"),
    "save": ("firefly.loop", "save_checkpoint"),
    "result": ("firefly.training", "save_result"),
}
"""Functions at whose beginning something can happen."""


@dataclass(frozen=True)
class Trap:
    """What happens at the `count`-th call of a function of POINTS.

    Attributes:
        signals: sent to the process, one after another, before the function runs.
        killed_after: seconds until the process is killed, from outside; None: it is not.
    """

    point: str
    count: int = 1
    signals: tuple[int, ...] = ()
    killed_after: float | None = None


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code (negative: the signal that it died of) and what it said."""

    code: int
    said: str


@dataclass(frozen=True)
class Job:
    arguments: list[str]
    output: str
    environment: dict[str, str]
    trap: dict[str, Any] | None = field(default=None)


class Server:
    """The near end of the server process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = 0
        paths = [str(Path(firefly.__file__).parents[1]), str(Path(__file__).parents[1])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        environment["FORKING_IMPORTED"] = str(folder / "imported")
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def run(self, *arguments: str, trap: Trap | None = None, **environment: str) -> Ended:
        """`firefly ARGUMENTS` in a process of its own, to its end."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.number += 1
        output = self.folder / f"output-{self.number}"
        job = Job([*arguments], str(output), environment, None if trap is None else asdict(trap))
        self.process.stdin.write(json.dumps(asdict(job)) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        return Ended(code, output.read_text(encoding="utf-8", errors="replace"))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


# ---- the far end ----


def serve() -> None:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import firefly.training  # noqa: F401

    get_checkpoint_conversion_mapping("llama")  # compiles some hundred expressions, once
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        import_more()
        job = Job(**json.loads(line))
        armed, arm = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(armed)
            run_child(job, arm)
        os.close(arm)
        if os.read(armed, 1):  # nothing: the child has ended
            assert job.trap is not None
            time.sleep(job.trap["killed_after"])
            os.kill(child, signal.SIGKILL)
        os.close(armed)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


IMPORTED = Path(os.environ.get("FORKING_IMPORTED", "imported"))
"""What a child had to import, so that those after it need not."""


def import_more() -> None:
    if IMPORTED.is_file():
        for name in IMPORTED.read_text().splitlines():
            with suppress(Exception):  # some can be imported by their parents alone
                importlib.import_module(name)
        IMPORTED.unlink()


def run_child(job: Job, arm: int) -> None:
    """Run the program as its console script would, and leave."""
    code, before = 1, set(sys.modules)
    try:
        output = os.open(job.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.environ.update(job.environment)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        import firefly.runs.metrics
        from firefly.cli import main

        firefly.runs.plots.draw_loss = lambda *_: None  # takes longer than the training
        if job.trap is not None:
            set_trap(Trap(**job.trap), arm)
        code = main(job.arguments)
        IMPORTED.write_text("\n".join(sorted(set(sys.modules) - before)))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def set_trap(trap: Trap, arm: int) -> None:
    module, path = POINTS[trap.point]
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), [0]

    def trapped(*arguments: Any, **values: Any) -> Any:
        calls[0] += 1
        if calls[0] == trap.count:
            for number in trap.signals:
                os.kill(os.getpid(), number)
            if trap.killed_after is not None:
                os.write(arm, b"!")
        return original(*arguments, **values)

    setattr(owner, name, trapped)


if __name__ == "__main__":
    serve()
