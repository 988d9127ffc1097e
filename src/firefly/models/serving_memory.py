"""What serving a model takes of memory, by part, from its configuration alone.

Weights follow from the model on "meta". What a layer keeps of a token is measured on the tiny twin, whose attention is
as wide as the model's: keys and values of grouped heads, latents of MLA (arXiv:2405.04434), states of recurrent layers
alike. Of a batch that grows and shrinks (`generation.batched`) the rest is transformers' paged cache: its pool, and the
static tensors that it makes beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from firefly.config import ModelConfig
from firefly.models.experts import expert_stacks
from firefly.models.loading import quiet_libraries
from firefly.models.memory import LIBRARIES, PRIMITIVE_BYTES, PRIMITIVES, bytes_of, free_memory
from firefly.models.meta_model import empty_model, make_tiny_twin
from firefly.models.paged_attention import MOST_PADDING
from firefly.models.probing import REFUSALS
from firefly.models.saved_adapter import SavedAdapter

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a number in NF4 with its constants: a byte for each block of 64, and 4 for 256 of those (QLoRA's double
quantization)."""

PAGE, BATCH_TOKENS, REQUESTS = 32, 512, 64
"""The engine's own sizes: tokens of a page, tokens computed in one step, answers that grow at a time."""

UNKNOWN_CONTEXT = 1 << 17
"""Tokens of a context whose length no configuration names."""

TOKENS_OF_A_REQUEST = 512
"""What a request is taken to keep where many share a cache."""

FOR_WEIGHTS, FOR_CACHE = 0.9, 0.6
"""The part of a GPU that weights may take before they are laid over several, and of what is free once they are loaded,
the part that a cache takes by default: requests make other arrays, and other processes want something, too."""

SERVING_LIBRARIES = {"cpu": 50 << 20, "cuda": LIBRARIES["cuda"]}
"""What a process takes besides: on a CPU what answering loads after the imports (measured: 40 to 50 MiB)."""

SAMPLING_BYTES = 16
"""Of each logit of each answer: its fp32 copy, probabilities, and their order."""


# ---- weights ----


def weight_bytes(described: Any, model: ModelConfig, dtype: torch.dtype, in_4_bits: bool = False) -> int:
    """Bytes of a model's weights as they are held for serving, from its configuration alone."""
    with quiet_libraries():
        made = empty_model(described, model, dtype, in_4_bits)
    experts = [getattr(module, name) for _, module, name in expert_stacks(made)] if in_4_bits else []
    stacked = {id(weight) for weight in experts}
    plain = sum(bytes_of(parameter) for parameter in made.parameters() if id(parameter) not in stacked)
    return plain + int(sum(weight.numel() for weight in experts) * NF4_BYTES)


def spread_over(needed: int, free: Sequence[int]) -> bool:
    """Whether weights of so many bytes have to be laid over several GPUs: there are several, and they do not fit the
    first.

    Args:
        free: bytes that each GPU has free.
    """
    return len(free) > 1 and needed > FOR_WEIGHTS * free[0]


def adapter_bytes(adapter: SavedAdapter, itemsize: int) -> int:
    """Bytes of an adapter over its base: low-rank factors in fp32, as peft holds them, whole modules in the base's
    type."""
    return sum(
        tensor.numel() * (4 if ".lora_" in name or "token_adapter" in name else itemsize)
        for name, tensor in adapter.tensors.items()
    )


def context_of(described: Any) -> int | None:
    """The most tokens that a model's configuration knows positions for; None where it names none."""
    text = described.get_text_config()
    return getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)


# ---- the cache ----


@dataclass(frozen=True)
class LayerCache:
    """How many numbers a layer keeps of a request.

    Attributes:
        per_token: keys and values of a token.
        window: of so many tokens at most; None: of all.
        fixed: states that do not grow with the request.
    """

    per_token: int
    window: int | None = None
    fixed: int = 0


