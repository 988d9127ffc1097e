"""Reward modelling: a score for every answer, higher for the better one of a pair (arXiv:2203.02155, equation 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from firefly.config import Config
from firefly.data.batching import ExampleList, PackedBatch, StepTotals, moved
from firefly.data.pair_batching import pack_pairs
from firefly.data.schema import TokenPair
from firefly.distributed.backends import Backend
from firefly.models.precision import Precision
from firefly.tasks.base import Forward, Task, disable_dropout, without_dropout

SUMMED = ("accuracy", "margin", "reward/chosen", "reward/rejected")
"""Metrics that are means over pairs."""


@dataclass(frozen=True)
class ScoredPairs:
    """One microbatch of pairs.

    Attributes:
        rows: what the model is called with, each target the end of an answer: chosen, rejected, chosen, …
        margins: (pairs,) fp32: by how much each chosen answer is the better one; 0 where records do not say.
    """

    rows: tuple[PackedBatch, ...]
    margins: Tensor

    def to(self, device: torch.device) -> ScoredPairs:
        return moved(self, device)


@dataclass(frozen=True)
class ScorePacking:
    """Packs some pairs into a microbatch; `shared`: see `pack_pairs`."""

    shared: bool

    def __call__(self, examples: ExampleList, rows: Sequence[int], step: Sequence[int]) -> ScoredPairs:
        pairs: list[TokenPair] = [examples[row] for row in rows]
        packed = pack_pairs(pairs, shared=self.shared).rows
        margins = torch.tensor([pair.margin or 0.0 for pair in pairs])
        return ScoredPairs(tuple(map(at_ends, packed)) if pairs else packed, margins)


def at_ends(row: PackedBatch) -> PackedBatch:
    """The row with the last token of each segment, the end of an answer, in place of its targets."""
    ends = torch.tensor([segment.end - 1 for segment in row.segments])
    return replace(row, target_index=ends, targets=row.input_ids[0, ends], channels={})


class RewardTask(Task):
    """Minimizes the mean of -log σ(r(chosen) - r(rejected) - margin) over the step's pairs.

    `center_rewards_coefficient` adds that share of the mean of (r(chosen) + r(rejected))², which keeps scores around 0
    (arXiv:2312.09244).
    """

    METRICS = ("loss", *SUMMED)
    HEAD = "score"

    @classmethod
    def settle(cls, config: Config, backend: Backend) -> Config:
        return without_dropout(config)

    def attach(self, module: torch.nn.Module, precision: Precision) -> None:
        disable_dropout(module)

    def identity(self) -> dict[str, Any]:
        return {"center_rewards_coefficient": self.config.preference.center_rewards_coefficient}

    def packing(self, held_out: bool, solo: bool, share: bool) -> ScorePacking:
        return ScorePacking(not solo)

    def losses(self, forward: Forward, batch: ScoredPairs) -> tuple[Tensor, Tensor]:
        """The loss of each pair, (pairs,), and what is measured of it, (pairs, 5) fp64."""
        scores = torch.cat([forward(row)["scores"] for row in batch.rows]).view(-1, 2)
        chosen, rejected = scores.unbind(1)
        losses = -F.logsigmoid(chosen - rejected - batch.margins)
        if coefficient := self.config.preference.center_rewards_coefficient:
            losses = losses + coefficient * (chosen + rejected) ** 2
        with torch.no_grad():
            values = (losses, (chosen > rejected).float(), chosen - rejected, chosen, rejected)
            return losses, torch.stack(values, dim=1).double()

    def microbatch_loss(
        self, forward: Forward, batch: ScoredPairs, totals: StepTotals, of_step: Any
    ) -> tuple[Tensor, Tensor]:
        losses, measured = self.losses(forward, batch)
        return losses.sum() / totals.examples, measured.sum(0)

    def training_metrics(self, sums: list[float], examples: int) -> dict[str, float]:
        return {name: value / examples for name, value in zip(SUMMED, sums[1:], strict=True)}

    def evaluation_values(self, forward: Forward, batch: ScoredPairs, examples: int, of_step: Any) -> Tensor:
        return self.losses(forward, batch)[1]

    def prefers(self, values: np.ndarray) -> np.ndarray:
        return values[:, 1 + SUMMED.index("accuracy")] > 0

    def evaluation_metrics(self, sums: list[float], totals: StepTotals) -> dict[str, float]:
        pairs = max(totals.examples, 1)
        return {"loss": sums[0] / pairs, **self.training_metrics(sums, pairs)}
