"""Records of conversations: lists of messages under several names, and questions with their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from firefly.data.formats.fields import (
    LABELS,
    Fields,
    MalformedRecord,
    check_text,
    is_trained,
    parse_json,
    read_list,
    read_tools,
    texts_in,
    verdict,
    verdicts,
    wrong_kind,
)
from firefly.data.formats.messages import MESSAGE_KEYS, as_record_says, behind_beginning, read_messages, untrained
from firefly.data.formats.texts import (
    ABOUT,
    ANSWERS,
    ASKED,
    FIRST,
    PROMPTS,
    QUESTIONS,
    SPELLINGS,
    answer_text,
    are_spans,
    is_texts,
    question_text,
)
from firefly.data.schema import Conversation, Labelled, Message

QUESTION_OR_ANSWER = frozenset((*QUESTIONS, *ANSWERS))
SIDES = (
    ("chosen", "rejected"),
    ("chosen_messages", "rejected_messages"),
    ("chosen_conversations", "rejected_conversations"),
    ("chosen_conversation", "rejected_conversation"),
    ("chosen_response", "rejected_response"),
    ("chosen_answer", "rejected_answer"),
    ("chosen_output", "rejected_output"),
)
"""How records call the better and the worse answer of a pair."""


def is_paired(record: Fields) -> bool:
    """Whether answers are compared: such a record is no plain conversation, whatever else it holds."""
    return any(name in record for sides in SIDES for name in sides)


def is_judged(record: Fields) -> bool:
    """Whether answers are compared or labelled (KTO): a labelled one may be no good answer to train."""
    return is_paired(record) or verdict(record) is not None


def is_restated(record: Fields) -> bool:
    """Whether messages say what stands as question or answer beside them (NuminaMath, OpenR1-Math, Magpie): then they
    are the conversation."""
    key = record.first_of(MESSAGE_KEYS)
    if key is None or not record.has_any(QUESTION_OR_ANSWER):
        return False
    held = record.peek(key)
    if isinstance(held, str):
        try:
            held = parse_json(held, key)
        except MalformedRecord:
            return False
    present = [text.strip() for text in texts_in(held)]
    asked, answered = (
        [value.strip() for value in map(record.peek, record.present(keys)) if isinstance(value, str) and value.strip()]
        for keys in (QUESTIONS, ANSWERS)
    )
    # A question may stand inside its message; an answer such as "4" stands inside too much.
    return any(text in message for text in asked for message in present) or any(text in present for text in answered)


@dataclass(frozen=True)
class MessagesFormat:
    """A list of messages or turns under `key`; `tools`, a separate `system` and earlier turns beside it."""

    key: str

    def recognizes(self, record: Fields) -> tuple[str, ...]:
        return (self.key,) if self.key in record and not is_judged(record) else ()

    def parse(self, record: Fields) -> Conversation:
        messages = behind_beginning(record, read_messages(record, self.key), self.key)
        return Conversation(as_record_says(record, messages), read_tools(record))


@dataclass(frozen=True)
class AlternatingFormat:
    """`data: [question, answer, question, …]` (UltraChat)."""

    def recognizes(self, record: Fields) -> tuple[str, ...]:
        texts = record.peek("data")
        if not is_texts(texts) or len(texts) < 2 or is_judged(record):
            return ()
        other = record.first_of((*MESSAGE_KEYS, "chat", "text")) or question_and_answer(record)
        return () if other else ("data",)

    def parse(self, record: Fields) -> Conversation:
        return MessagesFormat("data").parse(record)


# ---- questions with their answers


def answers_in_list(record: Fields, question: str, answer: str) -> bool:
    """Whether a list holds several answers to one question: a pair."""
    answers = record.peek(answer)
    return is_texts(answers) and len(answers) > 1 and _listed_question(record, question, answers) is None


def _listed_question(record: Fields, question: str, answers: Sequence[Any]) -> str | None:
    """The key whose list of questions goes with a list of answers, turn by turn."""
    if is_texts(record.peek(question)):
        return question
    listed = (key for key in QUESTIONS if is_texts(record.peek(key)) and len(record.peek(key)) == len(answers))
    return next(listed, None)


def _only_question(record: Fields, keys: tuple[str, str] | None) -> tuple[str, ...]:
    """`keys` of a question and an answer, where the record is nothing else; none where it is."""
    if keys is None or is_judged(record) or answers_in_list(record, *keys) or is_restated(record):
        return ()
    return keys


@dataclass(frozen=True)
class QuestionFormat:
    """A question and its answer under two keys.

    Attributes:
        question, answer: names of SPELLINGS.
        without: names whose keys make the record another format's.
    """

    question: str
    answer: str
    without: tuple[str, ...] = ()

    def recognizes(self, record: Fields) -> tuple[str, ...]:
        return _only_question(record, self.keys(record))

    def keys(self, record: Fields) -> tuple[str, str] | None:
        """The record's own keys for the two."""
        question, answer = (record.first_of(SPELLINGS[name]) for name in (self.question, self.answer))
        if question is None or answer is None or any(record.first_of(SPELLINGS[name]) for name in self.without):
            return None
        return question, answer

    def parse(self, record: Fields) -> Conversation:
        question, answer = (record.first_of(SPELLINGS[name]) or name for name in (self.question, self.answer))
        return read_question(record, question, answer)


