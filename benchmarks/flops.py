"""Necessary FLOPs of a run: those that no way of computing the same step can do without.

One multiplication with one addition counts as 2. Per token, with N the parameters of the linear layers of the body, N_h
those of the head, N_lora those of the adapters and f the share of tokens that have a loss:

    full fine-tuning    6 N + 6 f N_h
    LoRA, QLoRA         4 N + 6 N_lora + 4 f N_h    (frozen weights have no gradient)
    DPO with LoRA       6 N + 6 N_lora + 6 f N_h    (and the reference runs forward: 2 N and 2 f N_h)

Activation checkpointing computes the body's forward pass once more: 2 N, and 2 N_lora. In DPO a pair's prompt counts
once: prompt + chosen + rejected tokens. Attention scores, norms, the dequantisation of NF4 and the optimizer are left
out, so the true share of the physical limit is a little higher than stated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from measuring import IGNORE_INDEX


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The linear layers of a dense decoder: (inputs, outputs) of each in one layer, their count, and the head."""

    layers: int
    linears: tuple[tuple[int, int], ...]
    head: tuple[int, int]

    @property
    def body(self) -> int:
        """Parameters of all linear layers of the body."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears)

    @property
    def head_parameters(self) -> int:
        """Parameters of the head."""
        return self.head[0] * self.head[1]

    def adapter(self, rank: int) -> int:
        """Parameters of LoRA adapters of this rank on every linear layer of the body."""
        return self.layers * sum(rank * (inputs + outputs) for inputs, outputs in self.linears)


def shape_of(config: Any) -> Shape:
    """Read the shape of a Llama-like configuration (gated MLP, grouped keys and values)."""
    width, inner = config.hidden_size, config.intermediate_size
    head_size = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_size, config.num_key_value_heads * head_size
    attention = ((width, queries), (width, keys), (width, keys), (queries, width))
    return Shape(
        layers=config.num_hidden_layers,
        linears=(*attention, (width, inner), (width, inner), (inner, width)),
        head=(width, config.vocab_size),
    )


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokens that a step has to compute, and those of them that have a loss."""

    computed: int
    targets: int


def tokens_of(task: str, rows: Sequence[dict[str, list[int]]]) -> Tokens:
    """Count a dump's rows; a pair's prompt counts once."""
    if task == "dpo":
        answers = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
        return Tokens(computed=answers + sum(len(row["prompt_ids"]) for row in rows), targets=answers)
    targets = sum(label != IGNORE_INDEX for row in rows for label in row["labels"][1:])
    return Tokens(computed=sum(len(row["input_ids"]) for row in rows), targets=targets)


def necessary_flops(shape: Shape, tokens: Tokens, *, task: str, mode: str, rank: int, checkpointing: bool) -> int:
    """FLOPs that these tokens need in one step of training."""
    if mode == "full":
        body, adapters, head = 6, 0, 6
    else:
        body, adapters, head = 4, 6, 4
    if task == "dpo":
        body, head = body + 2, head + 2
    if checkpointing:
        body, adapters = body + 2, adapters + (2 if adapters else 0)
    num_adapters = shape.adapter(rank) if mode != "full" else 0
    return (
        tokens.computed * (body * shape.body + adapters * num_adapters) + tokens.targets * head * shape.head_parameters
    )
