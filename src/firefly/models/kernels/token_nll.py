"""The language-model head on target positions only, in two matmuls per chunk.

Logits exist for one chunk of tokens at a time; their gradient is formed in the forward pass (p − 1 at the target,
times the head), so nothing of the size tokens × vocabulary is kept. `summed_nll` is what SFT and pretraining minimize;
`token_logps` gives each token's log-probability, for losses that weigh tokens only once all are known.

Where logits have 16 bits, the target's is computed anew in fp32 (`_refined`): an answer's log-probability is a sum of
hundreds of them, and their rounding is half of the variance of its error.

The idea of Cut Cross-Entropy (arXiv:2411.09009) and Liger (arXiv:2410.10989), in plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from firefly.models.kernels.matmul import graph_is_kept
from firefly.models.kernels.target_device import device_kind
from firefly.models.precision import compute_type

BYTES_PER_CHUNK = {"cpu": 1 << 25, "cuda": 1 << 28}
"""Bytes of logits that exist at a time. A GPU reads the whole head once a chunk, so it needs some hundreds of rows to
be busy with more than that; on a CPU larger ones gain nothing, and leave larger holes in the heap."""

ROWS_AT_A_TIME = 8
"""Rows of logits that a CPU works on in fp32 at a time: 1.5 MiB of a vocabulary of 49,152."""

WORDS_AT_A_TIME = 4096
"""Rows of a head whose gradient a CPU computes in 16 bit at a time."""


def summed_nll(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Sum over tokens of −log softmax(hidden · weightᵀ + bias)[target], a scalar in fp32.

    Args:
        hidden: (tokens, width), the states that predict.
        weight: (vocabulary, width).
        bias: (vocabulary,) or None.
        targets: (tokens,) int64.
    """
    dtype = compute_type(weight)
    with torch.autocast(hidden.device.type, enabled=False):
        return _SummedNLL.apply(hidden.to(dtype), weight, bias, targets, dtype, torch.is_grad_enabled())


def token_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """log softmax(hidden · weightᵀ + bias)[target] of each token, fp32 (tokens,); arguments as for `summed_nll`."""
    dtype = compute_type(weight)
    with torch.autocast(hidden.device.type, enabled=False):
        return _TokenLogps.apply(hidden.to(dtype), weight, bias, targets, dtype, torch.is_grad_enabled())


def chunk_bytes(device: torch.device, tokens: int, vocabulary: int, size: int) -> int:
    """Of the logits, numbers of `size` bytes, that exist at a time while the loss of `tokens` is computed."""
    return min(tokens, _tokens_per_chunk(device, vocabulary, size)) * vocabulary * size


