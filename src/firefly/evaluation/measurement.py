"""What is asked of models that are compared, and what each of them says.

A measurement is of one model alone and can be written to a file: so the model before the first step of a run can be
compared with the same model after the last, without a second one in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from firefly.data.schema import Message

QuestionKind = Literal["held_out", "probe"]
Unit = Literal["token", "byte", "example"]


@dataclass(frozen=True)
class Question:
    """A prompt that every model that is compared answers.

    Attributes:
        key: its name in all measurements: the place of its row (`rows.jsonl:12`, with `#2` for the second prompt of a
            row), or the name of a probe.
        kind: whether it comes from the user's rows or from the fixed set of probes.
        messages: the conversation up to the answer; none for plain text that goes on.
        text: that plain text.
        tools: functions that the conversation may call, as JSON schemas.
        reference: the answer that the row holds; None where it holds none.
        accepted: texts of which a right answer holds one, of a probe; none where nobody can tell.
        language: of the question, as `answers.language_of` names it.
    """

    key: str
    kind: QuestionKind
    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    reference: str | None = None
    accepted: tuple[str, ...] = ()
    language: str = ""

    @property
    def shown(self) -> str:
        """What is asked, as a reader sees it: the last message, or the text."""
        return self.messages[-1].text if self.messages else self.text or ""


@dataclass(frozen=True)
class GivenAnswer:
    """What a model answered.

    Attributes:
        key: of its question.
        text: the reply, without reasoning and special tokens.
        tokens: that it took, 0 where an endpoint does not say.
        finish_reason: "stop" where the model ended it, "length" where it was cut.
        error: why there is none, in the user's language.
    """

    key: str
    text: str
    tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class RowLoss:
    """The loss of one example.

    Attributes:
        key: the place of its row, as in `Question`; a row of several examples has several of one key.
        source: the name of its source; of a text of the probes, its language.
        total: its summed loss: nats over its targets, or the loss of a pair or a labelled answer.
        targets: how many tokens that was summed over; 1 for a pair or a labelled answer.
        size: UTF-8 bytes of the targets' text, by which models with unlike tokenizers are compared; 0: not known.
        prefers: of a pair: whether its better answer is the likelier one for each token; None otherwise.
    """

    key: str
    source: str
    total: float
    targets: int
    size: int = 0
    prefers: bool | None = None


@dataclass(frozen=True)
class Measurement:
    """What one model said of everything that it was asked.

    Attributes:
        name: what a report calls it.
        described: what it is: model, adapter, endpoint, dtype, template, tokenizer and its hash, …
        unit: what `targets` of held-out losses counts: "token", or "example" for pairs and labelled answers.
        losses: of the held-out examples, in their order; None where it cannot tell (an endpoint).
        probe_losses: of the fixed texts; None likewise, and for a reward model.
        answers: to the questions, in their order.
        seconds: that it took.
    """

    name: str
    described: Mapping[str, Any] = field(default_factory=dict)
    unit: Unit = "token"
    losses: tuple[RowLoss, ...] | None = None
    probe_losses: tuple[RowLoss, ...] | None = None
    answers: tuple[GivenAnswer, ...] = ()
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Measurement:
        """What `as_dict` wrote; a loss that JSON has no number for, and that is null in a file, is not a number.

        Raises:
            TypeError, KeyError: it is none.
        """

        def losses(name: str) -> tuple[RowLoss, ...] | None:
            if stored[name] is None:
                return None
            return tuple(RowLoss(**row | ({"total": math.nan} if row["total"] is None else {})) for row in stored[name])

        return cls(
            name=stored["name"],
            described=stored["described"],
            unit=stored["unit"],
            losses=losses("losses"),
            probe_losses=losses("probe_losses"),
            answers=tuple(GivenAnswer(**answer) for answer in stored["answers"]),
            seconds=stored["seconds"],
        )
