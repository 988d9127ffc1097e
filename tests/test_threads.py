"""Threads are as many as a container may use and sleep while others want the cores, and a run keeps their number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import firefly
from firefly import threads
from firefly.console import take_notices
from firefly.control_groups import cpu_quota, pids_room
from firefly.threads import COUNT, OURS, WAITING, Load, settle_threads, threads_of_checkpoint, wait_by_load

VARIABLES = (*WAITING, *threads.COUNTS, OURS, "LOCAL_WORLD_SIZE")
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def outcome(code: str, **given: str) -> Any:
    """What a fresh process prints as JSON, in an environment where nothing is settled but what is given."""
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    clean["PYTHONPATH"] = str(Path(firefly.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], env=clean | given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment in which nothing is settled, of a process without torch."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what is set meanwhile is taken back
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(threads, "physical_cores", lambda: 8)
    monkeypatch.setattr(threads, "cpu_quota", lambda: None)
    return monkeypatch


def settled() -> dict[str, str]:
    settle_threads()
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


# ---- how many ----


def test_without_a_quota_torch_chooses(unset: pytest.MonkeyPatch) -> None:
    unset.setenv("LOCAL_WORLD_SIZE", "1")
    assert settled() == {"LOCAL_WORLD_SIZE": "1"}
    assert not threads.chosen_by_user()


@pytest.mark.parametrize(
    ("quota", "ranks", "count"), [(2.5, 1, 3), (0.3, 1, 1), (6.0, 2, 3), (None, 4, 2), (4.0, 8, 1)]
)
def test_threads_are_this_processs_part_of_the_cores(
    quota: float | None, ranks: int, count: int, unset: pytest.MonkeyPatch
) -> None:
    unset.setattr(threads, "cpu_quota", lambda: quota)
    unset.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert settled()[COUNT] == str(count)
    assert not threads.chosen_by_user()


@LINUX
def test_a_command_settles_it_before_torch_is_loaded() -> None:
    code = (
        "import json, os, sys; from firefly import threads; from firefly.cli import main\n"
        "threads.cpu_quota = lambda: 0.5; threads.physical_cores = lambda: 2\n"
        "main(['--version']); early = 'torch' not in sys.modules; import torch\n"
        f"print(json.dumps([early, os.environ.get({COUNT!r}), torch.get_num_threads()]))"
    )
    assert outcome(code) == [True, "1", 1]


@LINUX
def test_a_program_that_loaded_torch_before_is_left_as_it_is() -> None:
    code = (
        "import json, os, torch; from firefly import threads; from firefly.cli import main\n"
        "threads.cpu_quota = lambda: 0.5; threads.physical_cores = lambda: 2; before = torch.get_num_threads()\n"
        "main(['--version']); "
        f"print(json.dumps([os.environ.get({COUNT!r}), torch.get_num_threads() == before]))"
    )
    assert outcome(code) == [None, True]


@pytest.mark.parametrize("name", threads.COUNTS)
def test_a_number_that_somebody_asked_for_stands(name: str, unset: pytest.MonkeyPatch) -> None:
    unset.setattr(threads, "cpu_quota", lambda: 2.0)
    unset.setenv(name, "5")
    assert {variable: settled().get(variable) for variable in (name, OURS)} == {name: "5", OURS: None}
    assert threads.chosen_by_user()


@LINUX
def test_a_process_has_as_many_cores_as_it_may_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.sched_getaffinity(0)
    assert 1 <= threads.physical_cores() <= len(allowed)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {min(allowed)})
    assert threads.physical_cores() == 1


# ---- control groups ----

V2 = ("0::{group}", "30 24 0:26 {root} {mount} rw,nosuid - cgroup2 cgroup2 rw")
V1 = ("4:cpu,cpuacct:{group}", "36 24 0:33 {root} {mount} rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct")


def process_in(folder: Path, version: tuple[str, str], group: str, root: str, quotas: dict[str, int | None]) -> Path:
    """/proc/self of a process in a control group; for each level its quota, in microseconds of every 50,000."""
    line, mounted = version
    mount = folder / "cgroup"
    for level, quota in quotas.items():
        (mount / level).mkdir(parents=True, exist_ok=True)
        if version is V2:
            (mount / level / "cpu.max").write_text(f"{'max' if quota is None else quota} 50000\n")
        else:
            (mount / level / "cpu.cfs_quota_us").write_text(f"{-1 if quota is None else quota}\n")
            (mount / level / "cpu.cfs_period_us").write_text("50000\n")
    process = folder / "self"
    process.mkdir()
    (process / "cgroup").write_text(f"3:memory:/elsewhere\n{line.format(group=group)}\n")
    (process / "mountinfo").write_text(mounted.format(root=root, mount=mount) + "\n")
    return process


@pytest.mark.parametrize("version", [V1, V2], ids=["v1", "v2"])
def test_the_tightest_level_of_control_groups_limits_a_process(version: tuple[str, str], tmp_path: Path) -> None:
    quotas = {"pod/box": None, "pod": 75_000, ".": 200_000}
    assert cpu_quota(process_in(tmp_path, version, "/pod/box", "/", quotas)) == 1.5


@pytest.mark.parametrize("version", [V1, V2], ids=["v1", "v2"])
def test_a_container_that_sees_the_hosts_path_has_its_quota_at_the_mount(
    version: tuple[str, str], tmp_path: Path
) -> None:
    assert cpu_quota(process_in(tmp_path, version, "/docker/abc", "/docker/abc", {".": 400_000})) == 8


@pytest.mark.parametrize("version", [V1, V2], ids=["v1", "v2"])
def test_without_a_quota_nothing_limits_a_process(version: tuple[str, str], tmp_path: Path) -> None:
    assert cpu_quota(process_in(tmp_path, version, "/pod", "/", {"pod": None})) is None
    assert cpu_quota(tmp_path / "no-linux") is None


ODD_MOUNTS = (
    b"31 24 0:27 / /no-source rw - tmpfs  rw",
    b"32 24 0:28 / /latin-\xe9 rw - ext4 /dev/sdb rw",
    b"33 24 0:29 / /carriage\rreturn\x0c rw - ext4 /dev/sdc rw",
    b"34 24",
    b"",
)


@pytest.mark.parametrize("odd", ODD_MOUNTS)
@pytest.mark.parametrize("version", [V1, V2], ids=["v1", "v2"])
def test_an_odd_mount_hides_no_quota(version: tuple[str, str], odd: bytes, tmp_path: Path) -> None:
    process = process_in(tmp_path, version, "/pod", "/", {"pod": 75_000})
    mounts = (process / "mountinfo").read_bytes()
    (process / "mountinfo").write_bytes(odd + b"\n" + mounts)
    assert cpu_quota(process) == 1.5


@pytest.mark.parametrize("written", [b"", b"75000\n", b"75000 0\n", b"a b\n", b"1 2 3\n", b"\xff 1\n"])
def test_a_quota_that_cannot_be_read_is_none(written: bytes, tmp_path: Path) -> None:
    process = process_in(tmp_path, V2, "/pod", "/", {"pod": 75_000, ".": 200_000})
    (tmp_path / "cgroup/pod/cpu.max").write_bytes(written)
    assert cpu_quota(process) == 4


@pytest.mark.parametrize("ranks", ["", "0", "two"])
def test_no_command_fails_where_the_number_of_threads_cannot_be_settled(ranks: str, unset: pytest.MonkeyPatch) -> None:
    unset.setenv("LOCAL_WORLD_SIZE", ranks)
    assert settled() == {"LOCAL_WORLD_SIZE": ranks}


# ---- a run that goes on ----


@pytest.fixture
def two_today(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A process of two threads on a machine of four cores, where nobody said how many."""
    before = torch.get_num_threads()
    for name in threads.COUNTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "available_threads", lambda: 4)
    torch.set_num_threads(2)
    take_notices()
    yield monkeypatch
    torch.set_num_threads(before)


