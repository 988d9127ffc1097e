"""Tables: CSV, TSV and Parquet. Every row has every column, and every struct of a column every field: what has no value
is left out of the record."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firefly.data.readers.opening import HEAD, not_utf8, open_bytes, open_text, refuse_pointer, stops_at_damage
from firefly.data.schema import RawRecord, Source
from firefly.errors import UsageError
from firefly.translation import Phrase

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

FIELD_LIMIT = 1 << 25
"""Characters of one CSV cell: more than a book has, less than memory, for a quote that is never closed."""
BATCH = 128
"""Rows of a Parquet file that are held at a time."""
PAGE_BUFFER = 1 << 20
"""Bytes read at a time of a Parquet column; without a buffer Arrow holds whole row groups, often the whole file."""


def read_csv(path: Path) -> Iterator[RawRecord]:
    """Rows of comma-separated values under a header, all of them text; `""` in a quoted cell is a quotation mark.

    Columns without a name (a data frame's index) and empty cells are left out, blank lines skipped.

    Raises:
        UsageError: not a text file, a header that is not UTF-8 or names a column twice, or a quoted cell over several
            lines that does not end as one (rows may be hidden in it).
    """
    return _read_delimited(path, ",")


def read_tsv(path: Path) -> Iterator[RawRecord]:
    """As `read_csv`, with tabs between the cells."""
    return _read_delimited(path, "\t")


@stops_at_damage
def _read_delimited(path: Path, delimiter: str) -> Iterator[RawRecord]:
    name = str(path)
    csv.field_size_limit(FIELD_LIMIT)  # of the whole process; the module's own 131,072 is too small for documents
    with (
        open_text(path) as raw,
        io.TextIOWrapper(raw, encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        rows = _rows(name, csv.reader(file, delimiter=delimiter, strict=True))
        columns = _columns(name, rows)
        for line, cells in rows:
            yield _row_record(Source(name, line), columns, cells)


def _rows(name: str, reader: Any) -> Iterator[tuple[int, list[str] | Phrase]]:
    """Line and cells of each row that is not blank; a phrase instead of cells says why they cannot be told apart."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if reader.line_num > line:
                raise _broken_row(Source(name, line), error) from None
            yield line, Phrase("the row cannot be read: {problem}", problem=error)
        else:
            if cells:
                yield line, cells


def _broken_row(place: Source, problem: object) -> UsageError:
    return UsageError(
        "data.broken_table",
        "{place}: the row that begins here cannot be told from those after it: {problem}. Correct its quotation "
        'marks (a cell with "quotes" is written "a cell with ""quotes""").',
        place=place,
        problem=problem,
    )


def _columns(name: str, rows: Iterator[tuple[int, list[str] | Phrase]]) -> list[str]:
    """The names in the header, the first row."""
    line, cells = next(rows, (1, []))
    place = Source(name, line)
    if isinstance(cells, Phrase):
        raise _broken_row(place, cells)
    if not _is_unicode("".join(cells)):
        raise not_utf8(place)
    columns = [cell.strip() for cell in cells]
    _refuse_duplicates(place, [column for column in columns if column])
    return columns


def _refuse_duplicates(place: Source, columns: list[str]) -> None:
    for number, column in enumerate(columns):
        if column in columns[:number]:
            raise UsageError(
                "data.duplicate_column",
                "{place}: duplicate column {column!r}. Rename or remove one.",
                place=place,
                column=column,
            )


def _row_record(source: Source, columns: list[str], cells: list[str] | Phrase) -> RawRecord:
    if isinstance(cells, Phrase):
        return RawRecord(source, problem=cells)
    if len(cells) != len(columns):
        return RawRecord(
            source,
            problem=Phrase(
                "{cells} cells under a header of {columns} (a cell with the separator in it needs quotation marks)",
                cells=len(cells),
                columns=len(columns),
            ),
        )
    row = "".join(cells)
    if "\0" in row:
        field = next(column for column, cell in zip(columns, cells, strict=True) if "\0" in cell)
        return RawRecord(source, problem=Phrase("{field} has a NUL byte, which is no text", field=field))
    if not _is_unicode(row):
        field = next(column for column, cell in zip(columns, cells, strict=True) if not _is_unicode(cell))
        return RawRecord(source, problem=Phrase("{field} is not UTF-8 text", field=field))
    return RawRecord(source, {column: cell for column, cell in zip(columns, cells, strict=True) if column and cell})


def _is_unicode(text: str) -> bool:
    """Whether it was UTF-8: `surrogateescape` keeps the bytes that were not as lone surrogates."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@stops_at_damage
def read_parquet(path: Path) -> Iterator[RawRecord]:
    """Rows of a Parquet file, a few at a time; the line of a record is its row, from 1. Nulls are left out.

    Raises:
        UsageError: not a Parquet file, damaged, in an encoding that Arrow does not read, or a column name twice.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_bytes(path) as head:
        refuse_pointer(path, head.peek(HEAD))
    name = str(path)
    try:
        with pq.ParquetFile(path, buffer_size=PAGE_BUFFER, pre_buffer=False, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            _refuse_duplicates(Source(name, 1), schema.names)
            plain = {field.name: change for field in schema if (change := _plain(field.type)) is not None}
            for number, row in enumerate(_parquet_rows(file), start=1):
                yield _parquet_record(Source(name, number), row, plain)
    except pa.ArrowException as error:
        raise OSError(str(error)) from error


def _parquet_rows(file: pq.ParquetFile) -> Iterator[dict[str, Any] | Phrase]:
    """Each row's values, or what is wrong with them."""
    for batch in file.iter_batches(batch_size=BATCH, use_threads=False):
        try:
            yield from batch.to_pylist()
        except (ValueError, OverflowError):
            yield from (_single_row(batch, index) for index in range(batch.num_rows))


def _single_row(batch: pa.RecordBatch, index: int) -> dict[str, Any] | Phrase:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[index].as_py()
        except UnicodeDecodeError:
            return Phrase("{field} is not UTF-8 text", field=name)
        except (ValueError, OverflowError) as error:  # a date beyond Python's calendar
            return Phrase("the row cannot be read: {problem}", problem=f"{name}: {error}")
    return row


def _parquet_record(source: Source, row: dict[str, Any] | Phrase, plain: dict[str, Callable[[Any], Any]]) -> RawRecord:
    if isinstance(row, Phrase):
        return RawRecord(source, problem=row)
    record = {}
    for name, value in row.items():
        if value is None:
            continue
        try:
            record[name] = plain[name](value) if name in plain else value
        except ValueError as error:
            return RawRecord(source, problem=Phrase("the row cannot be read: {problem}", problem=f"{name}: {error}"))
    return RawRecord(source, record)


def _plain(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """How a value of a nested type becomes what JSON would hold; None for types without structs and maps inside.

    Arrow gives every struct of a column the fields of all of them, null where a row had none: such a field is no key of
    the row. A map holds the keys it was given, so a null in it is a null; and so is one in a list.
    """
    import pyarrow as pa
    import pyarrow.types as types

    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type)
    if types.is_struct(kind):
        fields = [(field.name, _plain(field.type) or _same) for field in kind]
        return lambda value: {name: change(value[name]) for name, change in fields if value[name] is not None}
    if types.is_map(kind):
        change = _plain(kind.item_type) or _same
        return lambda value: _from_map(value, change)
    if isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType | pa.ListViewType | pa.LargeListViewType):
        inner = _plain(kind.value_type)
        if inner is not None:
            return lambda value: [None if item is None else inner(item) for item in value]
    return None


def _same(value: Any) -> Any:
    return value


def _from_map(entries: list[tuple[Any, Any]], change: Callable[[Any], Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in entries:
        if str(key) in found:
            raise ValueError(f"the key {key!r} stands in the map twice")
        found[str(key)] = None if value is None else change(value)
    return found
