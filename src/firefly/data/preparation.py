"""One data file becomes cached examples: read, parsed, rendered, tokenised, fitted to the length, accounted for.

While one chunk of rows is tokenised (in threads of the tokenizer's own), the next is read and rendered.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from firefly.config import DataConfig
from firefly.data.encoding import Encoder
from firefly.data.examples import INDEX, ROWS, SCHEMA, record_batch
from firefly.data.formats import MalformedRecord, Parsed, TaskName, parse_record
from firefly.data.ledger import BLANK, CUT, EMPTY_ANSWER, MALFORMED, NO_TARGET, REFUSED, TOO_LONG, Ledger
from firefly.data.schema import (
    IGNORE,
    Conversation,
    Document,
    PreferencePair,
    RawRecord,
    Rendered,
    Source,
    Tokens,
)
from firefly.data.templates import TemplateFailure
from firefly.messages import render

CHUNK = 1000
"""Rows that are tokenised in one call and written as one Arrow batch."""


def prepare(
    records: Iterator[RawRecord], file: str, config: DataConfig, encoder: Encoder, task: TaskName, folder: Path
) -> None:
    """Write examples.arrow, index.npy, rows.npy and ledger.json into `folder`, which appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        preparation = Preparation(config, encoder, task, Ledger(file))
        index, rows = [], []
        with pa.OSFile(str(scratch / "examples.arrow"), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for chunk in preparation.run(with_progress(records, file)):
                if chunk:
                    writer.write_batch(record_batch([tokens for row in chunk for tokens in row.examples]))
                    index.append(_index(chunk))
                    rows.append(np.array([(row.source.line, row.content, row.answer) for row in chunk], dtype=ROWS))
        np.save(scratch / "index.npy", np.concatenate(index) if index else np.zeros(0, INDEX))
        np.save(scratch / "rows.npy", np.concatenate(rows) if rows else np.zeros(0, ROWS))
        stored = json.dumps(preparation.ledger.as_dict(), ensure_ascii=False)
        (scratch / "ledger.json").write_text(stored, encoding="utf-8")
        try:
            scratch.rename(folder)
        except OSError:  # another run prepared the same examples first: theirs are the same
            if not (folder / "ledger.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def with_progress(records: Iterator[RawRecord], file: str) -> Iterator[RawRecord]:
    """Count the rows on a terminal, once preparation has taken a while."""
    return iter(
        tqdm(records, desc=Path(file).name, unit=f" {render('progress.row')}", delay=2, disable=None, leave=False)
    )


def _index(chunk: Sequence[KeptRow]) -> np.ndarray:
    return np.array(
        [
            (len(tokens.input_ids), targets, row.source.line)
            for row in chunk
            for tokens, targets in zip(row.examples, row.targets, strict=True)
        ],
        dtype=INDEX,
    )


@dataclass(frozen=True, slots=True)
class KeptRow:
    """The examples of one row with their counts of trained tokens, and hashes of its content and last answer."""

    source: Source
    examples: list[Tokens]
    targets: list[int]
    content: int
    answer: int


@dataclass(frozen=True, slots=True)
class _Row:
    """A parsed row on its way to tokens: texts to tokenise, or examples that come as tokens."""

    source: Source
    texts: list[Rendered]
    ready: list[Tokens]
    answer: int = 0


@dataclass(frozen=True)
class Preparation:
    """The rows of one file on their way; every one of them is accounted for in `ledger`."""

    config: DataConfig
    encoder: Encoder
    task: TaskName
    ledger: Ledger

    def run(self, records: Iterator[RawRecord]) -> Iterator[list[KeptRow]]:
        """Yield the kept rows, chunk by chunk, in file order."""
        with _young_garbage_only(), ThreadPoolExecutor(1, "firefly-tokenise") as executor:
            pending: tuple[list[_Row], list[Rendered], Future[list[Any]]] | None = None
            while chunk := list(itertools.islice(records, CHUNK)):
                rows = [row for record in chunk if (row := self._read(record)) is not None]
                texts = [text for row in rows for text in row.texts]
                future = executor.submit(self.encoder.tokenize, texts)
                if pending:
                    yield self._finish(*pending)
                    gc.collect(0)
                pending = rows, texts, future
            if pending:
                yield self._finish(*pending)

    def _read(self, record: RawRecord) -> _Row | None:
        """Parse and render one record; None for one that is lost."""
        if record.blank:
            self.ledger.note(record.source, BLANK, render("finding.blank_line"))
            return None
        self.ledger.rows += 1
        try:
            if record.problem is not None:
                raise _Problem(record.problem)
            return self._render(record.source, self._parse(record.value))
        except MalformedRecord as error:
            self.ledger.lose(record.source, MALFORMED, str(error))
        except TemplateFailure as error:
            self.ledger.lose(record.source, REFUSED, str(error))
        return None

    def _parse(self, value: Any) -> Parsed:
        name, parsed = parse_record(value, self.task, self.config.data_format)
        self.ledger.formats[name] += 1
        return parsed

    def _render(self, source: Source, parsed: Parsed) -> _Row:
        if isinstance(parsed, Conversation):
            chosen = select_targets(parsed, self.config.train_on)
            return _Row(source, self.encoder.render(chosen), [], self._answer(source, chosen))
        if isinstance(parsed, PreferencePair):
            pair = [self.encoder.render(item) for item in (parsed.chosen, parsed.rejected)]
            answer = self._answer(source, parsed.chosen)
            if any(len(texts) != 1 for texts in pair):
                raise MalformedRecord("row.no_target")
            return _Row(source, [texts[0] for texts in pair], [], answer)
        if isinstance(parsed, Document):
            tokens = self.encoder.encode_documents([parsed.text]) if parsed.text.strip() else []
            return _Row(source, [], tokens)
        vocabulary = len(self.encoder.tokenizer)
        if parsed.input_ids.max() >= vocabulary:
            raise MalformedRecord("row.id_too_large", id=int(parsed.input_ids.max()), vocabulary=vocabulary)
        return _Row(source, [], [parsed])

    def _answer(self, source: Source, conversation: Conversation) -> int:
        """Hash of the last reply; an empty one is noted."""
        last = next((item for item in reversed(conversation.messages) if item.role == "assistant"), None)
        if last is None or last.tool_calls:
            return 0
        content = last.content.strip()
        if not content:
            self.ledger.note(source, EMPTY_ANSWER, render("finding.empty_answer"))
            return 0
        return _hash([content.encode()])

    def _finish(self, rows: list[_Row], texts: list[Rendered], encodings: Future[list[Any]]) -> list[KeptRow]:
        tokens = iter(self.encoder.label(texts, encodings.result()))
        kept = []
        for row in rows:
            examples = row.ready or [next(tokens) for _ in row.texts]
            fitted = self._fit(row.source, examples)
            if fitted:
                parts = [text.text.encode() for text in row.texts] or [item.input_ids.tobytes() for item in row.ready]
                content = _hash(parts)
                tokens_of, targets = [item for item, _ in fitted], [count for _, count in fitted]
                kept.append(KeptRow(row.source, tokens_of, targets, content, row.answer))
        return kept

    def _fit(self, source: Source, examples: list[Tokens]) -> list[tuple[Tokens, int]]:
        """Fit a row's examples to the length limit, count their targets, and write the row's fate on the ledger."""
        ledger, limit = self.ledger, self.config.max_seq_length
        if self.task == "pretrain":  # a document is cut into blocks, not to a length
            fitted: list[Tokens | None] = list(examples)
        else:
            fitted = [fit(tokens, limit, self.config.on_too_long) for tokens in examples]
        kept = [(tokens, count) for tokens in fitted if tokens is not None and (count := tokens.num_targets)]
        if self.task == "dpo" and len(kept) < len(examples):
            kept = []
        if not kept:
            if any(tokens.num_targets for tokens in examples):
                longest = max(len(tokens.input_ids) for tokens in examples)
                code = "row.too_long" if self.config.on_too_long in ("cut_turns", "cut") else "row.over_limit"
                ledger.lose(source, TOO_LONG, render(code, tokens=longest, limit=limit))
            else:
                ledger.lose(source, NO_TARGET, render("row.no_target"))
            return []
        total, left = sum(len(t.input_ids) for t in examples), sum(len(t.input_ids) for t, _ in kept)
        trained = sum(count for _, count in kept)
        if left < total:
            targets = sum(tokens.num_targets for tokens in examples) - trained
            turns = sum(map(count_turns, examples)) - sum(count_turns(tokens) for tokens, _ in kept)
            ledger.cut += 1
            ledger.cut_tokens += total - left
            ledger.cut_turns += turns
            message = render("row.cut", tokens=total, kept=left, targets=targets, turns=turns, limit=limit)
            ledger.note(source, CUT, message)
        else:
            ledger.kept += 1
        ledger.examples += len(kept)
        ledger.tokens += left
        ledger.target_tokens += trained
        return kept


@contextmanager
def _young_garbage_only() -> Iterator[None]:
    """Rows make many objects and no old garbage: full collections, which walk through every library, find nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Problem(MalformedRecord):
    """A record that its reader could not read, already explained."""

    def __init__(self, text: str) -> None:
        Exception.__init__(self, text)


def _hash(parts: Sequence[bytes]) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")


def select_targets(conversation: Conversation, train_on: str) -> Conversation:
    """`train_on: last` trains the last reply alone."""
    if train_on == "all":
        return conversation
    last = max((i for i, item in enumerate(conversation.messages) if item.role == "assistant"), default=None)
    narrowed = (item if i == last else replace(item, trained=False) for i, item in enumerate(conversation.messages))
    return replace(conversation, messages=tuple(narrowed))


def count_turns(tokens: Tokens) -> int:
    """Trained runs: replies with their stop tokens."""
    return len(_ends_of_turns(tokens))


def _ends_of_turns(tokens: Tokens) -> np.ndarray:
    trained = tokens.labels != IGNORE
    return np.flatnonzero(trained & ~np.append(trained[1:], False)) + 1


def fit(tokens: Tokens, max_length: int, policy: str = "cut_turns") -> Tokens | None:
    """Cut an example to `max_length` tokens; None if no target would be left, or the policy has no cut one.

    Args:
        policy: `cut_turns` cuts after the last trained run (reply and stop token) that fits whole or, where not even
            the first one does, within it; `cut` at the limit; `drop` and `error` not at all.
    """
    if len(tokens.input_ids) <= max_length:
        return tokens
    if policy in ("drop", "error"):
        return None
    length = max_length
    if policy == "cut_turns":
        ends = _ends_of_turns(tokens)
        fitting = ends[ends <= max_length]
        length = int(fitting[-1]) if len(fitting) else max_length
    cut = Tokens(tokens.input_ids[:length], tokens.labels[:length])
    return cut if cut.num_targets else None
