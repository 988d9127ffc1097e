"""From the configuration to the examples of a run: sources found, files prepared or taken from the cache, mixed.

Each file's examples are cached under a key of everything that shaped them: data bytes, template, tokenizer, lengths,
policies and this room's own code. A mixture of known files costs nothing anew.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from firefly.config import DataConfig, RecordKind, bad_choice, missing_key
from firefly.data.blocks import Blocks
from firefly.data.duplicates import note_findings
from firefly.data.encoding import Encoder
from firefly.data.examples import ExampleFile, Examples
from firefly.data.formats import FORMATS, MalformedRecord, detect_format
from firefly.data.ledger import Ledger, report
from firefly.data.preparation import prepare, prepare_once
from firefly.data.readers import read_records
from firefly.data.schema import RawRecord
from firefly.data.sources import DataSource, find_sources, hash_file, repeat
from firefly.errors import UsageError
from firefly.files import cache_folder, source_hash

PREPARATION_KEYS = (
    "train_file",
    "eval_ratio",
    "data_format",
    "text_documents",
    "template_date",
    "on_system",
    "thinking",
    "max_seq_length",
    "max_prompt_length",
    "document_attention",
    "on_too_long",
    "train_on",
    "allow_special_in_content",
)
"""Configuration keys that shape examples, beside files, template and tokenizer."""


@dataclass(frozen=True)
class Split:
    """Training examples and, with `eval_file` or `eval_ratio`, evaluation examples."""

    train: Examples | Blocks
    held_out: Examples | Blocks | None

    @property
    def has_eval_file(self) -> bool:
        """Whether the held-out examples come from files of their own, with a ledger of their own."""
        return self.held_out is not None and self.held_out.ledger is not self.train.ledger

    def report(self) -> dict[str, Any]:
        """What data_report.json says."""
        held_out = self.held_out
        of_eval = None if held_out is None else report(held_out.ledgers) if self.has_eval_file else {"of": "train_file"}
        counts = {"held_out_examples": len(held_out)} if held_out is not None else {}
        return report(self.train.ledgers) | {"eval": of_eval, "train_examples": len(self.train), **counts}

    def check(self, config: DataConfig) -> None:
        """Stop before anything is trained if too many rows are lost.

        Raises:
            UsageError: see `Ledger.check`.
        """
        for examples in (self.train, self.held_out if self.has_eval_file else None):
            if examples is not None:
                examples.ledger.check(config.max_malformed_rows, config.max_lost_share, config.on_too_long)


def load_split(
    config: DataConfig, encoder: Encoder, kind: RecordKind = "conversation", hub: str = "huggingface"
) -> Split:
    """Examples of `train_file` and `eval_file`, from the cache or prepared now. Their ledgers are not judged yet.

    Raises:
        UsageError: no such place, a file that is not what its name says, or a key with an impossible value.
    """
    if not config.train_file:
        raise missing_key("train_file")
    if config.data_format not in ("auto", *FORMATS):
        raise bad_choice("data_format", json.dumps(config.data_format), ("auto", *FORMATS))
    if kind == "document" and encoder.tokenizer.eos_token_id is None:
        raise UsageError(
            "data.no_eos",
            "task_type pretrain puts the tokenizer's EOS token between documents, and this tokenizer has none. Set "
            "eos_token in its tokenizer_config.json.",
        )
    # The tokenizers library makes its threads once, at the first text of a process: never more than there are cores.
    os.environ.setdefault("RAYON_NUM_THREADS", str(min(config.tokenize_num_workers, os.cpu_count() or 1)))
    loader = _Loader(config, encoder, kind)
    sources = find_sources(config.train_file, "train_file", hub)
    train = [loader.load(source, "train_file") for source in sources]
    held_sources = find_sources(config.eval_file, "eval_file", hub) if config.eval_file else []
    held_out = [loader.load(source, "eval_file") for source in held_sources]
    note_findings(*([file.examples for loaded in group for file in loaded] for group in (train, held_out)))
    trained = _mix(sources, train)
    held = _mix(held_sources, held_out) if held_sources else None
    if config.eval_ratio and len(trained):
        trained, held = _hold_out(trained, config.eval_ratio)
    if kind != "document":
        return Split(trained, held)
    return Split(_blocks(config, trained), None if held is None else _blocks(config, held))


def _blocks(config: DataConfig, documents: Examples) -> Blocks:
    return Blocks(documents, config.max_seq_length, config.document_attention == "isolated")


def _hold_out(examples: Examples, ratio: float) -> tuple[Examples, Examples]:
    trained, held = examples.hold_out(ratio)
    if not len(trained):
        raise UsageError(
            "data.hold_out_all",
            "eval_ratio = {ratio} leaves no example to train: the data has {count} row(s). Lower it, or set eval_file.",
            ratio=ratio,
            count=examples.ledger.rows,
        )
    return trained, held


def _mix(sources: list[DataSource], loaded: list[list[_Loaded]]) -> Examples:
    """Every source's examples, as often as its weight says."""
    order, start = [], 0
    for source, files in zip(sources, loaded, strict=True):
        count = sum(len(file.examples) for file in files)
        # Seeded by its name: which part of a source is shown does not depend on what it is mixed with.
        name = hashlib.sha256(source.name.encode("utf-8", "replace"))
        order.append(start + repeat(count, source.weight, seed=int.from_bytes(name.digest()[:4], "little")))
        start += count
    return Examples(
        files=[file.examples for files in loaded for file in files],
        order=np.concatenate(order),
        names=[source.name for source in sources],
        source_of_file=[number for number, files in enumerate(loaded) for _ in files],
        hashes={file.examples.ledger.file: file.content for files in loaded for file in files},
    )


