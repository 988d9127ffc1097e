"""The reference of a preference loss: the model as it stood before this run."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from firefly.files import atomic_file, cache_folder, make_cache


class Reference(Protocol):
    """Lends the reference model for a forward pass without gradients."""

    def lent(self, model: Any) -> Any:
        """A context manager around the model to call."""
        ...


class AdapterOff:
    """The base model of a fresh adapter, which adds nothing yet: the same weights with the adapter off."""

    @contextmanager
    def lent(self, model: Any) -> Iterator[Any]:
        with model.disable_adapter():
            yield model


class Untrained:
    """The model itself, for a reference that is asked before the first step only."""

    @contextmanager
    def lent(self, model: Any) -> Iterator[Any]:
        yield model


class FrozenAdapter:
    """An adapter that training starts from, kept as it was: its weights change places with the trained ones."""

    def __init__(self, model: nn.Module) -> None:
        self.frozen = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @contextmanager
    def lent(self, model: nn.Module) -> Iterator[nn.Module]:
        parameters = [(p, self.frozen[name]) for name, p in model.named_parameters() if name in self.frozen]
        trained = [p.data for p, _ in parameters]
        for p, frozen in parameters:
            p.data = frozen
        try:
            yield model
        finally:
            for (p, _), data in zip(parameters, trained, strict=True):
                p.data = data


class FrozenModel:
    """A copy of a model whose every weight is trained.

    Where the run computes in 16 bit, the linear layers' weights are kept in that type: autocast casts those of the
    policy to it in every pass, so both compute the same, and the copy takes half the memory.
    """

    def __init__(self, model: nn.Module, compute: torch.dtype) -> None:
        self.copy = copy.deepcopy(model).requires_grad_(False).eval()
        tied = {id(module.weight) for module in self.copy.modules() if isinstance(module, nn.Embedding)}
        for module in self.copy.modules():
            if type(module) is nn.Linear and id(module.weight) not in tied:
                module.to(compute)

    @contextmanager
    def lent(self, model: Any) -> Iterator[Any]:
        yield self.copy


def cache_key(parts: Sequence[Any]) -> str:
    """The name of a file of log-probabilities: a hash of all that they depend on."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]


def cached(key: str) -> np.ndarray | None:
    """Log-probabilities that an earlier run left, fp32 (examples, 2)."""
    path = _path(key)
    return np.load(path) if path.is_file() else None


def store(key: str, logps: Tensor, write: bool = True) -> np.ndarray:
    """Log-probabilities (examples, 2) as an array; where `write`, kept for later runs in a file that appears whole or
    not at all."""
    values = logps.float().cpu().numpy()
    if not write:
        return values
    path = _path(key)
    make_cache(path.parent)
    with atomic_file(path) as scratch, scratch.open("wb") as file:  # runs that are started at once may write the same
        np.save(file, values)
    return values


def _path(key: str) -> Path:
    return cache_folder() / "reference" / f"{key}.npy"
