"""How many threads compute on a CPU."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from firefly.console import notice
from firefly.control_groups import cpu_quota
from firefly.ranks import local_world_size

COUNT, OURS = "OMP_NUM_THREADS", "FIREFLY_CHOSE_THREADS"
"""How many threads, and beside it the same number where Firefly set it and nobody asked for it."""

COUNTS = (COUNT, "MKL_NUM_THREADS")
"""By either a user, or a launcher, has settled their number: torchrun sets one thread for each of several ranks."""


def settle_threads() -> None:
    """Say in the environment how many threads torch is to take, where it would take more by itself and nobody has said.

    It looks there when it is loaded: each entry calls this first, and where that is too late nothing changes.
    """
    if "torch" in sys.modules or any(os.environ.get(name) for name in COUNTS):
        return
    count = available_threads()
    if count < physical_cores():
        os.environ[COUNT] = os.environ[OURS] = str(count)


def available_threads() -> int:
    """How many threads this process can run at once: its part of the cores, and of the time that its control groups may
    use of them (a container's `--cpus`), which torch knows nothing of."""
    cores, quota = physical_cores(), cpu_quota()
    if quota is not None:
        cores = min(cores, math.ceil(quota))
    return max(cores // local_world_size(), 1)


def physical_cores() -> int:
    """Cores that this process may run on, two threads of a core counted once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    found = set()
    for number in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        found.add(siblings.read_text() if siblings.is_file() else str(number))
    return len(found)


def chosen_by_user() -> bool:
    """Whether the environment that a user, or a launcher, made says how many threads compute."""
    named = [os.environ[name] for name in COUNTS if os.environ.get(name)]
    return bool(named) and named != [os.environ.get(OURS)]


@contextmanager
def threads_of_checkpoint(stored: int | None) -> Iterator[None]:
    """Compute with as many threads as the run did that is continued, whose number shapes how sums are rounded; but with
    as many as the environment says where it does, and a notice.

    Args:
        stored: None where nothing is continued, or no CPU computes.
    """
    import torch

    today = torch.get_num_threads()
    if stored in (None, today):
        yield
        return
    if chosen_by_user():
        notice(
            "resume.other_threads",
            "{today} CPU thread(s) compute, as {variable} says, and {stored} did before the checkpoint: sums are "
            "rounded in another way, so that the run goes on as well as it would have, but not to the bit.",
            today=today,
            variable=COUNT,
            stored=stored,
        )
        yield
        return
    if stored > available_threads():
        notice(
            "resume.many_threads",
            "{stored} CPU threads compute, as before the checkpoint, so that sums are rounded in the same way; this "
            "machine can run {available} at once and is slow with more. {variable}={available} takes so many, and the "
            "run goes on as well, but not to the bit.",
            stored=stored,
            available=available_threads(),
            variable=COUNT,
        )
    else:
        notice(
            "resume.threads",
            "{stored} CPU thread(s) compute, as before the checkpoint, and not {today}: their number changes how sums "
            "are rounded.",
            stored=stored,
            today=today,
        )
    torch.set_num_threads(stored)
    try:
        yield
    finally:
        torch.set_num_threads(today)
