"""From an application to a process that listens, and ends when it is told to."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from firefly.errors import UsageError
from firefly.server.app import make_app, print_line
from firefly.server.service import Service

MOST_CONNECTIONS = 1000
KEEP_ALIVE_SECONDS = 15
GRACE_SECONDS = 5
"""For streams that were ended to say so."""
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the address, and does not listen yet.

    Raises:
        UsageError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, OverflowError) as error:
        raise UsageError(
            "serve.no_address",
            "--host {host} --port {port} cannot be used: {problem}. Choose another port (0: any that is free).",
            host=host,
            port=port,
            problem=getattr(error, "strerror", None) or error,
        ) from None
    return found


def serve(service: Service, sock: socket.socket, ready: Callable[[str], None]) -> None:
    """Answer until SIGTERM or SIGINT, and then what is there already.

    Args:
        ready: told the address when requests are taken.
    """
    asyncio.run(Server(service, ready).serve(sockets=[sock]))


class Server(uvicorn.Server):
    """uvicorn's server for one service, which ends when `should_exit` is set."""

    def __init__(self, service: Service, ready: Callable[[str], None], log: Callable[[str], None] = print_line) -> None:
        limits = service.options.limits
        super().__init__(
            uvicorn.Config(
                make_app(service, log),
                http=_protocol(limits.client_seconds),
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=_most_connections(),
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=round(limits.drain_seconds + GRACE_SECONDS),
                backlog=512,
            )
        )
        self.service, self.ready = service, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = (sockets or [])[0].getsockname()[:2]
        self.ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.drain()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but the signal is not raised again behind it: a server that was told to end has done well."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True  # the second signal waits for nobody
            self.service.stop_all()
        self.should_exit = True


def _most_connections() -> int:
    try:
        import resource
    except ImportError:  # not on Windows
        return MOST_CONNECTIONS
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_CONNECTIONS if files < 0 else min(MOST_CONNECTIONS, files // 2)


def _protocol(seconds: float) -> type[H11Protocol]:
    class Impatient(H11Protocol):
        """Breaks off a client that does not send its request, or does not read its response: uvicorn itself waits for
        both without end, and either holds a connection."""

        patience: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait_for_request()

        def connection_lost(self, exc: Exception | None) -> None:
            self._trust()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            # Headers that come byte by byte do not buy time: the clock of a request is set once.
            if self.cycle is not None and self.cycle.response_complete and self.patience is None:
                self._wait_for_request()
            cycle = self.cycle
            super().data_received(data)
            if self.cycle is not cycle:
                self._trust()  # the body has a clock of its own

        def pause_writing(self) -> None:
            super().pause_writing()
            self._trust()
            self.patience = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._trust()

        def _wait_for_request(self) -> None:
            self.patience = self.loop.call_later(seconds, self.transport.abort)

        def _trust(self) -> None:
            if self.patience is not None:
                self.patience.cancel()
                self.patience = None

    return Impatient
