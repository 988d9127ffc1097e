"""A flat file checked by pydantic: values are converted to their keys' types, errors become our own messages."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import types
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import cache, partial, reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from firefly.config.schema import own_fields
from firefly.config.training_arguments import TRAINING_LIMITS, training_default, training_fields
from firefly.errors import UsageError
from firefly.translation import Phrase

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

KINDS = {
    str: Phrase("text"),
    int: Phrase("integer"),
    float: Phrase("number"),
    bool: Phrase("true or false"),
    tuple: Phrase("list"),
}
"""What the types of values are called."""


def refuse_unknown(names: Iterable[str]) -> None:
    known = sorted(run_file().model_fields)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            raise UsageError(
                "config.unknown_key",
                "unknown key {key!r}; did you mean {near!r}? Remove or correct it.",
                key=name,
                near=near[0] if near else "output_dir",
            )


def check_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a flat file in the types of their keys.

    Raises:
        UsageError: a value is of another type, or outside its limits; the first one of the file.
    """
    from pydantic import ValidationError

    try:
        checked = run_file().model_validate(dict(values))
    except ValidationError as error:
        raise _refusal(error, values) from None
    return {name: getattr(checked, name) for name in values}


@cache
def run_file() -> type[BaseModel]:
    """The pydantic model of a flat file: our keys and those of transformers."""
    from pydantic import ConfigDict, create_model

    fields: dict[str, Any] = {
        name: (_plain(spec.type, **TRAINING_LIMITS.get(name, {})), training_default(name))
        if _members(spec.type)[0] in (int, float, bool)
        else (_handed_on(spec), training_default(name))
        for name, spec in training_fields().items()
    }
    own: dict[str, Any] = {
        name: (_plain(spec.metadata["kind"] or spec.type, **spec.metadata["limits"]), spec.default)
        for name, (_, spec) in own_fields().items()
    }
    return create_model("RunFile", __config__=ConfigDict(protected_namespaces=()), **fields | own)


def _members(annotation: Any) -> list[Any]:
    """The types of a union, or the one type; without None."""
    union = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return [member for member in union if member is not types.NoneType]


def choices(annotation: Any) -> tuple[Any, ...]:
    """The values that a type lists; () where it takes others, too, or any flag."""
    members = _members(annotation)
    if members == [bool] or not all(member is bool or get_origin(member) is Literal for member in members):
        return ()
    return tuple(value for member in members for value in ((True, False) if member is bool else get_args(member)))


def is_nullable(annotation: Any) -> bool:
    return types.NoneType in get_args(annotation)


def _plain(annotation: Any, ge: float | None = None, lt: float | None = None) -> Any:
    """The strict type by which a value of `annotation` is read, whether JSON, YAML or a command line wrote it."""
    from pydantic import BeforeValidator, Field, StringConstraints

    numbers, strict, alone = Field(ge=ge, lt=lt, strict=True), Field(strict=True), len(_members(annotation)) == 1
    read: dict[Any, Any] = {
        int: Annotated[int, numbers, BeforeValidator(partial(_number, int))],
        float: Annotated[float, numbers, BeforeValidator(partial(_number, float))],
        bool: Annotated[bool, strict, BeforeValidator(_flag)],
        str: Annotated[str, strict, BeforeValidator(_text if alone else _path)],
        tuple[str, ...]: tuple[Annotated[str, StringConstraints(min_length=1, strict=True)], ...],
    }
    union = [read.get(member, member) for member in _members(annotation)]
    one: Any = union[0] if alone else Annotated[reduce(or_, union), Field(union_mode="left_to_right")]
    return one | None if is_nullable(annotation) else one


