"""Named templates: the official text, character for character, with spans for the replies and their stops alone."""

from __future__ import annotations

import json
from typing import Any

import pytest

from firefly.commands.templates import describe_templates, render_request
from firefly.data.families import TEMPLATES, family_names, find_family
from firefly.data.rendering import render_chat
from firefly.data.templates import ChatTemplate, TemplateFailure, read_template
from firefly.errors import UsageError

UPSTREAM = (
    "default internlm internlm2 qwen yi orion deepseek chatglm2 chatglm3 ziya2 xverse minicpm minicpm3 zephyr mistral "
    "mixtral baichuan baichuan2 vicuna llama2 llama3 gemma phi3"
).split()
REQUIRED = (
    "qwen1.5 qwen2 qwen2.5 qwen3 qwen3-instruct-2507 llama3 llama3.1 llama3.2 llama3.3 mistral-v0.1 mistral-v0.2 "
    "mistral-v3-tekken-common mistral-v7-tekken-common mistral-nemo mixtral gemma gemma3 phi3 phi3.5 phi4 deepseek-llm "
    "deepseek-v2.5 deepseek-v3 deepseek-r1 glm4 smollm2 smollm3 yi yi-1.5 internlm2 granite3.3 olmo2 gpt-oss "
    "minicpm tulu3 mistral-small-3.2 yi-coder qwen3-nothink"
).split()


def reference_cases(shared) -> list[dict[str, Any]]:
    lines = (shared / "templates" / "expected.jsonl").read_text(encoding="utf-8").splitlines()
    return [case for case in map(json.loads, lines) if find_family(case["family"])]


def test_every_name_of_upstream_and_every_current_family_is_there():
    assert not [name for name in (*UPSTREAM, *REQUIRED) if find_family(name) is None]
    assert len(family_names()) == len(set(family_names()))
    described = {item["name"]: item["aliases"] for item in describe_templates()}
    assert described["qwen"] == ["qwen2"]


def test_every_official_case_renders_identically(shared):
    cases = reference_cases(shared)
    assert len(cases) >= 350
    for case in cases:
        request = {"messages": case["messages"], **case["extra"]}
        where = (case["family"], case["case"], case["add_generation_prompt"])
        if "error" in case:
            with pytest.raises(UsageError):
                render_request(case["family"], request, case["add_generation_prompt"], on_system="error")
            continue
        rendered = render_request(case["family"], request, case["add_generation_prompt"], on_system="error")
        assert rendered["text"] == case["rendered"], where


def test_spans_hold_each_reply_and_its_stop_and_nothing_of_the_prompt(shared):
    for case in reference_cases(shared):
        if "error" in case:
            continue
        request = {"messages": case["messages"], **case["extra"]}
        rendered = render_request(case["family"], request, case["add_generation_prompt"])
        spans = [rendered["text"][start:end] for start, end in rendered["spans"]]
        replies = [item["content"] for item in case["messages"] if item["role"] == "assistant"]
        assert len(spans) == len(replies), case["family"]
        spec = find_family(case["family"])
        assert spec is not None
        for span, reply in zip(spans, replies, strict=True):
            assert reply.strip() in span, case["family"]
            without_stop = next((span.removesuffix(stop) for stop in spec.stop_tokens if span.endswith(stop)), span)
            # What else the model writes: white space, an empty thought, gpt-oss's channel, DeepSeek's round.
            around = without_stop.replace(reply.strip(), "").replace("<think>\n\n</think>", "").strip()
            assert around in ("", "<|channel|>final<|message|>", "<think></think>", "</think>", "<think>\n</think>"), (
                case["family"],
                span,
            )


def test_qwen3_without_thinking_needs_no_variable_and_takes_one(shared):
    cases = [case for case in reference_cases(shared) if case["family"] == "qwen3-nothink"]
    assert len(cases) == 5
    for case in cases:
        assert case["extra"] == {"enable_thinking": False}
        request = {"messages": case["messages"]}
        assert render_request("qwen3-nothink", request, case["add_generation_prompt"])["text"] == case["rendered"]
        thinking = render_request("qwen3-nothink", request | {"enable_thinking": True}, case["add_generation_prompt"])
        assert thinking["text"] == render_request("qwen3", request, case["add_generation_prompt"])["text"]


def test_a_thought_behind_a_prompt_that_has_ended_it_is_refused():
    from firefly.data.schema import Conversation, Message

    thought = Message.of("assistant", "a", reasoning="r")
    for reply in (thought, Message.of("assistant", "<think>\nr\n</think>\n\na")):
        chat = Conversation((Message.of("user", "q"), reply))
        with pytest.raises(TemplateFailure, match="ends the thought"):
            bind("qwen3-nothink").render(chat)
        (stripped,) = bind("qwen3-nothink", thinking="strip").render(chat)
        assert stripped.text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\na<|im_end|>\n")
        assert [stripped.text[start:end] for start, end in stripped.spans] == ["a<|im_end|>"]


