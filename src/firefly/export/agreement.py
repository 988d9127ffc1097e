"""Whether an exported model, in the engine that will run it, is the one that was trained.

Three questions: are the prompts the same ids, does every trained stop token end an answer, and are the distributions
of the next token the same along replies that are given (teacher forcing)? Quantised weights are another model on
purpose: they are judged by the mean KL divergence and by the first choice outside ties, never by equal texts, since two
tokens a tenth of a nat apart change places under any rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from firefly.export.battery import Battery, BatteryRow
from firefly.export.verification import LOGITS_AT_ONCE, all_logits
from firefly.translation import Phrase

KEPT = 64
"""Likeliest tokens of the trained model that are told apart; all others are one."""
CLOSE = 5
"""Of those, so many count for the largest gap of a log-probability."""
LEAST = 1e-6
"""What is left for the other tokens counts as this much at least: engines give logarithms in fp32, whose sum is no
better known."""


@dataclass(frozen=True)
class Limits:
    """What an export of one number type may differ by.

    Attributes:
        kl: the mean over positions, nats.
        usual: what this type is usually measured at, nats: the 10th to 90th percentile of models from 0.1 to 14 billion
            parameters.
        tie: two tokens whose probabilities are closer than this in the trained model may change places. (Not their
            logarithms: a model without an opinion has hundreds of tokens that lie nats apart at a probability of 1e-4.)
        agreement: least share of positions with the same first choice, ties left out.
        gap: largest difference of a log-probability among the likeliest tokens, nats; None: not judged.
    """

    kl: float
    usual: tuple[float, float]
    tie: float
    agreement: float
    gap: float | None = None


@dataclass(frozen=True)
class Expected:
    """What the trained model says at each position of a row's reply.

    Attributes:
        tokens: (positions, KEPT) its likeliest tokens, likeliest first.
        log_probs: (positions, KEPT) of these, natural logarithms in fp64.
    """

    tokens: np.ndarray
    log_probs: np.ndarray


@dataclass(frozen=True)
class Candidates:
    """An engine's likeliest tokens at one position: natural log-probability by token, 256 or more of them where the
    vocabulary has so many."""

    log_probs: dict[int, float]


class Refused(Exception):
    """The engine cannot make a prompt of these messages; the text says why."""


class ReadBack(Protocol):
    """An engine that has loaded what was exported."""

    @property
    def name(self) -> str:
        """The engine and its version."""
        ...

    def prompt_ids(self, row: BatteryRow) -> list[int]:
        """The ids that its own chat endpoint makes of the row's messages but the last; of a text, all its ids.

        Raises:
            Refused: it makes none.
        """
        ...

    def ends_at(self, token: int) -> bool:
        """Whether an answer ends at this token."""
        ...

    def candidates(self, ids: Sequence[int], positions: Sequence[int]) -> list[Candidates]:
        """For each position p: of the token that follows `ids[: p + 1]`."""
        ...

    def tokens_per_second(self) -> float:
        """Of one short answer."""
        ...


@dataclass(frozen=True)
class Agreement:
    """What was found.

    Attributes:
        engine: name and version.
        prompts: rows whose prompt has the same ids, and the names of those whose has not.
        unstopped: trained stop tokens that do not end an answer.
        kl: mean over positions, nats. Of tokens that an engine does not list it knows an upper bound of their
            probability alone, so that this is a lower bound, and a tight one.
        gap: largest difference of a log-probability among the likeliest tokens, nats.
        agreement: share of positions with the same first choice, ties left out.
    """

    engine: str
    equal_prompts: tuple[str, ...]
    other_prompts: tuple[str, ...]
    unstopped: tuple[int, ...]
    kl: float
    gap: float
    agreement: float
    ties: int
    positions: int
    tokens_per_second: float

    def problems(self, limits: Limits) -> list[Phrase]:
        """All that is not as it was trained; nothing where the export may be used."""
        found = []
        if self.other_prompts:
            found.append(
                Phrase(
                    "the prompts of {rows} are other token ids than those that were trained",
                    rows=", ".join(self.other_prompts),
                )
            )
        if self.unstopped:
            found.append(
                Phrase("an answer does not end at the trained stop tokens {tokens}", tokens=list(self.unstopped))
            )
        if not self.kl <= limits.kl:
            found.append(Phrase("mean KL {kl} nats, above {limit}", kl=f"{self.kl:.2e}", limit=f"{limits.kl:.2e}"))
        if limits.gap is not None and not self.gap <= limits.gap:
            found.append(
                Phrase(
                    "a log-probability of a likely token is off by {gap} nats, above {limit}",
                    gap=f"{self.gap:.3f}",
                    limit=f"{limits.gap:g}",
                )
            )
        if not self.agreement >= limits.agreement:
            found.append(
                Phrase(
                    "the first choice is the trained one at {agreement} of the positions, below {limit}",
                    agreement=f"{self.agreement:.2%}",
                    limit=f"{limits.agreement:.0%}",
                )
            )
        return found

    def report(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "prompt_ids_equal": not self.other_prompts,
            "prompts_equal": list(self.equal_prompts),
            "prompts_other": list(self.other_prompts),
            "stops_missing": list(self.unstopped),
            "mean_kl": self.kl,
            "largest_gap": self.gap,
            "top1_agreement": self.agreement,
            "ties": self.ties,
            "positions": self.positions,
            "tokens_per_second": self.tokens_per_second,
        }

    def figures(self, limits: Limits) -> Phrase:
        return Phrase(
            "{prompts} prompts with the trained ids, mean KL {kl} nats (usual for this type: {low} to {high}), top-1 "
            "agreement {agreement}, ties left out: {ties}, {speed} tokens/s",
            prompts=len(self.equal_prompts),
            kl=f"{self.kl:.2e}",
            low=f"{limits.usual[0]:g}",
            high=f"{limits.usual[1]:g}",
            agreement=f"{self.agreement:.2%}",
            ties=self.ties,
            speed=f"{self.tokens_per_second:.1f}",
        )


def expect(model: Any, battery: Battery) -> list[Expected]:
    """What a trained model says along the replies of a battery.

    Weights of 16 bits are multiplied in fp32, so that the figures are of the weights and not of a way to round.
    """
    width = model.config.get_text_config().vocab_size
    found: list[Expected] = []
    # As many rows in one pass as memory should hold the logits of: weights that are streamed are read once for each.
    rows = list(battery.rows)
    while rows:
        count, held = 0, 0
        while count < len(rows) and (count == 0 or held + len(rows[count].ids) * width <= LOGITS_AT_ONCE):
            held += len(rows[count].ids) * width
            count += 1
        for row, logits in zip(rows[:count], all_logits(model, [row.ids for row in rows[:count]]), strict=True):
            chosen = torch.log_softmax(logits[row.positions.start : row.positions.stop].double(), -1)
            top = chosen.topk(min(KEPT, chosen.shape[-1]), dim=-1)
            found.append(Expected(top.indices.numpy(), top.values.numpy()))
        rows = rows[count:]
    return found


def read_back(engine: ReadBack, battery: Battery, expected: Sequence[Expected], limits: Limits) -> Agreement:
    """Ask the engine all of the battery."""
    equal, other = [], []
    divergences, gaps, same, ties = [], [], 0, 0
    for row, known in zip(battery.rows, expected, strict=True):
        wanted = row.ids if row.text is not None else row.prompt
        try:
            (equal if engine.prompt_ids(row) == list(wanted) else other).append(row.name)
        except Refused as error:
            other.append(f"{row.name} ({error})")
        answers = engine.candidates(row.ids, row.positions)
        for tokens, log_probs, answer in zip(known.tokens, known.log_probs, answers, strict=True):
            found = listed(tokens, answer)
            divergences.append(divergence(log_probs, found))
            gaps.append(float(np.abs(log_probs[:CLOSE] - found[:CLOSE]).max()))
            first = max(answer.log_probs, key=answer.log_probs.__getitem__)
            if first == tokens[0]:
                same += 1
            elif math.exp(log_probs[0]) - float(np.exp(log_probs[tokens == first]).sum()) <= limits.tie:
                ties += 1
    counted = len(gaps) - ties
    return Agreement(
        engine=engine.name,
        equal_prompts=tuple(equal),
        other_prompts=tuple(other),
        unstopped=tuple(token for token in battery.stop_ids if not engine.ends_at(token)),
        kl=float(np.mean(divergences)),
        gap=max(gaps),
        agreement=same / counted if counted else 1.0,
        ties=ties,
        positions=len(gaps),
        tokens_per_second=engine.tokens_per_second(),
    )


def listed(tokens: np.ndarray, answer: Candidates) -> np.ndarray:
    """An engine's log-probabilities of some tokens; of one that it does not list, that of the least likely listed one,
    which bounds it from above."""
    least = min(answer.log_probs.values())
    return np.array([answer.log_probs.get(int(token), least) for token in tokens])


def divergence(expected: np.ndarray, found: np.ndarray) -> float:
    """KL divergence of the distribution over the listed tokens and one bucket for all others, nats."""
    p, q = np.exp(expected), np.exp(found)
    rest_p, rest_q = max(1 - float(p.sum()), LEAST), max(1 - float(q.sum()), LEAST)
    return max(float((p * (expected - found)).sum()) + rest_p * math.log(rest_p / rest_q), 0.0)
