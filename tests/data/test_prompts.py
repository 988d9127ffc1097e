"""What a record asks: every format that is trained on, and records that nobody has answered."""

from __future__ import annotations

from typing import Any

import pytest

from firefly.data.formats import FORMATS, MalformedRecord, detect_format
from firefly.data.formats.prompts import Prompt, read_prompts
from firefly.data.schema import Conversation, Document, Message

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}

# One record of each format, its prompt (texts of messages, a text, or ids) and its reference.
RECORDS: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "firefly": ({"conversation": [{"human": "q", "assistant": "a"}]}, ["q"], "a"),
    "messages": ({"messages": [Q, A]}, ["q"], "a"),
    "sharegpt": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ["q"], "a"),
    "ultrachat": ({"data": ["q", "b", "r", "a"]}, ["q", "b", "r"], "a"),
    "moss": ({"chat": {"turn_1": {"Human": "<|Human|>: q<eoh>\n", "MOSS": "<|MOSS|>: a<eom>\n"}}}, ["q"], "a"),
    "alpaca": ({"instruction": "do", "input": "q", "output": "a"}, ["do\nq"], "a"),
    "instruction_response": ({"instruction": "q", "response": "a"}, ["q"], "a"),
    "input_target": ({"input": "q", "target": "a"}, ["q"], "a"),
    "input_output": ({"input": "q", "output": "a"}, ["q"], "a"),
    "prompt_completion": ({"prompt": "q", "completion": "a"}, ["q"], "a"),
    "prompt_response": ({"prompt": "q", "response": "a"}, ["q"], "a"),
    "question_answer": ({"question": "q", "answer": "a"}, ["q"], "a"),
    "query_response": ({"query": "q", "response": "a"}, ["q"], "a"),
    "other_question": ({"question": "q", "output": "a"}, ["q"], "a"),
    "instances": ({"instruction": "do", "instances": [{"input": "q", "output": "a"}]}, ["do\nq"], "a"),
    "labelled_messages": ({"messages": [Q, A], "label": True}, ["q"], "a"),
    "labelled_answer": ({"prompt": "q", "completion": "a", "label": True}, ["q"], "a"),
    "tokens": ({"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, -100, 4, 5]}, (1, 2, 3), (4, 5)),
    "preference": ({"chosen": [Q, A], "rejected": [Q, {**A, "content": "b"}]}, ["q"], "a"),
    "preference_text": ({"prompt": "q", "chosen": "a", "rejected": "b"}, ["q"], "a"),
    "preference_sharegpt": ({"conversations": [Q], "chosen": A, "rejected": {**A, "content": "b"}}, ["q"], "a"),
    "preference_list": ({"instruction": "q", "output": ["a", "b"]}, ["q"], "a"),
    "preference_transcript": (
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        ["q"],
        "a",
    ),
    "preference_responses": ({"question": "q", "response_j": "a", "response_k": "b"}, ["q"], "a"),
    "preference_tokens": ({"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}, (1, 2), (3, 4)),
    "text": ({"text": "q"}, "q", None),
}


def shown(prompt: Prompt) -> tuple[Any, Any]:
    asked, reference = prompt.asked, prompt.reference
    if isinstance(asked, Conversation):
        return [message.text for message in asked.messages], getattr(reference, "text", None)
    return asked.text if isinstance(asked, Document) else asked, reference


def test_a_record_of_every_format_is_here() -> None:
    assert RECORDS.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("is_named", [False, True])
def test_the_prompt_ends_before_the_last_reply_which_is_the_reference(name: str, is_named: bool) -> None:
    record, prompt, reference = RECORDS[name]
    assert detect_format(record, "conversation") == name
    (found,) = read_prompts(record, name if is_named else "auto").prompts
    assert shown(found) == (prompt, reference)


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "q"}, ["q"]),
        ({"instruction": "do", "input": "q"}, ["do\nq"]),
        ({"question": "q", "answer": None}, ["q"]),
        ({"Question": "q"}, ["q"]),
        ({"query": "q", "system": "s"}, ["s", "q"]),
        ({"problem": "q"}, ["q"]),
        ({"prompt": "q", "text": "beside it"}, ["q"]),
        ({"prompt": [Q]}, ["q"]),
        ({"prompt": [Q, A, Q]}, ["q", "a", "q"]),
        ({"history": [["q", "a"]], "instruction": "r"}, ["q", "a", "r"]),
        ({"messages": [Q]}, ["q"]),
        ({"messages": [Q, A, {"role": "user", "content": "r"}]}, ["q", "a", "r"]),
        ({"messages": [Q, CALLED, {"role": "tool", "content": "1"}]}, ["q", "", "1"]),
        ({"conversation": [{"human": "q"}]}, ["q"]),
        ({"conversation": [{"human": "q", "assistant": "a"}, {"human": "r", "assistant": None}]}, ["q", "a", "r"]),
        ({"data": ["q", "a", "r"]}, ["q", "a", "r"]),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, (1, 2)),
    ],
)
def test_a_question_without_a_reply_is_a_prompt_without_a_reference(record: dict[str, Any], prompt: Any) -> None:
    (found,) = read_prompts(record).prompts
    assert shown(found) == (prompt, None)


def test_an_answer_that_was_found_bad_is_no_reference() -> None:
    (found,) = read_prompts({"prompt": "q", "completion": "a", "label": False}).prompts
    assert shown(found) == (["q"], None)


def test_a_reference_keeps_its_calls_and_a_prompt_its_tools() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    (found,) = read_prompts({"messages": [Q, CALLED], "tools": [tool]}).prompts
    assert isinstance(found.asked, Conversation)
    assert isinstance(found.reference, Message)
    assert found.asked.tools == (tool,)
    assert found.reference.tool_calls[0]["function"] == {"name": "f", "arguments": {"x": 1}}


def test_several_instances_of_one_record_are_as_many_prompts() -> None:
    record = {"instruction": "do", "instances": [{"input": "q", "output": "a"}, {"input": "r", "output": "b"}]}
    assert [shown(found) for found in read_prompts(record).prompts] == [(["do\nq"], "a"), (["do\nr"], "b")]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"messages": [A]}, "nothing stands before the reply"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "nothing stands before the reply"),
        ({"prompt": "q", "chosen": "a"}, "'rejected'"),
        ({"name": "q"}, "no known format"),
        ({"messages": [{"role": "nobody", "content": "q"}]}, "nobody"),
        ("text", "must be an object"),
    ],
)
def test_what_asks_nothing_is_malformed(record: Any, problem: str) -> None:
    with pytest.raises(MalformedRecord, match=problem):
        read_prompts(record)


def test_text_under_a_key_that_nobody_reads_is_counted() -> None:
    assert read_prompts({"prompt": "q", "note": "four"}).unread == {"note": 4}
