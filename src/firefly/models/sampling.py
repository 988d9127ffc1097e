"""Sampling from a model between two steps of its training, without a trace in what is trained."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from firefly.models.adapters import transformers_model
from firefly.models.causal_lm import CausalLM
from firefly.models.kernels.matmul import casts_kept


@contextmanager
def sampling(model: CausalLM) -> Iterator[Any]:
    """The transformers model inside `model` (PEFT's or itself), ready for `generate` and `generate_batch`.

    It computes what an untouched model with these weights would: in eval mode, so without dropout and recomputing, with
    its own attention and a key-value cache. Afterwards everything that training depends on is as before: the mode of
    each module, the attention implementation, the generation settings, gradients and all random states.
    """
    inner = transformers_model(model)
    modes = [(module, module.training) for module in model.modules()]
    attention, settings = str(inner.config._attn_implementation), inner.generation_config
    numbers = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    inner.generation_config = copy.deepcopy(settings)
    model.eval()
    try:
        with torch.no_grad(), casts_kept(p for p in model.parameters() if p.requires_grad):
            yield inner
    finally:
        for module, training in modes:
            module.training = training
        if inner.config._attn_implementation != attention:  # `generate_batch` may leave another, and it may have failed
            inner.set_attn_implementation(attention)
        inner.generation_config = settings
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])
        torch.set_rng_state(numbers[2])
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)
