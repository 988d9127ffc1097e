"""Reading the fields of a record: each one's type is checked, errors name the field's path, and what
nobody asked for is known afterwards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from firefly.data.schema import Message
from firefly.translation import Phrase

Record = Mapping[str, Any]


class MalformedRecord(Exception):
    """The record has its format's keys but not its shape; `phrase` says what is wrong with which field."""

    def __init__(self, text: str, /, **values: object) -> None:
        self.phrase = Phrase(text, **values)
        super().__init__(self.phrase)


def wrong_kind(field: str, expected: str, value: Any = None, got: str | None = None) -> MalformedRecord:
    """A field holds something else than it should; `got` says what where the kind of `value` does not."""
    return MalformedRecord(
        "{field} must be {expected}, not {got}", field=field, expected=expected, got=got or kind_of(value)
    )


class Fields(Mapping[str, Any]):
    """An object of a record. What is taken from it with `[]` or `get` counts as read; `in` and `peek` only look.

    Attributes:
        place: where in the record the object stands, such as `messages[3]`; empty for the record itself.
    """

    __slots__ = ("_inner", "_is_message", "_read", "_unheeded", "_values", "place")

    def __init__(self, values: Record, place: str = "", *, is_message: bool = False) -> None:
        self._values, self.place, self._is_message = values, place, is_message
        self._read: set[str] = set()
        self._inner: list[Fields] = []
        self._unheeded: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Any:
        value = self._values[name]
        self._read.add(name)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def get(self, name: str, default: Any = None) -> Any:
        if name not in self._values:
            return default
        self._read.add(name)
        return self._values[name]

    def peek(self, name: str) -> Any:
        """The value, or None, without having read it."""
        return self._values.get(name)

    def has_read(self, name: str) -> bool:
        return name in self._read

    def present(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self._values]

    def has_any(self, names: frozenset[str]) -> bool:
        return not names.isdisjoint(self._values)

    def first_of(self, names: Sequence[str]) -> str | None:
        """The first of the names that has a value here; where all are null the first that is here."""
        null = None
        for name in names:
            if name in self._values:
                if self._values[name] is not None:
                    return name
                null = null or name
        return null

    def at(self, name: str) -> str:
        """The place of a field."""
        return f"{self.place}.{name}" if self.place else name

    def inner(self, value: Any, place: str, *, is_message: bool = False) -> Fields:
        """An object inside this one, at `place` of the record. Of a message numbers and flags count, too, where nobody
        reads them: they may say whether it is trained.

        Raises:
            MalformedRecord: it is none.
        """
        if not isinstance(value, Mapping):
            raise wrong_kind(place, "object", value)
        found = Fields(value, place, is_message=is_message)
        self._inner.append(found)
        return found

    def leave_unheeded(self, names: Sequence[str]) -> None:
        """Remember keys that were understood and say what is not done."""
        self._unheeded = (*self._unheeded, *names)

    def unheeded(self) -> set[str]:
        """The places of those keys."""
        found = {self._shape(name) for name in self._unheeded}
        return found.union(*(inner.unheeded() for inner in self._inner))

    def _shape(self, name: str) -> str:
        """The place of a field, the same for all items of a list."""
        return NUMBER.sub(lambda match: "[]" if match[0][0] == "[" else "", self.at(name))

    def unread(self) -> dict[str, list[str]]:
        """The texts that nobody read, by the name of the outermost key that holds them: `note`, `messages[].note`. No
        text under a key of a message that holds numbers or flags alone."""
        found: dict[str, list[str]] = {}
        if len(self._read) < len(self._values):
            for name, value in self._values.items():
                if name in self._read:
                    continue
                texts = texts_in(value)
                if texts or (self._is_message and any(isinstance(item, int | float) for item in _leaves(value))):
                    found.setdefault(self._shape(name), []).extend(texts)
        for inner in self._inner:
            for place, texts in inner.unread().items():
                found.setdefault(place, []).extend(texts)
        return found


NUMBER = re.compile(r"\[\d+\]|(?<=^chat\.turn)_\d+")


