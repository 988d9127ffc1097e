"""What preference training needs beyond the other tasks: no dropout, and a reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from firefly.config import Config
from firefly.console import notice
from firefly.data.dataset import Split
from firefly.errors import UsageError
from firefly.files import cache_folder
from firefly.models.precision import Precision
from firefly.objectives.engines import Engine
from firefly.objectives.preference import PREFERENCE_LOSSES
from firefly.objectives.preference_trainer import PreferenceTrainer, disable_dropout
from firefly.objectives.reference import AdapterOff, FrozenAdapter, FrozenModel, Reference, Untrained
from firefly.objectives.trainers import BeforeTraining
from firefly.runs.checkpoints import RunPlan


def without_dropout(config: Config) -> Config:
    """Preference training compares two passes of one model, so no dropout may stand between them."""
    if config.task_type != "dpo" or config.adapter.mode == "full" or not config.adapter.dropout:
        return config
    if "lora_dropout" in config.given:
        notice(
            "preference.no_dropout",
            "lora_dropout {value} is switched off: preference training compares two passes of the same model.",
            value=config.adapter.dropout,
        )
    return replace(config, adapter=replace(config.adapter, dropout=0.0))


def with_reference_first(config: Config, engine: Engine) -> Config:
    """Where weights are divided among ranks, a reference that is no adapter switched off is asked before training."""
    settings = config.preference
    needed = config.task_type == "dpo" and bool(PREFERENCE_LOSSES[settings.loss].reference)
    second = config.adapter.mode == "full" or config.adapter.name_or_path
    if not (needed and second and engine.divides_weights) or settings.precompute_reference:
        return config
    notice(
        "engine.reference_first",
        "precompute_reference is switched on: {engine} shards the weights, and every rank would hold the whole "
        "reference model.",
        engine=engine.name,
    )
    return replace(config, preference=replace(settings, precompute_reference=True))


def ask_reference_first(
    trainer: PreferenceTrainer,
    config: Config,
    plan: RunPlan,
    precision: Precision,
    data: Split,
    engine: Engine,
    checkpoint: Path | None,
) -> None:
    """The reference's log-probabilities, once and before the first step; where weights are divided, after they are."""
    parts = reference_parts(config, plan, precision)
    fingerprints = data.train.fingerprint, data.held_out.fingerprint if data.held_out else None
    if not engine.divides_weights:
        trainer.precompute_reference(parts, fingerprints)
    elif checkpoint is None:
        trainer.add_callback(BeforeTraining(lambda: trainer.precompute_reference(parts, fingerprints)))
    elif not trainer.take_reference(parts, fingerprints):
        raise UsageError(
            "engine.no_reference",
            "this run's log-probabilities of the reference are gone from the cache ({path}), and under {engine} they "
            "cannot be computed any more once training has begun. Start a new run, or resume without {engine}.",
            path=cache_folder(),
            engine=engine.name,
        )


def objective_options(config: Config, model: Any, precision: Precision) -> dict[str, Any]:
    """What a preference trainer takes beside what every trainer takes; the reference is copied before any step."""
    if config.task_type != "dpo":
        return {}
    disable_dropout(model)
    loss = PREFERENCE_LOSSES[config.preference.loss]
    return {
        "preference": config.preference,
        "reference": make_reference(config, model, precision) if loss.reference else None,
    }


def make_reference(config: Config, model: Any, precision: Precision) -> Reference:
    """The model as it stands now, before this run changes it."""
    if config.adapter.mode == "full":
        # With the log-probabilities computed beforehand the untrained model itself serves, and no copy is kept.
        return Untrained() if config.preference.precompute_reference else FrozenModel(model, precision.compute)
    if config.adapter.name_or_path:
        return Untrained() if config.preference.precompute_reference else FrozenAdapter(model)
    return AdapterOff()


def reference_parts(config: Config, plan: RunPlan, precision: Precision) -> list[Any]:
    """What the log-probabilities of a reference depend on, besides the examples."""
    return [plan.base_weights, plan.add_tokens, plan.adapter, config.adapter.mode == "qlora", precision.name]
