"""DPO and its relatives on pairs that share their prompt, averaged over the pairs of a whole step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from firefly import ranks
from firefly.config import Config
from firefly.console import notice
from firefly.data.batching import ExampleList, StepTotals
from firefly.data.dataset import Split
from firefly.data.pair_batching import PairBatch, pack_pairs
from firefly.distributed.backends import Backend
from firefly.distributed.model import TrainableModel
from firefly.errors import UsageError
from firefly.files import cache_folder
from firefly.models.precision import Precision
from firefly.tasks import reference
from firefly.tasks.base import Forward, Task, resting
from firefly.tasks.preference_losses import PREFERENCE_LOSSES, PairLogps, nll_weight, rewards
from firefly.tasks.reference import AdapterOff, FrozenAdapter, FrozenModel, Reference, Untrained
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


@dataclass(frozen=True)
class PairPacking:
    """Packs some pairs into a microbatch; an object of a module, so that data workers can be started with it.

    Attributes:
        shared, prompts: see `pack_pairs`.
        reference: (all pairs, 2) log-probabilities under the reference, if they were computed beforehand.
    """

    shared: bool
    prompts: bool
    reference: np.ndarray | None

    def __call__(self, rows: Sequence[int], pairs: list[Any]) -> PairBatch:
        known = None if self.reference is None else self.reference[list(rows)]
        return pack_pairs(pairs, shared=self.shared, prompts=self.prompts, reference=known)


class PreferenceTask(Task):
    """Minimises the mean loss over the step's pairs, plus what NLL of the chosen answers the loss asks for.

    Attributes:
        reference: set by `attach`; None where the loss has none, or it has been asked beforehand.
        precomputed: held out or not → (pairs, 2) log-probabilities under the reference.
    """

    METRICS = ("loss", *SUMMED)
    CHATS = True

    def __init__(self, config: Config, reference: Reference | None = None) -> None:
        super().__init__(config)
        self.settings = config.preference
        self.objective = PREFERENCE_LOSSES[self.settings.loss]
        self.nll_weight = nll_weight(self.settings)
        self.reference = reference
        self.precomputed: dict[bool, np.ndarray] = {}

    @classmethod
    def settle(cls, config: Config, backend: Backend) -> Config:
        """No dropout, since two passes of one model are compared; and where weights are sharded among ranks, a
        reference that is no adapter switched off is asked before training."""
        adapter, settings = config.adapter, config.preference
        if adapter.mode != "full" and adapter.dropout:
            if "lora_dropout" in config.given:
                notice(
                    "preference.no_dropout",
                    "lora_dropout {value} is switched off: preference training compares two passes of the same model.",
                    value=adapter.dropout,
                )
            config = replace(config, adapter=replace(adapter, dropout=0.0))
        needed = bool(PREFERENCE_LOSSES[settings.loss].reference)
        second = adapter.mode == "full" or adapter.name_or_path
        if needed and second and backend.shards_weights and not settings.precompute_reference:
            notice(
                "engine.reference_first",
                "precompute_reference is switched on: {engine} shards the weights, and every rank would hold the "
                "whole reference model.",
                engine=backend.name,
            )
            config = replace(config, preference=replace(settings, precompute_reference=True))
        return config

    def attach(self, module: Any, precision: Precision) -> None:
        """The model as it stands now becomes the reference; its dropout is switched off."""
        disable_dropout(module)
        adapter, first = self.config.adapter, self.settings.precompute_reference
        if not self.objective.reference:
            return
        if adapter.mode == "full":
            # With log-probabilities computed beforehand the untrained model itself serves, and no copy is kept.
            self.reference = Untrained() if first else FrozenModel(module, precision.compute)
        elif adapter.name_or_path:
            self.reference = Untrained() if first else FrozenAdapter(module)
        else:
            self.reference = AdapterOff()

    def packing(self, held_out: bool, solo: bool) -> PairPacking:
        return PairPacking(not solo, self.objective.trains_prompt, self.precomputed.get(held_out))

    def nll_targets(self, examples: ExampleList) -> np.ndarray:
        counts = examples.counts
        if not self.objective.trains_prompt:
            return counts.chosen_targets
        return counts.chosen_targets + np.maximum(counts.prompt - 1, 0)

    # ---- log-probabilities ----

    def answer_logps(self, forward: Forward, batch: PairBatch) -> Tensor:
        """Log-probabilities of the chosen answers, the rejected ones and the prompts (if trained), (3, pairs) fp32."""
        logps = [forward(row, per_token=True)["logps"] for row in batch.rows]
        sums = torch.zeros(3 * batch.pairs, device=batch.owner.device)
        return sums.index_add(0, batch.owner, torch.cat(logps)).view(3, batch.pairs)

    def reference_logps(self, model: TrainableModel, batch: PairBatch) -> Tensor:
        """The same of both answers under the reference, (2, pairs); zeros where the loss has none."""
        if batch.reference is not None:
            return batch.reference
        if self.reference is None:
            return torch.zeros(2, batch.pairs, device=batch.owner.device)
        with torch.no_grad(), self.reference.lent(model.module) as lent, resting(lent):
            return self.answer_logps(Forward(model, lent), batch)[:2]

    def pair_logps(self, forward: Forward, batch: PairBatch) -> tuple[PairLogps, Tensor]:
        """The pairs' log-probabilities, and Σ NLL of what the NLL term runs over."""
        expected = self.reference_logps(forward.model, batch)
        found = self.answer_logps(forward, batch)
        pair = PairLogps(found[0], found[1], expected[0], expected[1], batch.counts[0], batch.counts[1])
        return pair, -(found[0].sum() + found[2].sum())

    # ---- loss and metrics ----

    def microbatch_loss(self, forward: Forward, batch: PairBatch, totals: StepTotals) -> tuple[Tensor, Tensor]:
        pair, nll = self.pair_logps(forward, batch)
        losses = self.objective.loss(pair, self.settings)
        loss = losses.sum() / totals.examples
        if self.nll_weight:
            loss = loss + self.nll_weight * nll / max(totals.nll_targets, 1)
        return loss, self._measure(pair, losses, nll)

    @torch.no_grad()
    def _measure(self, pair: PairLogps, losses: Tensor, nll: Tensor) -> Tensor:
        chosen, rejected = rewards(pair, self.settings)
        values = (losses, chosen, rejected, chosen - rejected, (chosen > rejected).float(), pair.chosen, pair.rejected)
        return torch.stack([nll, *(value.sum() for value in values)]).double()

    def training_metrics(self, sums: list[float], examples: int) -> dict[str, float]:
        return {name: value / examples for name, value in zip(SUMMED, sums[2:], strict=True)}

    def evaluation_sums(self, forward: Forward, batch: PairBatch) -> Tensor:
        pair, nll = self.pair_logps(forward, batch)
        return self._measure(pair, self.objective.loss(pair, self.settings), nll)

    def evaluation_metrics(self, sums: list[float], totals: StepTotals) -> dict[str, float]:
        nll, loss, *others = sums
        pairs = max(totals.examples, 1)
        loss = loss / pairs
        if self.nll_weight:
            loss += self.nll_weight * nll / max(totals.nll_targets, 1)
        return {"loss": loss, **{name: value / pairs for name, value in zip(SUMMED, others, strict=True)}}

    # ---- the reference beforehand ----

    def ask_reference(self, model: TrainableModel, data: Split, parts: Sequence[Any], checkpoint: Path | None) -> None:
        """With `precompute_reference`, take the reference's log-probabilities from the cache or compute them now; the
        reference is freed.

        Args:
            parts: what they depend on besides the examples: weights, types, adapter.
            checkpoint: that the run goes on from. Where weights are sharded it is loaded already, and the reference
                cannot be asked any more.

        Raises:
            UsageError: such a run goes on, and the cache has nothing.
        """
        if not (self.settings.precompute_reference and self.reference):
            return
        for held_out, examples in ((False, data.train), (True, data.held_out)):
            if examples is None:
                continue
            key = reference.cache_key([*parts, examples.fingerprint])
            found = ranks.from_first(reference.cached(key))
            if found is None and checkpoint is not None and model.backend.shards_weights:
                raise UsageError(
                    "engine.no_reference",
                    "this run's log-probabilities of the reference are gone from the cache ({path}), and under "
                    "{engine} they cannot be computed any more once training has begun. Start a new run, or resume "
                    "without {engine}.",
                    path=cache_folder(),
                    engine=model.backend.name,
                )
            if found is None:
                found = reference.store(key, self._all_logps(model, examples, held_out), ranks.is_first())
            self.precomputed[held_out] = found
        self.reference = None

    def _all_logps(self, model: TrainableModel, examples: ExampleList, held_out: bool) -> Tensor:
        """Of each pair, chosen and rejected, (pairs, 2)."""
        logps = torch.zeros(len(examples), 2, device=model.device)
        loader = self.in_order(examples, held_out, model)
        said = {"desc": translate("reference log-probabilities"), "total": len(loader), "disable": None, "leave": False}
        for step in tqdm(loader, **said):
            for rows, batch in zip(step.rows, step.microbatches, strict=True):
                found = self.reference_logps(model, batch.to(model.device))
                logps[torch.tensor(rows, dtype=torch.long, device=logps.device)] = found.T
        return model.summed(logps)  # each rank has those of its own rows, and zeros


def disable_dropout(model: torch.nn.Module) -> None:
    """Switch every dropout off: policy and reference are compared, and chance would be taken for a preference."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):  # attention takes its probability as a number
                setattr(module, name, 0.0)
