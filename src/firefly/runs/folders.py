"""The folders of a run that are sealed when they are finished: checkpoints and the result."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from firefly.console import notice
from firefly.files import OLD, PARTIAL, flush, sync_names
from firefly.ranks import is_first

RESULT = "result"
"""The name of the folder that a run's result is gathered in (it is moved into output_dir file by file)."""

_NAMES = rf"(checkpoint-\d+|{RESULT})"


def finish_replacing(output_dir: Path) -> None:
    """Undo what a process that died within `seal` left: the old folder gets its name back, unless the new one has it.

    Several ranks may do so at once.
    """
    for old in output_dir.glob(f"checkpoint-*{OLD}"):
        folder = old.with_name(old.name.removesuffix(OLD))
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            continue
        try:
            old.rename(folder)
        except FileNotFoundError:
            continue  # another rank did it


def numbered_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(N, folder) of each checkpoint-N of a run, by N."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*"))
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def leftovers(output_dir: Path) -> list[Path]:
    """Folders of `output_dir` whose writing was never finished."""
    pattern = re.compile(_NAMES + re.escape(PARTIAL))
    return sorted(path for path in output_dir.glob(f"*{PARTIAL}") if pattern.fullmatch(path.name))


def remove_leftovers(output_dir: Path) -> None:
    """Remove what was never finished, and say so of folders. The first rank does."""
    if not is_first():
        return
    for path in leftovers(output_dir):
        shutil.rmtree(path, ignore_errors=True)
        notice("resume.leftover", "{path} was never finished and has been removed.", path=path)
    for path in output_dir.glob(".*.json*.*"):  # of `atomic_file`: run.json and its kin, metrics.jsonl
        path.unlink(missing_ok=True)


def rotate(folders: Iterable[Path], limit: int | None, keep: Iterable[Path]) -> None:
    """Remove the oldest of the checkpoints, so that `limit` are left (None or 0: all), but none of `keep`.

    The oldest by time, not by step: a run that resumed from an earlier checkpoint writes small numbers again.
    """
    folders, kept = list(folders), {path.resolve() for path in keep}
    if not limit or limit < 0:
        return
    spare = sorted((path for path in folders if path.resolve() not in kept), key=lambda path: path.stat().st_mtime_ns)
    for path in spare[: max(0, len(folders) - max(limit, len(kept)))]:
        shutil.rmtree(path, ignore_errors=True)


OF_A_MODEL = ("model*.safetensors*", "adapter_model.safetensors", "adapter_config.json", "chat_template.jinja")
"""Files that say what model a folder holds."""


def move_into(source: Path, target: Path) -> None:
    """Move the entries of a folder into another one, each in a single step, and remove the emptied folder.

    What an earlier model in `target` consisted of, and the new one does not have, goes: weights in another number of
    shards, an adapter where a whole model comes, which would be taken for one that belongs to it.
    """
    flush(source)
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
    sync_names(target)
