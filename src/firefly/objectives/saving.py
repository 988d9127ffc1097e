"""transformers' Trainer, taught to save without ever losing what was saved, and to stop when it is asked to.

Code here runs on every rank at once. Whatever one rank finds out alone (a full disk, a signal) it first tells the
others, so that all of them do the same.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from transformers import Trainer, set_seed
from transformers.trainer_callback import ExportableState

from firefly.console import notice
from firefly.errors import UsageError
from firefly.files import first_line, free_space, is_write_failure, make_empty, unfinished
from firefly.models.adapters import transformers_model
from firefly.runs.checkpoints import checkpoints, newest_complete, seal_checkpoint, stored_plan
from firefly.runs.folders import RESULT, move_into, rotate
from firefly.runs.interruption import Interrupted, Interruption, resume_command
from firefly.translation import Phrase, translate


class SafeSaving(Trainer):
    """Checkpoints appear whole or not at all, a failure to save ends no training, and a signal leaves a checkpoint.

    Attributes:
        checkpoint_plan: what plan.json says of the run at the moment (see `runs.checkpoints`).
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.interruption = Interruption(self.args.world_size)
        self.checkpoint_plan: Callable[[], Mapping[str, Any]] = dict
        self._tr_loss = torch.zeros((), device=self.args.device)  # transformers makes a new one when training begins
        self._saved_at: int | None = None  # the step of the last checkpoint that holds everything
        self._best: dict[str, Any] = {}  # the best evaluation that is on the disk
        self._ended_at: int | None = None  # the last step whose epoch it ended
        self._postponed = False  # whether that step's checkpoint waits for the end of its epoch

    @property
    def output_dir(self) -> Path:
        assert self.args.output_dir is not None
        return Path(self.args.output_dir)

    def train(self, *arguments: Any, **options: Any) -> Any:  # type: ignore[override]
        """As transformers has it, but a signal leaves a checkpoint behind.

        Raises:
            Interrupted: a signal asked the run to stop, and it has.
        """
        with self.interruption.watched():
            return super().train(*arguments, **options)

    # ---- what the ranks agree on ----

    def highest(self, value: int) -> int:
        """The largest of what the ranks say; every rank has to ask."""
        if self.args.world_size == 1:
            return value
        told = torch.tensor(int(value), device=self.args.device)
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
        return int(told)

    def summed_over_ranks(self, values: Tensor) -> Tensor:
        """The sum of all ranks' values, on every rank."""
        if self.args.world_size == 1:
            return values
        summed: Any = self.accelerator.reduce(values, reduction="sum")
        return summed

    def attempt(self, parts: Sequence[Callable[[], None]]) -> str | None:
        """Run some parts of saving, and return what could not be written, or None if every rank wrote everything.

        A rank with others goes on after a failure: they wait for it in the parts that follow.
        """
        problem = None
        for part in parts:
            try:
                part()
            except Exception as error:
                if not is_write_failure(error):
                    raise
                problem = problem or first_line(error)
                if self.args.world_size == 1:
                    break
        if not self.highest(problem is not None):
            return None
        return problem or translate("another rank could not write")

    # ---- saving ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.save_checkpoint(model_only=self.args.save_only_model)

    def save_checkpoint(self, model_only: bool = False) -> bool:
        """Save the state after the last whole step as checkpoint-N; returns whether it is on the disk.

        What could not be written whole is removed and said; checkpoints that were there stay.
        """
        self.store_flos()
        step, unlogged = self.state.global_step, self.unlogged()
        folder = self.checkpoint_folder(step)
        partial = unfinished(folder)
        self._name_best()

        def complete() -> None:
            self._write_state(partial)
            more = {"model_only": model_only, "unlogged": unlogged}
            seal_checkpoint(partial, folder, {**self.checkpoint_plan(), **more})

        for parts in ([self._writer(make_empty, partial)], self._parts(partial, model_only), [self._writer(complete)]):
            problem = self.attempt(parts)
            if problem is not None:
                self._give_up(partial, folder, problem)
                return False
        self._saved_at = self._saved_at if model_only else step
        self._best = self._best_of_state()
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            keep = [folder, *([] if best is None else [Path(best)])]
            rotate(checkpoints(self.output_dir), self.args.save_total_limit, keep)
        return True

    def checkpoint_folder(self, step: int) -> Path:
        return self.output_dir / f"checkpoint-{step}"

    def _writer(self, write: Callable[..., None], *arguments: Any) -> Callable[[], None]:
        """`write` where this rank is one that writes for the others; nothing elsewhere."""
        return functools.partial(write, *arguments) if self.args.should_save else lambda: None

    def _parts(self, partial: Path, model_only: bool) -> list[Callable[[], None]]:
        folder = str(partial)
        parts: list[Callable[[], None]] = [functools.partial(self.save_model, folder, _internal_call=True)]
        if not model_only:
            writers = (self._save_optimizer_and_scheduler, self._save_scaler, self._save_rng_state)
            parts += [functools.partial(write, folder) for write in writers]
        return parts

    def _write_state(self, partial: Path) -> None:
        """trainer_state.json, with the states of callbacks that are taken up again."""
        kept: Any = self.state.stateful_callbacks  # a dict, whatever its annotation says
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                kept[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(partial / "trainer_state.json"))

    def _give_up(self, partial: Path, folder: Path, problem: str) -> None:
        if self.state.best_global_step == self.state.global_step:  # its weights are lost: an earlier one is the best
            for name, value in self._best.items():
                setattr(self.state, name, value)
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        notice(
            "save.failed",
            "{path} could not be written ({problem}; {free} free) and is left out; training goes on. {safe} Free some "
            "space, or lower save_total_limit.",
            path=folder,
            problem=problem,
            free=free_space(self.output_dir),
            safe=self.safe(),
        )

    def safe(self) -> str:
        """A sentence on what the run has on the disk."""
        newest = newest_complete(self.output_dir)
        return (
            translate("There is no complete checkpoint.")
            if newest is None
            else translate("{path} is safe.", path=newest)
        )

    def _name_best(self) -> None:
        """Where the best checkpoint is, or will be once this one has its name."""
        best = self.state.best_global_step
        if best and (best == self.state.global_step or self.checkpoint_folder(best).is_dir()):
            self.state.best_model_checkpoint = str(self.checkpoint_folder(best))

    def _best_of_state(self) -> dict[str, Any]:
        names = ("best_metric", "best_global_step", "best_model_checkpoint")
        return {name: getattr(self.state, name) for name in names}

    def tell_best(self) -> None:
        """Say it where the best evaluation was at a step of which no checkpoint is left to be the result."""
        best, kept = self.state.best_global_step, self.state.best_model_checkpoint
        if not self.args.load_best_model_at_end or not best or self.checkpoint_folder(best).is_dir():
            return
        notice(
            "save.best_lost",
            "the best evaluation was at step {step}, of which there is no checkpoint: the result is {used}; let "
            "save_steps be eval_steps.",
            step=best,
            used=kept or Phrase("what the last step left"),
        )

    def save_result(self) -> None:
        """Write the trained model into output_dir, each file whole or not at all.

        Raises:
            UsageError: it could not be written; names what is safe and how to go on.
        """
        gathered = unfinished(self.output_dir / RESULT)

        def move() -> None:
            transformers_model(self.accelerator.unwrap_model(self.model)).generation_config.save_pretrained(gathered)
            move_into(gathered, self.output_dir)

        for parts in (
            [self._writer(make_empty, gathered)],
            [functools.partial(self.save_model, str(gathered))],
            [self._writer(move)],
        ):
            problem = self.attempt(parts)
            if problem is not None:
                if self.args.should_save:
                    shutil.rmtree(gathered, ignore_errors=True)
                raise UsageError(
                    "save.result_failed",
                    "the result could not be written to {path} ({problem}; {free} free). {safe} Free some space, then "
                    "go on with: {command}",
                    path=self.output_dir,
                    problem=problem,
                    free=free_space(self.output_dir),
                    safe=self.safe(),
                    command=resume_command(self.output_dir),
                )

    # ---- stopping ----

    def _maybe_log_save_evaluate(self, *arguments: Any, **options: Any) -> None:
        """Called after each step, and again at the end of each epoch.

        What is saved after an epoch's last step waits for the second call, so that the checkpoint has seen the
        evaluation at the epoch's end: a run that resumes from it begins with the next epoch.
        """
        step = self.state.global_step
        ended = float(self.state.epoch or 0).is_integer()
        again = ended and self._ended_at != step
        if again:
            self._ended_at, self._postponed = step, self.control.should_save
            self.control.should_save = False
        elif ended and self._postponed:
            self.control.should_save, self._postponed = True, False
        super()._maybe_log_save_evaluate(*arguments, **options)
        if not again:
            self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        number = self.highest(self.interruption.signal or 0)
        if not number or self.control.should_training_stop:  # a run that is at its end may as well finish
            return
        step = self.state.global_step
        saved = self._saved_at == step or self.save_checkpoint()
        self.end_reports()
        command = resume_command(self.output_dir)
        if saved:
            raise Interrupted(
                "interrupted.saved",
                "stopped by {signal} after step {step}; {path} is saved. Go on with: {command}",
                number,
                step=step,
                path=self.checkpoint_folder(step),
                command=command,
            )
        raise Interrupted(
            "interrupted.not_saved",
            "stopped by {signal} after step {step}, whose checkpoint could not be written. {safe} Free some space, "
            "then go on with: {command}",
            number,
            step=step,
            safe=self.safe(),
            command=command,
        )

    def end_reports(self) -> None:
        """Close what looks on, as at the end of training: an exception will end this one."""
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)

    # ---- resuming ----

    def unlogged(self) -> dict[str, Any]:
        """What has been summed up for the next line of the log; every rank has to ask."""
        loss = self.summed_over_ranks(self._tr_loss) / self.args.world_size
        return {"loss": loss.item(), "since": self._globalstep_last_logged}

    def restore_unlogged(self, kept: Mapping[str, Any]) -> None:
        """Go on summing up where the checkpoint was; its sum is not part of this process's mean."""
        self._tr_loss += kept["loss"]
        self._total_loss_scalar -= kept["loss"]
        self._globalstep_last_logged = kept["since"]

    def _run_epoch(self, **epoch: Any) -> None:  # type: ignore[override]
        if self.state.global_step >= self.state.max_steps:  # killed between its last checkpoint and its result
            self.control.should_training_stop = True
            return
        checkpoint = epoch["resume_from_checkpoint"]
        if checkpoint is not None and epoch["epoch"] == epoch["epochs_trained"]:
            step = self.state.global_step
            self._saved_at = step if Path(checkpoint).absolute() == self.checkpoint_folder(step).absolute() else None
            kept = stored_plan(Path(checkpoint)).get("unlogged")
            if kept is not None:  # early checkpoints have none
                self.restore_unlogged(kept)
        super()._run_epoch(**epoch)

    def _init_training_state(self, *arguments: Any, **options: Any) -> tuple[int, int]:
        begun = super()._init_training_state(*arguments, **options)
        best = self.state.best_global_step
        if best and self.state.best_model_checkpoint is None and self.checkpoint_folder(best).is_dir():
            self.state.best_model_checkpoint = str(self.checkpoint_folder(best))  # output_dir was moved since
        self._best = self._best_of_state()
        return begun

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """A rank that the checkpoint has no state for takes one that depends on seed, rank and step alone."""
        if checkpoint is None:
            return
        name = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        if (Path(checkpoint) / name).is_file():
            super()._load_rng_state(checkpoint)
            return
        parts = (self.args.seed, self.args.process_index, self.state.global_step)
        set_seed(int(np.random.SeedSequence(parts).generate_state(1)[0]))
