"""A data file becomes examples, and the ledger says what became of every row."""

from __future__ import annotations

import copy
import errno
import json
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firefly.config import DataConfig
from firefly.data import dataset, preparation
from firefly.data.dataset import cache_folder, cache_key, hash_file, load_split
from firefly.data.encoding import Encoder
from firefly.data.examples import Examples
from firefly.data.ledger import Ledger
from firefly.data.preparation import fit
from firefly.data.schema import IGNORE, Tokens
from firefly.data.templates import bind_template
from firefly.errors import UsageError


@pytest.fixture
def encoder(chatml_tokenizer) -> Encoder:
    return Encoder(chatml_tokenizer, bind_template("qwen", chatml_tokenizer))


@pytest.fixture
def write(tmp_path: Path):
    def write_rows(*rows: Any, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(path)

    return write_rows


def chat(*contents: str, **extra: Any) -> dict[str, Any]:
    return {
        "conversation": [{"human": q, "assistant": a} for q, a in zip(contents[::2], contents[1::2], strict=True)]
    } | extra


def tokens_row(*runs: tuple[int, bool]) -> dict[str, Any]:
    """A row of runs of tokens: (how many, trained)."""
    ids, labels = [], []
    for length, trained in runs:
        for _ in range(length):
            ids.append(len(ids) % 300)
            labels.append(ids[-1] if trained else IGNORE)
    return {"input_ids": ids, "labels": labels}


def as_tokens(row: dict[str, Any]) -> Tokens:
    return Tokens(np.asarray(row["input_ids"], np.int32), np.asarray(row["labels"], np.int32))


def adds_up(ledger: Ledger, examples: Examples) -> bool:
    """rows = kept + cut + lost, and the sums are those of the examples."""
    return (
        ledger.rows == ledger.kept + ledger.cut + sum(ledger.lost.values())
        and ledger.examples == len(examples) == len(examples.lengths) == len(examples.index)
        and ledger.tokens == examples.lengths.sum()
        and ledger.target_tokens == examples.targets.sum()
        and sum(ledger.counts[cause] for cause in ("cut", *ledger.lost)) == ledger.cut + sum(ledger.lost.values())
        and len(ledger.findings) == sum(ledger.counts.values())
    )


def load_examples(file: str, config: DataConfig, encoder: Encoder, key: str = "train_file") -> Examples:
    """The examples of one file, after its ledger has been judged."""
    split = load_split(replace(config, train_file=file), encoder)
    split.check(config)
    return split.train


FREE = {"max_lost_share": 1.0, "max_malformed_rows": 10**6}


# ---- rows and their fates ----


@pytest.mark.parametrize(("file", "form", "rows"), [
    ("firefly_sft.jsonl", "firefly", 33),
    ("alpaca_en_demo.json", "alpaca", 999),
    ("alpaca_zh_demo.json", "alpaca", 1000),
    ("identity.json", "alpaca", 91),
])  # fmt: skip
def test_real_files_are_read_and_add_up_at_any_length(shared, qwen_tokenizer, file, form, rows):
    encoder = Encoder(qwen_tokenizer, bind_template("qwen", qwen_tokenizer))
    whole = load_examples(str(shared / "data" / file), DataConfig(max_seq_length=8192), encoder)
    assert (whole.ledger.rows, whole.ledger.kept, dict(whole.ledger.formats)) == (rows, rows, {form: rows})
    assert adds_up(whole.ledger, whole)
    short = load_examples(str(shared / "data" / file), DataConfig(max_seq_length=64, **FREE), encoder)
    assert adds_up(short.ledger, short)
    assert short.lengths.max() <= 64
    assert short.targets.min() >= 1
    assert short.ledger.cut + sum(short.ledger.lost.values()) == (whole.lengths > 64).sum()
    cut = {finding.line for finding in short.ledger.findings if finding.cause == "cut"}
    lost = {finding.line for finding in short.ledger.findings if finding.cause in short.ledger.lost}
    uncut = [i for i, line in enumerate(whole.index["line"]) if line not in lost]
    assert short.ledger.cut_tokens == sum(whole.lengths[i] for i in uncut) - short.lengths.sum()
    assert len(cut) == short.ledger.cut


def test_braces_in_real_records_are_content_and_not_placeholders(shared, qwen_tokenizer):
    encoder = Encoder(qwen_tokenizer, bind_template("qwen", qwen_tokenizer))
    examples = load_examples(str(shared / "data" / "identity.json"), DataConfig(), encoder)
    text = [qwen_tokenizer.decode(examples[i].input_ids.tolist()) for i in range(len(examples))]
    assert any("{{name}}" in item for item in text)
    assert any("{{author}}" in item for item in text)


def test_every_row_is_kept_cut_or_lost_with_file_line_and_cause(write, encoder):
    path = write(
        chat("q", "a"),
        "",
        '{"conversation": ',
        {"conversation": []},
        chat("q", "a", system="s"),
        {"messages": [{"role": "user", "content": "only a question"}]},
        tokens_row((200, False), (5, True)),
        tokens_row((60, False), (30, True), (30, False)),
        {"input_ids": [400], "labels": [400]},
        '{"\\ud800": 1}',
    )
    examples = load_examples(path, DataConfig(max_seq_length=100, **FREE), encoder)
    ledger = examples.ledger
    assert (ledger.rows, ledger.kept, ledger.cut) == (9, 2, 1)
    assert ledger.lost == {"malformed": 4, "no_target": 1, "too_long": 1}
    assert adds_up(ledger, examples)
    assert examples.index["line"].tolist() == [1, 5, 8]
    assert ledger.formats == {"firefly": 2, "messages": 1, "tokens": 3}
    said = [(finding.line, finding.cause, finding.message) for finding in ledger.findings]
    assert [(line, cause) for line, cause, _ in sorted(said)] == [
        (2, "blank_line"), (3, "malformed"), (4, "malformed"), (6, "no_target"), (7, "too_long"), (8, "cut"),
        (9, "malformed"),
        (10, "malformed"),
    ]  # fmt: skip
    messages = {line: message for line, _, message in said}
    assert messages[7] == "205 tokens; no reply begins within max_seq_length 100"
    cut = "cut from 120 to 90 tokens (0 trained tokens and 0 whole replies lost; max_seq_length 100)"
    assert messages[8] == cut
    assert messages[9] == "id 400 is not in the vocabulary of 400"
    assert str(ledger.findings[0]).startswith(f"{path}:")


def test_the_ledger_is_the_same_after_writing_and_reading(write, encoder):
    ledger = load_examples(
        write(chat("q", "a"), "{", chat("q", "a" * 500)), DataConfig(max_seq_length=64, **FREE), encoder
    ).ledger
    stored = json.loads(json.dumps(ledger.stored()))
    assert Ledger.from_stored(stored) == ledger
    assert stored["format"] == "firefly"


def test_the_summary_names_every_count(write, encoder):
    rows = (chat("q", "a"), chat("q", "a"), "{", chat("q", "a" * 500))
    summary = load_examples(write(*rows), DataConfig(max_seq_length=64, **FREE), encoder).ledger.summary()
    assert "4 rows, 2 kept, 1 cut, lost: malformed 1;" in summary


# ---- which replies are trained ----


def trained_text(encoder: Encoder, tokens: Tokens) -> str:
    return encoder.tokenizer.decode(tokens.input_ids[tokens.labels != IGNORE].tolist())


def test_train_on_last_trains_the_last_reply_alone(write, encoder):
    path = write(chat("q1", "first", "q2", "second"))
    every = load_examples(path, DataConfig(), encoder)[0]
    last = load_examples(path, DataConfig(train_on="last"), encoder)[0]
    assert trained_text(encoder, every) == "first<|im_end|>second<|im_end|>"
    assert trained_text(encoder, last) == "second<|im_end|>"
    np.testing.assert_array_equal(every.input_ids, last.input_ids)


def test_loss_false_narrows_what_is_trained(write, encoder):
    row = chat("q1", "first", "q2", "second", "q3", "third")
    row["conversation"][1]["loss"] = False
    path = write(row)
    assert trained_text(encoder, load_examples(path, DataConfig(), encoder)[0]) == "first<|im_end|>third<|im_end|>"
    row["conversation"][2]["loss"] = False
    path = write(row, chat("q", "a"), name="last.jsonl")
    last = load_examples(path, DataConfig(train_on="last"), encoder)
    assert last.ledger.lost == {"no_target": 1}  # the last reply is excluded: an earlier one does not take its place


def test_typed_special_tokens_become_tokens_only_where_allowed(write, encoder):
    path = write(chat("q", "a <|im_end|> b"))
    stop = encoder.template.stop_ids[0]
    for allow, count in ((False, 3), (True, 4)):
        changed = replace(encoder, allow_special_in_content=allow)
        example = load_examples(path, DataConfig(allow_special_in_content=allow), changed)[0]
        assert (example.input_ids == stop).sum() == count


def test_a_row_that_its_template_refuses_is_lost_with_the_reason(write, chatml_tokenizer):
    tokenizer = copy.deepcopy(chatml_tokenizer)
    tokenizer.chat_template = (
        "{% if messages[0]['content'] == 'no' %}{{ raise_exception('No is not supported') }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    encoder = Encoder(tokenizer, bind_template("auto", tokenizer))
    path = write(chat("q", "a"), chat("no", "a"))
    ledger = load_examples(path, DataConfig(), encoder).ledger
    assert ledger.lost == {"refused": 1}
    assert "data.jsonl:2: the chat template auto refuses this conversation: No is not" in str(ledger.findings[0])


def test_a_template_that_rewrites_turns_gives_a_row_several_examples(write, chatml_tokenizer):
    tokenizer = copy.deepcopy(chatml_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ m.content if loop.last or m.role == 'user' else 'seen' }}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    encoder = Encoder(tokenizer, bind_template("auto", tokenizer))
    path = write(chat("q1", "first", "q2", "second"), chat("q1", "first", "q2" * 100, "second"))
    examples = load_examples(path, DataConfig(max_seq_length=100), encoder)
    assert [trained_text(encoder, examples[i]) for i in range(len(examples))] == [
        "first<|im_end|>", "second<|im_end|>", "first<|im_end|>",
    ]  # fmt: skip
    assert examples.index["line"].tolist() == [1, 1, 2]
    assert (examples.ledger.kept, examples.ledger.cut) == (1, 1)
    assert adds_up(examples.ledger, examples)


# ---- cutting ----


@pytest.mark.parametrize(
    ("runs", "limit", "length", "why"),
    [
        ([(5, False), (5, True)], 10, 10, "it fits"),
        ([(5, False), (5, True), (5, False)], 12, 10, "after the last reply that fits whole"),
        ([(5, False), (5, True), (5, False), (5, True)], 19, 10, "the second reply does not fit whole"),
        ([(5, False), (5, True), (5, False), (5, True)], 10, 10, "exactly after the first"),
        ([(5, False), (5, True), (5, False), (5, True), (1, False)], 20, 20, "what follows the last reply"),
        ([(5, False), (10, True)], 8, 8, "within the first reply, where not even it fits"),
        ([(5, False), (10, True)], 6, 6, "one trained token is left"),
        ([(5, False), (10, True)], 5, None, "no trained token is left"),
        ([(50, False), (10, True)], 20, None, "the reply begins beyond the limit"),
    ],
)
def test_an_example_is_cut_after_the_last_reply_that_fits(runs, limit, length, why):
    tokens = as_tokens(tokens_row(*runs))
    fitted = fit(tokens, limit)
    assert (None if fitted is None else len(fitted.input_ids)) == length, why
    if fitted is not None:
        np.testing.assert_array_equal(fitted.input_ids, tokens.input_ids[:length])
        np.testing.assert_array_equal(fitted.labels, tokens.labels[:length])


@given(
    st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=8),
    st.integers(2, 30),
)
def test_a_cut_example_fits_has_a_target_and_ends_a_reply_if_one_fits(runs, limit):
    tokens = as_tokens(tokens_row(*runs))
    fitted = fit(tokens, limit)
    if fitted is None:
        assert Tokens(tokens.input_ids[:limit], tokens.labels[:limit]).num_targets == 0 or tokens.labels[0] != IGNORE
        return
    assert len(fitted.input_ids) <= limit
    if len(fitted.input_ids) < min(len(tokens.input_ids), limit):
        assert fitted.labels[-1] != IGNORE  # cut short of the limit only to end with a whole reply
        assert tokens.labels[len(fitted.labels)] == IGNORE


