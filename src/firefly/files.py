"""Files as all rooms need them: written whole or not at all, locked, kept in a cache; and what failing ones say."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from firefly.console import notice
from firefly.errors import UsageError

# ---- whole or not at all ----


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file under. At the end of the block it takes the place of `path`, so that readers
    see the old file or the new one, whole; where the block fails, it is removed."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield scratch
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, which gets its name at the end of the block; where that fails, it is removed.

    Of two that make the same folder at once, the first stays.
    """
    scratch = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}")
    scratch.mkdir()
    try:
        yield scratch
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


PARTIAL, OLD = ".partial", ".old"
"""How the names of folders end that are not sealed yet, and that are being replaced."""


def unfinished(folder: Path) -> Path:
    """Where a folder that is to be sealed is written before it has its name."""
    return folder.with_name(folder.name + PARTIAL)


def make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()


def seal(partial: Path, folder: Path) -> None:
    """Flush a finished folder to the disk and give it its name. A folder of that name is kept until then.

    Raises:
        OSError: the disk took not all of it; what had the name before has it still.
    """
    flush(partial)
    old = folder.with_name(folder.name + OLD)
    replaces = folder.exists()
    if replaces:
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if replaces:
            old.rename(folder)
        raise
    sync_names(folder.parent)
    if replaces:
        shutil.rmtree(old, ignore_errors=True)


def flush(folder: Path) -> None:
    """Flush all that a folder holds to the disk."""
    for place, _, files in os.walk(folder):
        for name in files:
            descriptor = os.open(os.path.join(place, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_names(Path(place))


def sync_names(folder: Path) -> None:
    """Flush the names in a folder, where the file system does that for folders at all."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


# ---- one process at a time ----


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as they wrote it into its file."""

    pid: int | str
    host: str
    started: str


UNKNOWN = Holder("?", "?", "?")
"""A holder that has not written its name yet, or found no room for it."""

WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems that keep no locks answer."""


class Held(Exception):
    """Another process holds the lock."""

    def __init__(self, holder: Holder) -> None:
        super().__init__(str(holder))
        self.holder = holder


@contextmanager
def hold(path: Path, waiting: Callable[[Holder], None] | None = None) -> Iterator[bool]:
    """Hold the lock file at `path` during a `with` block; the file is removed afterwards.

    The kernel frees it when its process dies, however it dies, and forked children (data workers) do not share it.
    Yields whether it is held: where the file system keeps no locks, a notice says so and nothing is held.

    Args:
        waiting: called with the present holder before this process waits for it. None: do not wait.

    Raises:
        Held: another process holds it, and `waiting` is None.
    """
    lock = FileLock(path, fallback_to_soft=False, on_acquired=_sign)
    if not _acquire(lock, path, waiting):
        notice(
            "lock.unavailable",
            "{path}: this file system keeps no locks, so nothing prevents two processes from doing the same here.",
            path=path,
        )
        yield False
        return
    try:
        yield True
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: whoever locks a file without a name tries again
        lock.release()


def _acquire(lock: BaseFileLock, path: Path, waiting: Callable[[Holder], None] | None) -> bool:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if waiting is None:
            raise Held(_holder(path)) from None
        waiting(_holder(path))
        lock.acquire()
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        path.unlink(missing_ok=True)
        return False
    return True


def _sign(descriptor: int) -> None:
    holder = Holder(os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S"))
    with suppress(OSError):  # a full disk: the lock holds without a name
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(asdict(holder)).encode())


def _holder(path: Path) -> Holder:
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return UNKNOWN


# ---- what can be had again: prepared examples, probes, downloads ----


def cache_folder() -> Path:
    """FIREFLY_CACHE, else firefly under XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("FIREFLY_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "firefly"


def make_cache(folder: Path, variable: str = "FIREFLY_CACHE") -> Path:
    """Make a folder of a cache, if it is not there, and find out that files can be written into it.

    Args:
        variable: of the environment, that moves the cache elsewhere.

    Raises:
        UsageError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # the disk is full: the cache is where it should be
        raise unusable_cache(folder, error.strerror or error, variable) from None
    return folder


def unusable_cache(path: object, problem: object, variable: str) -> UsageError:
    return UsageError(
        "cache.unusable",
        "the cache at {path} cannot be made or written: {problem}. Set {variable} to a folder that can.",
        path=path,
        problem=problem,
        variable=variable,
    )


@cache
def source_hash(folder: Path, *versions: str) -> str:
    """Hash of the Python source below `folder` and of the versions of what it rests on: for the keys of caches, so that
    changed code never reuses what older code made."""
    digest = hashlib.sha256(" ".join(versions).encode())
    for source in sorted(folder.rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


# ---- what goes wrong ----


def first_line(error: BaseException) -> str:
    """What an error says, without the stack that some libraries add to it; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def one_line(error: BaseException) -> str:
    """All that an error says, over however many lines, in one."""
    return " ".join(str(error).split())


def is_write_failure(error: Exception) -> bool:
    """Whether an error says that a file could not be written, whichever library says it.

    safetensors and tokenizers raise types of their own with Rust's words, torch.save a RuntimeError of its zip writer:
    only the words tell those. What a socket raises is an OSError, too, but no file's.
    """
    if isinstance(error, OSError):
        return not isinstance(error, (ConnectionError, TimeoutError))
    text = str(error)
    return any(
        word in text
        for word in ("(os error ", "PytorchStreamWriter", "inline_container", "cannot be opened", "Parent directory")
    )


def free_space(folder: Path) -> str:
    """Free bytes of the disk that `folder` is on, as people read them."""
    return f"{shutil.disk_usage(folder).free / 1e9:,.3f} GB"


def read_proc(path: str, name: str) -> int | None:
    """Bytes of one line of a Linux memory report; None where there is no such report or line."""
    try:
        with open(path, encoding="ascii") as lines:
            for line in lines:
                if line.startswith(f"{name}:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
