"""Consoles, pipes and files of any encoding: no command dies of a character, and JSON stays JSON."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import firefly
from firefly.cli import main
from firefly.data.families import TEMPLATES
from firefly.data.templates import read_template
from run_folders import write_run
from tiny import save_tiny_model

ENCODINGS = ["cp1252", "cp437", "gbk", "latin-1", "ascii", "utf-8"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("encodings") / "model"))


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "数据 é.jsonl"
    shown = {"instruction": "你好 é", "output": "你好 🤗 naïve – “yes” ✓"}
    path.write_text(json.dumps(shown, ensure_ascii=False) + "\n" + '{"instruction": "Hello", "output": 1}\n', "utf-8")
    return str(path)


@pytest.fixture(params=ENCODINGS)
def encoding(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["en", "zh"])
def call(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Calls a command whose streams have an encoding, as Python makes them; gives its exit code and both texts."""
    monkeypatch.setenv("FIREFLY_LANG", request.param)

    def called(encoding: str, *arguments: str, typed: bytes = b"") -> tuple[int, str, str]:
        streams = [io.TextIOWrapper(io.BytesIO(), encoding, errors) for errors in ("strict", "backslashreplace")]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding))
        code = main(list(arguments))
        written = []
        for stream in streams:
            stream.flush()
            written.append(stream.buffer.getvalue().decode(encoding))  # type: ignore[attr-defined]
        return code, written[0], written[1]

    return called


def test_check_shows_any_row(call: Run, encoding: str, rows: str, model: str) -> None:
    common = (
        "--train_file",
        rows,
        "--model_name_or_path",
        model,
        "--template_name",
        "qwen",
        "--max_malformed_rows",
        "1",
    )
    code, out, _ = call(encoding, "check", *common)
    assert code == 0
    for text in ("你好 é", "你好 🤗 naïve"):
        assert text.encode(encoding, "replace").decode(encoding) in out
    code, out, _ = call(encoding, "check", *common, "--json")
    assert code == 0
    assert json.loads(out)["file"] == rows


def test_a_template_is_shown_and_rendered(call: Run, encoding: str, tmp_path: Path) -> None:
    code, out, _ = call(encoding, "templates", "show", "deepseek-r1")
    assert code == 0
    assert out.strip() == read_template(TEMPLATES["deepseek-r1"]).encode(encoding, "replace").decode(encoding).strip()
    request = tmp_path / "messages.json"
    request.write_text('{"messages": [{"role": "user", "content": "你好 🤗"}]}', encoding="utf-8")
    assert call(encoding, "templates", "render", "deepseek-r1", "--messages", str(request))[0] == 0
    code, out, _ = call(encoding, "templates", "render", "deepseek-r1", "--messages", str(request), "--json")
    assert code == 0
    assert "<｜User｜>你好 🤗" in json.loads(out)["text"]
    code, out, _ = call(encoding, "templates", "list", "--json")
    assert [item["name"] for item in json.loads(out)] == list(TEMPLATES)
    assert call(encoding, "templates", "list")[0] == 0


def test_runs_are_listed_and_shown(call: Run, encoding: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "输出 é")
    assert call(encoding, "runs", "list", str(tmp_path))[0] == 0
    assert call(encoding, "runs", "show", str(folder))[0] == 0
    assert call(encoding, "runs", "diff", str(folder), str(folder))[0] == 0
    code, out, _ = call(encoding, "runs", "list", str(tmp_path), "--json")
    assert code == 0
    assert json.loads(out)[0]["path"] == str(folder)


def test_a_message_that_ends_a_command_names_any_path(call: Run, encoding: str) -> None:
    code, _, err = call(encoding, "check", "--train_file", "没有 é.jsonl")
    assert code == 2
    assert "没有 é.jsonl".encode(encoding, "backslashreplace").decode(encoding) in err
    assert call(encoding, "templates", "show", "模板")[0] == 2
    assert call(encoding, "train", "--数据")[0] == 2
    assert call(encoding, "check", "--html")[0] == 2
    assert call(encoding, "--help")[0] == 0


def test_training_says_what_it_says_in_any_encoding(call: Run, rows: str, model: str, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {"model_name_or_path": model, "train_file": rows, "output_dir": str(tmp_path / "出力")}
            | {"template_name": "qwen", "max_steps": 1, "report_to": "none", "max_malformed_rows": 1}
            | {"compare": False}
        ),
        encoding="utf-8",
    )
    code, out, err = call("cp437", "train", str(config))
    assert code == 0, err
    assert out.strip() == str(tmp_path / "出力").encode("cp437", "replace").decode("cp437")


def test_chat_reads_bytes_of_another_encoding_and_says_so(call: Run, encoding: str, model: str) -> None:
    arguments = ("--model_name_or_path", model, "--template_name", "default", "--max_new_tokens", "2")
    typed = b"red\n\xff\x81 blue\n/exit\n"
    code, _, err = call(encoding, "chat", *arguments, typed=typed)
    assert code == 0
    assert ("PYTHONIOENCODING" in err) == (encoding in ("gbk", "ascii", "utf-8", "cp1252"))  # others know every byte


def in_ascii(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    """A command where the locale knows no character but ASCII's, in names of files neither."""
    source = {"PYTHONPATH": str(Path(firefly.__file__).parents[1])}
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", "from firefly.cli import run; run()", *arguments]
    return subprocess.run(command, env=os.environ | source | locale, capture_output=True)


@pytest.mark.slow
def test_a_command_in_a_locale_without_any_encoding_but_ascii_ends_well(rows: str, model: str) -> None:
    model_and_template = ("--model_name_or_path", model, "--template_name", "qwen", "--max_malformed_rows", "1")
    done = in_ascii("check", "--train_file", rows, *model_and_template, "--json")
    assert done.returncode == 0, done.stderr
    assert os.fsencode(json.loads(done.stdout)["file"]) == os.fsencode(rows)


@pytest.mark.slow
@pytest.mark.parametrize("inside", [True, False], ids=["configuration", "argument"])
def test_a_file_name_that_cannot_be_used_is_one_message_before_anything_is_trained(
    rows: str, model: str, tmp_path: Path, inside: bool
) -> None:
    config = tmp_path / "config.json"
    place = str(tmp_path / "出力")
    settings = {"model_name_or_path": model, "train_file": rows, "output_dir": place if inside else "out"}
    config.write_text(json.dumps(settings), encoding="utf-8")
    done = in_ascii("train", str(config), *([] if inside else ["--output_dir", place]))
    assert done.returncode == 2
    assert b"PYTHONUTF8=1" in done.stderr
    assert b"Traceback" not in done.stderr
    assert not Path(place).exists()
