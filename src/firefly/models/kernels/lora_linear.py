"""A linear layer with a low-rank adapter as one autograd function: y = x Wᵀ + s (x Aᵀ) Bᵀ.

The adapter adds into the base product (no separate outputs, scalings and sums), computes in the base's type while A
and B stay fp32 masters, and a 4-bit base is dequantized where it is used, so its 16-bit copy is never kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from itertools import accumulate
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from firefly.models.kernels.dropout import drop, drop_drawing, dropped, probability, split
from firefly.models.kernels.matmul import in_type, scaled_matmul, wide_matmul
from firefly.models.precision import compute_type

DENSE_COPY = "firefly_dense_copy"
"""Attribute of a 4-bit weight: its copy in the compute type, where `cache_weights` keeps one."""


def install_lora_kernels(model: nn.Module) -> int:
    """Give every plain LoRA linear layer of `model` the fused forward; return how many got it.

    Variants (DoRA, LoRA bias, a trained bias, …) keep peft's own forward.
    """
    count = 0
    for module in model.modules():
        if is_plain_lora(module):
            module.forward = MethodType(_lora_forward, module)  # type: ignore[attr-defined]
            count += 1
    return count


def is_plain_lora(module: Any) -> bool:
    """Whether the layer is a linear one with one plain adapter."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer):
        return False
    base = module.get_base_layer()
    quantized = type(base).__name__ == "Linear4bit"
    if not (type(base) is nn.Linear or quantized) or len(module.lora_A) != 1:
        return False
    name = next(iter(module.lora_A))
    variant = getattr(module, "lora_variant", {}).get(name)
    dora = getattr(module, "use_dora", {}).get(name, False)
    trained_bias = base.bias is not None and base.bias.requires_grad
    return variant is None and not dora and module.lora_B[name].bias is None and not trained_bias


def uses_dense(module: Any) -> bool:
    """Whether the layer is one of ours on a 4-bit weight, which it dequantizes in every pass."""
    forward = vars(module).get("forward")
    return getattr(forward, "__func__", None) is _lora_forward and hasattr(
        module.get_base_layer().weight, "quant_state"
    )


def _lora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    names = self.active_adapters
    if self.disable_adapters and not (self.merged or args or kwargs):
        return _base_forward(self.get_base_layer(), x)
    if self.disable_adapters or self.merged or len(names) != 1 or names[0] not in self.lora_A or args or kwargs:
        return type(self).forward(self, x, *args, **kwargs)
    name = names[0]
    chance = probability(self.lora_dropout[name])
    if chance is None:
        return type(self).forward(self, x)
    base = self.get_base_layer()
    adapter = self.lora_A[name].weight, self.lora_B[name].weight
    dtype = compute_type(x)
    with torch.autocast(x.device.type, enabled=False):
        return LoraLinear.apply(x.to(dtype), base.weight, base.bias, *adapter, self.scaling[name], chance)


def _base_forward(base: Any, x: Tensor) -> Tensor:
    """The layer without its adapter, computed exactly as beside one: a reference must not differ by rounding."""
    dtype = compute_type(x)
    with torch.autocast(x.device.type, enabled=False):
        rows, weight = x.to(dtype).reshape(-1, x.shape[-1]), dense(base.weight, dtype)
        out = rows @ weight.T if base.bias is None else torch.addmm(base.bias.to(dtype), rows, weight.T)
        return out.view(*x.shape[:-1], out.shape[-1])


def install_frozen_forward(layer: Any) -> None:
    """Let a 4-bit layer without an adapter dequantize its weight as `dense` does."""
    layer.forward = MethodType(_frozen_forward, layer)


def _frozen_forward(self: Any, x: Tensor) -> Tensor:
    dtype = compute_type(x)
    a, b = x.new_empty(0, self.in_features), x.new_empty(self.out_features, 0)  # an adapter of rank 0
    with torch.autocast(x.device.type, enabled=False):
        return LoraLinear.apply(x.to(dtype), self.weight, self.bias, a, b, 1.0)


class LoraLinear(torch.autograd.Function):
    """x: (…, in); chance: the probability of dropout before the adapter; returns (…, out) in x's type."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        chance: float = 0.0,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        through, drawn = drop_drawing(rows, chance)
        w, a16, b16 = dense(weight, x.dtype), in_type(a, x.dtype), in_type(b, x.dtype)
        # What a custom function returns may be changed in place unless it is a view, as Gemma3n and Llama4 do with it.
        out = x.new_empty(*x.shape[:-1], len(w))
        flat = out.view(-1, len(w))
        if bias is None:
            torch.mm(rows, w.T, out=flat)
        else:
            torch.addmm(bias.to(x.dtype), rows, w.T, out=flat)
        low = scaled_matmul(through, a16.T, scale)
        flat.addmm_(low, b16.T)
        mask, ctx.seed = split(drawn)
        ctx.save_for_backward(rows, mask, weight, a16, b16, low)
        ctx.scale, ctx.chance, ctx.shape, ctx.types = scale, chance, x.shape, (a.dtype, b.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, mask, weight, a16, b16, low = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_low = scaled_matmul(grad, b16, ctx.scale)
        away = dropped(ctx.seed if mask is None else mask, rows.shape, ctx.chance)
        grad_a = wide_matmul(grad_low.T, drop(rows, away, ctx.chance), ctx.types[0])
        grad_b = wide_matmul(grad.T, low, ctx.types[1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dense(weight, grad.dtype)
            if away is None:
                grad_x.addmm_(grad_low, a16)
            else:
                grad_x += drop(grad_low @ a16, away, ctx.chance, spend=True)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None, None


def dense(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A frozen weight as a matrix of `dtype`: itself, or an NF4 weight dequantized for this one use."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.to(dtype)
    kept = getattr(weight, DENSE_COPY, None)
    if kept is not None and kept.dtype == dtype:
        return kept
    from bitsandbytes.functional import dequantize_4bit

    if weight.device.type == "cpu" and state.shape[-1] % state.blocksize:
        # bitsandbytes 0.50 mixes up the scales of blocks that cross a row's end on CPUs with AVX-512.
        flat = copy(state)
        flat.shape = torch.Size([state.shape.numel()])
        return dequantize_4bit(weight.data.view(-1, 1), flat).to(dtype).view(state.shape)
    return dequantize_4bit(weight.data, state).to(dtype)


# ---- copies of 4-bit weights in the compute type, for as many layers as memory has room for ----
# A cached copy is exactly what every pass would dequantize, so only time and memory change.


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
