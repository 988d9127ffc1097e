"""Trials of what an architecture does, made on the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


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
    """The model in eval mode for a while: without dropout."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class _Met(Exception):
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
        raise _Met

    try:
        with watching(stop), torch.no_grad():
            decoder(model)(**inputs, use_cache=False)
    except Exception:  # a model that is called otherwise has met nothing
        pass
    return met[0] if met else None
