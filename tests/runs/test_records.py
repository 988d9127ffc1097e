"""Reading runs back: found in folders, with what is missing or damaged left out."""

from __future__ import annotations

import json

import pytest

from firefly.errors import UsageError
from firefly.runs.records import find_runs, last_values, read_metrics, read_run, record_in, series
from run_folders import STARTED, log_lines, write_run


def test_runs_are_found_to_a_sensible_depth_newest_first(tmp_path):
    write_run(tmp_path / "output" / "old", started="2026-11-20T10:00:00+0000")
    write_run(tmp_path / "output" / "deep" / "er" / "new", started="2026-11-24T10:00:00+0000")
    write_run(tmp_path / "output" / "a" / "b" / "c" / "too_deep")
    write_run(tmp_path / "output" / "old" / "checkpoint-3")
    write_run(tmp_path / "output" / "old" / "earlier-20261120-100000")
    write_run(tmp_path / "output" / ".hidden")
    (tmp_path / "output" / "other").mkdir()
    (tmp_path / "output" / "other" / "run.json").write_text('{"model_name_or_path": "a configuration"}')
    (tmp_path / "output" / "broken").mkdir()
    (tmp_path / "output" / "broken" / "run.json").write_text('{"config": {')
    found = find_runs([tmp_path / "output", str(tmp_path / "output" / "deep" / ".." / "old")])
    assert [record.folder.name for record in found] == ["new", "old"]


def test_a_run_is_opened_by_its_folder_or_its_run_json(tmp_path):
    folder = write_run(tmp_path / "run")
    assert read_run(folder).folder == read_run(str(folder / "run.json")).folder == folder


@pytest.mark.parametrize("name", ["", "nothing", "file.txt"])
def test_what_holds_no_run_is_a_fault_of_the_input(tmp_path, name):
    (tmp_path / "file.txt").touch()
    with pytest.raises(UsageError) as raised:
        read_run(tmp_path / name)
    assert raised.value.code == "runs.not_a_run"
    with pytest.raises(UsageError) as raised:
        find_runs([tmp_path / "nowhere"])
    assert raised.value.code == "runs.no_folder"


def test_a_run_tells_its_steps_losses_and_time(tmp_path):
    folder = write_run(tmp_path / "run", losses={5: 3.0, 10: 2.0, 15: 1.0}, eval_losses={10: 2.5}, total_steps=40)
    for step, files in ((10, ["plan.json"]), (18, []), (2, ["plan.json"])):
        (folder / f"checkpoint-{step}").mkdir()
        for name in files:
            (folder / f"checkpoint-{step}" / name).touch()
    record = read_run(folder)
    assert (record.loss, record.eval_loss, record.total_steps) == (1.0, 2.5, 40)
    assert record.steps == 18  # a checkpoint proves more than the last log
    assert record.checkpoints == [(2, True), (10, True), (18, False)]
    assert (record.started, record.seconds) == (STARTED, 200)


def test_the_time_of_an_interrupted_run_ends_with_its_last_log(tmp_path):
    folder = write_run(tmp_path / "run", losses={1: 2.0, 10: 1.0}, state="interrupted", ended=None)
    assert read_run(folder).seconds == 90


@pytest.mark.parametrize(
    "manifest",
    [
        {"config": {}},
        {"config": {"task_type": "sft"}, "hashes": None, "resolved": [], "notices": None, "started": 7},
        {"config": {}, "state": "melted", "ended": "yesterday", "error": "bad", "total_steps": "many", "process": 3},
    ],
)
def test_missing_and_strange_fields_are_no_errors(tmp_path, manifest):
    (tmp_path / "run.json").write_text(json.dumps(manifest))
    record = record_in(tmp_path)
    assert record is not None
    shown = record.as_dict()
    assert (shown["steps"], shown["total_steps"], shown["loss"], shown["error"]) == (0, None, None, None)
    assert (record.metrics, record.results, record.data) == ([], {}, {})
    assert record.state in ("running", "interrupted")


def test_numbers_that_json_lacks_are_null(tmp_path):
    folder = write_run(tmp_path / "run", losses={1: float("nan")}, eval_losses={1: float("inf")})
    shown = read_run(folder).as_dict()
    assert (shown["loss"], shown["eval_loss"]) == (None, None)


def test_a_torn_last_line_of_the_metrics_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps(line) + "\n" for line in log_lines({1: 2.0, 2: 1.5}))
    path.write_text(whole + '{"step": 3, "lo')
    assert series(read_metrics(path), "loss") == {1: 2.0, 2: 1.5}
    assert last_values(path, ("loss", "step", "eval_loss")) == {"loss": 1.5, "step": 2, "eval_loss": None}
