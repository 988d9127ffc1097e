"""Records of preferences: two answers to one prompt, the better one named `chosen`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from firefly.data.formats.chat import is_labelled, question_text, read_message, read_messages
from firefly.data.formats.fields import (
    MalformedRecord,
    Record,
    check_object,
    check_text,
    is_trained,
    kind_of,
    read_history,
    read_list,
    read_text,
    read_tools,
    system_beside,
    verdict,
    with_system,
)
from firefly.data.schema import Conversation, Message, PreferencePair

HUMAN_OR_ASSISTANT = re.compile(r"\n\n(Human|Assistant):[ ]?")


def make_pair(prompt: Sequence[Message], chosen: Message, rejected: Message, tools: Any = ()) -> PreferencePair:
    """Only the two answers are compared; replies inside the prompt carry no loss."""
    for answer, name in ((chosen, "chosen"), (rejected, "rejected")):
        if answer.role != "assistant":
            raise MalformedRecord("row.role_order", field=name, expected="assistant", got=answer.role)
    asked = tuple(replace(message, trained=False) for message in prompt)
    return PreferencePair(Conversation((*asked, chosen), tools), Conversation((*asked, rejected), tools))


@dataclass(frozen=True)
class MessagePairFormat:
    """`chosen` and `rejected` as message lists: whole conversations, or answers to `prompt` (text or messages)."""

    def recognises(self, record: Record) -> bool:
        return isinstance(record.get("chosen"), list) and "rejected" in record and "conversations" not in record

    def parse(self, record: Record) -> PreferencePair:
        chosen = read_messages(read_list(record, "chosen"), "chosen")
        rejected = read_messages(read_list(record, "rejected"), "rejected")
        place = "chosen"
        if chosen[0].role == "assistant":
            prompt, place = self._prompt(record), "prompt"
            chosen, rejected = [*prompt, *chosen], [*prompt, *rejected]
        if _texts(chosen[:-1]) != _texts(rejected[:-1]):
            raise MalformedRecord("row.prompts_differ")
        prompt = with_system(record, chosen[:-1], place)
        return make_pair(prompt, chosen[-1], rejected[-1], read_tools(record))

    @staticmethod
    def _prompt(record: Record) -> list[Message]:
        value = record.get("prompt")
        if isinstance(value, list):
            return read_messages(read_list(record, "prompt"), "prompt")
        return [Message("user", read_text(record, "prompt"))]


def _texts(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in messages]


@dataclass(frozen=True)
class TextPairFormat:
    """A prompt and two answers as text."""

    prompts: tuple[str, ...]
    chosen: str = "chosen"
    rejected: str = "rejected"

    def recognises(self, record: Record) -> bool:
        return (
            isinstance(record.get(self.chosen), str)
            and self.rejected in record
            and sum(name in record for name in self.prompts) == 1
        )

    def parse(self, record: Record) -> PreferencePair:
        name = next((name for name in self.prompts if name in record), None)
        if name is None:
            raise MalformedRecord("row.missing_field", field=self.prompts[0])
        if isinstance(record[name], list):
            prompt = read_messages(read_list(record, name), name)
        else:
            prompt = [Message("user", question_text(record, name, ("input",)))]
        prompt = [*read_history(record), *prompt]
        chosen, rejected = (Message("assistant", read_text(record, key)) for key in (self.chosen, self.rejected))
        return make_pair(with_system(record, prompt, name), chosen, rejected, read_tools(record))


@dataclass(frozen=True)
class ShareGptPairFormat:
    """`conversations` up to the question; `chosen` and `rejected` as one message each."""

    def recognises(self, record: Record) -> bool:
        return "conversations" in record and "chosen" in record and "rejected" in record

    def parse(self, record: Record) -> PreferencePair:
        prompt = read_messages(read_list(record, "conversations"), "conversations")
        chosen, rejected = (self._answer(record[name], name) for name in ("chosen", "rejected"))
        return make_pair(with_system(record, prompt, "conversations"), chosen, rejected, read_tools(record))

    @staticmethod
    def _answer(value: Any, name: str) -> Message:
        if isinstance(value, str):
            return Message("assistant", check_text(value, name))
        return read_message(check_object(value, name), name)


@dataclass(frozen=True)
class TranscriptPairFormat:
    """Two whole dialogues as text, `\\n\\nHuman: … \\n\\nAssistant: …`, that differ in their last answer (HH-RLHF)."""

    def recognises(self, record: Record) -> bool:
        return (
            isinstance(record.get("chosen"), str)
            and "rejected" in record
            and not any(name in record for name in ("prompt", "question", "instruction", "query", "conversations"))
        )

    def parse(self, record: Record) -> PreferencePair:
        chosen, rejected = (read_transcript(read_text(record, name), name) for name in ("chosen", "rejected"))
        if _texts(chosen[:-1]) != _texts(rejected[:-1]):
            raise MalformedRecord("row.prompts_differ")
        return make_pair([*system_beside(record), *chosen[:-1]], chosen[-1], rejected[-1])


def read_transcript(text: str, place: str) -> list[Message]:
    """Split a transcript at its speakers' names."""
    head, *pieces = HUMAN_OR_ASSISTANT.split("\n\n" + text.lstrip("\n"))
    if head.strip() or not pieces:
        raise MalformedRecord("row.no_transcript", field=place)
    return [
        Message("user" if speaker == "Human" else "assistant", content.strip())
        for speaker, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]


@dataclass(frozen=True)
class LabelledFormat:
    """An answer with a verdict (`label`: true or false), as KTO takes them. A condemned one carries no loss in SFT."""

    key: str
    answer: str = ""

    def recognises(self, record: Record) -> bool:
        return self.key in record and is_labelled(record) and (not self.answer or self.answer in record)

    def parse(self, record: Record) -> Conversation:
        wanted = verdict(record)
        if wanted is None:
            got = kind_of(record["label"])
            raise MalformedRecord("row.wrong_type", field="label", expected="true or false", got=got)
        if self.answer:
            messages = [*self._side(record, self.key, "user"), *self._side(record, self.answer, "assistant")]
        else:
            messages = read_messages(read_list(record, self.key), self.key)
        messages = with_system(record, messages, self.key)
        if wanted:
            return Conversation(tuple(messages), read_tools(record))
        return Conversation(tuple(replace(message, trained=False) for message in messages), read_tools(record))

    @staticmethod
    def _side(record: Record, name: str, role: Any) -> list[Message]:
        if isinstance(record[name], list):
            return read_messages(read_list(record, name), name)
        return [Message(role, read_text(record, name), is_trained(record, name))]
