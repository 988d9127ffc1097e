"""Which decoder layers are computed again in backward instead of being kept (Chen et al., arXiv:1604.06174).

What is cheap to compute again is never kept in the first place: activations and norms, by `kernels`. Beyond that whole
layers go, the first ones first: when one of them is computed again, all later layers have given their memory back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from firefly.errors import UsageError


@dataclass(frozen=True)
class Checkpointing:
    """The first `layers` decoder layers keep their input alone; with `offload` that waits in the CPU's memory."""

    layers: int = 0
    offload: bool = False


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of `model` that can be checkpointed, from the first to the last."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def install_checkpointing(model: Any, chosen: Checkpointing) -> None:
    """Let exactly the chosen layers of `model` (a transformers model) compute again in backward.

    Raises:
        UsageError: layers are to be checkpointed and the architecture has none that can be.
    """
    layers = decoder_layers(model)
    if chosen.layers and not layers:
        raise UsageError("step.no_checkpointing", architecture=type(model).__name__)
    # Not reentrant: inputs without a gradient are fine, and random state is restored for the second pass.
    function: Any = partial(checkpoint, use_reentrant=False)
    if chosen.offload:
        function = offloading_checkpoint
    for number, layer in enumerate(layers):
        switched: Any = layer
        switched._gradient_checkpointing_func = function
        switched.gradient_checkpointing = number < chosen.layers


def offloading_checkpoint(function: Any, *args: Any) -> Any:
    """Checkpoint one layer; its input waits in pinned memory of the CPU for the second pass."""
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(function, *args, use_reentrant=False)
