"""A model to be trained, and the probes run on it before training: on the model itself or, where its weights will be
sharded and no rank has read them yet, on a tiny twin of the same configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from firefly import ranks
from firefly.config import AdapterConfig, ModelConfig
from firefly.console import notice
from firefly.files import first_line
from firefly.models.adapters import transformers_model
from firefly.models.attention import refuse_textless, segmented, use_segments
from firefly.models.checkpointing import decoder_layers
from firefly.models.dry_run import NoDryRun, counted_activations
from firefly.models.forwards import install_training_forwards
from firefly.models.loading import load_model, quiet_libraries, read_config, text_only_of
from firefly.models.memory import Activations
from firefly.models.meta_model import follow_forwards, make_tiny_twin, unreached_by, with_small_adapter
from firefly.models.precision import Precision
from firefly.models.probe_cache import cached_activations, cached_layout
from firefly.models.reach import Unreached

SHARES, SHARES_OF_SMALL = (1 / 16, 1 / 8), (1 / 2, 1)
"""Shares of the feed-forward width at which activations are measured where they cannot be counted: bytes per token are
linear in it."""
SMALL = 10_000_000
"""Parameters of a model that is small itself."""


@dataclass(frozen=True)
class Probes:
    """A model and where it is probed.

    Attributes:
        model: the transformers model that is to be trained.
        source: where it came from.
        twin: the tiny model that is probed instead; None where `model` has its weights.
    """

    model: Any
    source: ModelConfig
    twin: Any = None

    def layout(self) -> tuple[str, str]:
        """As `attention.choose_layout`."""
        found = cached_layout(self.twin or self.model)
        if self.twin is not None:
            _attend_as(self.model, self.twin)
        return found

    def unreached(self) -> Unreached | None:
        """What text does not reach; None where the model itself can be probed."""
        if self.twin is None:
            return None
        with quiet_libraries():
            return unreached_by(self.model, self.twin)[0]

    def install_forwards(self, wrapped: Any, adapter: AdapterConfig) -> str:
        """As `forwards.install_training_forwards`.

        Args:
            wrapped: the model with its adapter.
        """
        if self.twin is None:
            return install_training_forwards(wrapped)
        twin = with_small_adapter(self.twin, adapter)
        head = install_training_forwards(twin)
        follow_forwards(transformers_model(wrapped), transformers_model(twin))
        return head

    def activations(
        self, adapter: AdapterConfig, layout: str, autocast: torch.dtype | None, longest: int
    ) -> Activations:
        """As `memory.measure_activations`: measured on the prepared model, or counted on fake tensors, or, where that
        fails too (routing depends on values), measured on twins with narrow feed-forward blocks."""
        if self.twin is None:
            return cached_activations(self.model, layout, autocast, longest)
        try:
            with quiet_libraries():
                return counted_activations(self.model, layout, autocast, longest, self.model.device.type)
        except NoDryRun:
            found: Any = None
            if ranks.is_first():
                small = sum(p.numel() for p in self.model.parameters()) < SMALL
                shares = SHARES_OF_SMALL if small else SHARES
                few, more = (self._measured_narrow(share, adapter, layout, autocast, longest) for share in shares)
                kept = more.kept + (more.kept - few.kept) / (shares[1] - shares[0]) * (1 - shares[1])
                found = replace(more, layers=len(decoder_layers(self.model)), kept=kept)
            return ranks.from_first(found)

    def _measured_narrow(
        self, share: float, adapter: AdapterConfig, layout: str, autocast: torch.dtype | None, longest: int
    ) -> Activations:
        twin = make_tiny_twin(read_config(self.source), self.source, share).to(self.model.device, self.model.dtype)
        _attend_as(twin, self.model)
        twin = with_small_adapter(twin, adapter)
        install_training_forwards(twin)
        return cached_activations(transformers_model(twin), layout, autocast, longest)


def _attend_as(model: Any, other: Any) -> None:
    """Let a model attend to segments or not, as another of its make does."""
    if segmented(other) is not None:
        use_segments(model)
    else:
        model.set_attn_implementation(other.config._attn_implementation)


def load_for_training(
    source: ModelConfig, mode: str, precision: Precision, device: torch.device, sharded: bool, whole: str = ""
) -> Probes:
    """Load the model that a run trains.

    Args:
        sharded: weights will be sharded over ranks. They stay in their files until each rank knows its shard; a model
            that cannot be loaded so is loaded whole into CPU memory by every rank, with a notice.
        whole: why that is so of this run in any case.

    Raises:
        UsageError: see `load_model`.
    """
    if not sharded:
        return Probes(load_model(source, mode, precision, device), source)
    before = torch.get_rng_state()
    problem, model, twin = whole or None, None, None
    try:
        if problem is None:
            described = read_config(source)
            model = load_model(source, mode, precision, device, unread=True)
            twin = make_tiny_twin(described, source).to(device)
            if text_only_of(described):
                refuse_textless(twin)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # remote or unknown code may raise anything on weights without values
        problem = f"{type(error).__name__}: {first_line(error)}"
    problem = next((one for one in ranks.all_of(problem) if one), None)
    if problem is None:
        return Probes(model, source, twin)
    torch.set_rng_state(before)
    model = load_model(source, mode, precision, torch.device("cpu"))  # raises for the user's mistakes
    notice("engine.loads_whole", "every process loads the whole model: {reason}", reason=problem)
    return Probes(model, source)
