"""Whether a run still runs, and how it ended, as far as its folder says so honestly.

run.json names the process that trains and says "running" until that process writes how it ended. One that was killed
writes nothing: then only that it lives no more tells.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RUNNING, FINISHED, INTERRUPTED, FAILED = "running", "finished", "interrupted", "failed"

HEARTBEAT_SECONDS = 30
"""How often a run touches its metrics.jsonl at least, between steps."""
SILENCE_SECONDS = 15 * 60
"""After so long without a sign of life, a run on another machine counts as interrupted."""


def this_process() -> dict[str, Any]:
    """What tells this process from every other: host, namespace of its number, number, and when it began."""
    pid = os.getpid()
    return {"host": platform.node(), "namespace": _namespace(), "pid": pid, "began": _began(pid)}


def lives(process: Mapping[str, Any]) -> bool | None:
    """Whether a process (as `this_process` described it) still runs; None if that cannot be asked from here."""
    here = (platform.node(), _namespace())
    pid = process.get("pid")
    if os.name != "posix" or (process.get("host"), process.get("namespace")) != here or not isinstance(pid, int):
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's, and alive
    return process.get("began") == _began(pid)  # otherwise a later process was given the same number


def run_state(folder: Path, passport: Mapping[str, Any]) -> str:
    """One of RUNNING, FINISHED, INTERRUPTED, FAILED, for a run's folder and its run.json."""
    recorded = passport.get("state")
    if recorded in (FINISHED, INTERRUPTED, FAILED):
        return recorded
    if recorded is None and has_newer_results(folder):  # run.json of a version that did not record states
        return FINISHED
    process = passport.get("process")
    alive = lives(process) if isinstance(process, dict) else None
    if alive is None:
        alive = time.time() - last_sign(folder) < SILENCE_SECONDS
    return RUNNING if alive else INTERRUPTED


def last_sign(folder: Path) -> float:
    """When a run last wrote something (seconds since the epoch); 0 if nothing can be read."""
    times = [time_of(folder / name) for name in ("metrics.jsonl", "run.json")]
    return max((moment for moment in times if moment is not None), default=0.0)


def time_of(path: Path) -> float | None:
    """When a file was last written, seconds since the epoch; None if it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def has_newer_results(folder: Path) -> bool:
    """Whether train_results.json was written after run.json, and so by the same run."""
    results, passport = time_of(folder / "train_results.json"), time_of(folder / "run.json")
    return results is not None and passport is not None and results >= passport


def _namespace() -> str | None:
    """Containers of one host name may count their processes apart."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _began(pid: int) -> int | None:
    """When a process began, in clock ticks since the machine started (Linux; None elsewhere)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return int(fields[19])  # field 22 of proc(5); the name in brackets may hold anything
    except (OSError, ValueError, IndexError):
        return None
