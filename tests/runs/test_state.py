"""Running, finished, interrupted or failed: what a run's folder proves, and no more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from firefly.console import notice, take_notices
from firefly.errors import FireflyError, UsageError
from firefly.runs.manifest import recorded_end, write_json
from firefly.runs.records import SILENCE_SECONDS, read_object, record_in
from run_folders import age, write_run


class Stopped(FireflyError):
    """What a signal would end a run with."""

    exit_code = 143


def state_of(folder: Path) -> str:
    record = record_in(folder)
    assert record is not None
    return record.state


def test_a_run_that_gives_no_sign_of_life_is_interrupted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", state="running", results=None)
    assert state_of(folder) == "running"
    age(folder, SILENCE_SECONDS + 60)
    assert state_of(folder) == "interrupted"
    (folder / "metrics.jsonl").touch()
    assert state_of(folder) == "running"


def test_results_of_an_earlier_run_do_not_make_a_new_one_finished(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", state="running")
    age(folder, SILENCE_SECONDS + 60)
    record = record_in(folder)
    assert record is not None
    assert (record.state, record.results) == ("interrupted", {})


# ---- how the end is recorded ----


@pytest.mark.parametrize(
    ("error", "state", "recorded"),
    [
        (None, "finished", None),
        (KeyboardInterrupt(), "interrupted", None),
        (Stopped("cli.interrupted", "interrupted."), "interrupted", None),
        (
            UsageError("config.no_file", "configuration file {path} does not exist.", path="x"),
            "failed",
            {
                "code": "config.no_file",
                "type": "UsageError",
                "message": "configuration file x does not exist.",
                "text": "configuration file {path} does not exist.",
                "values": {"path": "x"},
            },
        ),
        (
            torch.OutOfMemoryError("too much"),
            "failed",
            {"code": "cli.out_of_memory", "type": "OutOfMemoryError", "message": "too much"},
        ),
        (ZeroDivisionError("1/0"), "failed", {"code": None, "type": "ZeroDivisionError", "message": "1/0"}),
    ],
)
def test_the_end_of_a_run_is_in_its_manifest_and_an_error_goes_on(tmp_path, error, state, recorded):
    folder = write_run(tmp_path / "run", state="running", ended=None)
    take_notices()

    def end() -> None:
        with recorded_end(folder):
            notice("plots.failed", "{path} could not be drawn: {problem}.", path="loss.png", problem="no ink")
            if error:
                raise error

    if error is None:
        end()
    else:
        with pytest.raises(type(error)) as raised:
            end()
        assert raised.value is error
    manifest = read_object(folder / "run.json")
    assert (manifest["state"], manifest["error"]) == (state, recorded)
    assert manifest["ended"] > 0
    assert [item["code"] for item in manifest["notices"]] == ["precision.replaced", "plots.failed"]
    assert state_of(folder) == state


def test_an_end_that_cannot_be_recorded_does_not_hide_the_error(tmp_path):
    with pytest.raises(ZeroDivisionError), recorded_end(tmp_path / "gone"):
        raise ZeroDivisionError


def test_a_file_name_that_is_no_utf_8_can_be_recorded(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"file": "\udcb0.jsonl"})
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["file"] == "\udcb0.jsonl"