def _leaves(value: Any) -> Iterator[Any]:
    """What stands in a JSON value at any depth: texts, numbers, flags, nulls; not the names of its keys."""
    left = [value]
    while left:  # no recursion: what nobody reads may be nested as deeply as it likes
        item = left.pop()
        if isinstance(item, Mapping):
            left.extend(item.values())
        elif isinstance(item, list | tuple):
            left.extend(item)
        else:
            yield item


def texts_in(value: Any) -> list[str]:
    """Every text with a character in it, at any depth of a JSON value."""
    return [item for item in _leaves(value) if isinstance(item, str) and item.strip()]


def read_text(record: Fields, name: str) -> str:
    """A field that must be text, all of it characters."""
    if name not in record:
        raise MalformedRecord("{field} is missing", field=record.at(name))
    return check_text(record[name], record.at(name))


def check_text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise wrong_kind(place, "text", value)
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise MalformedRecord("{field} has a lone surrogate, which is no character", field=place) from None
    return value


def optional_text(record: Fields, name: str) -> str | None:
    """A field that may be absent or null; empty text says as little as none."""
    value = record.get(name)
    return None if value is None or value == "" else check_text(value, record.at(name))


def read_list(record: Fields, name: str) -> list[Any]:
    """A field that must be a list with something in it; a table's cell may hold it as JSON text."""
    place = record.at(name)
    if name not in record:
        raise MalformedRecord("{field} is missing", field=place)
    value = record[name]
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = parse_json(value, place)
    if isinstance(value, Mapping):
        value = _rows(value) or value
    if not isinstance(value, list):
        raise wrong_kind(place, "list", value)
    if not value:
        raise MalformedRecord("{field} is empty", field=place)
    return value


def _rows(columns: Record) -> list[Record] | None:
    """Objects that were stored as one object of equally long lists; None for an object that is no such thing."""
    lists = list(columns.values())
    if not lists or not all(isinstance(item, list) and len(item) == len(lists[0]) for item in lists):
        return None
    rows = zip(*lists, strict=True)
    return [{name: cell for name, cell in zip(columns, row, strict=True) if cell is not None} for row in rows]


SYSTEM = ("system", "system_prompt")


def system_messages(value: Any, place: str) -> list[Message]:
    """A system prompt that is absent, null or empty is no system prompt."""
    return [] if value is None or value == "" else [Message.of("system", check_text(value, place))]


def system_beside(record: Fields) -> list[Message]:
    """The system prompt that stands beside a record's texts or messages, if any."""
    for name in record.present(SYSTEM):
        if record.peek(name):
            return system_messages(record[name], record.at(name))
    return []


YES_OR_NO = {"true": True, "false": False}
VERDICTS = {**YES_OR_NO, "1": True, "0": False, "1.0": True, "0.0": False}
"""True and false as a table's cells have them."""
OPINIONS = {"chosen": True, "rejected": False, "desirable": True, "undesirable": False, "like": True, "dislike": False}
LABELS = ("label", "kto_tag")


def verdict(record: Record) -> bool | None:
    """What `label` says of the record's answer: true or false, also as 1 and 0, as text, or as one of OPINIONS; None
    if it says neither."""
    return next(iter(verdicts(record).values()), None)


def verdicts(record: Record) -> dict[str, bool]:
    """The same, by the key that says it."""
    look = record.peek if isinstance(record, Fields) else record.get
    labels = {name: _verdict(look(name)) for name in LABELS}
    return {name: wanted for name, wanted in labels.items() if wanted is not None}


def _verdict(label: Any) -> bool | None:
    if isinstance(label, str):
        return (VERDICTS | OPINIONS).get(label.strip().lower())
    return bool(label) if isinstance(label, (bool, int, float)) and label in (0, 1) else None


MASKS = ("loss_mask", "step_loss_mask", "trainable", "train_on_turn")
FLAGS = ("loss", "train", "training", "output_with_loss", *MASKS)
WEIGHTS = ("weight", "loss_weight", "loss_scale")
PARTIAL = "train_detail"
LOSS_KEYS = frozenset((*FLAGS, *WEIGHTS, PARTIAL))


