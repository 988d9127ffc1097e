"""`checkpoint_samples`: what the model says at each checkpoint, with training untouched by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from firefly import samples
from firefly.cli import main
from firefly.config import load_config
from firefly.evaluation import in_run
from firefly.runs.records import read_run
from firefly.training import train
from tiny import run_settings, save_tiny_model, write_rows

Run = Callable[..., Path]
STEPS = 4


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr("firefly.runs.plots.draw_loss", lambda *_: None)
    monkeypatch.setattr(in_run, "HELD_OUT_TOKENS", 5)
    save_tiny_model(tmp_path / "llama", "llama")
    write_rows(tmp_path / "sft.jsonl", 18)
    pairs = [{"prompt": f"question {number}", "chosen": "good", "rejected": "bad"} for number in range(18)]
    (tmp_path / "reward.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")

    def train_into(name: str, task: str = "sft", **changes: Any) -> Path:
        rows = tmp_path / f"{task}.jsonl"
        settings = run_settings(tmp_path / "llama", rows, tmp_path / name, task_type=task, train_mode="lora")
        settings |= {"max_steps": STEPS, "learning_rate": 0.05, "lora_dropout": 0.2, "per_device_train_batch_size": 4}
        settings |= {"save_strategy": "steps", "save_steps": 2, "compare": False, "checkpoint_samples": 3}
        return train(load_config(settings | changes))

    return train_into


def said(folder: Path) -> dict[int, list[tuple[str, str]]]:
    """Step → (question, answer)."""
    found: dict[int, list[tuple[str, str]]] = {}
    for line in read_run(folder).samples:
        found.setdefault(line["step"], []).append((line["question"], line["answer"]))
    return found


@pytest.mark.parametrize("more", [{}, {"eval_ratio": 0.3}])
def test_the_same_prompts_are_answered_at_every_checkpoint_and_training_is_the_same(
    more: dict[str, Any], run: Run
) -> None:
    asked, silent = run("asked", **more), run("silent", **more, checkpoint_samples=0)
    found = said(asked)
    assert list(found) == [0, 2, 4]
    questions = [[question for question, _ in answers] for answers in found.values()]
    assert questions[0] == questions[1] == questions[2]
    assert len(set(questions[0])) == 3
    assert found[0] != found[4]  # it has learnt something
    weights, expected = (load_file(folder / "checkpoint-4/adapter_model.safetensors") for folder in (asked, silent))
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert not (silent / "samples.jsonl").exists()


def test_a_resumed_run_has_every_step_once(run: Run) -> None:
    out = run("out")
    before = said(out)
    run("out", resume_from_checkpoint=str(out / "checkpoint-2"))
    assert said(out) == before


def test_another_run_in_the_folder_begins_anew(run: Run) -> None:
    run("out")
    out = run("out", max_steps=2)
    assert list(said(out)) == [0, 2]


def test_an_engine_that_fails_ends_the_asking_and_not_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no engine")

    monkeypatch.setattr(samples, "ask_model", fail)
    out = run("out")
    assert (out / "adapter_model.safetensors").is_file()
    notices = [notice["code"] for notice in json.loads((out / "run.json").read_text(encoding="utf-8"))["notices"]]
    assert notices.count("samples.failed") == 1


def test_a_reward_model_says_nothing_and_that_is_said(run: Run) -> None:
    out = run("out", task="reward")
    notices = [notice["code"] for notice in json.loads((out / "run.json").read_text(encoding="utf-8"))["notices"]]
    assert "samples.impossible" in notices
    assert not (out / "samples.jsonl").exists()


def test_showing_a_run_shows_its_last_answers(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("out")
    capsys.readouterr()
    assert main(["runs", "show", str(out), "--json"]) in (0, None)
    shown = json.loads(capsys.readouterr().out)
    assert [line["step"] for line in shown["samples"]] == [0] * 3 + [2] * 3 + [4] * 3
    main(["runs", "show", str(out)])
    text = capsys.readouterr().out
    assert "what the model said at its last checkpoint" in text
    assert said(out)[4][0][0][:20] in text
