"""Single steps of a task on a tiny model, without a run around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firefly.config import Config, PreferenceConfig, load_config
from firefly.data.batching import Step, StepLoader, StepSettings
from firefly.distributed.model import TrainableModel
from firefly.evaluation.held_out import evaluate
from firefly.loop import with_less_memory
from firefly.models.checkpointing import RandomState
from firefly.models.precision import Precision
from firefly.models.tuning import Choices
from firefly.setup.arguments import training_arguments
from firefly.tasks import TASKS
from firefly.tasks.base import ComputedStep, OutOfMemory, Task
from tiny import ListedExamples, gradients


def configuration(task_type: str = "sft", **keys: Any) -> Config:
    return load_config(
        {"model_name_or_path": "m", "train_file": "f", "output_dir": "o", "task_type": task_type, **keys}
    )


def preference_settings(settings: PreferenceConfig) -> dict[str, Any]:
    """The keys of a configuration that give these settings."""
    return {("preference_loss" if name == "loss" else name): value for name, value in vars(settings).items()}


@dataclass
class Trial:
    """A task and a model that can be asked for steps, of which each is the same examples in another order."""

    task: Task
    model: TrainableModel
    steps: StepLoader
    held_out: ListedExamples | None = None
    computed: ComputedStep | None = None
    """The last step."""

    def step(self) -> Step[Any]:
        (step,) = list(self.steps)
        return step

    def one_step(self) -> tuple[Tensor, dict[str, Tensor], int]:
        """Loss, gradients and number of microbatches of a step, begun again where memory ran out."""
        step = self.step()
        self.model.zero_gradients()
        before = RandomState(self.model.device)
        computed = self.task.backward(self.model, step)
        while isinstance(computed, OutOfMemory):
            before.restore()
            step = with_less_memory(self.model, self.steps, step, computed, 1)
            computed = self.task.backward(self.model, step)
        self.computed = computed
        return computed.loss, gradients(self.model.module), len(step.microbatches)

    def evaluate(self) -> dict[str, float]:
        assert self.held_out is not None
        return evaluate(self.task, self.model, self.held_out).metrics


def make_trial(
    module: Any,
    folder: Path,
    examples: Sequence[Any],
    budget: int = 64,
    layout: str = "segments",
    mode: str = "full",
    compute: torch.dtype = torch.float32,
    held_out: Sequence[Any] | None = None,
    task: Task | None = None,
    **arguments: Any,
) -> Trial:
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": len(examples),
        "use_cpu": True,
        "report_to": "none",
        "dataloader_pin_memory": False,
    }
    model = TrainableModel(
        module,
        training_arguments(values | arguments),
        layout=layout,
        choices=Choices(budget),
        precision=Precision(compute),
    )
    task = task or TASKS["sft"](configuration(train_mode=mode))
    steps = task.steps(ListedExamples(examples), StepSettings(len(examples)), model)
    return Trial(task, model, steps, None if held_out is None else ListedExamples(held_out))
