"""The type that models answer in: the one asked for, else the one they were trained in, else what training would take.

A run on a CPU measures which type is faster there, and keeps it. Answers in the other type would be those of weights
that are rounded otherwise, so what a run recorded goes before what this machine would choose.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from firefly.config import ModelConfig, PrecisionConfig
from firefly.console import notice
from firefly.models import precision
from firefly.models.compute_type import Room, measured_precision
from firefly.models.loading import read_config, resolve_model
from firefly.models.memory import free_memory
from firefly.models.precision import Precision, named_precision, pick_device
from firefly.models.saved_adapter import adapter_folder, recorded_run
from firefly.models.serving_memory import FOR_CACHE, TOKENS_OF_A_REQUEST, beside_cache, cache_shape, weight_bytes
from firefly.runs.checkpoints import stored_plan
from firefly.runs.records import read_object

MERGED = "merge_report.json"
"""What a merge writes beside its weights; `trained_in` there is the adapter's type."""


def answering_precision(
    dtype: str,
    model: ModelConfig,
    adapters: Iterable[str],
    in_4_bits: bool = False,
    device: torch.device | None = None,
    available: int | None = None,
    notify: Any = notice,
) -> Precision:
    """What a base and adapters over it answer in, all of them alike.

    Args:
        dtype: one of `precision.DTYPES`.
        adapters: as they were named.
        device: that answers; None: this machine's.
        available: bytes that it has free; None: found out.
        notify: is given what `notice` takes.

    Raises:
        UsageError: there is no such type.
    """
    device = device or pick_device()
    named = named_precision(dtype, device)
    if dtype != "auto" or device.type != "cpu":
        return named
    adapters = list(adapters)
    room = Room(
        lambda _, compute: bytes_to_answer(model, compute, 1 + len(adapters), in_4_bits),
        free_memory(device) if available is None else available,
    )
    folders = [adapter_folder(adapter) for adapter in adapters] or [Path(resolve_model(model)).expanduser()]
    trained_in = {trained_type(folder) for folder in folders}
    kept = trained_in.pop() if len(trained_in) == 1 else None
    if kept == torch.bfloat16:
        return named  # bf16 itself, or float32 where it would have to be emulated
    if kept == torch.float32 and precision.has_bf16(device) and (wide := _taken(room, torch.float32)) > room.available:
        notify(
            "precision.no_room_to_answer",
            "the model was trained in float32, in which it takes about {wide} GiB of the {available} GiB available; it "
            "answers in {used}.",
            wide=f"{wide / 2**30:.1f}",
            available=f"{room.available / 2**30:.1f}",
            used=named.name,
        )
        return named
    if kept == torch.float32:
        return Precision(torch.float32)
    return measured_precision(PrecisionConfig(), named, device, model, room, notify=notify)


def trained_type(folder: Path) -> torch.dtype | None:
    """The type that a run of ours computed these weights in, float32 or bfloat16; None where nothing says so.

    A checkpoint lies inside its run's folder; what lies above others is not about them.
    """
    if not folder.is_dir():  # an id of a hub
        return None
    folder = folder.absolute()
    own = (folder / "run.json").is_file() or folder.name.startswith("checkpoint-")
    run = recorded_run(folder) if own else {}
    resolved = run.get("resolved")
    found = (
        read_object(folder / MERGED).get("trained_in")
        or _of_checkpoint(folder)
        or (resolved.get("precision") if isinstance(resolved, dict) else None)
    )
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(str(found))


def bytes_to_answer(model: ModelConfig, compute: torch.dtype, models: int = 1, in_4_bits: bool = False) -> int:
    """What a CPU needs for the cache of each model to hold a request, by its default part of the memory.

    Args:
        models: the base and the adapters over it.
    """
    described = read_config(model)
    shape = cache_shape(described, model)
    cache = {} if shape is None else shape.parts(TOKENS_OF_A_REQUEST, compute.itemsize, models)
    beside = sum(beside_cache("cpu", compute).values())
    return weight_bytes(described, model, compute, in_4_bits) + beside + math.ceil(sum(cache.values()) / FOR_CACHE)


def _taken(room: Room, dtype: torch.dtype) -> int:
    """0 where it cannot be told: then loading shows it."""
    try:
        return room.need(None, dtype)
    except Exception:  # whatever a model's own code raises
        return 0


def _of_checkpoint(folder: Path) -> Any:
    try:
        training = stored_plan(folder).get("training")
    except ValueError:
        return None
    return training.get("precision") if isinstance(training, dict) else None
