"""Reading one field of a record: its type is checked, and what is wrong is said with the field's place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from firefly.data.schema import Message
from firefly.messages import render

Record = Mapping[str, Any]


class MalformedRecord(Exception):
    """The record has its format's keys but not its shape; the text says what is wrong with which field."""

    def __init__(self, code: str, **values: object) -> None:
        super().__init__(render(code, **values))


def read_text(record: Record, name: str, place: str = "") -> str:
    """A field that must be text, all of it characters."""
    place = place or name
    if name not in record:
        raise MalformedRecord("row.missing_field", field=place)
    return check_text(record[name], place)


def check_text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise MalformedRecord("row.wrong_type", field=place, expected="text", got=kind_of(value))
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise MalformedRecord("row.surrogate", field=place) from None
    return value


def optional_text(record: Record, name: str) -> str | None:
    """A field that may be absent or null; empty text says as little as none."""
    value = record.get(name)
    return None if value is None or value == "" else check_text(value, name)


def read_list(record: Record, name: str, place: str = "") -> list[Any]:
    """A field that must be a list with something in it."""
    place = place or name
    if name not in record:
        raise MalformedRecord("row.missing_field", field=place)
    value = record[name]
    if not isinstance(value, list):
        raise MalformedRecord("row.wrong_type", field=place, expected="list", got=kind_of(value))
    if not value:
        raise MalformedRecord("row.empty_field", field=place)
    return value


def check_object(value: Any, place: str) -> Record:
    if not isinstance(value, Mapping):
        raise MalformedRecord("row.wrong_type", field=place, expected="object", got=kind_of(value))
    return value


def system_messages(value: Any, place: str = "system") -> list[Message]:
    """A system prompt that is absent, null or empty is no system prompt."""
    if value is None or value == "":
        return []
    return [Message("system", check_text(value, place))]


SYSTEM = ("system", "system_prompt")


def system_beside(record: Record) -> list[Message]:
    """The system prompt that stands beside a record's texts or messages, if any."""
    name = next((name for name in SYSTEM if record.get(name)), SYSTEM[0])
    return system_messages(record.get(name), name)


def with_system(record: Record, messages: list[Message], place: str) -> list[Message]:
    """`messages`, which stand under `place`, behind the system prompt beside them; two of them are refused."""
    system = system_beside(record)
    if system and messages and messages[0].role == "system":
        raise MalformedRecord("row.two_systems", field=f"{place}[0]")
    return [*system, *messages]


def read_history(record: Record) -> list[Message]:
    """`history`: earlier turns as [question, answer] pairs."""
    earlier = record.get("history")
    if earlier is None or earlier == "" or earlier == []:
        return []
    if not isinstance(earlier, list):
        raise MalformedRecord("row.wrong_type", field="history", expected="list", got=kind_of(earlier))
    messages = []
    for number, pair in enumerate(earlier):
        place = f"history[{number}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise MalformedRecord("row.wrong_type", field=place, expected="[question, answer]", got=kind_of(pair))
        messages.append(Message("user", check_text(pair[0], f"{place}[0]")))
        messages.append(Message("assistant", check_text(pair[1], f"{place}[1]")))
    return messages


VERDICTS = {"true": True, "false": False}


def verdict(record: Record) -> bool | None:
    """What `label` says of the record's answer: true or false, also as 1 and 0 or as text; None if it says neither."""
    label = record.get("label")
    if isinstance(label, str):
        return VERDICTS.get(label.strip().lower())
    return bool(label) if isinstance(label, (bool, int, float)) and label in (0, 1) else None


def is_trained(item: Record, place: str) -> bool:
    """`"loss": false`, or OpenAI's `"weight": 0`, leaves a reply untrained."""
    flag = item.get("loss")
    if flag is None:
        weight = item.get("weight")
        if weight is None:
            return True
        if weight not in (0, 1):
            raise MalformedRecord("row.wrong_type", field=f"{place}.weight", expected="0 or 1", got=repr(weight))
        return bool(weight)
    if not isinstance(flag, bool):
        raise MalformedRecord("row.wrong_type", field=f"{place}.loss", expected="true or false", got=kind_of(flag))
    return flag


def read_tools(record: Record) -> tuple[Record, ...]:
    """`tools`: a list of function schemas, or such a list as JSON text; each in OpenAI's wrapper afterwards."""
    value = record.get("tools")
    if isinstance(value, str):
        value = parse_json(value, "tools") if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, list):
        raise MalformedRecord("row.wrong_type", field="tools", expected="list", got=kind_of(value))
    return tuple(_tool(item, f"tools[{number}]") for number, item in enumerate(value))


def _tool(item: Any, place: str) -> Record:
    tool = parse_json(item, place) if isinstance(item, str) else item
    schema = check_object(tool, place)
    function = schema.get("function", schema)
    name = check_object(function, f"{place}.function").get("name")
    check_text(name, f"{place}.name")
    check_json(schema, place)
    return schema if "function" in schema else {"type": "function", "function": schema}


def read_tool_call(value: Any, place: str) -> Record:
    """One call: `{"name", "arguments"}` bare or under `function`; arguments as an object, or as JSON text of one."""
    call = check_object(value, place)
    function = check_object(call.get("function", call), f"{place}.function")
    name = read_text(function, "name", f"{place}.name")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = parse_json(arguments, f"{place}.arguments") if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    check_json(check_object(arguments, f"{place}.arguments"), f"{place}.arguments")
    read: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}
    if call.get("id") is not None:
        read["id"] = check_text(call["id"], f"{place}.id")
    return read


def parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = getattr(error, "msg", None) or type(error).__name__
        raise MalformedRecord("row.bad_json_field", field=place, problem=problem) from None


def check_json(value: Any, place: str) -> None:
    """Everything in a nested value can be written as UTF-8 JSON, as templates do with it."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise MalformedRecord("row.surrogate", field=place) from None
    except (TypeError, ValueError, RecursionError):
        raise MalformedRecord("row.wrong_type", field=place, expected="JSON", got=kind_of(value)) from None


def kind_of(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "true/false", type(None): "null", int: "number"}
    return names.get(type(value), "number" if isinstance(value, float) else type(value).__name__)
