"""Training examples in memory-mapped Arrow files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from firefly.data.ledger import Ledger
from firefly.data.schema import Example, Source, TokenPair, Tokens

SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
FIELDS = ("length", "targets", "line", "row", "prompt", "chosen", "chosen_targets")
INDEX = np.dtype([*((name, "<i4") for name in FIELDS), ("value", "<f4"), ("digest", "<u8")])
"""An example: its tokens, its trained tokens, the line of its row and the row's number among those kept; of a
preference pair also the tokens of prompt and chosen answer, and how many of the latter are trained (0 otherwise); what
its record says of it in a number (the margin of a pair, 1 or 0 for a desirable answer or another; NaN: nothing); and a
hash of all that is trained of it. Kept beside the tokens, so that planning the steps of a run, and telling whether it
is the same run, does not read them."""
ROWS = np.dtype([("line", "<i4"), ("content", "<u8"), ("answer", "<u8")])
"""A kept row: its line, and hashes of what is trained of it and of its last answer (0: none)."""

HOLD_OUT_SEED = 20231115


class ExampleFile:
    """The examples of one data file, prepared and cached.

    Attributes:
        index: what is known of each example without reading it, INDEX (examples,).
        rows: kept rows, ROWS (rows,).
    """

    def __init__(self, folder: Path, ledger: Ledger) -> None:
        self.folder = folder
        self.ledger = ledger
        reader = pa.ipc.open_file(pa.memory_map(str(folder / "examples.arrow")))
        self._batches = [_Batch.of(reader.get_batch(i)) for i in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(len(batch.offsets) - 1 for batch in self._batches)])
        self.index = np.load(folder / "index.npy")
        self.rows = np.load(folder / "rows.npy")

    def __reduce__(self) -> tuple[Any, ...]:
        """A data worker that is sent it opens the files anew."""
        return ExampleFile, (self.folder, self.ledger)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Example:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        ids, labels = self._batches[number].row(index - int(self._starts[number]))
        known = self.index[index]
        value = None if np.isnan(known["value"]) else float(known["value"])
        if known["chosen"]:
            return TokenPair(ids, labels, int(known["prompt"]), int(known["chosen"]), margin=value)
        return Tokens(ids, labels, desirable=None if value is None else bool(value))


@dataclass(frozen=True)
class ExampleCounts:
    """What a run's plan needs to know of its examples, each int64 (examples,).

    Attributes:
        lengths: tokens as they are laid out, the prompt of a preference pair once.
        targets: trained tokens.
        input_tokens: tokens as users count them, the prompt of a pair once for each answer.
        prompt, chosen, chosen_targets: of a pair: tokens of its prompt, of its chosen answer, and how many of the
            latter are trained; 0 otherwise.
        segments: stretches that attend to nothing beyond themselves, or to a pair's prompt: a document of a block, a
            conversation, the prompt or an answer of a pair.
        sources: the number of each example's source.
    """

    lengths: np.ndarray
    targets: np.ndarray
    input_tokens: np.ndarray
    prompt: np.ndarray
    chosen: np.ndarray
    chosen_targets: np.ndarray
    segments: np.ndarray
    sources: np.ndarray

    @classmethod
    def of(cls, index: np.ndarray, sources: np.ndarray) -> ExampleCounts:
        """Those of INDEX."""
        length, targets, prompt, chosen, chosen_targets = (
            index[name].astype(np.int64) for name in ("length", "targets", "prompt", "chosen", "chosen_targets")
        )
        segments = np.where(chosen > 0, 3, 1)
        return cls(length, targets, length + prompt, prompt, chosen, chosen_targets, segments, sources)

    @property
    def sides(self) -> np.ndarray:
        """Tokens of the longest text in each example: all of it, or a pair's prompt with the longer answer."""
        return self.prompt + np.maximum(self.chosen, self.lengths - self.prompt - self.chosen)


