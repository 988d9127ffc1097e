"""How far a run is: what its checkpoints keep besides weights, optimizer, schedule and random states."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import TrainerControl, TrainerState

from firefly.data.batching import StepTotals


@dataclass
class Counts:
    """What all ranks have trained so far (a resumed run counts from where it resumed)."""

    steps: int = 0
    examples: int = 0
    tokens: int = 0
    targets: int = 0

    def add(self, totals: StepTotals) -> None:
        self.steps += 1
        self.examples += totals.examples
        self.tokens += totals.input_tokens
        self.targets += totals.targets


@dataclass
class Progress:
    """The one mutable thing of a run besides its model. The loop and saving change it, between two steps.

    Attributes:
        state: trainer_state.json, as people and tools know it.
        control: what the observers ask for: log, evaluate, save, stop.
        counts: of this process.
        begun_at: global_step where this process began, plus the steps left out since.
        loss: this rank's losses since the last log, summed on the device.
        logged_at: the step of the last log; steps that were left out move it on, so that means are over the others.
        logged_loss: the losses that have been logged, summed.
        sums, summed_examples: what the task measures, since the last log.
        flops: of this rank, not yet in the state.
        skipped: steps that were left out.
        saved_at: the step of the last checkpoint that holds everything.
        best: of the state's, the best evaluation that is on the disk.
    """

    state: TrainerState
    loss: Tensor
    control: TrainerControl = field(default_factory=TrainerControl)
    counts: Counts = field(default_factory=Counts)
    begun_at: int = 0
    logged_at: int = 0
    logged_loss: float = 0.0
    sums: Tensor | None = None
    summed_examples: int = 0
    flops: int = 0
    skipped: int = 0
    saved_at: int | None = None
    best: dict[str, Any] = field(default_factory=dict)

    def leave_out(self) -> None:
        """A step that moves no weight."""
        self.skipped += 1
        self.logged_at += 1
        self.begun_at += 1

    def add(self, loss: Tensor, sums: Tensor | None, totals: StepTotals, flops: int) -> None:
        """A step that has been applied."""
        self.loss += loss
        if sums is not None:
            self.sums = sums if self.sums is None else self.sums + sums
            self.summed_examples += totals.examples
        self.flops += flops
        self.state.num_input_tokens_seen += totals.input_tokens

    def best_of_state(self) -> dict[str, Any]:
        names = ("best_metric", "best_global_step", "best_model_checkpoint")
        return {name: getattr(self.state, name) for name in names}
