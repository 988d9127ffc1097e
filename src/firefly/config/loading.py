"""From a file and its overrides to one frozen, checked `Config`.

A run file is one flat object in JSON or YAML. Its keys are Firefly's own (`schema`) and every field of transformers'
`TrainingArguments`. Anything else is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from firefly.config import legacy, rules
from firefly.config.checking import check_values, missing_key, refuse_unknown, run_file
from firefly.config.schema import SECTIONS, Config, ReadOnly, own_fields
from firefly.config.training_arguments import TRAINING_DEFAULTS
from firefly.console import notice, take_notices
from firefly.errors import UsageError

REQUIRED = ("output_dir", "model_name_or_path", "train_file")

SCHEMA_KEY = "$schema"
"""Where a file names the JSON schema by which editors complete its keys; loading has no use for it."""


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    required: tuple[str, ...] = REQUIRED,
    to_train: bool = True,
) -> Config:
    """Read a configuration file (or a mapping), apply overrides, check everything, return a frozen `Config`.

    Args:
        required: keys that must be there; a command that does not train needs fewer.
        to_train: refuse what this version cannot train yet.

    Raises:
        UsageError: unreadable file, unknown key, wrong type or value, missing required key, or a feature that
            this version does not have.
    """
    if to_train:
        take_notices()  # a run that was refused leaves its own behind
    file = dict(source) if isinstance(source, Mapping) else read_config_file(Path(source))
    overrides = dict(overrides or {})
    known = run_file().model_fields.keys()
    # Each in today's spelling first: an override wins under whichever name the file has the key.
    values = legacy.translate(file, known, notice) | legacy.translate(overrides, known, notice)
    values.pop(SCHEMA_KEY, None)
    refuse_unknown(values)
    own = own_fields()
    for name, value in values.items():  # files of upstream write "" for what is not said
        if value == "" and name in own and (own[name][1].default is None or name == "template_name"):
            values[name] = own[name][1].default
    missing = [name for name in required if not values.get(name)]
    if missing:
        raise missing_key(*missing)
    overridden = set(map(legacy.current_name, overrides))
    given = {name: value for name, value in file.items() if legacy.current_name(name) not in overridden} | overrides
    checked = check_values(values)
    parts: dict[str | None, dict[str, Any]] = {name: {} for name in (None, *SECTIONS)}
    for name, (section, spec) in own.items():
        if name in checked:
            parts[section][spec.name] = checked.pop(name)
    config = Config(
        **parts[None],
        **{name: section(**parts[name]) for name, section in SECTIONS.items()},
        training=TRAINING_DEFAULTS | checked,
        given=ReadOnly(given),
    )
    rules.check_together(config)
    config = dataclasses.replace(config, training=ReadOnly(rules.evaluated_training(config)))
    if to_train:
        rules.refuse_what_is_not_done(config)
        rules.check_preference(config)
        rules.note_unused(config, values)
    return config


def read_config_file(path: Path) -> dict[str, Any]:
    """Read one flat JSON or YAML object; duplicate and nested surprises are named with file and line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = (_parse_yaml if path.suffix.lower() in (".yaml", ".yml") else _parse_json)(path, text)
    except FileNotFoundError:
        raise UsageError("config.no_file", "configuration file {path} does not exist.", path=path) from None
    except (OSError, ValueError, RecursionError) as error:  # or a number of thousands of digits, a date that is none
        problem = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UsageError(
            "config.unreadable", "cannot read configuration {path}: {problem}.", path=path, problem=problem
        ) from None
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise UsageError(
            "config.not_an_object", '{path} must hold one object of keys and values: {{"key": value, …}}.', path=path
        )
    return value


def _parse_json(path: Path, text: str) -> Any:
    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in pairs:
            if name in result:
                places = [match.start() for match in re.finditer(re.escape(json.dumps(name)) + r"\s*:", text)]
                raise _twice(path, text.count("\n", 0, places[-1] if places else 0) + 1, name)
            result[name] = value
        return result

    try:
        return json.loads(text, object_pairs_hook=build)
    except json.JSONDecodeError as error:
        raise _syntax(path, error.lineno, error.msg) from None


def _parse_yaml(path: Path, text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML's own loader lets the last of two equal keys win in silence."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names: set[str] = set()
            for name_node, _ in node.value:
                name = str(name_node.value)
                if name in names:
                    raise _twice(path, name_node.start_mark.line + 1, name)
                names.add(name)
            return super().construct_mapping(node, deep)

    # A date stays the text that it is.
    Loader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_scalar)
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise _syntax(path, mark.line + 1 if mark else 1, getattr(error, "problem", None) or error) from None


def _twice(path: Path, line: int, name: str) -> UsageError:
    text = "{path}:{line}: duplicate key {key!r}. Keep one."
    return UsageError("config.duplicate_key", text, path=path, line=line, key=name)


def _syntax(path: Path, line: int, problem: object) -> UsageError:
    text = "{path}:{line}: the configuration is not valid: {problem}. Correct the syntax near this line."
    return UsageError("config.bad_json", text, path=path, line=line, problem=problem)


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """Turn `--key value`, `--key=value` and bare `--flag` into a mapping; what is plainly JSON is read as JSON."""
    overrides: dict[str, Any] = {}
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        if not argument.startswith("--") or argument == "--":
            raise UsageError(
                "cli.unexpected_argument",
                "unexpected argument {argument!r}; options are written --key value.",
                argument=argument,
            )
        name, equals, value = argument[2:].partition("=")
        position += 1
        if not equals:
            if position < len(arguments) and not arguments[position].startswith("--"):
                value = arguments[position]
                position += 1
            else:
                value = "true"
        overrides[name.replace("-", "_")] = _parse_value(value)
    return overrides


def _parse_value(text: str) -> Any:
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    # `--model_revision 1.10` or `--output_dir 1e3` may be a name: a number stays text unless it reads back the same.
    # The key's type decides later.
    return text if type(value) in (int, float) and str(value) != text else value