def told() -> list[str]:
    return [one["code"] for one in take_notices()]


@pytest.mark.parametrize(
    ("stored", "codes"),
    [(None, []), (2, []), (1, ["resume.threads"]), (3, ["resume.threads"]), (5, ["resume.many_threads"])],
)
def test_a_run_goes_on_with_its_number_of_threads(stored: int | None, codes: list[str], two_today: Any) -> None:
    with threads_of_checkpoint(stored):
        assert torch.get_num_threads() == (stored or 2)
    assert torch.get_num_threads() == 2
    assert told() == codes


def test_a_number_in_the_environment_overrules_the_checkpoints(two_today: Any) -> None:
    two_today.setenv(COUNT, "2")
    with threads_of_checkpoint(3):
        assert torch.get_num_threads() == 2
    assert told() == ["resume.other_threads"]
    two_today.setenv(OURS, "2")  # it was Firefly that wrote it there
    with threads_of_checkpoint(3):
        assert torch.get_num_threads() == 3
    assert told() == ["resume.threads"]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"OMP_NUM_THREADS": "2"}, "OMP_NUM_THREADS"),
        ({"MKL_NUM_THREADS": "2"}, "MKL_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "2"}, "MKL_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "4,2"}, "OMP_NUM_THREADS"),
    ],
)
def test_the_notice_names_the_variable_that_was_set(given: dict[str, str], named: str, two_today: Any) -> None:
    for name, value in given.items():
        two_today.setenv(name, value)
    with threads_of_checkpoint(3):
        pass
    (one,) = take_notices()
    assert [name for name in threads.COUNTS if name in one["message"]] == [named]


