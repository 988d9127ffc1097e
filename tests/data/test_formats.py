"""Record shapes: what each becomes, and that a wrong one is named by its field."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firefly.data.formats import FORMATS, MalformedRecord, Parsed, parse_record, read_record
from firefly.data.schema import Conversation, Labelled, Message, Tokens

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"


def parse(record: Any) -> tuple[str, list[tuple[str, str]]]:
    name, conversation = parse_record(record)
    assert isinstance(conversation, Conversation)
    return name, [(message.role, message.text) for message in conversation.messages]


def malformed(record: Any) -> str:
    with pytest.raises(MalformedRecord) as caught:
        parse_record(record)
    return str(caught.value)


def firefly(**changes: Any) -> dict[str, Any]:
    return {"conversation": [{"human": "q", "assistant": "a"}]} | changes


def messages(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


# ---- what each becomes ----


def test_the_tutorials_records_are_turns_in_order_with_their_system_prompt():
    record = {
        "conversation_id": 7,
        "category": "Brainstorming",
        "system": "be brief",
        "conversation": [{"human": "q1", "assistant": "a1"}, {"human": "q2", "assistant": "a2", "extra": 1}],
    }
    turns = [(SYSTEM, "be brief"), (USER, "q1"), (ASSISTANT, "a1"), (USER, "q2"), (ASSISTANT, "a2")]
    assert parse(record) == ("firefly", turns)


@pytest.mark.parametrize("system", [None, ""])
def test_no_system_prompt_is_no_message(system):
    assert parse(firefly(system=system)) == parse(firefly()) == ("firefly", [(USER, "q"), (ASSISTANT, "a")])


def test_an_alpaca_question_is_its_instruction_and_input():
    record = {"instruction": "Translate.", "input": "你好", "output": "Hello", "system": "s"}
    assert parse(record) == ("alpaca", [(SYSTEM, "s"), (USER, "Translate.\n你好"), (ASSISTANT, "Hello")])
    for absent in ({"input": ""}, {"input": None}, {}):
        assert parse({"instruction": "Say hi", "output": "hi"} | absent)[1] == [(USER, "Say hi"), (ASSISTANT, "hi")]


QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
BESIDE_LISTS = {
    "messages": {"messages": [QUESTION, ANSWER]},
    "prompt and completion": {"prompt": [QUESTION], "completion": [ANSWER]},
    "labelled": {"messages": [QUESTION, ANSWER], "label": True},
    "pair of lists": {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [ANSWER]},
    "pair of texts": {"prompt": [QUESTION], "chosen": "a", "rejected": "b"},
    "sharegpt pair": {"conversations": [QUESTION], "chosen": ANSWER, "rejected": ANSWER},
}


@pytest.mark.parametrize("record", BESIDE_LISTS.values(), ids=BESIDE_LISTS.keys())
def test_a_system_prompt_beside_a_list_stands_before_it_and_two_are_refused(record):
    kind = "pair" if "chosen" in record else "conversation"
    parsed = parse_record(record | {"system": "s"}, kind)[1]
    found = parsed.chosen if kind == "pair" else parsed.conversation if isinstance(parsed, Labelled) else parsed
    assert [(item.role, item.text) for item in found.messages] == [(SYSTEM, "s"), (USER, "q"), (ASSISTANT, "a")]
    name = next(iter(record))
    twice = record | {"system": "s", name: [{"role": "system", "content": "t"}, *record[name]]}
    with pytest.raises(MalformedRecord, match=name):
        parse_record(twice, kind)


def test_a_history_stands_before_a_prompt_that_is_a_list():
    record = {"prompt": [QUESTION], "completion": [ANSWER], "history": [["before", "then"]], "system": "s"}
    turns = [(SYSTEM, "s"), (USER, "before"), (ASSISTANT, "then"), (USER, "q"), (ASSISTANT, "a")]
    assert parse(record)[1] == turns
    assert [item.trained for item in parse_record(record)[1].messages] == [False] * 4 + [True]


def test_a_history_stands_before_the_question_of_a_pair():
    record = {"instruction": "q", "history": [["before", "then"]], "chosen": "a", "rejected": "b", "system": "s"}
    pair = parse_record(record, "pair")[1]
    turns = [(SYSTEM, "s"), (USER, "before"), (ASSISTANT, "then"), (USER, "q"), (ASSISTANT, "a")]
    assert [(item.role, item.text) for item in pair.chosen.messages] == turns


TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
@pytest.mark.parametrize("record", [{"instruction": "q", "output": "a"}, firefly()], ids=["alpaca", "firefly"])
def test_tools_beside_a_question_are_read(record, tools):
    assert parse_record(record | {"tools": tools})[1].tools == (TOOL,)


@pytest.mark.parametrize("content", [None, "", "Let me look."])
def test_a_call_in_openais_older_form_is_a_call(content):
    call = {"name": "look", "arguments": '{"at": 1}'}
    record = messages((USER, "q")) | {}
    record["messages"].append({"role": "assistant", "content": content, "function_call": call})
    reply = parse_record(record)[1].messages[1]
    assert reply.tool_calls[0]["function"] == {"name": "look", "arguments": {"at": 1}}
    assert reply.text == (content or "")


@pytest.mark.parametrize("key", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [QUESTION, ANSWER]},
        {"instruction": "q", "output": "a"},
        {"conversation": [{"human": "q", "assistant": "a"}]},
    ],
    ids=str,
)
def test_a_system_prompt_is_known_under_two_names(record, key):
    assert parse(record | {key: "s"})[1][0] == (SYSTEM, "s")
    assert parse(record | {"system": "s", "system_prompt": ""})[1][0] == (SYSTEM, "s")


@pytest.mark.parametrize(
    ("label", "trained"),
    [
        *((label, True) for label in (True, 1, "True", "TRUE", "1", " 1.0", "chosen", "Desirable", "like")),
        *((label, False) for label in (False, 0, "false", "0", "0.0", "rejected", "undesirable", "Dislike")),
    ],
)
@pytest.mark.parametrize("key", ["label", "kto_tag"])
@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "completion": "a"},  # TRL's unpaired preference
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {"instruction": "q", "output": "a"},
        {"messages": [QUESTION, ANSWER]},  # LLaMA-Factory's
        {"conversations": [QUESTION, ANSWER]},
    ],
    ids=str,
)
def test_a_label_is_read_however_it_is_written_and_a_condemned_answer_is_no_demonstration(record, key, label, trained):
    for task in ("conversation", "labelled"):
        name, parsed = parse_record(record | {key: label}, task)
        assert name.startswith("labelled")
        assert isinstance(parsed, Labelled)
        assert (parsed.desirable, parsed.conversation.messages[-1].trained) == (trained, True)
        assert parsed.as_demonstration().messages[-1].trained is trained


def test_verdicts_that_contradict_each_other_are_refused_by_name():
    for record in ({"prompt": "q", "completion": "a"}, {"messages": [QUESTION, ANSWER]}):
        assert "label, kto_tag disagree" in malformed(record | {"label": 1, "kto_tag": "false"})
        assert parse_record(record | {"label": "0", "kto_tag": False})[1].desirable is False
        assert parse_record(record | {"label": "maths", "kto_tag": "0"})[1].desirable is False


def test_a_record_without_a_verdict_is_none_of_kto():
    for record in ({"prompt": "q", "completion": "a"}, {"messages": [QUESTION, ANSWER], "label": "maths"}):
        with pytest.raises(MalformedRecord, match="without a verdict that can be read: label must be true or false"):
            parse_record(record, "labelled")


def test_what_its_record_leaves_out_is_untrained_in_a_labelled_conversation_too():
    turns = [QUESTION, ANSWER | {"loss": False}, QUESTION, ANSWER]
    parsed = parse_record({"messages": turns, "label": False}, "labelled")[1]
    assert [item.trained for item in parsed.conversation.messages] == [True, False, True, True]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, ANSWER]},
        {"instruction": "q", "output": ["a", "b"]},
        {"question": "q", "response_j": "a", "response_k": "b"},
        {"conversations": [QUESTION], "chosen": ANSWER, "rejected": ANSWER},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    ],
    ids=str,
)
def test_every_pair_keeps_the_margin_of_its_record(record):
    for margin, read in ((0.5, 0.5), (-1, -1.0), ("2.5", 2.5), (0, 0.0), (None, None), (math.nan, None)):
        assert parse_record(record | {"margin": margin}, "pair")[1].margin == read
    assert parse_record(record, "pair")[1].margin is None
    for margin in (math.inf, 10**400):
        assert "margin must be finite number" in malformed(record | {"margin": margin})
    found = read_record(record | {"margin": "wide"}, "pair")
    assert (found.parsed.margin, found.unread) == (None, {"margin": 4})


@pytest.mark.parametrize("label", [3, "maths", "2", None, 0.5])
def test_a_label_that_is_no_verdict_is_none(label):
    parse_record({"prompt": "q", "completion": "a", "label": 1})  # of the same shape
    name, parsed = parse_record({"prompt": "q", "completion": "a", "label": label})
    assert (name, parsed.messages[-1].trained) == ("prompt_completion", True)


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"instruction": "q", "output": "a", "chosen": None, "rejected": None}, "alpaca"),
        ({"messages": [QUESTION, ANSWER], "conversations": None}, "messages"),
    ],
)
def test_a_null_says_as_little_as_no_key(record, name):
    assert parse_record(record)[0] == name


def test_messages_are_taken_as_they_stand():
    record = messages((SYSTEM, "s"), (USER, "q"), (ASSISTANT, "a"), (USER, "more")) | {"prompt": "q", "prompt_id": "1"}
    assert parse(record) == ("messages", [(SYSTEM, "s"), (USER, "q"), (ASSISTANT, "a"), (USER, "more")])


def test_loss_false_leaves_a_reply_untrained():
    turns = [{"human": "q", "assistant": "a", "loss": False}, {"human": "q", "assistant": "b"}]
    _, conversation = parse_record({"conversation": turns})
    assert isinstance(conversation, Conversation)
    assert [item.trained for item in conversation.messages if item.role == ASSISTANT] == [False, True]
    record = messages((USER, "q"), (ASSISTANT, "a"))
    record["messages"][1]["loss"] = False
    assert parse_record(record)[1] == Conversation((Message.of(USER, "q"), Message.of(ASSISTANT, "a", trained=False)))


def test_tokens_are_taken_as_they_are():
    name, tokens = parse_record({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]})
    assert name == "tokens"
    assert isinstance(tokens, Tokens)
    np.testing.assert_array_equal(tokens.input_ids, [5, 6, 7])
    np.testing.assert_array_equal(tokens.labels, [-100, 6, 7])
    assert tokens.input_ids.dtype == tokens.labels.dtype == np.int32


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_no_character_of_a_content_is_changed(question, answer):
    turns = [(USER, question), (ASSISTANT, answer)]
    assert parse({"conversation": [{"human": question, "assistant": answer}]})[1] == turns
    assert parse({"instruction": question, "output": answer})[1] == turns
    assert parse(messages(*turns))[1] == turns


@pytest.mark.parametrize("text", ["{x} {{y}} {0}", "100% %s", "{% raw %}{{ 1 + 1 }}{% endraw %}", "$HOME \\n", ""])
def test_braces_and_percent_signs_in_a_content_stay(text):
    assert parse({"conversation": [{"human": text, "assistant": text}]})[1] == [(USER, text), (ASSISTANT, text)]


# ---- what is malformed ----


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ([1], "a record must be an object, not list"),
        ("text", "a record must be an object, not text"),
        (None, "a record must be an object, not null"),
        (3.5, "a record must be an object, not number"),
        ({}, "no known format has the keys –"),
        ({"instruction": "x"}, "the keys 'instruction' alone; missing is one of: 'output' (alpaca)"),
        ({"prompt": "x", "chosen": "y"}, "missing is one of: 'rejected'"),
        ({"chosen": [{"role": "user", "content": "x"}]}, "missing is one of: 'rejected'"),
        ({"colour": "x"}, "no known format has the keys 'colour' (known formats: "),
        ({"input_ids": [1]}, "no known format"),
        (firefly(messages=[]), "the record fits several formats: firefly, messages"),
        (firefly(instruction="x", output="y"), "the record fits several formats: firefly, alpaca"),
        # the tutorial's shape
        (firefly(conversation={}), "conversation must be list, not object"),
        (firefly(conversation="hi"), "conversation must be list, not text"),
        (firefly(conversation=None), "conversation must be list, not null"),
        (firefly(conversation=[]), "conversation is empty"),
        (firefly(conversation=["hi"]), "conversation[0] must be object, not text"),
        (firefly(conversation=[{"assistant": "a"}]), "conversation[0].human is missing"),
        (firefly(conversation=[{"human": "q", "assistant": "a"}, {"human": "q"}]), "[1].assistant is missing"),
        (firefly(conversation=[{"human": 1, "assistant": "a"}]), "conversation[0].human must be text, not number"),
        (firefly(conversation=[{"human": "q", "assistant": None}]), "conversation[0].assistant must be text, not null"),
        (firefly(conversation=[{"human": "q", "assistant": True}]), "assistant must be text, not true/false"),
        (firefly(conversation=[{"human": "q", "assistant": "\ud800"}]), "[0].assistant has a lone surrogate"),
        (firefly(system=5), "system must be text, not number"),
        (firefly(system=["s"]), "system must be text, not list"),
        (firefly(system="a\udfff"), "system has a lone surrogate"),
        (
            firefly(conversation=[{"human": "q", "assistant": "a", "loss": 0}]),
            "conversation[0].loss must be true or false, not number",
        ),
        # Alpaca
        ({"instruction": 1, "output": "a"}, "instruction must be text, not number"),
        ({"instruction": "q", "output": None}, "output must be text, not null"),
        ({"instruction": "q", "output": "a", "input": 5}, "input must be text, not number"),
        # messages
        ({"messages": {}}, "messages must be list, not object"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [1]}, "messages[0] must be object, not number"),
        ({"messages": [{"content": "x"}]}, "messages[0].role is missing"),
        (messages((USER, [{"type": "text"}])), "messages[0].content[0].text is missing"),
        (messages(("wizard", "x")), "messages[0].role = 'wizard' is unknown"),
        (messages((USER, "q")) | {"tools": [{}]}, "tools[0].name must be text, not null"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "tool_calls[0].name is missing"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        (messages((3, "x")), "messages[0].role must be text, not number"),  # type: ignore[arg-type]
        ({"messages": [{"role": "user", "content": "q", "loss": "no"}]}, "messages[0].loss must be true or false"),
        # tokens
        ({"input_ids": [1, 2], "labels": [1]}, "input_ids has 2 numbers and labels 1"),
        ({"input_ids": [], "labels": []}, "input_ids is empty"),
        ({"input_ids": "1 2", "labels": [1]}, "input_ids must be list of integers, not text"),
        ({"input_ids": [1.5], "labels": [1]}, "input_ids must be list of integers"),
        ({"input_ids": [True], "labels": [1]}, "input_ids must be list of integers"),
        ({"input_ids": [2**40], "labels": [2**40]}, "input_ids must be list of integers"),
        ({"input_ids": [-5], "labels": [-5]}, "input_ids must be ids ≥ 0"),
        ({"input_ids": [5, 6], "labels": [6, -100]}, "a label is neither -100 nor the id"),
    ],
)  # fmt: skip
def test_a_wrong_shape_is_named_by_its_field(record, said):
    assert said in malformed(record)


def test_a_key_that_no_file_can_hold_is_still_shown():
    message = malformed({"\ud800": 1, "\x1b[31m": 2})
    message.encode("utf-8")
    assert "\x1b" not in message


KEYS = "conversation messages human assistant role content instruction output system input_ids labels loss user".split()
record_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=50)
@given(record_like)
def test_any_json_value_is_parsed_or_called_malformed(value):
    try:
        name, parsed = parse_record(json.loads(json.dumps(value)))
    except MalformedRecord as error:
        name, parsed = None, str(error)
    assert parsed if name is None else name in FORMATS and isinstance(parsed, Parsed)
