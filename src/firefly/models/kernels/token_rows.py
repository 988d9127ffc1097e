"""Single trained rows of an embedding or a head, for tokens that were added to a frozen model.

peft writes the rows into a copy of the whole matrix in every pass, whose gradient is as large again, and leaves out
the head's bias. Here the frozen layer answers first, and the trained tokens' part of its answer is replaced.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def install_token_rows(model: nn.Module) -> int:
    """Give every layer with trained token rows the forward below; return how many got it."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    layers = [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    return len(layers)


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
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
