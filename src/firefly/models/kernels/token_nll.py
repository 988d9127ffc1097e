"""The language-model head on target positions only, in two matrix products per chunk.

Logits exist for one chunk of tokens at a time; their gradient is formed in the forward pass (p − 1 at the target,
times the head), so nothing of the size tokens × vocabulary is kept. The idea of Cut Cross-Entropy (arXiv:2411.09009)
and Liger (arXiv:2410.10989), in plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOGITS_PER_CHUNK = 1 << 24
"""Numbers of logits that exist at a time: 64 MiB in fp32."""


def summed_nll(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Sum over tokens of −log softmax(hidden · weightᵀ + bias)[target], a scalar in fp32.

    Args:
        hidden: (tokens, width), the states that predict.
        weight: (vocabulary, width).
        bias: (vocabulary,) or None.
        targets: (tokens,) int64.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    with torch.autocast(device, enabled=False):
        return _SummedNLL.apply(hidden.to(dtype), weight, bias, targets, dtype, torch.is_grad_enabled())


class _SummedNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        dtype: torch.dtype,
        grad_enabled: bool,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = (grad_enabled and need for need in ctx.needs_input_grad[:3])
        head = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias and bias is not None else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunk = max(32, LOGITS_PER_CHUNK // weight.shape[0])
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            part, target = hidden[rows], targets[rows, None]
            logits = part @ head.T
            if bias is not None:
                logits += bias
            log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
            del logits
            total -= log_p.gather(1, target).sum()
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            grad = log_p.exp_()
            grad.scatter_add_(1, target, grad.new_full((1, 1), -1.0).expand(len(part), 1))
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(dtype)
            if grad_hidden is not None:
                torch.mm(grad, head, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += grad.T @ part
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # The loss is a plain sum, so every token's gradient is the same multiple of what forward kept.
        hidden, weight, bias = (
            None if kept is None else kept * grad_total.to(kept.dtype) for kept in ctx.saved_tensors
        )
        return hidden, None if weight is None else weight.to(ctx.weight_dtype), bias, None, None, None
