"""The files that tell what was trained: as it was asked for, and as it was resolved."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from firefly.config import Config
from firefly.console import take_notices
from firefly.data.certificate import Certificate
from firefly.data.dataset import Split
from firefly.data.encoding import Encoder
from firefly.models.memory import Forecast
from firefly.models.precision import Precision
from firefly.objectives.trainers import StepTrainer
from firefly.runs.passport import git_commit, hardware, package_versions, write_json
from firefly.runs.state import RUNNING, this_process
from firefly.training.plans import total_steps


def describe_template(encoder: Encoder, certificate: Certificate) -> dict[str, Any]:
    """What run.json says of the chat template."""
    return {
        "name": encoder.template.name,
        "sha256": encoder.template.hash,
        "stop_tokens": encoder.template.stop_tokens,
        "stop_ids": encoder.template.stop_ids,
        "date": certificate.date,
        "certificate": certificate.hash,
    }


def without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """Access tokens stay out of files that people pass on."""
    return {name: value for name, value in values.items() if not name.endswith("_token")}


def unnamed_defaults(config: Config) -> dict[str, Any]:
    """transformers' keys that the configuration leaves alone, at the defaults of the version that trains."""
    named = config.flat()
    specs = (spec for spec in fields(TrainingArguments) if spec.init and spec.default is not MISSING)
    return {spec.name: spec.default for spec in specs if spec.name not in named}


def write_records(
    config: Config,
    output_dir: Path,
    encoder: Encoder,
    data: Split,
    certificate: Certificate | None,
    base_weights: dict[str, Any],
    trainer: StepTrainer,
    precision: Precision,
    device: torch.device,
    checkpoint: Path | None,
    forecast: Forecast,
) -> None:
    """train_args.json (as given) and run.json (the passport, which says "running" until the run ends)."""
    options = trainer.options
    write_json(output_dir / "data_report.json", data.report())
    write_json(output_dir / "train_args.json", without_secrets(config.given))
    write_json(
        output_dir / "run.json",
        {
            "config": without_secrets(config.flat()),
            "defaults": unnamed_defaults(config),
            "resolved": {
                "precision": precision.name,
                "layout": options.layout,
                **asdict(options.choices),
                "examples_per_step": options.examples_per_step,
                "engine": options.engine.name,
            },
            "template": None if certificate is None else describe_template(encoder, certificate),
            "hashes": {
                "data": data.train.fingerprint,
                "eval_data": data.held_out.fingerprint if data.held_out else None,
                "tokenizer": encoder.tokenizer_hash,
                "base_weights": base_weights,
            },
            "seed": options.seed,
            "versions": package_versions(),
            "hardware": hardware(device),
            "git_commit": git_commit(Path.cwd()),
            "firefly_commit": git_commit(Path(__file__).parent),
            "notices": take_notices(),
            "total_steps": total_steps(trainer.args, len(trainer.get_train_dataloader())),
            "memory": {"forecast_parts": forecast.parts, "available_bytes": forecast.available},
            "world_size": trainer.args.world_size,
            "resumed_from": None if checkpoint is None else str(checkpoint),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "state": RUNNING,
            "process": this_process(),
        },
    )
