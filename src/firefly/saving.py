"""Checkpoints that appear whole or not at all, and the result: a disk that takes no more costs nothing that was saved.

Code here runs on every rank at once. Whatever one rank finds out alone (a full disk) it first tells the others, so that
all of them do the same.
"""

from __future__ import annotations

import functools
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerState, set_seed
from transformers.trainer_pt_utils import safe_globals

from firefly.console import notice
from firefly.distributed.model import TrainableModel
from firefly.errors import UsageError
from firefly.files import first_line, free_space, is_write_failure, make_empty, unfinished
from firefly.models.adapters import transformers_model
from firefly.runs.checkpoints import checkpoints, newest_complete, seal_checkpoint, stored_plan
from firefly.runs.folders import RESULT, move_into, rotate
from firefly.runs.interruption import resume_command
from firefly.runs.observers import Observers
from firefly.runs.progress import Progress
from firefly.translation import translate


def attempt(model: TrainableModel, parts: Sequence[Callable[[], Any]]) -> str | None:
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
            if model.ranks == 1:
                break
    if not model.any_rank(problem is not None):
        return None
    return problem or translate("another rank could not write")


def write_whole(
    model: TrainableModel, partial: Path, writers: Sequence[Callable[[], Any]], complete: Callable[[], Any]
) -> str | None:
    """Fill the folder `partial`, and complete it where all ranks wrote everything; otherwise it is removed.

    Args:
        writers: run on every rank, as saving a sharded model asks for.
        complete: run by the rank that writes files.

    Returns:
        What could not be written; None if all is there.
    """
    writes = model.args.should_save
    first, last = ([functools.partial(make_empty, partial)], [complete]) if writes else ([], [])
    for stage in (first, writers, last):
        problem = attempt(model, stage)
        if problem is not None:
            if writes:
                shutil.rmtree(partial, ignore_errors=True)
            return problem
    return None


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    return output_dir / f"checkpoint-{step}"


def save_checkpoint(
    output_dir: Path, model: TrainableModel, tokenizer: Any, observers: Observers, model_only: bool = False
) -> bool:
    """Save the state after the last whole step as checkpoint-N; returns whether it is on the disk.

    What could not be written whole is removed and said; checkpoints that were there stay.
    """
    progress = observers.progress
    state, step = progress.state, progress.state.global_step
    count_flops(progress, model)
    unlogged = describe_unlogged(progress, model)
    folder = checkpoint_folder(output_dir, step)
    partial = unfinished(folder)
    best = state.best_global_step
    if best and (best == step or checkpoint_folder(output_dir, best).is_dir()):
        # The folder that this save is about to make, if it is the best: undone below if that fails.
        state.best_model_checkpoint = str(checkpoint_folder(output_dir, best))
    model.rest()  # schedule-free optimizers keep the weights that are evaluated apart from those that are trained

    def complete() -> None:
        observers.export_states()
        state.save_to_json(str(partial / "trainer_state.json"))
        choices = {"choices": asdict(model.choices)} if model.identity else {}
        more = {"model_only": model_only, "unlogged": unlogged, "threads": torch.get_num_threads()}
        seal_checkpoint(partial, folder, {**model.identity, **choices, **more})

    parts: list[Callable[[], Any]] = [functools.partial(model.save_weights, partial, tokenizer)]
    if not model_only:
        writers = (model.save_optimizer, model.save_schedule, functools.partial(save_random_state, model))
        parts += [functools.partial(write, partial) for write in writers]
    problem = write_whole(model, partial, parts, complete)
    if problem is not None:
        if best == step:  # its weights are lost: an earlier one is the best
            for name, value in progress.best.items():
                setattr(state, name, value)
        notice(
            "save.failed",
            "{path} could not be written ({problem}; {free} free) and is left out; training goes on. {safe} Free some "
            "space, or lower save_total_limit.",
            path=folder,
            problem=problem,
            free=free_space(output_dir),
            safe=what_is_safe(output_dir),
        )
        return False
    if not model_only:
        progress.saved_at = step
    progress.best = progress.best_of_state()
    if model.args.should_save:
        kept = state.best_model_checkpoint
        rotate(checkpoints(output_dir), model.args.save_total_limit, [folder, *([] if kept is None else [Path(kept)])])
    return True


def what_is_safe(output_dir: Path) -> str:
    """A sentence on what a run has on the disk."""
    newest = newest_complete(output_dir)
    return (
        translate("There is no complete checkpoint.") if newest is None else translate("{path} is safe.", path=newest)
    )


