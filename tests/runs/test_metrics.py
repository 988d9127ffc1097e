"""What a run says while it trains: its pace measured right, and lines that read well on a terminal and in a file."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from firefly.runs.metrics import Pace, ProgressLine, RunRecorder
from firefly.runs.progress import Counts

CPU = torch.device("cpu")
ARGUMENTS = SimpleNamespace(device=CPU)
LOGS = {
    "loss": 0.69314,
    "rewards/accuracies": 0.75,
    "rewards/margins": 0.12345,
    "learning_rate": 1e-4,
    "grad_norm": 0.51234,
}
PACE = {"tokens_per_second": 12345.6, "target_share": 0.372, "memory_bytes": 2.6 * 2**30, "seconds_left": 3723.0}


class Clock:
    """Time that passes when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("firefly.runs.metrics.time", SimpleNamespace(time=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def flow(**what: bool) -> Any:
    return SimpleNamespace(**({"should_evaluate": False, "should_save": False} | what))


def state_at(step: int, max_steps: int = 20) -> Any:
    return SimpleNamespace(global_step=step, max_steps=max_steps, is_world_process_zero=True)


# ---- pace ----


def test_speed_and_share_are_those_since_the_last_log(clock):
    counts = Counts()
    pace = Pace(counts)
    pace.begin(0)
    counts.tokens, counts.targets, clock.now = 1000, 300, 1010.0
    first = pace.measure(1, 20, CPU)
    counts.tokens, counts.targets, clock.now = 3000, 1300, 1014.0
    second = pace.measure(3, 20, CPU)
    assert (first["tokens_per_second"], first["target_share"]) == (100, 0.3)
    assert (second["tokens_per_second"], second["target_share"]) == (500, 0.5)
    assert second["memory_bytes"] > 2**20


def test_the_time_left_is_told_by_the_steps_behind_without_the_first_log(clock):
    pace = Pace(Counts())
    pace.begin(10)  # resumed
    clock.now = 1060.0
    assert pace.measure(12, 20, CPU)["seconds_left"] == 30 * 8  # nothing better is known yet
    clock.now = 1064.0
    assert pace.measure(16, 20, CPU)["seconds_left"] == 1 * 4


def test_evaluations_and_checkpoints_are_no_training_time(clock):
    counts = Counts()
    pace = Pace(counts)
    pace.begin(0)
    counts.tokens, clock.now = 100, 1001.0
    pace.trained(CPU, flow(should_evaluate=True, should_save=True))
    clock.now = 1050.0
    pace.resume()  # evaluated
    clock.now = 1080.0
    pace.resume()  # saved
    counts.tokens, clock.now = 200, 1081.0
    pace.trained(CPU, flow())
    assert pace.measure(2, 4, CPU)["tokens_per_second"] == 100
    counts.tokens, clock.now = 300, 1082.0
    assert pace.measure(3, 4, CPU)["tokens_per_second"] == 100  # a pause counts once


# ---- metrics.jsonl ----


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def recorder(tmp_path: Path, clock: Clock) -> RunRecorder:
    recorder = RunRecorder(tmp_path, Counts(), started=clock.now)
    recorder.on_train_begin(ARGUMENTS, state_at(0), flow())
    return recorder


def test_a_training_log_gets_the_pace_and_so_do_the_callbacks_behind(tmp_path, recorder, clock):
    recorder.counts.add(SimpleNamespace(examples=2, input_tokens=50, targets=20))  # type: ignore[arg-type]
    clock.now += 5
    logs = {"loss": 1.0}
    recorder.on_log(ARGUMENTS, state_at(1), flow(), logs)
    evaluated = {"eval_loss": 2.0}
    recorder.on_log(ARGUMENTS, state_at(1), flow(), evaluated)
    assert logs.keys() == {"loss", *PACE}
    assert evaluated == {"eval_loss": 2.0}
    first, second = lines_of(tmp_path)
    assert first | logs == first
    assert (first["step"], first["input_tokens"], first["target_tokens"]) == (1, 50, 20)
    assert (first["tokens_per_second"], first["target_share"]) == (10, 0.4)
    assert second.keys() == {"step", "eval_loss", "time", "input_tokens", "target_tokens", "input_tokens_per_second"}


def test_a_long_silence_between_logs_is_broken_by_signs_of_life(recorder, clock, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.touch()
    written = path.stat().st_mtime_ns
    clock.now += 20
    recorder.on_step_end(ARGUMENTS, state_at(1), flow())
    assert path.stat().st_mtime_ns == written
    clock.now += 20
    recorder.on_prediction_step(ARGUMENTS, state_at(1), flow())
    assert path.stat().st_mtime_ns > written


# ---- progress ----


class Terminal(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Any:
    def show(show_bar: bool, *logs: dict[str, Any]) -> str:
        stream = Terminal(show_bar)
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda _: (80, 24))
        progress = ProgressLine(show_bar)
        progress.on_train_begin(ARGUMENTS, state_at(0, 1000), flow())
        for step, log in enumerate(logs, 1):
            progress.on_step_end(ARGUMENTS, state_at(step, 1000), flow())
            progress.on_log(ARGUMENTS, state_at(step, 1000), flow(), log)
        progress.on_train_end(ARGUMENTS, state_at(1000, 1000), flow())
        return stream.getvalue()

    return show


def test_a_file_gets_one_plain_line_a_log(screen):
    text = screen(False, LOGS | PACE, {"eval_loss": 0.5}, {"train_runtime": 3.0})
    assert text.splitlines() == [
        "step 1/1000  loss 0.6931  accuracy 0.75  margin 0.123  lr 1.00e-04  grad 0.512  "
        "12,346 tokens/s  37% targets  2.6 GiB  1:02:03 left",
        "step 2/1000  eval_loss 0.5000",
    ]
    assert "\r" not in text


def test_a_terminal_gets_short_lines_and_the_pace_in_the_bar(screen):
    text = screen(True, LOGS | PACE, {"eval_loss": 0.5}, {})
    parts = text.replace("\n", "\r").split("\r")
    line = next(part for part in parts if part.strip().startswith("step 1/1000"))
    assert line.strip() == "step 1/1000  loss 0.6931  accuracy 0.75  margin 0.123  lr 1.00e-04  grad 0.512"
    bars = [part for part in parts if "%|" in part]
    assert "12,346 tokens/s, 37% targets, 2.6 GiB]" in bars[-1]  # an evaluation does not wipe it away
    assert max(len(part) for part in parts) <= 80


def test_the_progress_is_chinese_with_firefly_lang_zh(screen, monkeypatch):
    monkeypatch.setenv("FIREFLY_LANG", "zh")
    text = screen(False, LOGS | PACE)
    assert text.startswith("步 1/1000  loss 0.6931")
    assert "12,346 token/秒  目标 37%  2.6 GiB  剩余 1:02:03" in text
