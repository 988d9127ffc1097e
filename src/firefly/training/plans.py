"""What a checkpoint is bound to: a run goes on from one only as the run that wrote it."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainingArguments

from firefly.config import SMOOTHED_LOSSES, AdapterConfig, Config, names_in
from firefly.data.batching import steps_per_epoch
from firefly.data.blocks import Blocks
from firefly.data.dataset import PREPARATION_KEYS, code_hash
from firefly.data.encoding import Encoder
from firefly.data.examples import Examples
from firefly.models.adapters import transformers_model
from firefly.models.precision import Precision
from firefly.objectives.engines import Engine
from firefly.runs.checkpoints import OPTIMIZER_SETTINGS, TRAINING_SETTINGS, RunPlan
from firefly.runs.passport import adapter_hash


def identify_base(hashed: dict[str, Any], model: Any) -> dict[str, Any]:
    """The passport's word on the base: the hash of its files or, for a hub's model, the commit that was loaded."""
    if "sha256" in hashed:
        return hashed
    return hashed | {"commit": getattr(transformers_model(model).config, "_commit_hash", None)}


def run_plan(
    config: Config,
    args: TrainingArguments,
    layout: str,
    examples: Examples | Blocks,
    base: dict[str, Any],
    encoder: Encoder,
    precision: Precision,
    engine: Engine,
) -> RunPlan:
    """What a checkpoint of this run is bound to."""
    adapted = config.adapter.mode != "full"
    examples_per_step = config.step.examples_per_rank * args.world_size
    per_epoch = steps_per_epoch(len(examples), examples_per_step, args.dataloader_drop_last)
    prepared: dict[str, Any] = {
        "template": encoder.template.hash,
        "tokenizer": encoder.tokenizer_hash,
        "date": encoder.template.date and encoder.template.date.isoformat(),
        "data": sorted(examples.hashes.items()),
        "code": code_hash(),
    }
    return RunPlan(
        examples_per_step=examples_per_step,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        shuffle=config.data.shuffle,
        data=examples.fingerprint,
        task_type=config.task_type,
        objective=objective_settings(config),
        train_mode=config.adapter.mode,
        lora_rank=config.adapter.rank if adapted else 0,
        lora_alpha=config.adapter.alpha if adapted else 0,
        base_weights=str(base.get("sha256") or base.get("commit")),
        optimizer={name: getattr(args, name) for name in OPTIMIZER_SETTINGS},
        world_size=args.world_size,
        layout=layout,
        prepared=prepared | {name: value for name, value in config.flat().items() if name in PREPARATION_KEYS},
        training={name: getattr(args, name) for name in TRAINING_SETTINGS}
        | {"precision": precision.name, "lora_dropout": config.adapter.dropout if adapted else 0.0},
        total_steps=total_steps(args, per_epoch),
        engine=engine.name,
        add_tokens=list(config.model.add_tokens or ()),
        **adapter_plan(config.adapter),
    )


def adapter_plan(adapter: AdapterConfig) -> dict[str, Any]:
    """The part of a plan that full training has no use for."""
    if adapter.mode == "full":
        return {}
    return {
        "use_rslora": adapter.use_rslora,
        "use_dora": adapter.use_dora,
        "lora_target": adapter.target if isinstance(adapter.target, str) else list(adapter.target),
        "modules_to_save": names_in(adapter.modules_to_save or ()),
        "adapter": adapter_hash(adapter.name_or_path) if adapter.name_or_path else None,
    }


def objective_settings(config: Config) -> dict[str, Any]:
    """What of the preference keys shapes the loss of this run; where the reference is computed does not."""
    settings = config.preference
    if config.task_type != "dpo":
        return {}
    own = {"simpo": {"simpo_gamma": settings.simpo_gamma}, "cpo": {"cpo_alpha": settings.cpo_alpha}}
    smoothing = {"label_smoothing": settings.label_smoothing} if settings.loss in SMOOTHED_LOSSES else {}
    common = {"preference_loss": settings.loss, "beta": settings.beta, "rpo_alpha": settings.rpo_alpha}
    return common | smoothing | own.get(settings.loss, {})


def total_steps(args: TrainingArguments, per_epoch: int) -> int:
    """Optimizer steps of the whole run, as transformers counts them."""
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