def is_trained(item: Fields) -> bool:
    """Whether a message is trained: `"loss": false`, `"train": false` or a weight of 0 leaves a reply out.

    Raises:
        MalformedRecord: a flag of another type, a weight between or beyond (which would be trained as 1 in silence),
            two that disagree, or a part of the message that is left out.
    """
    if not item.has_any(LOSS_KEYS):
        return True
    flags: dict[str, bool] = {}
    for name in FLAGS:
        if (flag := item.get(name)) is not None:
            flags[name] = _flag(flag, name, item.at(name))
    for name in WEIGHTS:
        if (weight := item.get(name)) is not None:
            flags[name] = _weight(weight, item.at(name))
    if item.get(PARTIAL):
        raise MalformedRecord(
            "{field} leaves out a part of the message; this version trains a reply or leaves it out",
            field=item.at(PARTIAL),
        )
    return _agreed(flags, item)


def is_record_trained(record: Fields) -> bool:
    """The same beside a record's texts or messages. There a `loss` may be a measured number and `train` the name of a
    split, so only what is true or false counts, or reads so in a table; and only numbers count as weights. A mask is
    never anything else."""
    if not record.has_any(LOSS_KEYS):
        return True
    flags: dict[str, bool] = {}
    for name in FLAGS:
        flag = record.peek(name)
        if isinstance(flag, str):
            words = VERDICTS if name in MASKS else YES_OR_NO
            flag = words.get(flag.strip().lower(), flag)
        if isinstance(flag, bool) or (name in MASKS and flag is not None):
            record.get(name)
            flags[name] = _flag(flag, name, record.at(name))
    for name in WEIGHTS:
        weight = number_in(record.peek(name))
        if weight is not None:
            record.get(name)
            flags[name] = _weight(weight, record.at(name))
    return _agreed(flags, record)


def _flag(flag: Any, name: str, place: str) -> bool:
    """True or false, also as 1 and 0; but a number under `loss` may have been measured."""
    if not isinstance(flag, bool) and (name == "loss" or not isinstance(flag, int | float) or flag not in (0, 1)):
        raise wrong_kind(place, "true or false", flag)
    return bool(flag)


def _weight(weight: Any, place: str) -> bool:
    if not isinstance(weight, int | float) or weight not in (0, 1):
        got = repr(weight) if isinstance(weight, int | float) else kind_of(weight)
        raise MalformedRecord(
            "{field} must be 0 or 1, not {got}: a reply is trained or left out, other weights are not applied",
            field=place,
            got=got,
        )
    return bool(weight)


