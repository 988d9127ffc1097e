"""The file that answers are written to: only by one process, only with the settings that it was begun with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from firefly.errors import UsageError
from firefly.files import Held, atomic_file, hold

SETTINGS = ".settings.json"
"""What the name of the file ends with that says what the answers beside it depend on."""


@dataclass(frozen=True)
class Found:
    """What an earlier run has left.

    Attributes:
        lines, failed: whole lines, and those of them with an error.
        size: of the whole lines, in bytes; None: the file is to be begun.
    """

    lines: int = 0
    failed: int = 0
    size: int | None = None


@dataclass(frozen=True)
class AnswerFile:
    """Lines of JSON, and beside them the settings."""

    path: Path

    @property
    def settings_path(self) -> Path:
        return self.path.with_name(self.path.name + SETTINGS)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from writing it during a `with` block.

        Raises:
            UsageError: another one does.
        """
        if self.path.is_dir():
            raise UsageError(
                "data.is_folder", "{path} is a folder where one file is needed. Give a file in it.", path=self.path
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with hold(self.path.with_name(f".{self.path.name}.lock")):
                yield
        except Held as held:
            raise UsageError(
                "generate.locked",
                "--output_file {path} is being written by another process ({pid} on {host}, since {started}). Wait "
                "for it, stop it, or name another file.",
                path=self.path,
                pid=held.holder.pid,
                host=held.holder.host,
                started=held.holder.started,
            ) from None

    def find(self, settings: Mapping[str, Any], overwrite: bool) -> Found:
        """What of it can stay.

        Raises:
            UsageError: it was written with other settings, or by something else.
        """
        if overwrite or not self.path.exists() or not self.path.stat().st_size:
            return Found()
        try:
            begun = json.loads(self.settings_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(
                "generate.foreign_output",
                "--output_file {path} exists, and no {settings} beside it says what it was made with. Name another "
                "file, or replace it with --overwrite.",
                path=self.path,
                settings=self.settings_path.name,
            ) from None
        except ValueError:
            begun = {}
        asked = json.loads(json.dumps(settings))  # a tuple is a list when it is read again
        if begun != asked:
            keys = [key for key in {**begun, **asked} if begun.get(key, ...) != asked.get(key, ...)]
            raise UsageError(
                "generate.other_settings",
                "--output_file {path} was begun with other settings: {keys}. Go on with the same ones, name "
                "another file, or replace it with --overwrite.",
                path=self.path,
                keys=", ".join(keys),
            )
        return self._whole_lines()

    def _whole_lines(self) -> Found:
        lines = failed = size = 0
        with self.path.open("rb") as file:
            for line in file:
                try:
                    value = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    value = None
                if not isinstance(value, dict):
                    if file.read(1):
                        raise UsageError(
                            "generate.broken_output",
                            "{place}: this line of --output_file is no answer. Name another file, or replace it with "
                            "--overwrite.",
                            place=f"{self.path}:{lines + 1}",
                        )
                    break  # it was being written when the run was killed
                lines, failed, size = lines + 1, failed + ("error" in value), size + len(line)
        return Found(lines, failed, size)

    @contextmanager
    def open(self, settings: Mapping[str, Any], found: Found) -> Iterator[BinaryIO]:
        """Open it to write behind what was found."""
        if found.size is None:
            # In this order: there is never an answer whose settings are not known.
            self.path.unlink(missing_ok=True)
            with atomic_file(self.settings_path) as scratch:
                scratch.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        with self.path.open("ab") as file:
            if found.size is not None:
                file.truncate(found.size)
            yield file