def _tokens_per_chunk(device: torch.device, vocabulary: int, size: int) -> int:
    return max(32, BYTES_PER_CHUNK.get(device_kind(device), BYTES_PER_CHUNK["cpu"]) // (vocabulary * size))


def _chunks(head: Tensor, tokens: int) -> list[slice]:
    size = _tokens_per_chunk(head.device, len(head), head.element_size())
    return [slice(start, start + size) for start in range(0, tokens, size)]


def _logits(part: Tensor, head: Tensor, bias: Tensor | None, room: Tensor | None) -> Tensor:
    """part · headᵀ + bias, in `room` where there is one."""
    bias = None if bias is None else bias.to(part.dtype)
    if _wide_products_by_onednn(part):
        # MKL reaches half of its rate where one side is a whole vocabulary wide; oneDNN loses nothing there.
        return torch.ops.mkldnn._linear_pointwise(part, head, bias, "none", [], "")
    if room is None:
        return torch.nn.functional.linear(part, head, bias)
    out = room[: len(part)]
    return torch.mm(part, head.T, out=out) if bias is None else torch.addmm(bias, part, head.T, out=out)


def _room(hidden: Tensor, head: Tensor) -> Tensor | None:
    """Where the logits of one chunk after the other go; None where the product brings its own."""
    if _wide_products_by_onednn(hidden):
        return None
    tokens = min(len(hidden), _tokens_per_chunk(head.device, len(head), head.element_size()))
    return head.new_empty((tokens, len(head)))


def _target_logits(part: Tensor, head: Tensor, bias: Tensor | None, target: Tensor) -> Tensor | None:
    """part · head[target] + bias[target] in fp32, (rows, 1); None where all logits are computed in fp32.

    Args:
        part: (rows, width).
        target: (rows, 1) int64.
    """
    if part.dtype == torch.float32:
        return None
    exact = head[target[:, 0]].float().mul_(part).sum(-1, keepdim=True)
    return exact if bias is None else exact + bias[target].float()


def _refined(log_p: Tensor, rounded: Tensor, exact: Tensor | None) -> Tensor:
    """log softmax(logits)[target] as it is with the target's logit `exact` in the place of `rounded`; fp32 (rows, 1).

    With d their difference, the sum of exponentials grows by the factor 1 + p (eᵈ − 1).
    """
    if exact is None:
        return log_p
    d = exact - rounded.float()
    return log_p + d - torch.log1p(log_p.exp() * torch.expm1(d))


def _to_gradient(
    logits: Tensor,
    target: Tensor,
    exact: Tensor | None = None,
    weights: Tensor | None = None,
    bias_gradient: Tensor | None = None,
) -> Tensor:
    """Turn logits, where they lie, into the gradient of Σ weights · NLL by them; return the rows' log p[target], fp32.

    A few rows at a time on a CPU, so that what is made of them in fp32 never leaves its cache.

    Args:
        logits: (rows, vocabulary), changed.
        target: (rows, 1) int64.
        exact: what `_target_logits` gives; it counts for log p alone, the gradient has no more bits than the logits.
        weights: (rows,) fp32, or None for 1.
        bias_gradient: (vocabulary,) fp32; the gradient's sum over rows is added.
    """
    rounded = logits.gather(1, target)
    found = []
    for rows in _rows(logits):
        gradient, log_p = _softmax(logits[rows], target[rows])
        found.append(log_p)
        gradient.scatter_add_(1, target[rows], gradient.new_full((1, 1), -1.0).expand(len(gradient), 1))
        if weights is not None:
            gradient *= weights[rows, None]
        if bias_gradient is not None:
            bias_gradient += gradient.sum(0)
        logits[rows] = gradient
    return _refined(torch.cat(found), rounded, exact)[:, 0]


def _add_product(gradient: Tensor, logits: Tensor, part: Tensor) -> None:
    """gradient += logitsᵀ · part, with no second array of the head's size."""
    if gradient.dtype == logits.dtype:
        gradient.addmm_(logits.T, part)
        return
    # A 16-bit product has to be converted first; a GPU does that for the whole head at once.
    size = WORDS_AT_A_TIME if logits.device.type == "cpu" else len(gradient)
    for start in range(0, len(gradient), size):
        words = slice(start, start + size)
        gradient[words].add_(logits[:, words].T @ part)  # `+=` would write it to itself once more


def _softmax(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(softmax(logits), log softmax(logits)[target]) in fp32: (rows, vocabulary), (rows, 1).

    One exponential fewer than by way of log softmax: the largest p is 1 / Σ exp(logit − largest logit), exactly, and
    is no less than 1 / vocabulary, so that its logarithm has all of fp32's digits.
    """
    wide = logits if logits.is_cuda else logits.float()  # a GPU converts as it reads
    p = torch.softmax(wide, dim=-1, dtype=torch.float32)
    above = wide.gather(1, target).float() - wide.amax(-1, keepdim=True).float()
    return p, above + p.amax(-1, keepdim=True).log()


def _log_p_of_targets(logits: Tensor, target: Tensor, exact: Tensor | None) -> Tensor:
    """log softmax(logits)[target] of each row, fp32 (rows,); target: (rows, 1), exact: what `_target_logits` gives."""
    found = [torch.log_softmax(logits[rows], -1, torch.float32).gather(1, target[rows]) for rows in _rows(logits)]
    return _refined(torch.cat(found), logits.gather(1, target), exact)[:, 0]


def _rows(logits: Tensor) -> list[slice]:
    """Chunks of logits: a few rows on a CPU, all rows on a GPU, where each launch has overhead."""
    size = ROWS_AT_A_TIME if device_kind(logits.device) == "cpu" else len(logits)
    return [slice(start, start + size) for start in range(0, len(logits), size)]


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
        room = _room(hidden, head)
        for rows in _chunks(head, len(targets)):
            part, target = hidden[rows], targets[rows, None]
            logits, exact = _logits(part, head, bias, room), _target_logits(part, head, bias, target)
            if needs_hidden or needs_weight or needs_bias:
                total -= _to_gradient(logits, target, exact, bias_gradient=grad_bias).sum()
            else:
                total -= _log_p_of_targets(logits, target, exact).sum()
            if grad_hidden is not None:
                torch.mm(logits, head, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, logits, part)
            del logits  # before the next chunk's exist
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # The loss is a plain sum, so every token's gradient is the same multiple of what forward kept, and is scaled
        # where that lies: there need not be two of the head's size.
        hidden, weight, bias = ctx.saved_tensors
        if graph_is_kept():
            hidden, weight, bias = (None if kept is None else kept.clone() for kept in (hidden, weight, bias))
        for kept in (hidden, weight, bias):
            if kept is not None:
                torch.mul(kept, grad_total.reshape(1), out=kept)  # not rounded to 16 bit before
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
        room = _room(hidden, head)
        for rows in _chunks(head, len(targets)):
            part, target = hidden[rows], targets[rows, None]
            logits, exact = _logits(part, head, bias, room), _target_logits(part, head, bias, target)
            if towards is None:
                out[rows] = _log_p_of_targets(logits, target, exact)
            else:
                out[rows] = _to_gradient(logits, target, exact)
                torch.mm(logits, head, out=towards[rows]).neg_()
            del logits
        kept = (hidden, weight, bias, targets) if ctx.trainable else (None, None, None, None)
        ctx.save_for_backward(towards, *kept)
        ctx.dtype = dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        towards, hidden, weight, bias, targets = ctx.saved_tensors
        if not ctx.trainable:
            grad_hidden = None
            if towards is not None:
                grad_hidden = torch.mul(towards, grad[:, None], out=torch.empty_like(towards))
            return grad_hidden, None, None, None, None, None
        head = weight.to(ctx.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        room = _room(hidden, head)
        for rows in _chunks(head, len(targets)):
            logits = _logits(hidden[rows], head, bias, room)
            _to_gradient(logits, targets[rows, None], weights=-grad[rows].float(), bias_gradient=grad_bias)
            torch.mm(logits, head, out=grad_hidden[rows])
            _add_product(grad_weight, logits, hidden[rows])
            del logits
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias, None, None, None
