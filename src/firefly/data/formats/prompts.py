"""What a record asks of a model: its conversation up to the last reply, which is what an answer is compared with.

Records may end with a question that nobody has answered, which training has no use for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from firefly.data.formats import FORMATS, detect_format, read_record
from firefly.data.formats.chat import is_paired
from firefly.data.formats.fields import Fields, MalformedRecord
from firefly.data.formats.messages import ANSWER_KEYS, MESSAGE_KEYS, QUESTION_KEYS, ROLE_KEYS
from firefly.data.formats.texts import SPELLINGS
from firefly.data.schema import Conversation, Document, Labelled, Message, PreferencePair, TokenPair, Tokens

TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be answered.

    Attributes:
        asked: messages that a reply follows, plain text that goes on, or a prompt that is tokenized already.
        reference: the reply that the record holds, of the kind that `asked` is; None where it holds no good one.
    """

    asked: Conversation | Document | TokenIds
    reference: Message | TokenIds | None = None


@dataclass(frozen=True, slots=True)
class AskedRecord:
    """The prompts of one record (several of `instances` alone), and the characters under keys that nobody reads."""

    prompts: tuple[Prompt, ...]
    unread: Mapping[str, int]


def read_prompts(value: Any, data_format: str = "auto") -> AskedRecord:
    """Read what a record asks, of any format that is trained on.

    Raises:
        MalformedRecord: see `read_record`; nothing stands before the reply.
    """
    completed, is_answered = _with_an_answer(value, data_format)
    kind = FORMATS[detect_format(completed, "conversation")].kind if data_format == "auto" else None
    read = read_record(completed, kind, data_format)
    parsed = read.parsed
    if isinstance(parsed, Conversation):
        prompts = (_split(parsed, is_answered),)
    elif isinstance(parsed, tuple):
        prompts = tuple(_split(conversation, is_answered) for conversation in parsed)
    elif isinstance(parsed, Labelled):
        # An answer that was found to be a bad one is none to compare with.
        prompts = (_split(parsed.conversation, is_answered and parsed.desirable),)
    elif isinstance(parsed, PreferencePair):
        prompts = (_split(parsed.chosen),)
    elif isinstance(parsed, Document):
        prompts = (Prompt(parsed),)
    else:
        prompts = (_split_tokens(parsed),)
    return AskedRecord(prompts, read.unread)


def _split(conversation: Conversation, is_answered: bool = True) -> Prompt:
    *before, last = conversation.messages
    if last.role != "assistant":
        return Prompt(conversation)
    if not before:
        raise MalformedRecord("nothing stands before the reply: there is no prompt")
    return Prompt(replace(conversation, messages=tuple(before)), last if is_answered else None)


def _split_tokens(parsed: Tokens | TokenPair) -> Prompt:
    """Up to the last run of trained tokens."""
    if isinstance(parsed, TokenPair):
        start, end = parsed.prompt, parsed.prompt + parsed.chosen
    else:
        runs = parsed.runs
        start, end = runs[-1].tolist() if len(runs) else (len(parsed.input_ids), len(parsed.input_ids))
    if not start:
        raise MalformedRecord("nothing stands before the reply: there is no prompt")
    return Prompt(_ids(parsed.input_ids[:start]), _ids(parsed.input_ids[start:end]) or None)


def _ids(array: np.ndarray) -> TokenIds:
    return tuple(array.tolist())


# ---- questions without an answer


def _with_an_answer(value: Any, data_format: str) -> tuple[Any, bool]:
    """The record as formats take it, with an empty answer where it has none, and whether it has one."""
    if not isinstance(value, Mapping) or is_paired(Fields(value)):
        return value, True
    there = {key: item for key, item in value.items() if item is not None}
    for key in MESSAGE_KEYS:
        if (turns := _with_a_last_answer(there.get(key))) is not None:
            return {**value, key: turns}, False
    if _is_answered(there, data_format):
        return value, True
    answer = next((key for key in SPELLINGS["output"] if key not in there), "output")
    completed = {**there, answer: ""}
    return (completed, False) if _is_answered(completed, data_format) else (value, True)


def _with_a_last_answer(turns: Any) -> list[Any] | None:
    """Turns whose last one has a question alone, with an answer to it; None if they are something else."""
    last = turns[-1] if isinstance(turns, list) and turns else None
    if not isinstance(last, Mapping):
        return None
    there = {key: item for key, item in last.items() if item is not None}
    has_question = any(key in there for key in QUESTION_KEYS)
    if not has_question or any(key in there for key in (*ROLE_KEYS, *ANSWER_KEYS)):
        return None
    return [*turns[:-1], {**there, SPELLINGS["assistant"][0]: ""}]


def _is_answered(value: Mapping[str, Any], data_format: str) -> bool:
    """Whether a format knows the record, and as more than a text: a question may have a `text` beside it."""
    if data_format != "auto":
        return bool(FORMATS[data_format].format.recognizes(Fields(value)))
    try:
        return FORMATS[detect_format(value, "conversation")].kind != "document"
    except MalformedRecord:
        return False
