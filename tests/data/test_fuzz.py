"""Whatever a data file holds: a clean run, exit 2, or exit 3 with file and line. Never a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from firefly.config import DataConfig
from firefly.data.dataset import find_kind, load_split
from firefly.data.encoding import Encoder
from firefly.data.formats import FORMATS
from firefly.data.templates import bind_template
from firefly.errors import FireflyError

KEYS = (
    "conversation messages conversations chat human assistant role content from value instruction input output "
    "history system tools tool_calls function name arguments reasoning_content chosen rejected prompt completion "
    "question answer query response response_j response_k text label loss weight input_ids labels turn_1 Human MOSS "
    "instances context observation parameters chosen_messages rejected_messages rejected_response std_answer train "
    "loss_weight type name Commands args params loss_mask trainable label kto_tag scores ranks score_chosen "
    "score_rejected answers answer_start problem solution Question Answer Messages id tool_call_id"
).split()
ROLES = "system user assistant tool human gpt function_call observation developer".split()
texts = st.text(max_size=12) | st.sampled_from(
    [
        *ROLES,
        "<|im_end|>",
        "</think>",
        "<think>\nx\n</think>\n\ny",
        "\n\nHuman: q\n\nAssistant: a",
        "[]",
        '{"name": "f"}',
        "\ud800",
        "\0",
        "\ufdd0",
    ]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | texts, inner, max_size=4),
    max_leaves=16,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(ROLES), "content": texts},
        optional={"reasoning_content": texts, "loss": st.booleans(), "tool_calls": values, "name": texts},
    ),
    max_size=4,
)
records = (
    values
    | st.fixed_dictionaries(
        {"messages": messages}, optional={"tools": values, "system": values, "label": st.booleans()}
    )
    | st.fixed_dictionaries(
        {"chosen": messages | texts, "rejected": messages | texts}, optional={"prompt": messages | texts}
    )
    | st.fixed_dictionaries({"instruction": texts, "output": texts}, optional={"history": values, "input": values})
    | st.fixed_dictionaries({"input": st.lists(texts), "output": st.lists(texts)}, optional={"context": values})
    | st.fixed_dictionaries({"instruction": texts, "instances": st.lists(values | messages)})
    | st.fixed_dictionaries({"messages": messages, "rejected_messages": messages}, optional={"train": values})
)


@pytest.fixture(scope="module")
def encoder(chatml_tokenizer) -> Encoder:
    return Encoder(chatml_tokenizer, bind_template("qwen2.5", chatml_tokenizer))


def outcome(path: Path, encoder: Encoder, **choices: Any) -> str:
    """What becomes of a file: `clean`, or the message of the error a run would end with. Anything else raises."""
    config = DataConfig(train_file=str(path), max_seq_length=64, **choices)
    try:
        task = find_kind(config)
        split = load_split(config, encoder, task)
        ledger = split.train.ledger
        assert ledger.rows == ledger.kept + ledger.cut + sum(ledger.lost.values())
        assert ledger.tokens >= split.train.lengths.sum() >= 0
        json.dumps(split.report(), ensure_ascii=False).encode("utf-8")
        split.check(config)
    except FireflyError as error:
        said = str(error)
    else:
        return "clean"
    assert path.name in said
    said.encode("utf-8")
    return said


FUZZ = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(st.lists(records, min_size=1, max_size=4))
def test_any_json_records(tmp_path, encoder, rows):
    path = tmp_path / "fuzz.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert outcome(path, encoder, max_malformed_rows=10, max_lost_share=1.0)
    assert outcome(path, encoder)


@FUZZ
@given(st.sampled_from(sorted(FORMATS)), records)
def test_any_record_under_a_forced_format(tmp_path, encoder, name, row):
    path = tmp_path / "forced.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert outcome(path, encoder, data_format=name, max_malformed_rows=10)


@FUZZ
@given(st.binary(max_size=200), st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".jsonl.gz"]))
def test_any_bytes(tmp_path, encoder, data, suffix):
    path = tmp_path / f"bytes{suffix}"
    path.write_bytes(data)
    assert outcome(path, encoder, max_malformed_rows=10)


def test_huge_fields_and_deep_nesting(tmp_path, encoder):
    path = tmp_path / "huge.jsonl"
    good = {"instruction": "q", "output": "a"}
    rows = [
        json.dumps(good),
        "[" * 100_000,
        json.dumps(good | {"output": "x" * 3_000_000}),
        '{"a":' * 5000 + "1" + "}" * 5000,
    ]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    assert "huge.jsonl:2" in outcome(path, encoder)
    assert outcome(path, encoder, max_malformed_rows=2) == "clean"
