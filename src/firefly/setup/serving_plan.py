"""What serving a base and its adapters will take of memory, from config.json and the adapters, before it is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from firefly.config import Config, PrecisionConfig, load_config
from firefly.errors import UsageError
from firefly.generation.answering_type import answering_precision
from firefly.generation.loading import common_base, named_adapters
from firefly.models.loading import read_config
from firefly.models.memory import Forecast
from firefly.models.saved_adapter import SavedAdapter, is_adapter, open_adapter
from firefly.models.serving_memory import (
    PAGE,
    UNKNOWN_CONTEXT,
    adapter_bytes,
    beside_cache,
    cache_shape,
    context_of,
    default_cache_tokens,
    weight_bytes,
)
from firefly.setup.plan import Machine, describe_machine, precision_on, with_known_shape
from firefly.translation import translate

OF_THE_MODEL = {"model_name_or_path", "hub", "model_revision", "trust_remote_code", "use_cpu"}
"""Keys of a configuration that serving goes by."""


@dataclass(frozen=True)
class ServingPlan:
    """What serving takes, and what it rests on.

    Attributes:
        forecast: memory by part; without the cache where `unknown` says why.
        models: the base and its adapters.
        batched: whether requests are batched as they arrive, or answered one after another.
        cache_tokens: that the cache of each model holds; 0 where that is not known.
        bytes_per_token: of one cached token of one model.
        context: the most tokens that the model has positions for; None where its configuration names none.
        notes: what was assumed, in sentences.
        unknown: why the cache cannot be forecast; "" where it is.
    """

    machine: Machine
    forecast: Forecast
    architecture: str
    precision: str
    models: int
    batched: bool
    cache_tokens: int
    bytes_per_token: int
    context: int | None
    notes: tuple[str, ...] = ()
    unknown: str = ""

    @property
    def fits(self) -> bool:
        return self.forecast.total <= self.forecast.available

    def as_dict(self) -> dict[str, Any]:
        """The value that `firefly plan --serve --json` prints."""
        return {
            "fits": self.fits,
            "complete": not self.unknown,
            "total_bytes": self.forecast.total,
            "available_bytes": self.forecast.available,
            "parts": self.forecast.parts,
            "machine": asdict(self.machine),
            "precision": self.precision,
            "architecture": self.architecture,
            "models": self.models,
            "batched": self.batched,
            "cache_tokens": self.cache_tokens,
            "cache_bytes_per_token": self.bytes_per_token,
            "context_length": self.context,
            "notes": list(self.notes),
            "unknown": self.unknown or None,
        }


def make_serving_plan(
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    adapters: Sequence[str] = (),
    cache_tokens: int | None = None,
    in_4_bits: bool = False,
    memory: str = "",
    device: str = "",
) -> ServingPlan:
    """Plan the serving of a model.

    Args:
        source, overrides: a configuration that names the model; keys that serving does not go by are an error among
            the overrides.
        adapters: folders, or name=folder, as `firefly serve` takes them.
        cache_tokens: of each model; None: as serving chooses by itself.
        memory, device: the machine to plan for (`describe_machine`).

    Raises:
        UsageError: the model, an adapter or an option is at fault.
    """
    if cache_tokens is not None and cache_tokens < 1:
        raise UsageError(
            "plan.bad_cache_tokens", "--cache_tokens {value} is not valid; it must be at least 1.", value=cache_tokens
        )
    config, saved = _asked(source, overrides or {}, adapters)
    notes: list[str] = []
    machine = describe_machine(memory, device, bool(config.training.get("use_cpu")))
    if machine.assumed:
        notes.append(machine.assumed)
    config = with_known_shape(config, notes)
    described = read_config(config.model)
    precision = precision_on(machine, PrecisionConfig())
    if machine.here:
        precision = answering_precision(
            "auto",
            config.model,
            [str(adapter.given) for adapter in saved],
            in_4_bits,
            machine.device,
            machine.memory,
            notify=lambda _, text, **values: notes.append(translate(text, **values)),
        )
    itemsize, models = precision.compute.itemsize, 1 + len(saved)
    parts = {
        "weights": weight_bytes(described, config.model, precision.compute, in_4_bits),
        "adapters": sum(adapter_bytes(adapter, itemsize) for adapter in saved),
    } | beside_cache(machine.kind, precision.compute)
    context = context_of(described)
    shape, unknown = cache_shape(described, config.model), ""
    if shape is None:
        unknown = translate(
            "{architecture}: what its layers keep of a token cannot be told from a small model of its kind: the cache "
            "is missing above.",
            architecture=described.model_type,
        )
        tokens = 0
    else:
        free = max(machine.memory - sum(parts.values()), 0)
        most = default_cache_tokens(shape, free, context or UNKNOWN_CONTEXT, itemsize, models, machine.kind)
        tokens = most if cache_tokens is None else -(-cache_tokens // PAGE) * PAGE
        parts |= shape.parts(tokens, itemsize, models, machine.kind)
        if not shape.paged:
            notes.append(
                translate(
                    "{architecture}: its cache cannot be shared among requests of other lengths, so they are answered "
                    "one after another; one request of {tokens:,} tokens is counted.",
                    architecture=described.model_type,
                    tokens=tokens,
                )
            )
        elif context and tokens < context:
            notes.append(
                translate(
                    "the cache holds {tokens:,} tokens, the model's context is {context:,}: longer requests are "
                    "refused.",
                    tokens=tokens,
                    context=context,
                )
            )
    return ServingPlan(
        machine=machine,
        forecast=Forecast({name: size for name, size in parts.items() if size}, 0, machine.memory),
        architecture=str(next(iter(described.architectures or ()), described.model_type)),
        precision="nf4" if in_4_bits else precision.name,
        models=models,
        batched=shape is not None and shape.paged,
        cache_tokens=tokens,
        bytes_per_token=0 if shape is None else shape.per_token * itemsize,
        context=context,
        notes=tuple(notes),
        unknown=unknown,
    )


def _asked(
    source: str | os.PathLike[str] | Mapping[str, Any], overrides: Mapping[str, Any], adapters: Sequence[str]
) -> tuple[Config, list[SavedAdapter]]:
    """A configuration that names the base, and the adapters over it."""
    if unread := sorted(set(overrides) - OF_THE_MODEL):
        raise UsageError(
            "plan.not_of_serving",
            "plan --serve does not go by {keys}. It takes: {known}.",
            keys=", ".join(unread),
            known=", ".join(sorted(OF_THE_MODEL)),
        )
    named = named_adapters(adapters)
    required = () if named else ("model_name_or_path",)
    config = load_config(source or {}, overrides, required=required)
    if not named and config.adapter.name_or_path:
        named = named_adapters([config.adapter.name_or_path])
    elif not named and is_adapter(config.model.name_or_path):
        named = named_adapters([config.model.name_or_path])
        config = replace(config, model=replace(config.model, name_or_path=""))
    config = replace(config, model=common_base(named, config.model))
    return config, [open_adapter(path) for path in named.values()]