@dataclass(frozen=True)
class CacheShape:
    """What a model keeps of requests, and what it computes with beside.

    Attributes:
        layers: one of each decoder layer.
        paged: whether transformers' paged cache takes this architecture, so that requests are batched as they arrive;
            else they are answered one after another.
        read: numbers made of a cached token at the peak of a layer's attention, where keys and values are gathered and
            repeated for each query head.
        computed: numbers made of a token of the batch at the peak of a layer.
        vocabulary: tokens that a logit is computed for.
    """

    layers: tuple[LayerCache, ...]
    paged: bool
    read: int
    computed: int
    vocabulary: int

    @property
    def per_token(self) -> int:
        """Numbers that all layers keep of a token."""
        return sum(layer.per_token for layer in self.layers)

    @property
    def groups(self) -> list[int]:
        """Numbers of a token in the layers of each kind of attention: they share the pages of one pool."""
        sizes: dict[int | None, int] = {}
        for layer in self.layers:
            sizes[layer.window] = sizes.get(layer.window, 0) + layer.per_token
        return list(sizes.values())

    def pool(self, tokens: int, itemsize: int) -> tuple[int, int]:
        """(bytes of the pool of a paged cache for so many tokens, tokens that one kind of layers may read of it).

        It is handed out in sectors that hold whole pages of each kind; two of them are never handed out.
        """
        blocks = [size * PAGE * itemsize for size in self.groups]
        sector = math.lcm(*blocks, 128)
        sectors = max(1, math.ceil(math.ceil(tokens / PAGE) * sum(blocks) / sector))
        return (sectors + 2) * sector, sectors * max(sector // block for block in blocks) * PAGE

    def request(self, tokens: int, itemsize: int) -> int:
        """Bytes of one request of so many tokens, by itself."""
        kept = (min(tokens, layer.window or tokens) * layer.per_token + layer.fixed for layer in self.layers)
        return sum(kept) * itemsize

    def parts(self, tokens: int, itemsize: int, models: int = 1, device: str = "cpu") -> dict[str, int]:
        """Bytes that a cache of so many tokens takes, and what is computed beside it.

        Args:
            models: the base and its adapters: each has a cache of its own, as its keys and values are its own.
            device: a CPU reads each request's keys by themselves (`paged_attention`); elsewhere a mask of the step's
                queries × all readable keys is kept.
        """
        if not self.paged:
            work = tokens * (self.computed + self.read) + self.vocabulary * SAMPLING_BYTES // itemsize
            return {"kv_cache": self.request(tokens, itemsize), "masks": 0, "work": work * itemsize}
        pool, readable = self.pool(tokens, itemsize)
        mask = 0 if device == "cpu" else BATCH_TOKENS * (readable + BATCH_TOKENS) * itemsize
        indices = 8 * len(self.groups) * (readable + BATCH_TOKENS)
        read = int(MOST_PADDING * max(layer.per_token for layer in self.layers)) if device == "cpu" else self.read
        computed = BATCH_TOKENS * (self.computed + read) + readable * read
        logits = REQUESTS * self.vocabulary * (itemsize + SAMPLING_BYTES)
        return {
            "kv_cache": models * pool,
            "masks": models * (len(self.groups) * mask + indices),
            "work": computed * itemsize + logits,
        }


def cache_shape(described: Any, model: ModelConfig) -> CacheShape | None:
    """The cache of a model by its configuration; None where its twin does not tell."""
    with quiet_libraries():
        twin = make_tiny_twin(described, model)
    return cache_shape_of(twin, described)


def cache_shape_of(twin: Any, described: Any) -> CacheShape | None:
    """The cache of a model with this configuration, as it is measured on a model of the same kinds of layers: its twin,
    or itself."""
    text = described.get_text_config()
    try:
        short, longer = _cached(twin, 3), _cached(twin, 5)
        wanted = DynamicCache(config=text).layers
        known = {}
        for layer, three, five in zip(short, map(_numbers, short), map(_numbers, longer), strict=True):
            per_token = (five - three) // 2
            known.setdefault(_kind(layer), LayerCache(per_token, _kind(layer)[1], three - 3 * per_token))
        layers = tuple(known[_kind(layer)] for layer in wanted)
    except REFUSALS:
        return None
    heads = getattr(text, "num_attention_heads", None) or 0
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    inner = getattr(text, "intermediate_size", None)
    inner = inner if isinstance(inner, int) else 4 * text.hidden_size
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    plain = all(layer.per_token == 2 * key_heads * width for layer in layers)
    attention = text.hidden_size + (heads + 2 * key_heads) * width
    return CacheShape(
        layers=layers,
        paged=plain and kinds <= {"full_attention", "sliding_attention"},
        read=(2 * heads + key_heads) * width,
        computed=2 * text.hidden_size + max(attention, 3 * inner),
        vocabulary=text.vocab_size,
    )


def _cached(model: Any, tokens: int) -> Sequence[Any]:
    """The cache's layers after a pass over so many tokens."""
    with torch.inference_mode():
        out = model(input_ids=torch.arange(tokens, device=model.device)[None], use_cache=True)
    cache = getattr(out, "past_key_values", None)
    return (out.cache_params if cache is None else cache).layers


def _kind(layer: Any) -> tuple[type, int | None]:
    return type(layer), getattr(layer, "sliding_window", None)


def _numbers(layer: Any) -> int:
    """How many numbers a layer of a cache holds, under whatever names."""

    def tensors(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple | dict):
            for item in value.values() if isinstance(value, dict) else value:
                yield from tensors(item)

    return sum(tensor.numel() for value in vars(layer).values() for tensor in tensors(value) if tensor.dim())


def beside_cache(device: str, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that a process takes whatever it serves: libraries, and oneDNN's code for 16-bit matmuls on a CPU."""
    compiled = PRIMITIVES * PRIMITIVE_BYTES if device == "cpu" and dtype.itemsize == 2 else 0
    return {"libraries": SERVING_LIBRARIES[device], "kernels": compiled}


def default_cache_tokens(
    shape: CacheShape, free: int, context: int, itemsize: int, models: int = 1, device: str = "cpu"
) -> int:
    """How many tokens a cache holds by default: one request of the model's whole context, or many short ones if that is
    more, as far as memory goes. At least a page.

    Args:
        free: bytes that are free once the weights are loaded.
        context: the most tokens that the model has positions for.
        models, device: see `CacheShape.parts`.
    """
    wanted = max(context, REQUESTS * TOKENS_OF_A_REQUEST) if shape.paged else context
    fitting, too_many = 1, wanted // PAGE + 1
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        if sum(shape.parts(middle * PAGE, itemsize, models, device).values()) <= FOR_CACHE * free:
            fitting = middle
        else:
            too_many = middle
    return fitting * PAGE


def cache_tokens_for(model: Any, context: int, models: int = 1) -> int | None:
    """`default_cache_tokens` of a model that is loaded, by what its device has free; None where its cache is unlike
    those known."""
    shape = cache_shape_of(model, model.config)  # the pass also brings weights into memory that were pages of a file
    if shape is None:
        return None
    device = model.device
    return default_cache_tokens(shape, free_memory(device), context, model.dtype.itemsize, models, device.type)
