"""Tools, calls and results: a template writes all of them, or refuses the conversation by name."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from firefly.data.families import TEMPLATES, find_family
from firefly.data.formats import parse_record
from firefly.data.schema import Conversation, Message
from firefly.data.templates import ChatTemplate, TemplateFailure, read_template
from firefly.data.tool_calls import match_results, openai_message


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


# ---- every named template, complete or refused ----

TOOLS = [tool("seekzz"), tool("readzz")]
SEEK, FOUND, DONE = call("seekzz", "catzz"), result("hitzz"), said("endzz")
READ = call("readzz", "dogzz")
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "tools, never called": {"messages": [user("askzz"), DONE]},
    "one call": {"messages": [user("askzz"), said("", SEEK), FOUND, DONE]},
    "null content": {"messages": [user("askzz"), {**said("", SEEK), "content": None}, FOUND, DONE]},
    "text beside the call": {"messages": [user("askzz"), said("firstzz", SEEK), FOUND, DONE]},
    "white space beside the call": {"messages": [user("askzz"), said("\n\n", SEEK), FOUND, DONE]},
    "two calls at once": {"messages": [user("askzz"), said("", SEEK, READ), FOUND, result("linezz"), DONE]},
    "one call after another": {
        "messages": [user("askzz"), said("", SEEK), FOUND, said("", READ), result("linezz"), DONE]
    },
    "a call at the end": {"messages": [user("askzz"), said("", SEEK)]},
    "a later question": {"messages": [user("askzz"), said("", SEEK), FOUND, DONE, user("morezz"), said("", READ)]},
    "a call that is not trained": {"messages": [user("askzz"), said("", SEEK, loss=False), FOUND, DONE]},
    "a bare function": {"messages": [user("askzz"), said("", SEEK), FOUND, DONE], "tools": [{"name": "seekzz"}]},
    "no tools": {"messages": [user("askzz"), said("", SEEK), FOUND, DONE], "tools": None},
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_tool_call_and_result_stands_in_the_text_or_the_row_is_refused_by_name(name):
    for case, record in CONVERSATIONS.items():
        conversation = chat({"tools": TOOLS, **record})
        try:
            texts = bind(name).render(conversation)
        except TemplateFailure:
            continue
        words = [tool["function"]["name"] for tool in conversation.tools]
        for item in conversation.messages:
            words += [item.text.strip(), *(called["function"]["name"] for called in item.tool_calls)]
            words += [called["function"]["arguments"]["query"] for called in item.tool_calls]
        assert not [word for word in words if word not in texts[-1].text], (case, texts[-1])
        spans = [text.text[start:end] for text in texts for start, end in text.spans]
        replies = [item for item in conversation.messages if item.role == "assistant" and item.trained]
        for span, reply in zip(spans, replies, strict=True):
            queries = [called["function"]["arguments"]["query"] for called in reply.tool_calls]
            assert not [word for word in (reply.text.strip(), *queries) if word not in span], (case, span)


WITH_TOOLS = (
    "qwen2.5 qwen3 qwen3-nothink qwen3-instruct-2507 qwen3.5 minicpm3 minicpm5 gpt-oss llama3.1 llama3.2 llama4 "
    "mistral-nemo mistral-v2-common mistral-v3-common mistral-v3-tekken-common mistral-v7-common "
    "mistral-v7-tekken-common mistral-v11-common mistral-v13-common mistral-small-3.2 glm4.6 seed-oss kimi-k2 "
    "granite4.0 gemma4"
).split()


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_with_tools_keep_a_conversation_with_a_call_and_its_result_and_others_refuse_it(name):
    conversation = chat({**CONVERSATIONS["one call"], "tools": TOOLS})
    if name in WITH_TOOLS:
        assert bind(name).render(conversation)
    else:
        with pytest.raises(TemplateFailure):
            bind(name).render(conversation)


# ---- what looks written and is not ----


def report(shared, name: str) -> list[dict[str, Any]]:
    lines = (shared / "reports" / "rows" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_a_tool_named_in_a_question_is_not_shown_by_a_template_without_tools(shared):
    for record in report(shared, "tools_named_in_text"):
        with pytest.raises(TemplateFailure, match="qwen does not show the functions in tools"):
            bind("qwen").render(chat(record))
        (kept,) = bind("qwen2.5").render(chat(record))
        assert '"name": "search"' in kept.text
        assert '"description": "Web search"' in kept.text


def test_a_function_named_in_a_result_is_not_called_by_a_template_that_leaves_the_call_out(shared):
    beside_text, beside_space, alone, unnamed = report(shared, "call_name_in_result")
    for record in (beside_text, beside_space, unnamed):
        with pytest.raises(TemplateFailure, match=r"deepseek-v3 does not write the calls of message 1 \(search\)"):
            bind("deepseek-v3").render(chat(record))
    first, second = bind("deepseek-v3").render(chat(alone))
    for rendered in (first, second):
        assert 'function<｜tool▁sep｜>search\n```json\n{"q": "cats"}\n```' in rendered.text


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}BODY{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALLS = "{% for c in m.tool_calls or [] %}{{ c.function.name ~ c.function.arguments | tojson }}{% endfor %}"


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (
            "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}",
            "does not write tool calls",
        ),
        (
            "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}",
            "calls of message 1",
        ),
        ("{% if m.content %}{{ m.content }}{% else %}" + CALLS + "{% endif %}", "calls of message 4"),
        ("{% if m.tool_calls %}" + CALLS + "{% else %}{{ m.content }}{% endif %}", "let me look"),
        ("{% if m.role != 'tool' %}{{ m.content }}{% endif %}" + CALLS, r"drops message 2 \(tool\)"),
    ],
    ids=["no arguments", "the first of two", "not beside text", "not the text", "no results"],
)
def test_a_part_that_another_text_names_counts_as_left_out(body, problem):
    """Every word of calls and results stands in the question too."""
    first = said("", call("look", "a"), call("read", "b"))
    second = said("let me look", call("look", "b"))
    turns = [first, result("found"), result("nothing"), second, result("found"), said("a")]
    record = {"messages": [user("look read query a b found nothing let me look"), *turns]}
    assert written(CHATML.replace("BODY", "{{ m.content }}" + CALLS)).render(chat(record))
    with pytest.raises(TemplateFailure, match=problem):
        written(CHATML.replace("BODY", body)).render(chat(record))


def test_a_call_that_a_later_question_makes_a_template_forget_is_refused():
    later = "messages[loop.index:] | selectattr('role', 'equalto', 'user') | list"
    template = written(CHATML.replace("BODY", "{{ m.content }}{% if not (" + later + ") %}" + CALLS + "{% endif %}"))
    turns = [user("look a query"), said("", call("look", "a")), result("found"), said("a")]
    assert template.render(chat({"messages": turns}))
    with pytest.raises(TemplateFailure, match="calls of message 1"):
        template.render(chat({"messages": [*turns, user("more"), said("b")]}))


@pytest.mark.parametrize("field", ["name", "description", "parameters"])
def test_a_tool_has_to_be_shown_with_its_description_and_its_parameters(field):
    shown = {"name": "{{ t.function.name }}", "description": "{{ t.function.description }}"}
    shown["parameters"] = "{{ t.function.parameters | tojson }}"
    text = "{% for t in tools or [] %}TOOL{% endfor %}" + CHATML.replace("BODY", "{{ m.content }}")
    record = {"messages": [user("What does look do? Looks query up."), said("a")]}
    record["tools"] = [tool("look", description="Looks query up.")]
    assert written(text.replace("TOOL", "".join(shown.values()))).render(chat(record))
    without = "".join(value for key, value in shown.items() if key != field)
    with pytest.raises(TemplateFailure, match="does not show the functions in tools"):
        written(text.replace("TOOL", without)).render(chat(record))


def test_reasoning_and_system_prompts_that_another_text_repeats_count_as_left_out():
    plain = written(CHATML.replace("BODY", "{{ m.content }}"))
    thinking = Message.of("assistant", "1 + 1 = 2", reasoning="2")
    with pytest.raises(TemplateFailure, match="reasoning"):
        plain.render(Conversation((Message.of("user", "q"), thinking)))
    early = "{% if m.role != 'system' or loop.length < 4 %}{{ m.content }}{% endif %}"
    turns = (Message.of("system", "Be brief"), Message.of("user", "Be brief, please"), Message.of("assistant", "a"))
    turns += (Message.of("user", "more"), Message.of("assistant", "b"))
    with pytest.raises(TemplateFailure, match=r"drops message 0 \(system\)"):
        written(CHATML.replace("BODY", early)).render(Conversation(turns))
    assert plain.render(Conversation(turns))


def test_a_prompt_is_proved_as_a_training_text_is():
    record = {"messages": [user("search for cats")], "tools": [tool("search", description="search", parameters={})]}
    with pytest.raises(TemplateFailure, match="tools"):
        bind("qwen").render_prompt(chat(record))
    assert '"search"' in bind("qwen2.5").render_prompt(chat(record))


def test_plain_conversations_of_one_shape_are_proved_once(monkeypatch):
    template = replace(bind("qwen2.5"))
    rendered = []
    honest = ChatTemplate._render
    monkeypatch.setattr(ChatTemplate, "_render", lambda self, *a, **k: rendered.append(a) or honest(self, *a, **k))
    counts = []
    for number in range(4):
        template.render(Conversation((Message.of("user", f"q{number}"), Message.of("assistant", f"a{number}"))))
        counts.append(len(rendered))
    assert counts[3] - counts[2] == counts[2] - counts[1] == 1


# ---- odd tools and arguments ----

ODD_TOOLS = [
    json.dumps([tool("look")]),
    [json.dumps(tool("look"))],
    [{"name": "look"}],
    [tool("look", description=None, parameters=None)],
    [tool("look", description="", parameters={})],
    [tool("look", parameters={"type": "object"})],
    [tool("look", parameters={"type": "object", "properties": {}, "required": None})],
    [tool("look", parameters={"type": "object", "properties": {"a": {}, "": None}, "required": ["a", 1]})],
    [tool("look", parameters={"type": "object", "properties": ["a"]})],
    [tool("look", parameters={"properties": {"a": {"type": ["string", "null"], "enum": [1, None], "items": {}}}})],
]
ODD_ARGUMENTS = {
    "a": 1,
    "b": 2.5,
    "c": None,
    "d": True,
    "e": [1, "x", {"y": []}],
    "f": {"g": {"h": "i"}},
    "": "",
    "中": "文",
}


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_odd_tools_are_shown_or_refused_and_never_end_in_a_traceback(name):
    for tools in ODD_TOOLS:
        try:
            texts = bind(name).render(chat({"messages": [user("q"), said("a")], "tools": tools}))
        except TemplateFailure:
            continue
        assert all("look" in rendered.text for rendered in texts)


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_odd_arguments_and_results_are_written_or_refused_and_never_end_in_a_traceback(name):
    results = ('{"n": 3}', "[1, 2]", "null", "3", "", "two\nlines")
    for number, arguments in enumerate((ODD_ARGUMENTS, {}, None, "", json.dumps(ODD_ARGUMENTS), {"a": None})):
        calling = said("", {"function": {"name": "look", "arguments": arguments}})
        conversation = chat({"messages": [user("q"), calling, result(results[number]), said("a")]})
        try:
            texts = bind(name).render(conversation)
        except TemplateFailure:
            continue
        assert all("look" in rendered.text for rendered in texts)


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


@pytest.mark.parametrize("name", ["mistral-v2-common", *NINE[1:], "mistral-v13-common"])
def test_sharegpts_calls_and_observations_without_identifiers_are_kept(shared, name):
    (record,) = report(shared, "call_without_id")
    conversation = chat(record)
    text = bind(name).render(conversation)[-1].text
    calls, results = identifiers(bind(name).adapt(conversation).messages)
    assert calls == results
    assert "None" not in text
    assert "null" not in text
    assert ('"name": "f"' in text.split("[TOOL_RESULTS]")[1]) == (name == "mistral-v2-common")
    if name in NINE:
        assert text.count(calls[0]) == 2
        assert len(calls[0]) == 9


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
    messages = (Message.of("user", "q"), Message.of("assistant", "", tool_calls=(call_a,)), Message.of("user", "q"))
    messages += (Message.of("assistant", "", tool_calls=(call_b,)), Message.of("tool", "x"))
    assert match_results(messages) == {4: 1}
    assert match_results((*messages[:4], replace(messages[4], tool_call_id="one"))) == {4: 0}
    assert match_results((*messages[:3], Message.of("tool", "x"))) == {}


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


def test_calls_of_functions_are_sent_as_programs_send_them() -> None:
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": {"city": "北京"}}}
    sent = openai_message(Message.of("assistant", "", tool_calls=(call,), reasoning="hm"))
    assert sent["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"city": "北京"}'}
    assert sent["reasoning_content"] == "hm"
    assert "thinking" not in sent
    assert call["function"]["arguments"] == {"city": "北京"}
