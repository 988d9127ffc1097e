"""Several answers of one server, read as they grow."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import pytest

from firefly.generation.conversing import answers_as_they_grow
from firefly.generation.remote import Server

Script = Callable[[dict[str, Any], Callable[[str], None]], None]


class Streaming(ThreadingHTTPServer):
    """Answers each request by what `script` sends of it, piece by piece; "refuse" in its model is an error."""

    daemon_threads = True

    def __init__(self, script: Script) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = script
        self.hung_up = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.hung_up.set()


class Handler(BaseHTTPRequestHandler):
    server: Streaming  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, *values: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["stream"] is True
        if "refuse" in body["model"]:
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b'{"error": {"message": "no such model"}}')
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()

        def send(text: str) -> None:
            event = {"choices": [{"delta": {"content": text}}]}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()

        self.server.script(body, send)
        self.wfile.write(b"data: [DONE]\n\n")


@pytest.fixture
def serve() -> Iterator[Callable[[Script], Streaming]]:
    servers: list[Streaming] = []

    def start(script: Script) -> Streaming:
        server = Streaming(script)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def client(server: Streaming) -> Server:
    return Server(f"http://127.0.0.1:{server.server_port}")


def test_both_grow_and_one_may_end_long_before_the_other(serve: Callable[[Script], Streaming]) -> None:
    def script(body: dict[str, Any], send: Callable[[str], None]) -> None:
        for number in range(1 if body["model"] == "short" else 6):
            send(f"{body['model']} {number}, ")
            time.sleep(0.12)

    seen = list(answers_as_they_grow(client(serve(script)), [{"model": "long"}, {"model": "short"}]))
    assert seen[-1] == ["".join(f"long {number}, " for number in range(6)), "short 0, "]
    assert len(seen) >= 4
    for earlier, later in pairwise(seen):
        assert all(text.startswith(begun) for begun, text in zip(earlier, later, strict=True))


def test_why_one_failed_stands_in_its_place_and_the_other_is_whole(serve: Callable[[Script], Streaming]) -> None:
    server = serve(lambda body, send: send("an answer"))
    *_, (refused, whole) = answers_as_they_grow(client(server), [{"model": "refuse"}, {"model": "other"}])
    assert "no such model" in refused
    assert whole == "an answer"


def test_ending_the_iteration_hangs_up(serve: Callable[[Script], Streaming]) -> None:
    def script(body: dict[str, Any], send: Callable[[str], None]) -> None:
        while True:
            send("and so on ")
            time.sleep(0.02)

    server = serve(script)
    answers = answers_as_they_grow(client(server), [{"model": "endless"}])
    assert next(answer for answer in answers if answer[0])
    answers.close()
    assert server.hung_up.wait(10)
