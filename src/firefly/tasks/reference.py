"""Reference models (the model as it was before this run), and the tasks whose loss compares with one."""

from __future__ import annotations

import copy
import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from firefly import ranks
from firefly.config import Config
from firefly.console import notice
from firefly.data.batching import ExampleList
from firefly.data.dataset import Split
from firefly.distributed.backends import Backend
from firefly.distributed.model import TrainableModel
from firefly.errors import UsageError
from firefly.files import atomic_file, cache_folder, make_cache
from firefly.models.precision import Precision
from firefly.tasks.base import Forward, Task, disable_dropout, resting, without_dropout
from firefly.translation import translate


class Reference(Protocol):
    """Provides the reference model for a forward pass without gradients."""

    def activate(self, model: Any) -> AbstractContextManager[Any]:
        """A context manager around the model to call."""
        ...


class AdapterOff:
    """The base model under a fresh adapter: the same weights with the adapter switched off."""

    @contextmanager
    def activate(self, model: Any) -> Iterator[Any]:
        with model.disable_adapter():
            yield model


class Untrained:
    """The model itself before its first step, for log-probabilities that are precomputed."""

    @contextmanager
    def activate(self, model: Any) -> Iterator[Any]:
        yield model


class FrozenAdapter:
    """A copy of the adapter that training starts from; its weights are swapped in for the trained ones."""

    def __init__(self, model: nn.Module) -> None:
        self.frozen = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @contextmanager
    def activate(self, model: Any) -> Iterator[Any]:
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
    def activate(self, model: Any) -> Iterator[Any]:
        yield self.copy


class ReferenceTask(Task):
    """A task whose loss compares the model with a reference, in passes without dropout.

    Attributes:
        reference: set by `attach`; None where the loss has none, or after its log-probabilities are precomputed.
    """

    HEAD = "logps"

    def __init__(self, config: Config, reference: Reference | None = None) -> None:
        super().__init__(config)
        self.reference = reference

    @classmethod
    def needs_reference(cls, config: Config) -> bool:
        return True

    @classmethod
    def asks_beforehand(cls, config: Config) -> bool:
        """Whether the reference is run before training only."""
        return False

    @classmethod
    def asks_reference(cls, config: Config) -> bool:
        return cls.needs_reference(config) and not cls.asks_beforehand(config)

    @classmethod
    def settle(cls, config: Config, backend: Backend) -> Config:
        """No dropout; and where weights are sharded over ranks, no second model in training.

        Raises:
            UsageError: it cannot be.
        """
        config = without_dropout(config)
        second = config.adapter.mode == "full" or config.adapter.name_or_path  # else the base is in the model as it is
        if second and cls.asks_reference(config) and backend.shards_weights:
            return cls.without_second_model(config, backend)
        return config

    @classmethod
    def without_second_model(cls, config: Config, backend: Backend) -> Config:
        """The configuration changed so that no rank has to hold a whole reference model.

        Raises:
            UsageError: the task asks the reference in every step.
        """
        raise UsageError(
            "engine.whole_reference",
            "task_type {task} compares with the model as it was, which every rank would hold whole under {engine}. "
            "Train a fresh adapter (train_mode lora, without adapter_name_or_path), or use plain torchrun (DDP).",
            task=config.task_type,
            engine=backend.name,
        )

    def attach(self, module: nn.Module, precision: Precision) -> None:
        """Make the current model the reference, and switch its dropout off."""
        disable_dropout(module)
        adapter, first = self.config.adapter, self.asks_beforehand(self.config)
        if not self.needs_reference(self.config):
            return
        if adapter.mode == "full":
            # Precomputed log-probabilities come from the untrained model itself: no copy is kept.
            self.reference = Untrained() if first else FrozenModel(module, precision.compute)
        elif adapter.name_or_path:
            self.reference = Untrained() if first else FrozenAdapter(module)
        else:
            self.reference = AdapterOff()

    @contextmanager
    def asking_reference(self, model: TrainableModel) -> Iterator[Forward]:
        """The reference's forward pass, without gradients and dropout."""
        assert self.reference is not None
        with torch.no_grad(), self.reference.activate(model.module) as reference, resting(reference):
            yield Forward(model, reference)


