"""A gated feed-forward block as one autograd function: y = (φ(x Gᵀ) ∘ x Uᵀ) Dᵀ, with or without low-rank adapters.

Of the four arrays of (tokens, inner width) that its operations would keep, two are kept, the products G and U make;
the others are computed again in backward. On a CPU the rows go through in chunks that stay in the cache, so that the
activation and the products by element cost no trips to memory.

The idea of recomputing is that of Unsloth's and Liger's kernels (arXiv:2410.10989), in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from firefly.models.kernels.dropout import add_dropped, draw_mask, drop, probability
from firefly.models.kernels.gate import ACTIVATIONS, Activation, gate_for, graph_is_kept
from firefly.models.kernels.lora_linear import compute_type, dense, is_plain_lora

CPU_ROWS = 512
"""Rows of a chunk on a CPU: enough for matrix products at their rate."""

LAYERS = ("gate_proj", "up_proj", "down_proj")


class Projection(NamedTuple):
    """What a linear layer without bias computes now: x Wᵀ, plus scale · (x Aᵀ) Bᵀ where an adapter is on, before which
    numbers of x are dropped with probability `dropped`."""

    weight: Tensor
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    dropped: float = 0.0


def install_gated_mlps(model: nn.Module) -> int:
    """Give the gated blocks of `model` the fused forward; return how many got it.

    A block qualifies if it has the three layers that Llama named so, without biases, a known activation, and gives the
    same output: that is tried once for each class and set of plain attributes (Gemma-3n's differ by layer).
    """
    found: dict[Any, Activation | None] = {}
    count = 0
    for module in model.modules():
        if "forward" in vars(module) or not _has_layers(module):
            continue
        plain = {name: value for name, value in vars(module).items() if isinstance(value, int | float | str)}
        kind = type(module), tuple(plain.items())
        if kind not in found:
            found[kind] = _same_output(module)
        activation = found[kind]
        if activation is not None and all(_is_bare(getattr(module, name)) for name in LAYERS):
            module.forward = MethodType(_forward_with(activation), module)  # type: ignore[assignment]
            count += 1
    return count


def _has_layers(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in LAYERS)


def _is_bare(layer: Any) -> bool:
    base = layer.get_base_layer() if is_plain_lora(layer) else layer
    return (type(base) is nn.Linear or type(base).__name__ == "Linear4bit") and base.bias is None


def _same_output(module: Any) -> Activation | None:
    """The activation with which the fused forward gives the block's own output, if there is one."""
    if not all(_is_bare(getattr(module, name)) for name in LAYERS) or not callable(getattr(module, "act_fn", None)):
        return None
    parameter = next(module.parameters())
    grid = torch.linspace(-6, 6, 97, device=parameter.device)
    with torch.no_grad():
        known = [phi for phi in ACTIVATIONS if torch.equal(phi.value(grid), module.act_fn(grid))]
        if not known:
            return None
        base: Any = module.gate_proj
        width = base.in_features
        x = torch.linspace(-2, 2, 8 * width, device=parameter.device).sin().view(1, 8, width).to(_input_type(module))
        was_training = module.training
        module.eval()
        try:
            expected = type(module).forward(module, x)
            given = _forward_with(known[0])(module, x)
        except Exception:  # a block of another make: it keeps its own forward
            return None
        finally:
            module.train(was_training)
    tolerance = 1e-4 if x.dtype == torch.float32 else 2e-2
    close = (expected.float() - given.float()).abs().max() <= tolerance * expected.float().abs().max()
    return known[0] if close else None


def _input_type(module: Any) -> torch.dtype:
    floating = [p.dtype for p in module.parameters() if p.is_floating_point()]
    return floating[0] if floating else torch.bfloat16


def _forward_with(activation: Activation) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        projections = [_current(getattr(self, name)) for name in LAYERS]
        if None in projections:
            return type(self).forward(self, x)
        dtype = compute_type(x)
        flat = [part for p in projections if p is not None for part in p]
        with torch.autocast(x.device.type, enabled=False):
            return GatedMLP.apply(x.to(dtype), activation, torch.is_grad_enabled(), *flat)

    return forward


def _current(layer: Any) -> Projection | None:
    """The layer as it stands; None if it needs its own forward (merged, several adapters, another kind of dropout)."""
    if not hasattr(layer, "lora_A"):
        return Projection(layer.weight)
    base = layer.get_base_layer()
    if layer.merged:
        return None
    if layer.disable_adapters:
        return Projection(base.weight)
    names = layer.active_adapters
    if len(names) != 1 or names[0] not in layer.lora_A:
        return None
    name = names[0]
    dropped = probability(layer.lora_dropout[name])
    if dropped is None:
        return None
    return Projection(base.weight, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], dropped)


