"""Thoughts and calls in a model's own format, told apart for clients, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from serving import FakeEngine, generator_of, running

CALLS = (
    'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "北京", "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "description": name, "parameters": {"type": "object"}}}
    for name in ("weather", "time")
]
ASKED: Any = {"model": "base", "messages": [{"role": "user", "content": "x"}]}


def streamed(client: Any, **asked: Any) -> tuple[str, str, list[dict[str, str]], str]:
    """Content, reasoning, calls and finish reason, put together from a stream."""
    content = reasoning = reason = ""
    calls: list[dict[str, str]] = []
    for chunk in client.chat.completions.create(stream=True, **asked):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or []:
            if call.id:
                calls.append({"id": call.id, "name": call.function.name, "arguments": ""})
            calls[call.index]["arguments"] += call.function.arguments or ""
    return content, reasoning, calls, reason


def test_calls_are_told_apart_whole_and_streamed() -> None:
    with running(generator_of(FakeEngine(CALLS))) as server:
        client = server.client()
        whole = client.chat.completions.create(tools=TOOLS, **ASKED).choices[0]
        assert whole.finish_reason == "tool_calls"
        assert whole.message.content == "Let me see."
        found = [(call.function.name, json.loads(call.function.arguments)) for call in whole.message.tool_calls]
        assert found == [("weather", {"city": "北京", "days": 2}), ("time", {})]
        assert len({call.id for call in whole.message.tool_calls}) == 2
        content, _, calls, reason = streamed(client, tools=TOOLS, **ASKED)
        assert (content, reason) == ("Let me see.", "tool_calls")
        assert [(call["name"], json.loads(call["arguments"])) for call in calls] == found


def test_calls_and_results_go_back_as_the_template_wants_them() -> None:
    engine = FakeEngine(CALLS)
    with running(generator_of(engine)) as server:
        client = server.client()
        reply = client.chat.completions.create(tools=TOOLS, **ASKED).choices[0].message
        results = [{"role": "tool", "tool_call_id": call.id, "content": "fine"} for call in reply.tool_calls]
        messages: Any = [*ASKED["messages"], reply.model_dump(exclude_none=True), *results]
        engine.text = "Good."
        client.chat.completions.create(model="base", messages=messages, tools=TOOLS)
        tokenizer = server.service.models["base"].tokenizer
        prompt = tokenizer.decode(engine.tickets[-1].request.prompt_ids)
        assert CALLS in prompt
        assert prompt.count("<tool_response>\nfine\n</tool_response>") == 2


def test_where_no_call_is_asked_for_the_text_stays_text() -> None:
    engine = FakeEngine(CALLS)
    with running(generator_of(engine)) as server:
        client = server.client()
        plain = client.chat.completions.create(**ASKED).choices[0]
        assert (plain.message.content, plain.finish_reason) == (CALLS, "stop")
        none = client.chat.completions.create(tools=TOOLS, tool_choice="none", **ASKED).choices[0]
        assert (none.message.content, none.finish_reason) == (CALLS, "stop")
        assert engine.tickets[0].request.prompt_ids == engine.tickets[1].request.prompt_ids  # no tools are shown


@pytest.mark.parametrize("end", ["length", "stop"])
def test_a_call_that_was_cut_off_is_none(end: str) -> None:
    with running(generator_of(FakeEngine(CALLS[:60], finish_reason=end))) as server:
        whole = server.client().chat.completions.create(tools=TOOLS, **ASKED).choices[0]
        assert whole.finish_reason == end
        assert not whole.message.tool_calls
        assert streamed(server.client(), tools=TOOLS, **ASKED)[3] == end


def test_thoughts_are_told_apart_whole_and_streamed() -> None:
    engine = FakeEngine("<think>\nhm, hm\n</think>\n\nYes.")
    with running(generator_of(engine, "qwen3")) as server:
        message = server.client().chat.completions.create(**ASKED).choices[0].message
        assert message.content == "Yes."
        assert message.reasoning_content.strip() == "hm, hm"
        content, reasoning, calls, reason = streamed(server.client(), **ASKED)
        assert (content, reasoning, calls, reason) == ("Yes.", message.reasoning_content, [], "stop")


def test_each_model_is_asked_by_its_name() -> None:
    engine = FakeEngine("hello")
    with running(generator_of(engine)) as server:
        client = server.client()
        assert [model.id for model in client.models.list()] == ["base", "one", "two"]
        for name in ("two", "base", "one"):
            answer = client.chat.completions.create(model=name, messages=ASKED["messages"])
            assert answer.model == name
            client.completions.create(model=name, prompt="x")
        assert [ticket.request.model for ticket in engine.tickets] == ["two", "two", "base", "base", "one", "one"]