# ---- how they wait ----

SLEEPS = """
import json, os, threading, time, torch
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from firefly.threads import idle_team, release_team

def tasks():
    return len(os.listdir("/proc/self/task"))

def slept():
    found = {}
    for thread in os.listdir("/proc/self/task"):
        if int(thread) not in (os.getpid(), threading.get_native_id()):
            lines = open(f"/proc/self/task/{thread}/status").read().splitlines()
            found[thread] = next(int(line.split()[1]) for line in lines if line.startswith("voluntary"))
    return found

def regions(within, there=None):
    numbers = torch.zeros(1 << 17)
    with within:
        numbers.add_(1)
        ends = time.monotonic() + 20
        while there not in (None, tasks()) and time.monotonic() < ends:
            time.sleep(0.001)
        numbers.add_(1)
        time.sleep(0.1)
        before = slept()
        for _ in range(50):
            numbers.add_(1)
            time.sleep(0.001)
        after = slept()
    return max(after[thread] - before[thread] for thread in before)

def in_a_thread():
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(regions, nullcontext()).result()

libgomp = "libgomp" in open("/proc/self/maps").read()
torch.zeros(1 << 17).add_(1)
alone = tasks()
"""


def slept(calls: str) -> list[int]:
    """How often a thread went to sleep in 50 waits of a millisecond, of each call, with as many threads as cores.

    A thread that spins looks for work for seconds here, so that none goes to sleep while a neighbour has its core.
    """
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        pytest.skip("one core has no threads that wait for each other")
    settings = {"OMP_NUM_THREADS": str(cores), "GOMP_SPINCOUNT": "200000000"}
    libgomp, *found = outcome(f"{SLEEPS}print(json.dumps([libgomp, {calls}]))", **settings)
    if not libgomp:
        pytest.skip("torch comes with another OpenMP library")
    return found


@LINUX
def test_threads_sleep_between_two_sums_only_while_there_is_an_idle_team() -> None:
    before, within, after = slept(
        "regions(nullcontext()), regions(idle_team(), alone + 2), regions(nullcontext(), alone)"
    )
    assert within >= 20
    assert max(before, after) <= 5


