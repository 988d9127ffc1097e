"""Writing what was learned of a chat template as Go's text/template, as Ollama takes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from firefly.export.ollama_template import (
    ARGUMENTS,
    CALL_ID,
    END,
    LAST_ID,
    LAST_NAME,
    NAME,
    RESULT_ID,
    RESULT_NAME,
    ROUND,
    START,
    STYLES,
    SYSTEM,
    TOOLS,
    Learned,
    NotExpressed,
    Place,
    ToolList,
    shared_head,
    shared_tail,
)
from firefly.generation.replies.markers import split_atoms

CONDITIONS = {
    "call": "gt (len .ToolCalls) 0",  # not `if .ToolCalls`, which Ollama takes for the place of the calls themselves
    "bare": "not .Content",
    "tools": "$.Tools",
    "system": "$.System",
    "last": "ge $i $last",
    "quiet": "and $.IsThinkSet (not $.Think)",
}


class Writer:
    """Go template text. Literals stand as they are; what its syntax or a Modelfile would change stands in a string."""

    def __init__(self) -> None:
        self._parts: list[str] = []

    def text(self, literal: str, slots: Mapping[str, str] | None = None) -> None:
        """A literal, with actions in place of its slots."""
        plain: list[str] = []
        for character in literal:
            if slots and character in slots:
                self._plain("".join(plain))
                self._parts.append(slots[character])
                plain = []
            elif 0xF0B00 <= ord(character) <= 0xF0B12:
                raise NotExpressed("a part of a message stands where Ollama cannot write it")
            else:
                plain.append(character)
        self._plain("".join(plain))

    def _plain(self, literal: str) -> None:
        position = 0
        while position < len(literal):
            end = position
            while end < len(literal) and not _needs_string(literal, end):
                end += 1
            self._parts.append(literal[position:end])
            if end < len(literal):
                length = 2 if literal.startswith("{{", end) else 3 if literal.startswith('"""', end) else 1
                self._parts.append(f"{{{{ {go_string(literal[end : end + length])} }}}}")
                end += length
            position = end

    def action(self, action: str) -> None:
        """A branch, a loop or an assignment, on a line of its own where the white space around it is not the text's."""
        written = "".join(self._parts[-1:])
        if written and written[-1].isspace():
            self._parts.append(f"{{{{ {action} }}}}")
        else:
            self._parts.append(f"\n{{{{- {action} }}}}" if self._parts else f"{{{{- {action} }}}}")

    def inline(self, action: str) -> None:
        """What prints a value."""
        self._parts.append(f"{{{{ {action} }}}}")

    def raw(self, text: str) -> None:
        """Template text that is written already."""
        self._parts.append(text)

    def __str__(self) -> str:
        return "".join(self._parts)


def _needs_string(text: str, at: int) -> bool:
    character = text[at]
    if text.startswith(("{{", '"""'), at) or (character == "{" and at == len(text) - 1):
        return True
    return not (character.isprintable() or character in "\n\t")


def go_string(text: str) -> str:
    """A text as a Go string literal in which a Modelfile's parser changes nothing."""
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return '"' + "".join(escapes.get(c) or (c if c.isprintable() else f"\\U{ord(c):08x}") for c in text) + '"'


Options = tuple[tuple[Place, str], ...]


@lru_cache(maxsize=4096)  # cuts and orders of conditions that are tried lead to the same options again and again
def _choose(options: Options, left: tuple[str, ...]) -> list[Any]:
    """Texts and branches ("if", [(condition, inner), …], otherwise) that write each option's literal in its place.

    Raises:
        NotExpressed: places that nothing tells apart have different literals.
    """
    literals = [literal for _, literal in options]
    if len(set(literals)) == 1:
        return [literals[0]] if literals[0] else []
    head = shared_head(literals)
    tail = shared_tail([literal[len(head) :] for literal in literals])
    inner = tuple((place, literal[len(head) : len(literal) - len(tail)]) for place, literal in options)
    best: list[Any] | None = None
    for name in left:
        groups: dict[Any, list[tuple[Place, str]]] = {}
        for place, literal in inner:
            groups.setdefault(getattr(place, name), []).append((place, literal))
        if len(groups) < 2:
            continue
        rest = tuple(other for other in left if other != name)
        try:
            branch = _branch(name, {value: _choose(tuple(items), rest) for value, items in groups.items()})
        except NotExpressed:
            continue
        if best is None or _size(branch) < _size(best):
            best = branch
    if best is None:
        raise NotExpressed("what stands between two messages depends on more than Ollama tells a template")
    return [*([head] if head else []), *best, *([tail] if tail else [])]


