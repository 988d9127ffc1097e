"""The JSON schema (draft 2020-12) of a run file, by which editors complete keys and forms are made."""

from __future__ import annotations

import ast
import inspect
from functools import cache
from itertools import pairwise
from typing import Any

from firefly.config import legacy, schema
from firefly.config.checking import run_file
from firefly.config.loading import REQUIRED, SCHEMA_KEY
from firefly.config.schema import only_with, own_fields
from firefly.config.training_arguments import FIELDS, training_fields
from firefly.translation import Phrase, chinese, language, translate

RUN_SECTION = "run"
"""The section of keys that are `Config`'s own."""


def json_schema() -> dict[str, Any]:
    """The schema of a run file, with descriptions in the user's language.

    `description` is in one language, as editors show it alone and whole. For whoever makes forms or pages, of our own
    keys `x-description` has both, `x-section` the part of a configuration that a key belongs to, and `x-only` the
    settings under which it is read, each with its values. transformers describes its keys in English only.
    """
    properties: dict[str, Any] = run_file().model_json_schema()["properties"]
    own = own_fields()
    for name, item in properties.items():
        item["title"] = name.replace("_", " ")
        if name in own:
            both = {spoken: describe(name, spoken) for spoken in ("en", "zh")}
            item |= {"description": both[language()], "x-description": both}
            item |= {"x-section": own[name][0] or RUN_SECTION, "x-only": only_with(name)}
            continue
        lines = [" ".join(training_fields()[name].metadata.get("help", "").replace("%%", "%").split())]
        treatment = FIELDS.get(name)
        if treatment and isinstance(treatment.by, Phrase):
            lines.append(translate(treatment.by.text, key=name, value="…"))
        elif treatment and treatment.how == "without effect":
            lines.append(translate("{key} has no effect: Firefly decides it by itself or has no use for it.", key=name))
        item["description"] = "\n".join(lines)
        if len(lines) > 1:
            item["doNotSuggest"] = True
    for name in REQUIRED:
        del properties[name]["default"]
    _add_older_spellings(properties)
    where = translate("Where this schema lies (a URL or a path), for editors; Firefly does not read it.")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Firefly",
        "description": translate("A run of Firefly: its own keys and those of transformers' TrainingArguments."),
        "type": "object",
        "properties": {SCHEMA_KEY: {"title": SCHEMA_KEY, "description": where, "type": "string"}} | properties,
        "required": list(REQUIRED),
        "additionalProperties": False,
    }


@cache
def descriptions() -> dict[str, str]:
    """Key → the text below its field, from the source: Python keeps it nowhere."""
    below: dict[tuple[str, str], str] = {}
    for section in (node for node in ast.parse(inspect.getsource(schema)).body if isinstance(node, ast.ClassDef)):
        for line, text in pairwise(section.body):
            if isinstance(line, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                below[section.name, ast.unparse(line.target)] = " ".join(str(text.value.value).split())
    classes = {None: "Config"} | {name: section.__name__ for name, section in schema.SECTIONS.items()}
    return {name: below[classes[section], spec.name] for name, (section, spec) in own_fields().items()}


def describe(name: str, spoken: str) -> str:
    """What one of our keys means, in English or Chinese, behind the tasks and modes that read it."""
    english = descriptions()[name]
    readers = [value for values in only_with(name).values() for value in values]
    if spoken == "zh":
        return "、".join(f"`{value}`" for value in readers) + ("：" if readers else "") + chinese()[english]
    return ", ".join(f"`{value}`" for value in readers) + (": " if readers else "") + english


def _add_older_spellings(properties: dict[str, Any]) -> None:
    """Deprecated keys and values that `legacy` translates or ignores."""

    def shape(name: str) -> dict[str, Any]:
        return {
            word: properties[name][word] for word in ("type", "enum", "anyOf", "minimum") if word in properties[name]
        }

    def deprecated(message: str) -> dict[str, Any]:
        return {"description": message, "deprecated": True, "deprecationMessage": message, "doNotSuggest": True}

    older = {
        old: shape(new) | deprecated(translate("{old} is read as {new}, its name today.", old=old, new=new))
        for old, new in legacy.RENAMED.items()
    }
    for old in legacy.IGNORED:
        older[old] = deprecated(translate("{old} has no effect any more and is ignored.", old=old))
    message = translate("{key} {old} is read as {new}.", key="adafactor", old=True, new='optim "adafactor"')
    older["adafactor"] = {"type": "boolean"} | deprecated(message)
    for name, item in older.items():
        properties.setdefault(name, {"title": name.replace("_", " ")} | item)
    properties["activation_checkpointing"] |= shape("gradient_checkpointing")
    values = [
        {"const": old} | deprecated(translate("{key} {old} is read as {new}.", key="optim", old=old, new=new))
        for old, new in legacy.OPTIMIZERS.items()
    ]
    properties["optim"]["anyOf"] = [{"enum": properties["optim"].pop("enum")}, *values]
