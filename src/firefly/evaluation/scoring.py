"""How likely texts are to a model that is not trained: log-probabilities of their target tokens, example by example."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from firefly.data.batching import PackedBatch, pack, plan_microbatches
from firefly.data.schema import Tokens
from firefly.models.adapters import transformers_model
from firefly.models.attention import choose_layout, segmented
from firefly.models.probing import evaluating

PLANNED_TOGETHER = 256
"""Examples that are laid into passes at a time: enough to fill them well."""
PASS_TOKENS = 2048
PASS_LOGITS = 1 << 27
"""Logits of a pass, which an example alone may exceed: half a GB of fp32."""
ROWS_AT_A_TIME = 256
"""Positions whose logits are held in fp32 at a time."""


@dataclass(frozen=True)
class TargetScores:
    """Of the targets of one example, in their order.

    Attributes:
        logps: natural logarithms of their probabilities, fp64 (targets,).
        likeliest: whether each is the model's first choice, bool (targets,).
    """

    logps: np.ndarray
    likeliest: np.ndarray

    @property
    def total(self) -> float:
        """Their summed negative log-likelihood, nats."""
        return -float(self.logps.sum())

    def split(self, counts: Sequence[int]) -> list[TargetScores]:
        """Those of several examples apart, of so many targets each."""
        borders = np.cumsum(counts)[:-1]
        parts = zip(np.split(self.logps, borders), np.split(self.likeliest, borders), strict=True)
        return [TargetScores(logps, likeliest) for logps, likeliest in parts]


def score_targets(
    model: Any,
    examples: Iterable[Tokens],
    pass_tokens: int = PASS_TOKENS,
    tick: Callable[[int], None] = lambda done: None,
) -> Iterator[TargetScores]:
    """Scores of each example, in their order; examples are read as they are needed.

    Short examples share a pass, as in training, where the model can attend to segments. Logits are computed at targets
    only, where its architecture can leave the others out. The model's adapters count as they are selected.

    Args:
        model: of `load_for_generation`, or peft's around one. Nothing else may be computing with it meanwhile.
        pass_tokens: tokens of a pass, which a single longer example exceeds.
        tick: called behind each pass with the number of its examples.
    """
    scorer = Scorer.of(model)
    source = iter(examples)
    while window := list(islice(source, PLANNED_TOGETHER)):
        costs = [scorer.cost(len(example.input_ids), example.num_targets, pass_tokens) for example in window]
        found: list[TargetScores] = [TargetScores(np.zeros(0), np.zeros(0, dtype=bool))] * len(window)
        for group in plan_microbatches(costs, pass_tokens):
            scores = scorer.score(pack([window[number] for number in group], scorer.shares))
            for number, of_one in zip(group, scores.split([window[n].num_targets for n in group]), strict=True):
                found[number] = of_one
            tick(len(group))
        yield from found


@dataclass(frozen=True)
class Scorer:
    """A model that scores packed rows.

    Attributes:
        model: transformers' model itself, set to attend to segments where it can.
        solo: whether it cannot, so that each segment is a row of its own.
        keeps: whether its architecture can leave out the logits of positions that nobody asks for.
    """

    model: Any
    solo: bool
    keeps: bool

    @classmethod
    def of(cls, model: Any) -> Scorer:
        inner: Any = transformers_model(model)
        if segmented(inner) is None:
            choose_layout(inner)
        return cls(
            inner,
            solo=segmented(inner) is None,
            keeps="logits_to_keep" in inspect.signature(type(inner).forward).parameters,
        )

    def cost(self, tokens: int, targets: int, pass_tokens: int) -> int:
        """What so many tokens take of a pass: as many, or as many as their logits weigh."""
        logits = targets if self.keeps else tokens
        vocabulary = self.model.config.get_text_config().vocab_size
        return max(tokens, round(logits * vocabulary / PASS_LOGITS * pass_tokens))

    @property
    def shares(self) -> bool:
        """Whether what examples begin with alike is computed once for all of them; see `tasks.base.shares`."""
        return not self.solo and self.model.device.type == "cpu"

    @torch.no_grad()
    def score(self, packed: PackedBatch) -> TargetScores:
        """Scores of the targets of a pass, in their order."""
        packed = packed.to(self.model.device)
        logps, likeliest = [], []
        with evaluating(self.model):
            for row in packed.apart() if self.solo else packed.rows:
                given = row.model_inputs(self.solo)
                index, targets = given.pop("target_index"), given.pop("targets")
                asked = {"logits_to_keep": index} if self.keeps else {}
                logits = self.model(**given, **asked, use_cache=False).logits[0]
                for part in range(0, len(targets), ROWS_AT_A_TIME):
                    at = slice(part, part + ROWS_AT_A_TIME)
                    scored = logits[at] if self.keeps else logits[index[at]]
                    _take(scored.float(), targets[at], logps, likeliest)
        if not logps:  # no example has a target
            return TargetScores(np.zeros(0), np.zeros(0, dtype=bool))
        return TargetScores(torch.cat(logps).cpu().numpy(), torch.cat(likeliest).cpu().numpy())


def _take(logits: Tensor, targets: Tensor, logps: list[Tensor], likeliest: list[Tensor]) -> None:
    chosen = logits.gather(1, targets[:, None])[:, 0]
    logps.append((chosen - logits.logsumexp(1)).double())
    likeliest.append(logits.argmax(1) == targets)