def _branch(name: str, groups: Mapping[Any, list[Any]]) -> list[Any]:
    if name != "before":
        return [("if", [(CONDITIONS[name], groups[True])], groups[False])]
    merged: list[tuple[list[str], list[Any]]] = []
    for value, inner in groups.items():
        for values, other in merged:
            if other == inner:
                values.append(value)
                break
        else:
            merged.append(([value], inner))
    if len(merged) == 1:
        return merged[0][1]
    # What was not seen (a message behind another that probes lack) is written as most others are.
    otherwise = max(merged, key=lambda item: ("assistant" in item[0], START not in item[0], len(item[0])))
    chosen = [
        (f"eq $before {' '.join(json.dumps(value) for value in values)}", inner)
        for values, inner in merged
        if values is not otherwise[0]
    ]
    return [("if", chosen, otherwise[1])]


def _size(nodes: Sequence[Any]) -> int:
    return sum(
        len(node) if isinstance(node, str) else 30 + _size(node[2]) + sum(20 + _size(inner) for _, inner in node[1])
        for node in nodes
    )


def _names_in(nodes: Sequence[Any]) -> str:
    """All conditions of a choice, as one text."""
    return " ".join(
        node if isinstance(node, str) else " ".join([_names_in(node[2]), *(c + _names_in(i) for c, i in node[1])])
        for node in nodes
        if not isinstance(node, str)
    )


Cells = Mapping[str, Mapping[Place, str]]


def _choices(cells: Cells, suffixes: Mapping[str, str]) -> dict[str, list[Any]]:
    """What stands before a message of each role, less what was written behind the one before it."""
    return {
        role: _choose(
            tuple((place, literal.removeprefix(suffixes.get(place.before, ""))) for place, literal in places.items()),
            ("quiet", "tools", "system", "call", "bare", "last", "before"),
        )
        for role, places in cells.items()
    }


def _split_turns(cells: Cells) -> tuple[dict[str, str], dict[str, list[Any]]]:
    """What is written behind a message whatever follows, and what is written before one.

    Rendering does not say where a turn ends and the next begins. Of all cuts the one that makes the shortest template
    is taken: it is the one that a person would write.
    """
    literals: dict[str, list[str]] = {}
    for places in cells.values():
        for place, literal in places.items():
            literals.setdefault(place.before, []).append(literal)
    cuts: dict[str, list[str]] = {}
    for before, texts in literals.items():
        atoms = split_atoms(shared_head(texts)) if before != START else ()
        cuts[before] = ["".join(atoms[:number]) for number in range(len(atoms) + 1)]
    # A question is followed by nothing but a reply. Where the reply's header were written with the question, a
    # conversation that Ollama has cut down to begin with a reply would have none.
    cuts["user"] = [cut for cut in cuts["user"] if cut in cuts.get("assistant", ()) and (cut.strip() or not cut)]

    def size(suffixes: Mapping[str, str]) -> int:
        nodes = [node for choice in _choices(cells, suffixes).values() for node in choice]
        differs = 40 * (suffixes.get("call", suffixes.get("assistant")) != suffixes.get("assistant"))
        return _size(nodes) + sum(map(len, suffixes.values())) + differs

    ends = sorted({cut for texts in cuts.values() for cut in texts})
    starts = [{before: end if end in texts else "" for before, texts in cuts.items()} for end in ends]
    best = min(starts, key=size)
    for before, texts in cuts.items():
        best = min(({**best, before: cut} for cut in texts), key=size)
    # Only results follow calls in the probes, so their header would seem to belong to the calls.
    end = best.get("assistant", "")
    closed = [cut for cut in cuts.get("call", ()) if end.strip() and cut.endswith(end)]
    if closed:
        best["call"] = min(closed, key=len)
    return best, _choices(cells, best)


