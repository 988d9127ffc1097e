"""Tool calls as chat templates want them, found out by trying: what one family takes as an object, another takes as
text; some refuse a call without an identifier, others write `null` for one that is missing."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from firefly.data.schema import Message

Identify = Callable[[str, str, int], str]
"""A call's identifier as a template wants it: (the one that it has, the function's name, the call's number)."""

Attempt = Callable[[list[dict[str, Any]], list[dict[str, Any]]], str | None]
"""A template tried out: the text of (messages, tools), or None where it refuses them."""


def _numbered(number: int) -> str:
    """The identifier of a call that has none: of nine characters, which suits every template that writes one."""
    return f"call{number:05d}"


def _kept(identifier: str, function: str, number: int) -> str:
    return identifier


def _nine_characters(identifier: str, function: str, number: int) -> str:
    """What Mistral's templates ask of an identifier."""
    if len(identifier) == 9 and identifier.isascii() and identifier.isalnum():
        return identifier
    return hashlib.sha256(identifier.encode("utf-8", "replace")).hexdigest()[:9]


def _function_and_number(identifier: str, function: str, number: int) -> str:
    """Kimi's identifiers say which function is called."""
    return f"functions.{function}:{number}"


@dataclass(frozen=True)
class CallStyle:
    """How a template takes tool calls and their results.

    Attributes:
        as_text: arguments are JSON text, not an object.
        silence: what stands for the content of a reply that only calls functions; `absent`: the key is left out.
        identify: makes every call's identifier; None: the template needs none, and those of the record stay.
        names_results: a result needs the name of its function.
    """

    as_text: bool = False
    silence: Literal["empty", "null", "absent"] = "empty"
    identify: Identify | None = None
    names_results: bool = False

    def apply(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages with arguments and absent contents as the template takes them."""
        styled = []
        for item in messages:
            changed = dict(item)
            if "tool_calls" in item:
                changed["tool_calls"] = [self._call(call) for call in item["tool_calls"]]
                if not item["content"] and self.silence != "empty":
                    del changed["content"]
                    if self.silence == "null":
                        changed["content"] = None
            styled.append(changed)
        return styled

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = dict(call["function"])
        if self.as_text:
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        return {**call, "function": function}

    def complete(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Every result with the identifier of its call and, where it needs one, its function's name.

        The whole conversation decides: a call without an identifier takes the one that its result has. So the
        messages of a prompt must not be completed apart from those that follow.
        """
        answered = match_results(messages)
        calls = [call for item in messages for call in item.tool_calls]
        given: list[str | None] = [call.get("id") or None for call in calls]
        for index, number in answered.items():
            given[number] = given[number] or messages[index].tool_call_id
        identifiers = self._identifiers(calls, given)
        completed, numbers = [], itertools.count()
        for index, item in enumerate(messages):
            if item.tool_calls:
                with_ids = tuple(_identified(call, identifiers[next(numbers)]) for call in item.tool_calls)
                completed.append(replace(item, tool_calls=with_ids))
            elif item.role == "tool" and index in answered:
                call = calls[answered[index]]
                name = item.name or (call["function"]["name"] if self.names_results else None)
                completed.append(replace(item, tool_call_id=identifiers[answered[index]], name=name))
            elif item.role == "tool" and self.identify and item.tool_call_id:
                # A second result of one call, or the result of none.
                known = dict(zip(given, identifiers, strict=True)).get(item.tool_call_id)
                identifier = known or self.identify(item.tool_call_id, item.name or "", len(calls))
                completed.append(replace(item, tool_call_id=identifier))
            else:
                completed.append(item)
        return tuple(completed)

    def _identifiers(self, calls: Sequence[Mapping[str, Any]], given: list[str | None]) -> list[str | None]:
        """Every call's identifier as the template wants it; one that is made up is not that of another call."""
        if self.identify is None:
            return given
        taken = {identifier for identifier in given if identifier}
        identifiers: list[str | None] = []
        for number, (call, known) in enumerate(zip(calls, given, strict=True)):
            made = known or next(text for text in map(_numbered, itertools.count(number)) if text not in taken)
            taken.add(made)
            identifiers.append(self.identify(made, call["function"]["name"], number))
        return identifiers


def _identified(call: Mapping[str, Any], identifier: str | None) -> Mapping[str, Any]:
    return call if identifier is None else {**call, "id": identifier}


def match_results(messages: Sequence[Message]) -> dict[int, int]:
    """Which call each tool result answers: index of the message to number of the call, counted over all messages.

    By identifier; else, of the calls since the last question, by the function's name or in their order.
    """
    answered: dict[int, int] = {}
    waiting: dict[int, Mapping[str, Any]] = {}
    count = since = 0
    for index, item in enumerate(messages):
        if item.role == "user":
            since = count
        for call in item.tool_calls:
            waiting[count] = call
            count += 1
        if item.role == "tool" and (number := _answers(item, waiting, since)) is not None:
            answered[index] = number
            del waiting[number]
    return answered


def _answers(result: Message, waiting: Mapping[int, Mapping[str, Any]], since: int) -> int | None:
    if result.tool_call_id:
        for number, call in waiting.items():
            if call.get("id") == result.tool_call_id:
                return number
    # An identifier that no call has can only be that of a call without one.
    left = [number for number in waiting if number >= since and not (result.tool_call_id and waiting[number].get("id"))]
    named = [number for number in left if result.name and waiting[number]["function"]["name"] == result.name]
    return next(iter(named or left), None)


# ---- the probe


@dataclass(frozen=True)
class _Probe:
    """A conversation with unmistakable names: tools, calls with arguments, results, and the reply to them."""

    calls: int
    tools: bool
    results: bool

    def messages(self, identified: bool) -> tuple[Message, ...]:
        """The conversation; its calls with identifiers as OpenAI's are, or without."""
        calls = []
        for number in range(self.calls):
            function = {"name": f"firefly_call_{number}z", "arguments": {f"firefly_key_{number}z": f"value-{number}z"}}
            call: dict[str, Any] = {"type": "function", "function": function}
            calls.append({**call, "id": _given(number)} if identified else call)
        asked = (Message.of("user", "firefly-question"), Message.of("assistant", "", tool_calls=tuple(calls)))
        if not self.results:
            return asked
        answers = [
            Message.of("tool", f"firefly-result-{number}z", tool_call_id=_given(number) if identified else None)
            for number in range(self.calls)
        ]
        return (*asked, *answers, Message.of("assistant", "firefly-reply"))

    @property
    def schemas(self) -> list[dict[str, Any]]:
        if not self.tools:
            return []
        field = {"type": "string", "description": "firefly-field"}
        parameters = {"type": "object", "properties": {"firefly_parameter": field}, "required": ["firefly_parameter"]}
        function = {"name": "firefly_tool", "description": "firefly-description", "parameters": parameters}
        return [{"type": "function", "function": function}]

    def is_whole(self, text: str | None) -> bool:
        """Whether a text holds all of it, arguments not quoted twice."""
        if text is None:
            return False
        words = ["firefly-question"]
        for number in range(self.calls):
            words += [f"firefly_call_{number}z", f"firefly_key_{number}z", f"value-{number}z"]
            words += [f"firefly-result-{number}z"] * self.results
        words += ["firefly-reply"] * self.results
        words += ["firefly_tool", "firefly-description", "firefly_parameter"] * self.tools
        return all(word in text for word in words) and '\\"firefly_key' not in text


def _given(number: int) -> str:
    return f"call_fireflyProbe{number}z"


# The most that a template may write, down to a call alone.
PROBES = [
    _Probe(calls, tools, results)
    for tools, results in ((True, True), (False, True), (True, False), (False, False))
    for calls in (2, 1)
]
STYLES = [
    CallStyle(as_text, silence, identify, names_results)
    for names_results in (False, True)
    for identify in (_kept, _nine_characters, _function_and_number)
    for silence in ("empty", "null", "absent")
    for as_text in (False, True)
]


def find_call_style(attempt: Attempt) -> CallStyle | None:
    """How a template wants tool calls, proved by a conversation of tools, calls, arguments and results together, with
    identifiers and without; None if it does not even write a call alone."""
    for probe in PROBES:
        for style in STYLES:
            if all(probe.is_whole(_try(probe, style, attempt, identified=given)) for given in (False, True)):
                return _least(probe, style, attempt)
    return None


def _try(
    probe: _Probe, style: CallStyle, attempt: Attempt, *, identified: bool = False, name: str | None = None
) -> str | None:
    """The text of a probe; its results with a name of their own, if one is given."""
    messages = style.complete(probe.messages(identified))
    if name is not None:
        messages = tuple(replace(item, name=name) if item.role == "tool" else item for item in messages)
    return attempt(style.apply([item.as_dict() for item in messages]), probe.schemas)


def _least(probe: _Probe, style: CallStyle, attempt: Attempt) -> CallStyle:
    """The style without identifiers, if the template needs none; with the names of results, if it needs them."""
    whole = _try(probe, style, attempt) or ""
    if style.identify is _kept:
        without = replace(style, identify=None)
        plain, identifiers = _try(probe, without, attempt), [_numbered(number) for number in range(probe.calls)]
        if any(identifier in whole for identifier in identifiers):
            needless = probe.is_whole(plain) and not _left_blank(whole, identifiers, plain)
        else:
            needless = plain == whole
        style = without if needless else style
    named = _try(probe, style, attempt, name="firefly-answering") or ""
    blank = _left_blank(named, ["firefly-answering"], _try(probe, style, attempt))
    return replace(style, names_results=style.names_results or blank)


def _left_blank(written: str, words: Sequence[str], plain: str | None) -> bool:
    """Whether `plain`, the text of a conversation that lacks `words`, is `written` with nothing in their place."""
    for quoted, blank in (("{}", ""), ("{}", "None"), ("{}", "null"), ('"{}"', "null"), ('"{}"', "None")):
        text = written
        for word in words:
            text = text.replace(quoted.format(word), blank)
        if text == plain and plain != written:
            return True
    return False


def openai_message(message: Message) -> dict[str, Any]:
    """A message as programs send it to a chat endpoint: the arguments of calls are JSON text there."""
    sent = message.as_dict()
    sent.pop("thinking", None)  # the same text under the name of one template
    if "tool_calls" in sent:
        sent["tool_calls"] = [
            dict(call) | {"function": _with_text_arguments(call["function"])} for call in sent["tool_calls"]
        ]
    return sent


def _with_text_arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function["arguments"]
    return dict(function) | {
        "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    }
