"""Commands that outlive whoever started them, and the queue of trainings."""

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

from firefly.cli import main
from firefly.errors import UsageError
from firefly.runs import jobs
from firefly.runs.jobs import Job, list_jobs, new_job, read_job
from firefly.runs.queue import LOCK_FILE, enqueue
from tiny import save_tiny_model

PATIENCE = 90.0


def until(holds: Callable[[], Any], what: str) -> Any:
    end = time.time() + PATIENCE
    while time.time() < end:
        if found := holds():
            return found
        time.sleep(0.1)
    pytest.fail(f"it never came to this: {what}")


def state_of(job: Job) -> str:
    found = read_job(job.folder)
    assert found is not None
    return found.state


def pretend(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Jobs run this Python program in place of firefly's command line."""
    monkeypatch.setattr(jobs, "FIREFLY", (sys.executable, "-c", program))


def test_a_job_says_how_it_ended_and_what_it_said(tmp_path, monkeypatch):
    pretend(monkeypatch, "import sys; print('said', sys.argv[1:]); sys.exit(3)")
    job = new_job(tmp_path, ["check", "a b; rm -rf /"], output="out")
    assert job.state == jobs.WAITING
    assert jobs.run(job) == 3
    found = read_job(job.folder)
    assert found is not None
    assert (found.state, found.ended["code"]) == ("failed", 3)
    assert found.log == "said ['check', 'a b; rm -rf /']\n"  # one argument, as it was: no shell reads it


def test_a_job_outlives_whoever_started_it_and_gives_way(tmp_path):
    program = """
import sys
from pathlib import Path
from firefly.runs import jobs
job = jobs.new_job(Path(sys.argv[1]), ["runs", "list", "--json"])
jobs.start(job)
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=tmp_path)  # which is gone now
    (job,) = list_jobs(tmp_path)
    until(lambda: state_of(job) == "finished", "the job is finished")
    found = read_job(job.folder)
    assert found is not None
    assert found.log == "[]\n"


def test_stopping_asks_the_command_itself(tmp_path, monkeypatch):
    program = """
import signal, sys, time
def stop(*_):
    print("saved", flush=True); sys.exit(143)
signal.signal(signal.SIGTERM, stop); print("ready", flush=True); time.sleep(60)
"""
    pretend(monkeypatch, program)
    job = new_job(tmp_path, ["train"])
    child = os.fork()
    if child == 0:
        os._exit(jobs.run(job) % 256)
    try:
        until(lambda: "ready" in job.log, "the command is ready")
        assert state_of(job) == "running"
        found = read_job(job.folder)
        assert found is not None
        assert os.getpriority(os.PRIO_PROCESS, found.started["command"]["pid"]) >= jobs.NICENESS
        with pytest.raises(UsageError, match="stop it first"):
            jobs.remove(found)
        jobs.stop(found)
        until(lambda: state_of(job) == "interrupted", "the job is interrupted")
    finally:
        os.waitpid(child, 0)
    assert "saved" in job.log
    with pytest.raises(UsageError, match="does not run"):
        jobs.stop(read_job(job.folder))
    jobs.remove(read_job(job.folder))
    assert list_jobs(tmp_path) == []


def test_a_job_whose_processes_were_killed_is_interrupted_and_its_number_may_be_anothers(tmp_path):
    job = new_job(tmp_path, ["train"])
    mine = jobs.describe_process(os.getpid())
    other = {"pid": os.getpid(), "born": (mine["born"] or 0) - 1}
    for started, state in ((mine, "running"), (other, "interrupted"), ({"pid": 2**22 + 1, "born": 1}, "interrupted")):
        (job.folder / "started.json").write_text(json.dumps({"runner": started, "command": started, "time": 0}))
        assert state_of(job) == state


def test_what_failed_says_why(tmp_path, monkeypatch):
    pretend(monkeypatch, "print('note: a'); print('error: no such file.'); print('  more'); exit(2)")
    job = new_job(tmp_path, ["merge"])
    jobs.run(job)
    found = read_job(job.folder)
    assert found is not None
    assert found.problem() == "error: no such file."


def test_progress_bars_leave_their_last_state_in_the_log(tmp_path):
    job = new_job(tmp_path, ["train"])
    (job.folder / "log.txt").write_bytes("begin\n 1%\r 50%\r100%\nend\n\xff".encode("latin-1"))
    assert job.log == "begin\n100%\nend\n�"


def test_damaged_folders_are_no_jobs(tmp_path):
    for name, text in (("a", "{"), ("b", "[]"), ("c", '{"arguments": 3}'), ("d", '{"arguments": ["x"], "odd": 1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "job.json").write_text(text)
    assert list_jobs(tmp_path) == []
    assert list_jobs(tmp_path / "none") == []


# ---- the queue ----


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


def configuration(tmp_path: Path, model: str, name: str, **more: Any) -> Path:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"q{i}", "output": "a"}) + "\n" for i in range(4)))
    values = {"model_name_or_path": model, "train_file": str(rows), "output_dir": str(tmp_path / name)}
    values |= {"train_mode": "lora", "max_steps": 1, "compare": False, "report_to": "none", "template_name": "qwen"}
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(values | more))
    return path


def test_the_queue_trains_in_order_past_one_that_fails_and_says_why(tmp_path, model, capsys):
    good = configuration(tmp_path, model, "good")
    bad = configuration(tmp_path, model, "bad", train_file=str(tmp_path / "missing.jsonl"))
    last = configuration(tmp_path, model, "last")
    queue = str(tmp_path / "queue")
    assert main(["queue", "add", str(good), str(bad), str(last), "--folder", queue]) == 0
    names = capsys.readouterr().out.split()
    good.write_text("{}")  # what was added is a copy
    assert main(["queue", "run", "--folder", queue]) == 3
    told = capsys.readouterr().err
    assert names[1] in told
    assert "missing.jsonl" in told
    main(["queue", "list", "--folder", queue, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [job["id"] for job in found] == names
    assert [job["state"] for job in found] == ["finished", "failed", "finished"]
    assert "missing.jsonl" in found[1]["problem"]
    assert (tmp_path / "good" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "last" / "adapter_model.safetensors").is_file()
    assert main(["queue", "list", "--folder", queue]) == 0
    assert "missing.jsonl" in capsys.readouterr().out
    assert main(["queue", "remove", *names, "--folder", queue]) == 0
    assert list_jobs(Path(queue)) == []


def test_a_configuration_that_is_wrong_is_refused_before_anything_is_queued(tmp_path, model, capsys):
    good = configuration(tmp_path, model, "good")
    wrong = configuration(tmp_path, model, "wrong", lora_rnak=8)
    queue = tmp_path / "queue"
    assert main(["queue", "add", str(good), str(wrong), "--folder", str(queue)]) == 2
    assert "lora_rank" in capsys.readouterr().err
    assert list_jobs(queue) == []


def test_one_process_runs_a_queue_and_names_itself(tmp_path, capsys):
    from firefly.files import hold

    with hold(tmp_path / LOCK_FILE):
        assert main(["queue", "run", "--folder", str(tmp_path)]) == 2
    assert str(os.getpid()) in capsys.readouterr().err


def test_a_signal_stops_the_job_that_runs_and_leaves_the_others_waiting(tmp_path):
    program = "import time; print('ready', flush=True); time.sleep(60)"
    folder = tmp_path / "queue"
    first = enqueue(folder, {"output_dir": "a"}, name="first")
    second = enqueue(folder, {"output_dir": "b"}, name="second")
    code = f"""
import sys
from firefly.cli import main
from firefly.runs import jobs
jobs.FIREFLY = (sys.executable, "-c", {program!r})
sys.exit(main(["queue", "run", "--folder", {str(folder)!r}]))
"""
    queue = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        until(lambda: "ready" in first.log, "the first runs")
        queue.send_signal(signal.SIGTERM)
        assert queue.wait(PATIENCE) == -signal.SIGTERM
    finally:
        queue.kill()
    assert state_of(first) == "interrupted"
    assert state_of(second) == "waiting"
    assert main(["queue", "stop", "--folder", str(folder)]) == 2  # none runs
