"""Pretraining blocks are the stream document, EOS, document, EOS, … cut at equal lengths, nothing lost or repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firefly.config import DataConfig
from firefly.data import dataset
from firefly.data.batching import pack
from firefly.data.dataset import load_split
from firefly.data.encoding import Encoder
from firefly.data.templates import plain_template
from firefly.errors import UsageError
from tiny import tiny_tokenizer

TEXTS = ["a", "the second document", "第三篇文档。", "x" * 70, "typed <|im_end|> stays text", "last\nof them"]


def write_folder(folder: Path, texts: list[str], files: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        lines = [json.dumps({"text": text}) for text in texts[number::files]]
        (folder / f"part-{number}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def blocks_of(place: Any, **options: Any) -> Any:
    encoder = Encoder(tiny_tokenizer(), plain_template())
    return load_split(DataConfig(train_file=str(place), **options), encoder, "document")


def stream(texts: list[str]) -> list[int]:
    """Ids of the documents with EOS behind each, by the tokenizer alone; typed special tokens stay text."""
    tokenizer = tiny_tokenizer()
    return [
        token
        for text in texts
        for token in [*tokenizer(text, split_special_tokens=True)["input_ids"], tokenizer.eos_token_id]
    ]


@pytest.mark.parametrize("size", [2, 7, 16, 1000])
def test_blocks_laid_end_to_end_are_the_stream_of_a_folder(tmp_path: Path, size: int) -> None:
    folder = write_folder(tmp_path / "docs", TEXTS)
    train = blocks_of(folder, max_seq_length=size).train
    expected = stream(TEXTS[0::2] + TEXTS[1::2])
    assert np.concatenate([train[i].input_ids for i in range(len(train))]).tolist() == expected
    assert train.lengths.tolist() == [len(train[i].input_ids) for i in range(len(train))]
    assert set(train.lengths[:-1].tolist()) <= {size}
    assert train.targets.tolist() == [train[i].num_targets for i in range(len(train))]
    assert train.ledger.tokens == len(expected)


def test_a_document_is_a_segment_of_its_own_and_goes_on_in_the_next_block(tmp_path: Path) -> None:
    train = blocks_of(write_folder(tmp_path / "docs", ["abc", "defghij", "k"], 1), max_seq_length=6).train
    assert [train[i].starts for i in range(len(train))] == [(0, 4), (0,), (0,)]
    batch = pack([train[0], train[1], train[2]])
    assert [(segment.start, segment.end) for segment in batch.segments] == [(0, 4), (4, 6), (6, 12), (12, 14)]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 5, 0, 1]
    assert batch.target_index.tolist() == [0, 1, 2, 4, 6, 7, 8, 9, 10, 12]


def test_joined_documents_are_one_segment(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "docs", TEXTS)
    joined = blocks_of(folder, max_seq_length=16, document_attention="joined").train
    isolated = blocks_of(folder, max_seq_length=16).train
    assert all(joined[i].starts == (0,) for i in range(len(joined)))
    assert joined.targets.sum() > isolated.targets.sum()
    assert joined.targets.tolist() == [len(joined[i].input_ids) - 1 for i in range(len(joined))]
    assert joined.fingerprint != isolated.fingerprint


def test_another_block_length_reuses_the_cached_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "docs", TEXTS)
    first = blocks_of(folder, max_seq_length=16).train
    monkeypatch.setattr(dataset, "prepare", None)
    second = blocks_of(folder, max_seq_length=32).train
    assert first.fingerprint != second.fingerprint


def test_sources_of_a_mixture_keep_streams_of_their_own(tmp_path: Path) -> None:
    places = [write_folder(tmp_path / name, texts, 1) for name, texts in (("one", TEXTS[:3]), ("two", TEXTS[3:]))]
    mixture = tuple({"path": str(place), "name": place.name} for place in places)
    encoder = Encoder(tiny_tokenizer(), plain_template())
    train = load_split(DataConfig(train_file=mixture, max_seq_length=10), encoder, "document").train
    for number, texts in ((0, TEXTS[:3]), (1, TEXTS[3:])):
        ours = [train[int(i)].input_ids for i in np.flatnonzero(train.sources == number)]
        assert np.concatenate(ours).tolist() == stream(texts)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text("ab ", min_size=1, max_size=12).filter(str.strip), min_size=1, max_size=8), st.integers(2, 20))
def test_any_documents_are_cut_whole(tmp_path_factory: pytest.TempPathFactory, texts: list[str], size: int) -> None:
    folder = write_folder(tmp_path_factory.mktemp("docs"), texts, 1)
    train = blocks_of(folder, max_seq_length=size).train
    assert np.concatenate([train[i].input_ids for i in range(len(train))]).tolist() == stream(texts)
    assert train.targets.tolist() == [train[i].num_targets for i in range(len(train))]


def test_documents_are_held_out_whole(tmp_path: Path) -> None:
    split = blocks_of(write_folder(tmp_path / "docs", TEXTS), max_seq_length=16, eval_ratio=0.3)
    assert split.held_out is not None
    streams = [
        np.concatenate([blocks[i].input_ids for i in range(len(blocks))]) for blocks in (split.train, split.held_out)
    ]
    assert sorted(np.concatenate(streams).tolist()) == sorted(stream(TEXTS))
    assert len(streams[1]) in [len(stream(pair)) for pair in ([a, b] for a in TEXTS for b in TEXTS if a < b)]
    assert split.report()["eval"] == {"of": "train_file"}


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    config = DataConfig(train_file=str(write_folder(tmp_path / "docs", TEXTS)))
    with pytest.raises(UsageError, match="EOS"):
        load_split(config, Encoder(tokenizer, plain_template()), "document")
