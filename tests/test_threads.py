"""Threads are as many as a container may use, and a run keeps their number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import firefly
from firefly import threads
from firefly.console import take_notices
from firefly.control_groups import cpu_quota
from firefly.threads import COUNT, OURS, settle_threads, threads_of_checkpoint

VARIABLES = (*threads.COUNTS, OURS, "LOCAL_WORLD_SIZE")
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