@LINUX
def test_a_thread_spins_again_when_the_one_that_made_it_released_its_team() -> None:
    kept = "(torch.zeros(1 << 17).add_(1), in_a_thread())[1]"
    released = "(torch.zeros(1 << 17).add_(1), release_team(), in_a_thread())[2]"
    before, after, again = slept(f"{kept}, {released}, {kept}")
    assert min(before, again) >= 20
    assert after <= 5


TEAMS = """
import json, os, time, torch
from firefly import threads

def tasks():
    return len(os.listdir("/proc/self/task"))

def started(team, cores, room, count):
    os.sched_getaffinity, threads.thread_room = (lambda _: set(range(cores))), (lambda: room)
    torch.set_num_threads(team)
    torch.zeros(1 << 17).add_(1)
    before, ends = tasks(), time.monotonic() + 20
    with threads.idle_team():
        while tasks() < before + count and time.monotonic() < ends:
            time.sleep(0.001)
        time.sleep(0.05)
        within, unchanged = tasks() - before, torch.get_num_threads() == team
    while tasks() > before and time.monotonic() < ends:
        time.sleep(0.001)
    return [within, tasks() - before, unchanged]
"""


@LINUX
def test_an_idle_team_has_as_many_threads_as_exceed_the_cores() -> None:
    """With the thread of ours that they belong to; and none where it would be too many, or where nobody waits."""
    inf = float("inf")
    cases = {(1, 8, inf): 0, (2, 2, inf): 2, (2, 2, 20): 0, (2, 64, inf): 64, (2, 64, 96): 64, (2, 64, 95): 0}
    cases |= {(2, 300, inf): 0, (3, 2, inf): 0, (9, 8, inf): 0, (16, 16, inf): 2, (32, 64, inf): 34}
    calls = ", ".join(f"started({team}, {cores}, float('{room}'), {n})" for (team, cores, room), n in cases.items())
    found = outcome(f"{TEAMS}print(json.dumps([threads.gnu_openmp() is not None, {calls}]))")
    if not found.pop(0):
        pytest.skip("torch comes with another OpenMP library")
    assert dict(zip(cases, found, strict=True)) == {case: [count, 0, True] for case, count in cases.items()}


@LINUX
@pytest.mark.parametrize(
    ("groups", "user", "memory", "room"),
    [
        (None, None, None, float("inf")),
        (40, None, None, 40),
        (None, 1000, None, 700),
        (900, 1000, None, 700),
        (40, 1000, None, 40),
        (None, 300, None, 0),
        (None, None, 1 << 40, 0),
    ],
)
def test_threads_are_started_by_the_tightest_limit(
    groups: int | None, user: int | None, memory: int | None, room: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    limits = {resource.RLIMIT_NPROC: user, resource.RLIMIT_AS: memory}
    found = {kind: resource.RLIM_INFINITY if limit is None else limit for kind, limit in limits.items()}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (found[kind], resource.RLIM_INFINITY))
    monkeypatch.setattr(threads, "pids_room", lambda: groups)
    monkeypatch.setattr(Path, "read_text", lambda _: "1.72 1.84 2.02 3/300 21438\n")
    assert threads.thread_room() == room
    if user is not None:
        monkeypatch.setattr(Path, "read_text", lambda _: "")  # nobody can say how many there are
        assert threads.thread_room() == 0


def test_a_container_may_start_what_its_tightest_control_group_leaves(tmp_path: Path) -> None:
    process = process_in(tmp_path, V2, "/pod/box", "/", {"pod/box": None, "pod": None, ".": None})
    assert pids_room(process) is None
    for level, limit, present in (("pod/box", "max", 30), ("pod", 100, 90), (".", 1000, 100)):
        (tmp_path / "cgroup" / level / "pids.max").write_text(f"{limit}\n")
        (tmp_path / "cgroup" / level / "pids.current").write_text(f"{present}\n")
    assert pids_room(process) == 10


