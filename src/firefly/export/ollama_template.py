"""A chat template → the TEMPLATE of an Ollama Modelfile, learned by rendering.

Jinja is not translated: conversations whose contents are unmistakable are rendered by the trained template, and what
stands between two contents is taken as a literal. What it depends on (the message before it, whether a system prompt or
functions are given, whether it is the last question) becomes an `if` of Go's text/template.

How Ollama fills a template that uses `.Messages` (its template/template.go and server/routes.go):

- Neighbours of one role are joined by a blank line, except results of tools.
- `.System` holds all system messages, joined by a blank line; they also stand in `.Messages`, where they were.
- If a request does not begin with a system message, the Modelfile's SYSTEM is put in front of it as one.
- `.Tools` and the arguments of calls are structs and maps: their keys come in alphabetical order or in one that the
  template chooses, never in the order of the request.
- There is no function that trims. `json` writes no space after `,` and `:`, and `<`, `>` and `&` as escapes.
- The prompt is tokenized with its special tokens, whoever wrote them: a typed `</s>` is one, other than in training.
- `.ID` and `.ToolCallID` are not known to old versions: there a template that needs them ends in an error.
- It finds the calls of a reply by the first text below `{{ if .ToolCalls }}`, and thoughts by the first and the last
  text around `{{ .Thinking }}` (tools/template.go, thinking/template.go), so what we write has these shapes.
- Since 2026 it prefers the Jinja template inside the GGUF file where that one can do more (functions, thoughts) than
  TEMPLATE; it recognizes the round trip of functions by `eq .Role "tool"`.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from firefly.data.schema import Conversation, Message
from firefly.data.templates import ChatTemplate, TemplateFailure
from firefly.generation.replies.markers import split_atoms

# Private-use characters that stand in learned literals for what is filled in.
SYSTEM, TOOLS, NAME, ARGUMENTS, CALL_ID, RESULT_ID, RESULT_NAME, LAST_ID, LAST_NAME = map(chr, range(0xF0B00, 0xF0B09))
CONTENT, THOUGHT, ROUND = map(chr, range(0xF0B10, 0xF0B13))
START, END = "", "end"

Style = tuple[int | None, str, str]
"""How JSON is written: indent, what separates two items, and what stands behind a key."""

STYLES: tuple[Style, ...] = ((None, ", ", ": "), (None, ",", ":"), (4, ",", ": "), (2, ",", ": "))
Feature = Literal["tools", "thinking"]
Result = Literal["raw", "quoted", "mixed"]
"""How a tool's answer stands there: as it is, as a JSON text, or as it is where it is JSON and else as a JSON text."""


class NotExpressed(Exception):
    """The template writes a conversation in a way that has no place in an Ollama template; the text says why."""


@dataclass(frozen=True)
class Place:
    """Where a literal stands: behind a message of which role ("call": a reply that calls), and in what conversation.

    Attributes:
        last: whether the message that follows is the last question, or stands behind it.
        call: whether the message that follows calls functions; bare: without a text beside.
        quiet: whether the request switches thinking off.
    """

    before: str
    system: bool = False
    tools: bool = False
    last: bool = False
    call: bool = False
    bare: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class Calls:
    """How a reply's calls are written: `first BODY between BODY`, behind a text and `gap`."""

    first: str
    body: str
    between: str
    gap: str
    style: Style


@dataclass(frozen=True)
class Thoughts:
    """What stands around the thought of an earlier reply.

    Attributes:
        shown: everywhere, behind the last question only, or nowhere.
        trace: what stands in place of a thought that is not shown.
    """

    open: str
    close: str
    shown: Literal["always", "last", "never"]
    trace: str = ""


@dataclass(frozen=True)
class ToolList:
    """How functions are described: each as one JSON object, with what stands between two.

    Attributes:
        whole: the object has the key `function`; else it is what that key holds.
        depth: how far its lines are indented, as in a list.
        raw: the description stands between quotes as it is (Mistral Nemo).
    """

    between: str
    style: Style
    whole: bool
    depth: int
    raw: bool