def test_a_long_conversation_loses_its_last_turns_and_keeps_the_stop(write, encoder):
    path = write(chat("q1", "first", "q2", "second " * 30))
    examples = load_examples(path, DataConfig(max_seq_length=80), encoder)
    assert trained_text(encoder, examples[0]) == "first<|im_end|>"
    assert examples[0].labels[-1] == encoder.template.stop_ids[0]
    (finding,) = examples.ledger.findings
    whole = len(load_examples(path, DataConfig(max_seq_length=2000), encoder)[0].input_ids)
    assert finding.message.startswith(f"cut from {whole} to {len(examples[0].input_ids)} tokens")


# ---- thresholds ----


def test_malformed_rows_stop_a_run_unless_they_are_allowed(write, encoder):
    path = write("{", chat("q", "a"), "[]")
    for allowed in (0, 1):
        with pytest.raises(UsageError, match="max_malformed_rows") as caught:
            load_examples(path, DataConfig(max_malformed_rows=allowed), encoder)
        assert f"{path}:1: not valid JSON" in str(caught.value)
        assert f"{path}:3: a record must be an object, not list" in str(caught.value)
    assert len(load_examples(path, DataConfig(max_malformed_rows=2), encoder)) == 1


def test_a_share_of_lost_rows_stops_a_run_but_one_row_never_does(write, encoder):
    good, long = chat("q", "a"), tokens_row((200, False), (5, True))
    short = {"max_seq_length": 100}
    one = load_examples(write(good, good, long, name="one.jsonl"), DataConfig(max_lost_share=0.0, **short), encoder)
    assert one.ledger.lost == {"too_long": 1}
    path = write(good, good, long, long, name="two.jsonl")
    with pytest.raises(UsageError, match="max_lost_share") as caught:
        load_examples(path, DataConfig(**short), encoder)
    assert "2 of 4 rows (50.0%)" in str(caught.value)
    assert f"{path}:3: 205 tokens" in str(caught.value)
    assert len(load_examples(path, DataConfig(max_lost_share=0.5, **short), encoder)) == 2
    with pytest.raises(UsageError, match="max_lost_share"):
        load_examples(path, DataConfig(max_lost_share=0.49, **short), encoder)


