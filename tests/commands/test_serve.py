"""`firefly serve`: what it is started with, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from firefly import cli
from firefly.commands import serve
from firefly.errors import UsageError
from tiny import save_tiny_model

pytest.importorskip("fastapi", reason="firefly-llm[serve] is not installed")


def refused(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["serve", "--model_name_or_path", "none", *arguments]) == 2
    return capsys.readouterr().err


def test_other_machines_come_in_only_with_a_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(serve.KEYS, raising=False)
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.com"):
        assert "--api_key" in refused("--host", host, capsys=capsys)
    assert "--api_key" in refused("--cors_origin", "*", capsys=capsys)


def test_a_port_that_is_taken_is_said_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port}" in refused("--port", str(port), capsys=capsys)


def test_keys_come_from_the_command_line_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(serve.KEYS, "two, three,")
    assert serve.read_keys(["one", "two"]) == ("one", "two", "three")
    for key in ("", " x", "a\nb", "密钥"):
        with pytest.raises(UsageError):
            serve.read_keys([key])


def test_a_missing_package_is_named_with_what_installs_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'firefly-llm[serve]'" in refused(capsys=capsys)


@pytest.mark.slow
def test_a_process_serves_a_base_and_adapters_and_ends_well_when_it_is_told_to(tmp_path: Path) -> None:
    from firefly.config import AdapterConfig
    from firefly.models.adapters import attach_adapter
    from tiny import randomise_adapters, tiny_model

    base = save_tiny_model(tmp_path / "base")
    for number, name in enumerate(("one", "two")):
        wrapped = attach_adapter(tiny_model("llama"), AdapterConfig(mode="lora", rank=4, alpha=8 * (number + 1)))
        randomise_adapters(wrapped).save_pretrained(tmp_path / name)
    command = [sys.executable, "-c", "from firefly.cli import run; run()", "serve", "--port", "0"]
    command += ["--model_name_or_path", str(base), "--template_name", "qwen", "--dtype", "float32"]
    command += ["--adapter_name_or_path", str(tmp_path / "one"), "--adapter_name_or_path", f"b={tmp_path / 'two'}"]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=os.environ | {serve.KEYS: "secret", "FIREFLY_LANG": "en"}
        )
    try:
        end = time.monotonic() + 120
        while not (found := re.search(r"Serving (.*) at (\S+)/v1", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end
            time.sleep(0.1)
        assert found[1] == "base, one, b"

        def ask(path: str, body: Any = None) -> Any:
            headers = {"Authorization": "Bearer secret"}
            data = None if body is None else json.dumps(body).encode()
            with urllib.request.urlopen(urllib.request.Request(f"{found[2]}{path}", data, headers)) as response:
                return json.load(response)

        assert [model["id"] for model in ask("/v1/models")["data"]] == ["base", "one", "b"]
        asked = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 8, "temperature": 0}
        answers = {name: ask("/v1/chat/completions", asked | {"model": name}) for name in ("base", "one", "b")}
        texts = {name: answer["choices"][0]["message"]["content"] for name, answer in answers.items()}
        assert len(set(texts.values())) == 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
