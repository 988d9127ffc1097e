"""A data file becomes examples: read, parsed, rendered, tokenised, fitted to the length, accounted for, cached.

The cache is one Arrow file, memory-mapped, under a key of everything that shaped it: data bytes, template, tokenizer,
lengths, policies and this package's own code.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from firefly.config import DataConfig
from firefly.data.encoding import Encoder
from firefly.data.formats import MalformedRecord, parse_record
from firefly.data.ledger import MALFORMED, NO_TARGET, TOO_LONG, Ledger
from firefly.data.readers import read_records
from firefly.data.schema import IGNORE, Conversation, RawRecord, Rendered, Source, Tokens
from firefly.data.templates import TemplateFailure
from firefly.errors import UsageError
from firefly.messages import language, render

SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())), ("line", pa.int32())])
CHUNK = 1000
"""Rows that are tokenised in one call and written as one Arrow batch."""


class Examples:
    """Training examples in a memory-mapped Arrow file.

    Attributes:
        lengths: tokens of each example, int64 (examples,).
        targets: trained tokens of each example, int64 (examples,).
        lines: line of each example's row in its file, int32 (examples,).
        fingerprint: hash of everything that shaped the examples.
    """

    def __init__(self, path: Path, fingerprint: str, ledger: Ledger) -> None:
        self.fingerprint = fingerprint
        self.ledger = ledger
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [_Batch.of(reader.get_batch(i)) for i in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(len(batch.lines) for batch in self._batches)])
        self.lengths = _concatenate([np.diff(batch.offsets) for batch in self._batches])
        self.targets = _concatenate([batch.count_targets() for batch in self._batches])
        self.lines = _concatenate([batch.lines for batch in self._batches])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Tokens:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._batches[number].tokens(index - int(self._starts[number]))


@dataclass(frozen=True)
class _Batch:
    """Zero-copy views of one Arrow record batch."""

    ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    lines: np.ndarray

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> _Batch:
        ids, labels, lines = batch.columns
        return cls(
            ids.values.to_numpy(), labels.values.to_numpy(), ids.offsets.to_numpy().astype(np.int64), lines.to_numpy()
        )

    def tokens(self, row: int) -> Tokens:
        span = slice(self.offsets[row], self.offsets[row + 1])
        return Tokens(self.ids[span], self.labels[span])

    def count_targets(self) -> np.ndarray:
        trained = self.labels != IGNORE
        trained[self.offsets[:-1]] = False  # nothing predicts the first token
        return np.add.reduceat(trained.astype(np.int64), self.offsets[:-1])


def _concatenate(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)


def load_examples(file: str, config: DataConfig, encoder: Encoder, key: str = "train_file") -> Examples:
    """Return the examples of `file`, from the cache or prepared now, after the ledger has been checked.

    Args:
        key: the configuration key that names the file, for messages.

    Raises:
        UsageError: unreadable file, malformed rows, too many rows lost, or no example left.
    """
    path = Path(file).expanduser()
    records = read_records(path, key)  # names a missing or unknown file before it is hashed
    shape = fingerprint(path, config, encoder)
    folder = cache_folder() / "examples" / shape
    if not (folder / "ledger.json").is_file():
        prepare(records, str(path), config, encoder, folder)
    ledger = Ledger.from_dict(json.loads((folder / "ledger.json").read_text(encoding="utf-8")))
    ledger.check(config.max_malformed_rows, config.max_lost_share)
    return Examples(folder / "examples.arrow", shape, ledger)


def prepare(records: Iterator[RawRecord], file: str, config: DataConfig, encoder: Encoder, folder: Path) -> None:
    """Write examples.arrow and ledger.json into `folder`, which appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        ledger = Ledger(file)
        with pa.OSFile(str(scratch / "examples.arrow"), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            while chunk := list(itertools.islice(records, CHUNK)):
                rows = list(_encode_chunk(chunk, config, encoder, ledger))
                if rows:
                    writer.write_batch(_record_batch(rows))
        (scratch / "ledger.json").write_text(json.dumps(ledger.as_dict(), ensure_ascii=False), encoding="utf-8")
        try:
            scratch.rename(folder)
        except OSError:  # another run prepared the same examples first: theirs are the same
            if not (folder / "ledger.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _encode_chunk(
    chunk: list[RawRecord], config: DataConfig, encoder: Encoder, ledger: Ledger
) -> Iterator[tuple[Tokens, int]]:
    """Yield the examples of some records; every record is accounted for in `ledger`."""
    rows: list[tuple[Source, list[Rendered] | Tokens]] = []
    for record in chunk:
        ledger.rows += 1
        try:
            rows.append((record.source, _render_record(record, config, encoder, ledger)))
        except (MalformedRecord, TemplateFailure) as error:
            ledger.lose(record.source, MALFORMED, str(error))
    encoded = iter(encoder.encode_rendered([text for _, item in rows if isinstance(item, list) for text in item]))
    vocabulary = len(encoder.tokenizer)
    for source, item in rows:
        examples = [item] if isinstance(item, Tokens) else [next(encoded) for _ in item]
        if isinstance(item, Tokens) and item.input_ids.max() >= vocabulary:
            message = render("row.id_too_large", id=int(item.input_ids.max()), vocabulary=vocabulary)
            ledger.lose(source, MALFORMED, message)
            continue
        for tokens in _fit_row(source, examples, config.max_seq_length, ledger):
            yield tokens, source.line


def _render_record(record: RawRecord, config: DataConfig, encoder: Encoder, ledger: Ledger) -> list[Rendered] | Tokens:
    if record.problem is not None:
        raise _Problem(record.problem)
    name, parsed = parse_record(record.value)
    ledger.formats[name] += 1
    if isinstance(parsed, Tokens):
        return parsed
    return encoder.render(_select_targets(parsed, config.train_on))


class _Problem(MalformedRecord):
    """A record that its reader could not read, already explained."""

    def __init__(self, text: str) -> None:
        Exception.__init__(self, text)


def _select_targets(conversation: Conversation, train_on: str) -> Conversation:
    """`train_on: last` trains the last reply alone."""
    if train_on == "all":
        return conversation
    last = max((i for i, item in enumerate(conversation.messages) if item.role == "assistant"), default=None)
    return Conversation(
        tuple(item if i == last else replace(item, trained=False) for i, item in enumerate(conversation.messages))
    )


def _fit_row(source: Source, examples: list[Tokens], max_length: int, ledger: Ledger) -> list[Tokens]:
    """Fit a row's examples to `max_length` and write its fate on the ledger."""
    fitted = [fit(tokens, max_length) for tokens in examples]
    kept = [tokens for tokens in fitted if tokens is not None and tokens.num_targets]
    total, longest = (
        sum(len(tokens.input_ids) for tokens in examples),
        max((len(t.input_ids) for t in examples), default=0),
    )
    left = sum(len(tokens.input_ids) for tokens in kept)
    if not kept:
        if any(tokens.num_targets for tokens in examples):
            ledger.lose(source, TOO_LONG, render("row.too_long", tokens=longest, limit=max_length))
        else:
            ledger.lose(source, NO_TARGET, render("row.no_target"))
        return []
    if left < total:
        ledger.cut += 1
        ledger.cut_tokens += total - left
        targets = sum(tokens.num_targets for tokens in examples) - sum(tokens.num_targets for tokens in kept)
        ledger.note(source, "cut", render("row.cut", tokens=total, kept=left, targets=targets, limit=max_length))
    else:
        ledger.kept += 1
    ledger.examples += len(kept)
    ledger.tokens += left
    ledger.target_tokens += sum(tokens.num_targets for tokens in kept)
    return kept


def fit(tokens: Tokens, max_length: int) -> Tokens | None:
    """Cut an example to `max_length` tokens: after the last trained run (reply and stop token) that fits whole, or,
    where not even the first one does, within it. None if no target would be left.
    """
    if len(tokens.input_ids) <= max_length:
        return tokens
    trained = tokens.labels != IGNORE
    ends = np.flatnonzero(trained & ~np.append(trained[1:], False)) + 1
    fitting = ends[ends <= max_length]
    length = int(fitting[-1]) if len(fitting) else max_length
    cut = Tokens(tokens.input_ids[:length], tokens.labels[:length])
    return cut if cut.num_targets else None


def _record_batch(rows: list[tuple[Tokens, int]]) -> pa.RecordBatch:
    lengths = [len(tokens.input_ids) for tokens, _ in rows]
    offsets = pa.array(np.cumsum([0, *lengths], dtype=np.int32))
    columns = [
        pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([getattr(tokens, name) for tokens, _ in rows])))
        for name in ("input_ids", "labels")
    ]
    return pa.record_batch([*columns, pa.array([line for _, line in rows], pa.int32())], schema=SCHEMA)


