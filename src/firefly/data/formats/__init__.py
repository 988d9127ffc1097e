"""Record shapes. Each entry of FORMATS recognises its records by their keys and turns one into what a task trains on.

A new format is one class, or one instance with other keys, and one line in the table. A record that fits none, or two,
is reported, never guessed; `data_format` settles it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from firefly.data.formats.chat import FireflyFormat, MessagesFormat, MossFormat, QuestionFormat
from firefly.data.formats.fields import MalformedRecord, Record, kind_of, read_text, verdict
from firefly.data.formats.preference import (
    LabelledFormat,
    MessagePairFormat,
    ShareGptPairFormat,
    TextPairFormat,
    TranscriptPairFormat,
)
from firefly.data.schema import IGNORE, Conversation, Document, PreferencePair, TokenPair, Tokens

__all__ = ["FORMATS", "Format", "FormatEntry", "MalformedRecord", "Parsed", "TaskName", "detect_format", "parse_record"]

Parsed = Conversation | PreferencePair | Document | Tokens | TokenPair
TaskName = Literal["sft", "dpo", "pretrain"]


class Format(Protocol):
    def recognises(self, record: Record) -> bool: ...

    def parse(self, record: Record) -> Parsed: ...


@dataclass(frozen=True)
class TextFormat:
    """`text`: a document."""

    def recognises(self, record: Record) -> bool:
        return "text" in record

    def parse(self, record: Record) -> Document:
        return Document(read_text(record, "text"))


@dataclass(frozen=True)
class TokensFormat:
    """Already tokenised: `input_ids`, and `labels` with -100 where there is no loss. Taken as it is, never rendered."""

    def recognises(self, record: Record) -> bool:
        return "input_ids" in record and "labels" in record

    def parse(self, record: Record) -> Tokens:
        ids, labels = _integers(record, "input_ids"), _integers(record, "labels")
        if len(ids) != len(labels):
            raise MalformedRecord("row.lengths_differ", ids=len(ids), labels=len(labels))
        ids = _ids(record, "input_ids")
        if np.any((labels != IGNORE) & (labels != ids)):
            raise MalformedRecord("row.labels_differ")
        return Tokens(ids, labels)


@dataclass(frozen=True)
class TokenPairFormat:
    """An already tokenised pair: `prompt_ids`, `chosen_ids`, `rejected_ids`, answers with their stop tokens."""

    def recognises(self, record: Record) -> bool:
        return all(name in record for name in ("prompt_ids", "chosen_ids", "rejected_ids"))

    def parse(self, record: Record) -> TokenPair:
        prompt, *answers = (_ids(record, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        ids = np.concatenate([prompt, *answers])
        labels = np.where(np.arange(len(ids)) < len(prompt), np.int32(IGNORE), ids)
        return TokenPair(ids, labels, len(prompt), len(answers[0]))


def _ids(record: Record, name: str) -> np.ndarray:
    ids = _integers(record, name)
    if not len(ids):
        raise MalformedRecord("row.empty_field", field=name)
    if ids.min() < 0:
        raise MalformedRecord("row.wrong_type", field=name, expected="ids ≥ 0", got=str(ids.min()))
    return ids


def _integers(record: Record, name: str) -> np.ndarray:
    value = record[name]
    if not isinstance(value, list) or not all(type(item) is int and abs(item) < 2**31 for item in value):
        raise MalformedRecord("row.wrong_type", field=name, expected="list of integers", got=kind_of(value))
    return np.asarray(value, dtype=np.int32)


@dataclass(frozen=True)
class FormatEntry:
    """A format and the task its records are for."""

    format: Format
    task: TaskName


FORMATS: dict[str, FormatEntry] = {
    "firefly": FormatEntry(FireflyFormat(), "sft"),
    "messages": FormatEntry(MessagesFormat("messages"), "sft"),
    "sharegpt": FormatEntry(MessagesFormat("conversations"), "sft"),
    "moss": FormatEntry(MossFormat(), "sft"),
    "alpaca": FormatEntry(QuestionFormat("instruction", "output", extra=("input",)), "sft"),
    "instruction_response": FormatEntry(
        QuestionFormat("instruction", "response", extra=("context", "input"), without=("output",)), "sft"
    ),
    "input_target": FormatEntry(QuestionFormat("input", "target"), "sft"),
    "input_output": FormatEntry(QuestionFormat("input", "output", without=("instruction",)), "sft"),
    "prompt_completion": FormatEntry(QuestionFormat("prompt", "completion"), "sft"),
    "prompt_response": FormatEntry(QuestionFormat("prompt", "response", without=("completion",)), "sft"),
    "question_answer": FormatEntry(QuestionFormat("question", "answer"), "sft"),
    "query_response": FormatEntry(QuestionFormat("query", "response"), "sft"),
    "labelled_messages": FormatEntry(LabelledFormat("messages"), "sft"),
    "labelled_answer": FormatEntry(LabelledFormat("prompt", "completion"), "sft"),
    "tokens": FormatEntry(TokensFormat(), "sft"),
    "preference": FormatEntry(MessagePairFormat(), "dpo"),
    "preference_text": FormatEntry(TextPairFormat(("prompt", "question", "instruction", "query")), "dpo"),
    "preference_sharegpt": FormatEntry(ShareGptPairFormat(), "dpo"),
    "preference_transcript": FormatEntry(TranscriptPairFormat(), "dpo"),
    "preference_responses": FormatEntry(
        TextPairFormat(("question", "prompt"), chosen="response_j", rejected="response_k"), "dpo"
    ),
    "preference_tokens": FormatEntry(TokenPairFormat(), "dpo"),
    "text": FormatEntry(TextFormat(), "pretrain"),
}


def detect_format(value: Any, task: TaskName | None = None) -> str:
    """Return the name of the one format that `value` has.

    Args:
        task: formats for this task are asked first: an Alpaca record with a `text` beside it is no document in SFT.

    Raises:
        MalformedRecord: not an object, no known format, or two at once.
    """
    if not isinstance(value, Mapping):
        raise MalformedRecord("row.not_an_object", got=kind_of(value))
    # What a format recognises is the keys and the kinds of their values, so records of one shape are asked about once.
    shape = (task, verdict(value), *((key, type(item)) for key, item in value.items()))
    found = _detected.get(shape)
    if found is None:
        found = _detect(value, task)
        if len(_detected) < MOST_SHAPES:
            _detected[shape] = found
    return found


MOST_SHAPES = 4096
_detected: dict[tuple[Any, ...], str] = {}


def _detect(value: Record, task: TaskName | None) -> str:
    # Null says as little as no key, where that leaves a known format.
    there = {key: item for key, item in value.items() if item is not None}
    fitting = [name for name, entry in FORMATS.items() if entry.format.recognises(there)]
    fitting = fitting or [name for name, entry in FORMATS.items() if entry.format.recognises(value)]
    if task is not None:
        fitting = [name for name in fitting if FORMATS[name].task == task] or fitting
    if not fitting:
        # repr: a key may hold anything, also what no terminal or file takes.
        keys = ", ".join(map(repr, sorted(value)[:8])) or "–"
        if missing := _one_key_short(value):
            raise MalformedRecord("row.one_key_short", keys=keys, missing=missing)
        raise MalformedRecord("row.unknown_format", keys=keys, known=", ".join(FORMATS))
    if len(fitting) > 1:
        raise MalformedRecord("row.two_formats", formats=", ".join(fitting))
    return fitting[0]


OFTEN_FORGOTTEN = ("rejected", "chosen", "output", "instruction", "response", "answer", "target", "input", "labels")


def _one_key_short(value: Record) -> str:
    """What would make the record one of a known format: 'rejected' (for preference_pair), …; empty if nothing would."""
    found = []
    for key in OFTEN_FORGOTTEN:
        if key in value:
            continue
        # Of the kind that its counterpart has, as answers are texts in some formats and messages in others.
        kinds = ("", []) if not isinstance(value.get("chosen", value.get("rejected")), list) else ([], "")
        fitting = [n for n, entry in FORMATS.items() if any(entry.format.recognises({**value, key: k}) for k in kinds)]
        if fitting:
            found.append(f"{key!r} ({fitting[0]})")
    return ", ".join(found[:3])


def parse_record(value: Any, task: TaskName | None = None, data_format: str = "auto") -> tuple[str, Parsed]:
    """Return the format's name and the parsed record.

    Args:
        task: the task the record must be for; None: any.
        data_format: a name of FORMATS settles what the record is.

    Raises:
        MalformedRecord: see `detect_format`; a field that is missing or wrong; a record for another task.
    """
    name = detect_format(value, task) if data_format == "auto" else data_format
    if not isinstance(value, Mapping):
        raise MalformedRecord("row.not_an_object", got=kind_of(value))
    entry = FORMATS[name]
    if task is not None and entry.task != task:
        raise MalformedRecord("row.other_task", format=name, task=entry.task, wanted=task)
    try:
        return name, entry.format.parse(value)
    except KeyError as error:  # a format that was forced on a record without its keys
        raise MalformedRecord("row.missing_field", field=error.args[0]) from None
