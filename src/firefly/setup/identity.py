"""What a checkpoint is bound to: only the run that wrote it resumes from it."""

from __future__ import annotations

from typing import Any

from firefly.config import AdapterConfig, names_in
from firefly.data.dataset import PREPARATION_KEYS, code_hash
from firefly.models.adapters import transformers_model
from firefly.run import Run
from firefly.runs.checkpoints import OPTIMIZER_SETTINGS, TRAINING_SETTINGS, RunPlan
from firefly.runs.manifest import adapter_hash


def identify_base(hashed: dict[str, Any], model: Any) -> dict[str, Any]:
    """The manifest's word on the base: the hash of its files or, for a hub's model, the commit that was loaded."""
    if "sha256" in hashed:
        return hashed
    return hashed | {"commit": getattr(transformers_model(model).config, "_commit_hash", None)}


def identify_run(run: Run, layout: str, base: dict[str, Any]) -> RunPlan:
    """What a checkpoint of this run is bound to."""
    config, args, encoder, examples, steps = run.config, run.args, run.encoder, run.data.train, run.step_settings
    adapted = config.adapter.mode != "full"
    prepared: dict[str, Any] = {
        "template": encoder.template.hash,
        "tokenizer": encoder.tokenizer_hash,
        "date": encoder.template.date and encoder.template.date.isoformat(),
        "data": sorted(examples.hashes.items()),
        "code": code_hash(),
    }
    return RunPlan(
        examples_per_step=steps.examples_per_step,
        seed=steps.seed,
        shuffle=steps.shuffle,
        data=examples.fingerprint,
        task_type=config.task_type,
        objective=run.task.identity(),
        train_mode=config.adapter.mode,
        lora_rank=config.adapter.rank if adapted else 0,
        lora_alpha=config.adapter.alpha if adapted else 0,
        base_weights=str(base.get("sha256") or base.get("commit")),
        optimizer={name: getattr(args, name) for name in OPTIMIZER_SETTINGS},
        world_size=args.world_size,
        layout=layout,
        prepared=prepared | {name: value for name, value in config.flat().items() if name in PREPARATION_KEYS},
        training={name: getattr(args, name) for name in TRAINING_SETTINGS}
        | {"precision": run.precision.name, "lora_dropout": config.adapter.dropout if adapted else 0.0},
        total_steps=run.total_steps,
        engine=run.backend.name,
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
