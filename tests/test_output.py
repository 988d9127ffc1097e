"""What a run prints is Firefly's: libraries' notes to their developers do not stand in it."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import firefly
from firefly.console import LIBRARIES_NOTES, LIBRARIES_WARNINGS, hush_libraries, notice, take_notices
from firefly.models.loading import embedded_model
from tiny import save_tiny_model, write_rows

OURS = re.compile(
    r"note: .+|[╭│╰].*|  rows\.jsonl:\d+: .+|(data|steps|parameters|compute|memory forecast|memory|chosen): .+"
    r"|2 processes, \w+: .+|step \d+/\d+  .+|done: the result is in .+"
)
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2"]


def strangers(tmp_path: Path, launcher: list[str], **changes: Any) -> list[str]:
    """The lines of a run on stderr that are not ours; its stdout must be the result's folder."""
    settings = {"train_file": str(write_rows(tmp_path / "rows.jsonl", 8)), "output_dir": str(tmp_path / "out")}
    settings |= {"template_name": "qwen", "max_steps": 2, "logging_steps": 1, "report_to": "tensorboard"}
    settings |= {"compare": False}
    settings |= {"per_device_train_batch_size": 2, "max_seq_length": 512, "eval_ratio": 0.25, "save_steps": 1} | changes
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings), encoding="utf-8")
    door = Path(firefly.__file__).parents[2] / "train.py"
    # torchrun has a banner of its own where nobody says how many threads a process has.
    environment = os.environ | {"PYTHONPATH": str(Path(firefly.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(door), "--train_args_file", str(config)]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out'}\n"
    return [line for line in done.stderr.splitlines() if not OURS.fullmatch(line)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "changes"),
    [
        ([], {"train_mode": "lora", "dataloader_num_workers": 1}),
        ([], {"train_mode": "qlora"}),
        ([], {"train_mode": "full", "gradient_checkpointing": True}),
        (TORCHRUN, {"train_mode": "lora"}),
        (TORCHRUN, {"train_mode": "full", "deepspeed": "ds_z2_config.json"}),
        (TORCHRUN, {"train_mode": "full", "fsdp": "full_shard", "fsdp_config": "fsdp_config.json"}),
    ],
    ids=["lora", "qlora", "full", "ddp", "zero2", "fsdp"],
)
def test_every_line_of_a_run_is_ours(tmp_path: Path, launcher: list[str], changes: dict[str, Any]) -> None:
    configurations = Path(firefly.__file__).parents[2] / "train_args"
    for key in ("deepspeed", "fsdp_config"):
        if key in changes:
            changes = changes | {key: str(configurations / changes[key])}
    model = str(save_tiny_model(tmp_path / "model"))
    assert strangers(tmp_path, launcher, model_name_or_path=model, **changes) == []


@pytest.mark.slow
def test_every_line_of_a_run_that_fetches_the_built_in_model_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIREFLY_CACHE", str(tmp_path / "cache"))
    model = "smollm2-135m-instruct"
    assert strangers(tmp_path, [], model_name_or_path=model, template_name="auto", train_mode="lora") == []
    assert (embedded_model() / "model.safetensors").is_file()


def test_hushing_twice_is_hushing_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "filters", list(warnings.filters))
    hush_libraries()
    before = list(warnings.filters), {name: list(logging.getLogger(name).filters) for name in LIBRARIES_NOTES}
    hush_libraries()
    assert (warnings.filters, {name: logging.getLogger(name).filters for name in LIBRARIES_NOTES}) == before
    assert all(len(set(filters)) == len(filters) for filters in before[1].values())


def test_notes_are_kept_back_and_anything_else_passes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "transformers")  # a run in this process has left it at ERROR
    hush_libraries()
    for name, note in LIBRARIES_NOTES.items():
        logging.getLogger(name).warning(f"{note.beginnings[0]} such")
    logging.getLogger("DeepSpeed").warning("a gradient overflowed")
    logging.getLogger("transformers.modeling_utils").warning("weights were not initialized")
    assert caplog.messages == ["a gradient overflowed", "weights were not initialized"]


def test_warnings_for_developers_are_kept_back_and_any_other_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hush_libraries()
        for beginning in LIBRARIES_WARNINGS:
            warnings.warn(f"{beginning} such", stacklevel=1)
        for category in (FutureWarning, DeprecationWarning):
            warnings.warn("this will go", category, stacklevel=1)
        warnings.warn("Found missing adapter keys", stacklevel=1)
    assert [str(each.message) for each in caught] == ["Found missing adapter keys"]


def test_who_looks_for_a_fault_sees_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "filters", [])
    monkeypatch.setenv("FIREFLY_DEBUG", "1")
    hush_libraries()
    assert warnings.filters == []
    monkeypatch.delenv("FIREFLY_DEBUG")
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    hush_libraries()
    assert warnings.filters == []
    monkeypatch.setattr(sys, "warnoptions", [])
    hush_libraries()
    assert FutureWarning in [category for _, _, category, *_ in warnings.filters]


def test_the_notices_of_a_thread_are_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    def beside() -> list[str]:
        notice("beside.one", "of a plan")
        return [item["code"] for item in take_notices()]

    take_notices()
    notice("run.one", "of a run")
    with ThreadPoolExecutor(1) as executor:
        assert executor.submit(beside).result() == ["beside.one"]
    notice("run.two", "of a run, too")
    assert [item["code"] for item in take_notices()] == ["run.one", "run.two"]
    assert take_notices() == []
    assert "note: of a plan" in capsys.readouterr().err
