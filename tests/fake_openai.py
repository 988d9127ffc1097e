"""A server with OpenAI's protocol and no model, in a thread of a test: it says what `script` makes of a request."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Refusal(Exception):
    """Makes the server answer with a status and a message."""

    def __init__(self, status: int, message: str = "no", **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}


class Hangup(Exception):
    """Makes the server cut the connection."""


class FakeOpenAI(ThreadingHTTPServer):
    """
    Attributes:
        script: a request → the text of the answer, or the whole of its message.
        bodies: the requests so far, with their path as "path".
        keys: what they had for an authorization.
        most_at_once: so many requests were being answered at a time.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, script: Callable[[dict[str, Any]], Any], models: tuple[str, ...] = ("judge",)) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.models = script, models
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        self.at_once = self.most_at_once = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> FakeOpenAI:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # it cuts connections on purpose


class Handler(BaseHTTPRequestHandler):
    server: FakeOpenAI  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, *values: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        text = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, content in (headers or {}).items():
            self.send_header(name, content)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self.answer({"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"]))) | {"path": self.path}
        with server.lock:
            server.bodies.append(body)
            server.keys.append(self.headers["Authorization"])
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            said = server.script(body)
        except Refusal as refusal:
            self.answer({"error": {"message": str(refusal)}}, refusal.status, refusal.headers)
            return
        except Hangup:
            self.close_connection = True
            return
        finally:
            with server.lock:
                server.at_once -= 1
        if isinstance(said, bytes):
            self.answer(said)
            return
        message = said if isinstance(said, dict) else {"role": "assistant", "content": said}
        choice = {"index": 0, "finish_reason": message.pop("finish_reason", "stop")}
        choice |= {"text": said} if self.path == "/v1/completions" else {"message": message}
        self.answer({"choices": [choice], "usage": {"completion_tokens": 7}})


def asked(body: dict[str, Any]) -> str:
    """The last thing that a request says."""
    return body["messages"][-1]["content"] if "messages" in body else body["prompt"]
