"""Models of a server asked at once, and what each of them says as it grows."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from queue import Empty, Queue
from typing import Any

from firefly.files import first_line
from firefly.generation.remote import Server, ServerError, complaint

ANSWER_SECONDS = 600
"""The longest that a server may be silent."""
GROWN_SECONDS = 0.1
"""How often answers that grow are handed on."""


def answers_as_they_grow(server: Server, bodies: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """The texts of chat completions that are asked for at once, whenever they have grown, in the order of `bodies`.

    Ending the iteration hangs up, which ends the answers on the server, too. Why one failed stands at its end.
    """
    pieces: Queue[tuple[int, str | None]] = Queue()
    sockets: list[socket.socket] = []
    stopped = threading.Event()

    def read(number: int) -> None:
        try:
            with closing(server.connect(ANSWER_SECONDS)) as connection:
                connection.connect()
                sockets.append(connection.sock)  # which the connection forgets where the answer ends it
                server.send(connection, "/v1/chat/completions", {**bodies[number], "stream": True})
                for text in texts_of(connection.getresponse()):
                    pieces.put((number, text))
        except Exception as error:  # whatever it is, somebody waits for the end
            if not stopped.is_set():
                pieces.put((number, f"\n\n⚠ {first_line(error)}"))
        finally:
            pieces.put((number, None))

    for number in range(len(bodies)):
        threading.Thread(target=read, args=(number,), daemon=True).start()
    texts, left, handed_on = [""] * len(bodies), len(bodies), 0.0
    try:
        while left:
            with suppress(Empty):
                number, text = pieces.get(timeout=GROWN_SECONDS)
                left -= text is None
                texts[number] += text or ""
            if time.monotonic() - handed_on >= GROWN_SECONDS or not left:
                handed_on = time.monotonic()
                yield list(texts)
    finally:
        stopped.set()
        for opened in sockets:
            with suppress(OSError):  # it may have ended by itself
                opened.shutdown(socket.SHUT_RDWR)


def texts_of(response: http.client.HTTPResponse) -> Iterator[str]:
    """The texts of a stream of chat completions.

    Raises:
        ServerError: the server refuses, or says that it failed.
    """
    if response.status != http.client.OK:
        raise ServerError(complaint(response.read(), response.status), response.status)
    for line in response:
        data = line.decode("utf-8", "replace").removeprefix("data:").strip()
        if not data or data == "[DONE]":
            continue
        event = json.loads(data)
        if event.get("error"):
            raise ServerError(complaint(data.encode()))
        for choice in event.get("choices") or ():
            yield (choice.get("delta") or {}).get("content") or ""
