"""The loop over optimizer steps.

A step is applied whole or not at all: it is computed in microbatches (in smaller ones, if memory runs out), checked
once for finite values, and applied; then the observers of the run decide whether to log, evaluate, save or stop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState
from transformers.debug_utils import DebugOption, DebugUnderflowOverflow
from transformers.trainer_utils import SaveStrategy, speed_metrics

from firefly import ranks
from firefly.console import notice
from firefly.data.batching import ExampleList, Step, StepSource
from firefly.distributed.model import TrainableModel
from firefly.errors import UsageError
from firefly.evaluation.held_out import Evaluation, evaluate
from firefly.models.adapters import transformers_model
from firefly.models.checkpointing import RandomState, decoder_layers, install_checkpointing
from firefly.run import Run
from firefly.runs.interruption import Interrupted, Interruption, resume_command
from firefly.runs.metrics import RunRecorder
from firefly.runs.observers import Observers, make_observers
from firefly.runs.progress import Progress
from firefly.samples import sample_writers
from firefly.saving import (
    checkpoint_folder,
    count_flops,
    load_random_state,
    resume_progress,
    save_checkpoint,
    what_is_safe,
)
from firefly.tasks.base import ComputedStep, OutOfMemory
from firefly.translation import Phrase, translate

NAMED_ROWS = 20
"""Rows that a message names."""


@dataclass(frozen=True)
class Training:
    """The state of the training loop: the run, its model, where steps come from, progress and observers."""

    run: Run
    model: TrainableModel
    source: StepSource
    progress: Progress
    recorder: RunRecorder
    observers: Observers
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    """By the step: the last one, and the best."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        results: the numbers of train_results.json.
        best: the best checkpoint, if evaluations chose one.
        step: after which the weights were what the result is; the last, unless the best were loaded.
        evaluation: of the held-out examples at that step; None where there was none.
    """

    results: dict[str, Any]
    best: Path | None
    step: int
    evaluation: Evaluation | None


def fit(training: Training) -> Outcome:
    """Train from where the checkpoint stood to the last step.

    Raises:
        UsageError: a loss or a gradient was not finite. No weight was updated by it, and a checkpoint is saved.
        Interrupted: a signal stopped the run between two steps, and left a checkpoint.
    """
    run, model, steps = training.run, training.model, training.source
    progress, tell = training.progress, training.observers.tell
    state = progress.state
    interruption = Interruption(model.ranks)
    with interruption.watched():
        if run.args.eval_on_start and state.global_step not in training.evaluations:
            evaluate_now(training)
        first_epoch, done = divmod(state.global_step, len(steps))
        for epoch in range(first_epoch, state.num_train_epochs):
            if state.global_step >= state.max_steps:  # killed between its last checkpoint and its result
                break
            tell("on_epoch_begin")
            skipped = 0 if run.args.ignore_data_skip else done
            for number, step in enumerate(steps.epoch(epoch, skipped), start=skipped + 1):
                if run.checkpoint and not progress.counts.steps:
                    load_random_state(model, run.checkpoint, state.global_step)
                tell("on_step_begin")
                before = RandomState(model.device)
                computed = run.task.backward(model, step)
                while isinstance(computed, OutOfMemory):
                    before.restore()
                    step = with_less_memory(model, steps, step, computed, state.global_step + 1)
                    computed = run.task.backward(model, step)
                norm = None if computed.refused else model.clip_gradients(run.args.max_grad_norm)
                finite, signal = look_at(model, computed, norm, interruption.signal or 0)
                if not finite:
                    leave_out(training, computed, before)  # or stop
                tell("on_pre_optimizer_step")
                if finite or model.accelerator.scaler is not None:  # a grad scaler has to see the steps that it skips
                    model.optimizer.step()
                tell("on_optimizer_step")
                rate = model.learning_rate()
                model.next_rate()
                model.zero_gradients()
                progress.counts.add(step.totals)
                if finite:
                    progress.add(computed.loss, computed.sums, step.totals, model.flops_of(step.totals))
                state.global_step += 1
                state.epoch = epoch + number / len(steps)
                tell("on_step_end")
                log_and_evaluate(training, norm if finite else None, rate)
                ends = progress.control.should_epoch_stop or progress.control.should_training_stop
                if ends or number == len(steps):
                    # The checkpoint waits for the evaluation at the epoch's end, so that a run that goes on from it
                    # begins with the next epoch.
                    to_save = progress.control.should_save
                    tell("on_epoch_end")
                    progress.control.should_save |= to_save
                    log_and_evaluate(training, norm if finite else None, rate)
                if progress.control.should_save and save(training, run.args.save_only_model):
                    tell("on_save")
                if model.ranks == 1:
                    signal = interruption.signal or 0  # it may have come since
                if signal and not progress.control.should_training_stop:  # a run at its end may as well finish
                    stop_asked(training, signal)
                if ends:
                    break
            done = 0
            if progress.control.should_training_stop:
                break
    return finish(training)


def begin(run: Run, model: TrainableModel) -> Training:
    """The steps of a run, its state as a checkpoint left it, and its observers."""
    steps = run.task.steps(run.data.train, run.step_settings, model, **run.loading)
    if run.checkpoint:
        progress = resume_progress(run.checkpoint, run.folder, model)
    else:
        progress = Progress(TrainerState(), torch.zeros((), device=model.device))
        progress.state.train_batch_size = run.args.train_batch_size
    state = progress.state
    state.max_steps, state.num_train_epochs = run.total_steps, math.ceil(run.total_steps / len(steps))
    state.compute_steps(run.args, run.total_steps)  # this run's logging_steps, not the checkpoint's
    state.is_local_process_zero = run.args.local_process_index == 0
    state.is_world_process_zero = run.args.process_index == 0
    held_out = run.data.held_out
    recorder = RunRecorder(run.folder, progress.counts, run.started)
    watching = make_observers(run.args, run.config.evaluation, recorder, run.folder)
    observers = Observers(
        [*watching, *sample_writers(run, model, recorder)],
        run.args,
        progress,
        model=model.module,
        processing_class=run.tokenizer,
        optimizer=model.optimizer,
        lr_scheduler=model.scheduler,
        train_dataloader=steps,
        eval_dataloader=None if held_out is None else run.task.in_order(held_out, True, model),
    )
    if run.checkpoint and run.args.restore_callback_states_from_checkpoint:
        observers.take_up_states()
    if DebugOption.UNDERFLOW_OVERFLOW in run.args.debug:
        DebugUnderflowOverflow(model.module)
    observers.tell("on_train_begin")
    return Training(run, model, steps, progress, recorder, observers)


# ---- a step that does not go as planned ----


def with_less_memory(
    model: TrainableModel, steps: StepSource, step: Step[Any], failed: OutOfMemory, number: int
) -> Step[Any]:
    """The same step in microbatches of half the size, as are those after it; or, if a single example was too much, with
    layers recomputed in backward.

    Args:
        number: of the step, for messages.

    Raises:
        torch.OutOfMemoryError: there is nothing left to save.
    """
    model.zero_gradients()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    inner = transformers_model(model.module)
    choices, layers = model.choices, len(decoder_layers(inner))
    tokens = sum(row.input_ids.numel() for row in step.microbatches[failed.microbatch].rows)
    if len(step.example_ids[failed.microbatch]) > 1:
        choices = replace(choices, tokens_per_microbatch=min(tokens // 2, choices.tokens_per_microbatch))
        notice(
            "memory.halved",
            "step {step} ran out of memory and is retried; from now on microbatches hold up to {budget:,} tokens "
            "(tokens_per_microbatch). What is trained stays the same.",
            step=number,
            budget=choices.tokens_per_microbatch,
        )
    elif choices.checkpointed_layers < layers:
        choices = replace(choices, checkpointed_layers=layers)
        notice(
            "memory.checkpointed",
            "step {step} ran out of memory on one example of {tokens:,} tokens and is retried; from now on all layers "
            "are recomputed in backward (gradient_checkpointing).",
            step=number,
            tokens=tokens,
        )
    elif model.device.type == "cuda" and layers and not choices.offload:
        choices = replace(choices, offload=True)
        notice(
            "memory.offloaded",
            "step {step} ran out of memory on one example of {tokens:,} tokens and is retried; from now on the inputs "
            "of layers are kept in CPU memory, which is slower.",
            step=number,
            tokens=tokens,
        )
    else:
        raise torch.OutOfMemoryError(f"one example of {tokens:,} tokens does not fit")
    model.choices = choices
    install_checkpointing(inner, choices.checkpointing)
    return steps.smaller(step, model.budget)


def look_at(
    model: TrainableModel, computed: ComputedStep, norm: Tensor | float | None, signal: int
) -> tuple[bool, int]:
    """Check loss and gradient norm once per step on all ranks; returns (finite, signal received by any rank).

    All kernels of the step are queued by now: this is its only host sync.
    """
    if computed.refused:  # by all ranks together, and every one of them stops
        return False, signal
    looked_at = computed.loss
    if model.accelerator.scaler is None and norm is not None:  # loss scaling handles infinite gradients itself
        looked_at = looked_at + norm
    if model.ranks == 1:
        return math.isfinite(looked_at.item()), signal
    bad = (~torch.isfinite(looked_at)).long()
    bad, signal = model.highest(torch.stack([bad, bad.new_tensor(signal)]))
    return not bad, signal


def leave_out(training: Training, computed: ComputedStep, before: RandomState) -> None:
    """Discard a step that is not finite: weights and random state are as before it.

    Raises:
        UsageError: `on_nonfinite_loss` is stop; what can be saved has been.
    """
    run, model, progress = training.run, training.model, training.progress
    step, rows = progress.state.global_step + 1, name_rows(run.data.train, computed, model.ranks)
    model.zero_gradients()  # an optimizer skips what has no gradient
    before.restore()
    if run.config.step.on_nonfinite_loss == "skip":
        progress.leave_out()
        notice(
            "loss.skipped",
            "step {step} is skipped: its loss or the norm of its gradients is infinite or not a number. Its rows: "
            "{rows}.",
            step=step,
            rows=rows,
        )
        return
    # DeepSpeed may have applied it already if its loss was finite, and its gradients alone were not.
    moved = model.backend.deepspeed and not computed.refused
    if progress.state.global_step and progress.saved_at != progress.state.global_step and not moved:
        save(training)
    training.observers.tell("on_train_end")
    safe, command = what_is_safe(run.folder), resume_command(run.folder)
    if moved:
        raise UsageError(
            "loss.nonfinite_moved",
            "step {step}: its gradients are infinite or not numbers, and DeepSpeed may have moved weights by them; "
            "they are not saved. {safe} Look at its rows: {rows}. If they are sound, go on from there with a lower "
            "learning_rate or max_grad_norm, or with bf16 or fp32 in place of fp16: {command}",
            step=step,
            rows=rows,
            safe=safe,
            command=command,
        )
    raise UsageError(
        "loss.nonfinite",
        "step {step}: its loss or the norm of its gradients is infinite or not a number. No weight was changed by it. "
        "{safe} Look at its rows: {rows}. If they are sound, start a new run with a lower learning_rate or "
        "max_grad_norm, or with bf16 or fp32 in place of fp16. To go on without such steps: {command} "
        "--on_nonfinite_loss skip",
        step=step,
        rows=rows,
        safe=safe,
        command=command,
    )


def name_rows(examples: ExampleList, computed: ComputedStep, world_size: int = 1) -> str:
    """File and line of the rows of the microbatches whose loss is not finite; of all rows if every loss is finite."""
    finite = torch.stack(computed.parts).isfinite().tolist()
    rows = computed.example_ids[: len(finite)]
    doubtful = [rows for rows, good in zip(rows, finite, strict=True) if not good]
    chosen = [row for rows in doubtful or computed.example_ids for row in rows]
    found = [examples.place(row) for row in chosen]
    if world_size > 1:
        gathered = ranks.all_of((bool(doubtful), found))
        # A rank whose own loss is finite is here only because of the others' gradients.
        some = any(doubt for doubt, _ in gathered)
        found = [source for doubt, theirs in gathered if doubt or not some for source in theirs]
    found = sorted(set(found), key=lambda source: (source.file, source.line))
    named = ", ".join(str(source) for source in found[:NAMED_ROWS])
    rest = len(found) - NAMED_ROWS
    return named if rest <= 0 else translate("{rows} and {count} more", rows=named, count=rest)


def stop_asked(training: Training, signal: int) -> None:
    """End the run between two steps, as a signal asked.

    Raises:
        Interrupted: always; it says whether the last step is saved.
    """
    folder, step = training.run.folder, training.progress.state.global_step
    saved = training.progress.saved_at == step or save(training)
    training.observers.tell("on_train_end")
    command = resume_command(folder)
    if saved:
        raise Interrupted(
            "interrupted.saved",
            "stopped by {signal} after step {step}; {path} is saved. Go on with: {command}",
            signal,
            step=step,
            path=checkpoint_folder(folder, step),
            command=command,
        )
    raise Interrupted(
        "interrupted.not_saved",
        "stopped by {signal} after step {step}, whose checkpoint could not be written. {safe} Free some space, then "
        "go on with: {command}",
        signal,
        step=step,
        safe=what_is_safe(folder),
        command=command,
    )


# ---- what observers ask for ----


def save(training: Training, model_only: bool = False) -> bool:
    """Save a checkpoint of the last step, which is no time of training; returns whether it is on the disk."""
    run = training.run
    saved = save_checkpoint(run.folder, training.model, run.tokenizer, training.observers, model_only)
    training.recorder.pace.resume()
    return saved


def log_and_evaluate(training: Training, norm: Tensor | float | None, rate: float) -> None:
    """Log the steps since the last log, and evaluate, if the control flags ask for it."""
    progress, model, args = training.progress, training.model, training.run.args
    state, control = progress.state, progress.control
    if control.should_log and state.global_step > progress.logged_at:
        loss = float(model.summed(progress.loss) / model.ranks)  # host sync
        logs = {"loss": loss / (state.global_step - progress.logged_at)}
        if norm is not None:
            logs["grad_norm"] = float(norm)
        logs["learning_rate"] = rate
        progress.loss.zero_()
        progress.logged_loss += loss
        progress.logged_at = state.global_step
        count_flops(progress, model)
        if progress.sums is not None and progress.summed_examples:
            logs |= training.run.task.training_metrics(model.summed(progress.sums).tolist(), progress.summed_examples)
            progress.sums.zero_()
            progress.summed_examples = 0
        write_log(training, logs, of_steps=True)
    if progress.control.should_evaluate:
        metrics = evaluate_now(training)
        if model.waits_for_metric:
            model.scheduler.step(metrics[best_metric_name(args)])
        better = take_best(training, metrics)
        if args.save_strategy == SaveStrategy.BEST:
            progress.control.should_save = better


def evaluate_now(training: Training) -> dict[str, float]:
    """Evaluate the held-out examples, and notify the observers."""
    held_out = training.run.data.held_out
    assert held_out is not None
    tell, state, kept = training.observers.tell, training.progress.state, training.evaluations
    found = evaluate(training.run.task, training.model, held_out, lambda: tell("on_prediction_step"))
    best = {step: kept[step] for step in kept if step == state.best_global_step}
    kept.clear()
    kept.update(best | {state.global_step: found})
    write_log(training, found.metrics)
    tell("on_evaluate", metrics=found.metrics)
    return found.metrics


def evaluate_result(training: Training) -> Evaluation:
    """Evaluate the held-out examples when training is over and the trackers are done: it stands in metrics.jsonl."""
    held_out, progress = training.run.data.held_out, training.progress
    assert held_out is not None
    found = evaluate(training.run.task, training.model, held_out)
    training.recorder.on_log(
        training.run.args, progress.state, progress.control, logs=found.metrics | {"epoch": progress.state.epoch}
    )
    return found


def write_log(training: Training, logs: dict[str, float], of_steps: bool = False) -> None:
    """Append to the log history, and notify the observers."""
    state, args = training.progress.state, training.run.args
    if state.epoch is not None:
        logs["epoch"] = state.epoch
    if args.include_num_input_tokens_seen != "no":
        logs["num_input_tokens_seen"] = state.num_input_tokens_seen
        if of_steps:
            logs |= speed_metrics("train", training.recorder.training_began, num_tokens=training.progress.counts.tokens)
    state.log_history.append({**logs, "step": state.global_step})
    training.observers.tell("on_log", logs=logs)


def best_metric_name(args: Any) -> str:
    return (
        args.metric_for_best_model
        if args.metric_for_best_model.startswith("eval_")
        else f"eval_{args.metric_for_best_model}"
    )


def take_best(training: Training, metrics: dict[str, float]) -> bool:
    """Whether an evaluation is the best so far; records it in the state."""
    args, state = training.run.args, training.progress.state
    if args.metric_for_best_model is None:
        return False
    found, best = metrics[best_metric_name(args)], state.best_metric
    if best is None:
        best = state.best_metric = -math.inf if args.greater_is_better else math.inf
    if not (found > best if args.greater_is_better else found < best):
        return False
    state.best_metric = found
    if args.save_strategy != SaveStrategy.NO:
        state.best_global_step = state.global_step
    return True


def finish(training: Training) -> Outcome:
    """The results of the run; loads the best weights first, if `load_best_model_at_end` asks for it."""
    run, model, progress, args = training.run, training.model, training.progress, training.run.args
    state = progress.state
    trained = state.global_step - progress.begun_at
    total = progress.logged_loss + float(model.summed(progress.loss) / model.ranks)
    whole = state.max_steps * run.step_settings.examples_per_step
    examples = whole if args.max_steps > 0 else len(run.data.train) * args.num_train_epochs
    metrics = speed_metrics(
        "train",
        training.recorder.training_began,
        num_samples=examples * trained / max(state.max_steps, 1),
        num_steps=trained,
    )
    count_flops(progress, model)
    metrics |= {"total_flos": state.total_flos, "train_loss": total / max(trained, 0.001)}
    write_log(training, metrics)
    best, kept = state.best_global_step, state.best_model_checkpoint
    if args.load_best_model_at_end and kept is not None:
        model.load_best(Path(kept))
    training.observers.tell("on_train_end")
    if run.checkpoint and not progress.counts.steps:
        notice(
            "resume.nothing_left",
            "{path} is the last of the {steps} steps already, so nothing was trained and the results stay as they "
            "were. To train on, raise num_train_epochs or max_steps.",
            path=run.checkpoint,
            steps=state.global_step,
        )
    if args.load_best_model_at_end and best and not checkpoint_folder(run.folder, best).is_dir():
        notice(
            "save.best_lost",
            "the best evaluation was at step {step}, of which there is no checkpoint: the result is {used}; let "
            "save_steps be eval_steps.",
            step=best,
            used=kept or Phrase("what the last step left"),
        )
    step = state.global_step
    if args.load_best_model_at_end and kept is not None:
        step = int(kept.rpartition("-")[2])
    return Outcome(
        results=training.recorder.results(metrics, progress.skipped, model.device),
        best=None if kept is None else Path(kept),
        step=step,
        evaluation=training.evaluations.get(step),
    )
