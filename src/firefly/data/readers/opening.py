"""Opening data files, plain or gzip. What is no text, or breaks while it is read, is refused without a traceback."""

from __future__ import annotations

import functools
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, cast

from firefly.data.schema import RawRecord, Source
from firefly.errors import UsageError
from firefly.files import first_line

BUFFER = 1 << 18
GZIP_BUFFER = 1 << 16
"""Smaller: what is unpacked into it before a damaged place is lost, and with it the line number."""
HEAD = 4096
BOM = b"\xef\xbb\xbf"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"

Options = ParamSpec("Options")
Reader = Callable[Concatenate[Path, Options], Iterator[RawRecord]]


def open_bytes(path: Path) -> io.BufferedReader:
    """The bytes of a file, unpacked if it is named *.gz."""
    if path.suffix.lower() != ".gz":
        return io.BufferedReader(io.FileIO(path), BUFFER)
    return io.BufferedReader(cast(Any, gzip.open(path)), GZIP_BUFFER)


def open_text(path: Path) -> io.BufferedReader:
    """The bytes of a text file after its byte order mark.

    A model file, an archive or UTF-16 text given as data is one mistake, not thousands of malformed rows.

    Raises:
        UsageError: it does not begin like text.
    """
    file = open_bytes(path)
    head = file.peek(HEAD)[:HEAD]
    refuse_pointer(path, head)
    if b"\0" in head.partition(b"\n")[0] or head[:4] in (b"PK\x03\x04", b"PAR1") or head[:2] == b"\x1f\x8b":
        file.close()
        raise UsageError(
            "data.not_text",
            "{path} is not a text file: it begins like an archive, a binary file or UTF-16. Unpack it, or save it as "
            "UTF-8.",
            path=path,
        )
    if head.startswith(BOM):
        file.read(len(BOM))
    return file


def refuse_pointer(path: Path, head: bytes) -> None:
    """`git clone` without Git LFS leaves small text files where the data should be.

    Raises:
        UsageError: `head` begins such a file.
    """
    if head.startswith(LFS_POINTER):
        raise UsageError(
            "data.lfs_pointer",
            "{path} is a Git LFS pointer, not the data itself. Fetch the data with: git lfs pull",
            path=path,
        )


def not_utf8(place: Source) -> UsageError:
    return UsageError(
        "data.not_utf8",
        "{place}: the text is not UTF-8. Save the file as UTF-8 (for example: iconv -f GB18030 -t UTF-8 OLD > NEW).",
        place=place,
    )


def stops_at_damage(reader: Reader[Options]) -> Reader[Options]:
    """Let a reader end with a UsageError that names the place where a damaged or vanished file cannot be read on."""

    @functools.wraps(reader)
    def records(path: Path, *args: Options.args, **options: Options.kwargs) -> Iterator[RawRecord]:
        record = None
        try:
            for record in reader(path, *args, **options):
                yield record
        except (OSError, EOFError, zlib.error) as error:
            place = record.source if record else Source(str(path), 1)
            raise UsageError(
                "data.damaged",
                "{place}: from about here the file cannot be read: {problem}. It is damaged or incomplete, or not "
                "what its name says. Copy or download it again.",
                place=place,
                problem=first_line(error).rstrip("."),
            ) from error

    return records
