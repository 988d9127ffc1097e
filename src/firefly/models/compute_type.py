"""The type that a CPU computes a model in: the one in which products of the model's shapes were measured to be faster.

A GPU, and a CPU that would have to emulate bf16, are left to `precision.resolve_precision`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from firefly.config import ModelConfig, PrecisionConfig
from firefly.console import notice
from firefly.files import first_line
from firefly.models import precision
from firefly.models.loading import quiet_libraries, read_config
from firefly.models.meta_model import empty_model
from firefly.models.precision import Precision, Rates
from firefly.models.probe_cache import cached_rates, known_rates
from firefly.models.products import products_of

FASTER = 1.05
"""How much faster products in float32 have to be to be preferred: bfloat16 takes half the memory, and what stands
around products is faster in it."""

WORTH_SAYING = 1.1
"""How much faster the other type is where a notice says so."""


@dataclass(frozen=True)
class Room:
    """The memory that a choice has to fit into.

    Attributes:
        need: the bytes that a model on "meta" takes with this compute type.
        available: bytes that are free.
    """

    need: Callable[[Any, torch.dtype], int]
    available: int


def is_asked(request: PrecisionConfig) -> bool:
    """Whether the configuration names a type. `"fp16": false` alone rules nothing out that a CPU would take."""
    return request.bf16 is not None or bool(request.fp16)


def measured_precision(
    request: PrecisionConfig,
    ruled: Precision,
    device: torch.device,
    source: ModelConfig,
    room: Room,
    *,
    trained: bool = False,
    notify: Callable[..., None] = notice,
) -> Precision:
    """What `source` is computed in on `device`. Never fails because of a measurement: then it is `ruled`, and said.

    A model whose products are too small to be timed (`products.NOTHING_TO_TIME`) computes in float32. What was asked
    for stands, and a notice says where it is the slower one by far.

    Args:
        ruled: what `resolve_precision` made of `request`.
        trained: all weights have gradients.
        notify: is given what `notice` takes.
    """
    if device.type != "cpu" or not precision.has_bf16(device):
        return ruled
    try:
        model = _on_meta(source)
        products = products_of(model)
        if products.tiny:
            return ruled if is_asked(request) else Precision(torch.float32)
        rates = cached_rates(products)["trained" if trained else "frozen"]
    except Exception as error:  # whatever a model's own code raises; if it cannot be loaded either, loading says why
        notify(
            "precision.unmeasured",
            "whether this CPU is faster in float32 or in bfloat16 could not be measured for this model ({problem}); it "
            "computes in {used}.",
            problem=f"{type(error).__name__}: {first_line(error)}",
            used=ruled.name,
        )
        return ruled
    if is_asked(request):
        _tell_of_faster(request, ruled, rates, notify)
        return replace(ruled, rates=rates)
    found = Precision(torch.bfloat16, rates=rates)
    if rates.float32 < FASTER * rates.bfloat16:
        return found
    times = f"{rates.float32 / rates.bfloat16:.1f}"
    try:
        wide, narrow = (room.need(model, dtype) for dtype in (torch.float32, torch.bfloat16))
    except Exception as error:
        notify(
            "precision.room_unknown",
            "products in float32 are {times} times as fast as in bfloat16 here, but what memory float32 takes could "
            "not be told ({problem}); bfloat16, which takes less, is used.",
            times=times,
            problem=f"{type(error).__name__}: {first_line(error)}",
        )
        return found
    if wide <= room.available:
        return replace(found, compute=torch.float32)
    notify(
        "precision.no_room",
        "products in float32 are {times} times as fast as in bfloat16 here, but float32 takes about {wide} GiB of the "
        "{available} GiB available; bfloat16, which takes about {narrow} GiB, is used.",
        times=times,
        wide=f"{wide / 2**30:.1f}",
        narrow=f"{narrow / 2**30:.1f}",
        available=f"{room.available / 2**30:.1f}",
    )
    return found


def rates_so_far(source: ModelConfig, trained: bool) -> Rates | None:
    """What was measured for `source` on this machine before, to be shown; None where nothing was, or nothing tells."""
    try:
        products = products_of(_on_meta(source))
        found = None if products.tiny else known_rates(products)
    except Exception:  # whatever a model's own code raises; loading says it
        return None
    return None if found is None else found["trained" if trained else "frozen"]


def _on_meta(source: ModelConfig) -> Any:
    with quiet_libraries():
        return empty_model(read_config(source), source, torch.float32)


def _tell_of_faster(request: PrecisionConfig, used: Precision, rates: Rates, notify: Callable[..., None]) -> None:
    other = torch.bfloat16 if used.compute == torch.float32 else torch.float32
    times = rates.of(other) / rates.of(used.compute)
    if times > WORTH_SAYING:
        notify(
            "precision.slower",
            "{asked} was asked for; on this machine products of the model's shapes in {other} are {times} times as "
            "fast ({others_rate} and {rate} GFLOP/s).",
            asked="fp16" if request.fp16 else "bf16" if request.bf16 else "fp32",
            other=Precision(other).name,
            times=f"{times:.1f}",
            others_rate=f"{rates.of(other) / 1e9:.0f}",
            rate=f"{rates.of(used.compute) / 1e9:.0f}",
        )