SYSTEM = [{"role": "system", "content": "  Be brief.\n"}]
TURNS = [
    {"role": "user", "content": " one \n"},
    {"role": "assistant", "content": "\n first  "},
    {"role": "user", "content": "{{ two }} {% x %}"},
    {"role": "assistant", "content": "second 🙂"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "第三"},
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_our_renderer_and_transformers_agree_on_text_and_marks(name):
    from transformers.utils.chat_template_utils import render_jinja_template

    spec = TEMPLATES[name]
    text = read_template(spec)
    variables = {"bos_token": spec.bos or "<s>", "eos_token": spec.eos or "</s>", "date_string": "26 Jul 2024"}
    for messages in (TURNS, SYSTEM + TURNS, TURNS[:1], SYSTEM + TURNS[:3]):
        try:
            ours, marks = render_chat(text, messages, variables, prompt=False)
        except Exception:
            with pytest.raises(Exception):  # noqa: B017, PT011  (the template's own refusal)
                render_jinja_template(conversations=[messages], chat_template=text, **variables)
            continue
        (theirs,), (spans,) = render_jinja_template(
            conversations=[messages], chat_template=text, return_assistant_tokens_mask=True, **variables
        )
        assert ours == theirs
        assert marks == [tuple(span) for span in spans]


def bind(name: str, **changes: Any) -> ChatTemplate:
    spec = find_family(name)
    assert spec is not None
    stops = spec.stop_tokens or ("</s>",)
    variables = {"bos_token": spec.bos or "<s>", "eos_token": spec.eos or "</s>"}
    return ChatTemplate(name, read_template(spec), stops, tuple(range(len(stops))), variables, spec.stable, **changes)


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_reply_is_trained_behind_the_prompt_it_would_be_asked_for_with(name):
    from firefly.data.schema import Conversation, Message

    template = bind(name)
    chat = Conversation(tuple(Message.of(item["role"], item["content"]) for item in [*SYSTEM, *TURNS]))
    try:
        rendered = template.render(chat)
    except TemplateFailure:  # the official text drops a system prompt once a reply follows
        assert name in ("mixtral-8x22b",), name
        chat = Conversation(chat.messages[1:])
        rendered = template.render(chat)
    spans = [(item.text, span) for item in rendered for span in item.spans]
    replies = [i for i, item in enumerate(chat.messages) if item.role == "assistant"]
    assert len(spans) == len(replies)
    for (text, (start, end)), index in zip(spans, replies, strict=True):
        assert text[start:end].endswith(template.stop_tokens), text[start:end]
        assert chat.messages[index].text.strip() in text[start:end]
        assert text[:start] == template.render_prompt(Conversation(chat.messages[:index])), name


def test_a_refused_system_prompt_is_merged_or_an_error():
    from firefly.data.schema import Conversation, Message

    chat = Conversation((Message.of("system", "S"), Message.of("user", "q"), Message.of("assistant", "a")))
    (merged,) = bind("gemma").render(chat)
    assert merged.text == "<bos><start_of_turn>user\nS\n\nq<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n"
    with pytest.raises(TemplateFailure, match="system"):
        bind("gemma", on_system="error").render(chat)
    (dropped,) = bind("orion").render(chat)
    assert "S\n\nq" in dropped.text


def test_a_template_with_a_date_prints_the_one_it_is_given():
    request = {"messages": TURNS[:1], "template_date": "2024-07-26"}
    assert "July 26, 2024" in render_request("granite3.3", request, True)["text"]
    assert "26 Jul 2024" in render_request("llama3.2", request, True)["text"]
    with pytest.raises(UsageError, match="YYYY-MM-DD"):
        render_request("llama3.2", request | {"template_date": "26.7.2024"}, True)


CALL = [
    {"role": "user", "content": "Weather in Paris?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}],
    },
    {"role": "tool", "name": "get_weather", "content": '{"t": 21}'},
    {"role": "assistant", "content": "21 degrees."},
]
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "?", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "llama3.1", "mistral-nemo", "granite4.0", "kimi-k2", "gpt-oss"])
def test_tool_calls_are_trained_and_tool_results_are_not(name):
    from firefly.data.formats import parse_record
    from firefly.data.schema import Conversation

    _, parsed = parse_record({"messages": CALL, "tools": [TOOL]})
    assert isinstance(parsed, Conversation)
    template = bind(name)
    trained = [item.text[start:end] for item in template.render(parsed) for start, end in item.spans]
    assert len(trained) == 2
    assert "get_weather" in trained[0]
    assert "Paris" in trained[0]
    assert "21 degrees." in trained[1]
    assert not any('"t": 21' in text for text in trained)
    assert all(text.endswith(template.stop_tokens) for text in trained)


def test_a_template_without_tools_says_so():
    from firefly.data.formats import parse_record
    from firefly.data.schema import Conversation

    for name, record in (
        ("smollm2", {"messages": CALL}),
        ("gemma", {"messages": CALL[:1] + CALL[3:], "tools": [TOOL]}),
    ):
        _, parsed = parse_record(record)
        assert isinstance(parsed, Conversation)
        with pytest.raises(TemplateFailure, match="does not"):
            bind(name).render(parsed)


def test_thinking_is_trained_in_every_turn_as_it_would_be_served():
    from firefly.data.schema import Conversation, Message

    chat = Conversation(
        (
            Message.of("user", "q1"),
            Message.of("assistant", "a1", reasoning="r1"),
            Message.of("user", "q2"),
            Message.of("assistant", "a2", reasoning="r2"),
        )
    )
    first, second = bind("qwen3").render(chat)
    assert [item.text[slice(*item.spans[0])] for item in (first, second)] == [
        "<think>\nr1\n</think>\n\na1<|im_end|>",
        "<think>\nr2\n</think>\n\na2<|im_end|>",
    ]
    assert "r1" not in second.text
    stripped = bind("qwen3", thinking="strip").render(chat)
    assert not any("r1" in item.text or "r2" in item.text for item in stripped)
    with pytest.raises(TemplateFailure, match="reasoning"):
        bind("qwen2.5").render(chat)
    tagged = Conversation((Message.of("user", "q"), Message.of("assistant", "<think>\nr\n</think>\n\na")))
    (served,) = bind("deepseek-r1").render(tagged)
    assert served.text[slice(*served.spans[0])] == "<think>\nr\n</think>\n\na<｜end▁of▁sentence｜>"
