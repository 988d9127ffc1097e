"""Files to records. A record keeps its file and line; a line that is no record becomes a problem, never a crash.

Every reader takes a path and yields its records in bounded memory. A new kind of file is one reader and one line in
the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from firefly.data.readers.json_files import read_json, read_json_lines
from firefly.data.readers.tables import read_csv, read_parquet, read_tsv
from firefly.data.readers.text import read_text
from firefly.data.schema import RawRecord
from firefly.errors import UsageError

__all__ = ["READERS", "known_suffix", "no_file", "read_records", "read_text"]

READERS: dict[str, Callable[[Path], Iterator[RawRecord]]] = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".ndjson": read_json_lines,
    ".jsonl.gz": read_json_lines,
    ".json.gz": read_json,
    ".parquet": read_parquet,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".txt": read_text,
}


def read_records(
    path: Path, key: str = "train_file", documents: Literal["line", "file"] = "line"
) -> Iterator[RawRecord]:
    """Yield the records of one file in file order; what it is, its suffix says. Blank lines are marked.

    Args:
        key: the configuration key that names the file, for messages.
        documents: what one record of a .txt file is.

    Raises:
        UsageError: at once, if the file is missing, a folder, unreadable or of an unknown kind; while reading, if it is
            not what its suffix says, damaged, or broken so that what follows cannot be told apart.
    """
    try:
        path.open("rb").close()
    except FileNotFoundError:
        raise no_file(key, str(path)) from None
    except IsADirectoryError:
        raise UsageError(
            "data.is_folder", "{path} is a folder where one file is needed. Give a file in it.", path=path
        ) from None
    except OSError as error:
        raise UsageError(
            "data.unreadable",
            "{key} = {path} cannot be read: {problem}.",
            key=key,
            path=path,
            problem=error.strerror or error,
        ) from None
    suffix = known_suffix(path.name)
    if suffix is None:
        raise UsageError(
            "data.unknown_suffix",
            "{path}: files named *{suffix} are not read by this version; it reads {known}.",
            path=path,
            suffix=path.suffix,
            known=", ".join(READERS),
        )
    return read_text(path, documents) if suffix == ".txt" else READERS[suffix](path)


def no_file(key: str, path: str) -> UsageError:
    return UsageError(
        "data.no_file",
        "{key} = {path} does not exist. Check the path (relative paths start where the command runs).",
        key=key,
        path=path,
    )


def known_suffix(name: str) -> str | None:
    """The key of READERS with which a file name ends."""
    return next((suffix for suffix in READERS if name.lower().endswith(suffix)), None)
