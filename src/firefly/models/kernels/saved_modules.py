"""What is trained whole beside an adapter, modules and biases: fp32 masters that compute in the frozen model's type."""

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


def install_trained_biases(model: nn.Module) -> int:
    """Let biases that an adapter trains (`bias: all`) compute in the type of the frozen weights beside them; return how
    many modules have some.

    bitsandbytes' 4-bit layers convert their bias for themselves.
    """
    count = 0
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        frozen = {p.dtype for p in own.values() if not p.requires_grad and p.is_floating_point()}
        trained = {name for name, p in own.items() if p.requires_grad and frozen and p.dtype not in frozen}
        if trained and "forward" not in vars(module):
            module.forward = MethodType(_forward_in_frozen_type, module)  # type: ignore[assignment]
            count += 1
    return count


def _forward_in_frozen_type(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    own = dict(self.named_parameters(recurse=False))
    dtype = next(p.dtype for p in own.values() if not p.requires_grad and p.is_floating_point())
    cast = {name: p.to(dtype) for name, p in own.items() if p.requires_grad}
    return functional_call(_AsClass(self), {f"inner.{name}": p for name, p in cast.items()}, args, kwargs)


class _AsClass(nn.Module):
    """Calls a module's own forward, whatever its instance was given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.inner).forward(self.inner, *args, **kwargs)