def _handed_on(spec: dataclasses.Field[Any]) -> Any:
    """The type of a field that transformers checks by itself: what it should be shows in the JSON schema alone."""
    from pydantic import BeforeValidator, SkipValidation

    written, nullable = _members(spec.type), is_nullable(spec.type)
    enums = [member for member in written if isinstance(member, type) and issubclass(member, Enum)]
    listed = [tuple(item.value for item in member) for member in enums]
    if "choices" in spec.metadata:
        listed.append(tuple(spec.metadata["choices"]))
    shown: list[Any] = [Literal[values] for values in listed]  # type: ignore[valid-type]
    for member in written:
        if member in enums or (member is str and listed):  # its names, and no other text
            continue
        plain = member in (str, int, float, bool) or get_origin(member) is Literal
        shown.append(member if plain else list if get_origin(member) is list else dict)  # an object by its settings
    if spec.metadata.get("const") is True:
        shown.append(bool)
    if nullable:
        shown.append(None)

    def read(value: Any) -> Any:
        if value is None and not nullable:
            raise ValueError("null")
        if value is False and any("no" in values for values in listed):
            return "no"  # what YAML makes of `eval_strategy: no`
        if isinstance(value, Mapping) and spec.name == "lr_scheduler_kwargs":  # YAML reads 1e-6 as text
            return {name: _number(float, part) if isinstance(part, str) else part for name, part in value.items()}
        return _text(value) if written == [str] else value

    union: Any = reduce(or_, shown)
    return Annotated[union, SkipValidation, BeforeValidator(read)]


def _number(kind: type, value: Any) -> Any:
    """A number from text (YAML reads 1e-4 as text), an integer from 512.0 or 1e3; else `value` as it is."""
    if type(value) not in (int, float, str) or type(value) is kind is int:
        return value
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return str(value)
    if kind is int:
        return int(number) if number.is_integer() else value
    return "nan" if math.isnan(number) else number  # which no key means


def _flag(value: Any) -> Any:
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def _path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _text(value: Any) -> Any:
    """A path or a name made of digits comes off the command line as a number."""
    return str(value) if type(value) in (int, float) else _path(value)


def _refusal(error: ValidationError, values: Mapping[str, Any]) -> UsageError:
    """Our message for the first key of the file that pydantic refuses."""
    faults: dict[Any, list[Any]] = {}
    for fault in error.errors(include_url=False):
        faults.setdefault(fault["loc"][0], []).append(fault)
    name = next(name for name in values if name in faults)
    if name in own_fields():
        _, spec = own_fields()[name]
        annotation, limits = spec.metadata["kind"] or spec.type, spec.metadata["limits"]
    else:
        annotation, limits = training_fields()[name].type, TRAINING_LIMITS.get(name, {})
    shown = json.dumps(values[name], default=str)
    for fault in faults[name]:
        if fault["type"] == "greater_than_equal":
            return UsageError(
                "config.too_small",
                "{key} = {value} is too small; the least is {minimum}.",
                key=name,
                value=fault["input"],
                minimum=limits["ge"],
            )
        if fault["type"] == "less_than":
            return UsageError(
                "config.bad_range",
                "{key} = {value} is not valid; it must be at least {minimum} and less than {below}.",
                key=name,
                value=fault["input"],
                minimum=limits["ge"],
                below=limits["lt"],
            )
    if listed := choices(annotation):
        return bad_choice(name, shown, map(json.dumps, listed))
    if any(isinstance(part, int) for fault in faults[name] for part in fault["loc"]):
        return bad_type(name, shown, Phrase("a list of names"))
    if any(fault["type"] == "value_error" for fault in faults[name]):
        return bad_type(name, shown, Phrase("a value"))
    first, *others = (
        ", ".join(map(json.dumps, get_args(member)))
        if get_origin(member) is Literal
        else KINDS[get_origin(member) or member]
        for member in _members(annotation)
    )
    for other in others:
        first = Phrase("{first} or {second}", first=first, second=other)
    return bad_type(name, shown, first)


def missing_key(*keys: str) -> UsageError:
    return UsageError(
        "config.missing_key",
        "required: {key}. Set it in the configuration or as --key value.",
        key=", ".join(keys),
    )


def bad_choice(key: str, value: object, choices: Iterable[str]) -> UsageError:
    return UsageError(
        "config.bad_choice",
        "{key} = {value} is not valid; choose one of: {choices}.",
        key=key,
        value=value,
        choices=", ".join(choices),
    )


def bad_type(key: str, value: object, expected: object) -> UsageError:
    return UsageError(
        "config.bad_type",
        "{key} = {value} is not valid: expected {expected}.",
        key=key,
        value=value,
        expected=expected,
    )
