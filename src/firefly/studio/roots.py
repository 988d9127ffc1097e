"""The folders that the page may see, and the files in them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from glob import iglob
from pathlib import Path
from typing import Any

from firefly.errors import UsageError
from firefly.runs.records import SKIPPED

OWN_FOLDER = ".firefly"
"""Below the first root: jobs, and what the page keeps."""
UPLOADS = "uploads"
CONFIGS = "train_args"

DEPTH = 4
"""Folders below a root in which files are offered; deeper ones can be typed."""
MOST_OFFERED = 500
"""Files that a list offers; more are no list any more."""

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".xlsx", ".zip", ".gz", ".zst", ".xz")
GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Roots:
    """The folders given with --root, resolved; relative paths are meant from the first one."""

    folders: tuple[Path, ...]

    @classmethod
    def of(cls, given: Sequence[str]) -> Roots:
        """
        Raises:
            UsageError: one of them is no folder.
        """
        found = []
        for name in given:
            folder = Path(name).expanduser().resolve()
            if not folder.is_dir():
                raise UsageError("studio.no_root", "--root {path} is no folder.", path=name)
            found.append(folder)
        return cls(tuple(dict.fromkeys(found)))

    @property
    def first(self) -> Path:
        return self.folders[0]

    @property
    def own(self) -> Path:
        return self.first / OWN_FOLDER

    @property
    def jobs(self) -> Path:
        return self.own / "jobs"

    @property
    def received(self) -> Path:
        """Where uploads arrive."""
        return self.own / "tmp"

    def inside(self, name: str | Path) -> Path:
        """The path that is meant, all links in it followed.

        Raises:
            UsageError: it lies outside of the roots, or is no path at all.
        """
        try:
            path = (self.first / Path(str(name).strip()).expanduser()).resolve()
        except (OSError, ValueError, RuntimeError):  # a zero byte, a loop of links, a home that nobody has
            path = None
        if path is None or not any(path.is_relative_to(root) for root in self.folders):
            raise UsageError(
                "studio.outside",
                "{path} lies outside of the folders that this page may see (--root): {roots}.",
                path=repr(str(name)),
                roots=", ".join(map(str, self.folders)),
            )
        return path

    def shown(self, path: Path) -> str:
        """A path as one would type it here: relative to the first root, where it lies in it."""
        return str(path.relative_to(self.first)) if path.is_relative_to(self.first) else str(path)

    def check(self, values: Mapping[str, Any]) -> None:
        """Refuse a configuration that reads or writes elsewhere. What names no file here may be of a hub.

        Raises:
            UsageError: a path in it lies outside of the roots, or a link leads out of them: one that a pattern matches,
                or that lies in a folder that is named.
        """
        for text in filter(None, _texts(values)):  # "" names nothing, and not the root
            plain = GLOB.split(text)[0]
            if os.path.isabs(plain) or plain.startswith("~") or ".." in Path(plain).parts:
                self.inside(plain)
            for path in self._named(text):
                self.inside(path)
                for link in _links_in(path):
                    self.inside(link)

    def _named(self, text: str) -> Iterator[Path]:
        """What a text names that is there: a file or folder, or all that match a pattern."""
        with suppress(OSError, ValueError):
            if os.path.lexists(path := self.first / text):
                yield path
        if GLOB.search(text):
            yield from (self.first / found for found in iglob(text, root_dir=self.first, recursive=True))

    def files(self, suffixes: Sequence[str]) -> list[str]:
        """Files with one of these endings, the newest first, as one would type them."""
        found = [path for root in self.folders for path in _walk(root) if path.name.lower().endswith(tuple(suffixes))]
        newest = sorted(found, key=_changed, reverse=True)
        return [self.shown(path) for path in newest[:MOST_OFFERED]]

    def take(self, upload: Path) -> Path:
        """Move an uploaded file into the uploads, under its own name or, if that is taken, one with a number.

        Raises:
            UsageError: it was not uploaded: a forged request may name any file.
        """
        if not upload.resolve().is_relative_to(self.received):
            raise UsageError("studio.not_uploaded", "{path} was not uploaded here.", path=str(upload))
        name = re.sub(r"[^\w.\- ]+", "_", upload.name).strip(". ") or "upload"
        folder = self.first / UPLOADS
        folder.mkdir(exist_ok=True)
        self.inside(folder)  # not a link to somewhere else
        stem, dot, suffix = name.partition(".")
        place = folder / name
        number = 2
        while place.exists() or place.is_symlink():
            place = folder / f"{stem}-{number}{dot}{suffix}"
            number += 1
        shutil.move(upload, place)
        return place


def _texts(value: Any) -> Iterator[str]:
    """All texts of a configuration's values, also those in lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, Sequence):
        for part in value:
            yield from _texts(part)


def _links_in(folder: Path) -> Iterator[Path]:
    for place, below, files in os.walk(folder):  # which follows no links to folders
        yield from (path for name in (*below, *files) if (path := Path(place, name)).is_symlink())


def _walk(root: Path) -> Iterator[Path]:
    for place, below, files in os.walk(root):  # which follows no links to folders
        depth = len(Path(place).relative_to(root).parts)
        below[:] = sorted(name for name in below if depth < DEPTH and not SKIPPED.fullmatch(name))
        yield from (
            Path(place, name) for name in files if not name.startswith(".") and not os.path.islink(Path(place, name))
        )


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