@dataclass(frozen=True)
class Learned:
    """All that was seen of a template.

    Attributes:
        cells: role of the message that follows → place → the literal before its content.
        system_in_place: a system prompt is a message of its own, wherever it stands.
        default_system: what the template says where no system prompt is given, if giving it writes the same text.
    """

    cells: Mapping[str, Mapping[Place, str]]
    system_in_place: bool
    default_system: str | None = None
    tool_list: ToolList | None = None
    calls: Calls | None = None
    result: Result = "raw"
    thoughts: Thoughts | None = None


# ---- what is common to probes and literals


def is_plain_text(text: str) -> bool:
    """Whether a Modelfile can hold a text: its parser drops what Go does not call printable, and ends a value at the
    end of a line that ends with three quotes."""
    return '"""' not in text and all(character.isprintable() or character in "\n\t" for character in text)


def shared_head(texts: Sequence[str]) -> str:
    """The longest common beginning that ends with a whole marker."""
    common = os.path.commonprefix(list(texts))  # noqa: RUF071  (of characters)
    whole = ""
    for atom in split_atoms(max(texts, key=len)):
        if len(whole) + len(atom) > len(common):
            break
        whole += atom
    return whole


def shared_tail(texts: Sequence[str]) -> str:
    common = os.path.commonprefix([text[::-1] for text in texts])[::-1]  # noqa: RUF071  (of characters)
    whole = ""
    for atom in reversed(split_atoms(max(texts, key=len))):
        if len(whole) + len(atom) > len(common):
            break
        whole = atom + whole
    return whole


# ---- learning


@dataclass
class _Seen:
    """One conversation, rendered and cut at its contents."""

    codes: str
    literals: list[str]
    bodies: dict[int, str]
    style: Style | None = None
    tool_list: ToolList | None = None


def _marker(number: int) -> str:
    return f"fireflyq{number}z"


def _probe_call(number: int) -> dict[str, Any]:
    arguments = {f"fireflyka{number}z": f"fireflyva{number}z", f"fireflykb{number}z": 7310450 + number}
    function = {"name": f"fireflyfn{number}z", "arguments": arguments}
    return {"type": "function", "id": f"fire{number:05d}", "function": function}


def _probe_tool(number: int) -> dict[str, Any]:
    field = {"type": "string", "description": f"firefly field {number}"}
    parameters = {
        "type": "object",
        "properties": {f"fireflyfield{number}z": field},
        "required": [f"fireflyfield{number}z"],
    }
    function = {
        "name": f"fireflytool{number}z",
        "description": f'firefly "function" {number}',
        "parameters": parameters,
    }
    return {"type": "function", "function": function}


