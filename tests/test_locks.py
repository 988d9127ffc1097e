"""A lock is one process's at a time, and nobody's once its process has died."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import firefly
from firefly.console import take_notices
from firefly.errors import UsageError
from firefly.files import Held, Holder, hold
from firefly.runs.lock import only_run

HOLDING = "import sys, time; from firefly.files import hold\nwith hold(__import__('pathlib').Path(sys.argv[1])):\n"


@contextmanager
def other_process(
    path: Path, then: str = "print('held', flush=True); time.sleep(60)"
) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock."""
    environment = os.environ | {"PYTHONPATH": str(Path(firefly.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", f"{HOLDING}    {then}", str(path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_one_is_told_who_holds_it(tmp_path: Path) -> None:
    with other_process(tmp_path / "lock") as process, pytest.raises(Held) as refusal, hold(tmp_path / "lock"):
        pass
    holder = refusal.value.holder
    assert holder.pid == process.pid
    assert holder.host == os.uname().nodename
    assert holder.started.startswith("20")


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    with other_process(tmp_path / "lock") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / "lock").exists()
        with hold(tmp_path / "lock") as held:
            assert held
    assert not (tmp_path / "lock").exists()


def test_a_child_of_the_holder_does_not_keep_it(tmp_path: Path) -> None:
    """A data worker outlives a killed run by seconds."""
    forking = "child = os.fork(); child or print('held', flush=True); time.sleep(30)"  # the child, once it runs
    with other_process(tmp_path / "lock", f"import os; {forking}") as process:
        process.kill()
        process.wait()
        with hold(tmp_path / "lock") as held:
            assert held


def test_one_that_waits_takes_over(tmp_path: Path) -> None:
    told: list[Holder] = []
    with other_process(tmp_path / "lock") as process:

        def waiting(holder: Holder) -> None:
            told.append(holder)
            threading.Timer(0.1, process.kill).start()

        with hold(tmp_path / "lock", waiting) as held:
            assert held
    assert [holder.pid for holder in told] == [process.pid]


def test_a_lock_of_a_file_that_is_gone_guards_nothing(tmp_path: Path) -> None:
    """The one who waits gets the lock of the removed file; a third could have made a new one meanwhile."""
    path, order = tmp_path / "lock", []

    def third() -> None:
        with hold(path, lambda holder: order.append("waits")):
            assert path.exists()
            order.append("second")

    with hold(path):
        thread = threading.Thread(target=third)
        thread.start()
        while not order:
            pass
        order.append("first")
    thread.join(10)
    assert order == ["waits", "first", "second"]
    assert not path.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    take_notices()
    with hold(tmp_path / "lock") as held:
        assert not held
    assert list(tmp_path.iterdir()) == []
    assert [entry["code"] for entry in take_notices()] == ["lock.unavailable"]


def test_one_run_at_a_time_writes_into_a_folder(tmp_path: Path) -> None:
    with only_run(tmp_path):
        with pytest.raises(UsageError) as refusal, only_run(tmp_path):
            pass
        assert f"process {os.getpid()} on {os.uname().nodename}" in str(refusal.value)
        (tmp_path / "other").mkdir()
        with only_run(tmp_path / "other"):
            pass
    with only_run(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_rank_0_holds_the_lock_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with only_run(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with only_run(tmp_path):
            pass