def number_in(value: Any) -> float | None:
    """A number, also as a table's text; None for anything else."""
    if isinstance(value, int | float):
        return value
    try:
        return float(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _agreed(flags: Mapping[str, bool], item: Fields) -> bool:
    if len(set(flags.values())) > 1:
        raise MalformedRecord("{fields} disagree on whether it is trained", fields=", ".join(map(item.at, flags)))
    return all(flags.values())


def read_tools(record: Fields) -> tuple[Record, ...]:
    """`tools` (OpenAI's older name: `functions`): function schemas in a list, or one alone, or so as JSON text; each in
    OpenAI's wrapper afterwards."""
    key = "tools"
    if not record.peek(key) and _are_schemas(record.peek("functions")):
        key = "functions"
    value = record.get(key)
    if isinstance(value, str):
        value = parse_json(value, key) if value.strip() else None
    if value is None:
        return ()
    if isinstance(value, Mapping):  # one alone
        return (_tool(value, key),)
    if not isinstance(value, list):
        raise wrong_kind(key, "list", value)
    return tuple(_tool(item, f"{key}[{number}]") for number, item in enumerate(value))


def _are_schemas(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "name" in value
    return isinstance(value, list) and all(isinstance(item, Mapping) and "name" in item for item in value)


def _tool(item: Any, place: str) -> Record:
    tool = parse_json(item, place) if isinstance(item, str) else item
    schema = check_object(tool, place)
    function = check_object(schema.get("function", schema), f"{place}.function")
    check_text(function.get("name"), f"{place}.name")
    json_text(schema, place)
    return schema if "function" in schema else {"type": "function", "function": schema}


def check_object(value: Any, place: str) -> Record:
    """An object that is taken whole, whatever keys it has."""
    if not isinstance(value, Mapping):
        raise wrong_kind(place, "object", value)
    return value


def read_tool_calls(record: Fields, value: Any, place: str) -> tuple[Record, ...]:
    """One call, or a list of them; as JSON text, too."""
    if isinstance(value, str):
        value = parse_json(value, place)
    if isinstance(value, list):
        return tuple(_tool_call(record, call, f"{place}[{number}]") for number, call in enumerate(value))
    return (_tool_call(record, value, place),)


ARGUMENTS = ("arguments", "parameters", "params", "args", "kwargs", "input")
"""How records call the arguments of a call, in the order in which they are looked for."""
CALL_KEYS = frozenset(("id", "type", "name", "function", "index", "arguments"))


def _tool_call(record: Fields, value: Any, place: str) -> Record:
    """One call: `{"name", "arguments"}` bare or under `function`; arguments as an object, or as JSON text of one.

    Raises:
        MalformedRecord: a key that says more of the call than would be trained, among others.
    """
    call = record.inner(parse_json(value, place) if isinstance(value, str) else value, place)
    function = call
    if "function" in call:
        function = call.inner(call["function"], f"{place}.function")
    name = check_text(function["name"], f"{place}.name") if "name" in function else None
    if name is None:
        raise MalformedRecord("{field} is missing", field=f"{place}.name")
    held = (call,) if function is call else (function, call)
    arguments = read_arguments(*held)
    for item in held:
        for key in item:
            says_nothing = item.peek(key) is None or item.peek(key) in ("", [], {})
            if key not in CALL_KEYS and not item.has_read(key) and not says_nothing:
                raise MalformedRecord(
                    "{field} is no part of a tool call that is read: a call has name, id and its arguments (under one "
                    "of {known})",
                    field=item.at(key),
                    known=", ".join(ARGUMENTS),
                )
    if function is not call and call.get("name") not in (None, name):
        raise MalformedRecord("{fields} disagree on what is called", fields=f"{place}.name, {place}.function.name")
    call.get("index")
    read: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if call.peek("type") == "function":
        call.get("type")
    if (identifier := read_call_id(call, "id")) is not None:
        read["id"] = identifier
    return read


def read_call_id(item: Fields, name: str) -> str | None:
    """The identifier of a call, which may be a number."""
    identifier = item.get(name)
    if type(identifier) is int and abs(identifier) < 2**63:
        return str(identifier)
    return None if identifier is None else check_text(identifier, item.at(name))


def read_arguments(*held: Fields) -> dict[str, Any]:
    """The arguments of a call, which stand in one of these objects under one of several keys: an object, JSON text of
    one, or nothing.

    Raises:
        MalformedRecord: two that differ, or what is no object.
    """
    found: dict[str, dict[str, Any]] = {}
    for item in held:
        for key in item.present(ARGUMENTS):
            value, place = item[key], item.at(key)
            if isinstance(value, str):
                value = parse_json(value, place) if value.strip() else None
            if value is not None and (arguments := dict(check_object(value, place))):
                json_text(arguments, place)
                found[place] = arguments
    read = list(found.values())
    if any(other != read[0] for other in read[1:]):
        raise MalformedRecord("{fields} disagree on what is called", fields=", ".join(found))
    return read[0] if read else {}


def parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = getattr(error, "msg", None) or type(error).__name__
        raise MalformedRecord("{field} is not valid JSON: {problem}", field=place, problem=problem) from None


def json_text(value: Any, place: str) -> str:
    """A nested value as JSON text, which templates make of it, too.

    Raises:
        MalformedRecord: it cannot be written as UTF-8 JSON.
    """
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise MalformedRecord("{field} has a lone surrogate, which is no character", field=place) from None
    except (TypeError, ValueError, RecursionError):
        raise wrong_kind(place, "JSON", value) from None
    return text


def kind_of(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "true/false", type(None): "null", int: "number"}
    return names.get(type(value), "number" if isinstance(value, float) else type(value).__name__)
