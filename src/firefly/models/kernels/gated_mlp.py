"""A gated feed-forward block as one autograd function: y = (φ(x Gᵀ) ∘ x Uᵀ) Dᵀ, with or without low-rank adapters.

Of the four arrays of (tokens, inner width) that its operations would save for backward, two are saved, the outputs of
G and U; the others are recomputed. On a CPU the rows go through in chunks that stay in the cache, so that the
activation and the products by element cost no trips to memory.

The idea of recomputing is that of Unsloth's and Liger's kernels (arXiv:2410.10989), in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firefly.models.kernels.dropout import BLOCK, Drawn, draw, drop, drop_drawing, dropped, probability, split
from firefly.models.kernels.elementwise import implementation
from firefly.models.kernels.lora_linear import dense, is_plain_lora
from firefly.models.kernels.matmul import graph_is_kept, in_type, scaled_matmul, wide_matmul
from firefly.models.kernels.target_device import device_kind
from firefly.models.precision import compute_type
from firefly.models.probing import agree, attempt, evaluating

CPU_ROWS = BLOCK
"""Rows of a chunk on a CPU: enough for matmuls at full rate."""

UNREAD = "firefly_unread"
"""Attribute of a block while its layer is recomputed and no gradient depends on its output (see `checkpointing`)."""

LAYERS = ("gate_proj", "up_proj", "down_proj")


class Weights(NamedTuple):
    """W of a linear layer, A and B of its adapter; or of each, whether its gradient is asked for."""

    w: Any
    a: Any = None
    b: Any = None


class Projection(NamedTuple):
    """How a linear layer without bias computes now: x Wᵀ, plus scale · (x Aᵀ) Bᵀ where an adapter is on, before which
    numbers of x are dropped with probability `chance`."""

    scale: float = 1.0
    chance: float = 0.0


class Block(NamedTuple):
    """What is constant in one call of the block. `unread`: nothing reads the output, which is filled with NaN."""

    activation: Activation
    grad_enabled: bool
    unread: bool
    gate: Projection
    up: Projection
    down: Projection

    def layers(self, weights: Sequence[Any], dtype: torch.dtype, needs: Sequence[bool] = (False,) * 9) -> list[_Layer]:
        """Gate, up and down, from the nine weights that autograd hands over."""
        each = zip((self.gate, self.up, self.down), _by_layer(weights), _by_layer(needs), strict=True)
        return [_Layer(projection, own, dtype, asked) for projection, own, asked in each]


def _by_layer(flat: Sequence[Any]) -> tuple[Weights, Weights, Weights]:
    gate_w, gate_a, gate_b, up_w, up_a, up_b, down_w, down_a, down_b = flat
    return Weights(gate_w, gate_a, gate_b), Weights(up_w, up_a, up_b), Weights(down_w, down_a, down_b)


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


def fused_blocks(module: nn.Module) -> dict[str, nn.Module]:
    """The gated blocks inside `module` that have the fused forward, by their paths."""
    return {path: one for path, one in module.named_modules() if "forward" in vars(one) and _has_layers(one)}


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
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.bfloat16)
        x = torch.linspace(-2, 2, 8 * width, device=parameter.device).sin().view(1, 8, width).to(dtype)
        with evaluating(module):  # an unknown block keeps its own forward
            both = attempt(lambda: (_forward_with(known[0])(module, x), type(module).forward(module, x)))
    return known[0] if both is not None and agree(*both, computed=x.dtype) else None


def _forward_with(activation: Activation) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        gate, up, down = (_current(getattr(self, name)) for name in LAYERS)
        if gate is None or up is None or down is None:
            return type(self).forward(self, x)
        unread = not torch.compiler.is_compiling() and vars(self).get(UNREAD, False)
        (gate_weights, gate), (up_weights, up), (down_weights, down) = gate, up, down
        block = Block(activation, torch.is_grad_enabled(), unread, gate, up, down)
        rows = x.to(compute_type(x))  # autocast's, which is off below
        with torch.autocast(x.device.type, enabled=False):
            return GatedMLP.apply(rows, block, *gate_weights, *up_weights, *down_weights)

    return forward


def _current(layer: Any) -> tuple[Weights, Projection] | None:
    """The layer as it stands; None if it needs its own forward (merged, several adapters, another kind of dropout)."""
    if not hasattr(layer, "lora_A"):
        return Weights(layer.weight), Projection()
    base = layer.get_base_layer()
    if layer.merged:
        return None
    if layer.disable_adapters:
        return Weights(base.weight), Projection()
    names = layer.active_adapters
    if len(names) != 1 or names[0] not in layer.lora_A:
        return None
    name = names[0]
    chance = probability(layer.lora_dropout[name])
    if chance is None:
        return None
    weights = Weights(base.weight, layer.lora_A[name].weight, layer.lora_B[name].weight)
    return weights, Projection(layer.scaling[name], chance)


# ---- the gate, φ(g) ∘ u, and its gradients ----


@dataclass(frozen=True)
class Activation:
    """φ, and the gradient of its argument from that of its value."""

    name: str
    value: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = (
    Activation("silu", F.silu, lambda grad, x: torch.ops.aten.silu_backward(grad, x)),
    Activation(
        "gelu_tanh",
        lambda x: F.gelu(x, approximate="tanh"),
        lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    ),
    Activation("gelu", F.gelu, lambda grad, x: torch.ops.aten.gelu_backward(grad, x)),
)


@dataclass(frozen=True)
class Gate:
    """By PyTorch's operations, or by one kernel of Liger's each way. g, u and all results: (rows, inner width) in the
    compute type."""

    activation: Activation
    liger: bool

    def forward(self, g: Tensor, u: Tensor) -> Tensor:
        """φ(g) ∘ u."""
        if self.liger:
            from firefly.models.kernels import liger

            return liger.gated(self.activation.name, g, u)
        return self.activation.value(g).mul_(u)

    def recomputed(self, g: Tensor, u: Tensor, product: bool) -> tuple[Tensor | None, Tensor | None]:
        """In backward: (φ(g) ∘ u if `product`, what `backward` is to be given as `value`)."""
        if self.liger:
            return (self.forward(g, u) if product else None), None
        value = self.activation.value(g)
        return (value * u if product else None), value

    def backward(self, g: Tensor, u: Tensor, grad: Tensor, value: Tensor | None, spend: bool) -> tuple[Tensor, Tensor]:
        """The gradients of g and u from `grad`, that of φ(g) ∘ u, which is overwritten.

        `spend`: g and u will not be read again, so their memory may be taken for the gradients.
        """
        if value is None:
            from firefly.models.kernels import liger

            return liger.gated_backward(self.activation.name, *((g, u) if spend else (g.clone(), u.clone())), grad)
        grad_u = value.mul_(grad)
        return self.activation.backward(grad.mul_(u), g), grad_u


def gate_for(activation: Activation, device: torch.device, width: int) -> Gate:
    """The implementation for arrays of `width` columns on `device`."""
    if implementation(device) != "liger":
        return Gate(activation, liger=False)
    from firefly.models.kernels import liger

    return Gate(activation, activation.name in liger.GATES and width <= liger.WIDEST)


class GatedMLP(torch.autograd.Function):
    """x: (…, width) in the compute type; weights: W, A and B of gate, up and down projection; returns (…, width)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Block, *weights: Any) -> Tensor:
        gate, up, down = layers = block.layers(weights, x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        shape = (*x.shape[:-1], down.outputs)
        # As in LoraLinear: what is returned may be changed in place, which a view may not.
        out = rows.new_full((), torch.nan).expand(shape) if block.unread else rows.new_empty(shape)
        flat = None if block.unread else out.view(-1, down.outputs)
        keep = block.grad_enabled and any(ctx.needs_input_grad)
        inner = [rows.new_empty(len(rows), gate.outputs) for _ in range(2)] if keep else [None, None]
        lows = [layer.empty_low(rows) if keep else None for layer in layers]
        chunks = _chunks(rows)
        if len(chunks) > 1:  # drawn for all rows in the order of the block's own layers, so that chunks change nothing
            for layer in layers:
                layer.drawn = draw((len(rows), layer.inputs), layer.chance, rows)
        gating = gate_for(block.activation, rows.device, gate.outputs)
        for part in chunks:
            low = [_part(each, part) for each in lows]
            g = gate.forward(rows[part], part, _part(inner[0], part), low[0])
            u = up.forward(rows[part], part, _part(inner[1], part), low[1])
            if flat is not None:
                down.forward(gating.forward(g, u), part, flat[part], low[2])
            elif low[2] is not None:
                down.lower(gating.forward(g, u), part, low[2])
        if keep:
            masks, ctx.seeds = zip(*(split(layer.drawn) for layer in layers), strict=True)
            ctx.save_for_backward(rows, *inner, *lows, *masks, *weights)
            ctx.gating, ctx.shape, ctx.block = gating, x.shape, block
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        rows, gated, lifted, *kept = ctx.saved_tensors
        gate_low, up_low, down_low, *kept = kept
        masks, weights = kept[:3], kept[3:]
        needs_x, _, *needs = ctx.needs_input_grad
        gate, up, down = layers = ctx.block.layers(weights, rows.dtype, needs)
        for layer, mask, seed in zip(layers, masks, ctx.seeds, strict=True):
            layer.drawn = seed if mask is None else mask
        grad = grad.reshape(-1, grad.shape[-1])
        grad_x = torch.empty_like(rows) if needs_x else None
        spend = not graph_is_kept()
        # A weight's gradient is cast to fp32 and added up once a product: of all rows, that is once.
        for part in _chunks(rows, whole=any(layer.needs.w for layer in layers)):
            g, u = gated[part], lifted[part]
            product, value = ctx.gating.recomputed(g, u, down.learns)
            grad_h = torch.empty_like(g)
            down.backward(grad[part], part, product, _part(down_low, part), grad_h)
            del product
            grad_g, grad_u = ctx.gating.backward(g, u, grad_h, value, spend)
            into = _part(grad_x, part)
            gate.backward(grad_g, part, rows[part], _part(gate_low, part), into)
            up.backward(grad_u, part, rows[part], _part(up_low, part), into, add=True)
        gradients = (*gate.gradients(), *up.gradients(), *down.gradients())
        return (None if grad_x is None else grad_x.view(ctx.shape), None, *gradients)


class _Layer:
    """One projection in the compute type, for the chunks of one pass; sums the gradients of what is trained of it."""

    def __init__(self, projection: Projection, weights: Weights, dtype: torch.dtype, needs: Weights) -> None:
        weight, a, b = weights
        self.outputs, self.inputs = getattr(weight, "quant_state", weight).shape
        self.weight, self.dtype = weight, dtype
        self.a = None if a is None else in_type(a, dtype)
        self.b = None if b is None else in_type(b, dtype)
        self.scale, self.chance = projection
        self.drawn: Drawn = None
        """What decides which numbers of the rows do not come into the adapter, of all chunks."""
        self.needs, self.learns = needs, any(needs)
        self.sums: list[Tensor | None] = [None, None, None]
        """Gradients of W, A and B in fp32."""

    @cached_property
    def w(self) -> Tensor:
        """The weight, dequantized only if it is used."""
        return dense(self.weight, self.dtype)

    def empty_low(self, rows: Tensor) -> Tensor | None:
        """Room for what the adapter makes of `rows` on its way: (rows, rank)."""
        return None if self.a is None else rows.new_empty(len(rows), len(self.a))

    def forward(self, rows: Tensor, part: slice, out: Tensor | None, low: Tensor | None) -> Tensor:
        """The layer's output for `rows`, the chunk `part`, written to `out` and `low` where given."""
        out = torch.mm(rows, self.w.T, out=out)
        if self.b is not None:
            out.addmm_(self.lower(rows, part, low), self.b.T)
        return out

    def lower(self, rows: Tensor, part: slice, low: Tensor | None) -> Tensor:
        """What the adapter makes of `rows` on its way."""
        assert self.a is not None
        if self.drawn is None:
            rows, self.drawn = drop_drawing(rows, self.chance)
        else:
            rows = drop(rows, self.dropped(len(rows), part), self.chance)
        return scaled_matmul(rows, self.a.T, self.scale, out=low)

    def dropped(self, count: int, part: slice) -> Tensor | None:
        """What dropout takes from the chunk `part`, of `count` rows, on its way into the adapter."""
        return dropped(self.drawn, ((part.start or 0) + count, self.inputs), self.chance, part)

    def backward(
        self,
        grad: Tensor,
        part: slice,
        rows: Tensor | None,
        low: Tensor | None,
        into: Tensor | None,
        add: bool = False,
    ) -> None:
        """Sum the gradients that `grad`, of the chunk `part`, gives; write the gradient of `rows` to `into`, or add it
        to what is there."""
        grad_low = None if self.b is None else scaled_matmul(grad, self.b, self.scale)
        away = self.dropped(len(grad), part)
        entering = drop(rows, away, self.chance) if rows is not None and self.needs.a else None
        for number, (left, right) in enumerate(((grad, rows), (grad_low, entering), (grad, low))):
            if self.needs[number] and left is not None and right is not None:
                self._add(number, left, right)
        if into is None:
            return
        if add:
            into.addmm_(grad, self.w)
        else:
            torch.mm(grad, self.w, out=into)
        if grad_low is None or self.a is None:
            return
        if away is None:
            into.addmm_(grad_low, self.a)
        else:
            into += drop(grad_low @ self.a, away, self.chance, spend=True)

    def _add(self, number: int, left: Tensor, right: Tensor) -> None:
        total = self.sums[number]
        if total is None:
            self.sums[number] = wide_matmul(left.T, right, torch.float32)
        elif total.dtype == left.dtype:
            total.addmm_(left.T, right)
        else:
            total += left.T @ right

    def gradients(self) -> list[Tensor | None]:
        """Of W, A and B; of no rows, 0."""
        shapes = self.weight.shape, *(None if x is None else x.shape for x in (self.a, self.b))
        for number, shape in enumerate(shapes):
            if self.sums[number] is None and self.needs[number] and shape is not None:
                self.sums[number] = torch.zeros(shape, dtype=torch.float32, device=self.weight.device)
        return self.sums


def _part(tensor: Tensor | None, part: slice) -> Tensor | None:
    return None if tensor is None else tensor[part]


def _chunks(rows: Tensor, whole: bool = False) -> list[slice]:
    if whole or torch.compiler.is_compiling():  # a loop would be compiled anew for every number of rows
        return [slice(None)]
    size = CPU_ROWS if device_kind(rows.device) == "cpu" else max(len(rows), 1)
    return [slice(start, start + size) for start in range(0, len(rows), size)]
