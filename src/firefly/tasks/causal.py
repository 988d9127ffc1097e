"""Pretraining and SFT: Σ NLL / Σ target tokens over the whole step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from firefly.data.batching import PackedBatch, StepTotals, pack_rows
from firefly.tasks.base import Forward, Task


class CausalTask(Task):
    """Minimises the mean negative log-likelihood of the step's target tokens."""

    METRICS = ("loss", "perplexity", "target_tokens")

    def packing(self, held_out: bool, solo: bool) -> Callable[[Sequence[int], list[Any]], Any]:
        return pack_rows

    def rows_of(self, batch: PackedBatch, solo: bool) -> tuple[PackedBatch, ...]:
        return batch.apart() if solo else batch.rows

    def summed_nll(self, forward: Forward, batch: PackedBatch) -> Tensor:
        """Σ NLL over the targets of one microbatch, a scalar."""
        losses = [forward(row)["loss"] for row in self.rows_of(batch, forward.solo)]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def microbatch_loss(self, forward: Forward, batch: PackedBatch, totals: StepTotals) -> tuple[Tensor, None]:
        return self.summed_nll(forward, batch) / max(totals.targets, 1), None

    def evaluation_sums(self, forward: Forward, batch: PackedBatch) -> Tensor:
        return self.summed_nll(forward, batch)[None]

    def evaluation_metrics(self, sums: list[float], totals: StepTotals) -> dict[str, float]:
        loss = sums[0] / max(totals.targets, 1)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "target_tokens": totals.targets}


class Pretraining(CausalTask):
    """Every token of the documents is a target."""

    CHATS = False


class SupervisedFineTuning(CausalTask):
    """The replies of conversations are the targets."""

    CHATS = True