QUESTION_FORMATS = {
    "alpaca": QuestionFormat("instruction", "output"),
    "instruction_response": QuestionFormat("instruction", "response", without=("output",)),
    "input_target": QuestionFormat("input", "target", without=("instruction", "prompt", "question", "query")),
    "input_output": QuestionFormat("input", "output", without=("instruction", "prompt", "question", "query")),
    "prompt_completion": QuestionFormat("prompt", "completion"),
    "prompt_response": QuestionFormat("prompt", "response", without=("completion", "instruction")),
    "question_answer": QuestionFormat("question", "answer"),
    "query_response": QuestionFormat("query", "response", without=("instruction", "prompt")),
}
"""Keys that go together."""


def question_and_answer(record: Fields) -> tuple[str, str] | None:
    """The record's keys for a question and its answer: two that go together, else any two."""
    for entry in QUESTION_FORMATS.values():
        if keys := entry.keys(record):
            return keys
    question, answer = record.first_of(QUESTIONS), record.first_of(ANSWERS)
    return None if question is None or answer is None else (question, answer)


@dataclass(frozen=True)
class OtherQuestionFormat:
    """Another combination of a key for a question and one for an answer: `question` and `output`, …"""

    def recognizes(self, record: Fields) -> tuple[str, ...]:
        if any(entry.keys(record) for entry in QUESTION_FORMATS.values()):
            return ()
        return _only_question(record, question_and_answer(record))

    def parse(self, record: Fields) -> Conversation:
        return read_question(record, *(question_and_answer(record) or _missing_question(record)))


def _missing_question(record: Fields) -> tuple[str, str]:
    return record.first_of(QUESTIONS) or "question", record.first_of(ANSWERS) or "answer"


def read_question(record: Fields, question: str, answer: str) -> Conversation:
    """The conversation of a question and its answer, behind what stands beside them; lists under both are turns."""
    for name in (question, answer):
        if name not in record:
            raise MalformedRecord("{field} is missing", field=name)
    asked, answered = record.peek(question), record.peek(answer)
    listed = _listed_question(record, question, answered) if is_texts(answered) else None
    if listed is not None:
        messages = behind_beginning(record, _turns_in_parallel(record, question, listed, answer), listed)
    else:
        if isinstance(answered, list) and not is_texts(answered) and not are_spans(answered):
            reply = read_messages(record, answer)
        else:
            reply = [Message.of("assistant", answer_text(record, answer))]
        if isinstance(asked, list) and not is_texts(asked):
            # Prompt and completion as message lists, as TRL has them: the completion is trained.
            before = untrained(behind_beginning(record, read_messages(record, question), question))
        else:
            before = behind_beginning(record, [Message.of("user", question_text(record, question))], question)
        messages = [*before, *reply]
    return Conversation(as_record_says(record, messages), read_tools(record))


