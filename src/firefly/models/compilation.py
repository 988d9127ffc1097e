"""`torch_compile: true`: the decoder layers are compiled, each by itself, once for steps of any packing.

What a step is made of never reaches the compiler: segments, other numbers in every batch, travel in an object whose
inside it does not look at, and attention, which reads them, runs as it is between the compiled parts of a layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from transformers import AttentionInterface

from firefly.errors import UsageError
from firefly.models.adapters import transformers_model
from firefly.models.attention import segment_attention, segmented
from firefly.models.checkpointing import decoder_layers
from firefly.models.probing import decoder
from firefly.segments import Segment

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
OLDEST = (2, 13)
"""With torch 2.11 the gradients of adapters in compiled layers are silently wrong; 2.12 was not tried."""

NAME = "firefly_segments_uncompiled"
"""Of the attention function in transformers' registry, as compiled layers call it."""

VARIANTS = 32
"""Of one function: with and without gradients, in training and evaluation, the adapter on and off. torch stops at 8."""


@dataclass(frozen=True, eq=False)
class Sealed:
    """Segments on their way through compiled code."""

    segments: tuple[Segment, ...]


def compile_layers(model: Any, backend: str | None = None, mode: str | None = None) -> int:
    """Compile the decoder layers of a prepared model, for any number of tokens; return how many.

    Weights, their names and the module tree stay as they are. Whatever torch cannot compile runs uncompiled.

    Args:
        backend, mode: of `torch.compile`; None leaves it its own choice.

    Raises:
        UsageError: this torch would compile wrong gradients.
    """
    if TORCH < OLDEST:
        raise UsageError(
            "compile.old_torch",
            "torch_compile needs torch {oldest} or newer: compiled by torch {version}, gradients of adapters are "
            "wrong. Remove the key, or update torch.",
            version=torch.__version__,
            oldest=".".join(map(str, OLDEST)),
        )
    layers: list[Any] = decoder_layers(decoder(transformers_model(model)))
    if not layers:
        return 0
    if (used := segmented(transformers_model(model))) is not None:
        AttentionInterface.register(NAME, torch.compiler.disable(_attend_sealed))
        for module in used.own:
            module.config._attn_implementation = NAME  # type: ignore[union-attr]
    compiler: Any = torch.compile  # torch 2.13 leaves recompile_limit out of the types it declares
    for layer in layers:
        own = MethodType(inspect.unwrap(type(layer).forward), layer)  # without the checkpoint around it
        compiled = compiler(own, dynamic=True, backend=backend or "inductor", mode=mode, recompile_limit=VARIANTS)
        layer.forward = MethodType(_forward_with(own, compiled), layer)  # type: ignore[method-assign]
    return len(layers)


def _forward_with(own: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, segments: tuple[Segment, ...] | None = None, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not None or "cache" in kwargs:  # a token at a time, as in `generate`
            return own(*args, **kwargs)
        if segments is not None:
            kwargs["segments"] = Sealed(segments)
        if self.gradient_checkpointing and self.training:  # around compiled code: a checkpoint within is not compiled
            return self._gradient_checkpointing_func(partial(compiled, **kwargs), *args)
        return compiled(*args, **kwargs)

    return forward


def _attend_sealed(*args: Any, segments: Sealed | tuple[Segment, ...] | None = None, **kwargs: Any) -> Any:
    return segment_attention(*args, segments=segments.segments if isinstance(segments, Sealed) else segments, **kwargs)
