"""The record shapes of the tutorial's nine data sets and of the formats that people bring along."""

from __future__ import annotations

import json
from typing import Any

import pytest

from firefly.config import DataConfig
from firefly.data.dataset import load_split
from firefly.data.encoding import Encoder
from firefly.data.formats import FORMATS, MalformedRecord, parse_record, read_record
from firefly.data.formats.fields import Fields
from firefly.data.schema import IGNORE, Conversation, Document, Labelled, Message, PreferencePair, TextPart, TokenPair
from firefly.data.templates import bind_template
from tiny import tiny_tokenizer


def turns(conversation: Conversation) -> list[tuple[str, str]]:
    return [(item.role, item.text) for item in conversation.messages]


ASKED = [("user", "q"), ("assistant", "a")]
QUESTION_MESSAGE = {"role": "user", "content": "q"}

CHATS: list[tuple[str, str, dict[str, Any], list[tuple[str, str]]]] = [
    ("firefly-train-1.1M", "input_target", {"kind": "NLI", "input": "q", "target": "a"}, ASKED),
    (
        "moss-003-sft-data as the tutorial has it",
        "firefly",
        {"conversation_id": 1, "category": "x", "conversation": [{"human": "q", "assistant": "a"}], "dataset": "moss"},
        ASKED,
    ),
    (
        "MOSS as published",
        "moss",
        {
            "conversation_id": 1,
            "meta_instruction": "You are MOSS.",
            "num_turns": 2,
            "chat": {
                "turn_2": {"Human": "<|Human|>: q2<eoh>\n", "MOSS": "<|MOSS|>: a2<eom>\n"},
                "turn_1": {
                    "Human": "<|Human|>: q1<eoh>\n",
                    "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
                    "Commands": "<|Commands|>: None<eoc>\n",
                    "Tool Responses": "<|Results|>: None<eor>\n",
                    "MOSS": "<|MOSS|>: a1<eom>\n",
                },
            },
            "category": "Brainstorming",
        },
        [("system", "You are MOSS."), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")],
    ),
    ("BELLE, school_math_0.25M", "alpaca", {"instruction": "q", "input": "", "output": "a"}, ASKED),
    ("WizardLM_evol_instruct", "instruction_response", {"instruction": "q", "response": "a"}, ASKED),
    (
        "dolly",
        "instruction_response",
        {"instruction": "q", "context": "c", "response": "a"},
        [("user", "q\nc"), ASKED[1]],
    ),
    (
        "WizardLM_V2_196k",
        "sharegpt",
        {"idx": "x", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        ASKED,
    ),
    (
        "ultrachat_200k",
        "messages",
        {
            "prompt": "q",
            "prompt_id": "1",
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        },
        ASKED,
    ),
    (
        "alpaca with history",
        "alpaca",
        {"instruction": "q", "output": "a", "history": [["q0", "a0"]], "system": "s"},
        [("system", "s"), ("user", "q0"), ("assistant", "a0"), *ASKED],
    ),
    ("query and response", "query_response", {"query": "q", "response": "a", "history": []}, ASKED),
    ("question and answer", "question_answer", {"question": "q", "answer": "a"}, ASKED),
    ("prompt and completion", "prompt_completion", {"prompt": "q", "completion": "a"}, ASKED),
    (
        "prompt and completion as messages",
        "prompt_completion",
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
        ASKED,
    ),
    (
        "content parts",
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {"role": "assistant", "content": "a"},
            ]
        },
        ASKED,
    ),
]

