"""Record shapes. Each entry of FORMATS recognizes its records by their keys and turns one into what a task trains on.

A new format is one class, or one instance with other keys, and one line in the table. A record that fits none, or two,
is reported, never guessed; `data_format` settles it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from firefly.config import READ_AS, RecordKind, tasks_on
from firefly.data.formats.chat import (
    QUESTION_FORMATS,
    SIDES,
    AlternatingFormat,
    InstancesFormat,
    LabelledAnswerFormat,
    LabelledMessagesFormat,
    MessagesFormat,
    OtherQuestionFormat,
    is_restated,
)
from firefly.data.formats.fields import (
    LABELS,
    SYSTEM,
    Fields,
    MalformedRecord,
    Record,
    kind_of,
    read_text,
    verdict,
    verdicts,
    wrong_kind,
)
from firefly.data.formats.messages import ROLE_KEYS, ROLES, TEXT_KEYS
from firefly.data.formats.moss import MossFormat
from firefly.data.formats.preference import (
    ListPairFormat,
    PairFormat,
    ResponsePairFormat,
    TranscriptPairFormat,
    outscored,
    read_margin,
)
from firefly.data.formats.texts import SPELLINGS, is_texts
from firefly.data.schema import IGNORE, Conversation, Document, Labelled, PreferencePair, TokenPair, Tokens
from firefly.translation import Phrase

__all__ = [
    "FORMATS",
    "Format",
    "FormatEntry",
    "MalformedRecord",
    "Parsed",
    "ReadRecord",
    "detect_format",
    "parse_record",
    "read_record",
]

Parsed = Conversation | Labelled | PreferencePair | Document | Tokens | TokenPair | tuple[Conversation, ...]
"""What a record becomes; several conversations where it holds several examples."""


class Format(Protocol):
    def recognizes(self, record: Fields) -> tuple[str, ...]:
        """The keys that make the record one of this format; empty if it is none."""
        ...

    def parse(self, record: Fields) -> Parsed: ...


@dataclass(frozen=True)
class ReadRecord:
    """What was read of a record.

    Attributes:
        format: a name of FORMATS.
        unread: the characters of text under each key that the format does not read (`note`, `messages[].note`), less
            what stands in the conversation anyway; 0 for a key of a message with numbers or flags alone.
        condemned: the key that condemns the record's answer (`label`), which is not trained then.
        unheeded: keys that ask for a loss on messages that are no replies, which are never trained.
        outscored: of a pair: the keys of two numbers that prefer the rejected answer.
    """

    format: str
    parsed: Parsed
    unread: Mapping[str, int]
    unheeded: Set[str]
    condemned: str | None = None
    outscored: tuple[str, str] | None = None


@dataclass(frozen=True)
class TextFormat:
    """`text`: a document."""

    def recognizes(self, record: Fields) -> tuple[str, ...]:
        return ("text",) if "text" in record else ()

    def parse(self, record: Fields) -> Document:
        return Document(read_text(record, "text"))


@dataclass(frozen=True)
class TokensFormat:
    """Already tokenized: `input_ids`, and `labels` with -100 where there is no loss. Taken as it is, never rendered."""

    def recognizes(self, record: Fields) -> tuple[str, ...]:
        return ("input_ids", "labels") if "input_ids" in record and "labels" in record else ()

    def parse(self, record: Fields) -> Tokens:
        ids, labels = _integers(record, "input_ids"), _integers(record, "labels")
        if len(ids) != len(labels):
            raise MalformedRecord(
                "input_ids has {ids} numbers and labels {labels}; they must have the same length",
                ids=len(ids),
                labels=len(labels),
            )
        ids = _ids(record, "input_ids")
        if np.any((labels != IGNORE) & (labels != ids)):
            raise MalformedRecord("a label is neither -100 nor the id at its position (labels are not shifted)")
        return Tokens(ids, labels)


@dataclass(frozen=True)
class TokenPairFormat:
    """An already tokenized pair: `prompt_ids`, `chosen_ids`, `rejected_ids`, answers with their stop tokens."""

    def recognizes(self, record: Fields) -> tuple[str, ...]:
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        return names if all(name in record for name in names) else ()

    def parse(self, record: Fields) -> TokenPair:
        prompt, *answers = (_ids(record, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        ids = np.concatenate([prompt, *answers])
        labels = np.where(np.arange(len(ids)) < len(prompt), np.int32(IGNORE), ids)
        return TokenPair(ids, labels, len(prompt), len(answers[0]), read_margin(record))


def _ids(record: Fields, name: str) -> np.ndarray:
    ids = _integers(record, name)
    if not len(ids):
        raise MalformedRecord("{field} is empty", field=name)
    if ids.min() < 0:
        raise wrong_kind(name, "ids ≥ 0", got=str(ids.min()))
    return ids


def _integers(record: Fields, name: str) -> np.ndarray:
    value = record[name]
    if not isinstance(value, list) or not all(type(item) is int and abs(item) < 2**31 for item in value):
        raise wrong_kind(name, "list of integers", value)
    return np.asarray(value, dtype=np.int32)


@dataclass(frozen=True)
class FormatEntry:
    """A format and what its records hold."""

    format: Format
    kind: RecordKind


FORMATS: dict[str, FormatEntry] = {
    "firefly": FormatEntry(MessagesFormat("conversation"), "conversation"),
    "messages": FormatEntry(MessagesFormat("messages"), "conversation"),
    "sharegpt": FormatEntry(MessagesFormat("conversations"), "conversation"),
    "ultrachat": FormatEntry(AlternatingFormat(), "conversation"),
    "moss": FormatEntry(MossFormat(), "conversation"),
    **{name: FormatEntry(known, "conversation") for name, known in QUESTION_FORMATS.items()},
    "other_question": FormatEntry(OtherQuestionFormat(), "conversation"),
    "instances": FormatEntry(InstancesFormat(), "conversation"),
    "labelled_messages": FormatEntry(LabelledMessagesFormat(), "labelled"),
    "labelled_answer": FormatEntry(LabelledAnswerFormat(), "labelled"),
    "tokens": FormatEntry(TokensFormat(), "conversation"),
    "preference": FormatEntry(PairFormat("messages"), "pair"),
    "preference_text": FormatEntry(PairFormat("texts"), "pair"),
    "preference_sharegpt": FormatEntry(PairFormat("turns"), "pair"),
    "preference_list": FormatEntry(ListPairFormat(), "pair"),
    "preference_transcript": FormatEntry(TranscriptPairFormat(), "pair"),
    "preference_responses": FormatEntry(ResponsePairFormat(), "pair"),
    "preference_tokens": FormatEntry(TokenPairFormat(), "pair"),
    "text": FormatEntry(TextFormat(), "document"),
}


def detect_format(value: Any, kind: RecordKind | None = None) -> str:
    """Return the name of the one format that `value` has.

    Args:
        kind: formats of this kind are asked first: an Alpaca record with a `text` beside it is no document in SFT.

    Raises:
        MalformedRecord: not an object, no known format, or two at once.
    """
    return _detected_format(_structured(value), kind)[1]


def _detected_format(value: Record, kind: RecordKind | None) -> tuple[Record, str, tuple[str, ...]]:
    """The record as its format knows it, the format, and the keys that make it."""
    # What a format recognizes is the keys and the kinds of their values, so records of one shape are asked about once.
    restated = is_restated(Fields(value))
    shape = (kind, verdict(value), restated, *((key, _kind(item)) for key, item in value.items()))
    found = _detected.get(shape)
    if found is None:
        found = _detect(value, kind)
        if len(_detected) < MOST_SHAPES:
            _detected[shape] = found
    return _detected_format(_in_small_letters(value), kind) if found == IN_CAPITALS else (value, *found)


MOST_SHAPES = 4096
IN_CAPITALS: tuple[str, tuple[str, ...]] = ("", ())
"""Of no format but for the capitals in its keys."""
_detected: dict[tuple[Any, ...], tuple[str, tuple[str, ...]]] = {}
KNOWN_KEYS = frozenset(
    (
        *(key for spellings in SPELLINGS.values() for key in spellings),
        *(key for sides in SIDES for key in sides),
        *(*TEXT_KEYS, *SYSTEM, *LABELS, "history", "tools", "functions", "chat", "instances", "text"),
        *("response_j", "response_k", "input_ids", "labels", "prompt_ids", "chosen_ids", "rejected_ids"),
    )
)


def _in_small_letters(value: Record) -> Record:
    """The record with keys such as `Question` as formats know them; other keys stay as they are."""
    renamed: dict[str, Any] = {}
    for key, item in value.items():
        small = key.lower()
        known = key not in KNOWN_KEYS and small in KNOWN_KEYS and small not in value and small not in renamed
        renamed[small if known else key] = item
    return renamed


def _kind(item: Any) -> Any:
    """What formats look at of a value: its type, and of a list the first item's, or how many texts it holds."""
    if not isinstance(item, list):
        return type(item)
    return (list, len(item)) if is_texts(item) else (list, type(item[0]) if item else None)


