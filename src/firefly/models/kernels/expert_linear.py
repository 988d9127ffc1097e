"""Experts of a mixture under adapters and in NF4: each computes y = x Wᵀ + s (x Aᵀ) Bᵀ for the tokens routed to it.

transformers stacks the experts of a layer into 3-D parameters; peft adapts those by writing W + s·B·A for the whole
stack at every forward, and bitsandbytes leaves them in 16 bit. Here no such copy is made: the base is used in place,
or dequantized one expert at a time, once more in backward. Adapters are computed with as peft stores them.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from firefly.models.kernels.dropout import probability
from firefly.models.kernels.lora_linear import LoraLinear, dense
from firefly.models.precision import compute_type


class QuantizedExperts(nn.Parameter):
    """A stack of frozen weights in NF4, one row of packed bytes per expert; `shape` is that of the numbers it holds.

    peft takes an adapter's dimensions from `shape`, which for packed bytes would not even have three of them.
    """

    states: list[Any]
    stack: torch.Size
    transposed: bool

    def __new__(cls, packed: Tensor, states: list[Any], stack: torch.Size, transposed: bool) -> QuantizedExperts:
        self = torch.Tensor._make_subclass(cls, packed, False)
        self.states, self.stack, self.transposed = states, stack, transposed
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.stack

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedExperts:
        copied = type(self)(self.data.clone(), self.states, self.stack, self.transposed)
        memo[id(self)] = copied
        return copied

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor, transposed: bool) -> QuantizedExperts:
        """Quantize as QLoRA does linear layers (NF4, double quantization), each expert as a matrix (out, in)."""
        from bitsandbytes.functional import quantize_4bit

        rows: list[Tensor] = []
        states: list[Any] = []
        for matrix in weight.unbind(0):
            matrix = (matrix.T if transposed else matrix).contiguous()
            packed, state_ = quantize_4bit(matrix, quant_type="nf4", compress_statistics=True)
            state: Any = state_
            if states:  # the same tables for all: thousands of experts would hold thousands of copies
                state.code, state.state2.code = states[0].code, states[0].state2.code
            rows.append(packed.view(-1))
            states.append(state)
        return cls(torch.stack(rows), states, weight.shape, transposed)

    def matrices(self) -> list[Tensor]:
        """Each expert as `dense` reads it: packed bytes with a `quant_state`; nothing is dequantized yet."""
        views: list[Any] = [row.view(-1, 1) for row in self.data.unbind(0)]
        for view, state in zip(views, self.states, strict=True):
            if state.absmax.device != view.device:
                state.to(view.device)
            view.quant_state = state
        return views

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The stack that training saw, (experts, …) as it was before."""
        matrices = [dense(matrix, dtype) for matrix in self.matrices()]
        return torch.stack([matrix.T if self.transposed else matrix for matrix in matrices]).contiguous()


def is_known(module: nn.Module) -> bool:
    """Whether `module` is a stack of experts whose arithmetic transformers describes by its flags, so that we know it.

    Upstream: `transformers.integrations.moe.use_experts_implementation`, on every class it decorates.
    """
    module_: Any = module
    flags = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts", "down_proj")
    known = all(hasattr(module, flag) for flag in flags) and not getattr(module, "_is_expert_parallel", False)
    return known and hasattr(module, "gate_up_proj" if module_.has_gate else "up_proj")


def install_expert_kernels(model: nn.Module) -> list[str]:
    """Let peft's wrappers of known experts compute without a copy of the stack; return the wrappers left to peft."""
    from peft.tuners.lora.layer import ParamWrapper

    left = []
    for name, module in model.named_modules():
        if not isinstance(module, ParamWrapper) or isinstance(module.get_base_layer(), nn.Linear):
            continue
        if is_known(module.get_base_layer()):
            module.forward = MethodType(_wrapped_forward, module)  # type: ignore[method-assign]
        else:
            left.append(name)
    return left


def install_quantized_forward(experts: nn.Module) -> None:
    """Let experts in NF4 compute, without adapters."""
    experts.forward = MethodType(_bare_forward, experts)  # type: ignore[method-assign]


