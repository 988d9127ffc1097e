"""Necessary FLOPs of a benchmark's run, by the formulas of `firefly.models.flops`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from measuring import IGNORE_INDEX

from firefly.data import schema as examples_schema
from firefly.data.batching import pack
from firefly.models import flops


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


def tokens_of(task: str, rows: Sequence[dict[str, list[int]]], examples_per_step: int) -> Tokens:
    """Count a dump's rows. A pair's prompt counts once, and so does what rows of a step begin with alike."""
    if task == "dpo":
        answers = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
        return Tokens(computed=answers + sum(len(row["prompt_ids"]) for row in rows), targets=answers)
    targets = sum(label != IGNORE_INDEX for row in rows for label in row["labels"][1:])
    starts = range(0, len(rows), examples_per_step)
    computed = sum(distinct_tokens(rows[start : start + examples_per_step]) for start in starts)
    return Tokens(computed=computed, targets=targets)


def distinct_tokens(rows: Sequence[dict[str, list[int]]]) -> int:
    """Tokens of a step's rows, what some begin with alike counted once, as one microbatch of them is laid out."""
    examples = [
        examples_schema.Tokens(*(np.array(row[name], dtype=np.int32) for name in ("input_ids", "labels")))
        for row in rows
    ]
    return pack(examples, share=True).input_ids.numel()


def necessary_flops(shape: Shape, tokens: Tokens, *, task: str, mode: str, rank: int, checkpointing: bool) -> int:
    """FLOPs that these tokens need in one step of training."""
    adapters = shape.adapter(rank) if mode != "full" else 0
    return flops.necessary_flops(
        flops.Linears(body=shape.body, head=shape.head_parameters, adapters=adapters),
        tokens=tokens.computed,
        targets=tokens.targets,
        reference=task == "dpo",
        recomputed=float(checkpointing),
    )
