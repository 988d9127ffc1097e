"""Lock files that one process at a time holds. The kernel frees them when their process dies, however it dies."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from firefly.console import notice

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl: Any = None

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What flock answers on file systems that keep no locks."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as they wrote it into its file."""

    pid: int | str
    host: str
    started: str


UNKNOWN = Holder("?", "?", "?")
"""A holder that has not written its name yet, or found no room for it."""


class Held(Exception):
    """Another process holds the lock."""

    def __init__(self, holder: Holder) -> None:
        super().__init__(str(holder))
        self.holder = holder


@contextmanager
def hold(path: Path, waiting: Callable[[Holder], None] | None = None) -> Iterator[bool]:
    """Hold the lock file at `path` during a `with` block; the file is removed afterwards.

    Yields whether it is held: where the file system keeps no locks, a notice says so and nothing is held.

    Args:
        waiting: called with the present holder before this process waits for it. None: do not wait.

    Raises:
        Held: another process holds it, and `waiting` is None.
    """
    descriptor = _acquire(path, waiting)
    if descriptor is None:
        notice(
            "lock.unavailable",
            "{path}: this file system keeps no locks, so nothing prevents two processes from doing the same here.",
            path=path,
        )
        yield False
        return
    _held.add(descriptor)
    try:
        with suppress(OSError):  # a full disk: the lock holds without a name
            _sign(descriptor)
        yield True
    finally:
        _held.discard(descriptor)
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _acquire(path: Path, waiting: Callable[[Holder], None] | None) -> int | None:
    """A descriptor that holds the lock of the file that is at `path` now; None where there are no locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            held = _lock(descriptor, waiting)
            if held and _is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if not held:
            path.unlink(missing_ok=True)
            return None
        # Its holder removed the file while we waited: the lock of a file without a name guards nothing.


def _lock(descriptor: int, waiting: Callable[[Holder], None] | None) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if waiting is None:
            raise Held(_holder(descriptor)) from None
        waiting(_holder(descriptor))
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    holder = Holder(os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S"))
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(asdict(holder)).encode(), 0)


def _holder(descriptor: int) -> Holder:
    try:
        return Holder(**json.loads(os.pread(descriptor, 1000, 0)))
    except (OSError, ValueError, TypeError):
        return UNKNOWN


_held: set[int] = set()


def _leave_to_parent() -> None:
    """A forked child (a data worker) shares the parent's locks, and would hold them for as long as it outlives it."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
