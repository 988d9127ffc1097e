"""Messages and turns in every spelling that files have, and what stands beside a list of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from firefly.data.formats.fields import (
    FLAGS,
    WEIGHTS,
    Fields,
    MalformedRecord,
    check_text,
    is_record_trained,
    is_trained,
    json_text,
    optional_text,
    read_arguments,
    read_call_id,
    read_list,
    read_text,
    read_tool_calls,
    system_beside,
    wrong_kind,
)
from firefly.data.formats.texts import ANSWERS, QUESTIONS, SPELLINGS, question_text
from firefly.data.schema import Message, Part, Role, TextPart, as_parts

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
    "chatbot": "assistant",
    "ai": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
"""How message lists call the four roles. `function_call` and `tool_call` are replies that call a function."""

CALLS = ("function_call", "tool_call")


def plain_role(spelled: str) -> str:
    """A role as ROLES and CALLS have it: `Function-Call` is `function_call`."""
    return spelled.strip().lower().replace("-", "_")


MESSAGE_KEYS = ("messages", "conversations", "conversation")
TEXT_KEYS = (*MESSAGE_KEYS, "data")
"""Where a list of texts is a conversation whose sides alternate."""
ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text")
TURN_QUESTIONS, TURN_ANSWERS = SPELLINGS["user"], SPELLINGS["assistant"]
QUESTION_KEYS, ANSWER_KEYS = (*TURN_QUESTIONS, *QUESTIONS), (*TURN_ANSWERS, *ANSWERS)
TURN_KEYS, ANY_ROLE = frozenset((*QUESTION_KEYS, *ANSWER_KEYS)), frozenset(ROLE_KEYS)
TRUE_FOR_LOSS = (*FLAGS, *WEIGHTS)


def read_messages(record: Fields, name: str) -> list[Message]:
    """The list under `name`: message objects of OpenAI's shape (`role`, `content`) or ShareGPT's (`from`, `value`),
    turns with question and answer (`human`, `assistant`; `input`, `output`; …), or texts that alternate."""
    items, place = read_list(record, name), record.at(name)
    if name in TEXT_KEYS and len(items) > 1 and all(isinstance(item, str) for item in items):
        roles: tuple[Role, Role] = ("user", "assistant")
        return [Message.of(roles[n % 2], check_text(item, f"{place}[{n}]")) for n, item in enumerate(items)]
    messages: list[Message] = []
    for number, item in enumerate(items):
        part = record.inner(item, f"{place}[{number}]", is_message=True)
        if _is_turn(part):
            messages += _read_turn(part, first=not messages)
        elif _is_observed_call(part):
            _add_observed_call(messages, part)
        else:
            messages.append(read_message(part))
    return messages


def _is_turn(item: Fields) -> bool:
    if item.has_any(ANY_ROLE):
        return bool(item.present(TURN_QUESTIONS)) and bool(item.present(TURN_ANSWERS))
    return item.has_any(TURN_KEYS)


def _read_turn(turn: Fields, first: bool) -> list[Message]:
    """One question and its answer; a system prompt may stand in the first turn (XTuner)."""
    system = system_beside(turn)
    if system and not first:
        raise _second_system(turn.at("system"))
    question = turn.first_of(QUESTION_KEYS) or "human"
    answer = turn.first_of(ANSWER_KEYS) or "assistant"
    asked = Message.of("user", question_text(turn, question))
    return [*system, asked, Message.of("assistant", read_text(turn, answer), is_trained(turn))]


def _is_observed_call(item: Fields) -> bool:
    """Whether a tool's message holds the call, too (ChatGLM3's first form: name, parameters, observation)."""
    spelled = item.peek(item.first_of(ROLE_KEYS) or "")
    return "observation" in item and isinstance(spelled, str) and ROLES.get(plain_role(spelled)) == "tool"


def _add_observed_call(messages: list[Message], item: Fields) -> None:
    """The call becomes the reply's before it, which says what the model thought of, or a reply of its own."""
    item.get(item.first_of(ROLE_KEYS) or ROLE_KEYS[0])
    name = read_text(item, "name")
    call = {"type": "function", "function": {"name": name, "arguments": read_arguments(item)}}
    before = messages[-1] if messages else None
    if before is not None and before.role == "assistant" and not before.tool_calls:
        messages[-1] = replace(before, tool_calls=(call,), trained=before.trained and is_trained(item))
    else:
        messages.append(Message.of("assistant", "", is_trained(item), tool_calls=(call,)))
    seen, place = item["observation"], item.at("observation")
    answer = check_text(seen, place) if isinstance(seen, str) else json_text(seen, place)
    messages.append(Message.of("tool", answer, name=name))


