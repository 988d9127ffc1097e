"""Run one side of a benchmark in a fresh process and read its result line."""

import json
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Result = dict[str, Any]
SOURCES = Path(__file__).resolve().parents[1] / "src"


class SideFailed(RuntimeError):
    """A side ended without a result; the message carries the end of what it printed."""


class SideStopped(RuntimeError):
    """A side was stopped at its time limit."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """A program with the Python it runs in and the arguments common to all its runs."""

    name: str
    python: str
    program: Path
    arguments: Sequence[str]
    threads: int

    def run(self, tuning: "Tuning", *, timeout_seconds: float | None = None) -> Result:
        """Run once and return the parsed line, with the load average before the start and the seconds it all took."""
        load_before, start = os.getloadavg()[0], time.monotonic()
        command = [self.python, str(self.program), *self.arguments, *shlex.split(tuning.arguments)]
        with tempfile.TemporaryFile("w+") as log:
            try:
                done = subprocess.run(
                    command,
                    env=environment(self.threads) | tuning.environment,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    timeout=timeout_seconds,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise SideStopped(f"stopped after {timeout_seconds:.0f} s") from error
            log.seek(0)
            end_of_log = log.read()[-4000:]
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            raise SideFailed(f"{Path(command[1]).name} ended with {done.returncode}:\n{end_of_log}")
        return json.loads(lines[-1]) | {
            "load_average_before": load_before,
            "process_seconds": time.monotonic() - start,
        }


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """One way to run a side: what its user would type, and export, to have it so."""

    name: str
    arguments: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def environment(threads: int) -> dict[str, str]:
    """Make the environment of every run: as many threads on all sides, no network, and Firefly's code as it is here."""
    found = os.environ.get("PYTHONPATH")  # where packages were installed beside Python's own
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(SOURCES), *([found] if found else [])]),
    }