def test_a_cut_row_is_not_a_lost_one(write, encoder):
    long = tokens_row((60, False), (60, True))
    examples = load_examples(write(long, long, long), DataConfig(max_seq_length=100, max_lost_share=0.0), encoder)
    assert examples.ledger.cut == 3


@pytest.mark.parametrize(
    ("rows", "said"),
    [((), "is empty"), (("", " "), "is empty"), ((chat("q", "a" * 500, system="s" * 500),), r"no row of .* can be")],
)
def test_a_file_without_one_example_is_refused(write, encoder, rows, said):
    with pytest.raises(UsageError, match=said):
        load_examples(write(*rows), DataConfig(max_seq_length=100, **FREE), encoder)


def test_a_long_list_of_faults_is_shortened_and_counted(write, encoder):
    with pytest.raises(UsageError) as caught:
        load_examples(write(*["{"] * 25), DataConfig(), encoder)
    message = str(caught.value)
    assert message.startswith("25 malformed row(s)")
    assert "data.jsonl:10:" in message
    assert "data.jsonl:11:" not in message
    assert "… and 15 more" in message


def test_a_broken_list_stops_a_run_whatever_is_allowed(tmp_path, encoder):
    path = tmp_path / "d.json"
    path.write_text(f"[{json.dumps(chat('q', 'a'))},\n{{oops}},\n{json.dumps(chat('q', 'b'))}]", encoding="utf-8")
    with pytest.raises(UsageError, match=r"d\.json:2: "):
        load_examples(str(path), DataConfig(**FREE), encoder)


