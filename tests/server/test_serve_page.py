"""The commands and the program of the page on serving, run as they stand but for addresses and names."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from serving import FakeEngine, Running, generator_of, running

from firefly import cli
from firefly.server import running as firefly_running
from firefly.server.service import Service

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("docs/serve.md", "docs/zh/serve.md")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)


def here(text: str, served: Running) -> str:
    return re.sub(r"http://127\.0\.0\.1:\d+", served.address, text).replace("smollm2-135m-instruct", "tiny")


def test_both_pages_have_the_same_commands_and_program() -> None:
    for language in ("bash", "python"):
        assert blocks(PAGES[0], language) == blocks(PAGES[1], language)


def test_the_program_of_the_page_prints_an_answer(served: Running, capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = blocks(PAGES[0], "python")
    exec(compile(here(program, served), PAGES[0], "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_commands_of_the_page_are_answered(served: Running) -> None:
    commands = [block for block in blocks(PAGES[0], "bash") if block.startswith("curl")]
    assert len(commands) == 2
    for command in commands:
        done = subprocess.run([*shlex.split(here(command, served)), "-sf"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert '"model' in done.stdout


def test_the_serve_commands_of_the_page_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but loading: the model is an engine whose answers are known."""
    from firefly.generation import Generator

    asked: list[Any] = []
    monkeypatch.setattr(Generator, "load", lambda *given: asked.append(given) or generator_of(FakeEngine("hello")))

    def serve(service: Service, sock: Any, ready: Any) -> None:
        sock.close()
        with running(service.generator, service.options) as server:
            key = next(iter(service.options.api_keys), "any")
            assert server.client(api_key=key).completions.create(model="base", prompt="x").choices[0].text == "hello"

    monkeypatch.setattr(firefly_running, "serve", serve)
    monkeypatch.setattr(firefly_running, "bind", lambda host, port: firefly_running.socket.socket())
    commands = [
        line
        for block in blocks(PAGES[0], "bash")
        for line in block.replace("\\\n", " ").splitlines()
        if "firefly serve" in line
    ]
    assert len(commands) == 3
    for command in commands:
        words = shlex.split(command)
        while "=" in words[0]:
            monkeypatch.setenv(*words.pop(0).split("=", 1))
        assert cli.main(words[1:]) == 0
    assert asked[1][1] == {"smollm2-135m-sft-lora": "output/smollm2-135m-sft-lora", "colours": "output/other-lora"}
