"""The conversations that an export is judged on, as the trained model's own template writes them.

Each ends in a reply, so that one pass of the trained model gives its distribution at every position of that reply
(teacher forcing), and no model has to be sampled from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from firefly.data.encoding import Encoder
from firefly.data.schema import Conversation, Message, Role
from firefly.data.templates import TemplateFailure

WEATHER: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city at a time of day.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name of the city, e.g. 北京"},
                "hour": {"type": "integer", "description": "Hour of the day"},
            },
            "required": ["city"],
        },
    },
}
CALL: Mapping[str, Any] = {
    "type": "function",
    "id": "call00001",
    "function": {"name": "get_weather", "arguments": {"city": "Paris", "hour": 9}},
}

TURNS: Mapping[str, Sequence[tuple[Role, str]]] = {
    "question": [
        ("user", "What is the capital of France?"),
        ("assistant", "The capital of France is Paris, a city on the river Seine."),
    ],
    "system": [
        ("system", "You answer in one short sentence, and you never apologise."),
        ("user", "Why is the sky blue?"),
        ("assistant", "Air scatters blue light more than red light, so the whole sky looks blue."),
    ],
    "turns": [
        ("user", "Name three prime numbers."),
        ("assistant", "2, 3 and 5."),
        ("user", "And the next two?"),
        ("assistant", "7 and 11."),
        ("user", "Add all five of them."),
        ("assistant", "2 + 3 + 5 + 7 + 11 = 28, so the sum of the five numbers is 28."),
    ],
    "chinese": [
        ("system", "你是一个乐于助人的助手。"),
        ("user", "请用一句话介绍你自己。"),
        ("assistant", "我是一个语言模型,可以回答问题。"),
        ("user", "把“知识就是力量”翻译成英文。"),
        ("assistant", "“知识就是力量”的英文是:Knowledge is power. 🙂"),
    ],
    "code": [
        ("user", 'Write a function that returns {"a": [1, 2]} as JSON.\n\nUse `json.dumps`.'),
        (
            "assistant",
            'import json\n\n\ndef f():\n    return json.dumps({"a": [1, 2]})\n\n\nprint(f())  # <b>"done"</b>',
        ),
    ],
    "spaces": [
        ("user", "  two spaces in front, a tab\tinside, and a line below\n\n"),
        ("assistant", "The text has two leading spaces, one tab and two line breaks at its end."),
    ],
}
"""Conversations by name: role and text of each turn."""

TEXTS: Mapping[str, str] = {
    "english": "The quick brown fox jumps over the lazy dog, and 3.14 is not quite π.",
    "chinese": "人工智能正在改变世界,但它也带来了新的问题。",
    "code": "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\n",
}
"""For a model without a chat template."""


@dataclass(frozen=True)
class BatteryRow:
    """One conversation, or one text of a model that has no chat template.

    Attributes:
        messages: as the template takes them; the last is the reply that is compared.
        prompt: ids up to that reply, as chat and training have them; of a text, its first token.
        ids: prompt and reply.
        text: the plain text in place of messages.
    """

    name: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    text: str | None = None

    @property
    def positions(self) -> range:
        """The positions whose next token belongs to the reply."""
        return range(len(self.prompt) - 1, len(self.ids) - 1)


@dataclass(frozen=True)
class Battery:
    """What is compared, and the tokens that end a reply as it was trained."""

    rows: tuple[BatteryRow, ...]
    stop_ids: tuple[int, ...]

    def within(self, context: int) -> Battery:
        """Without the rows that are longer than so many tokens."""
        return replace(self, rows=tuple(row for row in self.rows if len(row.ids) <= context))


def make_battery(encoder: Encoder) -> Battery:
    """All conversations that the template takes: without a system prompt where it has no place for one, and with tools
    where it writes them."""
    conversations = {
        name: Conversation(tuple(Message.of(role, text) for role, text in turns)) for name, turns in TURNS.items()
    }
    if encoder.template.call_style is not None:
        conversations |= _with_tools()
    rows = [_row(encoder, name, conversation) for name, conversation in conversations.items()]
    return Battery(tuple(row for row in rows if row is not None), encoder.template.stop_ids)


def text_battery(encode: Any, stop_ids: Sequence[int]) -> Battery:
    """Plain texts, for a model without a chat template.

    Args:
        encode: from a text to its ids, with the special tokens that the tokenizer adds in front.
    """
    rows = []
    for name, text in TEXTS.items():
        ids = tuple(encode(text))
        rows.append(BatteryRow(name, (), (), ids[:1], ids, text))
    return Battery(tuple(rows), tuple(stop_ids))


def _with_tools() -> dict[str, Conversation]:
    asked = Message.of("user", "How is the weather in Paris at nine?")
    called = Message.of("assistant", "", tool_calls=(CALL,))
    answered = Message.of("tool", '{"sky": "clear", "degrees": 21}', name="get_weather", tool_call_id="call00001")
    told = Message.of("assistant", "At nine it is clear in Paris, with 21 degrees.")
    return {
        "tools": Conversation((asked, told), (WEATHER,)),
        "tool result": Conversation((asked, called, answered, told), (WEATHER,)),
    }


def _row(encoder: Encoder, name: str, conversation: Conversation) -> BatteryRow | None:
    """The ids of a conversation; None where the template refuses it, or drops a part of it."""
    first = conversation.messages[0]
    if first.role == "system" and encoder.template.system_role != "rendered":
        conversation = replace(conversation, messages=conversation.messages[1:])
    try:
        adapted = encoder.template.adapt(conversation)
        earlier = tuple(replace(item, trained=False) for item in adapted.messages[:-1])
        last = replace(adapted, messages=(*earlier, adapted.messages[-1]))
        prompt = encoder.encode_prompt(earlier, adapted.tools)
        ids = encoder.encode_rendered(encoder.render(last))[-1].input_ids.tolist()
    except TemplateFailure:
        return None
    if ids[: len(prompt)] != prompt or len(ids) <= len(prompt):
        return None
    return BatteryRow(name, adapted.messages, adapted.tools, tuple(prompt), tuple(ids))
