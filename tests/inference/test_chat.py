"""The engine prompts as training did, and the terminal chat keeps its promises."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from firefly.config import ModelConfig
from firefly.data.schema import Message
from firefly.data.templates import TemplateFailure
from firefly.errors import UsageError
from firefly.inference.chat import ChatSession, chat
from firefly.inference.engine import Engine, GenerationSettings
from tiny import save_tiny_model, tiny_tokenizer

GREEDY = GenerationSettings(max_new_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = save_tiny_model(tmp_path_factory.mktemp("chat") / "model", "llama")
    return Engine.load(ModelConfig(name_or_path=str(folder)), template_name="default")


def test_the_streamed_text_is_the_greedy_continuation_of_the_encoded_prompt(engine: Engine) -> None:
    messages = [Message.of("user", "two blue red")]
    ids = torch.tensor([engine.encoder.encode_prompt(messages)])
    with torch.no_grad():
        for _ in range(GREEDY.max_new_tokens):
            token = engine.model(input_ids=ids).logits[0, -1].argmax()
            ids = torch.cat([ids, token[None, None]], dim=1)
            if token.item() in engine.encoder.template.stop_ids:
                break
    new = ids[0, len(engine.encoder.encode_prompt(messages)) :]
    expected = engine.encoder.tokenizer.decode(new, skip_special_tokens=True)
    assert "".join(engine.stream(messages, GREEDY)).strip() == expected.strip()


def test_the_same_seed_gives_the_same_answer(engine: Engine) -> None:
    settings = GenerationSettings(max_new_tokens=12, temperature=5.0, seed=3)
    answers = {engine.answer([Message.of("user", "red")], settings) for _ in range(3)}
    assert len(answers) == 1


def test_a_set_event_stops_the_answer(engine: Engine) -> None:
    stop = threading.Event()
    settings = GenerationSettings(max_new_tokens=400, temperature=0, repetition_penalty=1.3)
    pieces = engine.stream([Message.of("user", "red")], settings, stop)
    next(pieces)
    stop.set()
    assert len(list(pieces)) < 100


def test_bad_settings_are_named() -> None:
    with pytest.raises(UsageError, match="top_p"):
        GenerationSettings(top_p=0)


def test_an_unmerged_adapter_folder_needs_no_base_on_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"adapter_config\.json is missing"):
        Engine.load(ModelConfig(), adapter=str(tmp_path))


class Scripted:
    """Stands for an engine whose answers are known; remembers what it was asked."""

    name = "scripted"

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[list[Message]] = []

    def stream(self, messages: list[Message], settings: Any, stop: threading.Event) -> Iterator[str]:
        self.asked.append(list(messages))
        for piece in self.answers.pop(0):
            if isinstance(piece, BaseException):
                raise piece
            yield piece


def talk(engine: Any, lines: list[Any], monkeypatch: pytest.MonkeyPatch, system: str | None = None) -> None:
    """Feed `lines` to the prompt; an exception among them is raised there, the end is an end of input."""
    waiting = iter([*lines, EOFError()])

    def answer(prompt: str) -> str:
        line = next(waiting)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", answer)
    chat(engine, GREEDY, system)


def roles(messages: list[Message]) -> list[str]:
    return [message.role for message in messages]


def test_chat_keeps_history_until_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Scripted(["one"], ["two"], ["three"])
    talk(engine, ["a", "b", "/reset", "c"], monkeypatch)
    assert [roles(asked) for asked in engine.asked] == [["user"], ["user", "assistant", "user"], ["user"]]


def test_a_system_prompt_can_be_set_and_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Scripted(["one"], ["two"], ["three"])
    talk(engine, ["a", "/system Be brief.", "b", "/system", "c"], monkeypatch, system="At first.")
    assert [asked[0].text for asked in engine.asked] == ["At first.", "Be brief.", "c"]


def test_ctrl_c_stops_an_answer_and_not_the_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Scripted(["so ", "far", KeyboardInterrupt()], ["again"])
    talk(engine, ["a", KeyboardInterrupt(), "b"], monkeypatch)
    assert [message.text for message in engine.asked[1]] == ["a", "so far", "b"]
    assert "[stopped]" in capsys.readouterr().out


def test_saved_conversations_are_records_that_train_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    talk(Scripted(["fine"]), ["how are you?", f"/save {file}", "/exit", "never"], monkeypatch)
    assert json.loads(file.read_text()) == {
        "messages": [{"role": "user", "content": "how are you?"}, {"role": "assistant", "content": "fine"}]
    }


def test_a_question_the_template_refuses_leaves_no_trace(capsys: pytest.CaptureFixture[str]) -> None:
    session = ChatSession(Scripted([TemplateFailure("no system role")]), GREEDY)  # type: ignore[arg-type]
    session.ask("a")
    assert session.history == []
    assert "no system role" in capsys.readouterr().err


def test_another_template_than_the_trained_one_is_refused_unless_forced(tmp_path):
    from firefly.data.certificate import FILE_NAME, certify
    from firefly.data.encoding import Encoder
    from firefly.data.templates import bind_template

    folder = save_tiny_model(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    trained = certify(Encoder(tokenizer, bind_template("qwen", tokenizer)))
    (folder / FILE_NAME).write_text(json.dumps(trained.as_dict()), encoding="utf-8")
    model = ModelConfig(name_or_path=str(folder))
    assert Engine.load(model, template_name="qwen").encoder.template.name == "qwen"
    with pytest.raises(UsageError, match="--force"):
        Engine.load(model, template_name="smollm2")
    assert Engine.load(model, template_name="smollm2", force=True).encoder.template.name == "smollm2"


@pytest.mark.parametrize("allowed", [True, False])
def test_special_tokens_in_a_question_are_read_as_in_training(allowed: bool, tmp_path: Path) -> None:
    from firefly.data.certificate import FILE_NAME, certify
    from firefly.data.encoding import Encoder
    from firefly.data.schema import Message
    from firefly.data.templates import bind_template

    folder = save_tiny_model(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    encoder = Encoder(tokenizer, bind_template("qwen", tokenizer), allowed)
    (folder / FILE_NAME).write_text(json.dumps(certify(encoder).as_dict()), encoding="utf-8")
    served = Engine.load(ModelConfig(name_or_path=str(folder)), template_name="qwen").encoder
    question = [Message.of("user", "what is <|im_end|> for?")]
    assert served.encode_prompt(question) == encoder.encode_prompt(question)


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
