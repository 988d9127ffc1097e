"""Whole files against an independent reading of their rows: what is trained, what stands before it, and no row missing.

The readers here are a few lines each and share nothing with the program: which texts of a row must be targets, and
which must be context.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from firefly.config import DataConfig
from firefly.data.dataset import load_split
from firefly.data.encoding import Encoder
from firefly.data.schema import IGNORE, TokenPair
from firefly.data.templates import bind_template

STOP = "<|im_end|>"
Read = Callable[[Any], tuple[list[str], list[str]]]
"""A row's (targets, context), in order."""


def alpaca(row: dict[str, Any]) -> tuple[list[str], list[str]]:
    return [row["output"]], [row["instruction"], row["input"]]


def firefly(row: dict[str, Any]) -> tuple[list[str], list[str]]:
    turns = row["conversation"]
    return [turn["assistant"] for turn in turns], [row.get("system") or "", *(turn["human"] for turn in turns)]


def glaive(row: dict[str, Any]) -> tuple[list[str], list[str]]:
    targets, context = [], [tool["name"] for tool in json.loads(row["tools"] or "[]")]
    for turn in row["conversations"]:
        if turn["from"] == "gpt":
            targets.append(turn["value"])
        elif turn["from"] == "function_call":
            call = json.loads(turn["value"])
            targets.append(f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>")
        else:
            context.append(turn["value"])
    return targets, context


def kto(row: dict[str, Any]) -> tuple[list[str], list[str]]:
    replies = [item["content"] for item in row["messages"] if item["role"] == "assistant"]
    return replies if row["label"] else [], [item["content"] for item in row["messages"] if item["role"] != "assistant"]


def sharegpt_pair(row: dict[str, Any]) -> tuple[list[str], list[str]]:
    answers = [row["chosen"]["value"], row["rejected"]["value"]]
    return answers, [turn["value"] for turn in row["conversations"]]


def message_pair(row: dict[str, Any]) -> tuple[list[str], list[str]]:
    answers = [row["chosen"][-1]["content"], row["rejected"][-1]["content"]]
    return answers, [row["prompt"], *(item["content"] for item in row["chosen"][:-1])]


FILES: dict[str, tuple[str, int, Read]] = {
    "alpaca_en_demo.json": ("conversation", 999, alpaca),
    "alpaca_zh_demo.json": ("conversation", 1000, alpaca),
    "identity.json": ("conversation", 91, alpaca),
    "firefly_sft.jsonl": ("conversation", 33, firefly),
    "glaive_toolcall_en_demo.json": ("conversation", 300, glaive),
    "kto_en_demo.json": ("conversation", 300, kto),
    "dpo_en_demo.json": ("pair", 300, sharegpt_pair),
    "dpo_zh_demo.json": ("pair", 300, sharegpt_pair),
    "firefly_dpo.jsonl": ("pair", 16, message_pair),
    "c4_demo.jsonl": ("document", 300, lambda row: ([row["text"]], [])),
    "firefly_pretrain.jsonl": ("document", 45, lambda row: ([row["text"]], [])),
    "wiki_demo.txt": ("document", 30, lambda row: ([row], [])),
}


def rows_of(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    lines = [line for line in text.split("\n") if line.strip()]
    return [json.loads(line) for line in lines] if path.suffix == ".jsonl" else lines


def sides(example: Any) -> list[Any]:
    return list(example.sides) if isinstance(example, TokenPair) else [example]


def trained_texts(tokenizer: Any, example: Any) -> list[str]:
    """The trained runs of an example, without their stop tokens."""
    texts = []
    for side in sides(example):
        run: list[int] = []
        for token, label in zip([*side.input_ids.tolist(), 0], [*side.labels.tolist(), IGNORE], strict=True):
            if label != IGNORE:
                run.append(token)
            elif run:
                texts.append(tokenizer.decode(run))
                run = []
    return texts


@pytest.mark.parametrize("name", FILES)
def test_every_row_of_a_public_file_trains_what_it_says_behind_its_context(shared, qwen_tokenizer, name):
    task, count, read = FILES[name]
    path = shared / "data" / name
    rows = rows_of(path)
    assert len(rows) == count
    encoder = Encoder(qwen_tokenizer, bind_template("qwen2.5", qwen_tokenizer))
    config = DataConfig(train_file=str(path), max_seq_length=100_000, max_prompt_length=None, max_lost_share=1.0)
    split = load_split(config, encoder, task)
    examples = split.train.documents if task == "document" else split.train
    ledger = examples.ledger
    assert ledger.rows == count == ledger.kept + ledger.cut + sum(ledger.lost.values())
    assert (ledger.cut, ledger.lost["malformed"], ledger.lost["refused"]) == (0, 0, 0)

    end = "<|endoftext|>" if task == "document" else STOP
    expected = [(targets, context) for targets, context in map(read, rows) if targets]
    assert len(examples) == len(expected) == ledger.kept
    for number, (targets, context) in enumerate(expected):
        example = examples[number]
        whole = "".join(qwen_tokenizer.decode(side.input_ids.tolist()) for side in sides(example))
        wanted = [unicodedata.normalize("NFC", text) + end for text in targets]
        assert trained_texts(qwen_tokenizer, example) == wanted, f"{name}: row {number}"
        missing = [text for text in context if unicodedata.normalize("NFC", text).strip() not in whole]
        assert not missing, f"{name}: row {number}"


def test_of_public_files_only_labels_and_identifiers_are_not_read(shared, qwen_tokenizer):
    encoder = Encoder(qwen_tokenizer, bind_template("qwen2.5", qwen_tokenizer))

    def unread(name: str) -> dict[str, int]:
        config = DataConfig(train_file=str(shared / "data" / name), max_lost_share=1.0)
        split = load_split(config, encoder, FILES[name][0])
        examples = split.train.documents if FILES[name][0] == "document" else split.train
        assert not examples.ledger.counts["wrapped_text"]
        return dict(examples.ledger.unread_keys)

    assert unread("firefly_sft.jsonl") == {"category": 33, "dataset": 33}
    assert unread("firefly_dpo.jsonl") == {"prompt_id": 16}  # `messages` is the better answer once more
    for name in ("alpaca_en_demo.json", "glaive_toolcall_en_demo.json", "kto_en_demo.json", "wiki_demo.txt"):
        assert unread(name) == {}


# ---- the reported rows


def load(path: Path, encoder: Encoder, task: str = "conversation", **options: Any) -> Any:
    config = DataConfig(train_file=str(path), max_malformed_rows=100, max_lost_share=1.0, **options)
    return load_split(config, encoder, task).train


@pytest.fixture
def encoder(qwen_tokenizer) -> Encoder:
    return Encoder(qwen_tokenizer, bind_template("qwen2.5", qwen_tokenizer))


def test_the_text_of_a_context_stands_behind_the_question(shared, encoder):
    examples = load(shared / "reports" / "rows" / "keys_nobody_reads.jsonl", encoder)
    paris = "XCTX Paris is the capital of France."
    questions = [
        f"What is the capital?\n{paris}",
        f"Answer from the text.\n{paris}",
        "What is the capital?\nXCTX Paris",
        "What is the capital?\nXCTX Paris",
        "What?\nXCTX Paris",
        "What?\nYYY\nXCTX Paris",
    ]
    for number, question in enumerate(questions):
        text = encoder.tokenizer.decode(examples[number].input_ids.tolist())
        assert f"<|im_start|>user\n{question}{STOP}\n<|im_start|>assistant\nParis{STOP}" in text
        assert trained_texts(encoder.tokenizer, examples[number]) == [f"Paris{STOP}"]
    assert not examples.ledger.counts["unread_key"]


def test_an_empty_reply_in_the_middle_is_a_finding_with_its_turn(shared, encoder, tmp_path):
    path = shared / "reports" / "rows" / "empty_reply_in_the_middle.jsonl"
    for train_on, trained, said in (
        ("all", [STOP, f"c{STOP}"], "turn 1 of 2: the reply is empty; only its stop token is trained"),
        ("last", [f"c{STOP}"], "turn 1 of 2: the reply is empty; it is not trained"),
    ):
        examples = load(path, encoder, train_on=train_on)
        assert trained_texts(encoder.tokenizer, examples[0]) == trained
        (finding,) = examples.ledger.findings
        assert (finding.cause, finding.line, finding.message) == ("empty_answer", 1, said)
        assert (examples.ledger.kept, dict(examples.ledger.lost)) == (1, {})
    row = json.loads(path.read_text(encoding="utf-8"))
    row["messages"][1]["loss"] = False
    (tmp_path / "no_loss.jsonl").write_text(json.dumps(row), encoding="utf-8")
    examples = load(tmp_path / "no_loss.jsonl", encoder)
    assert trained_texts(encoder.tokenizer, examples[0]) == [f"c{STOP}"]
    assert examples.ledger.findings[0].message.endswith("it is not trained")


def test_the_reported_shapes_are_trained(shared, encoder, tmp_path):
    lines = (shared / "reports" / "rows" / "shapes.jsonl").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        (tmp_path / f"{number}.jsonl").write_text(line, encoding="utf-8")

    def trained(number: int, task: str = "conversation", **options: Any) -> list[list[str]]:
        examples = load(tmp_path / f"{number}.jsonl", encoder, task, **options)
        assert examples.ledger.kept == 1
        return [
            [text.removesuffix(STOP) for text in trained_texts(encoder.tokenizer, examples[n])]
            for n in range(len(examples))
        ]

    assert trained(1) == [["cold"], ["short"]]
    assert trained(2) == [["Hi, how can I help?", "Four."]]
    assert trained(3) == [["Green."]]
    assert trained(4) == [["An oak."]]
    assert trained(5, "pair") == [["A wren.", "Bird."]]
    assert trained(6, "pair") == [["A pear", "Fruit"]]
    assert trained(7) == [["Eight"]]
    call = '<tool_call>\n{"name": "Search", "arguments": {"query": "weather Oslo"}}\n</tool_call>'
    moss = Encoder(encoder.tokenizer, bind_template("qwen2.5", encoder.tokenizer, thinking="strip"))
    example = load(tmp_path / "8.jsonl", moss)[0]
    assert trained_texts(moss.tokenizer, example) == [f"{call}{STOP}", f"It rains, at 4 degrees.{STOP}"]
    assert 'Search("weather Oslo") =>\n<|1|>: Rain, 4 degrees' in moss.tokenizer.decode(example.input_ids.tolist())
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
    assert trained(9) == [[call, "Five."]]
    assert trained(10) == [["Goodbye."]]
    ledger = load(tmp_path / "11.jsonl", encoder).ledger
    assert dict(ledger.lost) == {"malformed": 1}
    assert "messages[1].loss_weight must be 0 or 1, not 0.5" in ledger.findings[0].message
