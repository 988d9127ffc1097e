"""`firefly check` and `firefly templates` as people and programs call them."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from firefly.cli import main
from firefly.commands.check import histogram
from tiny import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    good = [{"instruction": f"q{i}", "output": "a" * (1 + i)} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in good), encoding="utf-8")
    return path


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def check(capsys, rows: Path, model: str, *more: str) -> tuple[int, str, str]:
    common = ("--train_file", str(rows), "--model_name_or_path", model, "--template_name", "qwen")
    return run(capsys, "check", *common, *more)


def test_clean_rows_are_exit_0_and_one_json_value(capsys, rows, model):
    code, out, _ = check(capsys, rows, model, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["format"], found["task"], found["rows"], found["kept"], found["cut"]) == ("alpaca", "sft", 5, 5, 0)
    assert found["lost"] == {}
    assert found["findings"] == []
    assert found["problem"] is None
    assert sum(item["count"] for item in found["lengths"]) == sum(item["count"] for item in found["target_share"]) == 5
    # One token a byte: each answer and its stop.
    assert found["target_tokens"] == sum(1 + i + 1 for i in range(5))


def test_rows_that_would_stop_a_run_are_exit_3_with_their_places(capsys, rows, model):
    with rows.open("a", encoding="utf-8") as file:
        file.write('{"broken\n\n')
    code, out, err = check(capsys, rows, model, "--json")
    found = json.loads(out)
    assert code == 3
    assert found["rows"] == found["kept"] + found["cut"] + sum(found["lost"].values()) == 6
    assert [(item["line"], item["cause"]) for item in found["findings"]] == [(6, "malformed"), (7, "blank_line")]
    assert all(item["file"] == str(rows) and item["message"] for item in found["findings"])
    assert f"{rows}:6: not valid JSON" in err
    assert "Traceback" not in err
    assert check(capsys, rows, model, "--max_malformed_rows", "1")[0] == 0


def test_rows_held_out_by_share_are_counted_and_the_ledger_is_printed_once(capsys, rows, model):
    code, out, _ = check(capsys, rows, model, "--eval_ratio", "0.4")
    assert code == 0
    assert out.count("data: ") == 1
    assert "3 examples to train, 2 held out" in out


def test_the_histogram_ends_at_the_longest_example():
    bars = histogram(np.array([7, 100, 128, 128]))
    assert (bars[0]["from"], bars[-1]["to"], bars[-1]["count"]) == (7, 128, 2)


def test_a_file_that_is_not_there_is_exit_2(capsys, tmp_path, model):
    code, out, err = check(capsys, tmp_path / "none.jsonl", model, "--json")
    assert (code, out) == (2, "")
    assert "train_file" in err


def test_a_configuration_is_checked_as_a_run_would_read_it(capsys, rows, model, tmp_path):
    config = tmp_path / "c.json"
    values = {"train_file": str(rows), "model_name_or_path": model, "template_name": "qwen", "output_dir": "x"}
    config.write_text(json.dumps(values | {"deepspeed": "no.json", "task_type": "sft"}), encoding="utf-8")
    code, out, _ = run(capsys, "check", str(config), "--max_seq_length", "40", "--max_lost_share", "1", "--json")
    found = json.loads(out)
    assert code == 3  # every row is longer than 40 tokens, and its question fills them
    assert found["lost"] == {"too_long": 5}


def test_pairs_under_a_configuration_without_a_task_are_judged_as_train_would(capsys, model, tmp_path):
    config, pairs = tmp_path / "c.json", tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}), encoding="utf-8")
    values = {"train_file": str(pairs), "model_name_or_path": model, "template_name": "qwen", "output_dir": "x"}
    config.write_text(json.dumps(values), encoding="utf-8")
    code, out, _ = run(capsys, "check", str(config), "--json")
    assert (code, json.loads(out)["task"]) == (3, "sft")


def test_the_page_holds_the_preview_and_escapes_what_was_typed(capsys, model, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": "<script>alert(1)</script>", "output": "a"}) + "\n", encoding="utf-8")
    page = tmp_path / "page.html"
    code, out, _ = check(capsys, path, model, "--html", str(page))
    text = page.read_text(encoding="utf-8")
    assert code == 0
    assert "<script>" not in text
    assert "<mark>a&lt;|im_end|&gt;</mark>" in text
    assert "1 rows, 1 kept" in out
    assert check(capsys, path, model, "--html", str(tmp_path / "no" / "folder.html"))[0] == 2


def test_preferences_and_documents_are_checked_for_their_own_task(capsys, model, tmp_path):
    pairs, words = tmp_path / "pairs.jsonl", tmp_path / "words.txt"
    pairs.write_text(json.dumps({"prompt": "q", "chosen": "good", "rejected": "bad"}) + "\n", encoding="utf-8")
    words.write_text("one document\n\nanother\n", encoding="utf-8")
    found = json.loads(check(capsys, pairs, model, "--json")[1])
    assert (found["task"], found["kept"], found["examples"], found["target_tokens"]) == ("dpo", 1, 1, 5 + 4)
    found = json.loads(check(capsys, words, model, "--json")[1])
    assert (found["task"], found["kept"], found["counts"]) == ("pretrain", 2, {"blank_line": 1})
    code, _, err = check(capsys, pairs, model, "--task_type", "sft")
    assert code == 3
    assert "task_type dpo" in err


# ---- firefly templates


def test_the_list_names_every_template_with_its_aliases(capsys):
    code, out, _ = run(capsys, "templates", "list", "--json")
    listed = {item["name"]: item["aliases"] for item in json.loads(out)}
    assert code == 0
    assert listed["deepseek-llm"] == ["deepseek"]
    assert "qwen3" in run(capsys, "templates", "list")[1]


def test_messages_are_rendered_with_the_spans_that_carry_loss(capsys, tmp_path, monkeypatch):
    request = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path = tmp_path / "m.json"
    path.write_text(json.dumps(request), encoding="utf-8")
    code, out, _ = run(capsys, "templates", "render", "smollm2", "--messages", str(path), "--json")
    rendered = json.loads(out)
    ((start, end),) = rendered["spans"]
    assert code == 0
    assert rendered["text"][start:end] == "a<|im_end|>"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(request).encode())))
    again = run(capsys, "templates", "render", "smollm2", "--messages", "-", "--json", "--add_generation_prompt")[1]
    assert json.loads(again)["text"] == rendered["text"] + "<|im_start|>assistant\n"
    assert run(capsys, "templates", "show", "smollm2")[1].count("generation") == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "messages"),
        ('{"messages": []}', "messages"),
        ('{"messages": [{"content": "x"}]}', "role"),
        ("{", "messages"),
        ('{"messages": [{"role": "user", "content": null}]}', "refuses"),
    ],
)
def test_messages_that_are_none_are_exit_2(capsys, tmp_path, content, said):
    path = tmp_path / "m.json"
    path.write_text(content, encoding="utf-8")
    code, out, err = run(capsys, "templates", "render", "qwen", "--messages", str(path), "--json")
    assert (code, out) == (2, "")
    assert said in err


def test_an_unknown_template_names_the_nearest(capsys, tmp_path):
    code, _, err = run(capsys, "templates", "show", "qwen33")
    assert code == 2
    assert "'qwen3'" in err


def test_verify_proves_a_template_or_is_exit_3(capsys, model, monkeypatch):
    code, out, _ = run(
        capsys, "templates", "verify", "--model_name_or_path", model, "--template_name", "qwen", "--json"
    )
    proved = json.loads(out)
    assert code == 0
    assert proved["passed"]
    assert len(proved["hash"]) == 64

    monkeypatch.setattr("firefly.models.loading.stop_ids_of", lambda config: [0])
    code, out, err = run(capsys, "templates", "verify", "--model_name_or_path", model, "--template_name", "qwen")
    assert code == 3
    assert "FAIL stop_in_generation_config" in out
    assert "stop_in_generation_config" in err
