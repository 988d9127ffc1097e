"""`firefly serve --engine vllm`, end to end: the command, a real vLLM under it, and the openai client before it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from firefly import train
from firefly.config import ModelConfig, load_config
from firefly.data.schema import Message
from firefly.generation import GenerationSettings, Generator
from firefly.models.loading import EMBEDDED
from tiny import run_settings

pytestmark = pytest.mark.slow

TIE = 1e-3
"""Two tokens whose log-probabilities are closer than this are equally likely: fp32 in another order of sums."""
QUESTIONS = ["Who are you?", "Name three colours.", "用一句话介绍你自己。", "Why is the sky blue? " * 8]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALLED: dict[str, Any] = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}


@dataclass(frozen=True)
class Served:
    client: openai.OpenAI
    adapter: Path
    log: Path


def until_ready(process: subprocess.Popen[bytes], log: Path, seconds: float = 600) -> str:
    """The address that a server says it is ready at."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(r"Serving .* at (http://\S+)/v1\.", log.read_text()):
            return found[1]
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """SmolLM2, and an adapter that has learnt to call a function in Qwen's format."""
    python = os.environ.get("FIREFLY_VLLM_PYTHON")
    if not python:
        pytest.skip("FIREFLY_VLLM_PYTHON names no interpreter that has vLLM (script/vllm_env.sh makes one)")
    folder = tmp_path_factory.mktemp("served")
    rows = folder / "rows.jsonl"
    asked = [
        {"role": "user", "content": "What is the weather in Paris?"},
        {"role": "assistant", "content": "", "tool_calls": [CALLED]},
    ]
    lines = [
        {"messages": asked, "tools": [WEATHER]},
        {"messages": [asked[0], {"role": "assistant", "content": "I am."}]},
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines * 8), encoding="utf-8")
    settings = run_settings(EMBEDDED, rows, folder / "caller", template_name="qwen2.5", train_mode="lora")
    settings |= {"learning_rate": 4e-3, "max_steps": 14, "per_device_train_batch_size": 2, "lora_rank": 8}
    adapter = train(load_config(settings))
    command = [sys.executable, "-c", "from firefly.cli import run; run()", "serve", "--port", "0"]
    command += ["--model_name_or_path", EMBEDDED, "--adapter_name_or_path", str(adapter), "--dtype", "float32"]
    command += ["--engine", "vllm", "--engine_python", python, "--engine_arguments", "--max-model-len 1024"]
    log = folder / "log"
    with log.open("w") as file:
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "FIREFLY_LANG": "en"}
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        address = until_ready(process, log)
        yield Served(openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0), adapter, log)
    finally:
        process.send_signal(signal.SIGTERM)
        ended = process.wait(120)
    assert ended == 0
    assert "Traceback" not in log.read_text()


def test_what_is_served_is_listed_and_the_command_line_of_vllm_is_printed(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == [EMBEDDED, "caller"]
    assert "-m vllm.entrypoints.openai.api_server" in served.log.read_text()


@pytest.mark.parametrize("name", [EMBEDDED, "caller"])
def test_greedy_answers_whole_and_streamed_are_those_of_the_engine_in_the_process(served: Served, name: str) -> None:
    greedy = GenerationSettings(max_new_tokens=24, temperature=0, logprobs=5)
    texts = []
    for question in QUESTIONS:
        asked: Any = {"model": name, "messages": [{"role": "user", "content": question}], "max_tokens": 24}
        asked |= {"temperature": 0, "top_p": 1}
        whole = served.client.chat.completions.create(**asked)
        streamed = [
            chunk.choices[0].delta.content or ""
            for chunk in served.client.chat.completions.create(stream=True, **asked)
        ]
        texts.append(whole.choices[0].message.content or "")
        assert "".join(streamed) == texts[-1]
        assert whole.usage is not None
        assert whole.usage.prompt_tokens > 0
    with Generator.load(ModelConfig(name_or_path=EMBEDDED), str(served.adapter), dtype="float32") as generator:
        prompts = [generator.encode([Message.of("user", text)], model=name) for text in QUESTIONS]
        ours = [answer for (answer,) in generator.generate(prompts, greedy, model=name)]
        tokenizer = generator.encoder_of(name).tokenizer
    for prompt, answer, text in zip(prompts, ours, texts, strict=True):
        assert len(prompt) > 5
        theirs = tokenizer.encode(text, add_special_tokens=False)
        assert same(theirs, answer.tokens), (text, answer.text)


def same(found: Sequence[int], expected: Sequence[Any]) -> bool:
    """Whether an answer is the expected one up to a tie; behind its text, the stop token may follow."""
    for one, token in zip(found, expected, strict=False):
        if one != token.id:
            near = dict(token.top)
            return one in near and near[token.id] - near[one] < TIE
    return len(expected) - len(found) in (0, 1)


def test_tools_are_refused_where_the_template_has_no_place_for_them(served: Served) -> None:
    messages: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    with pytest.raises(openai.BadRequestError, match="tool"):
        served.client.chat.completions.create(model=EMBEDDED, messages=messages, tools=[WEATHER], max_tokens=8)


def test_a_call_that_was_trained_comes_back_as_one_whole_and_streamed_and_its_result_is_taken(served: Served) -> None:
    messages: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    asked: Any = {"model": "caller", "messages": messages, "tools": [WEATHER], "max_tokens": 64, "temperature": 0}
    choice = served.client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls", choice
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    chunks = [chunk.choices[0] for chunk in served.client.chat.completions.create(stream=True, **asked)]
    deltas = [delta for chunk in chunks for delta in chunk.delta.tool_calls or []]
    assert "".join(delta.function.arguments or "" for delta in deltas if delta.function) == call.function.arguments
    assert chunks[-1].finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"sky": "clear"}'}
    asked["messages"] = [*messages, choice.message.model_dump(exclude_none=True), result]
    assert served.client.chat.completions.create(**asked).choices[0].finish_reason in ("stop", "length", "tool_calls")
