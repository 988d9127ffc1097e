"""KTO (arXiv:2402.01306): answers labelled desirable or undesirable, without pairs.

An answer's log-ratio is compared with an estimate of KL(π ‖ π_ref), taken over the whole step on all ranks from each
prompt with the answer of the example before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from firefly import ranks
from firefly.config import Config
from firefly.data.batching import ExampleList, PackedBatch, StepTotals, moved, pack_owned
from firefly.data.schema import IGNORE, Tokens
from firefly.distributed.backends import Backend
from firefly.errors import UsageError
from firefly.tasks.base import Forward, resting
from firefly.tasks.reference import ReferenceTask


@dataclass(frozen=True)
class LabelledBatch:
    """One microbatch of labelled answers.

    Attributes:
        rows: the examples. The channel `owner` of this and of `mismatched` says which one a target belongs to.
        mismatched: their prompts, each with the answer of another example.
        desirable: (examples,) bool.
    """

    rows: tuple[PackedBatch, ...]
    mismatched: tuple[PackedBatch, ...]
    desirable: Tensor

    def to(self, device: torch.device) -> LabelledBatch:
        return moved(self, device)


@dataclass(frozen=True)
class LabelledPacking:
    """Packs some examples into a microbatch; the completions of a step are cycled by one.

    Attributes:
        limit: tokens of a prompt with another's answer, which is cut there.
        share: lay out once what examples have in common at their beginning.
    """

    limit: int
    share: bool = False

    def __call__(self, examples: ExampleList, rows: Sequence[int], step: Sequence[int]) -> LabelledBatch:
        before = dict(zip(step, [*step[-1:], *step[:-1]], strict=True))
        own = [examples[row] for row in rows]
        cycled = [self.with_answer_of(tokens, examples[before[row]]) for row, tokens in zip(rows, own, strict=True)]
        desirable = torch.tensor([bool(tokens.desirable) for tokens in own], dtype=torch.bool)
        return LabelledBatch((pack_owned(own, self.share),), (pack_owned(cycled, self.share),), desirable)

    def with_answer_of(self, asked: Tokens, other: Tokens) -> Tokens:
        """The prompt of one example with the answer of another."""
        prompt, answer = (int(np.flatnonzero(tokens.labels != IGNORE)[0]) for tokens in (asked, other))
        ids = np.concatenate([asked.input_ids[:prompt], other.input_ids[answer:]])
        labels = np.concatenate([asked.labels[:prompt], other.labels[answer:]])
        return Tokens(ids[: self.limit], labels[: self.limit])


class KTO(ReferenceTask):
    """Minimizes the mean over the step's examples of λ (1 - σ(±β (log π/π_ref - KL))): + and `desirable_weight` for
    desirable answers, - and `undesirable_weight` for the others.

    The reference is asked in every step: prompts and answers are combined anew in every epoch.
    """

    METRICS = ("loss", "kl")

    @classmethod
    def settle(cls, config: Config, backend: Backend) -> Config:
        """
        Raises:
            UsageError: a step of one example, whose answer is no estimate of what the policy gained in general.
        """
        if config.step.examples_per_rank * ranks.world_size() < 2:
            raise UsageError(
                "kto.one_example",
                "task_type kto estimates its KL term from the other examples of a step, and a step holds one. Set "
                "gradient_accumulation_steps or per_device_train_batch_size higher.",
            )
        return super().settle(config, backend)

    def identity(self) -> dict[str, Any]:
        settings, names = self.config.preference, ("beta", "desirable_weight", "undesirable_weight")
        return {name: getattr(settings, name) for name in names}

    def packing(self, held_out: bool, solo: bool, share: bool) -> LabelledPacking:
        return LabelledPacking(self.config.data.max_seq_length, share)

    def log_ratios(self, forward: Forward, rows: Sequence[PackedBatch], examples: int) -> tuple[Tensor, Tensor]:
        """log π/π_ref and log π of each answer, (examples,) fp32."""
        with self.asking_reference(forward.model) as asked:
            expected = asked.summed_logps(rows, examples)
        found = forward.summed_logps(rows, examples)
        return found - expected, found

    @torch.no_grad()
    def over_step(self, forward: Forward, batches: Sequence[LabelledBatch], totals: StepTotals) -> Tensor:
        """The estimate of KL(π ‖ π_ref), a scalar."""
        gained = torch.zeros((), device=forward.model.device)
        if totals.examples < 2:  # an epoch's last step: nothing to estimate it from
            return gained
        with resting(forward.module):
            for batch in batches:
                gained = gained + self.log_ratios(forward, batch.mismatched, len(batch.desirable))[0].sum()
        return (forward.model.summed(gained) / totals.examples).clamp_min(0)

    def losses(self, forward: Forward, batch: LabelledBatch, kl: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each example, (examples,), and what is measured of it, (examples, 8) fp64: its loss and the KL
        term; then as a desirable answer, and as another one: 1, its reward, its log-probability."""
        settings, good = self.config.preference, batch.desirable
        gained, logps = self.log_ratios(forward, batch.rows, len(good))
        sign = torch.where(good, 1.0, -1.0)
        weight = torch.where(good, settings.desirable_weight, settings.undesirable_weight)
        losses = weight * (1 - torch.sigmoid(sign * settings.beta * (gained - kl)))
        with torch.no_grad():
            values = torch.stack([torch.ones_like(gained), settings.beta * gained, logps], dim=1).double()
            sides = [side[:, None] * values for side in (good, ~good)]
            measured = torch.cat([torch.stack([losses, kl.expand(len(good))], dim=1).double(), *sides], dim=1)
        return losses, measured

    def microbatch_loss(
        self, forward: Forward, batch: LabelledBatch, totals: StepTotals, of_step: Tensor
    ) -> tuple[Tensor, Tensor]:
        losses, measured = self.losses(forward, batch, of_step)
        return losses.sum() / totals.examples, measured.sum(0)

    def training_metrics(self, sums: list[float], examples: int) -> dict[str, float]:
        found = {"kl": sums[1] / examples}
        for name, (count, rewards, logps) in (("chosen", sums[2:5]), ("rejected", sums[5:])):
            if count:
                found |= {f"rewards/{name}": rewards / count, f"logps/{name}": logps / count}
        if sums[2] and sums[5]:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found

    def evaluation_values(self, forward: Forward, batch: LabelledBatch, examples: int, of_step: Tensor) -> Tensor:
        return self.losses(forward, batch, of_step)[1]

    def evaluation_metrics(self, sums: list[float], totals: StepTotals) -> dict[str, float]:
        return {"loss": sums[0] / totals.examples, **self.training_metrics(sums, totals.examples)}