def write_template(learned: Learned) -> str:
    """The TEMPLATE of what was learned.

    Raises:
        NotExpressed: it cannot be written.
    """
    suffixes, choices = _split_turns(learned.cells)
    named = " ".join(map(_names_in, choices.values()))
    writer = Writer()
    slots = {
        SYSTEM: "{{ $.System }}",
        RESULT_ID: "{{ .ToolCallID }}",
        RESULT_NAME: "{{ .ToolName }}",
        ROUND: "{{ len $round }}",
    }
    if learned.tool_list is not None:
        slots[TOOLS] = _tool_list(learned.tool_list)
        _define_json(writer, learned)
    only_last = learned.thoughts is not None and learned.thoughts.shown == "last"
    if "$last" in named or only_last:
        for action in ("$last := -1", "range $i, $_ := .Messages", 'if eq .Role "user"', "$last = $i", "end", "end"):
            writer.action(action)
    counts = any(ROUND in literal for places in learned.cells.values() for literal in places.values())
    if counts:
        writer.action('$round := ""')
    tracks = "$before" in named
    if tracks:
        writer.action('$before := ""')
    writer.action("range $i, $_ := .Messages")
    word = "if"
    for role in ("system", "user", "assistant", "tool"):
        if role not in choices:
            continue
        writer.action(f'{word} eq .Role "{role}"')
        word = "else if"
        if counts and role == "user":  # no function adds, but `len` counts
            writer.action('$round = printf "%s." $round')
        _write_nodes(writer, choices[role], slots)
        _write_body(writer, role, learned)
        if role == "assistant" and suffixes.get("call", suffixes.get(role)) != suffixes.get(role):
            writer.action(f"if {CONDITIONS['call']}")
            writer.text(suffixes["call"])
            writer.action("else")
            writer.text(suffixes[role])
            writer.action("end")
        else:
            behind = {LAST_ID: "{{ .ToolCallID }}", LAST_NAME: "{{ .ToolName }}"}
            writer.text(suffixes.get(role, ""), behind)
        if tracks and role == "assistant" and learned.calls is not None:
            for action in (f"if {CONDITIONS['call']}", '$before = "call"', "else", '$before = "assistant"', "end"):
                writer.action(action)
        elif tracks:
            writer.action(f'$before = "{role}"')
    writer.action("end")
    writer.action("end")
    _write_nodes(writer, choices[END], slots)
    return str(writer)


def _write_nodes(writer: Writer, nodes: Sequence[Any], slots: Mapping[str, str]) -> None:
    for node in nodes:
        if isinstance(node, str):
            writer.text(node, slots)
            continue
        _, branches, otherwise = node
        for number, (condition, inner) in enumerate(branches):
            writer.action(f"{'else if' if number else 'if'} {condition}")
            _write_nodes(writer, inner, slots)
        if otherwise:
            writer.action("else")
            _write_nodes(writer, otherwise, slots)
        writer.action("end")


def _write_body(writer: Writer, role: str, learned: Learned) -> None:
    thoughts, calls = learned.thoughts, learned.calls
    if role == "tool" and learned.result != "raw":
        if learned.result == "mixed":  # JSON stands as it is; no function of Ollama's parses, but `%.1s` cuts
            writer.action('if eq (printf "%.1s" .Content) "{" "["')
            writer.inline(".Content")
            writer.action("else")
        writer.inline('template "text" .Content')
        if learned.result == "mixed":
            writer.action("end")
        return
    if role != "assistant":
        writer.inline(".Content")
        return
    if thoughts is not None:
        if thoughts.trace:
            writer.action("if .Thinking")
            writer.text(thoughts.trace)
            writer.action("end")
        # One that is never shown tells Ollama how the model marks its thoughts, which it keeps apart then.
        shown = {"always": ".Thinking", "last": "and .Thinking (ge $i $last)", "never": "and .Thinking (not .Role)"}
        writer.action(f"if {shown[thoughts.shown]}")
        writer.text(thoughts.open)
        writer.inline(".Thinking")
        writer.text(thoughts.close)
        writer.action("end")
    writer.inline(".Content")
    if calls is None:
        return
    if calls.gap:
        writer.action(f"if and .Content ({CONDITIONS['call']})")
        writer.text(calls.gap)
        writer.action("end")
    slots = {
        NAME: "{{ .Function.Name }}",
        CALL_ID: "{{ .ID }}",
        ARGUMENTS: '{{ template "object" .Function.Arguments }}',
    }
    writer.action("if .ToolCalls")
    writer.action("range $j, $_ := .ToolCalls")
    writer.action("if eq $j 0")
    writer.text(calls.first)
    writer.action("else")
    writer.text(calls.between)
    writer.action("end")
    writer.text(calls.body, slots)
    writer.action("end")
    writer.action("end")


# ---- JSON as Python writes it, with what Ollama's templates have


