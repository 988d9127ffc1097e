"""Tools, calls and results: a template writes all of them, or refuses the conversation by name."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from firefly.data.families import find_family
from firefly.data.formats import parse_record
from firefly.data.schema import Conversation, Message
from firefly.data.templates import ChatTemplate, TemplateFailure, read_template
from firefly.data.tool_calls import match_results


@cache
def bind(name: str) -> ChatTemplate:
    spec = find_family(name)
    assert spec is not None
    stops = spec.stop_tokens or ("</s>",)
    variables = {"bos_token": spec.bos or "<s>", "eos_token": spec.eos or "</s>"}
    return ChatTemplate(name, read_template(spec), stops, tuple(range(len(stops))), variables, spec.stable)


def written(text: str) -> ChatTemplate:
    """A user's own template."""
    return ChatTemplate("own", text, ("<|im_end|>",), (1,), {"bos_token": "<s>", "eos_token": "<|im_end|>"})


def chat(record: dict[str, Any]) -> Conversation:
    _, parsed = parse_record(record)
    assert isinstance(parsed, Conversation)
    return parsed


def tool(name: str, **changes: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
    described = {"name": name, "description": f"What {name} does", "parameters": parameters}
    return {"type": "function", "function": {**described, **changes}}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def said(content: str, *calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **({"tool_calls": list(calls)} if calls else {}), **more}


def call(function: str, query: Any, identifier: str | None = None) -> dict[str, Any]:
    made = {"type": "function", "function": {"name": function, "arguments": {"query": query}}}
    return made if identifier is None else {**made, "id": identifier}


def result(content: str, identifier: str | None = None, name: str | None = None) -> dict[str, Any]:
    given = {"tool_call_id": identifier, "name": name}
    return {"role": "tool", "content": content, **{key: value for key, value in given.items() if value}}


# ---- identifiers and names ----


def completed(name: str, *messages: dict[str, Any]) -> tuple[Message, ...]:
    return bind(name).adapt(chat({"messages": list(messages)})).messages


def identifiers(messages: tuple[Message, ...]) -> tuple[list[Any], list[Any]]:
    calls = [called.get("id") for item in messages for called in item.tool_calls]
    return calls, [item.tool_call_id for item in messages if item.role == "tool"]


NINE = [
    "mistral-nemo",
    "mistral-v3-common",
    "mistral-v3-tekken-common",
    "mistral-v7-common",
    "mistral-v7-tekken-common",
]
NINE += ["mistral-v11-common", "mistral-small-3.2"]


@pytest.mark.parametrize("name", NINE)
def test_calls_without_identifiers_get_nine_characters_and_their_results_the_same(name):
    turns = (user("q"), said("", call("look", 1)), result("x"), said("a"), user("q"), said("", call("read", 2)))
    turns += (result("y"), said("b"))
    calls, results = identifiers(completed(name, *turns))
    assert calls == results
    assert len(set(calls)) == 2
    assert all(len(made) == 9 and made.isalnum() for made in calls)
    assert identifiers(completed(name, *turns)) == (calls, results)
    texts = bind(name).render(chat({"messages": list(turns)}))
    assert all(made in texts[-1].text for made in calls)


@pytest.mark.parametrize("name", NINE)
def test_identifiers_of_nine_characters_stay_and_others_are_mapped_alike_in_call_and_result(name):
    for given, kept in (("abcDEF123", True), ("call_aBcDeFgHiJkLmNoP", False), ("a", False), ("ünïcödé12", False)):
        calls, results = identifiers(completed(name, user("q"), said("", call("f", 1, given)), result("x", given)))
        assert calls == results
        assert (calls[0] == given) == kept
        assert len(calls[0]) == 9
        assert calls[0].isascii()


def test_results_go_to_the_call_of_their_name_or_else_in_order():
    asked = (user("q"), said("", call("look", 1), call("read", 2)))
    for results, numbers in (
        ((result("x"), result("y")), [0, 1]),
        ((result("y", name="read"), result("x", name="look")), [1, 0]),
        ((result("y", name="read"), result("x")), [1, 0]),
        ((result("x", name="other"), result("y")), [0, 1]),
    ):
        calls, given = identifiers(completed("mistral-v3-tekken-common", *asked, *results, said("a")))
        assert given == [calls[number] for number in numbers]


def test_a_call_without_an_identifier_takes_that_of_its_result():
    messages = completed("mistral-v11-common", user("q"), said("", call("f", 1)), result("x", "abcdefgh1"), said("a"))
    assert identifiers(messages) == (["abcdefgh1"], ["abcdefgh1"])


def test_a_made_identifier_is_not_that_of_another_call():
    turns = (
        user("q"),
        said("", call("f", 1), call("g", 2, "call00000")),
        result("x", name="f"),
        result("y", "call00000"),
    )
    calls, results = identifiers(completed("mistral-v11-common", *turns))
    assert calls == results
    assert len(set(calls)) == 2
    assert calls[1] == "call00000"


def test_an_identifier_that_belongs_to_no_call_stays_and_templates_may_refuse_it():
    turns = [user("q"), said("", call("f", 1, "abcdefgh1")), result("x", "abcdefgh2"), said("a")]
    assert identifiers(completed("mistral-v11-common", *turns)) == (["abcdefgh1"], ["abcdefgh2"])
    with pytest.raises(TemplateFailure, match="abcdefgh2"):
        bind("mistral-v11-common").render(chat({"messages": turns}))


def test_calls_before_the_last_question_wait_for_no_result_but_one_with_their_identifier():
    call_a, call_b = ({"function": {"name": name}, **more} for name, more in (("a", {"id": "one"}), ("b", {})))
    messages = (Message("user", "q"), Message("assistant", "", tool_calls=(call_a,)), Message("user", "q"))
    messages += (Message("assistant", "", tool_calls=(call_b,)), Message("tool", "x"))
    assert match_results(messages) == {4: 1}
    assert match_results((*messages[:4], replace(messages[4], tool_call_id="one"))) == {4: 0}
    assert match_results((*messages[:3], Message("tool", "x"))) == {}


def test_identifiers_that_a_template_does_not_ask_for_stay_as_they_are():
    for name in ("qwen2.5", "qwen3", "llama3.1", "granite4.0"):
        assert identifiers(completed(name, user("q"), said("", call("f", 1)), result("x"))) == ([None], [None])
        given = identifiers(completed(name, user("q"), said("", call("f", 1, "call_1")), result("x", "call_1")))
        assert given == (["call_1"], ["call_1"])


def test_kimis_identifiers_name_the_function_and_number_the_calls_of_the_conversation():
    turns = (user("q"), said("", call("f", 1), call("g", 2, "x")), result("a"), result("b"), said("", call("f", 3)))
    calls, results = identifiers(completed("kimi-k2", *turns, result("c")))
    assert calls == results == ["functions.f:0", "functions.g:1", "functions.f:2"]


def test_parallel_results_carry_the_names_of_their_own_functions():
    """Gemma 4 finds a result's function by its identifier: without one every result would be the last call's."""
    turns = [user("q"), said("", call("look", "a"), call("read", "b")), result("one"), result("two"), said("a")]
    text = bind("gemma4").render(chat({"messages": turns}))[-1].text
    assert "response:look{value:" in text.replace(" ", "")
    assert text.index("response:look") < text.index("one") < text.index("response:read") < text.index("two")


def test_a_result_without_a_name_takes_its_functions_where_the_text_needs_one():
    turns = [user("q"), said("", call("f", 1)), result("x"), said("a")]
    (rendered,) = bind("mistral-v2-common").render(chat({"messages": turns}))
    assert '[TOOL_RESULTS] [{"name": "f", "content": "x"}]' in rendered.text
    for name in ("qwen2.5", "kimi-k2", "mistral-v7-common"):  # which write none, or another word
        assert [item.name for item in completed(name, *turns)] == [None] * 4


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}BODY{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALLS = "{% for c in m.tool_calls or [] %}{{ c.function.name ~ c.function.arguments | tojson }}{% endfor %}"


@pytest.mark.parametrize(
    ("shown", "needed"),
    [
        ("{{ m.name }}", True),
        ("{{ (m.name or none) | tojson }}", True),
        ("{{ m.name or none }}", True),
        ("{{ m.name | default('null') }}", True),
        ("{{ m.name + '' }}", True),
        ("{{ m.name or 'tool' }}", False),
        ("", False),
    ],
)
def test_a_template_needs_the_name_of_a_result_if_it_writes_nothing_in_its_place(shown, needed):
    body = "{% if m.role == 'tool' %}" + shown + ": {% endif %}{{ m.content }}" + CALLS
    style = written(CHATML.replace("BODY", body)).call_style
    assert style is not None
    assert style.names_results == needed