def _detect(value: Record, kind: RecordKind | None) -> tuple[str, tuple[str, ...]]:
    # Null says as little as no key, where that leaves a known format.
    there = {key: item for key, item in value.items() if item is not None}
    fitting = _fitting(there) or _fitting(value)
    if kind is not None:
        fitting = {name: keys for name, keys in fitting.items() if FORMATS[name].kind in READ_AS[kind]} or fitting
    if not fitting and _fitting(_in_small_letters(value)) and _in_small_letters(value).keys() != value.keys():
        return IN_CAPITALS
    if not fitting:
        # repr: a key may hold anything, also what no terminal or file takes.
        keys = ", ".join(map(repr, sorted(value)[:8])) or "–"
        if missing := _one_key_short(there):
            raise MalformedRecord(
                "no known format has the keys {keys} alone; missing is one of: {missing}", keys=keys, missing=missing
            )
        raise MalformedRecord(
            "no known format has the keys {keys} (known formats: {known})", keys=keys, known=", ".join(FORMATS)
        )
    if len(fitting) > 1:
        by = "; ".join(" + ".join(map(repr, keys)) for keys in fitting.values())
        raise MalformedRecord(
            "the record fits several formats: {formats} (by {keys}); say which with data_format",
            formats=", ".join(fitting),
            keys=by,
        )
    return next(iter(fitting.items()))


