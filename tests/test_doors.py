"""The tutorial's doors do what the commands do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tiny import save_tiny_model, write_rows

ROOT = Path(__file__).resolve().parent.parent
PYTHON = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The tutorial's own configuration but for its paths and sizes."""
    settings: dict[str, Any] = json.loads((ROOT / "train_args/sft/qlora/qwen1.5-14b-sft-qlora.json").read_text())
    settings |= {
        "model_name_or_path": str(save_tiny_model(tmp_path / "model", "llama")),
        "train_file": str(write_rows(tmp_path / "train.jsonl", 8)),
        "output_dir": str(tmp_path / "out"),
        "template_name": "default",
        "max_steps": 2,
        "dataloader_num_workers": 0,
        "report_to": "none",
        "compare": False,
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(settings))
    return file


def call(*command: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | environment)


@pytest.mark.parametrize(
    ("launcher", "extra"), [(PYTHON, ["--local_rank", "0"]), (TORCHRUN, [])], ids=["python", "torchrun"]
)
def test_the_tutorials_training_command_trains(launcher: list[str], extra: list[str], config: Path) -> None:
    done = call(*launcher, "train.py", "--train_args_file", str(config), *extra)
    assert done.returncode == 0, done.stderr
    assert json.loads((config.parent / "out" / "train_results.json").read_text())["steps"] == 2


def test_a_fault_of_the_users_is_one_message_and_exit_code_2(config: Path) -> None:
    done = call(*PYTHON, "train.py", "--train_args_file", str(config), "--lora_rnak", "8")
    assert done.returncode == 2
    assert "lora_rank" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("folder", "script"), [(ROOT, "script/merge_lora.py"), (ROOT / "script" / "chat", "chat.py")])
def test_the_other_doors_take_flags_from_their_folders(folder: Path, script: str) -> None:
    done = call(*PYTHON, script, "--help", folder=folder)
    assert done.returncode == 0
    assert "--adapter_name_or_path" in done.stdout
