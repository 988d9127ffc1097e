"""`firefly templates`: list, show, render, verify. The first three need no tokenizer and no heavy import."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from firefly.console import notice
from firefly.data.families import TEMPLATES, TemplateSpec, find_family
from firefly.data.templates import ChatTemplate, TemplateFailure, parse_date, read_template, unknown_template
from firefly.errors import UsageError


def describe_templates() -> list[dict[str, Any]]:
    """Every named template: `[{"name", "aliases", "stop_tokens", "prefix_stable"}, …]`."""
    return [
        {
            "name": name,
            "aliases": list(spec.aliases),
            "stop_tokens": list(spec.stop_tokens),
            "prefix_stable": spec.stable,
        }
        for name, spec in TEMPLATES.items()
    ]


def find_spec(name: str) -> TemplateSpec:
    """A template by name or alias.

    Raises:
        UsageError: there is none; the nearest is named.
    """
    spec = find_family(name)
    if spec is None:
        raise unknown_template(name)
    return spec


def read_request(source: str) -> dict[str, Any]:
    """`{"messages": […], …variables}` from a file, or from standard input for `-`.

    Raises:
        UsageError: no such file, no JSON, or no list of messages in it.
    """
    request: Any = None
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).expanduser().read_bytes()
        request = json.loads(data.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        problem = getattr(error, "strerror", None) or error
    else:
        messages = request.get("messages") if isinstance(request, dict) else None
        if not isinstance(messages, list) or not messages:
            problem = "messages"
        elif any(not isinstance(item, dict) or not isinstance(item.get("role"), str) for item in messages):
            problem = "role"
        else:
            problem = None
    if problem is not None:
        raise UsageError(
            "templates.not_messages",
            '{path} must hold {{"messages": [{{"role", "content"}}, …], …}} as JSON: {problem}.',
            path=source,
            problem=problem,
        )
    return request


def render_request(
    name: str, request: Mapping[str, Any], add_generation_prompt: bool, on_system: str = "merge"
) -> dict[str, Any]:
    """The official text of some messages: `{"text", "spans": [[start, end], …]}`, spans being what carries loss.

    Args:
        request: `messages`, and any variable the template reads; `bos_token` and `eos_token` are the family's own
            unless given, `template_date` (YYYY-MM-DD) fixes the day that a template prints.
        on_system: `merge` puts a system prompt that the template refuses into the first user turn.

    Raises:
        UsageError: unknown template, a date that is none, or the template refuses the messages.
    """
    spec = find_spec(name)
    given = {key: value for key, value in request.items() if key not in ("messages", "template_date")}
    tokens = {"bos_token": spec.bos or "", "eos_token": spec.eos or (spec.stop_tokens or ("</s>",))[0]}
    template = ChatTemplate(
        name=name,
        text=read_template(spec),
        stop_tokens=spec.stop_tokens or (tokens["eos_token"],),
        stop_ids=(),
        variables=tokens | {key: value for key, value in given.items() if value is not None},
        stable=spec.stable,
        date=parse_date(str(request["template_date"])) if request.get("template_date") else None,
    )
    messages = request["messages"]
    if on_system == "merge" and messages[0]["role"] == "system" and template.system_role == "refused":
        messages = merge_system(messages, name)
    try:
        text, spans = template.render_messages(messages, prompt=add_generation_prompt)
    except TemplateFailure as error:
        raise UsageError(
            "template.unusable",
            "template_name = {name} cannot be used: {problem}. Correct the template, or name another.",
            name=name,
            problem=error,
        ) from None
    return {"text": text, "spans": [list(span) for span in spans]}


def merge_system(messages: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The system prompt in front of the first user turn, a blank line between."""
    first, *rest = messages
    if not rest or rest[0]["role"] != "user":
        raise UsageError(
            "template.unusable",
            "template_name = {name} cannot be used: {problem}. Correct the template, or name another.",
            name=name,
            problem="system",
        )
    notice(
        "template.merges_system",
        "the chat template {name} has no system role; a system prompt is put in front of the first user turn "
        "(on_system: error refuses instead).",
        name=name,
    )
    return [{**rest[0], "content": f"{first.get('content')}\n\n{rest[0].get('content')}"}, *rest[1:]]
