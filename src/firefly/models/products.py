"""How fast a CPU multiplies with matrices of a model's shapes, in float32 and in bfloat16.

Which of the two is faster is not told by the instructions that a CPU has. Of two kinds with AVX-512 BF16, one
multiplies 2.4 times as fast in bfloat16 as in float32, the other 1.6 times as fast in float32.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from firefly.models.checkpointing import text_layers
from firefly.models.experts import expert_stacks
from firefly.models.precision import Rates

ROWS, ROWS_OF_EXPERTS = 512, 2048
"""Tokens of a product; of a layer with experts so many are shared out among those."""

WIDEST = 3072
"""Longer sides of a matrix are cut: the rate no longer grows there."""

ROUND_FLOPS, FEWEST_ROWS = 64e9, 128
"""What all products may take in one type and round: seconds, on one thread too. Where they are many, fewer rows are
multiplied, down to so many; then the products that count least are left out."""

SECONDS, ROUNDS = 0.5, (2, 7)
"""Rounds of all products are repeated for so long, at least and at most so many times."""

NOTHING_TO_TIME = 1 << 20
"""Weights that a token passes through in a layer, below which products are too short to be compared."""

CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k")
"""What configurations call the number of experts that a token passes through."""


@dataclass(frozen=True, order=True)
class Product:
    """`rows` tokens by a matrix of this shape."""

    rows: int
    outputs: int
    inputs: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.outputs * self.inputs

    @property
    def timed_flops(self) -> int:
        """Of itself and of both gradients."""
        return 3 * self.flops

    def cut(self, rows: int) -> Product:
        """As it is measured, with so many rows at most."""
        return Product(min(self.rows, rows), min(self.outputs, WIDEST), min(self.inputs, WIDEST))


@dataclass(frozen=True)
class Products:
    """What a token is multiplied with on its way through a model.

    Attributes:
        layers: how many decoder layers there are.
        body: the products of all of them, and how often each is computed.
        head: the one with the vocabulary, if there is one.
    """

    layers: int
    body: Mapping[Product, float]
    head: Product | None

    @property
    def weights_per_layer(self) -> float:
        """Weights that a token passes through in a layer, on average."""
        return sum(count * one.outputs * one.inputs for one, count in self.body.items()) / max(self.layers, 1)

    @property
    def tiny(self) -> bool:
        """Whether there is nothing to time."""
        return self.weights_per_layer < NOTHING_TO_TIME

    def shares(self) -> dict[Product, float]:
        """Each product that is measured → its part of all their FLOPs for a token."""
        rows = ROWS
        flops = self._flops(rows)
        while rows > FEWEST_ROWS and sum(one.timed_flops for one in flops) > ROUND_FLOPS:
            rows //= 2
            flops = self._flops(rows)
        by_weight = sorted(flops, key=lambda one: (-flops[one], one))
        work = accumulate(one.timed_flops for one in by_weight)
        kept = [one for one, so_far in zip(by_weight, work, strict=True) if so_far <= ROUND_FLOPS]
        whole = sum(flops[one] for one in kept)
        return {one: flops[one] / whole for one in sorted(kept)}

    def _flops(self, rows: int) -> dict[Product, float]:
        """Each product as it is measured with so many rows at most → multiplications for a token."""
        flops: dict[Product, float] = defaultdict(float)
        for one, count in [*self.body.items(), *([(self.head, 1.0)] if self.head else [])]:
            flops[one.cut(rows)] += count * one.outputs * one.inputs
        return flops


def products_of(model: Any) -> Products:
    """Of a model on any device, "meta" for one, without adapters.

    A matrix is a parameter of two dimensions: linear layers have such ones, be they transformers' or a model's own.
    """
    layers = text_layers(model)
    text = model.config.get_text_config()
    chosen = next((found for name in CHOSEN_EXPERTS if isinstance(found := getattr(text, name, None), int)), 2)
    head = getattr(model.get_output_embeddings(), "weight", None)
    counts = Counter[Product]()
    for layer in layers or [model]:
        stacked = list(expert_stacks(layer))
        for _, module, name in stacked:
            experts, *sides = getattr(module, name).shape
            rows = max(min(ROWS, ROWS_OF_EXPERTS * chosen // experts), 1)
            counts[Product(rows, *sides)] += min(chosen, experts)
        matrices = {
            id(parameter): parameter
            for module in layer.modules()
            if not isinstance(module, nn.Embedding)
            for parameter in module.parameters(recurse=False)
            if len(parameter.shape) == 2 and parameter is not head
        }
        for matrix in matrices.values():
            counts[Product(ROWS, *matrix.shape)] += 1
    count = len(layers) or getattr(text, "num_hidden_layers", None) or 1
    return Products(count, counts, None if head is None else Product(ROWS, *head.shape))


def measure_rates(products: Products) -> dict[str, Rates]:
    """FLOPs a second on the threads in use: "frozen" of what weights without a gradient need (the product and its
    input's gradient), "trained" of the weights' gradient besides.

    Types take turns, and each product counts with its fastest turn, so that what else the machine does slows no type
    down alone.
    """
    shares, types = products.shares(), (torch.float32, torch.bfloat16)
    draw = torch.Generator().manual_seed(0)
    work: list[tuple[Product, torch.dtype, tuple[Tensor, Tensor, Tensor]]] = []
    for one in shares:
        sides = (one.rows, one.inputs), (one.outputs, one.inputs), (one.rows, one.outputs)
        arrays = [torch.rand(side, generator=draw).sub_(0.5) for side in sides]
        for dtype in types:
            x, weight, gradient = (array.to(dtype) for array in arrays)
            work.append((one, dtype, (x, weight, gradient)))
    best: dict[tuple[Product, torch.dtype], list[float]] = {}
    least, most = ROUNDS
    with torch.no_grad():
        for one, dtype, arrays in work:  # the first call prepares
            best[one, dtype] = [float("inf")] * 3
            _timed(*arrays)
        end, rounds = time.perf_counter() + SECONDS, 0
        while rounds < least or (rounds < most and time.perf_counter() < end):
            for one, dtype, arrays in work:
                best[one, dtype] = [min(pair) for pair in zip(best[one, dtype], _timed(*arrays), strict=True)]
            rounds += 1
    found: dict[str, Rates] = {}
    for name, parts in (("frozen", 2), ("trained", 3)):
        per_flop = [
            sum(share * sum(best[one, dtype][:parts]) / (parts * one.flops) for one, share in shares.items())
            for dtype in types
        ]
        found[name] = Rates(*(1 / seconds for seconds in per_flop))
    return found


def _timed(x: Tensor, weight: Tensor, gradient: Tensor) -> tuple[float, float, float]:
    """Seconds of a product, of its input's gradient and of its weight's."""
    moments = [time.perf_counter()]
    torch.mm(x, weight.T)
    moments.append(time.perf_counter())
    torch.mm(gradient, weight)
    moments.append(time.perf_counter())
    torch.mm(gradient.T, x)
    moments.append(time.perf_counter())
    first, second, third = (after - before for before, after in pairwise(moments))
    return first, second, third
