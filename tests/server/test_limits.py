"""What a server refuses, whom it lets in, and how requests end other than well."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import httpx2
import openai
import pytest
from serving import FakeEngine, Running, generator_of, running, until

from firefly.generation.engine import EngineFull
from firefly.server.service import ServerLimits, ServerOptions
from tiny import tiny_tokenizer

ASKED: Any = {"messages": [{"role": "user", "content": "x"}]}


def post(server: Running, body: Any = ASKED, path: str = "/v1/chat/completions", **options: Any) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx2.post(f"{server.address}{path}", content=content, timeout=20, **options)


def raw(server: Running, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    connection.sendall(data)
    return connection


def request_text(body: bytes, length: int | None = None) -> bytes:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length or len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize("change", [{}, {"stream": True}, {"n": 3}], ids=["whole", "streamed", "several"])
def test_a_client_that_hangs_up_stops_its_request(change: dict[str, Any]) -> None:
    engine = FakeEngine()
    with running(generator_of(engine)) as server:
        connection = raw(server, request_text(json.dumps(ASKED | change).encode()))
        count = change.get("n", 1)
        assert until(lambda: len(engine.tickets) == count)
        assert not any(ticket.is_cancelled for ticket in engine.tickets)
        connection.close()
        assert until(lambda: all(ticket.is_cancelled for ticket in engine.tickets))
        assert until(lambda: server.service._open == 0)
        assert until(lambda: any(" 499 " in line or " 200 " in line for line in server.log))


def test_more_requests_than_are_taken_on_are_429_with_retry_after() -> None:
    engine = FakeEngine()
    options = ServerOptions(ServerLimits(max_open=2))
    with running(generator_of(engine), options) as server:
        first = raw(server, request_text(json.dumps(ASKED | {"n": 2}).encode()))
        assert until(lambda: len(engine.tickets) == 2)
        with pytest.raises(openai.RateLimitError) as caught:
            server.client().chat.completions.create(model="base", **ASKED)
        assert caught.value.code == "queue_full"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert post(server, ASKED | {"stream": True}).status_code == 429
        assert httpx2.get(f"{server.address}/health").json() == {"status": "ok"}
        first.close()
        assert until(lambda: server.service._open == 0)
        engine.text = "hello"
        assert post(server).status_code == 200


def test_a_full_engine_is_429_and_takes_back_what_it_had() -> None:
    class Small(FakeEngine):
        def submit(self, request: Any, deliver: Any) -> Any:
            if len(self.tickets) == 2:
                raise EngineFull
            return super().submit(request, deliver)

    engine = Small()
    with running(generator_of(engine)) as server:
        assert post(server, ASKED | {"n": 4}).status_code == 429
        assert all(ticket.is_cancelled for ticket in engine.tickets)
        assert until(lambda: server.service._open == 0)


def test_keys_let_in_and_everyone_may_ask_for_health() -> None:
    options = ServerOptions(api_keys=("first", "second"))
    with running(generator_of(FakeEngine("hello")), options) as server:
        for key in ("first", "second"):
            assert server.client(api_key=key).chat.completions.create(model="base", **ASKED).choices
        for headers in ({}, {"Authorization": "Bearer"}, {"Authorization": "Bearer firs"}, {"Authorization": "first"}):
            found = post(server, headers=headers)
            assert found.status_code == 401
            assert found.json()["error"]["code"] == "invalid_api_key"
        assert httpx2.get(f"{server.address}/metrics").status_code == 401
        assert httpx2.get(f"{server.address}/health").status_code == 200


def test_without_a_key_only_programs_of_this_machine_come_in() -> None:
    options = ServerOptions(hosts=frozenset({"localhost", "127.0.0.1"}), origins=("https://good.example",))
    with running(generator_of(FakeEngine("hello")), options) as server:
        assert post(server).status_code == 200
        assert post(server, headers={"Host": "rebound.example"}).status_code == 403
        assert post(server, headers={"Origin": "https://evil.example"}).json()["error"]["code"] == "origin_not_allowed"
        good = post(server, headers={"Origin": "https://good.example"})
        assert good.status_code == 200
        assert good.headers["access-control-allow-origin"] == "https://good.example"
    with running(generator_of(FakeEngine("hello"))) as server:
        assert "access-control-allow-origin" not in post(server).headers


def test_large_bodies_are_413_and_slow_ones_408() -> None:
    options = ServerOptions(ServerLimits(max_body_bytes=10_000, client_seconds=0.4))
    with running(generator_of(FakeEngine("hello")), options) as server:
        large = post(server, {"messages": [{"role": "user", "content": "x" * 20_000}]})
        assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")

        def parts() -> Any:
            for _ in range(10):
                yield b"x" * 10_000

        assert post(server, b"".join(parts())).status_code == 413
        connection = raw(server, request_text(b"{", length=1 << 40))
        assert b" 413 " in connection.recv(4096)
        slow = raw(server, request_text(b'{"messages"', length=1000))
        assert b" 408 " in slow.recv(4096)
        silent = raw(server, b"POST /v1/chat")
        assert silent.recv(4096) == b""
        assert post(server).status_code == 200


def test_a_client_that_does_not_read_is_broken_off() -> None:
    engine = FakeEngine()
    options = ServerOptions(ServerLimits(client_seconds=0.3))
    with running(generator_of(engine), options) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(request_text(json.dumps(ASKED | {"stream": True}).encode()))
        assert until(lambda: len(engine.tickets) == 1)
        from firefly.generation.engine import Delta

        for _ in range(200):
            if engine.tickets[0].is_cancelled:
                break
            engine.tickets[0].deliver(Delta("y" * 100_000))
            time.sleep(0.01)
        assert until(lambda: engine.tickets[0].is_cancelled)
        assert until(lambda: server.service._open == 0)


def test_a_request_that_takes_too_long_is_504() -> None:
    engine = FakeEngine()
    options = ServerOptions(ServerLimits(request_seconds=0.2))
    with running(generator_of(engine), options) as server:
        found = post(server)
        assert (found.status_code, found.json()["error"]["code"]) == (504, "request_timeout")
        assert engine.tickets[0].is_cancelled
        with pytest.raises(openai.APIError, match="no answer within"):
            list(server.client().chat.completions.create(model="base", stream=True, **ASKED))


def test_a_dead_engine_is_said_by_health_and_every_answer() -> None:
    engine = FakeEngine("hello")
    with running(generator_of(engine)) as server:
        assert httpx2.get(f"{server.address}/health").status_code == 200
        engine.is_alive = False
        health = httpx2.get(f"{server.address}/health")
        assert (health.status_code, health.json()) == (503, {"status": "dead"})
        assert post(server).json()["error"]["code"] == "engine_down"
        assert "firefly_engine_up 0" in httpx2.get(f"{server.address}/metrics").text


def test_an_answer_that_fails_is_an_error_in_a_stream_too() -> None:
    with running(generator_of(FakeEngine(error="no more memory"))) as server:
        found = post(server)
        assert found.status_code == 500
        assert found.json()["error"]["message"] == "no more memory"
        with pytest.raises(openai.APIError, match="no more memory"):
            list(server.client().chat.completions.create(model="base", stream=True, **ASKED))


def test_what_nobody_foresaw_is_500_and_in_the_log() -> None:
    class Broken(FakeEngine):
        def submit(self, request: Any, deliver: Any) -> Any:
            raise KeyError("a bug")

    with running(generator_of(Broken())) as server:
        for change in ({}, {"stream": True}):
            found = post(server, ASKED | change)
            assert (found.status_code, found.json()["error"]["code"]) == (500, "internal_error")
        assert any("KeyError: 'a bug'" in line for line in server.log)
        assert until(lambda: server.service._open == 0)


def test_open_requests_are_answered_before_a_server_ends() -> None:
    from firefly.generation.engine import Delta

    engine = FakeEngine()
    with running(generator_of(engine)) as server:
        found: list[httpx2.Response] = []
        asking = threading.Thread(target=lambda: found.append(post(server)))
        asking.start()
        assert until(lambda: len(engine.tickets) == 1)
        server.server.should_exit = True
        assert until(lambda: server.service.is_draining)
        with pytest.raises(httpx2.ConnectError):
            until(lambda: post(server) is None, 2)
        engine.tickets[0].deliver(Delta("late", finish_reason="stop"))
        engine.tickets[0].is_cancelled = True
        asking.join(10)
        assert found[0].json()["choices"][0]["message"]["content"] == "late"


def test_what_is_not_answered_in_time_is_told_so_when_a_server_ends() -> None:
    engine = FakeEngine()
    options = ServerOptions(ServerLimits(drain_seconds=0.2))
    with running(generator_of(engine), options) as server:
        caught: list[Any] = []

        def ask() -> None:
            try:
                list(server.client().chat.completions.create(model="base", stream=True, **ASKED))
            except openai.APIError as error:
                caught.append(error)

        asking = [threading.Thread(target=ask) for _ in range(2)]
        asking.append(threading.Thread(target=lambda: caught.append(post(server))))
        for each in asking:
            each.start()
        assert until(lambda: len(engine.tickets) == 3)
        server.server.should_exit = True
        for each in asking:
            each.join(10)
        assert len(caught) == 3
        assert all("shutting down" in getattr(each, "message", getattr(each, "text", "")) for each in caught)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"messages": NaN}', b"[" * 100_000, b'{"messages":' + b"[" * 100_000],
    ids=range(8),
)
def test_a_body_that_is_no_request_is_400(body: bytes, served: Running) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/firefly"):
        found = post(served, body, path)
        assert found.status_code == 400
        assert found.json()["error"]["code"] == "invalid_json"


def test_nested_values_that_no_template_can_write_are_400(served: Running) -> None:
    deep: Any = {}
    for _ in range(900):
        deep = {"a": deep}
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    assert post(served, ASKED | {"tools": [tool]}).status_code == 400
    assert post(served, ASKED | {"stop": "\ud800"}).status_code == 400
    assert post(served, ASKED | {"max_tokens": 1}).status_code == 200


def test_paths_and_methods_that_are_not_there_are_errors_as_clients_read_them(served: Running) -> None:
    for method, path, status in (("GET", "/", 404), ("GET", "/docs", 404), ("GET", "/v1/chat/completions", 405)):
        found = httpx2.request(method, f"{served.address}{path}")
        assert found.status_code == status
        assert found.json()["error"]["message"]


def test_a_prompt_far_beyond_the_context_is_refused_by_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine("hello", context_length=100)
    with running(generator_of(engine)) as server:
        lengths: list[int] = []
        model = server.service.models["base"]
        backend = model.tokenizer.backend_tokenizer

        class Watched:
            def encode(self, text: str) -> Any:
                lengths.append(len(text))
                return backend.encode(text)

        class Tokenizer:
            backend_tokenizer = Watched()

        monkeypatch.setattr(type(model), "tokenizer", Tokenizer())
        for path, body in (
            ("/v1/completions", {"prompt": "x" * 100_000}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 100_000}]}),
        ):
            found = post(server, body, path)
            assert found.json()["error"]["code"] == "context_length_exceeded"
        assert lengths == [800, 800]


def test_tokens_that_the_model_lacks_never_reach_the_engine() -> None:
    """A tokenizer may have more tokens than the model's table has rows, such as a <pad> that was added."""
    table = tiny_tokenizer().encode(" ")[0] + 1
    engine = FakeEngine("hello", vocabulary_size=table)
    with running(generator_of(engine)) as server:
        for path, body in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "À"}]}),
            ("/v1/completions", {"prompt": "À"}),
            ("/v1/completions", {"prompt": [table]}),
        ):
            found = post(server, body, path)
            assert (found.status_code, found.json()["error"]["code"]) == (400, "invalid_value")
        assert post(server).status_code == 200
        assert len(engine.tickets) == 1


def test_a_setting_that_the_engine_does_not_honour_is_400() -> None:
    from firefly.errors import UsageError

    class Choosy(FakeEngine):
        def submit(self, request: Any, deliver: Any) -> Any:
            raise UsageError("remote.not_honoured", "{problem}", problem="no such setting")

    with running(generator_of(Choosy())) as server:
        for change in ({}, {"stream": True}):
            found = post(server, ASKED | change)
            assert (found.status_code, found.json()["error"]["message"]) == (400, "no such setting")