def test_the_file_at_fault_is_named_by_its_key(write, encoder):
    train = write(chat("q", "a"))
    assert load_split(DataConfig(train_file=train), encoder).held_out is None
    held_out = load_split(DataConfig(train_file=train, eval_file=train), encoder).held_out
    assert held_out is not None
    for key, files in (
        ("train_file", {"train_file": "none.jsonl"}),
        ("eval_file", {"train_file": train, "eval_file": "none.jsonl"}),
    ):
        with pytest.raises(UsageError, match=f"{key} = none.jsonl does not exist"):
            load_split(DataConfig(**files), encoder)


# ---- the cache ----


def test_a_second_load_reads_the_cache_and_tokenizes_nothing(write, encoder, monkeypatch):
    path = write(chat("q", "a"), chat("q", "b", system="s"))
    first = load_examples(path, DataConfig(), encoder)

    def refuse(*arguments: Any) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(Encoder, "tokenize", refuse)
    monkeypatch.setattr(preparation, "read_record", refuse)
    again = load_examples(path, DataConfig(), encoder)
    assert again.fingerprint == first.fingerprint
    assert again.ledger == first.ledger
    for i in range(2):
        np.testing.assert_array_equal(again[i].input_ids, first[i].input_ids)
        np.testing.assert_array_equal(again[i].labels, first[i].labels)
    # thresholds are checked on the stored ledger, not stored with it
    assert (
        load_examples(path, DataConfig(max_lost_share=0.5, max_malformed_rows=5), encoder).fingerprint
        == first.fingerprint
    )
    with pytest.raises(AssertionError, match="tokenized again"):
        load_examples(path, DataConfig(max_seq_length=512), encoder)


