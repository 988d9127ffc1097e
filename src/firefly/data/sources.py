"""What `train_file` and `eval_file` may say: a place, or a mixture of places with weights."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from firefly.config import missing_key
from firefly.data.readers.data_files import find_files
from firefly.errors import UsageError
from firefly.files import atomic_file, cache_folder, make_cache

LARGE, SETTLED = 1 << 24, 10.0
"""Bytes from which a file's hash is remembered, and seconds for which it must have been left alone."""
KEYS = ("path", "weight", "max_rows", "name")


@dataclass(frozen=True)
class DataSource:
    """One entry of a mixture.

    Attributes:
        weight: how often an epoch shows each example: 2 twice, 0.5 a fixed half of them.
        max_rows: only that many rows are read, from the beginning; None: all.
    """

    name: str
    files: tuple[Path, ...]
    weight: float = 1.0
    max_rows: int | None = None


def find_sources(value: Any, key: str, hub: str = "huggingface") -> list[DataSource]:
    """Resolve the value of a configuration key to sources with their files.

    Raises:
        UsageError: an entry of another shape, a place without data files, or two entries of one name.
    """
    entries = list(value) if isinstance(value, list | tuple) else [value]
    if not entries:
        raise missing_key(key)
    sources = [_source(entry, key, hub) for entry in entries]
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise _bad_source(key, json.dumps(name), "name (twice)")
    return sources


def _source(entry: Any, key: str, hub: str) -> DataSource:
    if isinstance(entry, str):
        entry = {"path": entry}
    shown = json.dumps(entry, ensure_ascii=False, default=str)
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str) or not entry["path"]:
        raise _bad_source(key, shown, "path")
    for name in entry:
        if name not in KEYS:
            raise _bad_source(key, shown, name)
    weight, rows, name = entry.get("weight", 1.0), entry.get("max_rows"), entry.get("name", entry["path"])
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise _bad_source(key, shown, "weight")
    if rows is not None and (type(rows) is not int or rows < 1):
        raise _bad_source(key, shown, "max_rows")
    if not isinstance(name, str) or not name:
        raise _bad_source(key, shown, "name")
    return DataSource(name, tuple(find_files(entry["path"], key, hub)), float(weight), rows)


def _bad_source(key: str, shown: str, problem: object) -> UsageError:
    return UsageError(
        "config.bad_source",
        '{key}: {value} is not valid: {problem}. An entry is a path or {{"path", "weight" > 0, "max_rows" ≥ 1, '
        '"name"}}, each name once.',
        key=key,
        value=shown,
        problem=problem,
    )


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes. That of a large file is remembered in the cache with the file's size and times, so
    that not every rank reads a whole corpus for it at every start."""
    found = path.stat()
    state = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_dev, found.st_ino]
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    known = cache_folder() / "hashes" / f"{name}.json"
    if found.st_size >= LARGE:
        with suppress(OSError, ValueError):
            stored = json.loads(known.read_text(encoding="utf-8"))
            if stored["state"] == state:
                return stored["sha256"]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # A file that was just written may be written again without any of its times changing.
    if found.st_size >= LARGE and time.time() - max(found.st_mtime, found.st_ctime) > SETTLED:
        with suppress(OSError), atomic_file(make_cache(known.parent) / known.name) as scratch:
            scratch.write_text(json.dumps({"file": str(path), "state": state, "sha256": digest}), encoding="utf-8")
    return digest


def repeat(count: int, weight: float, seed: int) -> np.ndarray:
    """Indices of `count` examples, each `weight` times: whole rounds first, then a seeded part of them.

    Returns:
        int64 (round(count × weight),), at least one where there is an example; in order within each round.
    """
    whole = int(weight)
    part = round((weight - whole) * count)
    if not whole and count:
        part = max(part, 1)
    chosen = np.sort(np.random.default_rng(seed).permutation(count)[:part])
    return np.concatenate([np.tile(np.arange(count), whole), chosen]).astype(np.int64)