def test_a_crowded_time_begins_at_once_and_ends_when_it_is_calm_for_some_time() -> None:
    load = Load()
    looks = [0.02, 0.5, 0.02, 0.5, 0.6, 0.1, 0.01, 0.01, 0.01, 0.1, 0.01, 0.01, 0.01, 0.01, 0.02]
    found = [load.look(waited) for waited in looks]
    assert found == [False] * 4 + [True] * 9 + [False] * 2


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A process one of whose threads waits as the test says, and what was done about it."""
    for name in (*WAITING, *threads.COUNTS):
        monkeypatch.delenv(name, raising=False)
    state: dict[str, Any] = {"waits": 0.0, "waited": 0.0, "seen": time.monotonic(), "teams": [], "fails": False}

    def run_delays() -> dict[str, float]:
        now = time.monotonic()
        state["waited"] += state["waits"] * (now - state["seen"])
        state["seen"] = now
        return {"1": 0.0, "2": state["waited"]}

    @contextmanager
    def idle_team() -> Iterator[None]:
        state["teams"].append("begin")
        if state["fails"]:
            raise RuntimeError("can't start new thread")
        yield
        state["teams"].append("end")

    monkeypatch.setattr(threads, "run_delays", run_delays)
    monkeypatch.setattr(threads, "idle_team", idle_team)
    monkeypatch.setattr(threads, "INTERVAL", 0.002)
    return state


def until(state: dict[str, Any], teams: list[str]) -> bool:
    ends = time.monotonic() + 5
    while state["teams"] != teams and time.monotonic() < ends:
        time.sleep(0.002)
    return state["teams"] == teams


@LINUX
def test_teams_are_idle_while_another_process_wants_the_cores(watched: dict[str, Any]) -> None:
    with wait_by_load():
        time.sleep(0.05)
        assert watched["teams"] == []
        watched["waits"] = 0.5
        assert until(watched, ["begin"])
        watched["waits"] = 0.01
        assert until(watched, ["begin", "end"])
        watched["waits"] = 0.5
        assert until(watched, ["begin", "end", "begin"])
    assert watched["teams"] == ["begin", "end"] * 2


@LINUX
def test_a_process_that_may_start_no_thread_spins_and_says_nothing(
    watched: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    watched |= {"waits": 0.5, "fails": True}
    with wait_by_load():
        assert until(watched, ["begin"])
        time.sleep(0.05)
    assert watched["teams"] == ["begin"]
    assert raised == []

    def too_many(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", too_many)
    with wait_by_load():
        watched["teams"].append("command")
    assert watched["teams"] == ["begin", "command"]


@LINUX
def test_a_process_that_may_open_no_file_spins_and_says_nothing(
    watched: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    looks = iter([{"1": 0.0}])

    def run_delays() -> dict[str, float]:
        for look in looks:
            return look
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(threads, "run_delays", run_delays)
    with wait_by_load():
        time.sleep(0.05)
    assert raised == []


@LINUX
@pytest.mark.parametrize(
    ("name", "value"), [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "7"), ("KMP_BLOCKTIME", "0"), (COUNT, "1")]
)
def test_a_way_of_waiting_that_somebody_chose_stands(
    name: str, value: str, watched: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    before, watched["waits"] = threading.active_count(), 0.5
    with wait_by_load():
        time.sleep(0.05)
        assert threading.active_count() == before
    assert watched["teams"] == []


@LINUX
def test_a_thread_that_shares_its_core_waits_for_it() -> None:
    code = (
        "import json, os, subprocess, time; from firefly.threads import run_delays\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "other = subprocess.Popen(['sh', '-c', 'while true; do :; done'])\n"
        "before, ends = run_delays(), time.monotonic() + 0.5\n"
        "while time.monotonic() < ends: pass\n"
        "other.kill(); other.wait(); me = str(os.getpid())\n"
        "print(json.dumps(run_delays()[me] - before[me]))"
    )
    assert outcome(code) > 0.1