def _define_json(writer: Writer, learned: Learned) -> None:
    """`define`s that write JSON with the spaces of the trained text.

    A text is written by `json`, which escapes `<`, `>` and `&`, or by `%q`, which escapes what does not print (the
    ideographic space): the shorter one has escaped nothing that stands as it is in the trained text.
    """
    assert learned.tool_list is not None
    style = learned.calls.style if learned.calls else STYLES[0]
    if style[0] is not None:
        raise NotExpressed("arguments are written on several lines")
    _, item, key = style
    parts = {
        "text": (
            '{{ $json := json . }}{{ $quoted := printf "%q" . }}'
            "{{ if lt (len $quoted) (len $json) }}{{ $quoted }}{{ else }}{{ $json }}{{ end }}"
        ),
        "value": (
            '{{ $type := printf "%T" . }}'
            '{{ if eq $type "map[string]interface {}" }}{{ template "object" . }}'
            '{{ else if eq $type "[]interface {}" }}{{ template "list" . }}'
            '{{ else if eq $type "string" }}{{ template "text" . }}{{ else }}{{ json . }}{{ end }}'
        ),
        "list": (
            '[{{ $between := "" }}{{ range . }}{{ $between }}{{ template "value" . }}'
            f"{{{{ $between = {go_string(item)} }}}}{{{{ end }}}}]"
        ),
        "object": (
            '{{ "{" }}{{ $between := "" }}{{ range $key, $value := . }}{{ $between }}{{ template "text" $key }}'
            f'{key}{{{{ template "value" $value }}}}{{{{ $between = {go_string(item)} }}}}{{{{ end }}}}}}'
        ),
        "tool": _tool(learned.tool_list),
    }
    for name, text in parts.items():
        writer.action(f'define "{name}"')
        writer.raw(text)
        writer.inline("end")


def _tool_list(tools: ToolList) -> str:
    writer = Writer()
    writer.inline("range $j, $_ := $.Tools")
    if tools.between:
        writer.inline("if $j")
        writer.text(tools.between)
        writer.inline("end")
    writer.inline('template "tool" .')
    writer.inline("end")
    return str(writer)


def _tool(tools: ToolList) -> str:
    """What writes one function: its keys in the order of OpenAI's documentation, of properties in the alphabet's."""
    indent, comma, colon = tools.style
    deepest = 5 if tools.whole else 4  # of the members of a property

    def line(depth: int) -> str:
        return "" if indent is None else "\n" + " " * (indent * (depth - 5 + deepest + tools.depth))

    def key(name: str) -> str:
        return f'"{name}"{colon}'

    def act(action: str) -> str:
        return "{{ " + action + " }}"

    def spread(source: str, depth: int) -> str:
        """A list of values."""
        item = act("$comma") + line(depth + 1) + act('template "value" .') + act(f"$comma = {go_string(comma)}")
        return "[" + act('$comma := ""') + act(f"range {source}") + item + act("end") + line(depth) + "]"

    # A property that has more than these members is written whole, if not with the same spaces: nothing is dropped.
    simple = act('$plain := printf "{\\"type\\":%s" (json $property.Type)')
    members = [line(5) + key("type") + act("json $property.Type")]
    for name, value in (
        ("Description", act('template "text" $property.Description')),
        ("Enum", spread("$property.Enum", 5)),
        ("Items", act('template "value" $property.Items')),
    ):
        members += act(f"if $property.{name}"), comma + line(5) + key(name.lower()) + value, act("end")
    for name in ("Items", "Description", "Enum"):  # in the order of Ollama's struct
        form = go_string(f'%s,"{name.lower()}":%s')
        simple += (
            act(f"if $property.{name}") + act(f"$plain = printf {form} $plain (json $property.{name})") + act("end")
        )
    written = act("json $property")
    members = [act('"{"'), *members, line(4), "}"]
    properties = [
        act('$between := ""') + act("range $name, $property := .Function.Parameters.Properties"),
        act("$between") + line(4) + act('template "text" $name') + colon,
        simple + act('if eq (json $property) (printf "%s}" $plain)') + "".join(members) + act("else") + written,
        act("end") + act(f"$between = {go_string(comma)}") + act("end") + line(3),
    ]
    required = comma + line(3) + key("required") + spread(".Function.Parameters.Required", 3)
    parameters = [
        act('"{"') + line(3) + key("type") + act("json .Function.Parameters.Type"),
        comma + line(3) + key("properties") + act('"{"') + "".join(properties) + "}",
        act("if .Function.Parameters.Required") + required + act("end") + line(2) + "}",
    ]
    description = f'"{act(".Function.Description")}"' if tools.raw else act('template "text" .Function.Description')
    described = comma + line(2) + key("description") + description
    function = [
        act('"{"') + line(2) + key("name") + act('template "text" .Function.Name'),
        act("if .Function.Description") + described + act("end"),
        comma + line(2) + key("parameters") + "".join(parameters) + line(1) + "}",
    ]
    if not tools.whole:
        return "".join(function)
    head = act('"{"') + line(1) + key("type") + act("json .Type") + comma + line(1) + key("function")
    return head + "".join(function) + line(0) + "}"