class PairReferenceTask(ReferenceTask):
    """A task on pairs that never change, so that the reference's log-probabilities of them can be precomputed.

    Attributes:
        precomputed: held out or not → (pairs, 2) log-probabilities of the answers under the reference.
    """

    def __init__(self, config: Config, reference: Reference | None = None) -> None:
        super().__init__(config, reference)
        self.precomputed: dict[bool, np.ndarray] = {}

    @abstractmethod
    def reference_logps(self, forward: Forward, batch: Any) -> Tensor:
        """Log-probabilities of the chosen and the rejected answers under the reference, (2, pairs)."""

    @classmethod
    def asks_beforehand(cls, config: Config) -> bool:
        return config.preference.precompute_reference

    @classmethod
    def without_second_model(cls, config: Config, backend: Backend) -> Config:
        notice(
            "engine.reference_first",
            "precompute_reference is switched on: {engine} shards the weights, and every rank would hold the "
            "whole reference model.",
            engine=backend.name,
        )
        return replace(config, preference=replace(config.preference, precompute_reference=True))

    def ask_reference(self, model: TrainableModel, data: Split, parts: Sequence[Any], checkpoint: Path | None) -> None:
        """With `precompute_reference`, take the reference's log-probabilities from the cache or compute them now; the
        reference is freed.

        Args:
            parts: what they depend on besides the examples: weights, types, adapter.
            checkpoint: that the run resumes from. Where weights are sharded it is loaded already, and the reference can
                no longer be run.

        Raises:
            UsageError: such a run is resumed, and nothing is cached.
        """
        if not (self.asks_beforehand(self.config) and self.reference):
            return
        for held_out, examples in ((False, data.train), (True, data.held_out)):
            if examples is None:
                continue
            path = cache_path([*parts, examples.fingerprint])
            found = ranks.from_first(np.load(path) if path.is_file() else None)
            if found is None and checkpoint is not None and model.backend.shards_weights:
                raise UsageError(
                    "engine.no_reference",
                    "this run's log-probabilities of the reference are gone from the cache ({path}), and under "
                    "{engine} they cannot be computed any more once training has begun. Start a new run, or resume "
                    "without {engine}.",
                    path=cache_folder(),
                    engine=model.backend.name,
                )
            if found is None:
                found = self._all_logps(model, examples, held_out).float().cpu().numpy()
                if ranks.is_first():
                    store(path, found)
            self.precomputed[held_out] = found
        self.reference = None

    def _all_logps(self, model: TrainableModel, examples: ExampleList, held_out: bool) -> Tensor:
        """Of each pair, chosen and rejected, (pairs, 2)."""
        logps = torch.zeros(len(examples), 2, device=model.device)
        loader = self.in_order(examples, held_out, model)
        bar = {"desc": translate("reference log-probabilities"), "total": len(loader), "disable": None, "leave": False}
        for step in tqdm(loader, **bar):
            for rows, batch in zip(step.example_ids, step.microbatches, strict=True):
                found = self.reference_logps(Forward(model), batch.to(model.device))
                logps[torch.tensor(rows, dtype=torch.long, device=logps.device)] = found.T
        return model.summed(logps)  # each rank has those of its own rows, and zeros


def cache_path(parts: Sequence[Any]) -> Path:
    """The file of log-probabilities, fp32 (pairs, 2), under a hash of all that they depend on."""
    key = hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]
    return cache_folder() / "reference" / f"{key}.npy"


def store(path: Path, logps: np.ndarray) -> None:
    """Keep log-probabilities for later runs, which may be writing the same now.

    Raises:
        UsageError: the cache cannot be written.
    """
    make_cache(path.parent)
    with atomic_file(path) as scratch, scratch.open("wb") as file:
        np.save(file, logps)
