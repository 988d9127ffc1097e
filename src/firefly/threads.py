"""How many threads compute on a CPU, and how they wait for each other."""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from firefly.console import notice
from firefly.control_groups import cpu_quota, pids_room
from firefly.ranks import local_world_size

# ---- how many ----

COUNT, OURS = "OMP_NUM_THREADS", "FIREFLY_CHOSE_THREADS"
"""How many threads, and beside it the same number where Firefly set it and nobody asked for it."""

COUNTS = (COUNT, "MKL_NUM_THREADS")
"""By either a user, or a launcher, has settled their number: torchrun sets one thread for each of several ranks."""


def settle_threads() -> None:
    """Say in the environment how many threads torch is to take, where it would take more by itself and nobody has said.

    It looks there when it is loaded: each entry calls this first, and where that is too late nothing changes. Nor does
    anything where the machine, or a launcher's variable, cannot be read: no command fails for it.
    """
    if "torch" in sys.modules or any(os.environ.get(name) for name in COUNTS):
        return
    try:
        count, cores = available_threads(), physical_cores()
    except (OSError, ValueError, ZeroDivisionError):
        return
    if count < cores:
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
        named = [name for name in COUNTS if os.environ.get(name)]
        notice(
            "resume.other_threads",
            "{today} CPU thread(s) compute, as {variable} says, and {stored} did before the checkpoint: sums are "
            "rounded in another way, so that the run goes on as well as it would have, but not to the bit.",
            today=today,
            variable=next((name for name in named if os.environ[name] == str(today)), named[0]),
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


# ---- how they wait ----

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""By these a user has settled how threads wait."""

INTERVAL = 0.5
"""Seconds between two looks at what threads waited for."""

CROWDED, CALM = 0.15, 0.05
"""Shares of the time that a thread waits for a core. On two cores it was 0.01 to 0.03 when idle, and 0.4 to 0.7 beside
a busy process, however threads wait for each other."""

CALM_FOR = 4
"""Intervals in a row after which threads spin again."""

OMP_PAUSE_SOFT = 1
"""OpenMP 5.0: what a paused thread holds is taken up again at its next parallel work."""

MOST_IDLE = 256
"""Threads that may do nothing: 64 take 1 MB and start within 10 ms."""

SPARE = 32
"""Threads that the machine must have left besides, for what else is to start there."""


@contextmanager
def wait_by_load() -> Iterator[None]:
    """Within the block, threads that have to wait for each other sleep at once while other processes want the cores,
    and spin while none does. The number of threads stays, and so does each result.

    A thread of GNU's OpenMP library (torch's, in its wheels for Linux) that waits for the others looks for them 300,000
    times before it sleeps, which takes 8 ms on a 2.6 GHz EPYC: the fastest on an idle machine. On a busy one it uses up
    the time that the kernel would give it at once when there is work, while the others wait for theirs: beside one busy
    process on two cores, training fell to 31 % of its rate. No fixed number of looks does for both.

    But while there are more threads than cores it looks 100 times only (GOMP_SPINCOUNT in libgomp's manual), by which a
    process can choose as it runs: `idle_team`.
    """
    own_words = any(os.environ.get(name) for name in WAITING) or os.environ.get(COUNT) == "1"
    if own_words or not Path("/proc/self/schedstat").is_file():
        yield
        return
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(ended,), name="firefly-waiting", daemon=True)
    try:
        watcher.start()
    except RuntimeError:  # no more threads may be started
        yield
        return
    try:
        yield
    finally:
        ended.set()
        watcher.join()


@dataclass
class Load:
    """Whether other processes want the cores, by what each look finds."""

    crowded: bool = False
    in_a_row: int = 0

    def look(self, waited: float) -> bool:
        """Take the largest share of the time that a thread waited for a core: two looks in a row begin a crowded time,
        and `CALM_FOR` end it."""
        against = waited < CALM if self.crowded else waited > CROWDED
        self.in_a_row = self.in_a_row + 1 if against else 0
        if self.in_a_row == (CALM_FOR if self.crowded else 2):
            self.crowded, self.in_a_row = not self.crowded, 0
        return self.crowded


def _watch(ended: threading.Event) -> None:
    with suppress(OSError, RuntimeError), ExitStack() as teams:  # of files or threads that may not be opened or started
        load, before, then = Load(), run_delays(), time.monotonic()
        sleeping = False
        while not ended.wait(INTERVAL):
            now, moment = run_delays(), time.monotonic()
            waited = max((now[thread] - before[thread] for thread in now.keys() & before.keys()), default=0.0)
            crowded = load.look(waited / (moment - then))
            before, then = now, moment
            if crowded and not sleeping and "torch" in sys.modules:
                teams.enter_context(idle_team())
            elif sleeping and not crowded:
                teams.close()
            sleeping = crowded and "torch" in sys.modules


def run_delays() -> dict[str, float]:
    """Seconds that each thread of this process was ready to run and had no core."""
    found = {}
    for folder in os.scandir("/proc/self/task"):
        try:
            with open(f"{folder.path}/schedstat", encoding="ascii") as file:
                found[folder.name] = int(file.read().split()[1]) / 1e9
        except OSError:  # it has ended
            continue
    return found


@contextmanager
def idle_team() -> Iterator[None]:
    """Within the block there are more OpenMP threads than cores: a thread of ours has a team that does nothing.

    In a container that may use the time of two cores of 64 those are 64 threads. There are none where so many might not
    be started: libgomp ends a process that cannot have a thread.
    """
    import torch  # waits for an import that is going on

    team, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    missing, libgomp = cores + 1 - team, gnu_openmp()
    pointless = team == 1 or missing <= 0
    if libgomp is None or pointless or missing > MOST_IDLE or missing + 1 + SPARE > thread_room():
        yield
        return
    ended = threading.Event()

    def idle() -> None:
        torch.get_num_threads()  # at a thread's first call torch gives it its number, and would later overwrite ours
        libgomp.omp_set_num_threads(missing + 1)  # of this thread alone
        torch.zeros(1 << 16, dtype=torch.float32, device="cpu").add_(1)  # enough for more than one thread
        ended.wait()

    member = threading.Thread(target=idle, daemon=True)
    member.start()
    try:
        yield
    finally:
        ended.set()
        member.join()


def thread_room() -> float:
    """How many threads this process may start at least, by its control groups and by its user's limit."""
    import resource  # Windows has none

    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:  # of which a stack takes 8 MB
        return 0
    groups, limit = pids_room(), resource.getrlimit(resource.RLIMIT_NPROC)[0]
    rooms = [math.inf if groups is None else groups]
    if limit != resource.RLIM_INFINITY:
        try:  # 0.20 0.18 0.12 RUNNING/THREADS LAST_PID; other users' threads and the kernel's are among them
            there = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[2])
        except (OSError, ValueError, IndexError):
            return 0
        rooms.append(limit - there)
    return min(rooms)


def gnu_openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch has loaded, if it is GNU's."""
    try:
        return ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except (OSError, AttributeError):  # another library, or a system that has no such modes
        return None


def release_team() -> None:
    """End the team of the thread that calls this; a new one is made when it next has work for it.

    A thread that loaded a model and then hands it to a generation thread keeps a team that does nothing: as many as the
    cores already, so that libgomp takes the machine for crowded and lets no thread spin. Tokens took 1.5 times as long.
    """
    with suppress(AttributeError):  # of one older than OpenMP 5.0
        if libgomp := gnu_openmp():
            libgomp.omp_pause_resource_all(OMP_PAUSE_SOFT)
