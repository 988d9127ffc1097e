"""The banner: what a run prints before its first step."""

from __future__ import annotations

from typing import Any

import torch

from firefly import ranks
from firefly.console import stderr_console
from firefly.distributed.model import TrainableModel
from firefly.models.adapters import transformers_model
from firefly.models.checkpointing import decoder_layers
from firefly.models.kernels.elementwise import implementation, is_cuda_device
from firefly.models.kernels.lora_linear import cache_sizes
from firefly.models.kernels.segment_attention import describe_attention
from firefly.models.memory import PARTS
from firefly.models.precision import Precision
from firefly.models.tuning import Choices
from firefly.run import Run
from firefly.runs.overview import show_example
from firefly.setup.build import ModelFacts
from firefly.translation import translate


def show_before_training(run: Run, model: TrainableModel, facts: ModelFacts) -> None:
    """One example with what is trained of it, the step, its ranks, the memory, and what was chosen by measurement."""
    console, examples = stderr_console(), run.data.train
    show_example(console, examples[0], run.tokenizer)
    trainable, total = facts.parameters
    layout, reason = facts.layout
    parts = ", ".join(f"{PARTS[part]} {size / 2**30:.2f}" for part, size in facts.forecast.parts.items())
    lines = [
        examples.ledger.summary(),
        translate(
            "steps: {steps} of {examples} examples each ({device} per device × {accumulation} accumulated), from "
            "{count} examples ({held_out} held out); microbatches of at most {budget} tokens",
            examples=run.step_settings.examples_per_step,
            device=run.config.step.per_device_examples,
            accumulation=run.config.step.accumulation,
            budget=model.choices.tokens_per_microbatch,
            steps=run.total_steps,
            count=len(examples),
            held_out=len(run.data.held_out) if run.data.held_out is not None else 0,
        ),
        translate(
            "parameters: {trainable} trained of {total} ({share})",
            trainable=f"{trainable:,}",
            total=f"{total:,}",
            share=f"{trainable / total:.2%}",
        ),
        translate(
            "compute: {device}, {precision}, layout {layout}, head {head}",
            device=run.device,
            precision=run.precision,
            layout=layout,
            head=facts.head,
        ),
    ]
    if is_cuda_device(run.device):
        lines.append(translate("norms, rotary positions and gates: {name}", name=implementation(run.device)))
    for line in lines:
        console.print(line, soft_wrap=True)
    if reason:
        console.print(
            translate("layout solo: {reason}; one example per microbatch, same loss, slower", reason=reason),
            soft_wrap=True,
            style="yellow",
        )
    needed, available = facts.forecast.total / 2**30, facts.forecast.available / 2**30
    forecast = translate(
        "memory forecast: {total} GiB ({parts}); {available} GiB available",
        total=f"{needed:.2f}",
        parts=parts,
        available=f"{available:.1f}",
    )
    console.print(forecast, soft_wrap=True)
    if ranks.world_size() > 1:
        shared = translate(
            "{ranks} processes, {engine}: {per_rank} examples a step each, {total} in all",
            ranks=ranks.world_size(),
            engine=run.backend.name,
            per_rank=run.config.step.examples_per_rank,
            total=run.step_settings.examples_per_step,
        )
        console.print(shared, soft_wrap=True)
    inner = transformers_model(model.module)
    console.print(describe_choices(model.choices, inner, run.precision, run.device), soft_wrap=True)


def describe_choices(choices: Choices, model: Any, precision: Precision, device: torch.device) -> str:
    """What was tuned, or set by the configuration."""
    return translate(
        "chosen: {again} of {layers} layers recomputed in backward{offload}; {cached} of {weights} 4-bit weights "
        "cached; attention: {attention}",
        again=choices.checkpointed_layers,
        layers=len(decoder_layers(model)),
        offload=translate(" (their inputs are kept in CPU memory)") if choices.offload else "",
        cached=choices.cached_weights,
        weights=len(cache_sizes(model, precision.compute)),
        attention=describe_attention(device, precision.compute, choices.attention_by_products),
    )
