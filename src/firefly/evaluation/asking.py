"""Questions out of rows, and what a model answers to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from firefly.data.formats.prompts import Prompt
from firefly.data.schema import Conversation, Document, Message, Source
from firefly.evaluation.answers import language_of
from firefly.evaluation.measurement import GivenAnswer, Question
from firefly.generation.files import Answering, Row, read_rows
from firefly.generation.generator import Generator
from firefly.generation.settings import GenerationSettings

ASKED_OF_DOCUMENT = 0.5
"""The part of a document that is given; how a model goes on is compared with the rest."""


def find_questions(files: Sequence[Path], most: int, data_format: str = "auto") -> tuple[Question, ...]:
    """Up to `most` questions, spread evenly over the rows of some files. Rows that are tokenized already ask none that
    another tokenizer could read.

    Raises:
        UsageError: see `read_records`.
    """
    if most <= 0:
        return ()
    count = sum(_can_be_asked(row) for row in read_rows(files, data_format))
    chosen = {round(number * (count - 1) / max(most - 1, 1)) for number in range(most)} if count else set()
    able = (row for row in read_rows(files, data_format) if _can_be_asked(row))  # read again: there may be millions
    return tuple(question_of(row) for number, row in enumerate(able) if number in chosen)


def _can_be_asked(row: Row) -> bool:
    asked = None if row.prompt is None else row.prompt.asked
    return isinstance(asked, Conversation) or (isinstance(asked, Document) and bool(asked.text.strip()))


def question_of(row: Row) -> Question:
    """A row with a conversation or a document as a question."""
    assert row.prompt is not None
    asked, reference = row.prompt.asked, row.prompt.reference
    key = str(row.source) if row.instance is None else f"{row.source}#{row.instance + 1}"
    if isinstance(asked, Conversation):
        text = reference.text if isinstance(reference, Message) else None
        language = language_of(text or asked.messages[-1].text)
        return Question(key, "held_out", asked.messages, tools=asked.tools, reference=text, language=language)
    assert isinstance(asked, Document)
    border = _border(asked.text)
    language = language_of(asked.text)
    return Question(key, "held_out", text=asked.text[:border], reference=asked.text[border:] or None, language=language)


def _border(text: str) -> int:
    """Where a document is cut: behind the first space past its middle, or in the middle of a text without spaces."""
    middle = max(round(len(text) * ASKED_OF_DOCUMENT), 1)
    space = text.find(" ", middle)
    return middle if space < 0 or space > middle + 40 else space


def in_plain_text(question: Question) -> Question:
    """The same for a model without a chat template: its last message, written out as a question to go on from."""
    if not question.messages:
        return question
    asked = question.messages[-1].text
    text = f"问题：{asked}\n答案：" if language_of(asked) == "zh" else f"Question: {asked}\nAnswer:"
    return replace(question, messages=(), tools=(), text=text)


def ask(
    generator: Generator,
    questions: Sequence[Question],
    max_new_tokens: int,
    tick: Callable[[int], None] = lambda done: None,
) -> tuple[GivenAnswer, ...]:
    """The likeliest answer to each question, in their order.

    Args:
        tick: called with each number of answers that are there.
    """
    settings = GenerationSettings(max_new_tokens=max_new_tokens, temperature=0, top_p=1)
    answers = []
    lines = Answering(generator, settings).lines(_rows(questions))
    for question, line in zip(questions, lines, strict=True):
        answers.append(_given(question, line.value, line.new_tokens))
        tick(1)
    return tuple(answers)


def _rows(questions: Iterable[Question]) -> Iterable[Row]:
    for number, question in enumerate(questions):
        if question.messages:
            asked: Conversation | Document = Conversation(question.messages, tuple(question.tools))
        else:
            asked = Document(question.text or "")
        yield Row(number, _place(question), Prompt(asked))


def _place(question: Question) -> Source:
    return Source(question.key, 0)


def _given(question: Question, line: Mapping[str, Any], tokens: int) -> GivenAnswer:
    if "error" in line:
        return GivenAnswer(question.key, "", error=line["error"].removeprefix(f"{_place(question)}: "))
    (answer,) = line["answers"]
    return GivenAnswer(question.key, answer["text"], tokens, answer["finish_reason"])
