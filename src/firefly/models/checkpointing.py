"""Which decoder layers are computed again in backward instead of being kept (Chen et al., arXiv:1604.06174).

What is cheap to compute again is never kept in the first place: activations and norms, by `kernels`. Beyond that whole
layers go, the first ones first: when one of them is computed again, all later layers have given their memory back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from transformers.modeling_layers import GradientCheckpointingLayer

from firefly.errors import UsageError
from firefly.models.attention import short_row
from firefly.models.kernels.expert_linear import is_known
from firefly.models.kernels.gated_mlp import UNREAD, fused_blocks
from firefly.models.kernels.second_pass import checkpoint_anywhere, checkpoint_plainly
from firefly.models.probing import agree, attempt, first_call


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
        raise UsageError(
            "step.no_checkpointing",
            "gradient_checkpointing: {architecture} has no layers that can be recomputed. Set it to false.",
            architecture=type(model).__name__,
        )
    plain = plain_layers(model, layers[: chosen.layers])
    for number, layer in enumerate(layers):
        switched: Any = layer
        function = checkpoint_plainly if layer in plain else checkpoint_anywhere
        switched._gradient_checkpointing_func = partial(offloading, function) if chosen.offload else function
        switched.gradient_checkpointing = number < chosen.layers


def offloading(function: Any, *args: Any) -> Any:
    """Checkpoint one layer by `function`; its input waits in pinned memory of the CPU for the second pass."""
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return function(*args)


# ---- what a second pass need not do ----


def plain_layers(model: Any, layers: Sequence[nn.Module]) -> set[nn.Module]:
    """The layers that `checkpoint_plainly` is for: with one gated block, whose output a second pass need not compute.

    In most architectures it is only added to the residual stream, which no gradient needs. Whether a layer is like that
    is tried once for each kind: with NaN in the output's place, its gradients must be those of torch's own checkpoint.
    Where several ranks exchange gradients, engines look into a layer, and only torch's own way will do; so it is with
    experts, whose router's logits are read on the way and may have a loss of their own.
    """
    if not layers or (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return set()
    found: dict[Any, bool] = {}
    call = None
    plain = set()
    for layer in layers:
        inside = fused_blocks(layer)
        blocks = list(inside.values())
        sparse = any(map(is_known, layer.modules()))
        kind = type(layer), sparse, *((path, type(block)) for path, block in inside.items())
        if kind not in found:
            call = call or first_call(model, short_row(model), partial(_before, layers[0]))
            found[kind] = bool(call) and len(blocks) == 1 and not sparse and _is_plain(layer, blocks[0], call)
        for block in blocks:
            setattr(block, UNREAD, found[kind])
        if found[kind]:
            plain.add(layer)
    return plain


@contextmanager
def _before(layer: nn.Module, function: Callable[..., None]) -> Iterator[None]:
    """Call `function` before the layer, with what it is called with."""
    handle = layer.register_forward_pre_hook(lambda _, args, kwargs: function(*args, **kwargs), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _is_plain(layer: Any, block: nn.Module, call: tuple[Any, dict[str, Any]]) -> bool:
    own = layer.gradient_checkpointing
    layer.gradient_checkpointing = False

    def same_gradients() -> bool:
        setattr(block, UNREAD, False)
        expected = _gradients(checkpoint_anywhere, layer, call)
        setattr(block, UNREAD, True)
        found = _gradients(checkpoint_plainly, layer, call)
        computed = call[0][0].dtype  # gradients of fp32 adapters in a 16-bit layer are made of 16-bit products
        return all(agree(*pair, computed=computed) for pair in zip(found, expected, strict=True))

    try:
        return bool(attempt(same_gradients))  # a layer of another make, or without numbers, is not plain
    finally:
        layer.gradient_checkpointing = own


def _gradients(function: Any, layer: Any, call: tuple[Any, dict[str, Any]]) -> list[Tensor | None]:
    """Of the layer's input and of what it trains; those that are there stay."""
    (hidden, *args), kwargs = call
    hidden = hidden.detach().requires_grad_()
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    there = [parameter.grad for parameter in trained]
    try:
        for parameter in trained:
            parameter.grad = None
        with torch.random.fork_rng([hidden.device] if hidden.is_cuda else []), torch.enable_grad():
            out: Any = function(partial(layer, **kwargs), hidden, *args)
            out.float().square().sum().backward()
        return [hidden.grad, *(parameter.grad for parameter in trained)]
    finally:
        for parameter, gradient in zip(trained, there, strict=True):
            parameter.grad = gradient