def fingerprint(path: Path, config: DataConfig, encoder: Encoder) -> str:
    """Hash of everything that shapes the examples of a file (its name included: findings name it)."""
    parts: list[Any] = [
        str(path),
        hash_file(path),
        encoder.template.text,
        encoder.template.stop_tokens,
        encoder.template.variables,
        tokenizer_hash(encoder.tokenizer),
        config.max_seq_length,
        config.train_on,
        config.allow_special_in_content,
        language(),  # findings are stored as text
        code_hash(),
    ]
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()[:32]


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


@cache
def code_hash() -> str:
    """Hash of the data room's own source: a changed rule never reuses examples made by the old one."""
    import tokenizers
    import transformers

    digest = hashlib.sha256(f"{transformers.__version__} {tokenizers.__version__}".encode())
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def cache_folder() -> Path:
    """FIREFLY_CACHE, else firefly under XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("FIREFLY_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "firefly"


def load_split(config: DataConfig, encoder: Encoder) -> tuple[Examples, Examples | None]:
    """Training examples and, with `eval_file`, evaluation examples."""
    if not config.train_file:
        raise UsageError("config.missing_key", key="train_file")
    train = load_examples(config.train_file, config, encoder)
    held_out = load_examples(config.eval_file, config, encoder, "eval_file") if config.eval_file else None
    return train, held_out
