"""Probes of what an architecture does, made on the model itself.

Whether two ways to compute something agree, whether an unknown module can be called as ours are, and with which
arguments something inside a model is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

T = TypeVar("T")

TOLERANCE, TOLERANCE_16_BIT = 1e-4, 1e-2
"""How far two right ways to compute an array may be apart, as a share of its length (its Euclidean norm).

They differ by rounding alone. In fp32 that is below 1e-6 even for sums of thousands of terms in another order, in bf16
2e-3 for each number that is rounded on the way, with two or three roundings between 3e-3 and 5e-3. A form that is not
the architecture's (another activation, scale, offset or order of halves) is off by a tenth of the length and more.
By the length, because sums cancel: a number near 0 carries the error of the large ones that it is made of. One number
of a hundred that is wrong by its own size is still seen in 16 bit, one of 10^8 in fp32."""


def disagreement(found: Any, expected: Any, computed: torch.dtype | None = None) -> float:
    """How far two arrays are apart, in tolerances: up to 1 they agree. Infinite where types or shapes differ, or where
    something is not finite.

    Args:
        computed: a type that either is computed in on the way, where it may be coarser than the result's.
    """
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        return 0.0 if found is None and expected is None else math.inf
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return math.inf
    coarse = any(dtype in (torch.bfloat16, torch.float16) for dtype in (expected.dtype, computed))
    far = float(torch.linalg.vector_norm(found.float() - expected.float()))
    allowed = (TOLERANCE_16_BIT if coarse else TOLERANCE) * float(torch.linalg.vector_norm(expected.float()))
    if far == 0:
        return 0.0
    return far / allowed if allowed and math.isfinite(far) else math.inf


def agree(found: Any, expected: Any, computed: torch.dtype | None = None, scale: float = 1.0) -> bool:
    """Whether two ways to compute an array give the same one, but for rounding; of two absent ones (None) they do.

    Args:
        computed: see `disagreement`.
        scale: how many tolerances are allowed, where there is a reason for other than one: say it where you set it.
    """
    return disagreement(found, expected, computed) <= scale


REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError, ImportError)
"""What unknown code raises when it is called as ours is, or without what it needs."""


def attempt(trial: Callable[[], T]) -> T | None:
    """What `trial` returns; None where the code that it tries refuses (`REFUSALS`). Out of memory is no refusal."""
    try:
        return trial()
    except torch.OutOfMemoryError:
        raise
    except REFUSALS:
        return None


def decoder(model: PreTrainedModel) -> Any:
    """The part of a causal language model that ends in its last hidden states.

    Raises:
        NotImplementedError: the architecture does not tell it.
    """
    for candidate in (model.base_model, model.get_decoder(), getattr(model, "model", None)):
        if candidate is not None and candidate is not model:
            return candidate
    raise NotImplementedError(f"{type(model).__name__} does not tell its decoder")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode within the block: without dropout."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class _Called(Exception):
    """The first call has come; nothing after it is needed."""


def first_call(
    model: Any, inputs: dict[str, Any], watching: Callable[[Callable[..., None]], AbstractContextManager[Any]]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """What something inside a model is called with first, positionally and by name; None where that never happens.

    Args:
        inputs: of the model's decoder.
        watching: given a function, returns a context in which that is called with what the watched thing would be.
    """
    met: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(*args: Any, **kwargs: Any) -> None:
        met.append((args, kwargs))
        raise _Called

    def run() -> None:
        with watching(stop), torch.no_grad():
            decoder(model)(**inputs, use_cache=False)

    with suppress(_Called):
        attempt(run)  # a model that is called otherwise has met nothing
    return met[0] if met else None