def _bare_forward(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return run_experts(self, {}, hidden, index, weights)


def _wrapped_forward(self: Any, hidden: Tensor, index: Tensor, weights: Tensor, **kwargs: Any) -> Tensor:
    """Of the outermost wrapper: peft nests one in another for each parameter of the same module."""
    wrappers, inner = [], self
    while hasattr(inner, "base_layer"):
        wrappers.append(inner)
        inner = inner.base_layer
    names = self.active_adapters
    merged = any(one.merged for one in wrappers)
    if self.disable_adapters and not (merged or kwargs):  # computed as beside adapters: see `lora_linear._base_forward`
        return run_experts(inner, {}, hidden, index, weights)
    plain = len(names) == 1 and all(names[0] in one.lora_A for one in wrappers) and not merged
    if self.disable_adapters or not plain or kwargs:
        return type(self).forward(self, hidden, index, weights, **kwargs)
    return run_experts(inner, {one.parameter_name: one for one in wrappers}, hidden, index, weights)


def run_experts(experts: Any, wrappers: dict[str, Any], hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """hidden: (tokens, width); index and weights: (tokens, choices), as the router gives them; (tokens, width) back."""
    dtype = compute_type(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        chosen, order = index.reshape(-1).sort(stable=True)
        counts = torch.bincount(chosen, minlength=experts.num_experts).tolist()
        parts = hidden.to(dtype)[order // index.shape[-1]].split(counts)
        hit = [number for number, count in enumerate(counts) if count]
        first = "gate_up_proj" if experts.has_gate else "up_proj"
        states = _linear(experts, first, wrappers.get(first), [parts[number] for number in hit], hit)
        states = [experts._apply_gate(x) if experts.has_gate else experts.act_fn(x) for x in states]
        out = torch.cat(_linear(experts, "down_proj", wrappers.get("down_proj"), states, hit))
        if getattr(experts, "has_post_expert_norm", False):
            out = experts.post_expert_norm(out)
        out = (out * weights.reshape(-1)[order, None])[order.argsort()]
        # A sum over a dimension, not index_add_: the latter's order of additions on a GPU is not fixed.
        return out.view(*index.shape, out.shape[-1]).sum(dim=1).to(hidden.dtype)


def _linear(experts: Any, name: str, wrapper: Any, inputs: Sequence[Tensor], hit: Sequence[int]) -> list[Tensor]:
    """Apply parameter `name` of the experts `hit`, with its adapter if it has one, each to its own rows."""
    matrices = expert_matrices(getattr(experts, name), experts.is_transposed)
    biases = getattr(experts, f"{name}_bias").unbind(0) if experts.has_bias else [None] * len(matrices)
    a, b, scale = expert_factors(wrapper) if wrapper else ([], [], 0.0)
    # peft has none for stacked weights, but the place for it.
    dropped = probability(wrapper.lora_dropout[wrapper.active_adapters[0]]) or 0.0 if wrapper else 0.0
    outputs = []
    for x, number in zip(inputs, hit, strict=True):
        if wrapper:
            factors = a[number], b[number]
        else:  # an adapter of rank 0
            width = getattr(experts, name).shape[2 if experts.is_transposed else 1]
            factors = x.new_empty(0, x.shape[-1]), x.new_empty(width, 0)
        outputs.append(LoraLinear.apply(x, matrices[number], biases[number], *factors, scale, dropped))
    return outputs


def expert_matrices(weight: Any, transposed: bool) -> Sequence[Tensor]:
    """Each expert's matrix (out, in), as a view."""
    if isinstance(weight, QuantizedExperts):
        return weight.matrices()
    return [matrix.T for matrix in weight.unbind(0)] if transposed else weight.unbind(0)


def expert_factors(wrapper: Any) -> tuple[Sequence[Tensor], Sequence[Tensor], float]:
    """A (rank, in) and B (out, rank) of each expert, and the scale, from peft's stacked layout.

    Unbound, not indexed: the gradient of an index is a tensor as large as the whole stack, once per expert.
    """
    name = wrapper.active_adapters[0]
    a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    count = wrapper.num_experts
    b = b.view(b.shape[0], -1, count).permute(2, 0, 1)
    return a.view(count, -1, a.shape[-1]).unbind(0), b.unbind(0), wrapper.scaling[name]
