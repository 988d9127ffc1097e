"""The files that record what was trained: as configured, and as resolved."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from firefly.config import Config
from firefly.console import stderr_console, take_notices
from firefly.data.certificate import Certificate
from firefly.data.encoding import Encoder
from firefly.distributed.model import TrainableModel
from firefly.run import Run
from firefly.runs.manifest import git_commit, hardware, package_versions, record_memory, write_json
from firefly.runs.memory import peak_memory
from firefly.runs.overview import show_peak
from firefly.runs.records import RUNNING
from firefly.setup.build import ModelFacts


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


def write_records(run: Run, model: TrainableModel, facts: ModelFacts) -> None:
    """train_args.json (as given) and run.json (the manifest, which says "running" until the run ends)."""
    data = run.data
    write_json(run.folder / "data_report.json", data.report())
    write_json(run.folder / "train_args.json", without_secrets(run.config.given))
    write_json(
        run.folder / "run.json",
        {
            "config": without_secrets(run.config.flat()),
            "defaults": unnamed_defaults(run.config),
            "resolved": {
                "precision": run.precision.name,
                **({"product_rates": asdict(run.precision.rates)} if run.precision.rates else {}),
                "layout": model.layout,
                **asdict(model.choices),
                "examples_per_step": run.step_settings.examples_per_step,
                "engine": run.backend.name,
            },
            "template": None if facts.certificate is None else describe_template(run.encoder, facts.certificate),
            "hashes": {
                "data": data.train.fingerprint,
                "eval_data": data.held_out.fingerprint if data.held_out else None,
                "tokenizer": run.encoder.tokenizer_hash,
                "base_weights": facts.base_weights,
            },
            "seed": run.step_settings.seed,
            "versions": package_versions(),
            "hardware": hardware(run.device),
            "git_commit": git_commit(Path.cwd()),
            "firefly_commit": git_commit(Path(__file__).parent),
            "notices": take_notices(),
            "total_steps": run.total_steps,
            "memory": {"forecast_parts": facts.forecast.parts, "available_bytes": facts.forecast.available},
            "world_size": run.args.world_size,
            "resumed_from": None if run.checkpoint is None else str(run.checkpoint),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "state": RUNNING,
            "process": {"host": platform.node(), "pid": os.getpid()},
        },
    )


def write_results(run: Run, facts: ModelFacts, results: dict[str, Any]) -> None:
    """train_results.json, and what memory was taken beside what was forecast.

    A run that found nothing left to train leaves the numbers of the one that trained it.
    """
    path = run.folder / "train_results.json"
    if results["steps"] or not path.is_file():
        memory = facts.forecast.beside(peak_memory(run.device) - run.imported_bytes, run.device.type)
        write_json(path, results | memory)
        record_memory(run.folder, memory)
        show_peak(stderr_console(), memory)
