"""What is trained beside low-rank adapters: whole modules, biases, and single rows of an embedding or a head.

fp32 masters compute in the frozen model's type. For rows of tokens that were added to a frozen model peft writes them
into a copy of the whole matrix in every pass, whose gradient is as large again, and leaves out the head's bias. Here
the frozen layer answers first, and the trained tokens' part of its answer is replaced.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


def install_saved_modules(model: nn.Module) -> int:
    """Let every copy that peft's `modules_to_save` trains compute in its original's type; return how many there are.

    A master in fp32 keeps small updates. Used as it is it would refuse 16-bit inputs (linear layers) or turn all that
    follows into fp32 (norms, embeddings).
    """
    from peft.utils.other import ModulesToSaveWrapper

    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    for wrapper in wrappers:
        wrapper._forward_wrapped = MethodType(_saved_module_forward, wrapper)
    return len(wrappers)


def _saved_module_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    module = self.modules_to_save[self.active_adapters[0]]
    original = dict(self.original_module.named_parameters())
    if all(p.dtype == original[name].dtype for name, p in module.named_parameters() if name in original):
        return module(*args, **kwargs)
    weights: dict[str, Tensor] = {
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


def install_token_rows(model: nn.Module) -> int:
    """Give every layer with trained token rows the forward below; return how many got it."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    layers = [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]
    for layer in layers:
        layer.forward = MethodType(_token_rows_forward, layer)
    return len(layers)


def _token_rows_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    names = self.active_adapters
    if self.disable_adapters or self.merged or len(names) != 1 or names[0] not in self.token_indices or args or kwargs:
        return type(self).forward(self, x, *args, **kwargs)
    base = self.base_layer
    out = base(x)
    ids = torch.as_tensor(self.token_indices[names[0]], device=x.device)
    rows = self.trainable_tokens_delta[names[0]].to(out.dtype)
    if isinstance(base, nn.Embedding):
        scale = self._get_embed_scale()  # Gemma 3 scales inside its embedding
        return replace_rows(x, out, ids, rows if scale is None else rows * scale.to(rows.dtype))
    bias = None if base.bias is None else base.bias[ids].to(out.dtype)
    return out.index_copy(-1, ids, F.linear(x.to(out.dtype), rows, bias))


def replace_rows(x: Tensor, out: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    """x: (…) token ids; out: (…, width) their embeddings; ids: (n,) and rows: (n, width), theirs instead."""
    order = torch.argsort(ids)
    place = torch.searchsorted(ids[order], x).clamp_max(len(ids) - 1)
    found = ids[order][place] == x
    return torch.where(found[..., None], F.embedding(order[place], rows), out)
