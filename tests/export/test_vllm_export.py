"""A folder that vLLM serves: what stands in it and its command, and what is asked of the vLLM that reads it back."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from firefly.data.encoding import Encoder
from firefly.data.schema import Message
from firefly.data.templates import bind_template
from firefly.errors import UsageError, VerificationError
from firefly.export.battery import BatteryRow
from firefly.export.vllm import Base, VllmExport, VllmReadBack, open_read_back, write_vllm
from firefly.generation.remote import Server
from firefly.generation.vllm import EngineChoice
from firefly.models.saved_adapter import open_adapter
from tiny import randomise_adapters, save_tiny_model, tiny_model, tiny_tokenizer

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
WITHOUT_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML


def encoder_of(template: str, tokenizer: Any) -> Encoder:
    tokenizer.chat_template = template
    return Encoder(tokenizer, bind_template("auto", tokenizer))


@pytest.fixture
def chat(chatml_tokenizer: Any) -> Encoder:
    return encoder_of(CHATML, chatml_tokenizer)


def saved_adapter(folder: Path, **changes: Any) -> Any:
    settings = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | changes
    wrapped = randomise_adapters(get_peft_model(tiny_model("llama"), LoraConfig(**settings)))
    wrapped.save_pretrained(folder)
    return open_adapter(str(folder))


def write_model(folder: Path) -> Path:
    """A model as a merge leaves it, but for the tokens that end its answers."""
    save_tiny_model(folder, tie_word_embeddings=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32", "max_position_embeddings": 777}))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 7, "temperature": 0.6, "do_sample": True})
    )
    return folder


def run_script(export: VllmExport, folder: Path, *more: str) -> list[str]:
    """What serve.sh hands to the interpreter."""
    python = folder / "python"
    python.write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "import json, sys; print(json.dumps(sys.argv[1:]))" "$@"\n'
    )
    python.chmod(0o755)
    environment = os.environ | {"FIREFLY_VLLM_PYTHON": str(python), "CDPATH": "/"}
    done = subprocess.run([str(export.script), *more], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


# ---- the folder


def test_a_merged_model_is_served_from_its_folder_wherever_that_lies(tmp_path: Path, chat: Encoder) -> None:
    folder = write_model(tmp_path / 'it\'s a $HOME, "quoted" folder')
    export = write_vllm(folder, "my model", chat.tokenizer, chat)
    assert export.command == [
        *("python3", "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", "8000"),
        *("--model", str(folder), "--tokenizer", str(folder), "--served-model-name", "my model"),
        *("--dtype", "float32", "--generation-config", str(folder), "--max-model-len", "777"),
        *("--chat-template", f"{folder}/chat_template.jinja", "--chat-template-content-format", "string"),
    ]
    assert (export.tool_parser, export.reasoning_parser) == (None, None)
    assert run_script(export, tmp_path, "--port", "9") == [*export.command[1:], "--port", "9"]
    moved = tmp_path / "moved"
    folder.rename(moved)
    given = run_script(VllmExport(**(vars(export) | {"folder": moved})), tmp_path)
    assert given == [word.replace(str(folder), str(moved)) for word in export.command[1:]]


def test_every_token_that_ended_a_reply_in_training_ends_an_answer(
    tmp_path: Path, chat: Encoder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(tmp_path / "model")
    write_vllm(folder, "model", chat.tokenizer, chat)
    written = json.loads((folder / "generation_config.json").read_text())
    assert written == {"eos_token_id": [*chat.template.stop_ids, 7], "temperature": 0.6, "do_sample": True}
    assert "temperature 0.6" in capsys.readouterr().err  # what else vLLM takes from it


def test_the_template_and_tokenizer_stand_in_the_folder_and_a_file_that_is_linked_elsewhere_is_not_written_through(
    tmp_path: Path, chat: Encoder
) -> None:
    folder = write_model(tmp_path / "model")
    (tmp_path / "theirs").write_text("another template")
    os.link(tmp_path / "theirs", folder / "chat_template.jinja")
    write_vllm(folder, "model", chat.tokenizer, chat)
    assert (folder / "chat_template.jinja").read_text() == CHATML
    assert (tmp_path / "theirs").read_text() == "another template"
    assert (folder / "tokenizer.json").is_file()


def test_a_system_prompt_stands_where_it_stood_in_training_where_the_template_refuses_it(
    tmp_path: Path, chatml_tokenizer: Any
) -> None:
    encoder = encoder_of(WITHOUT_SYSTEM, chatml_tokenizer)
    folder = write_model(tmp_path / "model")
    write_vllm(folder, "model", chatml_tokenizer, encoder)
    text = (folder / "chat_template.jinja").read_text()
    messages = [Message.of("system", "Be brief."), Message.of("user", "Hello"), Message.of("assistant", "Hi")]
    messages += [Message.of("user", "again")]
    for start in (0, 1):
        served = chatml_tokenizer.apply_chat_template(
            [message.as_dict() for message in messages[start:]],
            chat_template=text,
            add_generation_prompt=True,
            return_dict=False,
        )
        assert served == encoder.encode_prompt(messages[start:])


def test_adapters_are_served_unmerged_over_a_base_that_stays_where_it_is(tmp_path: Path, chat: Encoder) -> None:
    first, second = saved_adapter(tmp_path / "one", r=9), saved_adapter(tmp_path / "two", target_modules=["k_proj"])
    folder = tmp_path / "out, here"
    export = write_vllm(
        folder,
        "base",
        chat.tokenizer,
        chat,
        base=Base("org/base", {"dtype": "bfloat16", "vocab_size": 400}, {"eos_token_id": 2}, "main"),
        adapters={"a=1": first, "two/2": second},
        context_length=512,
        trust_remote_code=True,
    )
    after = export.command[export.command.index("--revision") :]
    assert after == [
        *("--revision", "main", "--trust-remote-code", "--enable-lora", "--max-lora-rank", "16", "--max-loras", "3"),
        *("--lora-target-modules", "k_proj", "q_proj", "--lora-modules"),
        *(
            f'{{"name": "a=1", "path": "{folder}/adapters/a_1"}}',
            f'{{"name": "two/2", "path": "{folder}/adapters/two_2"}}',
        ),
    ]
    assert export.command[export.command.index("--model") + 1] == "org/base"
    assert "--max-model-len 512" in shlex.join(export.command)
    assert run_script(export, tmp_path) == export.command[1:]
    assert {path.name for path in (folder / "adapters" / "a_1").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"][0] == chat.template.stop_ids[0]


def test_an_adapter_that_vllm_does_not_serve_as_trained_is_refused_before_anything_is_written(
    tmp_path: Path, chat: Encoder
) -> None:
    with pytest.raises(UsageError, match="use_dora"):
        write_vllm(
            tmp_path / "out",
            "base",
            chat.tokenizer,
            chat,
            base=Base("base", {}, {}),
            adapters={"a": saved_adapter(tmp_path / "one", use_dora=True)},
        )
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_chat_template_continues_texts_and_calls_are_parsed_where_one_writes_them(
    tmp_path: Path, chat: Encoder
) -> None:
    export = write_vllm(write_model(tmp_path / "plain"), "plain", tiny_tokenizer(), None)
    assert not export.has_template
    assert "--chat-template" not in export.command
    calls = "<tool_call>\n{{ c.function | tojson }}\n</tool_call>"
    text = CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}" + calls + "{% endfor %}"
    )
    encoder = encoder_of(text, chat.tokenizer)
    export = write_vllm(write_model(tmp_path / "caller"), "caller", encoder.tokenizer, encoder)
    assert "--enable-auto-tool-choice --tool-call-parser hermes" in shlex.join(export.command)


# ---- reading back


class Recorded(ThreadingHTTPServer):
    """Answers as vLLM does, and remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), RecordedHandler)
        self.bodies: list[dict[str, Any]] = []
        self.stops = [2]


