"""What a chat template puts around the thought, the text and the tool calls of a reply, found out by rendering.

A template says nowhere how it writes a call. So replies with unmistakable names are rendered (one call, two calls, text
beside a call, a thought), and what stands around the names is taken as literal markers.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from firefly.data.schema import Conversation, Message
from firefly.data.templates import ChatTemplate, TemplateFailure

KNOWN_THOUGHTS = (
    ("<think>\n", "\n</think>\n\n"),
    ("<|thought_start|>\n", "\n<|thought_end|>\n"),
    ("[THINK]", "[/THINK]"),
)
"""Thoughts that rendering does not show: a template may leave them out of every turn (its prompt has ended them
already), or read them from a field of its own (MiniCPM3's `thought`), and the model writes them all the same."""

Part = Literal["name", "id", "arguments", "object"]


@dataclass(frozen=True)
class Thoughts:
    """What stands before and behind a thought."""

    open: str
    close: str


@dataclass(frozen=True)
class Keys:
    """The keys of a JSON object that is a whole call; `within`: name and arguments stand in an object of that key."""

    name: str
    arguments: str
    id: str | None
    within: str | None = None


@dataclass(frozen=True)
class Fields:
    """Arguments that are not one JSON object: before a key, between key and value, behind a value, and what separates
    two of them.

    Attributes:
        quote: stands around a value that is a text; None: nothing does, and values do not show their types.
        text_open: stands in place of `value_open` before a text (DeepSeek V3.2's `string="true"`).
    """

    key_open: str
    value_open: str
    value_close: str
    between: str
    quote: str | None
    text_open: str | None = None


@dataclass(frozen=True)
class CallMarkers:
    """How calls are written: `begin head CALL tail between head CALL tail end`.

    Attributes:
        gap: what separates a text from the calls behind it.
        parts: what a call consists of in its order, each with what stands before it.
        form: how arguments are written; None: as a JSON object.
        named_id: what stands before and behind the function's name in an identifier that holds it (Kimi).
    """

    begin: str
    head: str
    tail: str
    between: str
    end: str
    gap: str
    parts: tuple[tuple[str, Part], ...]
    form: Keys | Fields | None
    named_id: tuple[str, str] | None = None

    @property
    def trigger(self) -> str:
        """The first marker of a call, if no text holds it by chance. Without it, a call only stands at the beginning of
        a reply."""
        first = next(iter(split_words(self.begin + self.head)), "")
        return first if len(first) > 2 and (first[0] in "<[" or first.isalpha()) else ""


@dataclass(frozen=True)
class Markers:
    """All that is literal in a reply.

    Attributes:
        leads, trails: what a template may write before and behind a reply's text.
        prompt_tail: the end of its generation prompt.
        by_channel: replies are messages in channels, each with a header (gpt-oss).
    """

    thoughts: Thoughts | None = None
    calls: CallMarkers | None = None
    leads: tuple[str, ...] = ()
    trails: tuple[str, ...] = ()
    prompt_tail: str = ""
    by_channel: bool = False


# A marker is cut only between these: not inside `<parameter=` or `<|tool_call_end|>`.
_ATOM = re.compile(r"\s+|<[^<>\s]*>|<[^<>]*>?|\[/?[A-Z_]+\]|\w+|.", re.DOTALL)


@lru_cache(maxsize=1024)
def split_atoms(literal: str) -> tuple[str, ...]:
    return tuple(_ATOM.findall(literal))


@lru_cache(maxsize=1024)
def split_words(literal: str) -> tuple[str, ...]:
    """The atoms of a marker that are not white space."""
    return tuple(atom for atom in split_atoms(literal) if not atom.isspace())


def white_end(text: str) -> str:
    """The white space at the end of a text."""
    return text[len(text.rstrip()) :]


def _common_start(first: str, second: str) -> str:
    shared = []
    for one, other in zip(split_atoms(first), split_atoms(second), strict=False):
        if one != other:
            if one.isspace() and other.isspace():
                shared.append(os.path.commonprefix([one, other]))  # noqa: RUF071  (of characters)
            break
        shared.append(one)
    return "".join(shared)


def _common_end(first: str, second: str) -> str:
    shared: list[str] = []
    for one, other in zip(reversed(split_atoms(first)), reversed(split_atoms(second)), strict=False):
        if one != other:
            break
        shared.insert(0, one)
    return "".join(shared)


# ---- the probe

_LONGEST_TAIL = 64
_QUESTION = Message.of("user", "firefly-question")
_TEXT, _THOUGHT = "firefly-said", "firefly-thought"


def _call(number: int) -> dict[str, Any]:
    arguments = {f"firefly_key_{number}a": f"firefly-value-{number}a", f"firefly_key_{number}b": 7310450 + number}
    function = {"name": f"firefly_call_{number}z", "arguments": arguments}
    return {"type": "function", "id": f"call_fireflyProbe{number}z", "function": function}


def probe_replies() -> list[Message]:
    """Replies whose parts are unmistakable."""
    one, two = (_call(0),), (_call(0), _call(1))
    return [
        Message.of("assistant", _TEXT),
        Message.of("assistant", _TEXT, reasoning=_THOUGHT),
        Message.of("assistant", "", tool_calls=one),
        Message.of("assistant", "", tool_calls=two),
        Message.of("assistant", _TEXT, tool_calls=one),
        Message.of("assistant", "", tool_calls=one, reasoning=_THOUGHT),
    ]


def _tools(calls: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    described = []
    for call in calls:
        types = {
            key: {"type": "string" if isinstance(value, str) else "integer"}
            for key, value in call["function"]["arguments"].items()
        }
        parameters = {"type": "object", "properties": types, "required": list(types)}
        function = {"name": call["function"]["name"], "description": "firefly-tool", "parameters": parameters}
        described.append({"type": "function", "function": function})
    return tuple(described)


@dataclass(frozen=True)
class Written:
    """A reply as a template writes it: behind which prompt, and without the stop token; its calls' identifiers."""

    prompt: str
    text: str
    identifiers: tuple[str | None, ...]


def written_reply(template: ChatTemplate, reply: Message, tools: Sequence[Mapping[str, Any]] = ()) -> Written | None:
    """A reply as the template has it trained; None where it refuses it or drops a part of it."""
    for shown in (tools or _tools(reply.tool_calls), ()):
        conversation = Conversation((_QUESTION, reply), tuple(shown))
        try:
            rendered = template.render(conversation)[-1]
            last = template.adapt(conversation).messages[-1]
        except TemplateFailure:
            continue
        start, end = rendered.spans[-1]
        text = rendered.text[start:end]
        stop = next((stop for stop in template.stop_tokens if text.endswith(stop)), "")
        identifiers = tuple(call.get("id") for call in last.tool_calls)
        return Written(rendered.text[:start], text.removesuffix(stop), identifiers)
    return None


def shown_reply(template: ChatTemplate, reply: Message) -> Written | None:
    """A reply as a history shows it, where the template cannot be trained: what its prompt ends with (an opened or an
    empty thought) is not there in a history."""
    for shown in (_tools(reply.tool_calls), ()):
        try:
            conversation = template.adapt(Conversation((_QUESTION, reply), tuple(shown)))
            prompt = template.render_text(conversation, prompt=True, upto=1)[0]
            official = template.render_text(conversation, prompt=False)[0]
        except TemplateFailure:
            continue
        start = len(_common_start(prompt, official))
        text = official[start:]
        words = [reply.text, reply.reasoning or ""]
        for call in reply.tool_calls:
            words += [call["function"]["name"], *map(str, call["function"]["arguments"].values())]
        if all(word in text for word in words):
            after = max(text.rfind(word) + len(word) for word in words if word)
            ends = [place for stop in template.stop_tokens if (place := text.find(stop, after)) >= 0]
            identifiers = tuple(call.get("id") for call in conversation.messages[-1].tool_calls)
            return Written(official[:start], text[: min(ends, default=len(text))], identifiers)
    return None


def learn_markers(template: ChatTemplate) -> Markers:
    """The markers of a template's replies; without calls, if it writes none or writes them in no way that is known."""
    template = replace(template, thinking="keep")
    replies = probe_replies()
    said, thought, one, two, beside, thought_one = [written_reply(template, reply) for reply in replies]
    if said is None:
        said, thought, one, two, beside, thought_one = [shown_reply(template, reply) for reply in replies]
    if said is None:
        return Markers()
    try:
        prompt_tail = template.render_text(Conversation((_QUESTION,)), prompt=True)[0][-_LONGEST_TAIL:]
    except TemplateFailure:
        prompt_tail = said.prompt[-_LONGEST_TAIL:]
    lead = said.text.partition(_TEXT)[0]
    if "<|channel|>" in lead and "<|message|>" in lead:
        # The model writes more orders of channel and recipient in a header than the template does.
        return Markers(prompt_tail=prompt_tail, by_channel=True)
    thoughts = _learn_thoughts(template, said, thought, one, thought_one)
    if thoughts:
        said, one, two, beside = [_without_empty_thought(item, thoughts) for item in (said, one, two, beside)]
    assert said is not None
    lead, _, trail = said.text.partition(_TEXT)
    leads, trails = {lead}, {trail}
    calls = _learn_calls(one, two) if one else None
    if calls and one and beside and (places := _locate(beside, 1)):
        at = beside.text.find(_TEXT)
        upto = at + len(_TEXT)
        place, alone = places[0], one.text[: _start_of_call(one)]
        if at < place.start:
            leads.add(beside.text[:at])
            opening = beside.text[upto : place.start]
            if opening.endswith(alone.lstrip()):
                calls = replace(calls, gap=opening[: len(opening) - len(alone.lstrip())])
            elif opening.strip() and alone.endswith(opening):
                # Llama 4 writes a marker before the text of a reply with calls, even if there is no text.
                white = opening[: len(opening) - len(opening.lstrip())]
                calls = replace(calls, begin=opening.removesuffix(calls.head), gap=white)
        else:
            after = beside.text[place.end : at].removeprefix(calls.tail)
            calls = replace(calls, end=_common_start(calls.end, after))
            trails.add(beside.text[upto:])
    return Markers(
        thoughts=thoughts,
        calls=calls,
        leads=_longest_first(leads),
        trails=_longest_first(trails),
        prompt_tail=prompt_tail,
    )


def _longest_first(literals: set[str]) -> tuple[str, ...]:
    return tuple(sorted(filter(None, literals), key=lambda text: (len(text.strip()), len(text)), reverse=True))


def _learn_thoughts(
    template: ChatTemplate,
    said: Written,
    thought: Written | None,
    one: Written | None,
    thought_one: Written | None,
) -> Thoughts | None:
    opening, endings = "", []
    for shown, without, where in ((thought, said, _TEXT), (thought_one, one, None)):
        if shown is None or without is None or _THOUGHT not in shown.text:
            continue
        end, plain_end = [item.text.find(where) if where else _start_of_call(item) for item in (shown, without)]
        if min(end, plain_end) < 0:
            continue
        opening = shown.text.partition(_THOUGHT)[0]
        close, lead = shown.text[len(opening) + len(_THOUGHT) : end], without.text[:plain_end]
        # What a reply without a thought begins with belongs to the text or the call, unless that is an empty thought's.
        own = close.removesuffix(lead)
        endings.append(own if own.strip() else close)
        if not opening.strip():
            # The prompt has opened it: with its last marker.
            opening = shown.prompt[max(shown.prompt.rfind("<"), shown.prompt.rfind("["), 0) :]
    if not endings:
        known = ((start, end) for start, end in KNOWN_THOUGHTS if start.strip() in template.text)
        return next((Thoughts(start, end) for start, end in known if end.strip() in template.text), None)
    close = _common_start(endings[0], endings[-1])
    if not close.strip():
        return None
    opening = opening.rpartition(close.strip())[2]  # behind an empty one
    return Thoughts(opening, close) if opening.strip() else None


def _start_of_call(written: Written) -> int:
    places = _locate(written, 1)
    return places[0].start if places else -1


def _without_empty_thought(written: Written | None, thoughts: Thoughts) -> Written | None:
    """A reply without the empty thought that it may begin with."""
    if written is None:
        return None
    core = thoughts.close.strip()
    before, found, behind = written.text.partition(core)
    if not found or "firefly" in before:
        return written
    return replace(written, text=behind.removeprefix(thoughts.close[thoughts.close.index(core) + len(core) :]))


# ---- calls


@dataclass(frozen=True)
class _Place:
    """Where a call stands in a reply: its parts in order with their borders, and how its arguments are written."""

    parts: tuple[tuple[int, int, Part], ...]
    form: Keys | Fields | None

    @property
    def start(self) -> int:
        return self.parts[0][0]

    @property
    def end(self) -> int:
        return self.parts[-1][1]


def _locate(written: Written, count: int) -> list[_Place]:
    """The places of the first calls; fewer, if some are written in a way that is not known."""
    places: list[_Place] = []
    at = 0
    for number in range(count):
        place = _locate_call(written, number, at)
        if place is None:
            break
        places.append(place)
        at = place.end
    return places


def _locate_call(written: Written, number: int, at: int) -> _Place | None:
    text, function, identifier = written.text, _call(number)["function"], written.identifiers[number]
    name, arguments = function["name"], function["arguments"]
    first_key = text.find(next(iter(arguments)), at)
    if first_key < 0:
        return None
    found = None
    for brace in (match.start() for match in re.compile(r"\{").finditer(text, at, first_key)):
        try:
            value, end = json.JSONDecoder().raw_decode(text, brace)
        except ValueError:
            continue
        if value == arguments:
            found = (brace, end)
            break
        if keys := _keys_of(value, name, arguments, identifier):
            return _Place(((brace, end, "object"),), keys)
    heading: list[tuple[int, int, Part]] = []
    place = -1 if identifier is None else text.find(identifier, at, first_key)
    if identifier is not None and place >= 0:
        heading.append((place, place + len(identifier), "id"))
    if not (identifier is not None and name in identifier and place >= 0):
        # It may stand there twice: as a recipient, and in the call.
        upto = found[0] if found else first_key
        for match in re.compile(re.escape(name)).finditer(text, at, upto):
            heading.append((match.start(), match.end(), "name"))
    heading.sort()
    if found:
        return _Place((*heading, (*found, "arguments")), None) if heading else None
    fields = _learn_fields(text, heading[-1][1], arguments) if heading else None
    if fields is None:
        return None
    form, begin, end = fields
    return _Place((*heading, (begin, end, "arguments")), form)


def _keys_of(value: Any, name: str, arguments: Mapping[str, Any], identifier: str | None) -> Keys | None:
    """The keys of name, arguments and identifier in an object, or in one that it holds."""
    if not isinstance(value, dict):
        return None
    found: dict[str, str] = {}
    for key, item in value.items():
        if item == name:
            found["name"] = key
        elif item == arguments or (isinstance(item, str) and _decoded(item) == arguments):
            found["arguments"] = key
        elif item == identifier and identifier:
            found["id"] = key
    if len(found.keys() & {"name", "arguments"}) == 2:
        return Keys(found["name"], found["arguments"], found.get("id"))
    for key, item in value.items():
        inner = _keys_of(item, name, arguments, identifier)
        if inner and inner.within is None:
            return replace(inner, id=found.get("id", inner.id), within=key)
    return None


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _learn_fields(text: str, at: int, arguments: Mapping[str, Any]) -> tuple[Fields, int, int] | None:
    """Markers of arguments that stand one by one behind `at`, and where the first begins and the last ends.

    The first is a text, the second a number.
    """
    (key, said), (other_key, number) = arguments.items()
    borders = []
    for word in (key, said, other_key, str(number)):
        start = text.find(word, at)
        if start < 0:
            return None
        borders.append((start, start + len(word)))
        at = start + len(word)
    (key_start, key_end), (said_start, said_end), (other_start, other_end), (number_start, number_end) = borders
    typed, bare = text[key_end:said_start], text[other_end:number_start]
    quote = typed.removeprefix(bare) if typed.startswith(bare) else ""
    if quote and not text.startswith(quote, said_end):
        return None
    text_open = None if typed.startswith(bare) else typed
    before = text[:key_start]
    between = text[said_end + len(quote) : other_start]
    key_open = _common_end(before, between)
    between = between.removesuffix(key_open)
    # What closes a value stands behind the last one, too.
    close = _common_start(between, text[number_end:])
    if not bare.strip() or not (quote or close.strip()):
        return None  # nothing says where a key or a value ends
    fields = Fields(key_open, bare, close, between.removeprefix(close), quote or None, text_open)
    return fields, key_start - len(key_open), number_end + len(close)


def _learn_calls(one: Written, two: Written | None) -> CallMarkers | None:
    alone = _locate(one, 1)
    pair = _locate(two, 2) if two else []
    if not alone:
        return None
    (place,) = alone
    begin, end = one.text[: place.start], one.text[place.end :]
    head, tail, between = "", end, ""
    if two and len(pair) == 2:
        middle, last = two.text[pair[0].end : pair[1].start], two.text[pair[1].end :]
        tail = _common_start(_common_start(middle, last), end) if end.strip() else _common_start(middle, last)
        head = _common_end(begin, middle.removeprefix(tail))
        between = middle.removeprefix(tail).removesuffix(head)
        begin, end = begin.removesuffix(head), last.removeprefix(tail)
    borders = [place.start, *(stop for _, stop, _ in place.parts)]
    literals = [one.text[border:start] for border, (start, _, _) in zip(borders, place.parts, strict=False)]
    named = None
    identifier, name = one.identifiers[0], _call(0)["function"]["name"]
    if identifier and name in identifier:
        before, _, behind = identifier.partition(name)
        named = (before, behind[:1])
    kinds: list[Part] = [kind for _, _, kind in place.parts]
    parts = tuple(zip(literals, kinds, strict=True))
    return CallMarkers(begin, head, tail, between, end, "", parts, place.form, named)
