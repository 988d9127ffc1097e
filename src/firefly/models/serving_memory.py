"""What serving a model takes of memory, by part: weights, adapters, keys and values of the tokens in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from firefly.config import ModelConfig
from firefly.models.experts import expert_stacks
from firefly.models.loading import quiet_libraries
from firefly.models.memory import bytes_of
from firefly.models.meta_model import empty_model

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a number in NF4 with its constants: a byte for each block of 64, and 4 for 256 of those (QLoRA's double
quantization)."""


def weight_bytes(described: Any, model: ModelConfig, dtype: torch.dtype, in_4_bits: bool = False) -> int:
    """Bytes of a model's weights as they are held for serving, from its configuration alone."""
    with quiet_libraries():
        made = empty_model(described, model, dtype, in_4_bits)
    experts = [getattr(module, name) for _, module, name in expert_stacks(made)] if in_4_bits else []
    stacked = {id(weight) for weight in experts}
    plain = sum(bytes_of(parameter) for parameter in made.parameters() if id(parameter) not in stacked)
    return plain + int(sum(weight.numel() for weight in experts) * NF4_BYTES)


FOR_WEIGHTS = 0.9
"""The part of a GPU that weights may take before they are laid over several: a cache has to fit beside them."""


def spread_over(needed: int, free: Sequence[int]) -> bool:
    """Whether weights of so many bytes have to be laid over several GPUs: there are several, and they do not fit the
    first.

    Args:
        free: bytes that each GPU has free.
    """
    return len(free) > 1 and needed > FOR_WEIGHTS * free[0]
