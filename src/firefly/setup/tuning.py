"""What the configuration leaves to measurement ("auto"), and the memory that a run so trained will take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainingArguments

from firefly import ranks
from firefly.config import Config
from firefly.console import notice
from firefly.data.examples import ExampleCounts
from firefly.distributed.backends import BACKENDS, Backend
from firefly.distributed.model import create_optimizer
from firefly.files import first_line
from firefly.models import tuning
from firefly.models.adapters import transformers_model
from firefly.models.attention import use_crossover
from firefly.models.checkpointing import Checkpointing
from firefly.models.dry_run import without_numbers
from firefly.models.kernels.lora_linear import cache_sizes
from firefly.models.memory import (
    Activations,
    Forecast,
    Peak,
    estimated_peak,
    forecast_memory,
    free_memory,
    primitives_kept,
)
from firefly.models.probe_cache import cached_bytes, cached_crossover
from firefly.models.probes import Probes
from firefly.models.tuning import Choices, Lengths
from firefly.run import Run
from firefly.runs.checkpoints import stored_choices
from firefly.setup.arguments import PAGED_ADAM
from firefly.tasks import TASKS

ADAM_BYTES = 8
"""State of AdamW a trained number: two moments in fp32."""

TORCHAO_BITS = {"adamw_torch_8bit": 8, "adamw_torch_4bit": 4}
"""Optimizers that cannot step without numbers; each block of 256 moments has a scale in fp32."""


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """A model, loaded or on "meta", and a device: how a run of it would be tuned, and its memory.

    Attributes:
        model: adapters attached, our forwards installed.
        activations: None where they cannot be known (see `NoDryRun`).
        optimizer: bytes of its state.
        crossover: see `probe_cache.cached_crossover`.
        available: bytes that the device has free.
    """

    config: Config
    model: Any
    compute: torch.dtype
    device: torch.device
    counts: ExampleCounts
    activations: Activations | None
    optimizer: int
    crossover: int
    available: int
    backend: Backend = BACKENDS["single"]

    @cached_property
    def cacheable(self) -> list[int]:
        """Bytes of a 16-bit copy of each 4-bit weight."""
        return cache_sizes(transformers_model(self.model), self.compute)

    @cached_property
    def lengths(self) -> Lengths:
        largest = np.sort(self.counts.lengths)[::-1][: self.config.step.examples_per_rank]
        return Lengths(longest=int(largest[0]), step=int(largest.sum()))

    @cached_property
    def reference(self) -> int:
        """Bytes of the model (full), or of the adapter, that training starts from and goes on being compared with."""
        if not TASKS[self.config.task_type].asks_reference(self.config):
            return 0
        if self.config.adapter.mode == "full":
            return sum(p.numel() for p in self.model.parameters()) * self.compute.itemsize
        trained = sum(4 * p.numel() for p in self.model.parameters() if p.requires_grad)
        return trained if self.config.adapter.name_or_path else 0

    def forecast(self, peak: Peak, cache: int) -> Forecast:
        """The run's memory with this peak of a step, and `cache` bytes of copies of 4-bit weights."""
        by_onednn, counts = self.device.type == "cpu" and self.compute.itemsize == 2, self.counts
        primitives = primitives_kept(int(counts.lengths.sum()), int(counts.segments.sum()))
        return self.backend.share(
            forecast_memory(
                self.model,
                self.device,
                peak,
                optimizer=self.optimizer,
                cache=cache,
                reference=self.reference,
                primitives=primitives if by_onednn else 0,
                available=self.available,
            )
        )

    def estimate(self, checkpointing: Checkpointing, tokens: int, cache: int) -> Forecast:
        """The forecast with the peak that a microbatch of so many tokens is estimated to have."""
        assert self.activations is not None
        model, size = transformers_model(self.model), self.compute.itemsize
        peak = estimated_peak(model, self.device, self.activations, checkpointing, tokens, size)
        return self.forecast(peak, cache)

    def choose(self) -> Choices:
        """What a run chooses where the configuration leaves it open."""
        assert self.activations is not None
        return tuning.choose(
            self.config.step,
            self.activations,
            self.estimate,
            self.lengths,
            self.device,
            self.cacheable,
            self.crossover,
            self.compute,
        )