FURTHER_CHATS: list[tuple[str, str, dict[str, Any], list[tuple[str, str]]]] = [
    (
        "messages under the tutorial's key",
        "firefly",
        {"conversation": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        ASKED,
    ),
    (
        "both spellings in one list",
        "sharegpt",
        {"conversations": [{"from": "human", "content": "q"}, {"role": "assistant", "value": "a"}]},
        ASKED,
    ),
    (
        "the keys of both spellings, one of them null",
        "messages",
        {
            "messages": [
                {"from": "human", "value": "q", "role": None, "content": None},
                {"from": None, "value": None, "role": "assistant", "content": "a"},
            ]
        },
        ASKED,
    ),
    ("role and text", "messages", {"messages": [{"role": "user", "text": "q"}, {"role": "bot", "text": "a"}]}, ASKED),
    (
        "the tutorial's turns under another key",
        "messages",
        {"messages": [{"human": "q", "assistant": "a"}, {"user": "q2", "assistant": "a2"}]},
        [*ASKED, ("user", "q2"), ("assistant", "a2")],
    ),
    (
        "XTuner",
        "firefly",
        {"conversation": [{"system": "s", "input": "q", "output": "a"}, {"input": "q2", "output": "a2"}]},
        [("system", "s"), *ASKED, ("user", "q2"), ("assistant", "a2")],
    ),
    (
        "columns of turns",
        "sharegpt",
        {"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}},
        ASKED,
    ),
    (
        "a list of messages as text",
        "messages",
        {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'},
        ASKED,
    ),
    ("texts that alternate", "firefly", {"conversation": ["q", "a"]}, ASKED),
    (
        "history beside messages",
        "messages",
        {
            "messages": [{"role": "system", "content": "s"}, QUESTION_MESSAGE, {"role": "assistant", "content": "a"}],
            "history": [["q0", "a0"]],
        },
        [("system", "s"), ("user", "q0"), ("assistant", "a0"), *ASKED],
    ),
    (
        "history beside the tutorial's turns, as messages",
        "firefly",
        {
            "system": "s",
            "conversation": [{"human": "q", "assistant": "a"}],
            "history": [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a0"}],
        },
        [("system", "s"), ("user", "q0"), ("assistant", "a0"), *ASKED],
    ),
    (
        "content parts of type and value",
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "value": "q"}]},
                {"role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
            ]
        },
        ASKED,
    ),
    (
        "parallel lists",
        "prompt_response",
        {"prompts": ["q", "q2"], "responses": ["a", "a2"], "context": "c"},
        [("user", "q\nc"), ("assistant", "a"), ("user", "q2"), ("assistant", "a2")],
    ),
    (
        "an instruction before parallel lists",
        "alpaca",
        {"instruction": "i", "input": ["q", "q2"], "output": ["a", "a2"]},
        [("user", "i\nq"), ("assistant", "a"), ("user", "q2"), ("assistant", "a2")],
    ),
    (
        "a prompt before parallel lists",
        "other_question",
        {"prompt": "i", "input": ["q", "q2"], "output": ["a", "a2"]},
        [("user", "i\nq"), ("assistant", "a"), ("user", "q2"), ("assistant", "a2")],
    ),
    ("an answer that is null", "other_question", {"question": "q", "answer": None, "response": "a"}, ASKED),
    ("one answer in a list", "alpaca", {"instruction": "q", "output": ["a"]}, ASKED),
    ("question and standard answer", "question_answer", {"question": "q", "std_answer": "a", "class": "x"}, ASKED),
    ("question and gold answer", "question_answer", {"question": "q", "gold_answer": "a", "class": "x"}, ASKED),
    (
        "columns of the three roles",
        "other_question",
        {"system": "s", "user": "q", "assistant": "a"},
        [("system", "s"), *ASKED],
    ),
    ("columns of a speaker each", "other_question", {"Human": ["q"], "Assistant": ["a"]}, ASKED),
    (
        "UltraChat",
        "ultrachat",
        {"id": 1, "data": ["q", "a", "q2", "a2"]},
        [*ASKED, ("user", "q2"), ("assistant", "a2")],
    ),
    ("problem and solution", "other_question", {"problem": "q", "solution": "a"}, ASKED),
    ("inputs and targets", "input_target", {"inputs": "q", "targets": "a"}, ASKED),
    (
        "instruction, input and target",
        "other_question",
        {"instruction": "i", "input": "q", "target": "a"},
        [("user", "i\nq"), ASKED[1]],
    ),
    (
        "instruction and question",
        "question_answer",
        {"instruction": "i", "question": "q", "context": ["c", "d"], "answer": "a"},
        [("user", "i\nq\nc\nd"), ASKED[1]],
    ),
    (
        "prompt and query",
        "prompt_response",
        {"prompt": "i", "query": "q", "response": "a"},
        [("user", "i\nq"), ASKED[1]],
    ),
    (
        "a prompt that was made of the others",
        "prompt_completion",
        {"prompt": "Read: c\nSay: q", "context": "c", "completion": "a"},
        [("user", "Read: c\nSay: q"), ASKED[1]],
    ),
    (
        "a text prompt and a completion of messages",
        "prompt_completion",
        {"prompt": "q", "completion": [{"role": "assistant", "content": "a"}]},
        ASKED,
    ),
]


@pytest.mark.parametrize(
    ("form", "record", "expected"), [item[1:] for item in FURTHER_CHATS], ids=[item[0] for item in FURTHER_CHATS]
)
def test_another_spelling_becomes_the_same_turns(form, record, expected):
    found = read_record(record, "conversation")
    assert isinstance(found.parsed, Conversation)
    assert (found.format, turns(found.parsed)) == (form, expected)
    assert set(found.unread) <= {"class"}


@pytest.mark.parametrize(("form", "record", "expected"), [item[1:] for item in CHATS], ids=[item[0] for item in CHATS])
def test_a_chat_record_becomes_its_turns(form, record, expected):
    name, parsed = parse_record(record, "conversation")
    assert isinstance(parsed, Conversation)
    assert (name, turns(parsed)) == (form, expected)


