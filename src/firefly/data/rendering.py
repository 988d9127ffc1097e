"""Jinja as transformers and vLLM run it for chat templates, with the spans of `{% generation %}` marks.

The environment is the one of `transformers.apply_chat_template` (sandboxed, trim_blocks, lstrip_blocks, loop controls,
`tojson` without HTML escapes, `raise_exception`, `strftime_now`), without the import of transformers: rendering is the
inner loop of data preparation. A test holds the two equal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""What marks the borders of a trained span while a template renders. Unicode sets these two aside as noncharacters, for
use inside a program, so they stand in no text that is meant to be exchanged."""
BREAK = "\U000f5a1f"
"""The private-use character put inside typed special-looking text while a template renders."""


class ReservedCharacter(ValueError):
    """The input holds one of the two noncharacters that mark spans."""


def render_chat(
    template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], *, prompt: bool
) -> tuple[str, list[tuple[int, int]]]:
    """Render one conversation.

    Args:
        template: Jinja text, with or without `{% generation %}` marks.
        messages: dictionaries as chat templates take them.
        variables: everything else the template may read: `bos_token`, `tools`, `date_string`, …
        prompt: whether the generation prompt follows (`add_generation_prompt`).

    Returns:
        The text, and the character spans that its marks enclose, in order.

    Raises:
        ReservedCharacter: a border of a span cannot be distinguished from the input.
        jinja2.TemplateError and anything else a template, which is a program from outside, may raise.
    """
    for message in messages:
        for value in message.values():
            if isinstance(value, str) and (OPEN in value or CLOSE in value):
                raise ReservedCharacter
    compiled, names = _compiled(template)
    values = {**names, **variables, "messages": messages, "add_generation_prompt": prompt}
    # What Template.render does, less the copying of Jinja's own names for every text, which took half the time.
    context = compiled.environment.context_class(compiled.environment, values, compiled.name, compiled.blocks)
    marked = "".join(compiled.root_render_func(context))
    if OPEN not in marked and CLOSE not in marked:
        return marked, []
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    position = 0
    start: int | None = None
    for piece in _split_borders(marked):
        if piece == OPEN and start is None:
            start = position
        elif piece == CLOSE and start is not None:
            spans.append((start, position))
            start = None
        elif piece in (OPEN, CLOSE):
            raise ReservedCharacter
        else:
            pieces.append(piece)
            position += len(piece)
    if start is not None:
        raise ReservedCharacter
    return "".join(pieces), spans


def _split_borders(text: str) -> list[str]:
    """Split at OPEN and CLOSE, keeping them; a regular expression would take ten times as long."""
    pieces: list[str] = []
    for number, part in enumerate(text.split(OPEN)):
        if number:
            pieces.append(OPEN)
        first, *rest = part.split(CLOSE)
        pieces.append(first)
        for piece in rest:
            pieces += CLOSE, piece
    return pieces


@lru_cache(maxsize=64)
def _compiled(template: str) -> tuple[jinja2.Template, dict[str, Any]]:
    """A compiled chat template, and the names that every text of it knows.

    Raises:
        jinja2.TemplateSyntaxError: it is no Jinja.
    """
    compiled = _environment().from_string(template)
    return compiled, {**compiled.globals, "tools": None, "documents": None}


class GenerationMarks(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: its body, between OPEN and CLOSE."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        opened, closed = (nodes.Output([nodes.TemplateData(mark)]) for mark in (OPEN, CLOSE))
        # A scope of its own: what is set inside is not seen outside, as in transformers.
        return nodes.Scope([opened, *body, closed], lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """A namespace without underscored names, which reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` stays free as the name of a value
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not hold the name {name!r}")


class _Dict:
    """`dict(…)` in a template, without the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a short way to what templates read most: keys of messages, and the state of a loop."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict and attribute in obj and attribute not in NAMES_OF_DICT:
            return obj[attribute]
        if kind is LoopContext and attribute in NAMES_OF_LOOP:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)


NAMES_OF_DICT = frozenset(dir(dict))
NAMES_OF_LOOP = frozenset(("first", "last", "index", "index0", "length", "previtem", "nextitem"))


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationMarks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    environment.globals.update(functions)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
