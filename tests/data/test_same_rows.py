"""The same rows give the same tokens, whatever kind of file holds them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from firefly.config import DataConfig
from firefly.data.dataset import load_split
from firefly.data.encoding import Encoder
from firefly.data.schema import Tokens
from firefly.data.templates import bind_template
from tiny import tiny_tokenizer


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


TOOLS = [
    tool("weather", city={"type": "string", "enum": ["Oslo", "Rome"]}),
    tool("rate", base={"type": "string"}, days={"type": "integer"}),
]


def row(question: str, name: str, arguments: Any, result: str, answer: str, **beside: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {
        "tools": TOOLS,
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": result, "name": name},
            {"role": "assistant", "content": answer, "loss": True},
        ],
        **beside,
    }


ROWS = [
    row("Weather in Oslo?", "weather", {"city": "Oslo"}, "sunny", "It is sunny.", system="Be brief."),
    row("Rate of EUR?", "rate", {"base": "EUR", "days": 3}, "1.1", "It is 1.1."),
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello.", "loss": True}]},
]


def tokens(path: Path) -> list[Tokens]:
    encoder = Encoder(tiny_tokenizer(), bind_template("qwen2.5", tiny_tokenizer()))
    train = load_split(DataConfig(train_file=str(path), max_seq_length=4096), encoder).train
    assert train.ledger.kept == len(train)
    return [train[number] for number in range(len(train))]


def same(found: list[Tokens], expected: list[Tokens]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        text = tiny_tokenizer().decode(one.input_ids.tolist())
        assert text == tiny_tokenizer().decode(other.input_ids.tolist())
        np.testing.assert_array_equal(one.labels, other.labels)


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in rows), encoding="utf-8")
    return path


@pytest.fixture
def expected(tmp_path: Path) -> list[Tokens]:
    found = tokens(write_lines(tmp_path / "rows.jsonl", ROWS))
    text = tiny_tokenizer().decode(found[0].input_ids.tolist())
    assert '{"name": "weather", "arguments": {"city": "Oslo"}}' in text
    assert "null" not in text
    return found


def test_a_json_list_is_its_lines(tmp_path: Path, expected: list[Tokens]) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    same(tokens(tmp_path / "rows.json"), expected)


def test_structs_of_parquet_give_what_each_row_said(tmp_path: Path, expected: list[Tokens]) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    same(tokens(tmp_path / "rows.parquet"), expected)


def arguments_of(message: dict[str, Any]) -> dict[str, Any]:
    return message["tool_calls"][0]["function"]["arguments"]


@pytest.mark.parametrize("form", ["map", "json text"])
def test_arguments_may_be_a_map_or_json_text(tmp_path: Path, form: str) -> None:
    rows = json.loads(json.dumps(ROWS[:2]))
    for item in rows:
        arguments = arguments_of(item["messages"][1])
        arguments.update({key: str(value) for key, value in arguments.items()})
    expected = tokens(write_lines(tmp_path / "texts.jsonl", rows))
    for item in rows:
        function = item["messages"][1]["tool_calls"][0]["function"]
        arguments = function["arguments"]
        function["arguments"] = list(arguments.items()) if form == "map" else json.dumps(arguments)
    kind = pa.map_(pa.string(), pa.string()) if form == "map" else pa.string()
    function = pa.struct({"name": pa.string(), "arguments": kind})
    call = pa.struct({"type": pa.string(), "function": function})
    message = {"role": pa.string(), "content": pa.string(), "name": pa.string(), "tool_calls": pa.list_(call)}
    for item in rows:
        item["tools"] = json.dumps(item["tools"])
    columns = {"messages": pa.list_(pa.struct(message)), "tools": pa.string(), "system": pa.string()}
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(columns)), tmp_path / "rows.parquet")
    same(tokens(tmp_path / "rows.parquet"), expected)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_columns_of_json_text_give_the_same(tmp_path: Path, expected: list[Tokens], suffix: str) -> None:
    cells = [
        {key: value if isinstance(value, str) else json.dumps(value, indent=1) for key, value in item.items()}
        for item in ROWS
    ]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(cells), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["tools", "messages", "system"], delimiter="," if suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(cells)
    same(tokens(path), expected)


def test_a_null_that_json_says_stays_in_a_call(tmp_path: Path) -> None:
    said = row("Rate?", "rate", {"base": None, "days": [None, {"of": None}]}, "1.1", "It is 1.1.")
    as_text = row("Rate?", "rate", json.dumps({"base": None, "days": [None, {"of": None}]}), "1.1", "It is 1.1.")
    found, other = tokens(write_lines(tmp_path / "rows.jsonl", [said, as_text]))
    call = '{"name": "rate", "arguments": {"base": null, "days": [null, {"of": null}]}}'
    assert call in tiny_tokenizer().decode(found.input_ids.tolist())
    same([found], [other])


def test_lists_of_columns_and_of_structs_are_the_same_turns(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    columns = {"from": ["human", "gpt"], "value": ["q", "a"]}
    expected = tokens(write_lines(tmp_path / "rows.jsonl", [{"conversations": turns}]))
    same(tokens(write_lines(tmp_path / "columns.jsonl", [{"conversations": columns}])), expected)
    pq.write_table(pa.Table.from_pylist([{"conversations": turns, "more": None}]), tmp_path / "rows.parquet")
    same(tokens(tmp_path / "rows.parquet"), expected)
