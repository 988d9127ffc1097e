"""The terminal chat keeps its promises."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from firefly.commands import chat
from firefly.data.schema import Message
from firefly.data.templates import TemplateFailure
from firefly.generation import GenerationSettings

GREEDY = GenerationSettings(max_new_tokens=8, temperature=0)


class Scripted:
    """Stands for a generator whose answers are known; remembers what it was asked."""

    name = "scripted"

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[list[Message]] = []

    def stream(self, messages: list[Message], settings: Any, stop: threading.Event) -> Iterator[str]:
        assert all(message.text for message in messages)
        self.asked.append(list(messages))
        for piece in self.answers.pop(0):
            if isinstance(piece, BaseException):
                raise piece
            yield piece


def talk(generator: Any, lines: list[Any], monkeypatch: pytest.MonkeyPatch, system: str | None = None) -> None:
    """Feed `lines` to the prompt; an exception among them is raised there, the end is an end of input."""
    waiting = iter([*lines, EOFError()])

    def answer(prompt: str) -> str:
        line = next(waiting)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", answer)
    chat.talk(generator, GREEDY, system)


def roles(messages: list[Message]) -> list[str]:
    return [message.role for message in messages]


def test_chat_keeps_history_until_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Scripted(["one"], ["two"], ["three"])
    talk(generator, ["a", "b", "/reset", "c"], monkeypatch)
    assert [roles(asked) for asked in generator.asked] == [["user"], ["user", "assistant", "user"], ["user"]]


def test_a_system_prompt_can_be_set_and_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Scripted(["one"], ["two"], ["three"])
    talk(generator, ["a", "/system Be brief.", "b", "/system", "c"], monkeypatch, system="At first.")
    assert [asked[0].text for asked in generator.asked] == ["At first.", "Be brief.", "c"]


def test_ctrl_c_stops_an_answer_and_not_the_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = Scripted(["so ", "far", KeyboardInterrupt()], ["again"])
    talk(generator, ["a", KeyboardInterrupt(), "b"], monkeypatch)
    assert [message.text for message in generator.asked[1]] == ["a", "so far", "b"]
    assert "[stopped]" in capsys.readouterr().out


def test_saved_conversations_are_records_that_train_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    talk(Scripted(["fine"]), ["how are you?", f"/save {file}", "/exit", "never"], monkeypatch)
    assert json.loads(file.read_text()) == {
        "messages": [{"role": "user", "content": "how are you?"}, {"role": "assistant", "content": "fine"}]
    }


def test_a_question_the_template_refuses_leaves_no_trace(capsys: pytest.CaptureFixture[str]) -> None:
    session = chat.ChatSession(Scripted([TemplateFailure("no system role")]), GREEDY)  # type: ignore[arg-type]
    session.ask("a")
    assert session.history == []
    assert "no system role" in capsys.readouterr().err


def test_a_file_that_this_chat_did_not_write_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, new = tmp_path / "data.jsonl", tmp_path / "talk.jsonl"
    mine.write_text("keep")
    lines = ["one", f"/save {mine}", f"/save {new}", "two", f"/save {new}"]
    talk(Scripted(["fine"], ["well"]), lines, monkeypatch)
    assert mine.read_text() == "keep"
    assert f"{mine} exists already" in capsys.readouterr().err
    assert len(json.loads(new.read_text())["messages"]) == 4
