"""Training examples in memory-mapped Arrow files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from firefly.data.ledger import Ledger
from firefly.data.schema import Source, Tokens

SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
INDEX = np.dtype([("length", "<i4"), ("targets", "<i4"), ("line", "<i4")])
"""An example: its tokens, its trained tokens, and the line of its row. Kept beside the tokens, so that planning the
steps of a run does not read them."""
ROWS = np.dtype([("line", "<i4"), ("content", "<u8"), ("answer", "<u8")])
"""A kept row: its line, and hashes of what is trained of it and of its last answer (0: none)."""


class ExampleFile:
    """The examples of one data file, prepared and cached.

    Attributes:
        lengths: tokens of each example, int64 (examples,).
        targets: trained tokens of each example, int64 (examples,).
        lines: line of each example's row in its file, int32 (examples,).
        rows: kept rows, ROWS (rows,).
    """

    def __init__(self, folder: Path, ledger: Ledger) -> None:
        self.ledger = ledger
        reader = pa.ipc.open_file(pa.memory_map(str(folder / "examples.arrow")))
        self._batches = [_Batch.of(reader.get_batch(i)) for i in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(len(batch.offsets) - 1 for batch in self._batches)])
        index = np.load(folder / "index.npy")
        self.lengths, self.targets = index["length"].astype(np.int64), index["targets"].astype(np.int64)
        self.lines = index["line"]
        self.rows = np.load(folder / "rows.npy")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Tokens:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._batches[number].tokens(index - int(self._starts[number]))


class Examples:
    """The examples of a run: those of its files, as often as its mixture says.

    Attributes:
        lengths, targets, lines: as in ExampleFile, over all examples.
        names: the names of the sources.
        sources: the source of each example, an index into `names`, int32 (examples,).
        fingerprint: hash of everything that shaped the examples.
        ledger: the sum of the files' ledgers.
    """

    def __init__(
        self,
        files: Sequence[ExampleFile],
        order: np.ndarray,
        fingerprint: str,
        names: Sequence[str] = (),
        source_of_file: Sequence[int] = (),
    ) -> None:
        self.fingerprint = fingerprint
        self.files = list(files)
        self.ledgers = [file.ledger for file in files]
        self.ledger = Ledger.total(self.ledgers)
        self.names = list(names)
        self._order = order
        self._starts = np.cumsum([0, *(len(file) for file in files)])
        self.lengths = _concatenate([file.lengths for file in files])[order]
        self.targets = _concatenate([file.targets for file in files])[order]
        self.lines = _concatenate([file.lines for file in files])[order]
        self._file_of = np.searchsorted(self._starts, order, side="right") - 1
        given = np.asarray(source_of_file or [0] * len(self.files), dtype=np.int32)
        self.sources = given[self._file_of] if len(order) else np.zeros(0, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Tokens:
        number = int(self._file_of[index])
        return self.files[number][int(self._order[index] - self._starts[number])]

    def place(self, index: int) -> Source:
        """File and line of an example's row."""
        return Source(self.files[int(self._file_of[index])].ledger.file, int(self.lines[index]))


@dataclass(frozen=True)
class _Batch:
    """Zero-copy views of one Arrow record batch."""

    ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> _Batch:
        ids, labels = batch.columns
        return cls(ids.values.to_numpy(), labels.values.to_numpy(), ids.offsets.to_numpy())

    def tokens(self, row: int) -> Tokens:
        span = slice(self.offsets[row], self.offsets[row + 1])
        return Tokens(self.ids[span], self.labels[span])


def _concatenate(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)


def record_batch(examples: Sequence[Tokens]) -> pa.RecordBatch:
    """Examples as one Arrow batch."""
    offsets = pa.array(np.cumsum([0, *(len(tokens.input_ids) for tokens in examples)], dtype=np.int32))
    columns = [
        pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([getattr(tokens, name) for tokens in examples])))
        for name in ("input_ids", "labels")
    ]
    return pa.record_batch(columns, schema=SCHEMA)
