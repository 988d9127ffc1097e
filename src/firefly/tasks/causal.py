"""Pretraining and SFT: Σ NLL / Σ target tokens over the whole step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from firefly.data.batching import PackedBatch, Packer, RowPacking, StepTotals
from firefly.tasks.base import Forward, Task


class TokenTask(Task):
    """Pretraining and SFT, which differ in their data alone: of documents every token is a target, of conversations
    the replies are."""

    METRICS = ("loss", "perplexity", "target_tokens")
    HEAD = "nll"
    UNIT = "token"

    def packing(self, held_out: bool, solo: bool, share: bool) -> Packer:
        return RowPacking(share=share, owned=held_out)

    def rows_of(self, batch: PackedBatch, solo: bool) -> tuple[PackedBatch, ...]:
        return batch.apart() if solo else batch.rows

    def summed_nll(self, forward: Forward, batch: PackedBatch) -> Tensor:
        """Σ NLL over the targets of one microbatch, a scalar."""
        losses = [forward(row)["loss"] for row in self.rows_of(batch, forward.solo)]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def microbatch_loss(
        self, forward: Forward, batch: PackedBatch, totals: StepTotals, of_step: Any
    ) -> tuple[Tensor, None]:
        return self.summed_nll(forward, batch) / max(totals.targets, 1), None

    def evaluation_values(self, forward: Forward, batch: PackedBatch, examples: int, of_step: Any) -> Tensor:
        return -forward.summed_logps(self.rows_of(batch, forward.solo), examples, torch.float64)[:, None]

    def evaluation_metrics(self, sums: list[float], totals: StepTotals) -> dict[str, float]:
        loss = sums[0] / max(totals.targets, 1)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "target_tokens": totals.targets}
