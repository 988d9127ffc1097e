"""DPO and its relatives on pairs that share their prompt, averaged over the pairs of a whole step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from firefly.config import SMOOTHED_LOSSES, Config
from firefly.data.batching import ExampleList, StepTotals
from firefly.data.pair_batching import PairBatch, pack_pairs
from firefly.tasks.base import Forward
from firefly.tasks.preference_losses import PREFERENCE_LOSSES, PairLogps, nll_weight, rewards
from firefly.tasks.reference import PairReferenceTask, Reference

SUMMED = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
"""Metrics that are means over pairs, under the names that TRL gave them."""


@dataclass(frozen=True)
class PairPacking:
    """Packs some pairs into a microbatch.

    Attributes:
        shared, prompts: see `pack_pairs`.
        reference: (all pairs, 2) log-probabilities under the reference, if they were computed beforehand.
    """

    shared: bool
    prompts: bool
    reference: np.ndarray | None

    def __call__(self, examples: ExampleList, rows: Sequence[int], step: Sequence[int]) -> PairBatch:
        known = None if self.reference is None else self.reference[list(rows)]
        pairs = [examples[row] for row in rows]
        return pack_pairs(pairs, shared=self.shared, prompts=self.prompts, reference=known)


class PreferenceTask(PairReferenceTask):
    """Minimizes the mean loss over the step's pairs, plus what NLL of the chosen answers the loss asks for."""

    METRICS = ("loss", *SUMMED)

    def __init__(self, config: Config, reference: Reference | None = None) -> None:
        super().__init__(config, reference)
        self.settings = config.preference
        self.objective = PREFERENCE_LOSSES[self.settings.loss]
        self.nll_weight = nll_weight(self.settings)

    @classmethod
    def needs_reference(cls, config: Config) -> bool:
        return PREFERENCE_LOSSES[config.preference.loss].reference

    @classmethod
    def trains_prompt(cls, config: Config) -> bool:
        return PREFERENCE_LOSSES[config.preference.loss].trains_prompt

    def identity(self) -> dict[str, Any]:
        """Where the reference is computed changes no number, and so is not among them."""
        settings = self.settings
        own = {"simpo": {"simpo_gamma": settings.simpo_gamma}, "cpo": {"cpo_alpha": settings.cpo_alpha}}
        smoothing = {"label_smoothing": settings.label_smoothing} if settings.loss in SMOOTHED_LOSSES else {}
        common = {"preference_loss": settings.loss, "beta": settings.beta, "rpo_alpha": settings.rpo_alpha}
        return common | smoothing | own.get(settings.loss, {})

    def packing(self, held_out: bool, solo: bool, share: bool) -> PairPacking:
        return PairPacking(not solo, self.objective.trains_prompt, self.precomputed.get(held_out))

    def nll_targets(self, examples: ExampleList) -> np.ndarray:
        counts = examples.counts
        if not self.objective.trains_prompt:
            return counts.chosen_targets
        return counts.chosen_targets + np.maximum(counts.prompt - 1, 0)

    # ---- log-probabilities ----

    def answer_logps(self, forward: Forward, batch: PairBatch) -> Tensor:
        """Log-probabilities of the chosen answers, the rejected ones and the prompts (if trained), (3, pairs) fp32."""
        return forward.summed_logps(batch.rows, 3 * batch.pairs).view(3, batch.pairs)

    def reference_logps(self, forward: Forward, batch: PairBatch) -> Tensor:
        """The same of both answers under the reference, (2, pairs); zeros where the loss has none."""
        if batch.reference is not None:
            return batch.reference
        if self.reference is None:
            return batch.counts.new_zeros(2, batch.pairs)
        with self.asking_reference(forward.model) as asked:
            return self.answer_logps(asked, batch)[:2]

    def pair_logps(self, forward: Forward, batch: PairBatch) -> tuple[PairLogps, Tensor]:
        """The pairs' log-probabilities, and of each the NLL that the NLL term runs over, (pairs,)."""
        expected = self.reference_logps(forward, batch)
        found = self.answer_logps(forward, batch)
        pair = PairLogps(found[0], found[1], expected[0], expected[1], batch.counts[0], batch.counts[1])
        return pair, -(found[0] + found[2])

    # ---- loss and metrics ----

    def microbatch_loss(
        self, forward: Forward, batch: PairBatch, totals: StepTotals, of_step: Any
    ) -> tuple[Tensor, Tensor]:
        pair, nll = self.pair_logps(forward, batch)
        losses = self.objective.loss(pair, self.settings)
        loss = losses.sum() / totals.examples
        if self.nll_weight:
            loss = loss + self.nll_weight * nll.sum() / max(totals.nll_targets, 1)
        return loss, self._measure(pair, losses, nll).sum(0)

    @torch.no_grad()
    def _measure(self, pair: PairLogps, losses: Tensor, nll: Tensor) -> Tensor:
        """Of each pair its loss without the NLL term, its NLL, and SUMMED, (pairs, 8) fp64."""
        chosen, rejected = rewards(pair, self.settings)
        better = (chosen > rejected).float()
        values = (losses, nll, chosen, rejected, chosen - rejected, better, pair.chosen, pair.rejected)
        return torch.stack(values, dim=1).double()

    def training_metrics(self, sums: list[float], examples: int) -> dict[str, float]:
        return {name: value / examples for name, value in zip(SUMMED, sums[2:], strict=True)}

    def evaluation_values(self, forward: Forward, batch: PairBatch, examples: int, of_step: Any) -> Tensor:
        """As `_measure`, and whether the chosen answer is the likelier one for each token, (pairs, 9)."""
        pair, nll = self.pair_logps(forward, batch)
        measured = self._measure(pair, self.objective.loss(pair, self.settings), nll)
        likelier = pair.chosen / pair.chosen_tokens > pair.rejected / pair.rejected_tokens
        return torch.cat([measured, likelier[:, None].double()], dim=1)

    def evaluation_metrics(self, sums: list[float], totals: StepTotals) -> dict[str, float]:
        loss, nll, *others, _ = sums
        pairs = max(totals.examples, 1)
        loss = loss / pairs
        if self.nll_weight:
            loss += self.nll_weight * nll / max(totals.nll_targets, 1)
        return {"loss": loss, **{name: value / pairs for name, value in zip(SUMMED, others, strict=True)}}

    def example_losses(self, values: np.ndarray, totals: StepTotals) -> np.ndarray:
        """With each pair's part of the NLL term, so that their mean is the loss of them all."""
        return values[:, 0] + self.nll_weight * values[:, 1] * totals.examples / max(totals.nll_targets, 1)

    def prefers(self, values: np.ndarray) -> np.ndarray:
        return values[:, -1] > 0
