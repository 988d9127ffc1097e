"""Root-mean-square normalization that keeps its input and one number a row, and nothing else, for backward.

The model's own operations keep two or three arrays of the input's size in fp32. Zhang and Sennrich, arXiv:1910.07467.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from firefly.models.kernels.elementwise import implementation
from firefly.models.probing import attempt, disagreement


class Form(NamedTuple):
    """How an architecture scales: by offset + weight, in fp32 before the result takes the input's type or after."""

    offset: float
    scales_in_fp32: bool


FORMS = (Form(0.0, False), Form(0.0, True), Form(1.0, True))  # Llama, GPT-OSS, Gemma


def install_rms_norms(model: nn.Module) -> int:
    """Give the RMS norms of `model` our forward where a probe shows the same output. Returns how many."""
    count = 0
    for module in model.modules():
        if "forward" in vars(module) or not type(module).__name__.endswith("RMSNorm"):
            continue
        form = _form_of(module)
        if form is not None:
            module.forward = MethodType(_forward_as(form), module)  # type: ignore[assignment]
            count += 1
    return count


def _form_of(module: Any) -> Form | None:
    """The form that gives this norm's own output, if there is one."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or len(list(module.parameters())) != 1:
        return None
    epsilon = _epsilon(module)
    if epsilon is None or weight.device.type == "meta":
        return None
    x = torch.linspace(-2, 3, 3 * len(weight), device=weight.device).sin().view(1, 3, len(weight))
    worst = dict.fromkeys(FORMS, 0.0)  # disagreement; the type of the result tells some forms apart
    with torch.no_grad():
        for dtype in {weight.dtype, torch.bfloat16}:
            given = x.to(dtype)
            expected = attempt(partial(type(module).forward, module, given))
            if expected is None:  # an unknown norm keeps its own forward
                return None
            for form in FORMS:
                found = RMSNorm.apply(given, weight, epsilon, form)
                worst[form] = max(worst[form], disagreement(found, expected, computed=dtype))
    best = min(FORMS, key=lambda form: worst[form])
    return best if worst[best] <= 1 else None


def _epsilon(module: Any) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


def _forward_as(form: Form) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        epsilon = _epsilon(self)
        assert epsilon is not None  # `_form_of` saw to it
        with torch.autocast(x.device.type, enabled=False):
            return rms_norm(x, self.weight, epsilon, form)

    return forward


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, form: Form) -> Tensor:
    """x / rms(x), scaled as `form` says, by what computes on x's device. x: (…, width), weight: (width,)."""
    if implementation(x.device) == "liger":
        from firefly.models.kernels import liger

        # Liger's result has the type of x; a wider weight makes Llama's form give the weight's.
        keeps_type = form.scales_in_fp32 or torch.promote_types(x.dtype, weight.dtype) == x.dtype
        if keeps_type and len(weight) <= liger.WIDEST:
            return liger.rms_norm(x, weight, epsilon, *form)
    return RMSNorm.apply(x, weight, epsilon, form)


class RMSNorm(torch.autograd.Function):
    """x: (…, width), weight: (width,); returns x / rms(x), scaled as `form` says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, form: Form) -> Tensor:
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = (length.square_() / x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.form = form
        out = wide * inverse
        if form.scales_in_fp32:
            return out.mul_(weight.float() + form.offset).to(x.dtype)
        out = out.to(x.dtype)
        return out.mul_(weight) if torch.promote_types(out.dtype, weight.dtype) == out.dtype else out * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        wide, grad = x.float(), grad.float()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            rows = (grad * wide).mul_(inverse).reshape(-1, len(weight))
            grad_weight = rows.sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            scaled = grad * (weight.float() + ctx.form.offset)
            along = (scaled * wide).sum(-1, keepdim=True).mul_(inverse**3).div_(x.shape[-1])
            grad_x = scaled.mul_(inverse).addcmul_(wide, along, value=-1).to(x.dtype)
        return grad_x, grad_weight, None, None
