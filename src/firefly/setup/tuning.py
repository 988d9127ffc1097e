"""What the configuration leaves to measurement ("auto"), and the memory that a run so trained will take."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments

from firefly import ranks
from firefly.models import choices as choosing
from firefly.models.adapters import transformers_model
from firefly.models.checkpointing import Checkpointing
from firefly.models.choices import Choices, Lengths
from firefly.models.kernels import segment_attention
from firefly.models.kernels.weight_cache import cache_sizes
from firefly.models.memory import (
    Forecast,
    assemble,
    estimated_peak,
    forecast_memory,
    free_memory,
    kernels_kept,
    optimizer_bytes_of,
)
from firefly.models.trials import Trials
from firefly.models.verdicts import known_crossover
from firefly.run import Run
from firefly.runs.checkpoints import stored_choices
from firefly.setup.arguments import PAGED_ADAM


def resolve_choices(
    run: Run, args: TrainingArguments, module: Any, trials: Trials, layout: str
) -> tuple[Choices, Forecast]:
    """Resolve what is "auto", by measurement or from the checkpoint, and forecast the memory of a run so trained.

    The same on every rank: the choices of the one with the least memory. The forecast is `firefly plan`'s, but for what
    a step takes besides weights: that is estimated from what a pass was measured to keep.
    """
    config, device, precision, backend = run.config, run.device, run.precision, run.backend
    examples, inner, full = run.data.train, transformers_model(module), config.adapter.mode == "full"
    largest = np.sort(examples.counts.lengths)[::-1][: config.step.examples_per_rank]
    lengths = Lengths(longest=int(largest[0]), step=int(largest.sum()))
    by_products = known_crossover(inner, device, precision.compute)
    segment_attention.use_crossover(by_products)  # what attention keeps is measured below
    autocast = precision.compute if full and precision.compute != torch.float32 else None
    activations = trials.activations(config.adapter, layout, autocast, int(examples.counts.sides.max()))
    keeps_copy = config.task_type == "dpo" and full and not config.preference.precompute_reference
    copied = sum(p.numel() for p in module.parameters()) * precision.compute.itemsize if keeps_copy else 0
    cacheable = cache_sizes(inner, precision.compute)

    def forecast(checkpointing: Checkpointing, tokens: int, cached: int) -> Forecast:
        state = optimizer_bytes_of(args.optim)
        whole = forecast_memory(module, device, activations, checkpointing, tokens, state, cached, copied)
        return backend.share(whole)

    choices = choosing.choose(
        config.step, activations, forecast, lengths, device, cacheable, by_products, precision.compute
    )
    if args.optim in PAGED_ADAM and device.type == "cuda" and not (backend.deepspeed or backend.shards):
        tokens = lengths.largest_microbatch(choices.tokens_per_microbatch)
        expected = forecast(choices.checkpointing, tokens, sum(cacheable[: choices.cached_weights]))
        choices = replace(choices, unpaged_optimizer=choosing.fits(expected))
    choices = choosing.most_careful(ranks.all_of(choices))
    if run.checkpoint:
        choices = choosing.settled(config.step, stored_choices(run.checkpoint), choices)
    tokens = lengths.largest_microbatch(choices.tokens_per_microbatch)
    peak = estimated_peak(inner, device, activations, choices.checkpointing, tokens, precision.compute.itemsize)
    each = min(config.step.examples_per_rank, math.ceil(lengths.step / choices.tokens_per_microbatch))
    whole = assemble(
        module,
        device.type,
        peak,
        optimizer_bytes=optimizer_bytes_of(args.optim),
        cache=sum(cacheable[: choices.cached_weights]),
        reference=copied,
        microbatches=run.total_steps * each,
        shapes=lengths.longest,
        kernels=kernels_kept(config.task_type, examples.counts.lengths, examples.counts.targets),
        available=free_memory(device),
    )
    return choices, backend.share(whole)
