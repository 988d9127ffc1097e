"""Folders that appear whole or not at all: written under another name, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from firefly.console import notice
from firefly.ranks import is_first

RESULT = "result"
"""The name of the folder that a run's result is gathered in (it is moved into output_dir file by file)."""

_PARTIAL, _OLD = ".partial", ".old"
_NAMES = rf"(checkpoint-\d+|{RESULT})"


def unfinished(folder: Path) -> Path:
    """Where `folder` is written before it has its name."""
    return folder.with_name(folder.name + _PARTIAL)


def make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()


def seal(partial: Path, folder: Path) -> None:
    """Flush a finished folder to the disk and give it its name. A folder of that name is kept until then.

    Raises:
        OSError: the disk took not all of it; what had the name before has it still.
    """
    _flush(partial)
    old = folder.with_name(folder.name + _OLD)
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
    _sync_folder(folder.parent)
    if replaces:
        shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    for place, _, files in os.walk(folder):
        for name in files:
            descriptor = os.open(os.path.join(place, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _sync_folder(Path(place))


def _sync_folder(folder: Path) -> None:
    """Flush the names in a folder, where the file system does that for folders at all."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def finish_replacing(output_dir: Path) -> None:
    """Undo what a process that died within `seal` left: the old folder gets its name back, unless the new one has it.

    Several ranks may do so at once.
    """
    for old in output_dir.glob(f"checkpoint-*{_OLD}"):
        folder = old.with_name(old.name.removesuffix(_OLD))
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            continue
        try:
            old.rename(folder)
        except FileNotFoundError:
            continue  # another rank did it


def leftovers(output_dir: Path) -> list[Path]:
    """Folders of `output_dir` whose writing was never finished."""
    pattern = re.compile(_NAMES + re.escape(_PARTIAL))
    return sorted(path for path in output_dir.glob(f"*{_PARTIAL}") if pattern.fullmatch(path.name))


def remove_leftovers(output_dir: Path) -> None:
    """Remove what was never finished, and say so of folders. The first rank does."""
    if not is_first():
        return
    for path in leftovers(output_dir):
        shutil.rmtree(path, ignore_errors=True)
        notice("resume.leftover", "{path} was never finished and has been removed.", path=path)
    for path in output_dir.glob(".*.json.*"):  # of `passport.write_json`
        path.unlink(missing_ok=True)


def rotate(folders: Iterable[Path], limit: int | None, keep: Iterable[Path]) -> None:
    """Remove the oldest of the checkpoints, so that `limit` are left (None or 0: all), but none of `keep`.

    The oldest by time, not by step: a run that resumed from an earlier checkpoint writes small numbers again.
    """
    folders, keep = list(folders), set(keep)
    if not limit or limit < 0:
        return
    spare = sorted((path for path in folders if path not in keep), key=lambda path: path.stat().st_mtime_ns)
    for path in spare[: max(0, len(folders) - max(limit, len(keep)))]:
        shutil.rmtree(path, ignore_errors=True)


OF_A_MODEL = ("model*.safetensors*", "adapter_model.safetensors", "adapter_config.json", "chat_template.jinja")
"""Files that say what model a folder holds."""


def move_into(source: Path, target: Path) -> None:
    """Move the entries of a folder into another one, each in a single step, and remove the emptied folder.

    What an earlier model in `target` consisted of, and the new one does not have, goes: weights in another number of
    shards, an adapter where a whole model comes, which would be taken for one that belongs to it.
    """
    _flush(source)
    moved = {path.name for path in source.iterdir()}
    for path in source.iterdir():
        place = target / path.name
        if place.is_dir():
            shutil.rmtree(place)
        os.replace(path, place)
    if any(name.startswith(("model", "adapter_model")) and name.endswith(".safetensors") for name in moved):
        for stale in (path for pattern in OF_A_MODEL for path in target.glob(pattern)):
            if stale.name not in moved:
                stale.unlink()
    source.rmdir()
    _sync_folder(target)


def is_write_failure(error: Exception) -> bool:
    """Whether an error says that a file could not be written, whichever library says it.

    safetensors and tokenizers raise types of their own with Rust's words; torch.save a RuntimeError of its zip writer.
    """
    text = str(error)
    return isinstance(error, OSError) or any(
        word in text
        for word in ("(os error ", "PytorchStreamWriter", "inline_container", "cannot be opened", "Parent directory")
    )


def first_line(error: Exception) -> str:
    """What an error says, without the stack that some libraries add to it."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def free_space(folder: Path) -> str:
    """Free bytes of the disk that `folder` is on, as people read them."""
    return f"{shutil.disk_usage(folder).free / 1e9:,.3f} GB"
