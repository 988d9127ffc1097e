"""Ollama's Modelfile, and the prompt that Ollama makes of one and a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from firefly.data.schema import Message
from firefly.export.go_template import GoTemplate, Struct

Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Modelfile:
    """What Ollama reads from a Modelfile; `parameters` are all but `stop`, as they are written."""

    source: str
    template: str
    system: str = ""
    adapter: str = ""
    stops: tuple[str, ...] = ()
    parameters: Mapping[str, str] = field(default_factory=dict)
    comments: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"# {' '.join(line.split())}" for line in self.comments]
        lines += [f"FROM {_value(self.source)}"]
        lines += [f"ADAPTER {_value(self.adapter)}"] * bool(self.adapter)
        lines += [f'TEMPLATE """{self.template}"""']
        lines += [f'SYSTEM """{self.system}"""'] * bool(self.system)
        lines += [f"PARAMETER stop {_value(stop)}" for stop in self.stops]
        lines += [f"PARAMETER {name} {_value(value)}" for name, value in self.parameters.items()]
        return "\n".join(lines) + "\n"


def _value(text: str) -> str:
    """A value that Ollama reads as `text`: its quotes know no escapes, and a value ends with its line."""
    if '"' in text or "\n" in text:
        return f'"""{text}"""'
    return f'"{text}"'


def read_modelfile(text: str) -> Modelfile:
    """Read a Modelfile as Ollama's parser does: the value of a command ends with the first line at whose end its quotes
    are closed, and what Go does not call printable is dropped.

    Raises:
        ValueError: it is none.
    """
    found: dict[str, list[str]] = {}
    parameters: dict[str, str] = {}
    stops: list[str] = []
    lines = iter(text.replace("\r\n", "\n").split("\n"))
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        command, _, value = line.strip().partition(" ")
        name = command.lower()
        if name not in ("from", "adapter", "template", "system", "parameter"):
            raise ValueError(f"unknown command {command!r}")
        if name == "parameter":
            name, _, value = value.strip().partition(" ")
        while (unquoted := _unquote(value.strip())) is None:
            following = next(lines, None)
            if following is None:
                raise ValueError(f"the value of {command} is not closed")
            value += "\n" + following
        kept = "".join(character for character in unquoted if character.isprintable() or character in "\n\t\r")
        if command.lower() != "parameter":
            found.setdefault(name, []).append(kept)
        elif name == "stop":
            stops.append(kept)
        else:
            parameters[name] = kept
    if len(found.get("from", ())) != 1:
        raise ValueError("there is not one FROM")
    (source,) = found["from"]
    template, system, adapter = (found.get(name, [""])[-1] for name in ("template", "system", "adapter"))
    return Modelfile(source, template, system, adapter, tuple(stops), parameters)


def _unquote(value: str) -> str | None:
    """The value inside its quotes; None while they are open."""
    for quotes in ('"""', '"'):
        if value.startswith(quotes):
            closed = len(value) >= 2 * len(quotes) and value.endswith(quotes)
            return value[len(quotes) : -len(quotes)] if closed else None
    return value


# ---- how Ollama renders it


def render(
    modelfile: Modelfile,
    template: GoTemplate,
    messages: Sequence[Message],
    tools: Tools = (),
    think: bool | None = None,
) -> str:
    """The prompt that Ollama makes of a request: SYSTEM in front of one that brings no system prompt of its own,
    neighbours of one role joined, and the rest as `ollama_template` says.

    Raises:
        GoTemplateError: Ollama would answer with an error.
    """
    given = list(messages)
    if modelfile.system and given[0].role != "system":
        given.insert(0, Message.of("system", modelfile.system))
    joined: list[Message] = []
    for item in given:
        if joined and joined[-1].role == item.role != "tool":
            both = f"{joined[-1].text}\n\n{item.text}"
            joined[-1] = joined[-1].with_text(both)
        else:
            joined.append(item)
    return template.execute(
        {
            "System": "\n\n".join(item.text for item in given if item.role == "system"),
            "Messages": [_message(item) for item in joined],
            "Tools": [_tool(tool["function"]) for tool in tools] or None,
            "Response": "",
            "Think": bool(think),
            "IsThinkSet": think is not None,
        }
    )


def _message(item: Message) -> Struct:
    calls = [
        Struct(
            {
                "ID": call.get("id") or "",
                "Function": Struct(
                    {
                        "Index": number,
                        "Name": call["function"]["name"],
                        "Arguments": dict(call["function"]["arguments"]),
                    }
                ),
            }
        )
        for number, call in enumerate(item.tool_calls)
    ]
    fields = {
        "Role": item.role,
        "Content": item.text,
        "Thinking": item.reasoning or "",
        "ToolCalls": calls,
        "ToolName": item.name or "",
        "ToolCallID": item.tool_call_id or "",
    }
    return Struct(fields)


def _tool(function: Mapping[str, Any]) -> Struct:
    """A function as Ollama's structs keep it: what they have no field for is gone before a template sees it."""
    schema = function.get("parameters") or {}
    properties = {name: _property(item) for name, item in (schema.get("properties") or {}).items()}
    parameters = {
        "Type": schema.get("type", ""),
        "Required": list(schema.get("required") or []),
        "Properties": properties,
    }
    described = {
        "Name": function["name"],
        "Description": function.get("description") or "",
        "Parameters": Struct(parameters),
    }
    return Struct({"Type": "function", "Function": Struct(described)})


def _property(schema: Mapping[str, Any]) -> Struct:
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else list(kinds or [])
    fields = {
        "Type": kinds[0] if len(kinds) == 1 else kinds,
        "Items": schema.get("items"),
        "Description": schema.get("description") or "",
        "Enum": list(schema.get("enum") or []),
    }
    members = [
        ("anyOf", [_property(item) for item in schema.get("anyOf") or []]),
        ("type", fields["Type"]),
        ("items", fields["Items"]),
        ("description", fields["Description"]),
        ("enum", fields["Enum"]),
        ("properties", {name: _property(item) for name, item in (schema.get("properties") or {}).items()}),
        ("required", list(schema.get("required") or [])),
    ]
    return Struct(fields, tuple((name, value) for name, value in members if value not in (None, "", [], {})))
