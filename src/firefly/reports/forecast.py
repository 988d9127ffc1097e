"""Memory before the run, by formula: weights, trainable masters, gradients, optimiser, activations, head."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from firefly.models.kernels.gated_mlp import recomputes_products
from firefly.models.kernels.rms_norm import keeps_inputs_alone
from firefly.models.kernels.token_nll import LOGITS_PER_CHUNK
from firefly.runs.memory import read_proc

# Budgets of `tokens_per_microbatch: auto`. A CPU's matrix products reach their rate with a few hundred rows; a GPU's
# with some thousands, and NF4 weights are dequantised once per microbatch.
CPU_BUDGET = 512
GPU_BUDGET = 16384
USABLE = 0.8
"""Share of the free memory that a forecast may fill."""


@dataclass(frozen=True)
class Forecast:
    """Bytes by part, and what the device has free now."""

    parts: dict[str, int]
    available: int
    bytes_per_token: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def forecast_memory(
    model: Any, device: torch.device, tokens: int, checkpointing: bool, optimizer_bytes: int = 8
) -> Forecast:
    """Forecast the peak of a training step on `model` (adapters attached) with `tokens` in a microbatch.

    Args:
        optimizer_bytes: state per trained number: 8 for fp32 Adam, 2 for 8-bit Adam, 4 for SGD with momentum.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    per_token = activation_bytes(model, checkpointing)
    parts = {
        "weights": weights,
        "masters": 4 * trained,
        "gradients": 4 * trained,
        "optimizer": optimizer_bytes * trained,
        "activations": per_token * tokens,
        "head": 8 * LOGITS_PER_CHUNK,
    }
    return Forecast(parts, free_memory(device), per_token)


def activation_bytes(model: Any, checkpointing: bool) -> int:
    """Bytes kept per token between forward and backward.

    A decoder layer of width h and inner width i keeps, in the compute type, the inputs of its linear layers, queries,
    keys, values and the attention's output (about 8 h), gate and up (2 i) and the inputs of its two norms (2 h). Where
    a model keeps its own forwards, the products of gate and up (2 i) come on top, and the norms keep 4 h in fp32. With
    checkpointing each layer keeps its input alone, and one layer at a time all of it.
    """
    config = model.config.get_text_config()
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    layers = config.num_hidden_layers
    size = 4 if _compute_type(model) == torch.float32 else 2
    layer = size * (8 * width + (2 if recomputes_products(model) else 4) * inner)
    layer += 2 * size * width if keeps_inputs_alone(model) else 4 * 4 * width
    if checkpointing:
        return layers * size * width + layer
    return layers * layer


def _compute_type(model: Any) -> torch.dtype:
    floating = [p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    return floating[0] if floating else torch.float32


def free_memory(device: torch.device) -> int:
    """Bytes that a run could still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if (available := read_proc("/proc/meminfo", "MemAvailable")) is not None:
        return available
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def choose_budget(model: Any, device: torch.device, longest: int, checkpointing: bool) -> int:
    """`tokens_per_microbatch: auto`: as much as is of use, never less than the longest example, within free memory."""
    useful = CPU_BUDGET if device.type == "cpu" else GPU_BUDGET
    empty = forecast_memory(model, device, 0, checkpointing)
    loaded = 0 if device.type == "cpu" else empty.parts["weights"]  # a GPU's free memory is counted without them
    room = USABLE * empty.available - (empty.total - loaded if device.type == "cuda" else empty.total)
    return max(longest, min(useful, int(room / empty.bytes_per_token)))


def choose_checkpointing(model: Any, device: torch.device, longest: int) -> bool:
    """`gradient_checkpointing: auto`: only when the longest example would not fit without it."""
    forecast = forecast_memory(model, device, longest, checkpointing=False)
    loaded = forecast.parts["weights"] if device.type == "cuda" else 0
    return forecast.total - loaded > USABLE * forecast.available