class Learner:
    """Renders probes of a template. `prompt` gives a conversation's trained prompt, less a BOS that the engine adds."""

    def __init__(self, template: ChatTemplate, bos: str, result: Result = "raw") -> None:
        self.template = template
        self.result: Result = result
        self.bos = bos

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The trained prompt as the engine is to be given it.

        Raises:
            TemplateFailure: the template refuses it.
            NotExpressed: it does not begin with the BOS that the engine adds.
        """
        text = self.template.render_prompt(Conversation(tuple(messages), tuple(tools)))
        if not text.startswith(self.bos):
            raise NotExpressed(f"the engine puts {self.bos} in front of every prompt, and a trained one has none there")
        return text.removeprefix(self.bos)

    def quiet(self) -> Learner:
        """The same with thinking switched off, by the names that templates have for it."""
        variables = self.template.variables | {"enable_thinking": False, "thinking": False}
        return Learner(replace(self.template, variables=variables), self.bos, self.result)

    def see(self, codes: str, *, system: bool = False, tools: bool = False, quiet: bool = False) -> _Seen:
        """Render the conversation of `codes`: U(ser), A(ssistant), C(all), D(ouble call), B (text beside a call),
        R (reply with a thought), Q (call with a thought), T(ool's answer), S(ystem prompt in place).

        Raises:
            TemplateFailure: the template refuses it.
            NotExpressed: its text cannot be cut at its contents.
        """
        messages, calls = self._messages(codes)
        if system:
            messages.insert(0, Message.of("system", _marker(99)))
        described = [_probe_tool(1), _probe_tool(2)] if tools else []
        text = (self.quiet() if quiet else self).prompt(messages, described)
        seen = _Seen(codes, [], {})
        if tools:
            text, seen.tool_list = _cut_tools(text, described)
        if system:
            text = _replaced_once(text, _marker(99), SYSTEM)
        position = 0
        for number, code in enumerate(codes):
            anchors = {CONTENT: _marker(number)} if code in "UASTBR" else {}
            if code == "T" and self.result != "raw":
                anchors = {CONTENT: json.dumps(_marker(number))}
            if code in "RQ" and _marker(number + 50) in text:
                anchors[THOUGHT] = _marker(number + 50)
            spans = [self._find(text, word, position, slot) for slot, word in anchors.items()]
            for call in calls.get(number, []):
                spans += self._find_call(text, call, position, seen)
            spans.sort()
            start, end = spans[0][0], max(span[1] for span in spans)
            seen.literals.append(text[position:start])
            seen.bodies[number] = _filled(text, spans)
            position = end
        seen.literals.append(text[position:])
        self._name_results(seen, calls)
        return seen

    def _messages(self, codes: str) -> tuple[list[Message], dict[int, list[dict[str, Any]]]]:
        messages: list[Message] = []
        calls: dict[int, list[dict[str, Any]]] = {}
        waiting: list[dict[str, Any]] = []
        for number, code in enumerate(codes):
            text = _marker(number)
            if code in "CDBQ":
                calls[number] = [_probe_call(number), _probe_call(number + 30)][: 2 if code == "D" else 1]
                waiting += calls[number]
                said = text if code == "B" else ""
                thought = _marker(number + 50) if code == "Q" else None
                messages.append(Message.of("assistant", said, tool_calls=tuple(calls[number]), reasoning=thought))
            elif code == "T":
                call = waiting.pop(0)
                name = call["function"]["name"]
                messages.append(Message.of("tool", text, tool_call_id=call["id"], name=name))
            elif code == "R":
                messages.append(Message.of("assistant", text, reasoning=_marker(number + 50)))
            else:
                role = {"U": "user", "A": "assistant", "S": "system"}[code]
                messages.append(Message.of(role, text))  # pyright: ignore[reportArgumentType]
        return messages, calls

    def _find(self, text: str, word: str, position: int, slot: str) -> tuple[int, int, str]:
        place = text.find(word, position) if word else -1
        if place < 0 or text.find(word, place + 1) >= 0:
            raise NotExpressed("a content is written twice, or not where it was said")
        return place, place + len(word), slot

    def _find_call(self, text: str, call: Mapping[str, Any], position: int, seen: _Seen) -> list[tuple[int, int, str]]:
        function = call["function"]
        for style in STYLES:
            written = _dumps(function["arguments"], style)
            if written in text:
                break
        else:
            raise NotExpressed("arguments of calls are not written as one JSON object, and Ollama reads no others")
        seen.style = style
        start = text.find(written, position)
        name = text.find(function["name"], position)
        spans = [(name, name + len(function["name"]), NAME), (start, start + len(written), ARGUMENTS)]
        # The identifier is looked for where the call is: a tool's answer may repeat it.
        end = text.find(_marker(0)[:8], start + len(written))
        place = text.find(call["id"], position, end if end >= 0 else len(text))
        if 0 <= place < start + len(written) + 24:
            spans.append((place, place + len(call["id"]), CALL_ID))
        if min(span[0] for span in spans) < 0:
            raise NotExpressed("the name of a call is changed")
        return spans

    def _name_results(self, seen: _Seen, calls: Mapping[int, list[dict[str, Any]]]) -> None:
        """Put slots for identifiers and names into the literals around tools' answers."""
        waiting: list[dict[str, Any]] = []
        for number, code in enumerate(seen.codes):
            waiting += calls.get(number, [])
            if code != "T":
                continue
            call = waiting.pop(0)
            for word, before, behind in (
                (call["id"], RESULT_ID, LAST_ID),
                (call["function"]["name"], RESULT_NAME, LAST_NAME),
            ):
                seen.literals[number] = seen.literals[number].replace(word, before)
                seen.literals[number + 1] = seen.literals[number + 1].replace(word, behind)


def _dumps(value: Any, style: Style) -> str:
    indent, item, key = style
    return json.dumps(value, ensure_ascii=False, indent=indent, separators=(item, key))


def _filled(text: str, spans: Sequence[tuple[int, int, str]]) -> str:
    """The text from the first span to the last, each with its slot in its place."""
    pieces, position = [], spans[0][0]
    for start, end, slot in spans:
        if start < position:
            raise NotExpressed("the parts of a call overlap")
        pieces += text[position:start], slot
        position = end
    return "".join(pieces)


def _replaced_once(text: str, word: str, slot: str) -> str:
    if text.count(word) != 1:
        raise NotExpressed("the system prompt is written twice, or not at all")
    return text.replace(word, slot)


def _cut_tools(text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, ToolList]:
    """The text with a slot for the list of functions, and how that list is written."""
    for whole, raw, style, depth in itertools.product((True, False), (False, True), STYLES, (0, 1)):
        first, second = (_dumps(tool if whole else tool["function"], style) for tool in tools)
        if style[0] is not None and depth:
            first, second = (written.replace("\n", "\n" + " " * style[0]) for written in (first, second))
        if raw:
            first, second = (written.replace('\\"', '"') for written in (first, second))
        start, other = text.find(first), text.find(second)
        if 0 <= start < other and text.count(first) == text.count(second) == 1:
            between = text[start + len(first) : other]
            return text[:start] + TOOLS + text[other + len(second) :], ToolList(between, style, whole, depth, raw)
    raise NotExpressed("functions are not described as JSON objects that Ollama could write")


ROLES = {"U": "user", "T": "tool", "S": "system"} | dict.fromkeys("ACDBRQ", "assistant")
"""Of the codes of `Learner.see`."""


def learn(learner: Learner, features: frozenset[Feature]) -> Learned:
    """See what a template writes, with the features that are wanted.

    Raises:
        NotExpressed: it cannot be expressed.
        TemplateFailure: it refuses even a single question, or what the features need.
    """
    if _system_in_place(learner):
        with suppress(NotExpressed):  # one in the middle may change the beginning (DeepSeek Coder)
            return _learn(learner, features, in_place=True)
    return _learn(learner, features, in_place=False)


def _learn(learner: Learner, features: frozenset[Feature], *, in_place: bool) -> Learned:
    cells: dict[str, dict[Place, str]] = {}
    seen: list[tuple[_Seen, bool, bool, bool]] = []

    def observe(codes: str, needed: bool, **how: bool) -> _Seen | None:
        try:
            item = learner.see(codes, **how)
        except TemplateFailure:
            if needed:
                raise
            return None
        seen.append((item, how.get("system", False), how.get("tools", False), how.get("quiet", False)))
        return item

    with_tools = (False, True) if "tools" in features else (False,)
    for tools in with_tools:
        for codes in ("U", "UAU", "UAUAU", "UAUAUAU"):
            observe(codes, True, tools=tools)
            observe(codes, True, tools=tools, system=True)
    calls = None
    if in_place:
        for codes in ("SU", "SUAU", "UASU", "SAU"):
            observe(codes, False)
    observe("AU", False)
    if "tools" in features and learner.template.call_style is not None:
        learner = Learner(learner.template, learner.bos, _how_results_stand(learner))
        calls = _learn_calls(learner, observe)
    thoughts = _learn_thoughts(learner, "tools" in features) if "thinking" in features else None
    if "thinking" in features:
        for codes in ("U", "UAU"):
            observe(codes, False, quiet=True)
    for item, system, tools, quiet in seen:
        if calls is not None and any(code in "CDQ" for code in item.codes):
            item = _without_first(item, calls)
        _collect(cells, item, Place("", system and not in_place, tools, quiet=quiet), system and in_place)
    tool_list = next((item.tool_list for item, *_ in seen if item.tool_list), None)
    learned = Learned(cells, in_place, None, tool_list, calls, learner.result, thoughts)
    return _with_default_system(learner, learned, "tools" in features)


def _system_in_place(learner: Learner) -> bool:
    """Whether a system prompt stands as a message of its own, in the middle of a conversation too."""
    try:
        middle, first = learner.see("UASU"), learner.see("SU")
    except (TemplateFailure, NotExpressed):
        return False
    return learner.template.system_role == "rendered" and middle.literals[3].strip() != "" and first.bodies[0] != ""


def _collect(cells: dict[str, dict[Place, str]], seen: _Seen, where: Place, system_first: bool) -> None:
    """Enter the literals of a conversation into the table.

    Raises:
        NotExpressed: another conversation has another literal in the same place.
    """
    codes, literals = list(seen.codes), list(seen.literals)
    if system_first:
        head, _, rest = literals[0].partition(SYSTEM)
        codes, literals = ["S", *codes], [head, rest, *literals[1:]]
    last = max((number for number, code in enumerate(codes) if code == "U"), default=0)
    before, asked = START, 0
    for number, literal in enumerate(literals):
        code = codes[number] if number < len(codes) else ""
        role = ROLES[code] if code else END
        place = replace(
            where,
            before=before,
            last=bool(code) and number >= last,
            call=code in ("C", "D", "B", "Q"),
            bare=code in ("C", "D", "Q"),
        )
        asked += code == "U"
        known = cells.setdefault(role, {}).setdefault(place, literal)
        if known != literal and code == "U":  # ChatGLM2 counts its rounds
            cells[role][place] = known = re.sub(r"(?<!\d)\d(?!\d)", ROUND, known)
            literal = re.sub(rf"(?<!\d){asked}(?!\d)", ROUND, literal)
        if known != literal:
            raise NotExpressed("what stands between two messages depends on how many came before")
        before = "call" if place.call else role


def _learn_calls(learner: Learner, observe: Callable[..., _Seen | None]) -> Calls:
    """How calls are written."""
    plain, one = learner.see("UAU", tools=True), observe("UCT", True, tools=True)
    assert one is not None
    body, style = one.bodies[1], one.style
    first = one.literals[1][len(shared_head([plain.literals[1], one.literals[1]])) :]
    for codes in ("UCT", "UCTAU", "UCTCT", "UCTCTAU", "UAUCT"):
        for system in (False, True):
            observe(codes, False, tools=True, system=system)
    between, gap = "", ""
    if beside := observe("UBT", False, tools=True):
        before = beside.bodies[1].removesuffix(body)
        if not before.startswith(CONTENT) or before == beside.bodies[1]:
            raise NotExpressed("a text beside calls changes how they are written")
        if not before.endswith(first):  # Llama 4 puts marks around the text, even around none
            first = shared_tail([before[1:], one.literals[1]])
        gap = before[1:].removesuffix(first)
    if two := observe("UDTT", False, tools=True):
        inside = two.bodies[1]
        if not (inside.startswith(body) and inside.endswith(body)):
            raise NotExpressed("several calls are not written alike")
        between = inside[len(body) : -len(body)]
    else:
        between = first
    return Calls(first, body, between, gap, style or STYLES[0])


def _without_first(seen: _Seen, calls: Calls) -> _Seen:
    """The literals before calls, less what begins the calls themselves."""
    literals = list(seen.literals)
    for number, code in enumerate(seen.codes):
        if code in "CDQ":
            if not literals[number].endswith(calls.first):
                raise NotExpressed("calls begin in different ways")
            literals[number] = literals[number].removesuffix(calls.first)
    return replace(seen, literals=literals)


def _how_results_stand(learner: Learner) -> Result:
    """Whether a tool's answer stands as it is. Its marks have no quotes, so the quotes around it are looked at here."""

    def shown(content: str) -> bool:
        messages, _ = learner._messages("UCT")
        messages[2] = messages[2].with_text(content)
        return content in learner.prompt(messages, [_probe_tool(1), _probe_tool(2)])

    text, data = shown('firefly "said"'), shown('{"firefly": "said"}')
    if text and data:
        return "raw"
    return "mixed" if data else "quoted"


def _learn_thoughts(learner: Learner, tools: bool) -> Thoughts | None:
    """What stands around the thoughts of earlier replies; None: the template writes none."""
    shapes: dict[str, tuple[str, str]] = {}
    traces: set[str] = set()
    for codes, plain_codes in (("URU", "UAU"), *([("UQT", "UCT")] if tools else [])):
        try:
            seen, plain = (learner.see(item, tools=tools) for item in (codes, plain_codes))
        except TemplateFailure:
            continue
        literal, body, usual = seen.literals[1], seen.bodies[1], plain.literals[1]
        if THOUGHT not in body:
            if not literal.startswith(usual):
                raise NotExpressed("a thought that is left out changes what stands before its reply")
            traces.add(literal[len(usual) :])
            continue
        opened = literal[len(usual) :] if body[0] == THOUGHT and literal.startswith(usual) else None
        if codes == "UQT":  # what begins the calls stands behind the thought
            shared = shared_head([literal, usual])
            opened, first = literal[len(shared) :], usual[len(shared) :]
            close = body[1:].removesuffix(plain.bodies[1]).removesuffix(first)
        else:
            close = body[1:].removesuffix(CONTENT)
        if opened is None:
            raise NotExpressed("a reply without a thought is written otherwise than one with a thought")
        shapes[codes] = opened, close
    if len(set(shapes.values())) > 1 or len(traces) > 1:
        raise NotExpressed("thoughts are written in several ways")
    if shapes:
        opened, close = next(iter(shapes.values()))
        if any(traces):
            raise NotExpressed("a thought that is left out leaves something in its place")
        return Thoughts(opened, close, "always" if "URU" in shapes else "last")
    if learner.template.folds_reasoning:
        return Thoughts("<think>\n", "\n</think>", "never", next(iter(traces), ""))
    return None


def _with_default_system(learner: Learner, learned: Learned, tools: bool) -> Learned:
    """Find what the template says without a system prompt, if a given system prompt takes its place exactly."""
    user = learned.cells["user"]
    if learned.system_in_place:
        behind = next((text for place, text in user.items() if place.before == "system" and not place.tools), None)
        head = next((text for place, text in learned.cells["system"].items() if place.before == START), "")
    else:
        given = next((text for place, text in user.items() if place.before == START and place.system), "")
        head, slot, tail = given.partition(SYSTEM)
        behind = tail if slot else None
    bare = user.get(Place(START, last=True))
    if behind is None or bare is None or not (bare.startswith(head) and bare.endswith(behind)):
        return learned
    default = bare[len(head) : len(bare) - len(behind)] if len(bare) > len(head) + len(behind) else ""
    if not default or default != default.strip() or not is_plain_text(default):
        return learned
    question = Message.of("user", "firefly-question")
    for functions in ((), (_probe_tool(1),)) if tools else ((),):
        try:
            with_it = learner.prompt([Message.of("system", default), question], functions)
        except TemplateFailure:  # SmolLM3 takes words out of a given one
            return learned
        if with_it != learner.prompt([question], functions):
            return learned
    cells = {
        role: {place: text for place, text in places.items() if not _lacks_system(place, role, learned)}
        for role, places in learned.cells.items()
    }
    return replace(learned, cells=cells, default_system=default)


def _lacks_system(place: Place, role: str, learned: Learned) -> bool:
    """Whether a place needs a request without any system prompt, which there is none once SYSTEM is set."""
    if learned.system_in_place:
        return place.before == START and role != "system"
    return not place.system and place.before == START
