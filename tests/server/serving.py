"""A server in a thread of the test's own process, and an engine whose answers are known."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from firefly.data.encoding import Encoder
from firefly.data.templates import bind_template
from firefly.generation import Generator
from firefly.generation.engine import Delta, EngineStatus, Request, Token
from firefly.generation.loading import ServedModel
from firefly.server.running import Server, bind
from firefly.server.service import ServerOptions, Service
from tiny import tiny_tokenizer


def until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether a condition comes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@dataclass
class Running:
    """A server that runs."""

    address: str
    service: Service
    server: Server
    log: list[str]
    thread: threading.Thread

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", max_retries=0, **({"api_key": "any"} | options))

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


@contextmanager
def running(generator: Generator, options: ServerOptions = ServerOptions()) -> Iterator[Running]:  # noqa: B008
    service, log, is_ready, address = Service(generator, options), [], threading.Event(), []

    def ready(at: str) -> None:
        address.append(at)
        is_ready.set()

    server = Server(service, ready, log.append)
    sock = bind("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])), daemon=True)
    thread.start()
    assert is_ready.wait(20)
    try:
        yield Running(address[0], service, server, log, thread)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@dataclass
class FakeTicket:
    request: Request
    deliver: Callable[[Delta], None]
    is_cancelled: bool = False

    def cancel(self) -> None:
        if not self.is_cancelled:
            self.is_cancelled = True
            self.deliver(Delta(finish_reason="cancelled"))


@dataclass
class FakeEngine:
    """Answers every request with the same text in parts of two characters; or, with none, never."""

    text: str | None = None
    models: tuple[str, ...] = ("base", "one", "two")
    context_length: int = 4096
    max_requests: int = 8
    vocabulary_size: int | None = None
    is_alive: bool = True
    tickets: list[FakeTicket] = field(default_factory=list)
    finish_reason: Any = "stop"
    error: str | None = None

    def submit(self, request: Request, deliver: Callable[[Delta], None]) -> FakeTicket:
        if not self.is_alive:
            raise RuntimeError("the engine has ended")
        ticket = FakeTicket(request, deliver)
        self.tickets.append(ticket)
        if self.error is not None:
            deliver(Delta(error=self.error))
        elif self.text is not None:
            for start in range(0, len(self.text), 2):
                deliver(Delta(self.text[start : start + 2], (Token(7),)))
            ticket.is_cancelled = True  # it is over
            deliver(Delta("", (Token(2),), self.finish_reason))
        return ticket

    def score(self, prompts: Sequence[Sequence[int]], model: str, top: int) -> list[list[Token]]:
        return [[Token(token, -1.0, ((token, -1.0),) * bool(top)) for token in prompt] for prompt in prompts]

    def status(self) -> EngineStatus:
        return EngineStatus(len(self.tickets), 0)

    def close(self, drain: bool = False) -> None: ...


def generator_of(engine: Any, template: str = "qwen2.5") -> Generator:
    """A door to an engine; each of its models has the tiny tokenizer and the same template."""
    tokenizer = tiny_tokenizer()
    encoder = Encoder(tokenizer, bind_template(template, tokenizer))
    served = {
        name: ServedModel(
            name, tokenizer, encoder, encoder.template.stop_ids, None if number == 0 else name, Path(name)
        )
        for number, name in enumerate(engine.models)
    }
    return Generator(engine, served)
