"""Records of conversations: message lists under several names, and single questions with their answers."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from firefly.data.formats.fields import (
    MalformedRecord,
    Record,
    check_object,
    check_text,
    is_trained,
    optional_text,
    parse_json,
    read_history,
    read_list,
    read_text,
    read_tool_call,
    read_tools,
    system_beside,
    system_messages,
    verdict,
    with_system,
)
from firefly.data.schema import Conversation, Message, Role

PREFERENCE = ("chosen", "rejected")
REASONING = ("reasoning_content", "reasoning", "thinking")

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
"""How message lists call the four roles. `function_call` and `tool_call` are replies that call a function."""

CALLS = ("function_call", "tool_call")


def is_labelled(record: Record) -> bool:
    """Whether the record passes judgement on its answer (KTO): it must not be trained as if it were a good one."""
    return verdict(record) is not None


def is_judged(record: Record) -> bool:
    """Whether answers are compared or labelled: such a record is no plain conversation, whatever else it holds."""
    return any(name in record for name in PREFERENCE) or is_labelled(record)


def read_messages(items: list[Any], place: str) -> list[Message]:
    """Message objects of OpenAI's shape (`role`, `content`) or ShareGPT's (`from`, `value`)."""
    return [read_message(check_object(item, f"{place}[{n}]"), f"{place}[{n}]") for n, item in enumerate(items)]


def read_message(item: Record, place: str) -> Message:
    role_key, content_key = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    spelled = read_text(item, role_key, f"{place}.{role_key}")
    if spelled in CALLS:
        calls = parse_json(read_text(item, content_key, f"{place}.{content_key}"), f"{place}.{content_key}")
        return Message("assistant", "", is_trained(item, place), tool_calls=_calls(calls, f"{place}.{content_key}"))
    role = ROLES.get(spelled.lower())
    if role is None:
        known = ", ".join([*ROLES, *CALLS])
        raise MalformedRecord("row.unknown_role", field=f"{place}.{role_key}", role=spelled, known=known)
    trained = is_trained(item, place)
    called = next((key for key in ("tool_calls", "function_call") if item.get(key)), None)
    if called and role == "assistant":
        # A reply that only calls functions has null content, or none.
        content = _content(item.get(content_key) or "", f"{place}.{content_key}")
        tool_calls = _calls(item[called], f"{place}.{called}")
    else:
        if content_key not in item:
            raise MalformedRecord("row.missing_field", field=f"{place}.{content_key}")
        content, tool_calls = _content(item[content_key], f"{place}.{content_key}"), ()
    reasoning = next((item[key] for key in REASONING if item.get(key)), None) if role == "assistant" else None
    return Message(
        role,
        content,
        trained if role == "assistant" else True,
        reasoning=None if reasoning is None else check_text(reasoning, f"{place}.reasoning_content"),
        tool_calls=tool_calls,
        name=optional_text(item, "name") if role == "tool" else None,
        tool_call_id=optional_text(item, "tool_call_id") if role == "tool" else None,
    )


def _calls(value: Any, place: str) -> tuple[Record, ...]:
    if isinstance(value, list):
        return tuple(read_tool_call(call, f"{place}[{number}]") for number, call in enumerate(value))
    return (read_tool_call(value, place),)


def _content(value: Any, place: str) -> str:
    """Text, or OpenAI's list of parts, of which this version reads text."""
    if not isinstance(value, list):
        return check_text(value, place)
    texts = []
    for number, item in enumerate(value):
        part = check_object(item, f"{place}[{number}]")
        if part.get("type", "text") != "text":
            raise MalformedRecord("row.not_text_part", field=f"{place}[{number}]", type=str(part["type"]))
        texts.append(read_text(part, "text", f"{place}[{number}].text"))
    return "".join(texts)


@dataclass(frozen=True)
class MessagesFormat:
    """A list of messages under `key`; `tools` and a separate `system` beside it."""

    key: str

    def recognises(self, record: Record) -> bool:
        return self.key in record and not is_judged(record)

    def parse(self, record: Record) -> Conversation:
        messages = read_messages(read_list(record, self.key), self.key)
        return Conversation(tuple(with_system(record, messages, self.key)), read_tools(record))


