"""Folders that keep what can be had again: prepared examples, verdicts, downloads."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from firefly.errors import UsageError


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
        problem = error.strerror or error
        raise UsageError(
            "cache.unusable",
            "the cache at {path} cannot be made or written: {problem}. Set {variable} to a folder that can.",
            path=folder,
            problem=problem,
            variable=variable,
        ) from None
    return folder
