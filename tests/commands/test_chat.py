"""The terminal chat keeps its promises."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from firefly.commands import chat
from firefly.config import ModelConfig
from firefly.data.encoding import Encoder
from firefly.data.formats import parse_record
from firefly.data.schema import Message
from firefly.data.templates import TemplateFailure, bind_template
from firefly.errors import UsageError
from firefly.generation import GenerationFailed, GenerationSettings, Generator
from firefly.generation.batched import BatchLimits
from firefly.generation.engine import Delta
from firefly.generation.generator import make_engine
from firefly.generation.loading import Loaded, load_for_generation
from firefly.generation.plain import PlainEngine
from tiny import save_tiny_model, tiny_tokenizer

GREEDY = GenerationSettings(max_new_tokens=8, temperature=0)


class Scripted:
    """Stands for a generator whose answers are known; remembers what it was asked."""

    name = "scripted"

    def __init__(self, *answers: Any, template: str = "qwen2.5") -> None:
        tokenizer = tiny_tokenizer()
        self.encoder = Encoder(tokenizer, bind_template(template, tokenizer))
        self.answers = list(answers)
        self.asked: list[list[Message]] = []
        self.refuses: Exception | None = None

    def encode(self, messages: list[Message]) -> tuple[int, ...]:
        if self.refuses:
            raise self.refuses
        self.asked.append(list(messages))
        return tuple(self.encoder.encode_prompt(messages))

    def request(self, prompt_ids: Any, settings: Any) -> None: ...

    def prompt_end(self, prompt_ids: Any) -> str:
        return self.encoder.tokenizer.decode(prompt_ids)

    def deltas(self, request: Any) -> Iterator[Delta]:
        for piece in self.answers.pop(0):
            if isinstance(piece, BaseException):
                raise piece
            yield Delta(piece)


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


@pytest.mark.parametrize("failure", [TemplateFailure("no system role"), UsageError("x", "too long")])
def test_a_question_that_cannot_be_sent_leaves_no_trace(failure: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    generator = Scripted(["fine"])
    session = chat.ChatSession(generator, GREEDY)  # type: ignore[arg-type]
    generator.refuses = failure
    session.ask("a")
    assert session.history == []
    assert f"this cannot be sent: {failure}" in capsys.readouterr().err
    generator.refuses = None
    session.ask("b")
    assert roles(session.history) == ["user", "assistant"]


def test_an_answer_that_fails_leaves_no_trace(capsys: pytest.CaptureFixture[str]) -> None:
    session = chat.ChatSession(Scripted(["so", GenerationFailed("out of memory")]), GREEDY)  # type: ignore[arg-type]
    session.ask("a")
    assert session.history == []
    assert "no answer came: out of memory" in capsys.readouterr().err


THOUGHT_AND_CALL = (
    "<think>\n",
    "It asks ",
    "for rain.\n</think>\n\n",
    "I look.",
    '\n<tool_call>\n{"name": "weather", ',
    '"arguments": {"city": "Paris"}}\n</tool_call>',
)


def test_thoughts_and_calls_go_into_the_history_as_such(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    generator = Scripted(THOUGHT_AND_CALL, ["It rains."], template="qwen3")
    file = tmp_path / "talk.jsonl"
    talk(generator, ["rain?", "and?", f"/save {file}"], monkeypatch)
    reply = generator.asked[1][1]
    assert (reply.reasoning, reply.text) == ("It asks for rain.", "I look.")
    assert [call["function"] for call in reply.tool_calls] == [{"name": "weather", "arguments": {"city": "Paris"}}]
    assert 'It asks for rain.\n\nI look.\n→ weather {"city": "Paris"}' in capsys.readouterr().out
    _, saved = parse_record(json.loads(file.read_text()))
    assert [(message.text, message.reasoning) for message in saved.messages] == [  # type: ignore[union-attr]
        ("rain?", None),
        ("I look.", "It asks for rain."),
        ("and?", None),
        ("It rains.", None),
    ]


def test_special_tokens_in_an_answer_are_not_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Scripted(["so<|endoftext|>", " be it"], ["yes"])
    talk(generator, ["a", "b"], monkeypatch)
    assert generator.asked[1][1].text == "so be it"
    assert "endoftext" not in capsys.readouterr().out


def test_an_interrupt_of_the_terminal_ends_the_answer_in_the_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    letters = dict.fromkeys(tiny_tokenizer().encode("abcdefgh"), 1000.0)
    settings = GenerationSettings(max_new_tokens=300, temperature=0, logit_bias=letters)
    folder = save_tiny_model(tmp_path / "model", "llama")
    loaded = load_for_generation(ModelConfig(name_or_path=str(folder)), {}, "qwen2.5", dtype="float32")
    with batched(loaded) as generator:
        steps: list[int] = []

        def interrupt(module: Any, inputs: Any, output: Any) -> None:
            steps.append(1)
            if len(steps) == 10:
                os.kill(os.getpid(), signal.SIGINT)

        handle = loaded.model.get_input_embeddings().register_forward_hook(interrupt)
        session = chat.ChatSession(generator, settings)
        session.ask("first question")
        seen = 0
        while len(steps) > seen:  # until the engine rests
            seen = len(steps)
            time.sleep(0.2)
        handle.remove()
        assert seen < 290
        assert "[stopped]" in capsys.readouterr().out
        assert 5 < len(session.history[-1].text) < 290
        session.ask("second question")
        assert len(session.history[-1].text) == 300


PAGE = 8


def batched(loaded: Loaded) -> Generator:
    limits = BatchLimits(cache_tokens=1024, page_size=PAGE)
    return Generator(make_engine(loaded, limits), loaded.served)


def one_by_one(loaded: Loaded) -> Generator:
    (name,) = loaded.served
    tokenizers = {name: loaded.served[name].tokenizer}
    return Generator(PlainEngine(loaded.model, tokenizers, loaded.select, 512), loaded.served)


@pytest.mark.parametrize(("engine", "page"), [(batched, PAGE), (one_by_one, 1)])
def test_the_second_turn_computes_only_what_is_new(engine: Any, page: int, tmp_path: Path) -> None:
    letters = dict.fromkeys(tiny_tokenizer().encode("abcdefgh"), 1000.0)
    settings = GenerationSettings(max_new_tokens=40, temperature=0, logit_bias=letters)
    folder = save_tiny_model(tmp_path / "model", "llama")
    loaded = load_for_generation(ModelConfig(name_or_path=str(folder)), {}, "qwen2.5", dtype="float32")
    with engine(loaded) as generator:
        computed: list[int] = []
        loaded.model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: computed.append(inputs[0].numel())
        )
        session = chat.ChatSession(generator, settings)
        session.ask("first question")
        first = len(generator.encode(session.turns[:1]))
        assert sum(computed) == first + settings.max_new_tokens - 1
        computed.clear()
        session.ask("second question")
        prompt = len(generator.encode(session.turns[:3]))
        known = (first + settings.max_new_tokens - 1) // page * page
        assert sum(computed) == prompt - known + settings.max_new_tokens - 1
        assert known > 60
        talks = [(session.turns[:3], session.turns[3].text)]
        session.command("/reset")
        session.ask("another beginning")
        talks.append((session.turns[:1], session.turns[1].text))
    for turns, said in talks:
        with engine(loaded) as fresh:  # that has nothing to go on from
            assert fresh.answer(turns, settings) == said


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
