"""What a task is: how its examples are packed, which loss a step minimizes, which metrics it has.

A step is computed here, microbatch by microbatch. Its loss and gradients do not depend on how the step is split into
microbatches and ranks. Nothing here waits for the device (no host sync).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from firefly.config import Config
from firefly.console import notice
from firefly.data.batching import (
    ExampleList,
    PackedBatch,
    PackedExamples,
    Packer,
    Step,
    StepLoader,
    StepPlan,
    StepSettings,
    StepSource,
    StepTotals,
    step_loader,
)
from firefly.data.dataset import Split
from firefly.distributed.backends import Backend
from firefly.distributed.model import TrainableModel
from firefly.models.causal_lm import CausalLM
from firefly.models.kernels.matmul import casts_kept
from firefly.models.precision import Precision
from firefly.models.router import count_choices, recorded_logits, router_loss

DROPOUT = re.compile("dropout|pdrop")
"""What architectures call the probability of one."""

PACKED_TOGETHER = 64
"""Examples that are packed at a time outside of training steps (evaluation): enough to fill microbatches well."""


@dataclass(frozen=True)
class ComputedStep:
    """A step whose gradients are computed and not yet applied.

    Attributes:
        loss: this rank's part; the mean over ranks is the loss of the step. A scalar on the device.
        parts: what each microbatch added to it.
        example_ids: of each microbatch, their numbers in the data set.
        sums: what the task measures, summed over the microbatches, fp64 on the device; None if nothing.
        refused: the loss was not finite, and backward was stopped before DeepSpeed, which steps the optimizer within
            backward, could apply it; gradients are incomplete.
    """

    loss: Tensor
    parts: list[Tensor]
    example_ids: tuple[tuple[int, ...], ...]
    sums: Tensor | None = None
    refused: bool = False


@dataclass(frozen=True)
class OutOfMemory:
    """A step that ran out of memory at microbatch number `microbatch`; gradients of earlier ones may be accumulated."""

    microbatch: int


class Forward:
    """Calls a prepared model on packed rows and, in training, records router logits for the router loss."""

    def __init__(self, model: TrainableModel, module: CausalLM | None = None) -> None:
        """module: called instead of the model's own, such as a reference model."""
        self.model = model
        self.module = model.wrapped if module is None else module
        self.solo = model.solo
        self.recorded: list[tuple[tuple[Tensor, ...], Tensor]] = []

    def __call__(self, row: PackedBatch, per_token: bool = False) -> dict[str, Any]:
        """`loss` (Σ NLL over the row's targets, a scalar) or, `per_token`, `logps` (targets,); of a model that scores,
        `scores` (targets,). All fp32."""
        recording = self.model.router is not None and torch.is_grad_enabled()
        asked = {"output_router_logits": True} if recording else {}
        with self.model.autocast():
            result = self.module(**row.model_inputs(self.solo), per_token=per_token, **asked)
        if self.model.router and recording:
            self.recorded.append((recorded_logits(result, self.model.router), row.weights()))
        return result

    def summed_logps(self, rows: Sequence[PackedBatch], owners: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Log-probabilities of the rows' targets, summed in `dtype` by their channel `owner`, (owners,)."""
        logps = torch.cat([self(row, per_token=True)["logps"] for row in rows]).to(dtype)
        owner = torch.cat([row.channels["owner"] for row in rows])
        return logps.new_zeros(owners).index_add(0, owner, logps)

    def router_loss(self, expert_counts: Tensor | None, totals: StepTotals) -> Tensor:
        """The share of the step's router loss of what was recorded since the last call, a scalar.

        Args:
            expert_counts: how often the whole step chooses each expert; None where what was recorded is the whole step.
        """
        recorded, self.recorded = self.recorded, []
        settings = self.model.router
        assert settings is not None
        if expert_counts is None:
            counts = [count_choices(logits, settings, weights) for logits, weights in recorded]
            expert_counts = torch.stack(counts).sum(0)
        shares = [
            router_loss(logits, settings, weights, expert_counts, totals.input_tokens) for logits, weights in recorded
        ]
        return torch.stack(shares).sum()


class Task(ABC):
    """An objective: pretraining, SFT, preferences."""

    METRICS: ClassVar[tuple[str, ...]]
    """Names of what `evaluation_metrics` gives."""
    HEAD: ClassVar[Literal["nll", "logps", "score"]]
    """What the model's head makes of targets: the sum of their NLL, the log-probability of each, or a text's score."""
    UNIT: ClassVar[Literal["token", "example"]] = "example"
    """What the loss is a mean over."""

    def __init__(self, config: Config) -> None:
        self.config = config

    # ---- what an objective defines ----

    @classmethod
    def settle(cls, config: Config, backend: Backend) -> Config:
        """The configuration with the values that the objective sets itself."""
        return config

    @classmethod
    def asks_reference(cls, config: Config) -> bool:
        """Whether every step runs a reference model too; in full fine-tuning a second model, in the compute type."""
        return False

    @classmethod
    def trains_prompt(cls, config: Config) -> bool:
        """Whether a pair's prompt has targets, too."""
        return False

    def identity(self) -> dict[str, Any]:
        """The settings of this objective that change its loss: a run resumes only with the same values."""
        return {}

    def attach(self, module: torch.nn.Module, precision: Precision) -> None:
        """Prepare the model before the first step: keep a reference, switch dropout off."""
        return

    def ask_reference(self, model: TrainableModel, data: Split, parts: Sequence[Any], checkpoint: Path | None) -> None:
        """Compute what is needed of the untrained model once, before the first step."""
        return

    @abstractmethod
    def packing(self, held_out: bool, solo: bool, share: bool) -> Packer:
        """How one microbatch is made of examples.

        Args:
            share: what examples begin with alike may be laid out once (`data.batching.pack`).
        """

    def nll_targets(self, examples: ExampleList) -> np.ndarray | None:
        """Of each example the tokens whose NLL a preference loss adds; None without one."""
        return None

    def rows_of(self, batch: Any, solo: bool) -> tuple[PackedBatch, ...]:
        """The packed rows of a microbatch; each is one forward pass."""
        return batch.rows

    def over_step(self, forward: Forward, batches: Sequence[Any], totals: StepTotals) -> Any:
        """Statistics over the whole step and all ranks that each microbatch's loss needs; computed without gradients
        before the first microbatch."""
        return None

    @abstractmethod
    def microbatch_loss(
        self, forward: Forward, batch: Any, totals: StepTotals, of_step: Any
    ) -> tuple[Tensor, Tensor | None]:
        """What one microbatch adds to the step's loss, a scalar, and to its metric sums.

        Args:
            of_step: the result of `over_step`.
        """

    @abstractmethod
    def evaluation_values(self, forward: Forward, batch: Any, examples: int, of_step: Any) -> Tensor:
        """What an evaluation sums up, of each example of one microbatch: first its loss, then whatever metrics need.

        Args:
            examples: how many it holds; 0 of padding (see `empty_row`), which is computed all the same.

        Returns:
            (examples, any) fp64 on the device.
        """

    @abstractmethod
    def evaluation_metrics(self, sums: list[float], totals: StepTotals) -> dict[str, float]:
        """Metrics of the examples that `sums` of their values and `totals` were taken over."""

    def example_losses(self, values: np.ndarray, totals: StepTotals) -> np.ndarray:
        """What each example adds to the loss, which is their sum over `UNIT`s, (examples,) fp64.

        Args:
            values: of `evaluation_values`, of all examples.
        """
        return values[:, 0]

    def prefers(self, values: np.ndarray) -> np.ndarray | None:
        """Of each pair whether the model prefers the better answer, bool (pairs,); None where there are no pairs."""
        return None

    def training_metrics(self, sums: list[float], examples: int) -> dict[str, float]:
        """Metrics of the steps since the last log, from their `ComputedStep.sums` of all ranks."""
        return {}

    # ---- steps ----

    def steps(self, examples: ExampleList, settings: StepSettings, model: TrainableModel, **loading: Any) -> StepSource:
        """Whole steps in the seeded order, an epoch at a time; each rank packs its own share.

        Args:
            loading: workers and pinning, for the data loader.
        """
        targets = self.nll_targets(examples)
        plan = StepPlan(examples.counts, settings, model.budget, nll_targets=targets, share=model.share)
        # Not prepared by accelerate, which would shard the steps over ranks once more.
        return step_loader(
            PackedExamples(examples, self.packing(False, model.solo, shares(model, False))), plan, **loading
        )

    def in_order(
        self, examples: ExampleList, held_out: bool, model: TrainableModel, rows: np.ndarray | None = None
    ) -> StepLoader:
        """Examples (those at `rows`, or all) in their order, packed some at a time; each rank packs its own share."""
        plan = StepPlan(
            examples.counts,
            StepSettings(PACKED_TOGETHER, shuffle=False),
            model.budget,
            nll_targets=self.nll_targets(examples),
            rows=rows,
            share=model.share,
        )
        return step_loader(PackedExamples(examples, self.packing(held_out, model.solo, shares(model, held_out))), plan)

    def backward(self, model: TrainableModel, step: Step[Any]) -> ComputedStep | OutOfMemory:
        """Loss and gradients of a whole step, without a host sync.

        Raises:
            torch.OutOfMemoryError: on one of several ranks: the others would hang in a collective; and under DeepSpeed,
                which cannot restart a step.
        """
        model.train()
        batches = step.microbatches
        if model.device.type != "cpu":
            batches = tuple(batch.to(model.device) for batch in batches)
        forward = Forward(model)
        parts: list[Tensor] = []
        total: Any = 0.0
        sums = None
        # FSDP and ZeRO swap parameter storage between passes, so a cast kept beyond one would be stale.
        casts = casts_kept(model.parameters) if model.backend.name in ("single", "ddp") else nullcontext()
        failed, expert_counts, of_step = None, None, None
        largest = max(  # of those that can be halved, if there are any
            range(len(batches)),
            key=lambda n: (len(step.example_ids[n]) > 1, sum(row.input_ids.numel() for row in batches[n].rows)),
        )
        with casts:
            for number, batch in enumerate(batches):
                last, tried = number == len(batches) - 1, number
                try:
                    if number == 0:
                        tried = largest  # `over_step` runs them all: the largest is taken for the one that failed
                        of_step = self.over_step(forward, batches, step.totals)
                        if model.router and (len(batches) > 1 or model.ranks > 1):
                            expert_counts = self._count_experts(model, batches)
                        tried = number
                    with model.exchanging(last):
                        loss, measured = self.microbatch_loss(forward, batch, step.totals, of_step)
                        if model.router:
                            loss = loss + forward.router_loss(expert_counts, step.totals)
                        if model.ranks > 1:
                            loss = loss * model.ranks  # backends average gradients over ranks
                        parts.append(loss.detach())
                        total = parts[0] if number == 0 else total + parts[-1]
                        if measured is not None:
                            sums = measured if sums is None else sums + measured
                        # DeepSpeed steps the optimizer at the end of the last backward: the loss is checked before.
                        if last and model.backend.deepspeed and model.any_rank(not bool(torch.isfinite(total))):
                            return ComputedStep(total, parts, step.example_ids, sums, refused=True)
                        if model.bare:
                            loss.backward()
                        else:
                            model.accelerator.backward(loss)
                except torch.OutOfMemoryError:
                    if model.ranks > 1 or model.backend.deepspeed:
                        raise
                    failed = tried  # returned outside of `except`: its traceback keeps the tensors of the failed pass
                    break
        if failed is not None:
            return OutOfMemory(failed)
        return ComputedStep(total, parts, step.example_ids, sums)

    @torch.no_grad()
    def _count_experts(self, model: TrainableModel, batches: Sequence[Any]) -> Tensor:
        """How often the whole step chooses each expert, by an extra forward pass: the first microbatch's loss needs it.

        Without dropout, so that the random state is left for the training pass.
        """
        settings = model.router
        assert settings is not None
        total = torch.zeros(settings.num_experts, device=model.device)
        nothing = torch.zeros(0, dtype=torch.long, device=model.device)
        with resting(model.wrapped), model.autocast():
            for row in (row for batch in batches for row in self.rows_of(batch, model.solo)):
                # Without targets there is nothing to compute in the head.
                inputs = row.model_inputs(model.solo) | {"target_index": nothing, "targets": nothing}
                output = model.wrapped(**inputs, output_router_logits=True)
                total += count_choices(recorded_logits(output, settings), settings, row.weights())
        return model.summed(total)


def without_dropout(config: Config) -> Config:
    """The configuration with dropout off, for a task that compares forward passes."""
    adapter = config.adapter
    if adapter.mode == "full" or not adapter.dropout:
        return config
    if "lora_dropout" in config.given:
        notice(
            "preference.no_dropout",
            "lora_dropout {value} is switched off: preference training compares two passes of the same model.",
            value=adapter.dropout,
        )
    return replace(config, adapter=replace(adapter, dropout=0.0))


def shares(model: TrainableModel, held_out: bool) -> bool:
    """Whether what examples of a microbatch begin with alike may be computed once for all of them.

    Not where training draws dropout, which all of them would have in common. Not on GPUs, where the gradients of keys
    that many segments share are added up in as many rounds; whether that pays was not measured.
    """
    return not model.solo and model.device.type == "cpu" and (held_out or not draws_dropout(model.module))


def draws_dropout(model: torch.nn.Module) -> bool:
    """Whether the model, in training, draws any dropout: of its layers, of its adapters, or by its configuration."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            return True
        values = [value for name, value in vars(module).items() if DROPOUT.search(name)]
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig):
            values += [value for name, value in vars(config).items() if DROPOUT.search(name)]
        if any(isinstance(value, float) and value > 0 for value in values):
            return True
    return False


def disable_dropout(model: torch.nn.Module) -> None:
    """Switch every dropout off, as `without_dropout` does with the adapter's.

    Some architectures (Falcon, GPT-J, GPT-Neo) read the probability from their configuration in every pass; there it is
    0 from then on, also in what is saved.
    """
    in_configuration: dict[str, float] = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):  # attention takes its probability as a number
                setattr(module, name, 0.0)
        config = vars(module).get("config")
        for name, value in list(vars(config).items()) if isinstance(config, PreTrainedConfig) else ():
            if DROPOUT.search(name) and isinstance(value, float) and value > 0:
                setattr(config, name, 0.0)
                in_configuration[name] = value
    if in_configuration:
        notice(
            "preference.no_dropout_in_config",
            "{settings} of the model's configuration is set to 0, also in the result: two passes of a model are "
            "compared.",
            settings=", ".join(f"{name} {value}" for name, value in sorted(in_configuration.items())),
        )


@contextmanager
def resting(module: CausalLM) -> Iterator[None]:
    """A module in eval mode within the block: no dropout and no activation checkpointing."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