QUESTION = {"role": "user", "content": "q"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
PAIRS: list[tuple[str, str, dict[str, Any]]] = [
    (
        "ultrafeedback_binarized",
        "preference",
        {
            "prompt": "q",
            "prompt_id": "1",
            "chosen": [QUESTION, GOOD],
            "rejected": [QUESTION, BAD],
            "messages": [QUESTION, GOOD],
            "score_chosen": 8.0,
            "score_rejected": 5.0,
        },
    ),
    ("answers as lists", "preference", {"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]}),
    ("strings", "preference_text", {"prompt": "q", "chosen": "good", "rejected": "bad"}),
    ("alpaca pairs", "preference_text", {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"}),
    (
        "ShareGPT pairs",
        "preference_sharegpt",
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
    ),
    (
        "HH-RLHF",
        "preference_transcript",
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
    ),
    (
        "StackExchange pairs",
        "preference_responses",
        {"question": "q", "response_j": "good", "response_k": "bad", "qid": 1},
    ),
]


FURTHER_PAIRS: list[tuple[str, str, dict[str, Any]]] = [
    ("under messages", "preference", {"chosen_messages": [QUESTION, GOOD], "rejected_messages": [QUESTION, BAD]}),
    (
        "under conversations",
        "preference",
        {"chosen_conversations": [QUESTION, GOOD], "rejected_conversations": [QUESTION, BAD]},
    ),
    ("ms-swift, a text", "preference", {"messages": [QUESTION, GOOD], "rejected_response": "bad"}),
    ("ms-swift, messages", "preference", {"messages": [QUESTION, GOOD], "rejected_messages": [QUESTION, BAD]}),
    (
        "a prompt and response texts",
        "preference_text",
        {"query": "q", "chosen_response": "good", "rejected_response": "bad"},
    ),
    ("an input", "preference_text", {"input": "q", "chosen": "good", "rejected": "bad"}),
    ("a prompt and single messages", "preference_text", {"prompt": "q", "chosen": GOOD, "rejected": BAD}),
    ("messages and texts", "preference_sharegpt", {"messages": [QUESTION], "chosen": "good", "rejected": "bad"}),
    ("a list and its worse answer", "preference", {"chosen": [QUESTION, GOOD], "rejected": "bad"}),
    (
        "conversations and lists",
        "preference_sharegpt",
        {"conversations": [QUESTION], "chosen": [GOOD], "rejected": [BAD]},
    ),
    ("both in one list", "preference_list", {"instruction": "q", "input": "", "output": ["good", "bad"]}),
    ("both responses", "preference_list", {"question": "q", "responses": ["good", "bad"]}),
    ("both behind messages", "preference_list", {"prompt": [QUESTION], "completion": ["good", "bad"]}),
]


@pytest.mark.parametrize(
    ("form", "record"), [item[1:] for item in FURTHER_PAIRS], ids=[item[0] for item in FURTHER_PAIRS]
)
def test_another_spelling_becomes_the_same_pair(form, record):
    found = read_record(record, "pair")
    assert isinstance(found.parsed, PreferencePair)
    assert (found.format, found.unread) == (form, {})
    assert turns(found.parsed.chosen) == [("user", "q"), ("assistant", "good")]
    assert turns(found.parsed.rejected) == [("user", "q"), ("assistant", "bad")]
    assert [item.trained for item in found.parsed.rejected.messages] == [False, True]
    with pytest.raises(MalformedRecord, match="task_type dpo"):
        parse_record(record, "conversation")


def test_a_table_may_hold_messages_as_text():
    def cell(role: str, content: str) -> str:
        return json.dumps([{"role": role, "content": content}])

    good, bad = cell("assistant", "good"), cell("assistant", "bad")
    for prompt in ("q", cell("user", "q")):
        pair = parse_record({"prompt": prompt, "chosen": good, "rejected": bad}, "pair")[1]
        assert turns(pair.chosen) == [("user", "q"), ("assistant", "good")]
        assert turns(pair.rejected) == [("user", "q"), ("assistant", "bad")]
    assert turns(parse_record({"prompt": cell("user", "q"), "completion": cell("assistant", "a")})[1]) == ASKED
    # JSON that is an answer stays one.
    for text in ('[{"a": 1}]', "[{oops", '["role"]', good):
        pair = parse_record({"prompt": "q", "chosen": text, "rejected": "bad"}, "pair")[1]
        assert turns(pair.chosen)[1] == ("assistant", text)
        assert turns(parse_record({"prompt": "q", "completion": text})[1])[1] == ("assistant", text)


def test_a_pair_whose_calls_before_the_answer_differ_is_no_pair_of_one_prompt():
    def side(arguments: str, answer: str) -> list[dict[str, Any]]:
        call = {"function": {"name": "f", "arguments": {"x": arguments}}}
        return [
            QUESTION,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "r"},
            {"role": "assistant", "content": answer},
        ]

    parse_record({"chosen": side("1", "good"), "rejected": side("1", "bad")})
    with pytest.raises(MalformedRecord, match="same prompt"):
        parse_record({"chosen": side("1", "good"), "rejected": side("2", "bad")})


@pytest.mark.parametrize(("form", "record"), [item[1:] for item in PAIRS], ids=[item[0] for item in PAIRS])
def test_a_preference_record_becomes_two_answers_to_one_prompt(form, record):
    name, parsed = parse_record(record, "pair")
    assert isinstance(parsed, PreferencePair)
    assert name == form
    assert turns(parsed.chosen) == [("user", "q"), ("assistant", "good")]
    assert turns(parsed.rejected) == [("user", "q"), ("assistant", "bad")]


def test_a_multi_turn_transcript_keeps_its_turns_and_trains_only_the_last():
    start = "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant: "
    _, pair = parse_record({"chosen": start + "good", "rejected": start + "bad"})
    assert isinstance(pair, PreferencePair)
    assert turns(pair.chosen) == [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "good")]
    assert [item.trained for item in pair.chosen.messages if item.role == "assistant"] == [False, True]
    with pytest.raises(MalformedRecord, match="same prompt"):
        parse_record({"chosen": start + "good", "rejected": start.replace("q1", "x") + "bad"})


def test_function_calls_of_sharegpt_are_replies_that_call():
    record = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": [1, "ä"]}}'},
            {"from": "observation", "value": '{"y": 2}'},
            {"from": "gpt", "value": "a"},
        ],
        "tools": '[{"name": "f", "description": "d", "parameters": {}}]',
    }
    _, parsed = parse_record(record)
    assert isinstance(parsed, Conversation)
    assert [item.role for item in parsed.messages] == ["user", "assistant", "tool", "assistant"]
    assert parsed.messages[1].tool_calls == (
        {"type": "function", "function": {"name": "f", "arguments": {"x": [1, "ä"]}}},
    )
    assert parsed.tools == ({"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}},)
    openai = {
        "messages": [
            {"role": "user", "content": "q"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, "ä"]}'}}
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": '{"y": 2}'},
        ]
    }
    _, other = parse_record(openai)
    assert isinstance(other, Conversation)
    assert other.messages[1].tool_calls[0]["function"] == parsed.messages[1].tool_calls[0]["function"]
    assert other.messages[2].tool_call_id == "c1"


def test_reasoning_is_kept_apart_from_the_reply():
    record = {"messages": [QUESTION, GOOD | {"reasoning_content": "because"}]}
    _, parsed = parse_record(record)
    assert isinstance(parsed, Conversation)
    assert (parsed.messages[1].reasoning, parsed.messages[1].text) == ("because", "good")


def test_a_condemned_answer_is_not_trained():
    for wanted in (True, False):
        for record in (
            {"messages": [QUESTION, GOOD], "label": wanted},
            {"prompt": "q", "completion": "good", "label": wanted},
        ):
            _, parsed = parse_record(record)
            assert isinstance(parsed, Labelled)
            assert parsed.as_demonstration().messages[1].trained is wanted


def test_a_text_is_a_document_and_beside_other_keys_the_task_decides():
    assert parse_record({"text": "words", "url": "x"}) == ("text", Document("words"))
    alpaca = {"instruction": "q", "output": "a", "text": "the whole prompt"}
    assert parse_record(alpaca, "conversation")[0] == "alpaca"
    assert parse_record(alpaca, "document")[0] == "text"
    with pytest.raises(MalformedRecord, match="data_format"):
        parse_record(alpaca)
    assert parse_record(alpaca, data_format="alpaca")[0] == "alpaca"


def test_a_record_for_another_task_says_which():
    with pytest.raises(MalformedRecord, match="task_type dpo"):
        parse_record(PAIRS[0][2], "conversation")
    with pytest.raises(MalformedRecord, match="task_type pretrain"):
        parse_record({"text": "x"}, "conversation")


def test_a_forced_format_names_the_key_it_misses():
    with pytest.raises(MalformedRecord, match="output"):
        parse_record({"instruction": "q"}, data_format="alpaca")


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"messages": [QUESTION], "conversation": []}, "firefly, messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "wizard"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ({"conversations": [{"from": "function_call", "value": "not json"}]}, "value"),
        ({"messages": [QUESTION], "tools": "[1]"}, r"tools\[0\]"),
        ({"messages": [{"role": "system", "content": "s"}, QUESTION], "system": "t"}, "system"),
        ({"chat": {"turn_1": {"Human": "q", "MOSS": "a", "Commands": "<|Commands|>: Search(1)<eoc>"}}}, "plug-in"),
        ({"instruction": "q", "output": "a", "history": [["only"]]}, r"history\[0\]"),
        ({"chosen": "good", "rejected": "bad"}, "Human"),
    ],
)
def test_what_is_wrong_is_named_by_its_field(record, named):
    with pytest.raises(MalformedRecord, match=named):
        parse_record(record)