def save_result(output_dir: Path, model: TrainableModel, tokenizer: Any, best: Path | None = None) -> None:
    """Write the trained model into output_dir, each file whole or not at all.

    Args:
        best: the best checkpoint, which `save_total_limit` 1 leaves alone once the result is on the disk.

    Raises:
        UsageError: it could not be written; names what is safe and how to go on.
    """
    gathered = unfinished(output_dir / RESULT)
    model.rest()

    def move() -> None:
        settings = getattr(transformers_model(model.module), "generation_config", None)
        if settings is not None:  # a reward model has none
            settings.save_pretrained(gathered)
        move_into(gathered, output_dir)

    problem = write_whole(model, gathered, [functools.partial(model.save_weights, gathered, tokenizer)], move)
    if problem is not None:
        raise UsageError(
            "save.result_failed",
            "the result could not be written to {path} ({problem}; {free} free). {safe} Free some space, then go on "
            "with: {command}",
            path=output_dir,
            problem=problem,
            free=free_space(output_dir),
            safe=what_is_safe(output_dir),
            command=resume_command(output_dir),
        )
    if model.args.should_save and best is not None and model.args.save_total_limit == 1:
        rotate(checkpoints(output_dir), 1, [best])


# ---- what a checkpoint keeps of the progress ----


def count_flops(progress: Progress, model: TrainableModel) -> None:
    """Add what all ranks have computed since the last time to the state."""
    counted = torch.tensor(float(progress.flops), dtype=torch.float64, device=model.device)
    progress.state.total_flos += float(model.summed(counted))
    progress.flops = 0


def describe_unlogged(progress: Progress, model: TrainableModel) -> dict[str, Any]:
    """What has been summed up for the next line of the log; every rank has to ask."""
    loss = model.summed(progress.loss) / model.ranks
    unlogged: dict[str, Any] = {"loss": loss.item(), "since": progress.logged_at}
    if progress.sums is not None:
        unlogged |= {"sums": model.summed(progress.sums).tolist(), "pairs": progress.summed_examples}
    return unlogged


def resume_progress(checkpoint: Path, output_dir: Path, model: TrainableModel) -> Progress:
    """How far the run was that wrote a checkpoint, with what it had summed up for its next log."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    kept: Mapping[str, Any] = stored_plan(checkpoint)["unlogged"]
    best = state.best_global_step
    if state.best_model_checkpoint is not None and not Path(state.best_model_checkpoint).is_dir():
        state.best_model_checkpoint = None
    if best and state.best_model_checkpoint is None and checkpoint_folder(output_dir, best).is_dir():
        state.best_model_checkpoint = str(checkpoint_folder(output_dir, best))  # output_dir was moved since
    here = checkpoint.absolute() == checkpoint_folder(output_dir, state.global_step).absolute()
    progress = Progress(
        state=state,
        loss=torch.full((), kept["loss"], device=model.device),
        begun_at=state.global_step,
        logged_at=kept["since"],
        logged_loss=-kept["loss"],  # it is no part of this process's mean
        summed_examples=kept.get("pairs", 0),
        saved_at=state.global_step if here else None,
    )
    if "sums" in kept:
        # A log adds up what the ranks have.
        sums = torch.tensor(kept["sums"], dtype=torch.float64, device=model.device)
        progress.sums = sums if model.args.process_index == 0 else torch.zeros_like(sums)
    progress.best = progress.best_of_state()
    return progress


# ---- random states ----


def _random_file(model: TrainableModel) -> str:
    return f"rng_state_{model.args.process_index}.pth" if model.ranks > 1 else "rng_state.pth"


def save_random_state(model: TrainableModel, folder: Path) -> None:
    """rng_state.pth, or a file for each rank."""
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all() if model.ranks > 1 else torch.cuda.get_rng_state()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(states, folder / _random_file(model))


def load_random_state(model: TrainableModel, checkpoint: Path, step: int) -> None:
    """A rank that the checkpoint has no state for takes one that depends on seed, rank and step alone."""
    path = checkpoint / _random_file(model)
    if not path.is_file():
        parts = (model.args.seed, model.args.process_index, step)
        set_seed(int(np.random.SeedSequence(parts).generate_state(1)[0]))
        return
    with safe_globals():
        states = torch.load(path, weights_only=True)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        gpu = states["cuda"]
        if isinstance(gpu, list):  # of all that this rank saw: it draws on its own alone
            own = model.device.index or 0
            gpu = gpu[own] if own < len(gpu) else None
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)
