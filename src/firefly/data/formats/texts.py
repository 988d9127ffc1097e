"""Texts of questions and answers, under the keys that records call them by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from firefly.data.formats.fields import Fields, MalformedRecord, check_text, optional_text, read_text

SPELLINGS = {
    "instruction": ("instruction", "instructions"),
    "question": ("question", "questions", "problem"),
    "query": ("query", "queries"),
    "prompt": ("prompt", "prompts"),
    "input": ("input", "inputs"),
    "user": ("user", "human", "User", "Human"),
    "context": ("context", "contexts"),
    "output": ("output", "outputs"),
    "response": ("response", "responses"),
    "completion": ("completion", "completions"),
    "answer": (
        "answer",
        "answers",
        "std_answer",
        "standard_answer",
        "reference_answer",
        "ref_answer",
        "gold_answer",
        "golden_answer",
        "correct_answer",
        "best_answer",
        "ground_truth",
    ),
    "target": ("target", "targets"),
    "solution": ("solution",),
    "assistant": ("assistant", "gpt", "bot", "Assistant"),
}
"""Keys that mean one thing; plurals are for records that hold lists of turns."""


def _keys(*names: str) -> tuple[str, ...]:
    return tuple(key for name in names for key in SPELLINGS[name])


QUESTIONS = _keys("instruction", "question", "query", "prompt", "input", "user")
ANSWERS = _keys("output", "response", "completion", "answer", "target", "solution", "assistant")
FIRST, PROMPTS, ASKED, ABOUT = (
    _keys("instruction"),
    _keys("prompt"),
    _keys("question", "query"),
    _keys("context", "input"),
)


FURTHER = (*FIRST, *ASKED, *ABOUT)


def is_texts(value: Any) -> bool:
    """Whether a value is a list of texts rather than of messages."""
    return isinstance(value, list) and len(value) > 0 and (value[0] is None or isinstance(value[0], str))


def question_text(record: Fields, question: str) -> str:
    """The text under `question` and, each on a line of its own, what belongs to it: instruction or question first, then
    context or input."""
    asked = read_text(record, question)
    beside = [name for name in record.present(FURTHER) if name != question]
    if not beside:
        return asked
    texts = {question: asked}
    for name in beside:
        text = _further_text(record, name)
        # A prompt may have been made of the record's other texts, which then are in it.
        if text and not (question in PROMPTS and text in asked):
            texts[name] = text
    # A question under another key (prompt, input, human) stands where questions do, before what it is about.
    order = (*FIRST, *ASKED) if question in ASKED else (*FIRST, question, *ASKED)
    return "\n".join(texts[name] for name in dict.fromkeys((*order, *ABOUT)) if texts.get(name))


def _further_text(record: Fields, name: str) -> str | None:
    """Text beside a question. A context may be several texts; what is of another kind is left unread."""
    value = record.peek(name)
    if name in SPELLINGS["context"] and is_texts(value):
        return "\n".join(check_text(item, f"{record.at(name)}[{n}]") for n, item in enumerate(record[name]))
    if name in SPELLINGS["input"] or isinstance(value, str):
        return optional_text(record, name)
    return None


def are_spans(value: Any) -> bool:
    """Whether answers are parts of a context, one of which suffices (SQuAD as published)."""
    return isinstance(value, list) and all(isinstance(item, Mapping) and "answer_start" in item for item in value)


def answer_text(record: Fields, answer: str) -> str:
    """The text of an answer, which may be the only one of a list; of several spans the first."""
    value, place = record.peek(answer), record.at(answer)
    if are_spans(value) and value:
        spans = [record.inner(item, f"{place}[{number}]") for number, item in enumerate(record[answer])]
        return read_text(spans[0], "text")
    if isinstance(value, Mapping) and "text" in value:  # SQuAD and CMRC as `datasets` holds them: a list for each key
        spans = record.inner(record[answer], place)
        texts = spans.peek("text")
        if not isinstance(texts, list):
            return read_text(spans, "text")
        if not texts:
            raise MalformedRecord("{field} is empty", field=spans.at("text"))
        return check_text(texts[0], f"{spans.at('text')}[0]")  # unread: the others may say something else
    if is_texts(value) and len(value) == 1:
        return check_text(record[answer][0], f"{record.at(answer)}[0]")
    return read_text(record, answer)
