"""The record shapes of the tutorial's nine data sets and of the formats that people bring along."""

from __future__ import annotations

from typing import Any

import pytest

from firefly.data.formats import MalformedRecord, parse_record
from firefly.data.schema import Conversation, Document, PreferencePair


def turns(conversation: Conversation) -> list[tuple[str, str]]:
    return [(item.role, item.content) for item in conversation.messages]


ASKED = [("user", "q"), ("assistant", "a")]

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


@pytest.mark.parametrize(("form", "record", "expected"), [item[1:] for item in CHATS], ids=[item[0] for item in CHATS])
def test_a_chat_record_becomes_its_turns(form, record, expected):
    name, parsed = parse_record(record, "sft")
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


@pytest.mark.parametrize(("form", "record"), [item[1:] for item in PAIRS], ids=[item[0] for item in PAIRS])
def test_a_preference_record_becomes_two_answers_to_one_prompt(form, record):
    name, parsed = parse_record(record, "dpo")
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
    assert (parsed.messages[1].reasoning, parsed.messages[1].content) == ("because", "good")


def test_a_condemned_answer_is_not_trained():
    for wanted in (True, False):
        for record in (
            {"messages": [QUESTION, GOOD], "label": wanted},
            {"prompt": "q", "completion": "good", "label": wanted},
        ):
            _, parsed = parse_record(record)
            assert isinstance(parsed, Conversation)
            assert parsed.messages[1].trained is wanted


def test_a_text_is_a_document_and_beside_other_keys_the_task_decides():
    assert parse_record({"text": "words", "url": "x"}) == ("text", Document("words"))
    alpaca = {"instruction": "q", "output": "a", "text": "the whole prompt"}
    assert parse_record(alpaca, "sft")[0] == "alpaca"
    assert parse_record(alpaca, "pretrain")[0] == "text"
    with pytest.raises(MalformedRecord, match="data_format"):
        parse_record(alpaca)
    assert parse_record(alpaca, data_format="alpaca")[0] == "alpaca"


def test_a_record_for_another_task_says_which():
    with pytest.raises(MalformedRecord, match="task_type dpo"):
        parse_record(PAIRS[0][2], "sft")
    with pytest.raises(MalformedRecord, match="task_type pretrain"):
        parse_record({"text": "x"}, "sft")


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
