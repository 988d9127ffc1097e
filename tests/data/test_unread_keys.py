"""Nothing a record says is dropped unseen: text under a key is trained, is context, or is a finding with its name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from firefly.config import DataConfig
from firefly.data.dataset import load_split
from firefly.data.encoding import Encoder
from firefly.data.formats import read_record
from firefly.data.ledger import Ledger
from firefly.data.templates import bind_template
from tiny import tiny_tokenizer


def encoder() -> Encoder:
    tokenizer = tiny_tokenizer()
    return Encoder(tokenizer, bind_template("qwen2.5", tokenizer))


def load(path: Path, *rows: Any, task: str = "conversation", **options: Any) -> Any:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = DataConfig(train_file=str(path), max_malformed_rows=100, max_lost_share=1.0, **options)
    return load_split(config, encoder(), task).train


USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def test_a_key_without_a_reader_is_one_finding_with_its_name_and_how_many_rows_hold_it(tmp_path: Path) -> None:
    rows = [
        {"messages": [USER, REPLY], "id": 7, "score": 0.5, "kind": "x"},
        {"messages": [USER, REPLY], "kind": "x", "explanation": "a long text that somebody wrote", "empty": " "},
        {"messages": [USER, {**REPLY, "note": "inside"}, USER, {**REPLY, "note": "again"}], "kind": "  "},
        {"messages": [USER, REPLY], "nested": {"list": [1, {"deep": "words"}], "none": None}},
    ]
    ledger = load(tmp_path / "rows.jsonl", *rows).ledger
    found = [item for item in ledger.findings if item.cause == "unread_key"]
    assert [(item.line, item.message) for item in found] == [
        (2, "text under the key explanation is not read: 31 characters in 1 row(s), this one the first"),
        (3, "text under the key messages[].note is not read: 11 characters in 1 row(s), this one the first"),
        (4, "text under the key nested is not read: 5 characters in 1 row(s), this one the first"),
        (1, "text under the key kind is not read: 2 characters in 2 row(s), this one the first"),
    ]
    assert (ledger.kept, ledger.counts["unread_key"]) == (4, 4)
    keys = "explanation (1 row(s)), messages[].note (1 row(s)), nested (1 row(s)), kind (2 row(s))"
    assert f"not read: what stands under {keys}" in ledger.summary()
    assert Ledger.from_stored(json.loads(json.dumps(ledger.stored()))) == ledger


def test_the_summary_of_several_files_adds_their_rows_up_and_stays_one_line(tmp_path: Path) -> None:
    keys = {f"key{number:02}": "text" for number in range(11)}
    for name in ("a.jsonl", "b.jsonl"):
        load(tmp_path / name, {"messages": [USER, REPLY], **keys})
    split = load_split(DataConfig(train_file=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]), encoder())
    (line,) = [line for line in split.train.ledger.summary().splitlines() if "not read" in line]
    assert "key00 (2 row(s)), " in line
    assert line.endswith("key07 (2 row(s)), … and 3 more")


def test_a_number_under_a_key_of_a_message_that_nobody_reads_is_a_finding_with_its_name(tmp_path: Path) -> None:
    rows = [
        {"messages": [USER, REPLY], "score": 3},
        {"messages": [USER, {**REPLY, "keep": False, "empty": [], "none": None}]},
        {"messages": [{**USER, "keep": True}, {**REPLY, "meta": {"mask": [0, 1]}}]},
    ]
    ledger = load(tmp_path / "rows.jsonl", *rows).ledger
    form = "the number, true or false under the key messages[].{} is not read, in {} row(s), this one the first"
    assert {(item.line, item.message) for item in ledger.findings if item.cause == "unread_key"} == {
        (2, form.format("keep", 2)),
        (3, form.format("meta", 1)),
    }
    assert "not read: what stands under messages[].keep (2 row(s)), messages[].meta (1 row(s))" in ledger.summary()
    pair = {"conversations": [USER], "chosen": {**REPLY, "rank": 1}, "rejected": {**REPLY, "content": "b"}}
    assert read_record(pair, "pair").unread == {"chosen.rank": 0}


def test_a_text_that_stands_in_the_conversation_anyway_is_not_left_out() -> None:
    pair = {"chosen": [USER, REPLY], "rejected": [USER, {**REPLY, "content": "b"}]}
    assert read_record({**pair, "prompt": "q", "messages": [USER, REPLY]}, "pair").unread == {}
    assert read_record({**pair, "prompt": "other", "messages": [USER, {**REPLY, "content": "c"}]}, "pair").unread == {
        "prompt": 5,
        "messages": 14,  # with the names of its roles
    }
    assert read_record({"messages": [USER, REPLY], "prompt": "q"}).unread == {}


def test_a_row_that_its_label_condemns_is_lost_for_that_reason(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,label\nq,a,1\nq,b,0\nq,c,1\n", encoding="utf-8")
    ledger = load_split(DataConfig(train_file=str(path), max_lost_share=1.0), encoder(), "conversation").train.ledger
    assert (ledger.formats["labelled_answer"], ledger.kept, ledger.lost["no_target"]) == (3, 2, 1)
    (lost,) = [item.message for item in ledger.findings if item.cause == "no_target"]
    assert lost.startswith("nothing in it is trained: label condemns its answer")
    rows = [{"messages": [USER, REPLY], "kto_tag": "false"}, {"messages": [USER, {**REPLY, "loss": False}], "label": 1}]
    ledger = load(tmp_path / "rows.jsonl", *rows).ledger
    said = [item.message.partition(":")[2][:8] for item in ledger.findings if item.cause == "no_target"]
    assert said == [" kto_tag", ""]


def test_what_nobody_answers_at_the_end_is_one_finding_of_the_row(tmp_path: Path) -> None:
    tool = {"role": "tool", "content": "r"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    rows = [
        {"messages": [USER, REPLY, USER, REPLY]},
        {"messages": [USER, REPLY, USER]},
        {"messages": [USER, call, tool, tool]},
        {"messages": [USER]},
        {"data": ["q", "a", "q2"]},
    ]
    ledger = load(tmp_path / "rows.jsonl", *rows).ledger
    form = "after the last reply {} message(s) ({}) have no answer: they are not trained"
    assert [(item.line, item.message) for item in ledger.findings if item.cause == "unanswered_end"] == [
        (2, form.format(1, "user")),
        (3, form.format(2, "tool")),
        (5, form.format(1, "user")),
    ]
    assert (ledger.kept, ledger.counts["unanswered_end"], ledger.lost["no_target"]) == (4, 3, 1)


def test_numbers_that_prefer_the_rejected_answer_are_a_finding_with_its_count(tmp_path: Path) -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows = [
        {**pair, "score_chosen": 2, "score_rejected": 1},
        {**pair, "score_chosen": 1, "score_rejected": 2},
        {**pair, "score_chosen": 0.5, "score_rejected": 9},
        {**pair, "chosen_score": "1", "rejected_score": "1.5"},
        {**pair, "chosen_rating": 4, "rejected_rating": 5},
        {**pair, "chosen_rank": 2, "rejected_rank": 1},
        {**pair, "chosen_rank": 1, "rejected_rank": 2},
        {**pair, "chosen_score": None, "rejected_score": 1},
    ]
    ledger = load(tmp_path / "rows.jsonl", *rows, task="pair", max_prompt_length=None).ledger
    form = "{} and {} prefer the rejected answer, in {} row(s), this one the first: chosen is taken for the better one"
    assert [(item.line, item.message) for item in ledger.findings if item.cause == "outscored"] == [
        (2, form.format("score_chosen", "score_rejected", 2)),
        (4, form.format("chosen_score", "rejected_score", 1)),
        (5, form.format("chosen_rating", "rejected_rating", 1)),
        (6, form.format("chosen_rank", "rejected_rank", 1)),
    ]
    assert ledger.kept == 8


def test_a_loss_asked_for_where_none_is_trained_is_a_finding(tmp_path: Path) -> None:
    rows = [
        {"messages": [{**USER, "train": False, "loss_weight": 0.0}, {**REPLY, "train": True}]},
        {"messages": [{**USER, "train": True}, REPLY, {**USER, "train": True}, REPLY]},
        {"messages": [{"role": "system", "content": "s", "loss_weight": 1.0}, {**USER, "train": True}, REPLY]},
    ]
    ledger = load(tmp_path / "rows.jsonl", *rows).ledger
    found = [(item.line, item.message.split(" asks for a loss")[0]) for item in ledger.findings]
    assert sorted(found) == [(2, "messages[].train"), (3, "messages[].loss_weight")]
    assert "in 2 row(s)" in next(item.message for item in ledger.findings if item.line == 2)
    assert ledger.counts["unheeded_key"] == 2


@pytest.mark.parametrize(
    ("record", "unread"),
    [
        ({"messages": [{**USER, "reasoning_content": "t"}, REPLY]}, "messages[].reasoning_content"),
        ({"messages": [USER, {**REPLY, "reasoning_content": "t", "thinking": "u"}]}, "messages[].thinking"),
        ({"messages": [{**USER, "name": "Ann"}, REPLY]}, "messages[].name"),
        ({"messages": [{**USER, "value": "v"}, REPLY]}, "messages[].value"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q", "cite": "c"}]}, REPLY]}, "cite"),
        ({"messages": [USER, {**REPLY, "tool_calls": [{"name": "f", "type": "t"}]}]}, "tool_calls[].type"),
        ({"conversation": [{"human": "q", "assistant": "a", "gloss": "g"}]}, "conversation[].gloss"),
        ({"conversations": [{"from": "human", "value": "q", "lang": "en"}, {"from": "gpt", "value": "a"}]}, "lang"),
        ({"chat": {"turn_1": {"Human": "q", "MOSS": "a", "Remark": "r"}}}, "chat.turn.Remark"),
        ({"instruction": "q", "output": "a", "text": "the whole"}, "text"),
        ({"instruction": "q", "output": "a", "response": "b"}, "response"),
        ({"question": "q", "answer": "a", "context": {"title": ["t"]}}, "context"),
        ({"instruction": "q", "instances": [{"input": "i", "output": "a", "constraints": "c"}]}, "constraints"),
        ({"prompt": "q", "completion": "a", "label": "maths"}, "label"),
        ({"messages": [USER, REPLY], "label": True, "why": "good"}, "why"),
        ({"messages": [USER, REPLY], "history": "of the patient"}, "history"),
        ({"messages": [USER, REPLY], "functions": ["look", "find"]}, "functions"),
        ({"messages": [USER, REPLY], "train": "split one"}, "train"),
        ({"messages": [USER, REPLY], "system": "s", "system_prompt": "t"}, "system_prompt"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "reason": "r"}, "reason"),
        ({"conversations": [USER], "chosen": {**REPLY, "why": "w"}, "rejected": "b"}, "chosen.why"),
        ({"question": "q", "response_j": "a", "response_k": "b", "site": "s"}, "site"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b", "tag": "t"}, "tag"),
        ({"text": "document", "title": "t"}, "title"),
        ({"input_ids": [1, 2], "labels": [-100, 2], "source": "s"}, "source"),
        ({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "source": "s"}, "source"),
    ],
)  # fmt: skip
def test_what_each_format_leaves_is_known_by_its_key(record: dict[str, Any], unread: str) -> None:
    task = next(
        (task for key, task in (("text", "document"), ("instruction", "conversation")) if next(iter(record)) == key),
        None,
    )
    (found,) = read_record(record, task).unread
    assert found == unread or found.endswith(f".{unread}")


# ---- whatever keys a record has

OWN = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=8).map("k_{}".format)
KNOWN = (
    "context input name value content text thought explanation history tools role from system prompt response".split()
)
KEYS = OWN | st.sampled_from(KNOWN)


def marked(number: int) -> str:
    """A text that is found again wherever it stands."""
    return f"zq{number}qz"


def pairs(*texts: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]


SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("conversation", {"messages": pairs("q", "a")}),
    ("conversation", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
    ("conversation", {"conversation": [{"human": "q", "assistant": "a"}]}),
    ("conversation", {"chat": {"turn_1": {"Human": "<|Human|>: q<eoh>\n", "MOSS": "<|MOSS|>: a<eom>\n"}}}),
    *(
        ("conversation", {question: "q", answer: "a"})
        for question in ("instruction", "question", "query", "prompt", "input", "problem", "user")
        for answer in ("output", "response", "answer", "std_answer", "target", "completion", "solution", "assistant")
    ),
    ("conversation", {"prompt": pairs("q", "r")[:1], "completion": pairs("q", "a")[1:]}),
    ("conversation", {"input": ["q", "r"], "output": ["a", "b"]}),
    ("conversation", {"instruction": "q", "instances": [{"input": "x", "output": "a"}, {"input": "y", "output": "b"}]}),
    ("conversation", {"messages": pairs("q", "a"), "label": True}),
    ("conversation", {"prompt": "q", "completion": "a", "label": True}),
    ("pair", {"chosen": pairs("q", "a"), "rejected": pairs("q", "b")}),
    ("pair", {"prompt": "q", "chosen": "a", "rejected": "b"}),
    ("pair", {"conversations": pairs("q", "a")[:1], "chosen": pairs("q", "a")[1], "rejected": pairs("q", "b")[1]}),
    ("pair", {"chosen_messages": pairs("q", "a"), "rejected_messages": pairs("q", "b")}),
    ("pair", {"messages": pairs("q", "a"), "rejected_response": "b"}),
    ("pair", {"question": "q", "response_j": "a", "response_k": "b"}),
    ("pair", {"instruction": "q", "output": ["a", "b"]}),
    ("document", {"text": "document"}),
]


def objects_in(value: Any) -> list[dict[str, Any]]:
    """Every object of a record that may get a key more."""
    found = [value] if isinstance(value, dict) else []
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return found + [item for part in inner for item in objects_in(part)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(SHAPES), st.lists(st.tuples(st.integers(0, 9), KEYS), min_size=1, max_size=4), st.booleans())
def test_the_text_of_any_further_key_is_trained_or_context_or_named(tmp_path: Path, shape, further, nested) -> None:
    task, record = shape[0], json.loads(json.dumps(shape[1]))
    texts: dict[str, str] = {}
    places = objects_in(record)
    for number, (where, key) in enumerate(further):
        place = places[where % len(places)]
        if key not in place and not (key.startswith("turn_") or place is record.get("chat")):
            texts[key] = marked(number)
            place[key] = [{"x": texts[key]}] if nested and key not in ("context", "input") else texts[key]
    examples = load(tmp_path / "rows.jsonl", record, task=task, max_prompt_length=None, text_documents="line")
    documents = examples.documents if task == "document" else examples
    decoded = "".join(tiny_tokenizer().decode(documents[n].input_ids.tolist()) for n in range(len(documents)))
    said = "\n".join(finding.message for finding in documents.ledger.findings)
    if not set(texts) & set(KNOWN):
        assert documents.ledger.kept == documents.ledger.rows == 1
    elif (
        documents.ledger.lost
    ):  # a key that formats know, with a value that they do not: the row is lost, and said to be
        assert said
        return
    for key, text in texts.items():
        named = re.search(rf"(under the key ([\w\[\]]+\.)*|'|\.|^){re.escape(key)}\b", said, re.MULTILINE)
        assert text in decoded or named, (key, record, said)