@dataclass(frozen=True)
class _Loaded:
    """The examples of one data file, and the hash of the file's bytes."""

    examples: ExampleFile
    content: str


@dataclass(frozen=True)
class _Loader:
    config: DataConfig
    encoder: Encoder
    kind: RecordKind

    def load(self, source: DataSource, key: str) -> list[_Loaded]:
        """The examples of a source's files."""
        left, loaded = source.max_rows, []
        for path in source.files:
            if left == 0:
                break
            file = self._load_file(path, left, key)
            loaded.append(file)
            if left is not None:
                left -= file.examples.ledger.rows
        return loaded

    def _load_file(self, path: Path, max_rows: int | None, key: str) -> _Loaded:
        records = read_records(path, key, self.config.text_documents)  # names a missing file before it is hashed
        content = hash_file(path)
        shape = cache_key(path, self.config, self.encoder, self.kind, max_rows, content)
        folder = cache_folder() / "examples" / shape

        def make() -> None:
            prepare(_first(records, max_rows), str(path), self.config, self.encoder, self.kind, folder)

        if not (folder / "ledger.json").is_file():
            prepare_once(folder, str(path), make)
        ledger = Ledger.from_stored(json.loads((folder / "ledger.json").read_text(encoding="utf-8")))
        return _Loaded(ExampleFile(folder, ledger), content)


def _first(records: Iterator[RawRecord], count: int | None) -> Iterator[RawRecord]:
    """The records up to and with the `count`-th that is no blank line."""
    if count is None:
        return records
    seen = itertools.count()
    return itertools.takewhile(lambda record: record.blank or next(seen) < count, records)


def find_kind(config: DataConfig, hub: str = "huggingface") -> RecordKind:
    """What the first readable record of the training data holds; a conversation if none can be read."""
    for source in find_sources(config.train_file, "train_file", hub):
        for path in source.files:
            for record in itertools.islice(read_records(path, documents=config.text_documents), 100):
                if record.problem is None and not record.blank:
                    try:
                        name = config.data_format if config.data_format in FORMATS else detect_format(record.value)
                        return FORMATS[name].kind
                    except MalformedRecord:
                        continue
    return "conversation"


def cache_key(
    path: Path, config: DataConfig, encoder: Encoder, kind: RecordKind, max_rows: int | None, content: str
) -> str:
    """What a file's examples are cached under: a hash of everything that may shape them, the text of the programs that
    do included, and of its name, which findings have. Whether a run is the same is judged by the examples themselves.

    Args:
        content: hash of the file's bytes.
    """
    template = encoder.template
    shape = json.dumps(
        [
            str(path),
            content,
            template.name,  # findings name it
            template.text,
            template.stable,
            template.stop_tokens,
            template.variables,
            str(template.date),
            template.on_system,
            template.thinking,
            encoder.tokenizer_hash,
            encoder.tokenizer.eos_token_id if kind == "document" else None,
            kind,
            max_rows,
            config.data_format,
            config.text_documents,
            config.max_seq_length if kind != "document" else None,  # blocks are cut from cached documents
            config.max_prompt_length if kind == "pair" else None,
            config.on_too_long,
            config.train_on,
            config.allow_special_in_content,
            code_hash(),
        ]
    )
    return hashlib.sha256(shape.encode()).hexdigest()[:32]


def code_hash() -> str:
    """Of the data room's own source and of what renders and tokenizes for it."""
    import jinja2
    import tokenizers

    return source_hash(Path(__file__).parent, jinja2.__version__, tokenizers.__version__)
