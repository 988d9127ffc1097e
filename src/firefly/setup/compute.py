"""The type that a run computes in: its checkpoint's, or the faster one that fits, by measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from firefly import ranks
from firefly.config import Config
from firefly.console import notice
from firefly.data.examples import ExampleCounts
from firefly.distributed.backends import BACKENDS, Backend
from firefly.models import precision
from firefly.models.checkpointing import text_layers
from firefly.models.compute_type import Room, is_asked, measured_precision, rates_so_far
from firefly.models.memory import FRAGMENTATION, LIBRARIES, PRIMITIVE_BYTES, Forecast, free_memory, primitives_kept
from firefly.models.precision import Precision
from firefly.models.serving_memory import NF4_BYTES
from firefly.runs.checkpoints import stored_plan
from firefly.tasks import TASKS


def settle_precision(
    config: Config,
    ruled: Precision,
    device: torch.device,
    counts: ExampleCounts,
    checkpoint: Path | None = None,
    backend: Backend = BACKENDS["single"],
    available: int | None = None,
    notify: Callable[..., None] = notice,
) -> Precision:
    """What a run, or the plan of one, computes in. Where several ranks have joined, the first one measures and the
    others wait, so that they neither disturb it nor choose another type; a checkpoint may lie on its machine alone.

    Args:
        ruled: what `resolve_precision` made of the configuration.
        checkpoint: to continue from. Its type is kept where none is asked for, whatever is faster on this machine.
        available: bytes that the run may take; None: what is free.
        notify: is given what `notice` takes.
    """
    if device.type != "cpu":
        return ruled
    if checkpoint and not is_asked(config.precision):
        stored = _as_stored(checkpoint, ruled, device, notify)
        if ranks.is_first() and precision.has_bf16(device):
            stored = replace(stored, rates=rates_so_far(config.model, config.adapter.mode == "full"))
        return ranks.from_first(stored)
    found = ruled
    if ranks.is_first():
        room = Room(
            lambda model, compute: bytes_needed(config, model, compute, counts, backend),
            free_memory(device) if available is None else available,
        )
        full = config.adapter.mode == "full"
        found = measured_precision(config.precision, ruled, device, config.model, room, trained=full, notify=notify)
    return ranks.from_first(found)


def _as_stored(checkpoint: Path, ruled: Precision, device: torch.device, notify: Callable[..., None]) -> Precision:
    stored = stored_plan(checkpoint).get("training", {}).get("precision")
    if stored not in ("float32", "bfloat16"):  # a GPU's fp16, which no CPU trains in
        return ruled
    if stored == "bfloat16" and not precision.has_bf16(device):
        notify(
            "precision.emulated",
            "the checkpoint was trained in bfloat16, and so it goes on; this CPU has no instructions for it and takes "
            'several times as long. To go on in float32 write "bf16": false and "resume_anyway": true.',
        )
    return Precision(getattr(torch, stored))


def bytes_needed(config: Config, model: Any, compute: torch.dtype, counts: ExampleCounts, backend: Backend) -> int:
    """Roughly what training takes with nothing recomputed, its longest example alone in a microbatch. It is made of the
    shapes of a model on "meta", for a choice that is made before there is a forecast.

    In NF4 are the matrices of the decoder layers. Of a token a layer keeps what its matrices make of it, and around
    them what is of the model's width, part of it in float32: within 10 % of what was counted for Llama and Qwen3.
    """
    layers, mode, size = text_layers(model), config.adapter.mode, compute.itemsize
    inside = {id(p): p.shape for layer in layers for p in layer.parameters() if len(p.shape) > 1}
    whole = sum(p.numel() for p in model.parameters())
    width = getattr(model.config.get_text_config(), "hidden_size", 0)
    kept = size * sum(shape[-2] for shape in inside.values()) + (16 + 4 * size) * width * len(layers)
    step = int(counts.lengths.max()) * kept
    if mode == "full":
        trained, weights = whole, 4 * whole
    else:
        sides = sum(shape[:-2].numel() * (shape[-2] + shape[-1]) for shape in inside.values())
        trained = config.adapter.rank * sides
        in_4_bits = sum(shape.numel() for shape in inside.values()) if mode == "qlora" else 0
        weights = round(in_4_bits * NF4_BYTES) + (whole - in_4_bits) * size
    copied = mode == "full" and TASKS[config.task_type].asks_reference(config)
    primitives = primitives_kept(int(counts.lengths.sum()), int(counts.segments.sum())) if size == 2 else 0
    parts = {
        "weights": weights,
        "adapter": 0 if mode == "full" else 4 * trained,
        "optimizer": 8 * trained,
        "gradients": 4 * trained,
        "activations": step,
        "reference": whole * size if copied else 0,
        "libraries": LIBRARIES["cpu"],
        "kernels": primitives * PRIMITIVE_BYTES,
        "allocator": int(FRAGMENTATION["cpu"] * step),
    }
    return backend.share(Forecast(parts, 0, 0)).total
