"""DPO and its relatives on pairs that share their prompt, averaged over the pairs of a whole step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from firefly import ranks
from firefly.config import PreferenceConfig
from firefly.data.batching import ExampleList, PackedExamples, Step, StepTotals
from firefly.data.pair_batching import PairBatch, pack_pairs
from firefly.objectives import reference
from firefly.objectives.preference import PREFERENCE_LOSSES, PairLogps, nll_weight, rewards
from firefly.objectives.reference import Reference
from firefly.objectives.trainers import StepTrainer, resting
from firefly.translation import translate

SUMMED = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
"""Metrics that are means over pairs, under the names that TRL gave them."""


class PreferenceTrainer(StepTrainer):
    """Minimises the mean loss over the step's pairs, plus what NLL of the chosen answers the loss asks for."""

    METRICS = ("loss", *SUMMED)

    def __init__(self, *, preference: PreferenceConfig, reference: Reference | None, **options: Any) -> None:
        """`reference` is None where the loss has none."""
        self.preference = preference
        self.objective = PREFERENCE_LOSSES[preference.loss]
        self.nll_weight = nll_weight(preference)
        self.reference = reference
        self.precomputed: dict[bool, np.ndarray] = {}
        super().__init__(**options)
        # Sums over the pairs since the last log, on the device: a step never waits for them.
        self._sums = torch.zeros(2 + len(SUMMED), dtype=torch.float64, device=self.args.device)
        self._summed_pairs = 0

    def packed(self, examples: ExampleList, held_out: bool) -> PackedExamples:
        def pack(rows: Any, pairs: list[Any]) -> PairBatch:
            known = self.precomputed.get(held_out)
            return pack_pairs(
                pairs,
                shared=not self.solo,
                prompts=self.objective.trains_prompt,
                reference=None if known is None else known[list(rows)],
            )

        return PackedExamples(examples, pack)

    def nll_targets(self, examples: ExampleList) -> np.ndarray:
        counts = examples.counts
        if not self.objective.trains_prompt:
            return counts.chosen_targets
        return counts.chosen_targets + np.maximum(counts.prompt - 1, 0)

    # ---- log-probabilities ----

    def answer_logps(self, model: Any, batch: PairBatch) -> Tensor:
        """Log-probabilities of the chosen answers, the rejected ones and the prompts (if trained), (3, pairs) fp32."""
        logps = [self.run_model(model, row, per_token=True)["logps"] for row in batch.rows]
        sums = torch.zeros(3 * batch.pairs, device=batch.owner.device)
        return sums.index_add(0, batch.owner, torch.cat(logps)).view(3, batch.pairs)

    def reference_logps(self, model: Any, batch: PairBatch) -> Tensor:
        """The same of both answers under the reference, (2, pairs); zeros where the loss has none."""
        if batch.reference is not None:
            return batch.reference
        if self.reference is None:
            return torch.zeros(2, batch.pairs, device=batch.owner.device)
        own = self.accelerator.unwrap_model(model)
        with torch.no_grad(), self.reference.lent(own) as lent, resting(lent):
            return self.answer_logps(lent, batch)[:2]

    def pair_logps(self, model: Any, batch: PairBatch) -> tuple[PairLogps, Tensor]:
        """The pairs' log-probabilities, and Σ NLL of what the NLL term runs over."""
        expected = self.reference_logps(model, batch)
        found = self.answer_logps(model, batch)
        pair = PairLogps(found[0], found[1], expected[0], expected[1], batch.counts[0], batch.counts[1])
        return pair, -(found[0].sum() + found[2].sum())

    # ---- loss and metrics ----

    def _snapshot(self) -> Callable[[], None]:
        restore, sums, pairs = super()._snapshot(), self._sums.clone(), self._summed_pairs

        def restore_all() -> None:
            restore()
            self._sums, self._summed_pairs = sums, pairs

        return restore_all

    def microbatch_loss(self, model: Any, batch: PairBatch, totals: StepTotals) -> Tensor:
        pair, nll = self.pair_logps(model, batch)
        losses = self.objective.loss(pair, self.preference)
        loss = losses.sum() / totals.examples
        if self.nll_weight:
            loss = loss + self.nll_weight * nll / max(totals.nll_targets, 1)
        self._sums += self._measure(pair, losses, nll)
        return loss

    def _accumulate(self, model: Any, step: Step[Any]) -> Tensor:
        total = super()._accumulate(model, step)
        self._summed_pairs += step.totals.examples
        return total

    @torch.no_grad()
    def _measure(self, pair: PairLogps, losses: Tensor, nll: Tensor) -> Tensor:
        chosen, rejected = rewards(pair, self.preference)
        values = (losses, chosen, rejected, chosen - rejected, (chosen > rejected).float(), pair.chosen, pair.rejected)
        return torch.stack([nll, *(value.sum() for value in values)]).double()

    def evaluation_sums(self, model: Any, batch: PairBatch) -> Tensor:
        pair, nll = self.pair_logps(model, batch)
        return self._measure(pair, self.objective.loss(pair, self.preference), nll)

    def evaluation_metrics(self, sums: list[float], totals: StepTotals) -> dict[str, float]:
        nll, loss, *others = sums
        pairs = max(totals.examples, 1)
        loss = loss / pairs
        if self.nll_weight:
            loss += self.nll_weight * nll / max(totals.nll_targets, 1)
        return {"loss": loss, **{name: value / pairs for name, value in zip(SUMMED, others, strict=True)}}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the steps since the last log; here, and only here, they leave the device."""
        if "loss" in logs and self._summed_pairs:
            _, _, *sums = self.summed_over_ranks(self._sums).tolist()
            logs |= {name: value / self._summed_pairs for name, value in zip(SUMMED, sums, strict=True)}
            self._sums.zero_()
            self._summed_pairs = 0
        super().log(logs, start_time)

    def unlogged(self) -> dict[str, Any]:
        sums = self.summed_over_ranks(self._sums)
        return super().unlogged() | {"sums": sums.tolist(), "pairs": self._summed_pairs}

    def restore_unlogged(self, kept: Mapping[str, Any]) -> None:
        super().restore_unlogged(kept)
        if self.args.process_index == 0:  # the log adds up what the ranks have
            self._sums += self._sums.new_tensor(kept["sums"])
        self._summed_pairs += kept["pairs"]

    # ---- the reference beforehand ----

    def precompute_reference(self, parts: list[Any], fingerprints: tuple[str, str | None]) -> None:
        """Take the reference's log-probabilities from the cache, or compute them now, once; free the reference.

        Args:
            parts: what the reference's log-probabilities depend on besides the examples: weights, types, adapter.
            fingerprints: of the training and the held-out examples.
        """
        for held_out, dataset, key in self._reference_files(parts, fingerprints):
            found = ranks.from_first(reference.cached(key))
            if found is None:
                found = reference.store(key, self._all_logps(dataset), ranks.is_first())
            self.precomputed[held_out] = found
        self.reference = None

    def take_reference(self, parts: list[Any], fingerprints: tuple[str, str | None]) -> bool:
        """Take them from the cache alone; return whether all were there."""
        files = self._reference_files(parts, fingerprints)
        found = {held_out: ranks.from_first(reference.cached(key)) for held_out, _, key in files}
        if any(logps is None for logps in found.values()):
            return False
        self.precomputed = {held_out: logps for held_out, logps in found.items() if logps is not None}
        self.reference = None
        return True

    def _reference_files(
        self, parts: list[Any], fingerprints: tuple[str, str | None]
    ) -> list[tuple[bool, PackedExamples, str]]:
        """(held out or not, its examples, the name of the file in the cache)"""
        datasets = (False, self.train_dataset), (True, self.eval_dataset)
        return [
            (held_out, dataset, reference.cache_key([*parts, fingerprints[held_out]]))
            for held_out, dataset in datasets
            if isinstance(dataset, PackedExamples)
        ]

    def _all_logps(self, dataset: PackedExamples) -> Tensor:
        logps = torch.zeros(len(dataset), 2, device=self.args.device)
        loader = self._evaluation_loader(dataset, np.arange(len(dataset)))
        plan: Any = loader.batch_sampler
        for planned, step in tqdm(
            zip(plan, loader, strict=True),
            desc=translate("reference log-probabilities"),
            total=len(loader),
            disable=None,
            leave=False,
        ):
            for rows, batch in zip(planned.microbatches, step.microbatches, strict=True):
                found = self.reference_logps(self.model, batch.to(self.args.device))
                logps[torch.tensor(rows, dtype=torch.long, device=logps.device)] = found.T
        return self.summed_over_ranks(logps)  # each rank has those of its own rows, and zeros


def disable_dropout(model: torch.nn.Module) -> None:
    """Switch every dropout off: policy and reference are compared, and chance would be taken for a preference."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):  # attention takes its probability as a number
                setattr(module, name, 0.0)
