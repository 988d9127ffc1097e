"""Tool calls as chat templates want them: what one family takes as an object, another takes as text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

CallStyle = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
"""Rewrites messages that hold tool calls for one kind of template."""

PROBE_CALL: list[dict[str, Any]] = [
    {"role": "user", "content": "?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "type": "function",
                "function": {"name": "firefly_call", "arguments": {"firefly_key": "firefly-value"}},
            }
        ],
    },
]


def _styled(
    messages: list[dict[str, Any]], *, text: bool, null: bool, name_call: Callable[[Any, int], str] | None
) -> list[dict[str, Any]]:
    """Tool calls with arguments as JSON text, with null for no content, with identifiers as a template wants them."""
    styled, names = [], list[str]()
    given: dict[str | None, str] = {}
    answered = 0
    for item in messages:
        if "tool_calls" in item:
            calls = []
            for call in item["tool_calls"]:
                function = dict(call["function"])
                if text:
                    function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
                changed = {**call, "function": function}
                if name_call:
                    changed["id"] = name_call(call, len(names))
                    names.append(changed["id"])
                    if call.get("id") is not None:
                        given[call["id"]] = changed["id"]
                calls.append(changed)
            item = {**item, "tool_calls": calls, "content": None if null and not item["content"] else item["content"]}
        elif name_call and item["role"] == "tool":
            in_order = names[answered] if answered < len(names) else name_call({"function": {"name": "?"}}, answered)
            item = {**item, "tool_call_id": given.get(item.get("tool_call_id"), in_order)}
            answered += 1
        styled.append(item)
    return styled


def _nine_characters(call: Mapping[str, Any], number: int) -> str:
    """What Mistral's templates ask of a call's identifier."""
    identifier = call.get("id")
    if identifier is None:
        return f"call{number:05d}"
    if len(identifier) == 9 and identifier.isalnum():
        return identifier
    return hashlib.sha256(identifier.encode("utf-8", "replace")).hexdigest()[:9]


def _named(call: Mapping[str, Any], number: int) -> str:
    """Kimi's identifiers say which function is called."""
    return f"functions.{call['function']['name']}:{number}"


def _style(**choices: Any) -> CallStyle:
    return lambda messages: _styled(messages, **choices)


CALL_STYLES = [
    _style(text=text, null=null, name_call=name_call)
    for name_call in (None, _nine_characters, _named)
    for null in (False, True)
    for text in (False, True)
]