def _fitting(value: Record) -> dict[str, tuple[str, ...]]:
    found = {name: entry.format.recognizes(Fields(value)) for name, entry in FORMATS.items()}
    return {name: keys for name, keys in found.items() if keys}


OFTEN_FORGOTTEN = ("rejected", "chosen", "output", "instruction", "response", "answer", "target", "input", "labels")


def _one_key_short(value: Record) -> str:
    """What would make the record one of a known format: 'rejected' (for preference_pair), …; empty if nothing would."""
    found = []
    for key in OFTEN_FORGOTTEN:
        if key in value:
            continue
        # Of the kind that its counterpart has, as answers are texts in some formats and messages in others.
        kinds = ("", []) if not isinstance(value.get("chosen", value.get("rejected")), list) else ([], "")
        fitting = [name for kind in kinds for name in _fitting({**value, key: kind})]
        if fitting:
            found.append(f"{key!r} ({fitting[0]})")
    return ", ".join(found[:3])


AS_JSON_TEXT = (("chosen", "rejected"), ("prompt", "completion"), ("chosen_messages", "rejected_messages"))


def _structured(value: Any) -> Record:
    """The record, with message lists that a table's cells hold as JSON text.

    Lists that are never text (`messages`, `tools`, …) are read so where they stand. These keys hold text, too, so both
    of two answers must be lists of messages: one alone may be an answer in JSON.
    """
    if not isinstance(value, Mapping):
        raise MalformedRecord("a record must be an object, not {got}", got=kind_of(value))
    changed: dict[str, Any] = {}
    for names in AS_JSON_TEXT:
        if all(name in value for name in names):
            lists = {name: _messages_in(value[name]) for name in names}
            changed |= lists if all(lists.values()) else {}
    if "prompt" in value and (messages := _messages_in(value["prompt"])):
        changed["prompt"] = messages
    return {**value, **changed} if changed else value


