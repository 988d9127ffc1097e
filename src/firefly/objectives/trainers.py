"""transformers' Trainer, taught what a step is here: one item of the data loader is one whole optimizer step.

`TrainingArguments` gets the folded batch (examples per step on this rank, accumulation 1), so that steps per epoch,
schedules and skipping on resume come out right untouched; microbatches are looped over in `training_step`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from firefly.data.batching import PackedBatch, PackedExamples, Step, StepLoader, StepPlan, step_loader
from firefly.data.examples import Examples
from firefly.errors import UsageError
from firefly.models.precision import Precision


@dataclass(frozen=True)
class StepOptions:
    """What a step is, resolved for this run."""

    examples_per_step: int
    tokens_per_microbatch: int
    seed: int
    shuffle: bool
    layout: str


@dataclass
class Counts:
    """What this process has trained so far (a resumed run counts from where it resumed)."""

    steps: int = 0
    examples: int = 0
    tokens: int = 0
    targets: int = 0

    def add(self, step: Step) -> None:
        self.steps += 1
        self.examples += sum(len(batch.borders) - 1 for batch in step.microbatches)
        self.tokens += step.tokens
        self.targets += step.targets


class CausalTrainer(Trainer):
    """SFT: minimises Σ NLL / Σ target tokens over the whole step."""

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        examples: Examples,
        held_out: Examples | None,
        tokenizer: Any,
        options: StepOptions,
        precision: Precision,
        masters: bool,
        callbacks: list[Any],
    ) -> None:
        self.options = options
        self.counts = Counts()
        # Frozen weights are held in the compute type; full fine-tuning keeps fp32 weights and computes under autocast.
        self.autocast_type = precision.compute if masters and precision.compute != torch.float32 else None
        super().__init__(
            model=model,
            args=args,
            train_dataset=PackedExamples(examples),  # type: ignore[arg-type]
            eval_dataset=None if held_out is None else PackedExamples(held_out),  # type: ignore[arg-type]
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        # Products of the body per parameter and token: forward 2, gradient of the input 2, gradient of the weight 2.
        self._flops_per_token = (6 if masters else 4) * self.model.num_parameters(exclude_embeddings=True)  # type: ignore[union-attr]

    # ---- what a step is ----

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Whole steps in the seeded order; not prepared by accelerate, which would shard them again."""
        dataset = self.train_dataset
        assert isinstance(dataset, PackedExamples)
        plan = self._plan(dataset.examples, shuffle=self.options.shuffle, drop_last=self.args.dataloader_drop_last)
        return step_loader(dataset.examples, plan, **self._loader_options())

    def get_eval_dataloader(self, eval_dataset: str | Dataset[Any] | None = None) -> DataLoader[Any]:
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if not isinstance(dataset, PackedExamples):
            raise TypeError("evaluation takes PackedExamples")
        return step_loader(dataset.examples, self._plan(dataset.examples, shuffle=False, drop_last=False))

    def _plan(self, examples: Examples, shuffle: bool, drop_last: bool) -> StepPlan:
        return StepPlan(
            examples.lengths,
            examples.targets,
            self.options.examples_per_step,
            self.options.tokens_per_microbatch,
            seed=self.options.seed,
            shuffle=shuffle,
            drop_last=drop_last,
            solo=self.options.layout == "solo",
        )

    def _loader_options(self) -> dict[str, Any]:
        workers = self.args.dataloader_num_workers
        options: dict[str, Any] = {"num_workers": workers}
        if workers:
            options["persistent_workers"] = self.args.dataloader_persistent_workers
            options["prefetch_factor"] = self.args.dataloader_prefetch_factor
        return options

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        return None  # a step knows its own targets

    def training_step(self, model: Any, inputs: Step, num_items_in_batch: Any = None) -> Tensor:  # type: ignore[override]
        """Run one whole step; returns its loss, Σ NLL / Σ targets, without waiting for the device."""
        model.train()
        scale = self.args.world_size / max(inputs.targets, 1)  # engines average gradients over ranks
        total = torch.zeros((), device=self.args.device)
        for batch in inputs.microbatches:
            loss = self.microbatch_loss(model, batch.to(self.args.device)) * scale
            self.accelerator.backward(loss)
            total += loss.detach()
        self.counts.add(inputs)
        return total

    def microbatch_loss(self, model: Any, batch: PackedBatch) -> Tensor:
        """Σ NLL over the targets of one microbatch, a scalar."""
        inputs = batch.model_inputs()
        if self.options.layout == "solo":
            del inputs["segment_borders"]
        with self._autocast():
            return model(**inputs)["loss"]

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast_type is None:
            return nullcontext()
        return torch.autocast(self.args.device.type, dtype=self.autocast_type)

    # ---- evaluation without logits ----

    def evaluation_loop(  # type: ignore[override]
        self,
        dataloader: StepLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Mean NLL per target token and perplexity over the held-out examples; one number leaves the device."""
        model = self.model
        model.eval()  # type: ignore[union-attr]
        total, targets = torch.zeros((), device=self.args.device), 0
        with torch.no_grad():
            for step in dataloader:
                for batch in step.microbatches:
                    total += self.microbatch_loss(model, batch.to(self.args.device))
                targets += step.targets
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        loss = total.item() / max(targets, 1)
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700)),
            f"{metric_key_prefix}_target_tokens": targets,
        }
        return EvalLoopOutput(None, None, metrics, len(dataloader.dataset))  # type: ignore[arg-type]

    # ---- bookkeeping that would look inside a batch ----

    def floating_point_ops(self, inputs: Step) -> int:  # type: ignore[override]
        return self._flops_per_token * inputs.tokens

    def _track_num_input_tokens(self, inputs: Step) -> None:  # type: ignore[override]
        self.state.num_input_tokens_seen += inputs.tokens


def training_arguments(values: Mapping[str, Any]) -> TrainingArguments:
    """`TrainingArguments` from resolved values; its own complaints become the user's message."""
    try:
        return TrainingArguments(**values)
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise UsageError("config.training_arguments", problem=str(error).splitlines()[0]) from error
