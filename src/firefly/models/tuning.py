"""Autotuning: microbatch size, activation checkpointing, and which dequantized weights are cached.

None of it changes what is trained beyond rounding. It is tuned once; a resumed run takes its checkpoint's values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from firefly.config import StepConfig
from firefly.models.attention import use_crossover
from firefly.models.checkpointing import Checkpointing, install_checkpointing
from firefly.models.kernels.lora_linear import cache_weights, weights_that_fit
from firefly.models.memory import FRAGMENTATION, Activations, Forecast

USABLE = 0.8
"""Share of the free memory that a forecast may fill."""

USEFUL = {"cpu": 512, "cuda": 16384}
"""Tokens of a microbatch beyond which a device gets no faster: a CPU's matmuls reach their rate with a few
hundred rows; a GPU's with some thousands, and NF4 weights are dequantized once per microbatch."""

USEFUL_16_BIT = {"cpu": 2048}
"""Where matmuls are faster, the overhead around them weighs more: a microbatch of SmolLM2 in bf16 took 0.13 s beside
what its tokens took, so that twice as many as 1,024 at a time gained a tenth. Whole weights are cast, and their
gradients added to, once a microbatch besides."""

LEAST = {"cpu": 1, "cuda": 2048}
"""Tokens of a microbatch that are worth recomputing layers for."""


@dataclass(frozen=True)
class Choices:
    """What is tuned.

    Attributes:
        tokens_per_microbatch: more are never computed together, but for a single longer example.
        checkpointed_layers, offload: see `checkpointing`.
        cached_weights: how many 4-bit weights have a copy in the compute type (see `lora_linear`).
        unpaged_optimizer: whether the state of an optimizer that could page it lies in the GPU's memory.
        attention_by_products: tokens up to which a CPU's attention is computed by matmuls (see
            `segment_attention`).
    """

    tokens_per_microbatch: int
    checkpointed_layers: int = 0
    offload: bool = False
    cached_weights: int = 0
    attention_by_products: int = 0
    unpaged_optimizer: bool = False

    @property
    def checkpointing(self) -> Checkpointing:
        return Checkpointing(self.checkpointed_layers, self.offload)


def fits(forecast: Forecast) -> bool:
    """Whether a run so forecast leaves room to spare."""
    return forecast.missing <= USABLE * forecast.available


ForecastOf = Callable[[Checkpointing, int, int], Forecast]
"""(checkpointing, tokens of a microbatch, bytes of cached weights) → the forecast."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of the longest example, and of the largest step that a run can draw."""

    longest: int
    step: int

    def largest_microbatch(self, budget: int) -> int:
        """Tokens of the largest microbatch under a budget, which a single longer example exceeds."""
        return max(self.longest, min(budget, self.step))


def choose(
    settings: StepConfig,
    activations: Activations,
    forecast: ForecastOf,
    lengths: Lengths,
    device: torch.device,
    cache_bytes: list[int],
    attention_by_products: int = 0,
    compute: torch.dtype = torch.float32,
) -> Choices:
    """Resolve what `settings` leaves to measurement.

    Layers are recomputed only as far as memory requires it, and dequantized weights are cached only in memory that
    nothing else needs; on a CPU only where the settings ask for it, since other programs use its memory, too.

    Args:
        cache_bytes: what a copy of each 4-bit weight would take.
        attention_by_products: what `probe_cache.cached_crossover` found.
        compute: the type that matmuls are computed in.
    """

    empty = forecast(Checkpointing(), 0, 0)  # without tokens it is the same whatever is recomputed
    room = USABLE * empty.available - empty.missing

    heap = 1 + FRAGMENTATION[device.type]

    def fitting(checkpointing: Checkpointing) -> int:
        return int(room / max(activations.per_token(checkpointing) * heap, 1))

    most = USEFUL if compute == torch.float32 else USEFUL | USEFUL_16_BIT
    useful = min(most[device.type], max(lengths.step, lengths.longest))
    asked = None if isinstance(settings.tokens_per_microbatch, str) else settings.tokens_per_microbatch
    checkpointing = _choose_checkpointing(settings, activations.layers, fitting, lengths, useful, asked, device)
    budget = asked or max(lengths.longest, min(useful, fitting(checkpointing)))
    cached = 0
    if settings.nf4_cache is True:
        cached = len(cache_bytes)
    elif settings.nf4_cache == "auto" and device.type != "cpu":

        def fitting_copies(budget: int) -> int:
            rest = forecast(checkpointing, lengths.largest_microbatch(budget), 0)
            return weights_that_fit(cache_bytes, int(USABLE * rest.available - rest.missing))

        cached = fitting_copies(budget)
        if cached < len(cache_bytes) and not asked and (even := _even(budget, lengths)) < budget:
            budget, cached = even, fitting_copies(even)
    return Choices(budget, checkpointing.layers, checkpointing.offload, cached, attention_by_products)


def _even(budget: int, lengths: Lengths) -> int:
    """No larger a budget than asked for by the number of microbatches that it makes of the largest step: beyond that it
    only takes memory. A tenth is for examples that do not cut evenly."""
    parts = -(-lengths.step // budget)
    return min(budget, max(lengths.longest, lengths.step * 11 // (10 * parts)))


def agree_on_tuning(choices: Sequence[Choices]) -> Choices:
    """The most conservative setting over ranks: all share one step schedule."""
    return Choices(
        tokens_per_microbatch=min(one.tokens_per_microbatch for one in choices),
        checkpointed_layers=max(one.checkpointed_layers for one in choices),
        offload=any(one.offload for one in choices),
        cached_weights=min(one.cached_weights for one in choices),
        attention_by_products=choices[0].attention_by_products,
        unpaged_optimizer=all(one.unpaged_optimizer for one in choices),
    )


def restore_tuning(settings: StepConfig, stored: Choices, today: Choices) -> Choices:
    """The tuning of a resumed run: its checkpoint's, but for what the settings name explicitly."""
    if settings.tokens_per_microbatch != "auto":
        stored = replace(stored, tokens_per_microbatch=today.tokens_per_microbatch)
    if settings.gradient_checkpointing != "auto":
        stored = replace(stored, checkpointed_layers=today.checkpointed_layers, offload=False)
    # Cached copies change no result, and the present GPU may have no room for them.
    cached = min(stored.cached_weights, today.cached_weights) if settings.nf4_cache == "auto" else today.cached_weights
    return replace(stored, cached_weights=cached)


def _choose_checkpointing(
    settings: StepConfig,
    layers: int,
    fitting: Callable[[Checkpointing], int],
    lengths: Lengths,
    useful: int,
    asked: int | None,
    device: torch.device,
) -> Checkpointing:
    """None → the fewest layers that fit → all → all with inputs offloaded to CPU memory."""
    if settings.gradient_checkpointing != "auto":
        return Checkpointing(max(layers, 1) if settings.gradient_checkpointing else 0)
    wished = max(lengths.longest, min(asked or LEAST[device.type], useful))
    for tokens in (wished, lengths.longest):
        for count in range(layers + 1):
            if fitting(Checkpointing(count)) >= tokens:
                return Checkpointing(count)
    return Checkpointing(layers, offload=device.type == "cuda" and layers > 0)


def apply(choices: Choices, model: Any, compute: torch.dtype) -> None:
    """Apply the tuning to the prepared transformers model."""
    use_crossover(model, choices.attention_by_products)
    install_checkpointing(model, choices.checkpointing)
    cache_weights(model, choices.cached_weights, compute)