class Examples:
    """The examples of a run: those of its files, as often as its mixture says.

    Attributes:
        index: as in ExampleFile, over all examples.
        names: the names of the sources.
        sources: the source of each example, an index into `names`, int32 (examples,).
        fingerprint: hash of the examples in their order: ids, labels and borders, wherever they came from.
        hashes: the hash of the bytes of each data file, by its path.
        ledger: the sum of the files' ledgers.
    """

    def __init__(
        self,
        files: Sequence[ExampleFile],
        order: np.ndarray,
        names: Sequence[str] = (),
        source_of_file: Sequence[int] = (),
        hashes: Mapping[str, str] | None = None,
    ) -> None:
        self.hashes = dict(hashes or {})
        self.files = list(files)
        self.ledgers = [file.ledger for file in files]
        self.ledger = Ledger.total(self.ledgers)
        self.names = list(names)
        self._order = order
        self._starts = np.cumsum([0, *(len(file) for file in files)])
        self.index = np.concatenate([file.index for file in files])[order] if files else np.zeros(0, INDEX)
        self.fingerprint = digest(self.index["digest"])
        self._file_of = np.searchsorted(self._starts, order, side="right") - 1
        self._source_of_file = list(source_of_file or [0] * len(self.files))
        given = np.asarray(self._source_of_file, dtype=np.int32)
        self.sources = given[self._file_of] if len(order) else np.zeros(0, dtype=np.int32)
        self.counts = ExampleCounts.of(self.index, self.sources)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Example:
        number = int(self._file_of[index])
        return self.files[number][int(self._order[index] - self._starts[number])]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 (examples,)."""
        return self.counts.lengths

    @property
    def targets(self) -> np.ndarray:
        """Trained tokens of each example, int64 (examples,)."""
        return self.counts.targets

    def longest_text(self) -> tuple[int, int]:
        """(tokens of the longest text, the number of its example); (0, 0) without examples."""
        sides = self.counts.sides
        return (int(sides.max()), int(sides.argmax())) if len(sides) else (0, 0)

    def place(self, index: int) -> Source:
        """File and line of an example's row."""
        return Source(self.files[int(self._file_of[index])].ledger.file, int(self.index["line"][index]))

    def part(self, chosen: np.ndarray) -> Examples:
        """The examples at `chosen` (indices in order)."""
        part = Examples(self.files, self._order[chosen], self.names, self._source_of_file, self.hashes)
        part.ledgers, part.ledger = self.ledgers, self.ledger
        return part

    def hold_out(self, share: float) -> tuple[Examples, Examples]:
        """(training, held-out) examples: a fixed `share` of the rows, at least one, with all their examples.

        Equal rows count as one: none is trained and held out. Which rows does not depend on a run's seed, so runs of
        one data set are compared on the same ones.
        """
        contents = [file.rows["content"][file.index["row"]] for file in self.files]
        _, first, row_of = np.unique(np.concatenate(contents)[self._order], return_index=True, return_inverse=True)
        drawn = np.random.default_rng(HOLD_OUT_SEED).permutation(len(first))
        held = np.zeros(len(first), dtype=bool)
        held[np.argsort(first)[drawn[: max(1, round(share * len(first)))]]] = True  # rows in order of appearance
        inside = held[row_of]
        return self.part(np.flatnonzero(~inside)), self.part(np.flatnonzero(inside))


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

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        span = slice(self.offsets[number], self.offsets[number + 1])
        return self.ids[span], self.labels[span]


def index_entry(example: Example, line: int, row: int) -> tuple[float, ...]:
    """An example's line of INDEX; `row` is the number of its row among those kept."""
    if isinstance(example, TokenPair):
        pair, value = (example.prompt, example.chosen, example.chosen_targets), example.margin
    else:
        pair, value = (0, 0, 0), example.desirable
    content = hashlib.blake2b(repr(pair[:2]).encode(), digest_size=8)
    if value is not None:
        content.update(np.float32(value).tobytes())
    content.update(np.ascontiguousarray(example.input_ids, dtype="<i4").data)
    content.update(np.ascontiguousarray(example.labels, dtype="<i4").data)
    return (
        len(example.input_ids),
        example.num_targets,
        line,
        row,
        *pair,
        np.nan if value is None else float(value),
        int.from_bytes(content.digest(), "little"),
    )


def digest(*columns: np.ndarray) -> str:
    """A hash of arrays, each with its length."""
    found = hashlib.sha256()
    for column in columns:
        found.update(str(len(column)).encode())
        found.update(np.ascontiguousarray(column).data)
    return found.hexdigest()[:32]


def record_batch(examples: Sequence[Example]) -> pa.RecordBatch:
    """Examples as one Arrow batch."""
    offsets = pa.array(np.cumsum([0, *(len(tokens.input_ids) for tokens in examples)], dtype=np.int32))
    columns = [
        pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([getattr(tokens, name) for tokens in examples])))
        for name in ("input_ids", "labels")
    ]
    return pa.record_batch(columns, schema=SCHEMA)
