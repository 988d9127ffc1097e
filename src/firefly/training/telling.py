"""What a run says of itself before its first step, and through whom it speaks from there on."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from firefly import ranks
from firefly.config import Config
from firefly.console import stderr_console
from firefly.data.dataset import Split
from firefly.models.adapters import transformers_model
from firefly.models.checkpointing import decoder_layers
from firefly.models.choices import Choices
from firefly.models.kernels.segment_attention import describe_attention
from firefly.models.kernels.weight_cache import cache_sizes
from firefly.models.memory import Forecast
from firefly.models.precision import Precision
from firefly.objectives.trainers import StepTrainer
from firefly.runs.metrics import Guarded, Progress, RunRecorder
from firefly.runs.overview import show_example, show_run
from firefly.runs.trackers import PassportReporter, never_ask
from firefly.training.plans import total_steps
from firefly.translation import translate


def replace_progress(trainer: StepTrainer, recorder: RunRecorder) -> None:
    """Our progress line instead of transformers' printed dictionaries, trackers that are told all, quiet libraries."""
    transformers_logging.set_verbosity_error()
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    names = list(trainer.args.report_to or ())
    never_ask(names)
    handler = trainer.callback_handler
    boards = [one for one in handler.callbacks if isinstance(one, TensorBoardCallback)]
    trackers = [one for one in handler.callbacks if type(one).__module__.startswith("transformers.integrations")]
    handler.callbacks = [Guarded(one, recorder) if one in trackers else one for one in handler.callbacks]
    handler.callbacks.insert(1, recorder)  # behind the flow of control, before the trackers
    trainer.add_callback(Guarded(PassportReporter(recorder.path.parent, boards), recorder))
    if ranks.is_first():
        trainer.add_callback(Progress(show_bar=not trainer.args.disable_tqdm and sys.stderr.isatty()))


def show_before_training(
    config: Config,
    trainer: StepTrainer,
    data: Split,
    parameters: tuple[int, int],
    layout: tuple[str, str],
    head: str,
    precision: Precision,
    forecast: Forecast,
    device: torch.device,
) -> None:
    """One example with what is trained of it, the step, its ranks, the memory, and what was chosen by measurement."""
    console, model = stderr_console(), transformers_model(trainer.model)
    show_example(console, data.train[0], trainer.processing_class)
    steps = describe_steps(config, data, trainer)
    show_run(console, data.train, steps, parameters, layout, head, precision, forecast, device)
    if ranks.world_size() > 1:
        console.print(describe_ranks(config, trainer), soft_wrap=True)
    console.print(describe_choices(trainer.options.choices, model, precision, device), soft_wrap=True)


def describe_steps(config: Config, data: Split, trainer: StepTrainer) -> str:
    """How many examples make a step, on which ranks, and how many steps the run."""
    per_epoch = len(trainer.get_train_dataloader())
    return translate(
        "steps: {steps} of {examples} examples each ({device} per device × {accumulation} accumulated), from {count} "
        "examples ({held_out} held out); microbatches of at most {budget} tokens",
        examples=trainer.options.examples_per_step,
        device=config.step.per_device_examples,
        accumulation=config.step.accumulation,
        budget=trainer.options.choices.tokens_per_microbatch,
        steps=total_steps(trainer.args, per_epoch),
        count=len(data.train),
        held_out=len(data.held_out) if data.held_out is not None else 0,
    )


def describe_ranks(config: Config, trainer: StepTrainer) -> str:
    """How many processes share a step, and by which engine."""
    return translate(
        "{ranks} processes, {engine}: {per_rank} examples a step each, {total} in all",
        ranks=ranks.world_size(),
        engine=trainer.options.engine.name,
        per_rank=config.step.examples_per_rank,
        total=trainer.options.examples_per_step,
    )


def describe_choices(choices: Choices, model: Any, precision: Precision, device: torch.device) -> str:
    """What was chosen by measurement, or by the configuration in its place."""
    return translate(
        "chosen: {again} of {layers} layers recomputed in backward{offload}; {cached} of {weights} 4-bit weights "
        "cached; attention: {attention}",
        again=choices.checkpointed_layers,
        layers=len(decoder_layers(model)),
        offload=translate(" (their inputs are kept in CPU memory)") if choices.offload else "",
        cached=choices.cached_weights,
        weights=len(cache_sizes(model, precision.compute)),
        attention=describe_attention(device, precision.compute),
    )