def test_the_cache_knows_everything_that_shapes_an_example(write, encoder, chatml_tokenizer, monkeypatch):
    path = Path(write(chat("q", "a")))
    seen = {cache_key(path, DataConfig(), encoder, "conversation", None, hash_file(path))}

    def is_new(config: DataConfig = DataConfig(), changed: Encoder = encoder) -> bool:  # noqa: B008
        key = cache_key(path, config, changed, "conversation", None, hash_file(path))
        new = key not in seen
        seen.add(key)
        return new

    def with_tokenizer(**attributes: Any) -> Encoder:
        tokenizer = copy.deepcopy(chatml_tokenizer)
        for name, value in attributes.items():
            setattr(tokenizer, name, value)
        return Encoder(tokenizer, bind_template("qwen", tokenizer))

    assert not is_new()
    assert not is_new(DataConfig(max_lost_share=0.5, max_malformed_rows=3, shuffle=False, tokenize_num_workers=3))
    assert is_new(DataConfig(max_seq_length=1000))
    assert is_new(DataConfig(train_on="last"))
    assert is_new(DataConfig(allow_special_in_content=True))
    assert is_new(changed=Encoder(chatml_tokenizer, bind_template("qwen2.5", chatml_tokenizer)))
    assert is_new(changed=Encoder(chatml_tokenizer, replace(encoder.template, stop_tokens=("<|endoftext|>",))))
    assert is_new(changed=with_tokenizer(bos_token="<|im_start|>"))
    larger = copy.deepcopy(chatml_tokenizer)
    larger.add_tokens(["helpful assistant"])
    assert is_new(changed=Encoder(larger, bind_template("qwen", larger)))
    monkeypatch.setenv("FIREFLY_LANG", "")
    monkeypatch.setenv("LC_ALL", "C")
    assert not is_new()  # English, as before
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    assert not is_new()  # findings are stored as phrases
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert is_new()
    monkeypatch.setattr(dataset, "code_hash", lambda: "other code")
    assert is_new()


