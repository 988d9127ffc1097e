"""The notice of a run's end, whatever the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from firefly.cli import main
from firefly.console import take_notices
from firefly.runs import webhook
from firefly.runs.webhook import told_of_end
from tiny import save_tiny_model

PATIENCE = 60.0


@dataclass
class Receiver:
    """A server that keeps what it is sent; the first `refused` requests are answered with 500."""

    url: str = ""
    refused: int = 0
    got: list[dict[str, Any]] = field(default_factory=list)

    def one(self) -> dict[str, Any]:
        end = time.time() + PATIENCE
        while not self.got and time.time() < end:
            time.sleep(0.05)
        assert len(self.got) == 1
        return self.got[0]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.headers["Content-Type"] == "application/json"
            if found.refused:
                found.refused -= 1
                self.send_error(500)
                return
            found.got.append(body)
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found.url = f"http://127.0.0.1:{server.server_port}/hook?key=1"
    yield found
    server.shutdown()
    server.server_close()


def train(folder: Path, config: dict[str, Any]) -> int:
    (folder / "config.json").write_text(json.dumps(config))
    return main(["train", str(folder / "config.json")])


def test_a_run_that_ends_tells_what_came_of_it(tmp_path, receiver):
    model = save_tiny_model(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"q{i}", "output": "a"}) + "\n" for i in range(4)))
    config = {"model_name_or_path": str(model), "train_file": str(rows), "template_name": "qwen", "compare": False}
    config |= {"output_dir": str(tmp_path / "out"), "train_mode": "lora", "max_steps": 2, "logging_steps": 1}
    assert train(tmp_path, config | {"report_to": "none", "webhook": receiver.url}) == 0
    told = receiver.one()
    assert (told["event"], told["state"], told["steps"], told["total_steps"]) == ("finished", "finished", 2, 2)
    assert told["path"] == str(tmp_path / "out")
    assert told["loss"] > 0
    assert "is finished" in told["text"]


def test_a_run_that_is_refused_tells_why(tmp_path, receiver):
    config = {"model_name_or_path": str(save_tiny_model(tmp_path / "model")), "output_dir": str(tmp_path / "out")}
    config |= {"train_file": str(tmp_path / "missing.jsonl"), "template_name": "qwen", "webhook": receiver.url}
    assert train(tmp_path, config) == 2
    told = receiver.one()
    assert told["event"] == "failed"
    assert "missing.jsonl" in told["message"]
    assert "missing.jsonl" in told["text"]


def test_a_run_that_is_killed_is_told_of(tmp_path, receiver):
    program = f"""
import os, time
from pathlib import Path
from firefly.runs.webhook import told_of_end
with told_of_end({receiver.url!r}, Path({str(tmp_path / "out")!r})):
    if os.fork() == 0:  # a worker, which holds the pipe and outlives the run
        time.sleep(20)
        os._exit(0)
    print("ready", flush=True)
    time.sleep(60)
"""
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    run.send_signal(signal.SIGKILL)
    run.wait()
    told = receiver.one()
    assert told["event"] == "died"
    assert str(tmp_path / "out") in told["text"]


def test_ctrl_c_is_an_interruption(tmp_path, receiver):
    with pytest.raises(KeyboardInterrupt), told_of_end(receiver.url, tmp_path):
        raise KeyboardInterrupt
    assert receiver.one()["event"] == "interrupted"


def test_a_url_that_refuses_is_asked_again_and_then_named(tmp_path, receiver):
    receiver.refused = 1
    with told_of_end(receiver.url, tmp_path):
        pass
    assert receiver.one()["event"] == "finished"
    take_notices()
    with told_of_end("http://127.0.0.1:9/nobody", tmp_path):
        pass
    (found,) = take_notices()
    assert found["code"] == "webhook.failed"
    assert "refused" in found["message"]


def test_without_a_url_nothing_is_started(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    with told_of_end(None, tmp_path):
        pass


@pytest.mark.parametrize("url", ["example.org/hook", "ftp://example.org", "http://", "file:///etc/passwd"])
def test_what_is_no_url_is_refused(tmp_path, url, capsys):
    config = {"model_name_or_path": "m", "train_file": "f", "output_dir": str(tmp_path / "out"), "webhook": url}
    assert train(tmp_path, config) == 2
    assert "webhook" in capsys.readouterr().err


def test_the_process_beside_a_run_imports_nothing_heavy():
    code = "import sys; import firefly.runs.webhook; print([m for m in ('torch', 'numpy', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "[]"
    assert webhook.WAIT_SECONDS > webhook.PAUSE_SECONDS * (webhook.TRIES - 1)


def test_a_notice_of_a_folder_without_a_run(tmp_path: Path):
    told = webhook.describe_end(tmp_path, {"event": "failed", "message": "no room"})
    assert (told["event"], told["path"]) == ("failed", str(tmp_path))
    assert told["text"].endswith("no room")
