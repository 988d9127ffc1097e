"""Mixtures, and what is wrong with rows only when they are seen together."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from firefly.config import DataConfig, load_config
from firefly.data import sources
from firefly.data.dataset import find_kind, load_split
from firefly.data.encoding import Encoder
from firefly.data.ledger import Ledger
from firefly.data.preparation import Preparation, _Row
from firefly.data.schema import IGNORE, Source, Tokens
from firefly.data.sources import find_sources, hash_file, repeat
from firefly.data.templates import bind_template
from firefly.errors import UsageError
from firefly.files import cache_folder


@pytest.fixture
def encoder(chatml_tokenizer) -> Encoder:
    return Encoder(chatml_tokenizer, bind_template("qwen", chatml_tokenizer))


@pytest.fixture
def write(tmp_path: Path):
    def write_rows(name: str, *rows: Any) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write_rows


def row(question: str, answer: str = "a") -> dict[str, str]:
    return {"instruction": question, "output": answer}


def load(encoder: Encoder, train: Any, **choices: Any):
    return load_split(DataConfig(train_file=train, **choices), encoder)


def test_a_mixture_shows_each_source_as_often_as_its_weight_says(write, encoder):
    first = write("a.jsonl", *(row(f"a{i}") for i in range(10)))
    second = write("b.jsonl", *(row(f"b{i}") for i in range(8)))
    entries = [{"path": first, "weight": 2.5, "name": "first"}, {"path": second, "weight": 0.5}]
    train = load(encoder, entries).train
    assert Counter(train.sources.tolist()) == {0: 25, 1: 4}
    assert train.names == ["first", second]
    shown = Counter(train.place(i).line for i in range(25))
    assert sorted(shown.values()) == [2] * 5 + [3] * 5
    assert train.ledger.rows == 18
    again = load(encoder, entries).train
    assert [len(again[i].input_ids) for i in range(29)] == train.lengths.tolist()
    assert again.fingerprint == train.fingerprint
    assert load(encoder, [first, second]).train.fingerprint != train.fingerprint


def test_examples_of_a_mixture_are_those_of_its_files(write, encoder):
    paths = [write(f"{name}.jsonl", *(row(f"{name}{i}", "x" * i) for i in range(1, 5))) for name in "ab"]
    mixed = load(encoder, paths).train
    alone = [load(encoder, path).train for path in paths]
    for number, examples in enumerate(alone):
        for i in range(4):
            np.testing.assert_array_equal(mixed[4 * number + i].input_ids, examples[i].input_ids)
            assert mixed.place(4 * number + i) == examples.place(i)


def test_max_rows_reads_only_the_beginning_over_all_files_of_a_source(write, encoder, tmp_path):
    write("a.jsonl", row("1"), row("2"))
    write("b.jsonl", row("3"), row("4"))
    train = load(encoder, [{"path": str(tmp_path), "max_rows": 3}]).train
    assert train.ledger.rows == 3
    assert [train.place(i).line for i in range(3)] == [1, 2, 1]


def test_a_part_of_a_source_is_fixed_and_never_empty():
    assert repeat(4, 1.0, seed=1).tolist() == [0, 1, 2, 3]
    assert len(repeat(100, 0.3, seed=1)) == 30
    assert repeat(100, 0.3, seed=1).tolist() == repeat(100, 0.3, seed=1).tolist()
    assert len(repeat(3, 0.01, seed=1)) == 1
    assert len(repeat(0, 2.0, seed=1)) == 0


@pytest.mark.parametrize(
    "entry",
    [
        {"path": "x.jsonl", "weight": 0},
        {"path": "x.jsonl", "weight": "2"},
        {"path": "x.jsonl", "weight": True},
        {"path": "x.jsonl", "max_rows": 0},
        {"path": "x.jsonl", "max_rows": 1.5},
        {"path": "x.jsonl", "rows": 3},
        {"weight": 1},
        {"path": 3},
        {"path": "x.jsonl", "name": ""},
        7,
    ],
)
def test_an_entry_of_another_shape_is_refused(entry):
    with pytest.raises(UsageError, match="train_file"):
        find_sources([entry], "train_file")


def test_two_entries_of_one_name_are_refused(write):
    path = write("a.jsonl", row("q"))
    with pytest.raises(UsageError, match="name"):
        find_sources([path, path], "train_file")
    assert len(find_sources([path, {"path": path, "name": "again"}], "train_file")) == 2


def test_a_configuration_takes_a_list_of_files(write, tmp_path):
    files = [write("a.jsonl", row("q")), {"path": write("b.jsonl", row("r")), "weight": 2}]
    config = load_config(
        {"output_dir": str(tmp_path), "model_name_or_path": "m", "train_file": files, "train_mode": "lora"}
    )
    assert list(config.data.train_file) == files
    assert json.loads(json.dumps(config.flat()["train_file"])) == files


def test_duplicates_overlap_and_empty_or_repeated_answers_are_findings(write, encoder):
    train = write(
        "t.jsonl",
        row("same"),
        row("other", ""),
        row("same"),
        row("held out"),
        *(row(f"q{i}", "I cannot help.") for i in range(12)),
    )
    held = write("e.jsonl", row("held out"), row("held out"))
    split = load(encoder, train, eval_file=held)
    ledger = split.train.ledger
    assert (ledger.rows, ledger.kept) == (16, 16)
    said = {(finding.cause, finding.line): finding.message for finding in ledger.findings}
    assert said[("duplicate", 3)] == f"the same as {train}:1"
    assert said[("in_eval_file", 4)] == f"the same as {held}:1 of the evaluation data"
    assert ("empty_answer", 2) in said
    assert said[("repeated_answer", 5)] == "this answer occurs in 12 rows"
    assert len(said) == 4
    assert split.held_out is not None
    assert split.held_out.ledger.counts == {"duplicate": 1}
    report = split.report()
    assert report["counts"] == {"empty_answer": 1, "duplicate": 1, "repeated_answer": 1, "in_eval_file": 1}
    assert report["eval"]["rows"] == 2


def test_replies_that_are_encoded_behind_their_prompts_are_a_finding_with_their_number(write, qwen_tokenizer):
    encoder = Encoder(qwen_tokenizer, bind_template("qwen", qwen_tokenizer))
    several = {"conversation": [{"human": "q", "assistant": text} for text in ("\n\na", "b", "\nc")]}
    path = write("j.jsonl", row("q", "plain"), row("q", "\n\na"), several, row("q", "\n" + "x " * 99))
    split = load_split(DataConfig(train_file=path, max_seq_length=60, on_too_long="drop", max_lost_share=1.0), encoder)
    ledger = split.train.ledger
    assert ledger.counts["joined_to_prompt"] == 2
    said = [finding for finding in ledger.findings if finding.cause == "joined_to_prompt"]
    assert [(finding.line, finding.message.split(" (")[0]) for finding in said] == [
        (2, "replies encoded behind their prompts, as they are served: 1"),
        (3, "replies encoded behind their prompts, as they are served: 2"),
    ]
    assert (ledger.rows, ledger.kept, ledger.examples) == (4, 3, 5)
    assert ledger.lost["too_long"] == 1
    trained = [split.train[i].labels for i in range(5)]
    texts = [qwen_tokenizer.decode(labels[labels != IGNORE]) for labels in trained]
    assert texts == ["plain<|im_end|>", "\n\na<|im_end|>", "\n\na<|im_end|>", "b<|im_end|>", "\nc<|im_end|>"]


def test_identifiers_that_a_template_replaces_are_a_finding(write, chatml_tokenizer):
    tokenizer = copy.deepcopy(chatml_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["</s>"]})

    def calling(identifier: str) -> dict[str, Any]:
        call = {"id": identifier, "type": "function", "function": {"name": "f", "arguments": {}}}
        result = {"role": "tool", "content": "x", "tool_call_id": identifier}
        asked = [{"role": "user", "content": identifier}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        return {"messages": [*asked, result, {"role": "assistant", "content": "a"}]}

    path = write("c.jsonl", calling("abcdefgh1"), calling("call_fromOpenAI0123"))
    for name, lines in (("mistral-v11-common", [2]), ("qwen2.5", [])):
        ledger = load(Encoder(tokenizer, bind_template(name, tokenizer)), path).train.ledger
        assert ledger.kept == 2
        said = [finding.line for finding in ledger.findings if finding.cause == "replaced_call_ids"]
        assert said == lines


def test_duplicates_are_found_across_files(write, encoder):
    first, second = write("a.jsonl", row("x"), row("y")), write("b.jsonl", row("y"))
    findings = load(encoder, [first, second]).train.ledger.findings
    assert [str(finding) for finding in findings] == [f"{second}:1: the same as {first}:2"]


@pytest.mark.parametrize(
    ("policy", "kept", "cut", "lost"), [("cut_turns", 1, 1, 0), ("cut", 1, 1, 0), ("drop", 1, 0, 1), ("error", 1, 0, 1)]
)
def test_rows_too_long_have_the_fate_that_is_asked_for(write, encoder, policy, kept, cut, lost):
    long = {"conversation": [{"human": "q", "assistant": "a"}, {"human": "q" * 50, "assistant": "b" * 90}]}
    config = DataConfig(
        train_file=write("l.jsonl", row("q"), long), max_seq_length=100, on_too_long=policy, max_lost_share=1.0
    )
    split = load_split(config, encoder)
    ledger = split.train.ledger
    assert (ledger.kept, ledger.cut, ledger.lost["too_long"]) == (kept, cut, lost)
    if policy == "cut_turns":
        assert split.train[1].input_ids[-1] == encoder.template.stop_ids[0]
        assert ledger.cut_turns == 1
    if policy == "cut":
        assert len(split.train[1].input_ids) == 100
    if policy == "error":
        with pytest.raises(UsageError, match="on_too_long is error"):
            split.check(config)
    else:
        split.check(config)


def test_pairs_and_documents_have_ledgers_that_add_up(shared, qwen_tokenizer):
    encoder = Encoder(qwen_tokenizer, bind_template("qwen", qwen_tokenizer))
    for name, task, form, rows in (
        ("dpo_en_demo.json", "pair", "preference_sharegpt", 300),
        ("firefly_dpo.jsonl", "pair", "preference", 16),
        ("c4_demo.jsonl", "document", "text", 300),
        ("wiki_demo.txt", "document", "text", 30),
        ("glaive_toolcall_en_demo.json", "conversation", "sharegpt", 300),
        ("kto_en_demo.json", "labelled", "labelled_messages", 300),
    ):
        config = DataConfig(train_file=str(shared / "data" / name), max_seq_length=2048)
        assert find_kind(config) == task
        ledger = load_split(config, encoder, task).train.ledger
        assert (ledger.rows, dict(ledger.formats)) == (rows, {form: rows})
        assert ledger.rows == ledger.kept + ledger.cut + sum(ledger.lost.values())
        assert ledger.examples == ledger.kept + ledger.cut


def test_tool_calls_of_a_real_file_are_trained_with_a_template_that_has_them(shared, qwen_tokenizer):
    encoder = Encoder(qwen_tokenizer, bind_template("qwen2.5", qwen_tokenizer))
    config = DataConfig(train_file=str(shared / "data" / "glaive_toolcall_en_demo.json"), max_seq_length=16384)
    split = load_split(config, encoder)
    split.check(config)
    assert split.train.ledger.kept == 300
    texts = [qwen_tokenizer.decode(split.train[i].input_ids.tolist()) for i in range(300)]
    assert sum("<tool_call>\n{" in text.split("</tools>")[-1] for text in texts) > 100


@pytest.mark.parametrize(("policy", "kept"), [("cut_turns", 1), ("drop", 0), ("error", 0)])
def test_of_a_row_that_makes_several_examples_none_is_dropped_alone(policy, kept, encoder):
    config = DataConfig(train_file="f", max_seq_length=10, on_too_long=policy)
    preparation = Preparation(config, encoder, "conversation", Ledger("f"))
    ids = np.arange(15, dtype=np.int32)
    examples = [
        Tokens(ids[:5], ids[:5]),
        Tokens(ids, np.where(ids < 12, IGNORE, ids)),
    ]  # the second's prompt is too long
    assert len(preparation._fit(_Row(Source("f", 1), []), examples)) == kept
    assert preparation.ledger.lost["too_long"] == 1 - kept


def test_a_large_file_is_hashed_once_and_again_once_it_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LARGE", 100)
    monkeypatch.setattr(sources, "SETTLED", -1.0)
    hashed, digest = [], hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, kind: (hashed.append(Path(file.name)), digest(file, kind))[1]
    )
    large, small = tmp_path / "large.jsonl", tmp_path / "small.jsonl"
    large.write_bytes(b"a" * 100)
    small.write_bytes(b"a" * 99)
    for path in (large, small, large, small):
        assert hash_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert hashed == [large, small, small]
    times = large.stat()
    large.write_bytes(b"b" * 100)
    os.utime(large, ns=(times.st_atime_ns, times.st_mtime_ns))  # as `cp -p` and `rsync -t` leave it
    assert hash_file(large) == hashlib.sha256(b"b" * 100).hexdigest()


def test_the_hash_of_a_file_that_was_just_written_is_not_relied_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LARGE", 1)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"a")
    hash_file(path)
    assert not [item for item in (cache_folder() / "hashes").glob("*") if str(path) in item.read_text()]