def resolve_choices(
    run: Run, args: TrainingArguments, module: Any, probes: Probes, layout: str
) -> tuple[Choices, Forecast]:
    """Tune what is "auto", by measurement or from the checkpoint, and forecast the memory of the run.

    The same on every rank: the most conservative choice of any. The forecast is `firefly plan`'s, but for what
    a step takes besides weights: that is estimated from what a pass was measured to keep.
    """
    config, device, precision, backend = run.config, run.device, run.precision, run.backend
    inner, counts = transformers_model(module), run.data.train.counts
    crossover = cached_crossover(inner, device, precision.compute)
    use_crossover(inner, crossover)  # what attention keeps is measured below
    sizing = Sizing(
        config=config,
        model=module,
        compute=precision.compute,
        device=device,
        counts=counts,
        activations=probes.activations(
            config.adapter, layout, autocast_type(config, precision.compute), int(counts.sides.max())
        ),
        optimizer=optimizer_state_bytes(module, args),
        crossover=crossover,
        available=free_memory(device),
        backend=backend,
    )
    choices, lengths = sizing.choose(), sizing.lengths

    def forecast(choices: Choices) -> Forecast:
        tokens = lengths.largest_microbatch(choices.tokens_per_microbatch)
        return sizing.estimate(choices.checkpointing, tokens, sum(sizing.cacheable[: choices.cached_weights]))

    if args.optim in PAGED_ADAM and device.type == "cuda" and not (backend.deepspeed or backend.shards):
        choices = replace(choices, unpaged_optimizer=tuning.fits(forecast(choices)))
    choices = tuning.agree_on_tuning(ranks.all_of(choices))
    if run.checkpoint:
        choices = tuning.restore_tuning(config.step, stored_choices(run.checkpoint), choices)
    return choices, forecast(choices)


def autocast_type(config: Config, compute: torch.dtype) -> torch.dtype | None:
    """The type that full fine-tuning computes in beside fp32 weights; None without autocast."""
    return compute if config.adapter.mode == "full" and compute != torch.float32 else None


# ---- the optimizer's state ----


def optimizer_state_bytes(module: Any, args: Any) -> int:
    """Bytes that the optimizer keeps for what `module` trains, counted once (`count_optimizer_state`); where that
    fails, AdamW's, and a notice.

    Args:
        args: `TrainingArguments`, or what has the same names.
    """
    name = str(getattr(args.optim, "value", args.optim))
    rests_on = [name, args.optim_args, args.optim_target_modules]
    try:
        inner = transformers_model(module)
        return cached_bytes("optimizer", inner, rests_on, lambda: count_optimizer_state(module, args, name))
    except Exception as error:  # whatever a package's optimizer raises where there are no numbers
        notice(
            "optim.state_unknown",
            "optim {name}: what it keeps cannot be counted ({problem}); the memory forecast takes it for AdamW's "
            "{bytes} bytes a trained number.",
            name=name,
            problem=first_line(error),
            bytes=ADAM_BYTES,
        )
        return ADAM_BYTES * sum(p.numel() for p in module.parameters() if p.requires_grad)


def count_optimizer_state(module: Any, args: Any, name: str) -> int:
    """Make the optimizer's first step on arrays without numbers, and count the bytes that it then holds."""
    if name in TORCHAO_BITS:
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        return int(2 * trained * (TORCHAO_BITS[name] / 8 + 4 / 256))
    with without_numbers(module) as (fake, parameters):
        optimizer = create_optimizer(module, args)
        if hasattr(optimizer, "update_step"):  # bitsandbytes: its kernels read arrays at their addresses
            optimizer.update_step = lambda *_: None
            optimizer.is_paged = False
        if hasattr(optimizer, "train"):  # schedule-free
            optimizer.train()
        with fake, _AnyNumber():
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()
        # GrokAdamW keeps its state in the groups.
        groups = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
        storages = [tensor.untyped_storage() for tensor in _tensors([optimizer.state, groups])]
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


class _AnyNumber(TorchDispatchMode):
    """`.item()` of a fake tensor returns 1: no state's size depends on it."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        return function(*args, **(kwargs or {}))


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in an optimizer's state: in mappings, lists, and objects such as GaLore's projectors."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for part in value.values() for tensor in _tensors(part)]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return _tensors(vars(value)) if hasattr(value, "__dict__") and not callable(value) else []