def read_message(item: Fields) -> Message:
    """One message object."""
    role_key = item.first_of(ROLE_KEYS) or ROLE_KEYS[0]
    spelled = read_text(item, role_key)
    usual = ("value", "content", "text") if role_key == "from" else CONTENT_KEYS
    content_key = item.first_of(usual) or usual[0]
    place = item.at(content_key)
    trained = is_trained(item)
    plain = plain_role(spelled)
    role = "assistant" if plain in CALLS else ROLES.get(plain)
    if role is None:
        known = ", ".join([*ROLES, *CALLS])
        raise MalformedRecord(
            "{field} = {role!r} is unknown; roles are {known}", field=item.at(role_key), role=spelled, known=known
        )
    if role != "assistant":
        if trained:
            item.leave_unheeded([name for name in item.present(TRUE_FOR_LOSS) if item.peek(name)])
        content = _read_content(item, content_key, role)[0]
        if role != "tool":
            return Message(role, content)
        name, identifier = optional_text(item, "name"), read_call_id(item, "tool_call_id")
        return Message(role, content, name=name, tool_call_id=identifier)
    reasoning_key = next((key for key in REASONING if item.peek(key)), None)
    reasoning = None if reasoning_key is None else read_text(item, reasoning_key)
    if plain in CALLS:
        if content_key not in item:
            raise MalformedRecord("{field} is missing", field=place)
        calls = read_tool_calls(item, item[content_key], place)
        return Message.of("assistant", "", trained, reasoning=reasoning, tool_calls=calls)
    called = next((key for key in ("tool_calls", "function_call") if item.peek(key)), None)
    if called and not item.peek(content_key):  # a reply that only calls functions has null content, or none
        item.get(content_key)
        content, thought, calls = (), None, ()
    else:
        content, thought, calls = _read_content(item, content_key, role)
    if called:
        calls = (*calls, *read_tool_calls(item, item[called], item.at(called)))
    if reasoning is not None and thought is not None:
        raise _out_of_order(place)
    return Message(role, content, trained, reasoning=reasoning or thought, tool_calls=calls)


TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("reasoning", "thinking")
PART_KEYS = ("text", "value", "content")


def _read_content(item: Fields, key: str, role: Role) -> tuple[tuple[Part, ...], str | None, tuple[Any, ...]]:
    """Text, reasoning and calls of a content: text, or a list of parts (`{type, text}`, `{type, value}`, or bare text).

    Raises:
        MalformedRecord: parts that are no text, or that a chat template could not write in their order.
    """
    if key not in item:
        raise MalformedRecord("{field} is missing", field=item.at(key))
    value, place = item[key], item.at(key)
    if not isinstance(value, list):
        is_result = role == "tool" and isinstance(value, dict)
        text = json_text(value, place) if is_result else check_text(value, place)
        return as_parts(text), None, ()
    texts, reasoning, calls = [], [], []
    for number, found in enumerate(value):
        at = f"{place}[{number}]"
        if isinstance(found, str):
            texts.append(check_text(found, at))
            continue
        part = item.inner(found, at)
        kind = part.get("type", "text")
        if kind in TEXT_PARTS:
            if calls:
                raise _out_of_order(at)
            texts.append(read_text(part, part.first_of(PART_KEYS) or "text"))
        elif kind in REASONING_PARTS and role == "assistant":
            if texts or calls:
                raise _out_of_order(at)
            reasoning.append(read_text(part, part.first_of((*REASONING_PARTS, *PART_KEYS)) or "text"))
        elif kind in CALLS and role == "assistant":
            held = part.first_of((*CALLS, *PART_KEYS)) or "value"
            calls += read_tool_calls(part, part.get(held), part.at(held))
        else:
            raise MalformedRecord("{field} is of type {type!r}; this version trains on text", field=at, type=kind)
    return tuple(map(TextPart, texts)), "".join(reasoning) or None, tuple(calls)


def _out_of_order(field: str) -> MalformedRecord:
    return MalformedRecord(
        "{field} is out of order: a reply is its reasoning, then its text, then its calls", field=field
    )


def read_history(record: Fields) -> list[Message]:
    """`history`: earlier turns as [question, answer] pairs, or in one of the forms of messages and turns."""
    earlier = record.peek("history")
    if isinstance(earlier, str) and not earlier.lstrip().startswith("["):  # prose about the past: nobody reads it
        return []
    if earlier is None or earlier in ([], "[]"):
        return []
    items = read_list(record, "history")
    if isinstance(items[0], dict):
        return read_messages(record, "history")
    messages = []
    for number, pair in enumerate(items):
        place = f"history[{number}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise wrong_kind(place, "[question, answer]", pair)
        messages.append(Message.of("user", check_text(pair[0], f"{place}[0]")))
        messages.append(Message.of("assistant", check_text(pair[1], f"{place}[1]")))
    return messages


def behind_beginning(record: Fields, messages: list[Message], place: str) -> list[Message]:
    """`messages`, which stand under `place`, behind what stands beside them: a system prompt, and earlier turns.

    Raises:
        MalformedRecord: two system prompts that differ.
    """
    system, history = system_beside(record), read_history(record)
    for first in (history[:1], messages[:1]):
        if system and first and first[0].role == "system" and first[0].text.strip() == system[0].text.strip():
            system = []  # said twice
    if messages and messages[0].role == "system" and (system or history):
        if system:
            raise _second_system(f"{place}[0]")
        system, messages = [messages[0]], messages[1:]
    if system and history and history[0].role == "system":
        raise _second_system("history[0]")
    return [*system, *history, *messages]


def _second_system(field: str) -> MalformedRecord:
    return MalformedRecord("{field} is a system prompt beside the one under system", field=field)


def untrained(messages: Sequence[Message]) -> list[Message]:
    return [replace(message, trained=False) for message in messages]


def as_record_says(record: Fields, messages: list[Message]) -> tuple[Message, ...]:
    """Without loss where the record as a whole is left out."""
    return tuple(messages if is_record_trained(record) else untrained(messages))
