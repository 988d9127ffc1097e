"""What whole runs leave for those who look on and those who look back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import firefly
from firefly.cli import main
from firefly.commands.runs import compare_runs
from firefly.config import load_config
from firefly.errors import UsageError
from firefly.runs.records import SILENCE_SECONDS, read_metrics, read_run, series
from firefly.tasks.causal import TokenTask
from firefly.training import train
from run_folders import age
from tiny import run_settings, save_tiny_model, write_rows

STEPS = 3
PACE = {"tokens_per_second", "target_share", "memory_bytes", "seconds_left"}
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("place")
    return run_settings(
        save_tiny_model(place / "model"),
        write_rows(place / "train.jsonl", 12),
        place / "out",
        train_mode="lora",
        lora_rank=4,
        per_device_train_batch_size=4,
        tokens_per_microbatch=200,
        num_train_epochs=1,
    )


@pytest.fixture
def run(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr("firefly.runs.plots.draw_loss", lambda *_: None)  # it takes longer than the training

    def train_into(name: str = "out", **changes: Any) -> Path:
        return train(load_config(settings | {"output_dir": str(tmp_path / name)} | changes))

    return train_into


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def test_a_finished_run_says_all_that_a_list_of_runs_needs(run, settings):
    record = read_run(run(eval_file=settings["train_file"]))
    assert (record.state, record.steps, record.total_steps, record.error) == ("finished", STEPS, STEPS, {})
    assert record.manifest["world_size"] == 1
    assert record.manifest["resumed_from"] is None
    assert record.manifest["defaults"]["weight_decay"] == 0.0
    assert not record.manifest["defaults"].keys() & record.config.keys()
    assert record.loss is not None
    assert record.eval_loss is not None
    assert 0 < (record.seconds or 0) < 600


def test_a_resumed_run_names_its_checkpoint(run):
    out = run(save_strategy="steps", save_steps=2, max_steps=2)
    run(save_strategy="steps", save_steps=2, resume_from_checkpoint=True)
    manifest = manifest_of(out)
    assert manifest["resumed_from"] == str(out / "checkpoint-2")
    assert (manifest["state"], manifest["total_steps"]) == ("finished", STEPS)


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (MemoryError("all gone"), "failed", "cli.out_of_memory"),
        (UsageError("config.no_file", "{path} does not exist.", path="x"), "failed", "config.no_file"),
        (KeyboardInterrupt(), "interrupted", None),
    ],
)
def test_a_run_that_does_not_end_well_says_how(run, tmp_path, monkeypatch, error, state, code):
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(TokenTask, "microbatch_loss", fail)
    with pytest.raises(type(error)):
        run()
    record = read_run(tmp_path / "out")
    assert (record.state, record.error.get("code"), record.steps) == (state, code, 0)


def test_a_run_of_the_same_seed_is_the_same_run_and_one_of_another_is_told_from_it(run):
    first, again, other = (read_run(run(name, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert not any(compare_runs(first, again).values())
    assert series(first.metrics, "loss") == series(again.metrics, "loss")
    assert {part: list(pairs) for part, pairs in compare_runs(first, other).items() if pairs} == {"settings": ["seed"]}
    assert series(first.metrics, "loss") != series(other.metrics, "loss")


def test_each_training_log_tells_the_pace(run):
    lines = [line for line in read_metrics(run() / "metrics.jsonl") if "loss" in line]
    assert len(lines) == STEPS
    assert all(line.keys() >= PACE for line in lines)
    assert all(line["tokens_per_second"] > 0 and 0 < line["target_share"] < 1 for line in lines)
    assert lines[0]["memory_bytes"] > 50 << 20
    assert [line["seconds_left"] > 0 for line in lines] == [True, True, False]


def test_what_a_checkpoint_holds_does_not_depend_on_the_clock(run):
    out = run(save_strategy="steps", save_steps=STEPS)
    state = json.loads((out / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    assert len(state["log_history"]) == STEPS
    assert not {name for line in state["log_history"] for name in line} & PACE


def test_events_hold_the_loss_the_pace_and_the_manifest(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = run(report_to=["tensorboard"])
    (file,) = out.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", *(f"train/{name}" for name in PACE)} <= set(tags["scalars"])
    (event,) = events.Tensors("run.json/text_summary")
    assert '"lora_rank": 4' in event.tensor_proto.string_val[0].decode()


def test_events_are_left_where_nothing_is_said_and_not_where_none_is_asked_for(run, settings, tmp_path):
    unsaid = {name: value for name, value in settings.items() if name != "report_to"}
    out = train(load_config(unsaid | {"output_dir": str(tmp_path / "unsaid")}))
    assert len(list(out.rglob("events.out.tfevents.*"))) == 1
    assert list(run("none").rglob("events.out.tfevents.*")) == []


def test_a_tracker_that_is_not_installed_stops_a_run_before_it_starts(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("firefly.runs.trackers.find_spec", lambda name: None if name == "wandb" else name)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(settings | {"output_dir": str(tmp_path / "out"), "report_to": ["wandb"]}))
    assert main(["train", str(file)]) == 2
    assert capsys.readouterr().err == "error: report_to: wandb is not installed. Install it with: pip install wandb\n"


@pytest.mark.slow
def test_a_killed_run_is_seen_running_and_then_interrupted(settings, tmp_path):
    out, file = tmp_path / "out", tmp_path / "config.json"
    file.write_text(json.dumps(settings | {"output_dir": str(out), "max_steps": 100_000, "logging_steps": 2}))
    code = f"from firefly.cli import main; main(['train', {str(file)!r}])"
    environment = os.environ | {"PYTHONPATH": str(Path(firefly.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    until = time.time() + 120
    while len(read_metrics(out / "metrics.jsonl")) < 3 and process.poll() is None and time.time() < until:
        time.sleep(0.1)
    running = read_run(out)
    assert (running.state, running.total_steps) == ("running", 100_000)
    process.send_signal(signal.SIGKILL)
    _, lines = process.communicate()
    age(out, SILENCE_SECONDS)
    killed = read_run(out)
    assert killed.state == "interrupted"
    assert killed.steps >= 6
    assert b"\r" not in lines  # no bar where there is no terminal
