"""Activation checkpointing: which decoder layers are recomputed in backward (Chen et al., arXiv:1604.06174).

What is cheap to recompute is never stored in the first place: activation functions and norms, by `kernels`. Beyond that
whole layers are checkpointed, the first ones first: when one is recomputed, all later layers have freed their memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from firefly.errors import UsageError
from firefly.models.attention import short_row
from firefly.models.kernels.expert_linear import is_known
from firefly.models.kernels.gated_mlp import UNREAD, fused_blocks
from firefly.models.probing import agree, attempt, first_call


@dataclass(frozen=True)
class Checkpointing:
    """The first `layers` decoder layers store only their input; with `offload` in CPU memory."""

    layers: int = 0
    offload: bool = False


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of `model` that can be checkpointed, from the first to the last."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def text_layers(model: Any) -> list[nn.Module]:
    """Of these the ones that text passes through: without those of towers for images or sound."""
    layers: list[nn.Module] = []
    with suppress(Exception):  # a model's own code may have no decoder, or look for it in vain
        layers = decoder_layers(model.get_decoder())
    return layers or decoder_layers(model)


def install_checkpointing(model: Any, chosen: Checkpointing) -> None:
    """Checkpoint exactly the chosen layers of `model` (a transformers model).

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
        function = partial(recompute_plain_layer, plain[layer]) if layer in plain else checkpoint_anywhere
        switched._gradient_checkpointing_func = partial(offloading, function) if chosen.offload else function
        switched.gradient_checkpointing = number < chosen.layers


def offloading(function: Any, *args: Any) -> Any:
    """Checkpoint one layer by `function`; its input is kept in pinned CPU memory until it is recomputed."""
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return function(*args)


# ---- a layer that is recomputed ----


def checkpoint_anywhere(function: Any, *args: Any) -> Any:
    """torch's checkpoint of one layer, which works with every backend and every kind of layer.

    Not reentrant: inputs without a gradient are fine, and random state is restored for the recomputation.
    """
    return checkpoint(function, *args, use_reentrant=False)


def recompute_plain_layer(block: nn.Module, function: Any, hidden: Tensor, *args: Any) -> Any:
    """The same for a layer whose only differentiable input is `hidden`, at a quarter of the Python overhead.

    torch's checkpoint calls hooks for each tensor that any operation saves. Here the layer is one autograd function
    that saves its input. Whatever does not fit uses torch's checkpoint.

    Args:
        block: the gated block of the layer, whose output is not recomputed.
    """
    if torch.is_autocast_enabled(hidden.device.type) or _learns(args) or _learns(getattr(function, "keywords", {})):
        return checkpoint(function, hidden, *args, use_reentrant=False, context_fn=partial(_both_passes, block))
    if not hidden.requires_grad:  # the first layer's: its own weights need the pass all the same
        hidden = hidden.detach().requires_grad_()
    return _Layer.apply(hidden, lambda hidden: function(hidden, *args), block)


@contextmanager
def _recomputing(block: nn.Module) -> Iterator[None]:
    """Within the block, the gated block's output is not computed: nothing reads it."""
    setattr(block, UNREAD, True)
    try:
        yield
    finally:
        setattr(block, UNREAD, False)


def _both_passes(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of a layer's forward pass and its recomputation, as `torch.utils.checkpoint` takes them."""
    return nullcontext(), _recomputing(block)


def _learns(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, dict):
        return any(_learns(each) for each in value.values())
    return isinstance(value, list | tuple) and any(_learns(each) for each in value)


class _Layer(torch.autograd.Function):
    """A layer as one operation: hidden → its output, weights that it trains inside."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, run: Any, block: nn.Module) -> Tensor:
        ctx.run, ctx.block, ctx.random = run, block, RandomState(hidden.device)
        ctx.save_for_backward(hidden)
        return run(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        (kept,) = ctx.saved_tensors
        hidden = kept.detach().requires_grad_()
        now = RandomState(hidden.device)
        ctx.random.restore()
        with torch.enable_grad(), _recomputing(ctx.block):
            out = ctx.run(hidden)
        now.restore()
        torch.autograd.backward(out, grad)
        return hidden.grad, None, None


class RandomState:
    """The random states of torch on a device, to draw the same numbers again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu: Tensor = torch.get_rng_state()
        self.gpu: Tensor | None = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, self.device)


# ---- what need not be recomputed ----


def plain_layers(model: Any, layers: Sequence[nn.Module]) -> dict[nn.Module, nn.Module]:
    """The layers that `recompute_plain_layer` is for, each with its gated block, whose output need not be recomputed.

    In most architectures it is only added to the residual stream, which no gradient needs. That is probed once for each
    kind of layer: with NaN as the block's output, gradients must equal those of torch's checkpoint. With several ranks,
    backends hook into layers, and only torch's checkpoint will do; so too with experts, whose router logits are
    recorded during the pass and may have a loss of their own.
    """
    if not layers or (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return {}
    found: dict[Any, bool] = {}
    call = None
    plain = {}
    for layer in layers:
        inside = fused_blocks(layer)
        blocks = list(inside.values())
        sparse = any(map(is_known, layer.modules()))
        kind = type(layer), sparse, *((path, type(block)) for path, block in inside.items())
        if kind not in found:
            call = call or first_call(model, short_row(model), partial(_before, layers[0]))
            found[kind] = bool(call) and len(blocks) == 1 and not sparse and _is_plain(layer, blocks[0], call)
        if found[kind]:
            plain[layer] = blocks[0]
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
        expected = _gradients(checkpoint_anywhere, layer, call)
        found = _gradients(partial(recompute_plain_layer, block), layer, call)
        computed = call[0][0].dtype  # gradients of fp32 adapters in a 16-bit layer are made of 16-bit products
        return all(agree(*pair, computed=computed) for pair in zip(found, expected, strict=True))

    try:
        return bool(attempt(same_gradients))  # an unknown layer, or one without values, is not plain
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