def test_instances_are_an_example_each():
    record = {
        "system": "s",
        "instruction": "i",
        "instances": [{"input": "x", "output": "a"}, {"output": "b"}, {"inputs": "z", "targets": ["c"], "loss": False}],
    }
    _, parsed = parse_record(record, "conversation")
    assert [turns(one) for one in parsed] == [
        [("system", "s"), ("user", "i\nx"), ("assistant", "a")],
        [("system", "s"), ("user", "i"), ("assistant", "b")],
        [("system", "s"), ("user", "i\nz"), ("assistant", "c")],
    ]
    assert [one.messages[-1].trained for one in parsed] == [True, True, False]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


def test_chatglm3s_first_tool_rows_hold_call_and_answer_in_one():
    record = {
        "tools": [{"name": "add", "description": "d", "parameters": {"a": "number"}}],
        "conversations": [
            QUESTION,
            {"role": "assistant", "content": "I shall add."},
            {"role": "tool", "name": "add", "parameters": {"a": 2}, "observation": {"sum": "二"}},
            {"role": "tool", "name": "add", "parameters": '{"a": 2}', "observation": "5"},
            {"role": "assistant", "content": "Five."},
        ],
    }
    found = read_record(record)
    user, thought, first, second, other, last = found.parsed.messages
    assert (thought.text, thought.tool_calls, first.text, first.name) == (
        "I shall add.",
        (CALL,),
        '{"sum": "二"}',
        "add",
    )
    assert (second.role, second.text, second.tool_calls, other.text) == ("assistant", "", (CALL,), "5")
    assert (user.text, last.text, found.unread) == ("q", "Five.", {})


@pytest.mark.parametrize("key", ["arguments", "args", "kwargs", "input", "params", "parameters"])
@pytest.mark.parametrize("value", [{"a": 2}, '{"a": 2}'])
@pytest.mark.parametrize("besides", [{}, {"arguments": {}}, {"arguments": None}, {"arguments": ""}])
def test_the_arguments_of_a_call_are_read_under_any_of_their_names(key, value, besides):
    bare = {**besides, "name": "add", key: value}
    for call in (bare, {"function": bare}, {"function": {**besides, "name": "add"}, key: value}):
        reply = {"role": "assistant", "content": "", "tool_calls": [call]}
        assert parse_record({"messages": [QUESTION, reply]})[1].messages[1].tool_calls == (CALL,)