def test_findings_of_the_cache_are_in_the_language_of_the_reader(write, encoder, monkeypatch):
    path = write(chat("q", "a"), "{")
    config = DataConfig(max_malformed_rows=1)
    english = load_examples(path, config, encoder).ledger.findings[0].message
    monkeypatch.setenv("FIREFLY_LANG", "zh")
    monkeypatch.setattr(preparation, "prepare", None)  # what was prepared in English is shown in Chinese
    monkeypatch.setattr(dataset, "prepare", None)
    split = load_split(replace(config, train_file=path), encoder)
    finding = split.train.ledger.findings[0]
    assert english.startswith("not valid JSON")
    assert finding.message.startswith("不是有效的 JSON")
    assert split.report()["findings"][0]["message"] == finding.message


def test_a_preparation_that_fails_leaves_nothing_behind(write, encoder, monkeypatch, tmp_path):
    monkeypatch.setenv("FIREFLY_CACHE", str(tmp_path / "cache"))

    def fail(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "tokenize", fail)
        with pytest.raises(KeyboardInterrupt):
            load_examples(write(chat("q", "a")), DataConfig(), encoder)
    assert list((cache_folder() / "examples").iterdir()) == []
    assert len(load_examples(write(chat("q", "a")), DataConfig(), encoder)) == 1


def test_without_locks_two_runs_that_prepare_at_once_share_one_result(write, encoder, monkeypatch, tmp_path):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setenv("FIREFLY_CACHE", str(tmp_path / "cache"))
    path = write(chat("q", "a"))
    encode = Encoder.tokenize
    inner: list[Examples] = []

    def first_call(self: Encoder, rendered: Any) -> Any:
        monkeypatch.setattr(Encoder, "tokenize", encode)
        inner.append(load_examples(path, DataConfig(), encoder))  # the other run finishes first
        return encode(self, rendered)

    monkeypatch.setattr(Encoder, "tokenize", first_call)
    outer = load_examples(path, DataConfig(), encoder)
    assert outer.fingerprint == inner[0].fingerprint
    assert len(list((cache_folder() / "examples").iterdir())) == 1


def test_the_cache_lies_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("FIREFLY_CACHE", "~/here")
    assert cache_folder() == Path.home() / "here"
    monkeypatch.delenv("FIREFLY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/firefly")


# ---- Examples ----


def test_examples_are_found_by_number_whatever_the_size_of_a_batch(write, encoder, monkeypatch):
    rows = [tokens_row((3 + i, False), (2 + i % 4, True)) for i in range(7)]
    rows.insert(3, {"input_ids": [1, 2], "labels": [IGNORE, IGNORE]})
    monkeypatch.setattr(preparation, "CHUNK", 2)
    monkeypatch.setattr(dataset, "code_hash", lambda: "small chunks")
    examples = load_examples(write(*rows), DataConfig(), encoder)
    expected = [as_tokens(row) for row in rows if row["labels"][-1] != IGNORE]
    assert len(examples) == 7
    assert examples.lengths.tolist() == [len(tokens.input_ids) for tokens in expected]
    assert examples.targets.tolist() == [tokens.num_targets for tokens in expected]
    assert examples.index["line"].tolist() == [1, 2, 3, 5, 6, 7, 8]
    for found, tokens in zip(examples, expected, strict=True):  # type: ignore[call-overload]
        np.testing.assert_array_equal(found.input_ids, tokens.input_ids)
        np.testing.assert_array_equal(found.labels, tokens.labels)