class GatedMLP(torch.autograd.Function):
    """x: (…, width) in the compute type; then the parts of gate, up and down projection; returns (…, width)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation, grad_enabled: bool, *parts: Any) -> Tensor:
        projections = [Projection(*parts[i : i + 5]) for i in range(0, 15, 5)]
        gate, up, down = layers = [_Layer(p, x.dtype) for p in projections]
        rows = x.reshape(-1, x.shape[-1])
        out = rows.new_empty(len(rows), len(down.w))
        keep = grad_enabled and any(ctx.needs_input_grad)
        inner = [rows.new_empty(len(rows), len(gate.w)) for _ in range(2)] if keep else [None, None]
        lows = [layer.empty_low(rows) if keep else None for layer in layers]
        # Drawn for all rows in the order of the block's own layers, so that chunks change nothing.
        masks = [layer.draw_mask(len(rows)) for layer in layers]
        gating = gate_for(activation, rows.device, len(gate.w))
        for part in _chunks(rows):
            low, mask = ([_part(each, part) for each in of_all] for of_all in (lows, masks))
            g = gate.forward(rows[part], mask[0], _part(inner[0], part), low[0])
            u = up.forward(rows[part], mask[1], _part(inner[1], part), low[1])
            down.forward(gating.forward(g, u), mask[2], out[part], low[2])
        if keep:
            weights = [tensor for p in projections for tensor in p[:3]]
            ctx.save_for_backward(rows, *inner, *lows, *masks, *weights)
            ctx.gating, ctx.shape, ctx.constants = gating, x.shape, [p[3:] for p in projections]
        # As in LoraLinear: what is returned may be changed in place.
        return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        rows, gated, lifted, *rest = ctx.saved_tensors
        lows, masks, weights = rest[:3], rest[3:6], rest[6:]
        gate, up, down = layers = [
            _Layer(
                Projection(*weights[3 * i : 3 * i + 3], *ctx.constants[i]),
                rows.dtype,
                ctx.needs_input_grad[3 + 5 * i : 6 + 5 * i],
            )
            for i in range(3)
        ]
        grad = grad.reshape(-1, grad.shape[-1])
        grad_x = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        spend = not graph_is_kept()
        for part in _chunks(rows):
            low, mask = ([_part(each, part) for each in of_all] for of_all in (lows, masks))
            g, u = gated[part], lifted[part]
            product, value = ctx.gating.again(g, u, down.learns)
            grad_h = torch.empty_like(g)
            down.backward(grad[part], product, mask[2], low[2], grad_h)
            del product
            grad_g, grad_u = ctx.gating.backward(g, u, grad_h, value, spend)
            into = _part(grad_x, part)
            gate.backward(grad_g, rows[part], mask[0], low[0], into)
            up.backward(grad_u, rows[part], mask[1], low[1], into, add=True)
        gradients = [gradient for layer in layers for gradient in (*layer.gradients(), None, None)]
        return (None if grad_x is None else grad_x.view(ctx.shape), None, None, *gradients)


class _Layer:
    """One projection in the compute type, for the chunks of one pass; sums the gradients of what is trained of it."""

    def __init__(self, p: Projection, dtype: torch.dtype, needs: Sequence[bool] = (False, False, False)) -> None:
        self.w = dense(p.weight, dtype)
        self.a = None if p.a is None else p.a.to(dtype)
        self.b = None if p.b is None else (p.b * p.scale).to(dtype)
        self.scale, self.dropped = p.scale, p.dropped
        self.learns = any(needs)
        self.sums = [
            torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device)
            if need and tensor is not None
            else None
            for tensor, need in zip(p[:3], needs, strict=True)
        ]

    def empty_low(self, rows: Tensor) -> Tensor | None:
        """Room for what the adapter makes of `rows` on its way: (rows, rank)."""
        return None if self.a is None else rows.new_empty(len(rows), len(self.a))

    def draw_mask(self, count: int) -> Tensor | None:
        """What dropout leaves of `count` rows on their way into the adapter; None without dropout."""
        return draw_mask((count, self.w.shape[1]), self.dropped, self.w.device)

    def forward(self, rows: Tensor, mask: Tensor | None, out: Tensor | None, low: Tensor | None) -> Tensor:
        """The layer's output for `rows`, written to `out` and `low` where given."""
        out = torch.mm(rows, self.w.T, out=out)
        if self.a is not None and self.b is not None:
            out.addmm_(torch.mm(drop(rows, mask, self.dropped), self.a.T, out=low), self.b.T)
        return out

    def backward(
        self,
        grad: Tensor,
        rows: Tensor | None,
        mask: Tensor | None,
        low: Tensor | None,
        into: Tensor | None,
        add: bool = False,
    ) -> None:
        """Sum the gradients that `grad` gives; write the gradient of `rows` to `into`, or add it to what is there."""
        grad_low = None if self.b is None else grad @ self.b
        dropped = rows if rows is None or self.sums[1] is None else drop(rows, mask, self.dropped)
        for total, left, right in zip(self.sums, (grad, grad_low, grad), (rows, dropped, low), strict=True):
            if total is None or left is None or right is None:
                continue
            if total.dtype == left.dtype:
                total.addmm_(left.T, right)
            else:
                total += left.T @ right
        if into is None:
            return
        if add:
            into.addmm_(grad, self.w)
        else:
            torch.mm(grad, self.w, out=into)
        if grad_low is None or self.a is None:
            return
        if mask is None:
            into.addmm_(grad_low, self.a)
        else:
            add_dropped(into, grad_low @ self.a, mask, self.dropped)

    def gradients(self) -> list[Tensor | None]:
        """Of W, A and B."""
        if self.sums[2] is not None:
            self.sums[2] *= self.scale
        return self.sums


def _part(tensor: Tensor | None, part: slice) -> Tensor | None:
    return None if tensor is None else tensor[part]


def _chunks(rows: Tensor) -> list[slice]:
    if torch.compiler.is_compiling():  # a loop would be compiled anew for every number of rows
        return [slice(None)]
    size = CPU_ROWS if rows.device.type == "cpu" else max(len(rows), 1)
    return [slice(start, start + size) for start in range(0, len(rows), size)]