@pytest.mark.parametrize("value", ["w", 0, False, {"a": 2}, [1]])
def test_what_a_call_says_under_any_other_key_is_refused_by_name_and_not_left_out(value):
    for call, place in (
        ({"name": "add", "payload": value}, r"tool_calls\[0\].payload"),
        ({"name": "add", "arguments": {"a": 2}, "payload": value}, r"tool_calls\[0\].payload"),
        ({"function": {"name": "add", "payload": value}}, r"tool_calls\[0\].function.payload"),
        ({"function": {"name": "add"}, "payload": value}, r"tool_calls\[0\].payload"),
    ):
        reply = {"role": "assistant", "content": "", "tool_calls": [call]}
        with pytest.raises(MalformedRecord, match=place):
            parse_record({"messages": [QUESTION, reply]})
    whole = {"id": "c", "index": 0, "type": "function", "function": {"name": "add", "arguments": {"a": 2}, "x": None}}
    reply = {"role": "assistant", "content": "", "tool_calls": [whole]}
    assert read_record({"messages": [QUESTION, reply]}).unread == {}


def test_a_call_that_says_two_things_is_refused_by_name():
    for call in (
        {"name": "add", "arguments": {"a": 2}, "args": {"a": 3}},
        {"name": "sub", "function": {"name": "add", "arguments": {"a": 2}}},
    ):
        with pytest.raises(MalformedRecord, match="disagree"):
            parse_record({"messages": [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]})


def test_roles_identifiers_and_tools_are_known_in_their_other_spellings():
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    record = {
        "messages": [
            {"role": "System", "content": "s"},
            {"role": "Human", "content": "q"},
            {"role": "Assistant", "content": "", "tool_calls": [{"id": 7, "name": "add", "arguments": {"a": 2}}]},
            {"role": "Tool-Response", "content": "2", "tool_call_id": 7},
        ],
        "tools": tool,
    }
    for tools in (tool, tool["function"], json.dumps(tool), [tool]):
        found = parse_record({**record, "tools": tools})[1]
        assert found.tools == (tool,)
        assert [item.role for item in found.messages] == ["system", "user", "assistant", "tool"]
        assert (found.messages[2].tool_calls, found.messages[3].tool_call_id) == (({**CALL, "id": "7"},), "7")
    parts = {**record, "functions": tool["function"], "tools": None}
    assert parse_record(parts)[1].tools == (tool,)
    for spelled in ("Function-Call", "TOOL_CALL", "function_call"):
        call = {"from": spelled, "value": json.dumps({"name": "add", "arguments": {"a": 2}})}
        found = parse_record({"conversations": [{"from": "human", "value": "q"}, call]})[1]
        assert found.messages[1].tool_calls == (CALL,)
    for spelled in ("ai", "AI", "bing", "chatbot", "Bard", "ChatGPT"):
        assert turns(parse_record({"conversations": [QUESTION, {"from": spelled, "value": "a"}]})[1]) == ASKED
    for identifier in (True, 1.5, [1]):
        record["messages"][3]["tool_call_id"] = identifier
        with pytest.raises(MalformedRecord, match=r"messages\[3\].tool_call_id must be text"):
            parse_record(record)