def _turns_in_parallel(record: Fields, lead: str, question: str, answer: str) -> list[Message]:
    """Lists of questions and of answers, turn by turn; a text beside them (`lead` may be one) belongs to the first
    turn."""
    asked, answered = read_list(record, question), read_list(record, answer)
    if len(asked) != len(answered):
        raise MalformedRecord(
            "{question} has {questions} turn(s) and {answer} {answers}; they must have the same number",
            question=question,
            questions=len(asked),
            answer=answer,
            answers=len(answered),
        )
    beside = [name for name in dict.fromkeys((lead, *FIRST, *ASKED, *ABOUT)) if name != question]
    messages: list[Message] = []
    for number, reply in enumerate(answered):
        turn = {question: check_text(asked[number], f"{question}[{number}]")}
        for name in beside:
            value = record.peek(name)
            if is_texts(value) and len(value) == len(asked):
                turn[name] = check_text(record[name][number], f"{name}[{number}]")
            elif number == 0 and isinstance(value, str):
                turn[name] = record[name]
        text = question_text(Fields(turn), lead if lead in turn else question)
        messages += Message.of("user", text), Message.of("assistant", check_text(reply, f"{answer}[{number}]"))
    return messages


@dataclass(frozen=True)
class InstancesFormat:
    """One instruction and its `instances: [{input, output}, …]` (Self-Instruct): an example each."""

    def recognizes(self, record: Fields) -> tuple[str, ...]:
        question = record.first_of((*FIRST, *ASKED, *PROMPTS))
        return (question, "instances") if question and "instances" in record and not is_judged(record) else ()

    def parse(self, record: Fields) -> tuple[Conversation, ...]:
        question = record.first_of((*FIRST, *ASKED, *PROMPTS)) or "instruction"
        asked, tools = question_text(record, question), read_tools(record)
        conversations = []
        for number, item in enumerate(read_list(record, "instances")):
            instance = record.inner(item, f"instances[{number}]")
            key = instance.first_of((*SPELLINGS["input"], *ASKED, *PROMPTS, *SPELLINGS["context"], *FIRST))
            about = question_text(instance, key) if key and instance.peek(key) is not None else ""
            answer = answer_text(instance, instance.first_of(ANSWERS) or "output")
            messages = [
                Message.of("user", "\n".join(text for text in (asked, about) if text)),
                Message.of("assistant", answer, is_trained(instance)),
            ]
            messages = behind_beginning(record, messages, "instances")
            conversations.append(Conversation(as_record_says(record, messages), tools))
        return tuple(conversations)


# ---- answers with a verdict


@dataclass(frozen=True)
class LabelledMessagesFormat:
    """Messages with a verdict on their last reply (`label`: true or false), as KTO takes them."""

    def recognizes(self, record: Fields) -> tuple[str, ...]:
        keys, labels = record.present(MESSAGE_KEYS), verdicts(record)
        return (*keys, *labels) if len(keys) == 1 and labels and not is_paired(record) else ()

    def parse(self, record: Fields) -> Labelled:
        return _judged(record, MessagesFormat(record.first_of(MESSAGE_KEYS) or "messages").parse(record))


@dataclass(frozen=True)
class LabelledAnswerFormat:
    """A question and an answer with a verdict."""

    def recognizes(self, record: Fields) -> tuple[str, ...]:
        keys = question_and_answer(record)
        if keys is None or is_paired(record) or answers_in_list(record, *keys) or record.first_of(MESSAGE_KEYS):
            return ()
        labels = verdicts(record)
        return (*keys, *labels) if labels else ()

    def parse(self, record: Fields) -> Labelled:
        return _judged(record, read_question(record, *(question_and_answer(record) or _missing_question(record))))


def _judged(record: Fields, conversation: Conversation) -> Labelled:
    wanted = verdict(record)
    if wanted is None:
        name = record.first_of(LABELS)
        if name is None:
            raise MalformedRecord("{field} is missing", field=LABELS[0])
        raise wrong_kind(name, "true or false", record.peek(name))
    labels = verdicts(record)
    for name in labels:
        record.get(name)
    if len(set(labels.values())) > 1:
        raise MalformedRecord("{fields} disagree on whether the answer is a good one", fields=", ".join(labels))
    return Labelled(conversation, wanted)
