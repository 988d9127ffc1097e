"""Modules that are trained whole beside an adapter: fp32 masters that compute in the frozen model's type."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.func import functional_call


def install_saved_modules(model: nn.Module) -> int:
    """Let every copy that peft's `modules_to_save` trains compute in its original's type; return how many there are.

    A master in fp32 keeps small updates. Used as it is it would refuse 16-bit inputs (linear layers) or turn all that
    follows into fp32 (norms, embeddings).
    """
    from peft.utils.other import ModulesToSaveWrapper

    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    for wrapper in wrappers:
        wrapper._forward_wrapped = MethodType(_forward, wrapper)
    return len(wrappers)


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    module = self.modules_to_save[self.active_adapters[0]]
    original = dict(self.original_module.named_parameters())
    if all(p.dtype == original[name].dtype for name, p in module.named_parameters() if name in original):
        return module(*args, **kwargs)
    weights: dict[str, torch.Tensor] = {
        name: p.to(original[name].dtype) for name, p in module.named_parameters() if name in original
    }
    return functional_call(module, weights, args, kwargs)