def test_one_system_prompt_that_stands_in_two_places_is_one():
    system, answer = {"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}
    for record in (
        {"system": "s", "messages": [system, QUESTION, answer]},
        {"system_prompt": "s\n", "conversations": [system, QUESTION, answer]},
        {"system": "s", "conversation": [{"system": "s", "human": "q", "assistant": "a"}]},
        {"system": "s", "prompt": [system, QUESTION], "completion": [answer]},
    ):
        found = read_record(record, "conversation")
        assert (turns(found.parsed), found.unread) == ([("system", "s"), *ASKED], {})
    pair = {"system": "s", "chosen": [system, QUESTION, GOOD], "rejected": [system, QUESTION, BAD]}
    assert turns(parse_record(pair, "pair")[1].chosen) == [("system", "s"), ("user", "q"), ("assistant", "good")]


REPLY = {"role": "assistant", "content": "a"}
LONG = [{"from": "human", "value": "Solve this. q\n"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    ("record", "form", "unread"),
    [
        ({"problem": "q", "solution": "a", "messages": [QUESTION, REPLY]}, "messages", {}),  # NuminaMath-CoT
        (
            {"problem": "q", "solution": "s!", "answer": "4", "generations": ["g"], "messages": [QUESTION, REPLY]},
            "messages",
            {"solution": 2, "answer": 1, "generations": 1},  # OpenR1-Math
        ),
        ({"instruction": "q", "response": "a", "conversations": [QUESTION, REPLY]}, "sharegpt", {}),  # Magpie
        ({"instruction": "other", "output": "a", "messages": [QUESTION, REPLY]}, "messages", {"instruction": 5}),
        ({"prompt": "q", "completion": "a", "messages": json.dumps([QUESTION, REPLY])}, "messages", {}),
        ({"question": "q", "answer": "a", "conversation": [QUESTION, REPLY]}, "firefly", {}),
        ({"question": "q", "answers": ["a", "b"], "messages": [QUESTION, REPLY]}, "messages", {"answers": 1}),
    ],
)
def test_messages_are_taken_before_the_question_and_answer_that_they_say_again(record, form, unread):
    for task in ("conversation", None):
        found = read_record(record, task)
        assert (found.format, turns(found.parsed), found.unread) == (form, ASKED, unread)


def test_messages_beside_a_question_of_another_matter_are_two_formats():
    read_record({"instruction": "q", "output": "a", "messages": [QUESTION, REPLY]})  # of the same keys
    with pytest.raises(MalformedRecord, match="several formats: messages, alpaca"):
        parse_record({"instruction": "Write.", "output": "I wrote.", "messages": [QUESTION, REPLY]})
    found = read_record({"problem": "q", "solution": "no", "conversations": LONG})
    assert (turns(found.parsed)[0], found.unread) == (("user", "Solve this. q\n"), {"problem": 1, "solution": 2})


@pytest.mark.parametrize(
    ("answers", "unread"),
    [
        ({"text": ["a", "a", "b!"], "answer_start": [1, 1, 5]}, {"answers.text": 2}),
        ({"text": ["a"], "answer_start": [1]}, {}),
        ({"text": "a", "answer_start": 1}, {}),
        ([{"text": "a", "answer_start": 1}, {"text": "b", "answer_start": 5}], {"answers[].text": 1}),
    ],
)
def test_the_first_span_of_a_context_is_its_answer(answers, unread):
    found = read_record({"id": "x1", "question": "q", "context": "c", "answers": answers}, "conversation")
    assert turns(found.parsed) == [("user", "q\nc"), ("assistant", "a")]
    assert found.unread == {"id": 2, **unread}
    with pytest.raises(MalformedRecord, match=r"answers.text is empty"):
        parse_record({"question": "q", "context": "c", "answers": {"text": [], "answer_start": []}})


def test_keys_in_capitals_are_known_where_no_format_has_them_so():
    found = read_record({"Question": "q", "Complex_CoT": "why", "Response": "a"}, "conversation")
    assert (turns(found.parsed), found.unread) == (ASKED, {"Complex_CoT": 3})
    for record in (
        {"Instruction": "q", "Input": "", "Output": "a"},
        {"instruction": "q", "OUTPUT": "a"},
        {"Prompt": "q", "Completion": "a"},
        {"User": "q", "Answer": "a"},
        {"Messages": [QUESTION, REPLY]},
    ):
        assert turns(parse_record(record, "conversation")[1]) == ASKED
    assert turns(parse_record({"Instruction": "q", "Output": "a"}, "conversation", "alpaca")[1]) == ASKED
    for label, trained in ((1, True), ("0", False)):
        labelled = parse_record({"Prompt": "q", "Completion": "a", "Label": label}, "conversation")[1]
        assert labelled.desirable is trained
    pair = parse_record({"Prompt": "q", "Chosen": "good", "Rejected": "bad"}, "pair")[1]
    assert turns(pair.rejected) == [("user", "q"), ("assistant", "bad")]
    # Exact keys are the record's own, and those in capitals beside them are others.
    found = read_record({"instruction": "q", "output": "a", "Input": "x", "Output": "y"})
    assert (turns(found.parsed), found.unread) == (ASKED, {"Input": 1, "Output": 1})
    with pytest.raises(MalformedRecord, match="no known format has the keys 'Title'"):
        parse_record({"Title": "q"})


@pytest.mark.parametrize(
    ("beside", "texts"),
    [
        ({}, ["good", "bad"]),
        ({"scores": [9, 2.5]}, ["good", "bad"]),
        ({"scores": [2.5, 9]}, ["bad", "good"]),
        ({"ratings": ["3", "4.5"]}, ["bad", "good"]),
        ({"rewards": [-2.0, -1.0]}, ["bad", "good"]),
        ({"ranks": [1, 2]}, ["good", "bad"]),
        ({"ranks": [2, 1], "scores": [0, 1]}, ["bad", "good"]),
        ({"score": 7}, ["good", "bad"]),
        ({"labels": [0, 1]}, ["bad", "good"]),
        ({"response_scores": [1, 2]}, ["bad", "good"]),
        ({"responses_ranks": [2, 1]}, ["bad", "good"]),
    ],
)
def test_two_answers_in_a_list_are_ordered_by_the_numbers_beside_them(beside, texts):
    pair = parse_record({"question": "q", "responses": texts, **beside}, "pair")[1]
    assert turns(pair.chosen) == [("user", "q"), ("assistant", "good")]
    assert turns(pair.rejected) == [("user", "q"), ("assistant", "bad")]


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"scores": [1, 1.0]}, r"scores must be two different numbers, not \[1, 1.0\]"),
        ({"scores": [1, 2, 3]}, "scores must be two"),
        ({"ranks": [1, None]}, "ranks must be two"),
        ({"ratings": ["5", "N/A"]}, "ratings must be two"),
        ({"scores": [1, float("nan")]}, "scores must be two"),
        ({"scores": [10**400, 10**400]}, "scores must be two"),
        ({"scores": [1, 2], "ranks": [1, 2]}, "scores, ranks disagree"),
    ],
)
def test_numbers_that_prefer_neither_answer_are_refused_by_name(beside, said):
    with pytest.raises(MalformedRecord, match=said):
        parse_record({"question": "q", "responses": ["a", "b"], **beside}, "pair")