def test_the_first_token_is_no_target_for_nothing_predicts_it(write, encoder):
    examples = load_examples(write(tokens_row((4, True)), tokens_row((2, False), (2, True))), DataConfig(), encoder)
    assert examples.targets.tolist() == [3, 2]


def test_the_summary_of_a_ledger_is_one_line():
    ledger = Ledger("f", rows=3, kept=3, examples=3, tokens=1000, target_tokens=250)
    assert ledger.summary() == "data: f: 3 rows, 3 kept, 0 cut, lost: 0; 1,000 tokens, 25% trained"


# ---- held-out rows ----


def contents(examples: Examples, encoder: Encoder) -> list[str]:
    return [encoder.tokenizer.decode(examples[i].input_ids) for i in range(len(examples))]


def test_rows_of_a_json_list_on_one_line_are_rows(tmp_path, encoder):
    rows = [{"instruction": f"question {i}", "output": f"answer {i}"} for i in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    split = load_split(DataConfig(train_file=str(tmp_path / "rows.json"), eval_ratio=0.25), encoder)
    assert (len(split.train), len(split.held_out)) == (30, 10)


def test_equal_rows_are_never_on_both_sides(write, encoder):
    rows = [chat(f"question {i % 8}", f"answer {i % 8}") for i in range(40)]
    split = load_split(DataConfig(train_file=write(*rows), eval_ratio=0.25), encoder)
    trained, held = (contents(part, encoder) for part in (split.train, split.held_out))
    assert (len(trained), len(held)) == (30, 10)
    assert not set(trained) & set(held)


def test_a_document_without_text_is_a_finding_and_no_lost_row(write, encoder):
    rows = [{"text": text} for text in ("one two", "", " \n", "three")]
    split = load_split(DataConfig(train_file=write(*rows)), encoder, "document")
    ledger = split.train.documents.ledger if hasattr(split.train, "documents") else split.train.ledger
    assert (ledger.rows, ledger.kept, dict(ledger.lost), ledger.counts["blank_line"]) == (2, 2, {}, 2)


def test_every_empty_reply_is_a_finding_with_its_turn(write, encoder):
    reply = {"role": "assistant", "content": " "}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    rows = [
        chat("q", "", "q", "a", "q", "\n"),
        {"messages": [{"role": "user", "content": "q"}, {**reply, "reasoning_content": "thought"}]},
        {"messages": [{"role": "user", "content": "q"}, call, {"role": "tool", "content": ""}, reply]},
        {"instruction": "i", "instances": [{"input": "x", "output": "a"}, {"input": "y", "output": ""}]},
        {"input_ids": [1, 2], "labels": [IGNORE, 2]},
    ]
    qwen = Encoder(encoder.tokenizer, bind_template("qwen3", encoder.tokenizer))
    ledger = load_split(DataConfig(train_file=write(*rows)), qwen).train.ledger
    assert [(item.line, item.message) for item in ledger.findings if item.cause == "empty_answer"] == [
        (1, "turn 1 of 3: the reply is empty; only its stop token is trained"),
        (1, "turn 3 of 3: the reply is empty; only its stop token is trained"),
        (2, "turn 1 of 1: the reply is empty; only its reasoning and stop token are trained"),
        (3, "turn 1 of 1: the reply is empty; only its stop token is trained"),
        (4, "turn 1 of 1: the reply is empty; only its stop token is trained"),
    ]
    assert (ledger.rows, ledger.kept) == (5, 5)


def test_several_examples_of_one_row_are_one_row(write, encoder):
    instances = [{"input": "x", "output": "a"}, {"input": "y" * 300, "output": "b"}, {"input": "z", "output": "c"}]
    path = write({"instruction": "i", "instances": instances[::2]}, {"instruction": "i", "instances": instances})
    examples = load_examples(path, DataConfig(max_seq_length=100, **FREE), encoder)
    assert [trained_text(encoder, examples[i]) for i in range(len(examples))] == [
        "a<|im_end|>", "c<|im_end|>", "a<|im_end|>", "c<|im_end|>",
    ]  # fmt: skip
    assert (examples.ledger.rows, examples.ledger.kept, examples.ledger.cut) == (2, 1, 1)
    assert adds_up(examples.ledger, examples)


PROSE = (
    "The lighthouse keeper had counted the ships for thirty years, and not once in all that time had he seen one turn "
    "back. He wrote each of them down in a ledger with a green cover, the name and the hour, and whether the sea was "
    "calm. In winter the pages froze together. He thawed them at the stove, a few at a time, and read what he had "
    "written as if another man had been there before him. "
) * 3
CHINESE = (
    "灯塔看守人数了三十年的船，从来没有见过一艘船掉头返回。他把每一艘船的名字和时间都写在一本绿色的账本里，还写下海面是否平静。"
    * 8
)


@pytest.mark.parametrize(
    ("lines", "wrapped"),
    [
        (textwrap.wrap(PROSE, 60), True),
        (textwrap.wrap(PROSE, 100), True),
        ([CHINESE[i : i + 25] for i in range(0, len(CHINESE), 25)], True),
        ([f"This is document {i}, and it is whole." for i in range(40)], False),
        ([f"“第 {i} 篇文章到此结束。”" for i in range(40)], False),
        ([PROSE * 2 + "and so on"] * 40, False),
        (["A title", "Another"], False),
        ([f"{sentence}." for sentence in PROSE.split(". ") if sentence.strip()], False),
    ],
)
def test_lines_that_end_within_sentences_are_a_hint(tmp_path, encoder, lines, wrapped):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(["A whole sentence.", "", *lines]) + "\n", encoding="utf-8")
    for key, expected in (("line", wrapped), ("file", False)):
        split = load_split(DataConfig(train_file=str(path), text_documents=key), encoder, "document")
        found = [item for item in split.train.documents.ledger.findings if item.cause == "wrapped_text"]
        assert bool(found) is expected
        if found:
            assert "set text_documents to file" in found[0].message
            assert found[0].line == 3


