"""Which decoder layers are computed again in backward instead of being kept (Chen et al., arXiv:1604.06174).

What is cheap to compute again is never kept in the first place: activations and norms, by `kernels`. Beyond that whole
layers go, the first ones first: when one of them is computed again, all later layers have given their memory back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from firefly.errors import UsageError
from firefly.models.attention import decoder, short_row
from firefly.models.kernels.gated_mlp import UNREAD, fused_blocks
from firefly.models.kernels.second_pass import both_passes


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
    if chosen.layers:
        spare_unread_outputs(model, layers[: chosen.layers])
    # Not reentrant: inputs without a gradient are fine, and random state is restored for the second pass.
    function: Any = partial(checkpoint, use_reentrant=False, context_fn=both_passes)
    if chosen.offload:
        function = offloading_checkpoint
    for number, layer in enumerate(layers):
        switched: Any = layer
        switched._gradient_checkpointing_func = function
        switched.gradient_checkpointing = number < chosen.layers


def offloading_checkpoint(function: Any, *args: Any) -> Any:
    """Checkpoint one layer; its input waits in pinned memory of the CPU for the second pass."""
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(function, *args, use_reentrant=False, context_fn=both_passes)


# ---- what a second pass need not compute ----


def spare_unread_outputs(model: Any, layers: Sequence[nn.Module]) -> None:
    """Mark the gated blocks of `layers` whose output a second pass need not compute.

    In most architectures it is only added to the residual stream, which no gradient needs. Whether that is so is tried
    once for each kind of layer: with NaN in the output's place, a gradient that needs it is none.
    """
    found: dict[Any, bool] = {}
    call = None
    for layer in layers:
        for path, block in fused_blocks(layer).items():
            kind = type(layer), path, type(block)
            if kind not in found:
                call = call or _first_call(model, layers[0])
                found[kind] = call is not None and _is_unread(layer, block, call)
            setattr(block, UNREAD, found[kind])


class _Met(Exception):
    """The first call has come; nothing after it is needed."""


def _first_call(model: Any, layer: nn.Module) -> tuple[Any, dict[str, Any]] | None:
    """What the model's first layer is called with for a short row."""
    met: list[Any] = []

    def stop(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        met.append((args, kwargs))
        raise _Met

    handle = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            decoder(model)(**short_row(model), use_cache=False)
    except Exception:  # a model that is called otherwise has met nothing
        pass
    finally:
        handle.remove()
    return met[0] if met else None


def _is_unread(layer: Any, block: nn.Module, call: tuple[Any, dict[str, Any]]) -> bool:
    (hidden, *args), kwargs = call
    hidden = hidden.detach().requires_grad_()
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    devices = [hidden.device] if hidden.device.type == "cuda" else []
    own = layer.gradient_checkpointing
    try:
        layer.gradient_checkpointing = False
        setattr(block, UNREAD, True)
        with torch.random.fork_rng(devices), torch.enable_grad():
            function = partial(layer, **kwargs)
            out: Any = checkpoint(function, hidden, *args, use_reentrant=False, context_fn=both_passes)
            out = out[0] if isinstance(out, tuple) else out
            gradients = torch.autograd.grad(out.float().sum(), [hidden, *trained], allow_unused=True)
    except Exception:  # a layer of another make: it is computed whole
        return False
    finally:
        layer.gradient_checkpointing = own
        setattr(block, UNREAD, False)
    return all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)
