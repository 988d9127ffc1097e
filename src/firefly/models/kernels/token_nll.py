"""The language-model head on target positions only, in two matrix products per chunk.

Logits exist for one chunk of tokens at a time; their gradient is formed in the forward pass (p − 1 at the target,
times the head), so nothing of the size tokens × vocabulary is kept. `summed_nll` is what SFT and pretraining minimise;
`token_logps` gives each token's log-probability, for losses that weigh tokens only once all are known.

The idea of Cut Cross-Entropy (arXiv:2411.09009)
and Liger (arXiv:2410.10989), in plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOGITS_PER_CHUNK = {"cpu": 1 << 24, "cuda": 1 << 27}
"""Numbers of logits that exist at a time: 64 MiB in fp32 on a CPU. A GPU reads the whole head once a chunk, so it needs
some hundreds of rows to be busy with more than that."""


def summed_nll(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Sum over tokens of −log softmax(hidden · weightᵀ + bias)[target], a scalar in fp32.

    Args:
        hidden: (tokens, width), the states that predict.
        weight: (vocabulary, width).
        bias: (vocabulary,) or None.
        targets: (tokens,) int64.
    """
    dtype = _compute_type(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        return _SummedNLL.apply(hidden.to(dtype), weight, bias, targets, dtype, torch.is_grad_enabled())


def token_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """log softmax(hidden · weightᵀ + bias)[target] of each token, fp32 (tokens,); arguments as for `summed_nll`."""
    dtype = _compute_type(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        return _TokenLogps.apply(hidden.to(dtype), weight, bias, targets, dtype, torch.is_grad_enabled())


def _compute_type(hidden: Tensor, weight: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def logits_per_chunk(device: torch.device) -> int:
    """Numbers of logits that exist at a time."""
    return LOGITS_PER_CHUNK.get(device.type, LOGITS_PER_CHUNK["cpu"])


def _chunks(weight: Tensor, tokens: int) -> list[slice]:
    size = max(32, logits_per_chunk(weight.device) // weight.shape[0])
    return [slice(start, start + size) for start in range(0, tokens, size)]


def _log_softmax(part: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(part.dtype)
    if _wide_products_by_onednn(part):
        # MKL reaches half of its rate where one side is a whole vocabulary wide; oneDNN loses nothing there.
        logits = torch.ops.mkldnn._linear_pointwise(part, head, bias, "none", [], "")
    else:
        logits = torch.nn.functional.linear(part, head, bias)
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32)


def _wide_products_by_onednn(part: Tensor) -> bool:
    if part.device.type != "cpu" or part.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


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
        for rows in _chunks(weight, len(targets)):
            part, target = hidden[rows], targets[rows, None]
            log_p = _log_softmax(part, head, bias)
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


class _TokenLogps(torch.autograd.Function):
    """With a frozen head, forward keeps u = W[target] − p · W of each token, and backward is g · u: two products in
    all. A trainable head forms p anew in backward, since its gradient needs the weighed p of every token at once."""

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
        ctx.trainable = needs_weight or needs_bias
        head = weight.to(dtype)
        out = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        towards = torch.empty_like(hidden) if needs_hidden and not ctx.trainable else None
        for rows in _chunks(weight, len(targets)):
            target = targets[rows, None]
            log_p = _log_softmax(hidden[rows], head, bias)
            out[rows] = log_p.gather(1, target)[:, 0]
            if towards is not None:
                torch.mm(_minus_p(log_p, target).to(dtype), head, out=towards[rows])
        kept = (hidden, weight, bias, targets) if ctx.trainable else (None, None, None, None)
        ctx.save_for_backward(towards, *kept)
        ctx.dtype = dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        towards, hidden, weight, bias, targets = ctx.saved_tensors
        if not ctx.trainable:
            return None if towards is None else towards * grad[:, None].to(towards.dtype), None, None, None, None, None
        head = weight.to(ctx.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for rows in _chunks(weight, len(targets)):
            log_p = _log_softmax(hidden[rows], head, bias)
            grad_logits = _minus_p(log_p, targets[rows, None]).mul_(grad[rows, None])
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(ctx.dtype)
            torch.mm(grad_logits, head, out=grad_hidden[rows])
            grad_weight += grad_logits.T @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias, None, None, None


def _minus_p(log_p: Tensor, target: Tensor) -> Tensor:
    """The gradient of log p[target] by the logits, in the place of `log_p`: 1 at the target, minus p."""
    gradient = log_p.exp_().neg_()
    return gradient.scatter_add_(1, target, gradient.new_ones((1, 1)).expand(len(target), 1))