def test_parts_of_reasoning_text_and_calls_are_the_parts_of_a_reply():
    parts = [
        {"type": "reasoning", "value": "t"},
        {"type": "text", "value": "a"},
        {"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
    ]
    reply = parse_record({"messages": [QUESTION, {"role": "assistant", "content": parts}]})[1].messages[1]
    assert (reply.reasoning, reply.text, reply.tool_calls) == ("t", "a", (CALL,))
    for order in (parts[::-1], [parts[1], parts[0]]):
        with pytest.raises(MalformedRecord, match="out of order"):
            parse_record({"messages": [QUESTION, {"role": "assistant", "content": order}]})
    for kind in ("image_url", "image", "input_audio", 5, None, ["text"]):
        with pytest.raises(MalformedRecord, match=r"messages\[0\].content\[0\] is of type"):
            parse_record({"messages": [{"role": "user", "content": [{"type": kind, "value": "x"}]}]})


def test_parts_of_text_keep_their_borders_and_are_written_as_one_text():
    parts = [{"type": "text", "text": "a\n"}, "b", {"type": "input_text", "text": "c"}]
    asked, reply = parse_record({"messages": [{"role": "user", "content": parts}, GOOD]})[1].messages
    assert asked.content == (TextPart("a\n"), TextPart("b"), TextPart("c"))
    assert (asked.text, asked.as_dict()) == ("a\nbc", {"role": "user", "content": "a\nbc"})
    assert {reply} == {Message.of("assistant", "good")} == {Message("assistant", (TextPart("good"),))}
    assert Message.of("user", "") == Message("user", ())


MOSS = {
    "Human": "<|Human|>: q<eoh>\n",
    "Inner Thoughts": "<|Inner Thoughts|>: t<eot>\n",
    "Commands": '<|Commands|>: Search("a, (b)"), Calculate("1+\\"1\\"")<eoc>\n',
    "Tool Responses": '<|Results|>:\nSearch("a, (b)") =>\n<|1|>: x\nCalculate("1+\\"1\\"") => 2\n<eor>\n',
    "MOSS": "<|MOSS|>: a<eom>\n",
}


def test_moss_calls_several_plug_ins_and_each_answer_is_a_message():
    record = {"meta_instruction": "API: Search(words). API: Calculate(expression)", "chat": {"turn_1": MOSS}}
    found = read_record(record)
    call, first, second, reply = found.parsed.messages[2:]
    assert [item["function"] for item in call.tool_calls] == [
        {"name": "Search", "arguments": {"words": "a, (b)"}},
        {"name": "Calculate", "arguments": {"expression": '1+"1"'}},
    ]
    assert (call.text, call.reasoning, reply.text, reply.reasoning) == ("", "t", "a", None)
    assert [(item.name, item.text) for item in (first, second)] == [
        ("Search", 'Search("a, (b)") =>\n<|1|>: x'),
        ("Calculate", 'Calculate("1+\\"1\\"") => 2'),
    ]
    assert found.unread == {}
    thought = {**MOSS, "Commands": "<|Commands|>: None<eoc>\n", "Tool Responses": "<|Results|>: None<eor>\n"}
    assert parse_record({"chat": {"turn_1": thought}})[1].messages[-1].reasoning == "t"


@pytest.mark.parametrize("commands", ["please search", 'Search("x")', 'Search("x"), Search("y")', 'Search("x"'])
def test_a_moss_call_that_cannot_be_told_from_its_results_is_malformed_by_name(commands):
    turn = {**MOSS, "Commands": f"<|Commands|>: {commands}<eoc>", "Tool Responses": "<|Results|>: None<eor>"}
    with pytest.raises(MalformedRecord, match=r"chat.turn_1.Commands is not a MOSS plug-in"):
        parse_record({"chat": {"turn_1": turn}})


@pytest.mark.parametrize(
    ("flag", "trained"),
    [
        ({"loss": False}, False),
        ({"train": False}, False),
        ({"training": False}, False),
        ({"weight": 0}, False),
        ({"loss_weight": 0.0}, False),
        ({"loss_scale": 0}, False),
        *(
            ({key: no}, False)
            for key in ("loss_mask", "step_loss_mask", "trainable", "train_on_turn")
            for no in (0, False)
        ),
        *(({key: 1}, True) for key in ("loss_mask", "step_loss_mask", "trainable", "train_on_turn")),
        ({"train": None, "weight": None}, True),
        ({"train": True, "loss_weight": 1.0}, True),
    ],
)
def test_a_reply_is_left_out_however_the_record_says_so(flag, trained):
    reply = {"role": "assistant", "content": "a", **flag}
    turn = {"human": "q", "assistant": "a", **flag}
    for record in ({"messages": [QUESTION, reply]}, {"conversation": [turn]}):
        found = read_record(record)
        assert found.parsed.messages[1].trained is trained
    for record in ({"messages": [QUESTION, GOOD], **flag}, {"instruction": "q", "output": "a", **flag}):
        assert read_record(record).parsed.messages[1].trained is trained


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ({"loss_weight": 0.5}, "loss_weight must be 0 or 1, not 0.5"),
        ({"weight": 2}, "weight must be 0 or 1, not 2"),
        ({"weight": "heavy"}, "weight must be 0 or 1, not text"),
        ({"loss_scale": float("nan")}, "loss_scale must be 0 or 1, not nan"),
        ({"train": "no"}, "train must be true or false, not text"),
        ({"loss_mask": [0, 1]}, "loss_mask must be true or false, not list"),
        ({"trainable": 2}, "trainable must be true or false, not number"),
        ({"train_on_turn": 1, "loss": False}, "disagree"),
        ({"train": True, "weight": 0}, r"messages\[1\].train, messages\[1\].weight disagree"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}, "train_detail leaves out a part"),
    ],
)
def test_a_weight_that_is_not_applied_is_refused_by_name(flag, said):
    with pytest.raises(MalformedRecord, match=said):
        parse_record({"messages": [QUESTION, {"role": "assistant", "content": "a", **flag}]})


def test_beside_a_record_a_measured_loss_is_no_flag_and_a_weight_is_one():
    for record in ({"messages": [QUESTION, GOOD]}, {"instruction": "q", "output": "a"}):
        assert parse_record({**record, "loss": 1.25, "train": "part one"})[1].messages[1].trained
        assert not parse_record({**record, "train": "False"})[1].messages[1].trained  # a table's cell
        assert not parse_record({**record, "weight": "0"})[1].messages[1].trained
        with pytest.raises(MalformedRecord, match=r"weight must be 0 or 1, not 0\.5"):
            parse_record({**record, "weight": 0.5})
        assert not parse_record({**record, "loss_mask": "0"})[1].messages[1].trained
        assert parse_record({**record, "train": "0"})[1].messages[1].trained  # the number of a split
        with pytest.raises(MalformedRecord, match="loss_mask must be true or false, not list"):
            parse_record({**record, "loss_mask": [0, 1]})