class RecordedHandler(BaseHTTPRequestHandler):
    server: Recorded  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, *values: Any) -> None: ...

    def answer(self, value: Any, status: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        self.answer({"version": "1.2.3"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        if any(message["content"] == "refused" for message in body.get("messages", ())):
            self.answer({"error": {"message": "the template says no"}}, 400)
            return
        chosen: dict[str, Any] = {"finish_reason": "length", "prompt_token_ids": [1, 2]}
        if body.get("allowed_token_ids", [None])[0] in self.server.stops:
            chosen["finish_reason"] = "stop"
        if "prompt_logprobs" in body:
            places = [{str(100 + token): {"logprob": -float(token)}} for token in body["prompt"][1:]]
            chosen["prompt_logprobs"] = [None, *places]
            chosen["logprobs"] = {"top_logprobs": [{"token_id:7": -0.5}]}
        self.answer({"choices": [chosen], "prompt_token_ids": [4, 5, 6]})


@contextmanager
def recorded(**changes: Any) -> Iterator[tuple[VllmReadBack, Recorded]]:
    export = VllmExport(
        **{"folder": Path("out"), "name": "base", "adapters": (), "command": [], "has_template": True}
        | {"tool_parser": None, "reasoning_parser": None, "context_length": 64, "vocabulary_size": 1000}
        | changes
    )
    with Recorded() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            with open_read_back(export, EngineChoice("vllm", url=f"http://127.0.0.1:{server.server_port}")) as engine:
                yield engine, server
        finally:
            server.shutdown()


CALL = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": {"x": "中"}}}
ROW = BatteryRow(
    "tools",
    (
        Message.of("user", "Look."),
        Message.of("assistant", "", tool_calls=(CALL,), reasoning="I look."),
        Message.of("tool", "clear", tool_call_id="call00001"),
        Message.of("assistant", "It is clear."),
    ),
    ({"type": "function", "function": {"name": "f"}},),
    (1, 2),
    (1, 2, 3),
)


def test_prompts_are_asked_of_the_chat_endpoint_with_tools_as_clients_send_them() -> None:
    with recorded(tool_parser="hermes", adapters=("tuned",)) as (engine, server):
        assert engine.name == "vLLM 1.2.3"
        assert engine.prompt_ids(ROW) == [4, 5, 6]
        (body,) = server.bodies
        assert (body["model"], body["tool_choice"], body["return_token_ids"]) == ("tuned", "auto", True)
        assert [message["role"] for message in body["messages"]] == ["user", "assistant", "tool"]
        called = body["messages"][1]
        assert json.loads(called["tool_calls"][0]["function"]["arguments"]) == {"x": "中"}
        assert called["reasoning"] == "I look."
    with recorded() as (engine, server):  # without a parser vLLM refuses to choose
        engine.prompt_ids(ROW)
        assert server.bodies[0]["tool_choice"] == "none"
        assert engine.prompt_ids(BatteryRow("text", (), (), (1,), (1, 2), "some text")) == [1, 2]
        assert server.bodies[1]["prompt"] == "some text"


def test_a_conversation_that_vllm_refuses_is_a_failed_proof_with_its_words() -> None:
    row = BatteryRow("x", (Message.of("user", "refused"), Message.of("assistant", "y")), (), (1,), (1, 2))
    with recorded() as (engine, _), pytest.raises(VerificationError, match="the template says no"):
        engine.prompt_ids(row)


@pytest.mark.parametrize("has_template", [True, False])
def test_a_stop_is_found_by_forcing_its_token(has_template: bool) -> None:
    with recorded(has_template=has_template) as (engine, server):
        assert engine.ends_at(2)
        assert not engine.ends_at(3)
        assert server.bodies[0]["allowed_token_ids"] == [2]
        assert ("messages" in server.bodies[0]) == has_template


@pytest.mark.parametrize(("vocabulary", "listed"), [(1000, 256), (100, 100), (None, 256)])
def test_candidates_are_those_behind_each_position(vocabulary: int | None, listed: int) -> None:
    with recorded(vocabulary_size=vocabulary) as (engine, server):
        found = engine.candidates([11, 12, 13], [0, 1, 2])
        assert [each.log_probs for each in found] == [{112: -12.0}, {113: -13.0}, {7: -0.5}]
        assert server.bodies[0]["prompt_logprobs"] == listed  # more than the vocabulary has would end vLLM
        assert [each.log_probs for each in engine.candidates([11, 12, 13], [1])] == [{113: -13.0}]
        assert engine.tokens_per_second() > 0


def test_vllm_is_started_by_the_script_of_the_folder_and_ended(tmp_path: Path, chat: Encoder) -> None:
    folder = write_model(tmp_path / "model")
    export = write_vllm(folder, "model", chat.tokenizer, chat)
    fake = Path(__file__).parents[1] / "fake_vllm.py"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift 2\necho "$@" > {tmp_path}/given\nexec "{sys.executable}" "{fake}" "$@"\n')
    python.chmod(0o755)
    with open_read_back(export, EngineChoice("vllm", str(python))) as engine:
        assert isinstance(engine.server, Server)
        assert engine.server.ask("/v1/models")["data"][0]["id"] == "model"
        url = engine.server.url
    given = (tmp_path / "given").read_text()
    assert "--max-model-len 777 --max-logprobs 256" in given
    with pytest.raises(ConnectionRefusedError):
        Server(url).ask("/health")
    shutil.rmtree(folder)