@dataclass(frozen=True)
class FireflyFormat:
    """The tutorial's: `conversation: [{human, assistant}, …]`, `system` and `tools` beside it; no other key is read."""

    def recognises(self, record: Record) -> bool:
        return "conversation" in record

    def parse(self, record: Record) -> Conversation:
        turns = read_list(record, "conversation")
        messages = system_beside(record)
        for number, item in enumerate(turns):
            place = f"conversation[{number}]"
            turn = check_object(item, place)
            messages.append(Message("user", read_text(turn, "human", f"{place}.human")))
            answer = read_text(turn, "assistant", f"{place}.assistant")
            messages.append(Message("assistant", answer, is_trained(turn, place)))
        return Conversation(tuple(messages), read_tools(record))


@dataclass(frozen=True)
class MossFormat:
    """MOSS-003's own files: `chat: {turn_1: {Human, MOSS, Commands, …}, …}`, with markers around every text."""

    def recognises(self, record: Record) -> bool:
        return "chat" in record and isinstance(record["chat"], dict)

    def parse(self, record: Record) -> Conversation:
        chat = check_object(record["chat"], "chat")
        if not chat:
            raise MalformedRecord("row.empty_field", field="chat")
        messages = system_messages(record.get("meta_instruction"), "meta_instruction")
        for name in sorted(chat, key=self._number):
            place = f"chat.{name}"
            turn = check_object(chat[name], place)
            if self._unmark(str(turn.get("Commands") or "None")) != "None":
                raise MalformedRecord("row.plugin", field=f"{place}.Commands")
            messages.append(Message("user", self._unmark(read_text(turn, "Human", f"{place}.Human"))))
            messages.append(Message("assistant", self._unmark(read_text(turn, "MOSS", f"{place}.MOSS"))))
        return Conversation(tuple(messages))

    @staticmethod
    def _number(name: str) -> int:
        match = re.fullmatch(r"turn_(\d{1,9})", name)
        if match is None:
            raise MalformedRecord("row.wrong_type", field="chat", expected="turn_1, turn_2, …", got=repr(name))
        return int(match[1])

    @staticmethod
    def _unmark(text: str) -> str:
        """`<|Human|>: text<eoh>\\n` is text."""
        text = re.sub(r"^\s*<\|[\w ]+\|>:[ ]?", "", text)
        return re.sub(r"\s*<eo[hmtcr]>\s*$", "", text)


@dataclass(frozen=True)
class QuestionFormat:
    """A question and its answer under two keys.

    Attributes:
        extra: further text of the question, on a line of its own (Alpaca's `input`); the first that is present.
        without: keys that make the record another format's.
    """

    question: str
    answer: str
    extra: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def recognises(self, record: Record) -> bool:
        if any(name in record for name in self.without) or is_judged(record):
            return False
        return self.question in record and self.answer in record

    def parse(self, record: Record) -> Conversation:
        if isinstance(record[self.question], list) or isinstance(record[self.answer], list):
            return Conversation(tuple(self._message_lists(record)), read_tools(record))
        messages = [*system_beside(record), *read_history(record)]
        messages.append(Message("user", question_text(record, self.question, self.extra)))
        messages.append(Message("assistant", read_text(record, self.answer), is_trained(record, self.answer)))
        return Conversation(tuple(messages), read_tools(record))

    def _message_lists(self, record: Record) -> list[Message]:
        """Prompt and completion as message lists, as TRL has them: the completion is trained."""
        prompt, answer = read_list(record, self.question), read_list(record, self.answer)
        asked = with_system(record, [*read_history(record), *read_messages(prompt, self.question)], self.question)
        return [*(replace(message, trained=False) for message in asked), *read_messages(answer, self.answer)]


def question_text(record: Record, question: str, extra: tuple[str, ...]) -> str:
    """The question and, on the next line, what it is about."""
    asked = read_text(record, question)
    for name in extra:
        if further := optional_text(record, name):
            return f"{asked}\n{further}" if asked else further
    return asked