@pytest.mark.parametrize(
    ("record", "task", "said"),
    [
        ({"instruction": "q", "output": 3}, "conversation", r"must be text, .*\(read as alpaca, because it has 'inst"),
        ({"messages": {}}, None, r"read as messages, because it has 'messages'"),
        ({"prompt": "q", "chosen": "a", "rejected": 3}, "pair", r"'prompt', 'chosen', 'rejected'"),
        ({"instruction": "q", "output": ["a", ""]}, "pair", r"output\[1\] is empty .read as preference_list"),
        ({"instruction": "q", "output": ["a", None]}, "pair", r"output\[1\] must be text, not null"),
        ({"instruction": "q", "output": ["a", "b", "c"]}, "pair", r"output must be \[chosen, rejected\], not 3"),
        ({"input": ["q"], "output": ["a", "b"]}, "conversation", "input has 1 turn.* and output 2"),
        ({"input": ["q", 5], "output": ["a", "b"]}, "conversation", r"input\[1\] must be text, not number"),
        ({"instruction": "i", "instances": [{"input": "x"}]}, "conversation", r"instances\[0\].output is missing"),
        ({"instruction": "i", "instances": []}, "conversation", "instances is empty"),
        ({"prompt": "q", "chosen": ["a", "b"], "rejected": ["c"]}, "pair", "chosen must be text, not list"),
        ({"chosen_messages": [QUESTION], "rejected_messages": [QUESTION, BAD]}, "pair", "chosen_messages|same prompt"),
        ({"conversations": {"from": ["human"], "value": ["q", "a"]}}, "conversation", "must be list, not object"),
        ({"messages": "no json"}, "conversation", "messages must be list, not text"),
        ({"messages": "[1"}, "conversation", "messages is not valid JSON"),
    ],
)  # fmt: skip
def test_a_malformed_row_says_which_format_was_taken_for_it_and_why(record, task, said):
    with pytest.raises(MalformedRecord, match=said):
        parse_record(record, task)


def test_a_forced_format_is_said_to_be_forced():
    with pytest.raises(MalformedRecord, match=r"output is missing \(read as alpaca, as data_format says\)"):
        parse_record({"instruction": "q"}, data_format="alpaca")


EVERY = [item[2] for item in (*CHATS, *FURTHER_CHATS, *PAIRS, *FURTHER_PAIRS)]


@pytest.mark.parametrize("record", EVERY, ids=str)
def test_a_record_of_one_format_is_of_no_other(record):
    name = parse_record(record)[0]
    there = Fields({key: value for key, value in record.items() if value is not None})
    assert [known for known, entry in FORMATS.items() if entry.format.recognizes(there)] == [name]


def trained_texts(example: Any) -> list[str]:
    """What a model learns to say, reply by reply."""
    texts = []
    for side in example.sides if isinstance(example, TokenPair) else [example]:
        text = tiny_tokenizer().decode(side.input_ids[side.labels != IGNORE].tolist(), skip_special_tokens=False)
        texts += text.split("<|im_end|>")[:-1]
    return texts


@pytest.mark.parametrize("task", ["conversation", "pair"])
def test_a_file_of_all_shapes_trains_every_reply_behind_its_questions(tmp_path, task):
    chats = [(record, expected) for _, _, record, expected in (*CHATS, *FURTHER_CHATS)]
    pairs = [(record, [("user", "q")]) for _, _, record in (*PAIRS, *FURTHER_PAIRS)]
    rows = chats if task == "conversation" else pairs
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record, _ in rows), encoding="utf-8")
    encoder = Encoder(tiny_tokenizer(), bind_template("qwen2.5", tiny_tokenizer()))
    examples = load_split(DataConfig(train_file=str(path)), encoder, task).train
    assert examples.ledger.rows == examples.ledger.kept == len(examples) == len(rows)
    for number, (record, expected) in enumerate(rows):
        replies = [content for role, content in expected if role == "assistant"]
        assert trained_texts(examples[number]) == (replies if task == "conversation" else ["good", "bad"]), record
        text = tiny_tokenizer().decode(examples[number].input_ids.tolist(), skip_special_tokens=False)
        for role, content in expected:
            assert f"<|im_start|>{role}\n{content}<|im_end|>" in text, record


ODD = [
    0,
    -1,
    10**400,
    float("nan"),
    True,
    None,
    "",
    "x",
    "\ud800",
    [],
    [[]],
    [None],
    {},
    {"x": []},
    [{"role": 1}],
    ["q"],
]


@pytest.mark.parametrize("record", EVERY, ids=str)
def test_an_odd_value_anywhere_is_read_or_malformed(record):
    def variants(value: Any, rebuild: Any) -> Any:
        for odd in ODD:
            yield rebuild(odd)
        parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, part in parts:

            def inside(odd: Any, key: Any = key) -> Any:
                changed = dict(value) if isinstance(value, dict) else list(value)
                changed[key] = odd
                return rebuild(changed)

            yield from variants(part, inside)

    for task in ("conversation", "pair", None):
        for changed in variants(record, lambda odd: odd):
            try:
                read_record(changed, task)
            except MalformedRecord as error:
                str(error).encode()
