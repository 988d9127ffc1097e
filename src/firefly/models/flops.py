"""Necessary FLOPs of training: those that no way of computing the same step can do without.

One multiplication with one addition counts as 2. Per token, with N the parameters of the linear layers of the body, N_h
those of the head, N_lora those of the adapters and f the share of tokens that have a loss:

    full fine-tuning    6 N + 6 f N_h
    LoRA, QLoRA         4 N + 6 N_lora + 4 f N_h    (frozen weights have no gradient)
    a reference model   2 N + 2 f N_h               (forward alone: DPO with LoRA has 6 N + 6 N_lora + 6 f N_h)

Activation checkpointing computes the body's forward pass once more: 2 N, and 2 N_lora. In DPO a pair's prompt counts
once: prompt + chosen + rejected tokens. Attention scores, norms, the dequantisation of NF4 and the optimizer are left
out, so the true share of the physical limit is a little higher than stated.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Products:
    """Parameters of the linear layers of the body and of the head, and of the adapters on them (0: all are trained)."""

    body: int
    head: int
    adapters: int = 0


def necessary_flops(
    products: Products, *, tokens: int, targets: int, reference: bool = False, again: float = 0.0
) -> int:
    """FLOPs that so many computed tokens, of which `targets` have a loss, need in training.

    Args:
        reference: the loss compares with a reference that runs forward.
        again: share of the layers that are computed again in backward.
    """
    trained = not products.adapters
    body = (6 if trained else 4) + (2 if reference else 0) + 2 * again
    head = (6 if trained else 4) + (2 if reference else 0)
    of_tokens = body * products.body + (6 + 2 * again) * products.adapters
    return round(tokens * of_tokens + targets * head * products.head)
