"""Necessary FLOPs of training: those that no way of computing the same step can do without.

One multiplication with one addition counts as 2. Per token, with N the parameters of the linear layers of the body, N_h
those of the head, N_lora those of the adapters and f the share of tokens that have a loss:

    full fine-tuning    6 N + 6 f N_h
    LoRA, QLoRA         4 N + 6 N_lora + 4 f N_h    (frozen weights have no gradient)
    a reference model   2 N + 2 f N_h               (forward alone: DPO with LoRA has 6 N + 6 N_lora + 6 f N_h)

Activation checkpointing computes the body's forward pass once more: 2 N, and 2 N_lora. In DPO a pair's prompt counts
once: prompt + chosen + rejected tokens. Attention scores, norms, the dequantization of NF4 and the optimizer are left
out, so the true share of the physical limit is a little higher than stated.

(torch.utils.flop_counter counts what a pass computes, attention and recomputation with it, not what is necessary.)
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from firefly.models.adapters import count_body, count_parameters, transformers_model
from firefly.models.checkpointing import decoder_layers


@dataclass(frozen=True, kw_only=True)
class Linears:
    """Parameters of the linear layers of the body and of the head, and of the adapters on them (0: all are trained)."""

    body: int
    head: int
    adapters: int = 0


def necessary_flops(
    linears: Linears, *, tokens: int, targets: int, reference: bool = False, recomputed: float = 0.0
) -> int:
    """FLOPs that so many computed tokens, of which `targets` have a loss, need in training.

    Args:
        reference: the loss compares with a reference that runs forward.
        recomputed: share of the layers whose forward pass is repeated in backward.
    """
    trained = not linears.adapters
    body = (6 if trained else 4) + (2 if reference else 0) + 2 * recomputed
    head = (6 if trained else 4) + (2 if reference else 0)
    of_tokens = body * linears.body + (6 + 2 * recomputed) * linears.adapters
    return round(tokens * of_tokens + targets * head * linears.head)


def linears_of(model: Any, full: bool) -> Linears:
    """Of a prepared model; adapters are what is trained of it."""
    inner = transformers_model(model)
    adapters = 0 if full else count_parameters(model)[0]
    head = inner.get_output_embeddings()
    own = 0 if head is None else head.weight.numel()
    tied = head is not None and head.weight is inner.get_input_embeddings().weight
    return Linears(body=count_body(model) - adapters - (0 if tied else own), head=own, adapters=adapters)


def matmul_rate(model: nn.Module, dtype: torch.dtype, device: torch.device, rows: int = 512) -> float:
    """FLOPs a second of matmuls with weights of the shapes in a decoder layer, each the fastest of a few; takes half a
    second."""
    layers = decoder_layers(model)
    shapes: dict[tuple[int, int], None] = {}
    for module in (layers[0] if layers else model).modules():
        size = getattr(module, "out_features", None), getattr(module, "in_features", None)
        if isinstance(size[0], int) and isinstance(size[1], int):
            shapes[size[0], size[1]] = None

    def timed(left: torch.Tensor, right: torch.Tensor) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    flops = seconds = 0.0
    for outputs, inputs in shapes or {(1024, 1024): None}:
        left = torch.ones(rows, inputs, device=device, dtype=dtype)
        right = torch.ones(outputs, inputs, device=device, dtype=dtype).T
        timed(left, right)  # the first call prepares
        best, end = timed(left, right), time.perf_counter() + 0.5 / max(len(shapes), 1)
        while time.perf_counter() < end:
            best = min(best, timed(left, right))
        seconds += best
        flops += 2 * rows * inputs * outputs
    return flops / seconds
