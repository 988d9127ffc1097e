"""What becomes of a step whose loss or gradients are not numbers: no weight ever moves by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from firefly import ranks
from firefly.console import notice
from firefly.data.batching import PackedExamples
from firefly.errors import UsageError
from firefly.objectives.saving import SafeSaving
from firefly.runs.interruption import resume_command
from firefly.translation import translate

NAMED_ROWS = 20
"""Rows that a message names."""


@dataclass(frozen=True)
class ComputedStep:
    """A step whose gradients are there and have not been applied.

    Attributes:
        undo: sets back whatever else the step has changed.
        loss: of the whole step, a scalar on the device.
        parts: what each microbatch added to it.
        rows: the examples of each microbatch.
    """

    undo: Callable[[], None]
    loss: Tensor
    parts: list[Tensor]
    rows: tuple[tuple[int, ...], ...]


class FiniteSteps(SafeSaving):
    """Looks at each step before it is applied; a step that is not finite stops the run, or is left out.

    Attributes:
        computed: the step that is looked at, set by `training_step`.
        on_nonfinite_loss: stop, or skip.
        skipped: steps that were left out.
    """

    computed: ComputedStep
    on_nonfinite_loss: str = "stop"
    skipped: int = 0
    applies_at_once: bool = False
    """Whether the engine moves the weights within backward, as DeepSpeed does: then a loss has to be looked at before
    it (`look_before`), and gradients that are no numbers are seen too late for a checkpoint."""

    def undo_of_step(self, restore: Callable[[], None]) -> Callable[[], None]:
        """A function that sets back what a step changes besides gradients; `restore` does the objective's part."""
        loss, flos, seen = self._tr_loss.clone(), self.current_flos, self.state.num_input_tokens_seen

        def undo() -> None:
            restore()
            self._tr_loss = loss
            self.current_flos = flos
            self.state.num_input_tokens_seen = seen

        return undo

    def look_before(self, computed: ComputedStep) -> None:
        """Look at the loss of a step whose last backward pass is yet to come.

        Raises:
            UsageError: it is not finite.
        """
        self.computed = computed
        if self.highest(not bool(torch.isfinite(computed.loss))):
            rows = self._named_rows()
            computed.undo()
            self._stop(self.state.global_step + 1, rows)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The last thing before the optimizer: all work of the step is queued, and the one question of a step is asked.

        Returns None in place of the norm of a step that is left out.

        Raises:
            UsageError: the step is not finite, and `on_nonfinite_loss` is stop.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self.highest(not self._is_finite(norm)):
            return norm
        step, rows = self.state.global_step + 1, self._named_rows()
        model.zero_grad(set_to_none=True)  # an optimizer passes over what has no gradient
        self.computed.undo()
        if self.on_nonfinite_loss == "stop":
            self._stop(step, rows, moved=self.applies_at_once)
        self._leave_out()
        notice(
            "loss.skipped",
            "step {step} is left out: its loss or the norm of its gradients is infinite or not a number. Its rows: "
            "{rows}.",
            step=step,
            rows=rows,
        )
        return None

    def _is_finite(self, norm: Any) -> bool:
        finite = torch.isfinite(self.computed.loss)
        if self.accelerator.scaler is None and norm is not None:  # under loss scaling infinite gradients are all right
            whole = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm, device=finite.device)
            finite = finite & torch.isfinite(whole)
        return bool(finite)

    def _leave_out(self) -> None:
        """Means over steps are over those that were trained."""
        self.skipped += 1
        self._globalstep_last_logged += 1
        self._initial_global_step += 1

    def _stop(self, step: int, rows: str, moved: bool = False) -> None:
        if self.state.global_step and self._saved_at != self.state.global_step and not moved:
            self.save_checkpoint()
        self.end_reports()
        command = resume_command(self.output_dir)
        raise UsageError(
            "loss.nonfinite",
            "step {step}: its loss or the norm of its gradients is infinite or not a number. No weight was changed by "
            "it. {safe} Look at its rows: {rows}. If they are sound, start a new run with a lower learning_rate or "
            "max_grad_norm, or with bf16 or fp32 in place of fp16. To go on without such steps: {command} "
            "--on_nonfinite_loss skip",
            step=step,
            rows=rows,
            safe=self.safe(),
            command=command,
        )

    def _named_rows(self) -> str:
        """File and line of the rows of those microbatches that are not finite; of all where each of them is."""
        finite = torch.stack(self.computed.parts).isfinite().tolist()
        doubtful = [rows for rows, good in zip(self.computed.rows, finite, strict=True) if not good]
        dataset = self.train_dataset
        assert isinstance(dataset, PackedExamples)
        chosen = [row for rows in doubtful or self.computed.rows for row in rows]
        places = [dataset.examples.place(row) for row in chosen]
        if self.args.world_size > 1:
            gathered = ranks.all_of((bool(doubtful), places))
            # Ranks whose own loss is finite saw the others' gradients alone.
            some = any(found for found, _ in gathered)
            places = [place for found, theirs in gathered if found or not some for place in theirs]
        places = sorted(set(places), key=lambda place: (place.file, place.line))
        named = ", ".join(str(place) for place in places[:NAMED_ROWS])
        rest = len(places) - NAMED_ROWS
        return named if rest <= 0 else translate("{rows} and {count} more", rows=named, count=rest)
