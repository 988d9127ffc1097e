"""Records of preferences: two answers to one prompt, a better and a worse one."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from firefly.data.formats.chat import SIDES, answers_in_list, is_paired, is_restated, question_and_answer
from firefly.data.formats.fields import (
    Fields,
    MalformedRecord,
    check_text,
    is_record_trained,
    json_text,
    number_in,
    read_text,
    read_tools,
    verdict,
    wrong_kind,
)
from firefly.data.formats.messages import MESSAGE_KEYS, behind_beginning, read_message, read_messages, untrained
from firefly.data.formats.texts import ASKED, FIRST, PROMPTS, SPELLINGS, answer_text, is_texts, question_text
from firefly.data.schema import Conversation, Message, PreferencePair

HUMAN_OR_ASSISTANT = re.compile(r"\n\n(Human|Assistant):[ ]?")


def sides_of(record: Fields) -> tuple[str, str] | None:
    """The keys of the better and the worse answer."""
    both = [sides for sides in SIDES if all(record.peek(name) is not None for name in sides)]
    if both:
        return both[0]
    # Where the better answer ends the conversation beside it (ms-swift).
    worse = next((worse for _, worse in SIDES if record.peek(worse) is not None), None)
    held = [key for key in MESSAGE_KEYS if record.peek(key) is not None]
    alone = worse is not None and not any(better in record for better, _ in SIDES)
    return (held[0], worse) if worse is not None and alone and len(held) == 1 else None


def question_key(record: Fields) -> str | None:
    """The key of the prompt: messages under `prompt`, else the text that leads those beside it."""
    listed = next((key for key in PROMPTS if isinstance(record.peek(key), list)), None)
    return listed or record.first_of((*FIRST, *ASKED, *PROMPTS, *SPELLINGS["input"]))


def make_pair(
    record: Fields, prompt: Sequence[Message], chosen: Message, rejected: Message, names: Sequence[str] = SIDES[0]
) -> PreferencePair:
    """Only the two answers are compared; replies inside the prompt carry no loss."""
    for answer, name in zip((chosen, rejected), names, strict=True):
        if answer.role != "assistant":
            raise MalformedRecord(
                "{field} should be from {expected}, not {got}", field=name, expected="assistant", got=answer.role
            )
    if not is_record_trained(record):
        chosen, rejected = untrained([chosen, rejected])
    tools, asked = read_tools(record), untrained(prompt)
    sides = (Conversation((*asked, answer), tools) for answer in (chosen, rejected))
    return PreferencePair(*sides, margin=read_margin(record))


MOST_MARGIN = 1e30
"""Of what fp32 holds with room to compute."""


def read_margin(record: Fields) -> float | None:
    """`margin`: by how much the chosen answer is the better one; None where no number stands there (text is then a key
    that is not read, and a table's missing cell is NaN).

    Raises:
        MalformedRecord: an infinite number.
    """
    margin = number_in(record.peek("margin"))
    if margin is None or isinstance(margin, bool) or margin != margin:
        return None
    record.get("margin")
    if abs(margin) > MOST_MARGIN:
        raise wrong_kind("margin", "finite number", got="infinity")
    return float(margin)


def _answer(record: Fields, name: str) -> list[Message]:
    """One side: a text, a message, or a list of messages."""
    value = record.peek(name)
    if isinstance(value, dict):
        return [read_message(record.inner(record[name], name, is_message=True))]
    if isinstance(value, list) and not is_texts(value):
        return read_messages(record, name)
    return [Message.of("assistant", answer_text(record, name))]


def _prompt(record: Fields) -> list[Message]:
    """The prompt beside the answers: messages, or the text of a question."""
    # `messages` may be the better conversation once more (UltraFeedback), so a prompt beside it comes first.
    key = record.first_of(MESSAGE_KEYS[1:]) or question_key(record) or record.first_of(MESSAGE_KEYS)
    if key is None:
        raise MalformedRecord("{field} is missing", field="prompt")
    if key in MESSAGE_KEYS or isinstance(record.peek(key), list):
        return behind_beginning(record, read_messages(record, key), key)
    return behind_beginning(record, [Message.of("user", question_text(record, key))], key)


def _read_pair(record: Fields, sides: tuple[str, str]) -> PreferencePair:
    """Two answers behind the prompt beside them, or two whole conversations."""
    chosen, rejected = (_answer(record, name) for name in sides)
    whole = [name for name, side in zip(sides, (chosen, rejected), strict=True) if side[0].role != "assistant"]
    if not whole:
        prompt = _prompt(record)
        chosen, rejected = [*prompt, *chosen], [*prompt, *rejected]
    elif len(whole) == 1:  # the other side is the last reply alone
        longer = chosen if sides[0] == whole[0] else rejected
        prompt = longer[:-1]
        chosen, rejected = (side if side is longer else [*prompt, *side] for side in (chosen, rejected))
    if _said(chosen[:-1]) != _said(rejected[:-1]):
        raise MalformedRecord("chosen and rejected do not continue the same prompt")
    prompt = behind_beginning(record, chosen[:-1], whole[0]) if whole else chosen[:-1]
    return make_pair(record, prompt, chosen[-1], rejected[-1], sides)


def _said(messages: Sequence[Message]) -> list[tuple[Any, ...]]:
    """What messages say, less the identifiers of their calls."""
    return [
        (item.role, item.text, item.reasoning, [call["function"] for call in item.tool_calls], item.name)
        for item in messages
    ]


@dataclass(frozen=True)
class PairFormat:
    """Two answers under two keys.

    Attributes:
        kind: `messages`: one of them is a list, a whole conversation or an answer to `prompt` (text or messages);
            `texts`: two texts to a question; `turns`: one message or text each behind the messages beside them, or any
            behind `conversations`.
    """

    kind: Literal["messages", "texts", "turns"]

    def recognizes(self, record: Fields) -> tuple[str, ...]:
        sides, held, question = sides_of(record), record.first_of(MESSAGE_KEYS), question_key(record)
        if sides is None:
            return ()
        are_lists = any(isinstance(record.peek(name), list) for name in sides)
        is_behind = sides in SIDES and ("conversations" in record or "conversation" in record)
        if are_lists and not is_behind:
            return sides if self.kind == "messages" else ()
        if held and sides in SIDES:
            return (held, *sides) if self.kind == "turns" else ()
        return (question, *sides) if question and not held and self.kind == "texts" else ()

    def parse(self, record: Fields) -> PreferencePair:
        return _read_pair(record, _sides(record))


def _sides(record: Fields) -> tuple[str, str]:
    sides = sides_of(record)
    if sides is None:
        missing = next((name for name in SIDES[0] if name not in record), SIDES[0][0])
        raise MalformedRecord("{field} is missing", field=missing)
    return sides


@dataclass(frozen=True)
class ResponsePairFormat:
    """`response_j`, the better answer, and `response_k` to a question (StackExchange)."""

    def recognizes(self, record: Fields) -> tuple[str, ...]:
        question = question_key(record)
        sides = ("response_j", "response_k")
        if question is None or not all(name in record for name in sides) or is_paired(record):
            return ()
        return (question, *sides)

    def parse(self, record: Fields) -> PreferencePair:
        for name in ("response_j", "response_k"):
            read_text(record, name)
        return _read_pair(record, ("response_j", "response_k"))


@dataclass(frozen=True)
class ListPairFormat:
    """A question and both of its answers in one list, the better one first or as numbers beside them say."""

    def recognizes(self, record: Fields) -> tuple[str, ...]:
        keys = question_and_answer(record)
        if keys is None or is_paired(record) or verdict(record) is not None:
            return ()
        return keys if answers_in_list(record, *keys) and not is_restated(record) else ()

    def parse(self, record: Fields) -> PreferencePair:
        keys = question_and_answer(record)
        if keys is None:
            raise MalformedRecord("{field} is missing", field="output")
        question, answer = keys
        answers = record[answer]
        if not is_texts(answers) or len(answers) != 2:
            got = f"{len(answers)}" if isinstance(answers, list) else type(answers).__name__
            raise wrong_kind(answer, "[chosen, rejected]", got=got)
        for number, text in enumerate(answers):
            if not check_text(text, f"{answer}[{number}]").strip():
                raise MalformedRecord("{field} is empty", field=f"{answer}[{number}]")
        better = _better_of_two(record, answer)
        chosen, rejected = (Message.of("assistant", answers[number]) for number in (better, 1 - better))
        if isinstance(record.peek(question), list):
            prompt = read_messages(record, question)
        else:
            prompt = [Message.of("user", question_text(record, question))]
        return make_pair(record, behind_beginning(record, prompt, question), chosen, rejected)


SCORES = ("scores", "score", "ratings", "rating", "rewards", "reward")
RANKS = ("ranks", "rank", "ranking", "rankings")
MEASURES = (*SCORES, *RANKS)
LABELS_OF_TWO = ("labels", "label")
SIDES_MEASURED = [
    (form.format(measure, "chosen"), form.format(measure, "rejected"), measure in SCORES)
    for measure in MEASURES
    for form in ("{0}_{1}", "{1}_{0}", "{0}-{1}", "{1}-{0}")
]
"""How records call the numbers of chosen and rejected, and whether the higher one is better."""


def _better_of_two(record: Fields, answer: str) -> int:
    """Which of two answers numbers beside them prefer: the higher score, the lower rank; the first, without numbers.

    Raises:
        MalformedRecord: numbers that prefer neither or contradict each other, or no two numbers.
    """
    preferred: dict[str, int] = {}
    own = {f"{of}_{measure}": measure for of in (answer, answer.removesuffix("s")) for measure in MEASURES}
    named = {measure: measure for measure in (*MEASURES, *LABELS_OF_TWO)} | own
    for name, measure in named.items():
        if not isinstance(record.peek(name), list):  # of something else
            continue
        found = [number_in(value) for value in record[name]]
        numbers = [
            number for number in found if isinstance(number, int) or (number is not None and math.isfinite(number))
        ]
        if len(found) != 2 or len(numbers) != 2 or numbers[0] == numbers[1]:
            got = json_text(record[name], name)
            raise wrong_kind(name, "two different numbers", got=got)
        preferred[name] = int((numbers[1] > numbers[0]) == (measure not in RANKS))
    if len(set(preferred.values())) > 1:
        raise MalformedRecord("{fields} disagree on whether the answer is a good one", fields=", ".join(preferred))
    return next(iter(preferred.values()), 0)


def outscored(record: Fields) -> tuple[str, str] | None:
    """The keys of two numbers that prefer the rejected answer (`score_chosen`, `score_rejected`), if any do."""
    for chosen, rejected, higher in SIDES_MEASURED:
        numbers = [number_in(record.peek(name)) for name in (chosen, rejected)]
        better, worse = numbers if higher else numbers[::-1]
        if better is not None and worse is not None and better < worse:
            return chosen, rejected
    return None


@dataclass(frozen=True)
class TranscriptPairFormat:
    """Two whole dialogues as text, `\\n\\nHuman: … \\n\\nAssistant: …`, that differ in their last answer (HH-RLHF)."""

    def recognizes(self, record: Fields) -> tuple[str, ...]:
        sides = sides_of(record)
        if sides is None or not isinstance(record.peek(sides[0]), str):
            return ()
        return () if record.first_of(MESSAGE_KEYS) or question_key(record) else sides

    def parse(self, record: Fields) -> PreferencePair:
        chosen, rejected = (read_transcript(read_text(record, name), name) for name in _sides(record))
        if _said(chosen[:-1]) != _said(rejected[:-1]):
            raise MalformedRecord("chosen and rejected do not continue the same prompt")
        return make_pair(record, behind_beginning(record, chosen[:-1], "chosen"), chosen[-1], rejected[-1])


def read_transcript(text: str, place: str) -> list[Message]:
    """Split a transcript at its speakers' names."""
    head, *pieces = HUMAN_OR_ASSISTANT.split("\n\n" + text.lstrip("\n"))
    if head.strip() or not pieces:
        raise MalformedRecord("{field} does not begin with Human: or Assistant:", field=place)
    return [
        Message.of("user" if speaker == "Human" else "assistant", content.strip())
        for speaker, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]
