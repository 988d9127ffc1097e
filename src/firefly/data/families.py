"""The named chat templates: a file each, and what the text alone does not say (chat_templates/families.toml).

A name means its family's official wording, default system prompt included. A new family is one .jinja file and one
entry there.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

TEMPLATE_FOLDER = Path(__file__).parent / "chat_templates"


@dataclass(frozen=True)
class TemplateSpec:
    """A named template.

    Attributes:
        file: the Jinja file in chat_templates/; by default the one of the template's name.
        stop_tokens: the tokens that end a reply, the one that is trained first; none: the tokenizer's EOS.
        aliases: further names.
        stable: a longer conversation's text continues a shorter one's. Where it does not (thinking of earlier turns is
            dropped, the last turn ends differently), each reply is trained in an example of its own.
        bos, eos: the tokens that the family's own tokenizer begins and ends a text with, for rendering without one.
        preset: Jinja in front of the file's text: a variable that this name sets and the family leaves open.
    """

    file: str
    stop_tokens: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    stable: bool = True
    bos: str | None = None
    eos: str | None = None
    preset: str = ""


def _read_families() -> dict[str, TemplateSpec]:
    entries = tomllib.loads((TEMPLATE_FOLDER / "families.toml").read_text(encoding="utf-8"))
    families = {}
    for name, entry in entries.items():
        tuples = {key: tuple(entry[key]) for key in ("stop_tokens", "aliases") if key in entry}
        families[name] = TemplateSpec(**{"file": f"{name}.jinja", **entry, **tuples})
    return families


TEMPLATES = _read_families()
"""Primary name to template; aliases are looked up by `find_family`."""


def find_family(name: str) -> TemplateSpec | None:
    """The template of a name or an alias; None if there is none."""
    return _BY_NAME.get(name)


def family_names() -> list[str]:
    """Every name and alias, in the order of the table."""
    return list(_BY_NAME)


_BY_NAME = {alias: spec for name, spec in TEMPLATES.items() for alias in (name, *spec.aliases)}