def test_a_record_nested_too_deeply_is_lost_with_its_place(write, encoder):
    deep: Any = {}
    for _ in range(700):
        deep = {"a": deep}
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": deep}}]
    split = load_split(DataConfig(train_file=write(row | {"tools": tools}, row)), encoder)
    assert len(split.train) == 1
    assert split.train.ledger.findings[0].line == 1


def test_many_duplicates_are_counted_and_only_the_first_are_described(write, encoder, monkeypatch):
    monkeypatch.setattr("firefly.data.duplicates.MOST_FINDINGS", 3)
    monkeypatch.setattr("firefly.data.ledger.MOST_FINDINGS", 3)
    rows = [chat(f"question {i % 2}", f"answer {i % 2}") for i in range(12)]
    split = load_split(DataConfig(train_file=write(*rows), eval_file=write(*rows[:8], name="eval.jsonl")), encoder)
    ledger = split.train.ledger
    assert (ledger.counts["duplicate"], ledger.counts["in_eval_file"]) == (10, 12)
    lines = {cause: [item.line for item in ledger.findings if item.cause == cause] for cause in ledger.counts}
    assert (lines["duplicate"], lines["in_eval_file"]) == ([3, 4, 5], [1, 2, 3])
    assert "data.jsonl:1" in next(item.message for item in ledger.findings if item.cause == "duplicate")