def _messages_in(text: Any) -> list[Any] | None:
    """The messages that a text holds as JSON; None for any other text."""
    if not isinstance(text, str) or text.lstrip()[:1] != "[" or not any(f'"{key}"' in text for key in ROLE_KEYS):
        return None
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        return None
    are_messages = all(isinstance(item, Mapping) and any(key in item for key in ROLE_KEYS) for item in items)
    return items if items and are_messages else None


def read_record(value: Any, kind: RecordKind | None = None, data_format: str = "auto") -> ReadRecord:
    """Read one record.

    Args:
        kind: what the record must hold; None: anything.
        data_format: a name of FORMATS settles what the record is.

    Raises:
        MalformedRecord: see `detect_format`; a field that is missing or wrong (and which format was taken for it, and
            why); a record of another kind.
    """
    value = _structured(value)
    if data_format == "auto":
        value, name, keys = _detected_format(value, kind)
    else:
        name, keys = data_format, ()
        small = _in_small_letters(value)
        if not FORMATS[name].format.recognizes(Fields(value)) and FORMATS[name].format.recognizes(Fields(small)):
            value = small
    entry = FORMATS[name]
    if kind is not None and entry.kind not in READ_AS[kind]:
        if kind == "labelled" and entry.kind == "conversation":
            raise MalformedRecord(
                "a record of the format {format} without a verdict that can be read: {field} must be true or false",
                format=name,
                field=next((label for label in LABELS if label in value), LABELS[0]),
            )
        readers: list[RecordKind] = [asked for asked, read in READ_AS.items() if entry.kind in read]
        raise MalformedRecord(
            "a record of the format {format} is for task_type {task}: set task_type to {task} for it",
            format=name,
            task=" / ".join(tasks_on(*readers)),
        )
    # A null that decides is a fault to be named; any other says as little as no key.
    fields = Fields({key: item for key, item in value.items() if item is not None or key in keys})
    try:
        parsed = entry.format.parse(fields)
    except KeyError as error:  # a format that was forced on a record without its keys
        problem = Phrase("{field} is missing", field=error.args[0])
    except MalformedRecord as error:
        problem = error.phrase
    else:
        labels = verdicts(value) if isinstance(parsed, Labelled) else {}
        condemned = next((key for key, wanted in labels.items() if not wanted), None)
        better = outscored(fields) if isinstance(parsed, PreferencePair | TokenPair) else None
        return ReadRecord(name, parsed, _left_out(fields.unread(), parsed), fields.unheeded(), condemned, better)
    if keys:
        raise MalformedRecord(
            "{problem} (read as {format}, because it has {keys})",
            problem=problem,
            format=name,
            keys=", ".join(map(repr, keys)),
        )
    raise MalformedRecord("{problem} (read as {format}, as data_format says)", problem=problem, format=name)


def _left_out(unread: Mapping[str, Sequence[str]], parsed: Parsed) -> dict[str, int]:
    """Characters by key, of texts that stand nowhere in what was parsed: a `prompt` beside messages is often their
    first, and UltraFeedback's `messages` are its better answer once more."""
    if not unread:
        return {}
    if isinstance(parsed, Labelled):
        parsed = parsed.conversation
    if isinstance(parsed, PreferencePair):
        conversations: Sequence[Conversation] = (parsed.chosen, parsed.rejected)
    else:
        conversations = parsed if isinstance(parsed, tuple) else (parsed,) if isinstance(parsed, Conversation) else ()
    present = {text for one in conversations for item in one.messages for text in (item.text, item.reasoning)}
    left_out = {}
    for key, texts in unread.items():
        if not texts:  # numbers
            left_out[key] = 0
            continue
        left = [text for text in texts if text not in present]
        if len(left) < len(texts) and ROLES.keys() >= set(left):  # the roles of messages that are there
            continue
        if left:
            left_out[key] = sum(map(len, left))
    return left_out


def parse_record(value: Any, kind: RecordKind | None = None, data_format: str = "auto") -> tuple[str, Parsed]:
    """The format's name and the parsed record, as `read_record` has them."""
    read = read_record(value, kind, data_format)
    return read.format, read.parsed
