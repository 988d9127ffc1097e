"""Copies of 4-bit weights in the type that a run computes in, for as many layers as memory has room for.

A dequantised weight is exactly what every pass would compute anew, so nothing changes but time and memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from firefly.models.kernels.lora_linear import DENSE_COPY, dense, uses_dense


def cacheable_weights(model: nn.Module) -> Iterator[Any]:
    """The 4-bit weights of linear layers whose forward is ours, from the first layer to the last."""
    for module in model.modules():
        if uses_dense(module):
            yield module.get_base_layer().weight  # type: ignore[operator]


def cache_sizes(model: nn.Module, dtype: torch.dtype) -> list[int]:
    """Bytes that a copy of each of them takes."""
    return [weight.quant_state.shape.numel() * dtype.itemsize for weight in cacheable_weights(model)]


def weights_that_fit(sizes: list[int], room: int) -> int:
    """How many of the first copies fit into `room` bytes."""
    return sum(total <= room for total in accumulate(sizes))


def cache_weights(model: nn.Module, count: int, dtype: torch.dtype) -> None:
    """Keep a copy of the first `count` weights."""
    for _, weight in zip(range(count), cacheable_weights(model), strict=False):
        setattr(weight, DENSE_COPY, dense(weight, dtype))
