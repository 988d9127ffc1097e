"""A tiny model, some rows and a configuration for whole runs."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runs.forking import Run, Server
from tiny import run_settings, save_tiny_model, write_rows

ROWS = 22  # four examples a step: five full steps and a last one of two


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a training file and an evaluation file."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny_model(folder / "model", "llama_tied")
    write_rows(folder / "train.jsonl", ROWS)
    write_rows(folder / "eval.jsonl", 7, seed=9)
    return folder


@pytest.fixture(scope="session")
def settings(place: Path) -> dict[str, Any]:
    """Two epochs of six steps, a checkpoint at every second one, with dropout."""
    return run_settings(
        place / "model",
        place / "train.jsonl",
        place / "out",
        train_mode="lora",
        lora_rank=4,
        lora_dropout=0.1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        tokens_per_microbatch=200,
        learning_rate=0.01,
        num_train_epochs=2,
        save_strategy="steps",
        save_steps=2,
        seed=1,
    )


@pytest.fixture(scope="session")
def config_file(settings: dict[str, Any], place: Path) -> Path:
    path = place / "config.json"
    path.write_text(json.dumps(settings))
    return path


@pytest.fixture
def run(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Train in this process, without pictures."""
    from firefly.config import load_config
    from firefly.training import train

    monkeypatch.setattr("firefly.runs.plots.draw_loss", lambda *_: None)

    def train_into(name: str = "out", **changes: Any) -> Path:
        return train(load_config(settings | {"output_dir": str(tmp_path / name)} | changes))

    gc.freeze()  # accelerate collects garbage after each run
    yield train_into
    gc.unfreeze()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()
