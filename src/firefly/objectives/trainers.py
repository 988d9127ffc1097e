"""transformers' Trainer, taught what a step is here: one item of the data loader is one whole optimizer step.

`TrainingArguments` gets the folded batch (examples per step on this rank, accumulation 1), so that steps per epoch,
schedules and skipping on resume come out right untouched; microbatches are looped over in `training_step`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from firefly.console import notice
from firefly.data.batching import (
    ExampleList,
    PackedBatch,
    PackedExamples,
    Step,
    StepPlan,
    StepTotals,
    pack,
    step_loader,
)
from firefly.errors import UsageError
from firefly.models.adapters import count_body, transformers_model
from firefly.models.checkpointing import decoder_layers, install_checkpointing
from firefly.models.choices import Choices
from firefly.models.kernels.products import casts_kept
from firefly.models.precision import Precision
from firefly.objectives.engines import ENGINES, Engine, gathered
from firefly.objectives.finite import ComputedStep, FiniteSteps
from firefly.objectives.router import RouterSettings, count_choices, recorded_logits, router_loss, router_settings
from firefly.runs.metrics import Counts

EVALUATED_TOGETHER = 64
"""Held-out examples that are packed at a time: enough to fill the microbatches well."""


@dataclass(frozen=True)
class StepOptions:
    """What a step is, resolved for this run; `examples_per_step` over all ranks."""

    examples_per_step: int
    choices: Choices
    seed: int
    shuffle: bool
    layout: str
    on_nonfinite_loss: str = "stop"
    engine: Engine = ENGINES["single"]


class StepTrainer(FiniteSteps, ABC):
    """The loop over whole steps and over held-out data. An objective adds how examples are packed, a microbatch's share
    of the step's loss, and the sums that its evaluation needs."""

    METRICS: ClassVar[tuple[str, ...]]
    """Names of what `evaluation_metrics` gives."""

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        examples: ExampleList,
        held_out: ExampleList | None,
        tokenizer: Any,
        options: StepOptions,
        precision: Precision,
        masters: bool,
        callbacks: list[Any],
        sources: Sequence[str] = (),
    ) -> None:
        self.options = options
        self.sources = list(sources)
        self.counts = Counts()
        self.on_nonfinite_loss = options.on_nonfinite_loss
        self.applies_at_once = options.engine.deepspeed
        # A mixture of experts also balances what its routers choose, over the whole step (see `router`).
        self.router = router_settings(transformers_model(model))
        self._recorded: list[tuple[tuple[Tensor, ...], Tensor]] = []
        self._running = 0  # the microbatch that is computed at the moment
        self._losses: list[Tensor] = []  # of the microbatches of the step that is computed
        # Frozen weights are held in the compute type; full fine-tuning keeps fp32 weights and computes under autocast.
        self.masters = masters
        self.autocast_type = precision.compute if masters and precision.compute != torch.float32 else None
        super().__init__(
            model=model,
            args=args,
            train_dataset=self.packed(examples, held_out=False),  # type: ignore[arg-type]
            eval_dataset=None if held_out is None else self.packed(held_out, held_out=True),  # type: ignore[arg-type]
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        # Products of the body per parameter and token: forward 2, gradient of the input 2, gradient of the weight 2.
        self._flops_per_token = (6 if masters else 4) * count_body(model)

    # ---- what an objective says ----

    @abstractmethod
    def packed(self, examples: ExampleList, held_out: bool) -> PackedExamples:
        """The examples with the way to pack some of them into a microbatch."""

    def nll_targets(self, examples: ExampleList) -> np.ndarray | None:
        """Of each example the tokens whose NLL a preference loss adds; None without one."""
        return None

    @abstractmethod
    def microbatch_loss(self, model: Any, batch: Any, totals: StepTotals) -> Tensor:
        """What one microbatch adds to the loss of its step, a scalar."""

    @abstractmethod
    def evaluation_sums(self, model: Any, batch: Any) -> Tensor:
        """What an evaluation adds up over microbatches, (any,) fp32 on the device."""

    @abstractmethod
    def evaluation_metrics(self, sums: list[float], totals: StepTotals) -> dict[str, float]:
        """Metrics of the examples that `sums` and `totals` were taken over."""

    # ---- what a step is ----

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Whole steps in the seeded order; not prepared by accelerate, which would shard them again."""
        dataset = self.train_dataset
        assert isinstance(dataset, PackedExamples)
        self.step_plan = StepPlan(
            dataset.examples.counts,
            self.options.examples_per_step,
            self.options.choices.tokens_per_microbatch,
            seed=self.options.seed,
            shuffle=self.options.shuffle,
            drop_last=self.args.dataloader_drop_last,
            solo=self.solo,
            nll_targets=self.nll_targets(dataset.examples),
            rank=self.args.process_index,
            ranks=self.args.world_size,
        )
        return step_loader(dataset, self.step_plan, **self._loader_options())

    @property
    def solo(self) -> bool:
        """Whether every example has a microbatch of its own (see `models.attention`)."""
        return self.options.layout == "solo"

    def _loader_options(self) -> dict[str, Any]:
        workers = self.args.dataloader_num_workers
        pinned = self.args.dataloader_pin_memory and self.args.device.type == "cuda"
        options: dict[str, Any] = {"num_workers": workers, "pin_memory": pinned}
        if workers:
            options["persistent_workers"] = self.args.dataloader_persistent_workers
            options["prefetch_factor"] = self.args.dataloader_prefetch_factor
        return options

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        return None  # a step knows its own targets

    def training_step(self, model: Any, inputs: Step[Any], num_items_in_batch: Any = None) -> Tensor:  # type: ignore[override]
        """Run one whole step; returns its loss without waiting for the device.

        A step that runs out of memory is begun again in smaller microbatches, and so are the steps after it: what is
        trained stays the same.
        """
        model.train()
        step, undo = inputs, self.undo_of_step(self._snapshot())
        self._undo = undo
        while (total := self._attempt(model, step)) is None:
            step = self._with_less_memory(model, step)
        self.counts.add(inputs.totals)
        self.computed = ComputedStep(undo, total, self._losses, step.rows)
        return total

    def _attempt(self, model: Any, step: Step[Any]) -> Tensor | None:
        """Loss and gradients of a whole step; None, and all as before, if memory ran out."""
        restore = self._snapshot()
        # Sharded engines hold other tensors in a weight's place from one moment to the next.
        whole = self.options.engine.name in ("single", "ddp")
        try:
            with casts_kept() if whole else nullcontext():
                return self._accumulate(model, step)
        except torch.OutOfMemoryError:
            if self.args.world_size > 1 or self.options.engine.deepspeed:
                raise  # the other ranks would wait for ever; DeepSpeed cannot begin a step again
        # Outside of `except`: the error's traceback holds the tensors of the failed pass.
        model.zero_grad(set_to_none=True)
        restore()
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _accumulate(self, model: Any, step: Step[Any]) -> Tensor:
        total, self._losses = torch.zeros((), device=self.args.device), []
        self._running = 0
        batches = [batch.to(self.args.device) for batch in step.microbatches]
        in_parts = len(batches) > 1 or self.args.world_size > 1
        choices = self._count_choices(model, batches) if self.router and in_parts else None
        for self._running, batch in enumerate(batches):
            with self._exchange(model, last=self._running == len(batches) - 1):
                loss = self.microbatch_loss(model, batch, step.totals)
                if self.router:
                    loss = loss + self._router_loss(self.router, choices, step.totals)
                loss = loss * self.args.world_size  # engines average gradients over ranks
                total += loss.detach()
                self._losses.append(loss.detach())
                if self.applies_at_once and self._running == len(batches) - 1:
                    self.look_before(ComputedStep(self._undo, total, self._losses, step.rows))
                self.accelerator.backward(loss)
        return total  # the mean of all ranks' is the loss of the step

    def _exchange(self, model: Any, last: bool) -> AbstractContextManager[Any]:
        """Let ranks exchange gradients after the last microbatch of a step only, where that costs no memory."""
        # DeepSpeed takes the optimizer's step at the end of the backward pass that this marks.
        self.accelerator.gradient_state._set_sync_gradients(last)
        # Unexchanged, FSDP2 keeps gradients of whole weights: those of adapters are small.
        whole_gradients = self.options.engine.name == "fsdp2" and self.masters
        if last or whole_gradients or self.args.world_size == 1:
            return nullcontext()
        return self.accelerator.no_sync(model)

    def _snapshot(self) -> Callable[[], None]:
        """A function that sets back what an attempt at a step changes, besides gradients."""
        device = self.args.device
        state, on_device = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None

        def restore() -> None:
            torch.set_rng_state(state)
            if on_device is not None:
                torch.cuda.set_rng_state(on_device, device)
            self._recorded.clear()

        return restore

    def _with_less_memory(self, model: Any, step: Step[Any]) -> Step[Any]:
        """Halve the microbatches from this step on, or if a single example was too much, compute layers again.

        Raises:
            OutOfMemoryError: there is nothing left to save.
        """
        choices, inner = self.options.choices, transformers_model(self.accelerator.unwrap_model(model))
        layers = len(decoder_layers(inner))
        failed = step.rows[self._running]
        tokens = int(self.step_plan.counts.lengths[list(failed)].sum())
        if len(failed) > 1:
            choices = replace(choices, tokens_per_microbatch=tokens // 2)
            notice(
                "memory.halved",
                "step {step} ran out of memory and is retried; from now on microbatches hold up to {budget:,} tokens "
                "(tokens_per_microbatch). What is trained stays the same.",
                step=self.state.global_step + 1,
                budget=choices.tokens_per_microbatch,
            )
        elif choices.checkpointed_layers < layers:
            choices = replace(choices, checkpointed_layers=layers)
            notice(
                "memory.checkpointed",
                "step {step} ran out of memory on one example of {tokens:,} tokens and is retried; from now on all "
                "layers are recomputed in backward (gradient_checkpointing).",
                step=self.state.global_step + 1,
                tokens=tokens,
            )
        elif self.args.device.type == "cuda" and layers and not choices.offload:
            choices = replace(choices, offload=True)
            notice(
                "memory.offloaded",
                "step {step} ran out of memory on one example of {tokens:,} tokens and is retried; from now on the "
                "inputs of layers are kept in CPU memory, which is slower.",
                step=self.state.global_step + 1,
                tokens=tokens,
            )
        else:
            raise torch.OutOfMemoryError(f"one example of {tokens:,} tokens does not fit")
        self.options = replace(self.options, choices=choices)
        install_checkpointing(inner, choices.checkpointing)
        self.step_plan.budget = choices.tokens_per_microbatch
        rows = np.concatenate([np.array(rows) for rows in step.rows])
        dataset = self.train_dataset
        assert isinstance(dataset, PackedExamples)
        return dataset.__getitems__(self.step_plan.plan(rows))

    def run_model(self, model: Any, row: PackedBatch, per_token: bool = False) -> dict[str, Any]:
        """Call a prepared model on one packed row; in training, keep what its routers said for the router loss."""
        recording = self.router is not None and torch.is_grad_enabled()
        asked = {"output_router_logits": True} if recording else {}
        with self._autocast():
            result = model(**row.model_inputs(self.solo), per_token=per_token, **asked)
        if self.router and recording:
            self._recorded.append((recorded_logits(result, self.router), row.weights()))
        return result

    def rows_of(self, batch: Any) -> tuple[PackedBatch, ...]:
        """What the model is called with for a microbatch, one after another."""
        return batch.rows

    # ---- the router loss ----

    @torch.no_grad()
    def _count_choices(self, model: Any, batches: list[Any]) -> Tensor:
        """Which experts the whole step chooses, by a pass of its own: the loss of its first microbatch needs it.

        Without dropout, so that the random state is left for the pass that trains.
        """
        assert self.router is not None
        total = torch.zeros(self.router.num_experts, device=self.args.device)
        nothing = torch.zeros(0, dtype=torch.long, device=self.args.device)
        with resting(model), self._autocast():
            for row in (row for batch in batches for row in self.rows_of(batch)):
                # Without targets there is nothing to compute in the head.
                inputs = row.model_inputs(self.solo) | {"target_index": nothing, "targets": nothing}
                output = model(**inputs, output_router_logits=True)
                total += count_choices(recorded_logits(output, self.router), self.router, row.weights())
        return self.summed_over_ranks(total)

    def _router_loss(self, router: RouterSettings, choices: Tensor | None, totals: StepTotals) -> Tensor:
        """The share of the router loss of what was recorded since the last call."""
        recorded, self._recorded = self._recorded, []
        if choices is None:
            counted = [count_choices(logits, router, weights) for logits, weights in recorded]
            choices = torch.stack(counted).sum(0)
        shares = [router_loss(logits, router, weights, choices, totals.input_tokens) for logits, weights in recorded]
        return torch.stack(shares).sum()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast_type is None:
            return nullcontext()
        return torch.autocast(self.args.device.type, dtype=self.autocast_type)

    # ---- evaluation without logits ----

    def get_eval_dataloader(self, eval_dataset: str | Dataset[Any] | None = None) -> DataLoader[Any]:
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if not isinstance(dataset, PackedExamples):
            raise TypeError("evaluation takes PackedExamples")
        return self._evaluation_loader(dataset, np.arange(len(dataset)))

    def _evaluation_loader(self, dataset: PackedExamples, rows: np.ndarray) -> DataLoader[Any]:
        plan = StepPlan(
            dataset.examples.counts,
            EVALUATED_TOGETHER,
            self.options.choices.tokens_per_microbatch,
            shuffle=False,
            solo=self.solo,
            nll_targets=self.nll_targets(dataset.examples),
            rows=rows,
            rank=self.args.process_index,
            ranks=self.args.world_size,
        )
        return step_loader(dataset, plan)

    def evaluation_loop(  # type: ignore[override]
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Metrics over the held-out examples, and the loss of each source; a few numbers leave the device."""
        dataset = dataloader.dataset
        assert isinstance(dataset, PackedExamples)
        model: Any = self.model_wrapped if self.is_deepspeed_enabled else self.model
        model.eval()
        sums, totals, of_sources = None, StepTotals(0, 0, 0, 0), {}
        for name, rows in self._by_source(dataset.examples):
            ours, counted = self._evaluate_rows(model, dataset, rows)
            sums = ours if sums is None else sums + ours
            totals = totals + counted
            of_sources[name] = (ours, counted)
        assert sums is not None
        metrics = self.evaluation_metrics(sums.tolist(), totals)
        if len(of_sources) > 1:
            for name, (ours, counted) in of_sources.items():
                metrics[f"loss/{name}"] = self.evaluation_metrics(ours.tolist(), counted)["loss"]
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(None, None, named, len(dataset))  # type: ignore[arg-type]

    def _evaluate_rows(self, model: Any, dataset: PackedExamples, rows: np.ndarray) -> tuple[Tensor, StepTotals]:
        sums, totals = torch.zeros((), dtype=torch.float64, device=self.args.device), StepTotals(0, 0, 0, 0)
        with torch.no_grad():
            for step in self._evaluation_loader(dataset, rows):
                for batch in step.microbatches:
                    sums = sums + self.evaluation_sums(model, batch.to(self.args.device)).double()
                totals = totals + step.totals
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        return self.summed_over_ranks(sums), totals

    def _by_source(self, examples: ExampleList) -> Iterator[tuple[str, np.ndarray]]:
        sources = examples.counts.sources
        for number in np.unique(sources):
            name = self.sources[number] if number < len(self.sources) else str(number)
            yield name, np.flatnonzero(sources == number)

    # ---- resuming ----

    def _run_epoch(self, **epoch: Any) -> None:
        """The steps of an epoch that a resumed run has behind it are not planned again."""
        resumed = epoch["resume_from_checkpoint"] is not None and epoch["epoch"] == epoch["epochs_trained"]
        self.step_plan.start = epoch["steps_trained_in_current_epoch"] if resumed else 0
        super()._run_epoch(**epoch)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """A run that was prolonged goes on at the new schedule's rate: a checkpoint keeps that of the old one's end."""
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        if checkpoint is None or not isinstance(scheduler, LambdaLR):
            return
        parts = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        for group, base, schedule in parts:
            group["lr"] = base * schedule(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]

    # ---- saving ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The files that one process would leave, whatever the engine; every rank has to call it."""
        if not self.options.engine.deepspeed:
            super().save_model(output_dir, _internal_call)
            return
        # DeepSpeed's own way writes all weights beside an adapter, and tied ones twice.
        model: Any = self.accelerator.unwrap_model(self.model)
        parameters = model.parameters()
        kept = [p for p in parameters if self.masters or p.requires_grad]
        with gathered(self.options.engine, kept):
            if self.args.should_save:
                self._save(output_dir)

    # ---- bookkeeping that would look inside a batch ----

    def floating_point_ops(self, inputs: Step[Any]) -> int:  # type: ignore[override]
        return self._flops_per_token * inputs.totals.tokens // self.args.world_size  # the Trainer adds ranks up

    def _track_num_input_tokens(self, inputs: Step[Any]) -> None:  # type: ignore[override]
        self.state.num_input_tokens_seen += inputs.totals.input_tokens


class CausalTrainer(StepTrainer):
    """SFT and pretraining: minimises Σ NLL / Σ target tokens over the whole step."""

    METRICS = ("loss", "perplexity", "target_tokens")

    def packed(self, examples: ExampleList, held_out: bool) -> PackedExamples:
        return PackedExamples(examples, lambda rows, chosen: pack(chosen))

    def rows_of(self, batch: PackedBatch) -> tuple[PackedBatch, ...]:
        return batch.apart() if self.solo else batch.rows

    def summed_nll(self, model: Any, batch: PackedBatch) -> Tensor:
        """Σ NLL over the targets of one microbatch, a scalar."""
        return torch.stack([self.run_model(model, row)["loss"] for row in self.rows_of(batch)]).sum()

    def microbatch_loss(self, model: Any, batch: PackedBatch, totals: StepTotals) -> Tensor:
        return self.summed_nll(model, batch) / max(totals.targets, 1)

    def evaluation_sums(self, model: Any, batch: PackedBatch) -> Tensor:
        return self.summed_nll(model, batch)[None]

    def evaluation_metrics(self, sums: list[float], totals: StepTotals) -> dict[str, float]:
        loss = sums[0] / max(totals.targets, 1)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "target_tokens": totals.targets}


class BeforeTraining(TrainerCallback):
    """Does something once, when the engine has the model and before the first step."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.function()


@contextmanager
def resting(model: Any) -> Iterator[None]:
    """The model in eval mode for a while: no dropout, and nothing to checkpoint in a pass without gradients."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def training_arguments(values: Mapping[str, Any]) -> TrainingArguments:
    """`TrainingArguments` from resolved values; its own complaints become the user's message."""
    try:
        return TrainingArguments(**values)
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise UsageError(
            "config.training_arguments",
            "the training arguments are not valid: {problem}",
            problem=" ".join(str(error).split()),
        ) from error
