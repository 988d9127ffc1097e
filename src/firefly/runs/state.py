"""Whether a run still runs, and how it ended, as far as its folder says.

run.json says "running" until the process that trains writes how it ended. One that was killed writes nothing: then the
age of its last sign of life tells.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RUNNING, FINISHED, INTERRUPTED, FAILED = "running", "finished", "interrupted", "failed"

HEARTBEAT_SECONDS = 30
"""How often a run touches its metrics.jsonl at least, between steps."""
SILENCE_SECONDS = 5 * 60
"""After so long without a sign of life a run counts as interrupted. A step, or the writing of a checkpoint, may take
longer than a heartbeat."""


def run_state(folder: Path, passport: Mapping[str, Any]) -> str:
    """One of RUNNING, FINISHED, INTERRUPTED, FAILED, for a run's folder and its run.json."""
    recorded = passport.get("state")
    if recorded in (FINISHED, INTERRUPTED, FAILED):
        return recorded
    return RUNNING if time.time() - last_sign(folder) < SILENCE_SECONDS else INTERRUPTED


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
