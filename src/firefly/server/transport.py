"""Between HTTP and the routes: bodies in, streams out, and whether the client is still there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from firefly.server.errors import ApiError, ClientGone
from firefly.server.service import ServerLimits
from firefly.translation import translate

T = TypeVar("T")

READ_ON = 4
"""So many times the largest body is read and thrown away, so that a client that sends first and then reads learns why
it is refused, and does not see a broken connection."""


async def read_body(request: Request, limits: ServerLimits) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it is too large, or does not come.
        ClientGone: the client hung up meanwhile.
    """
    most = limits.max_body_bytes
    told = request.headers.get("content-length", "")
    parts: list[bytes] = []
    size, more = 0, True
    if told.isdecimal() and int(told) > READ_ON * most:
        raise _too_large(most)
    try:
        async with asyncio.timeout(limits.client_seconds):
            while more and size <= READ_ON * most:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                size += len(part)
                if size <= most:
                    parts.append(part)
                else:
                    parts.clear()
                more = message.get("more_body", False)
    except TimeoutError:
        raise ApiError(
            408, "body_timeout", translate("the body did not come within {seconds:g} s.", seconds=limits.client_seconds)
        ) from None
    if size > most:
        raise _too_large(most)
    return b"".join(parts)


def _too_large(most: int) -> ApiError:
    message = translate("the body is larger than the {most:,} bytes that are taken.", most=most)
    return ApiError(413, "body_too_large", message)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up.

    Raises:
        ClientGone: it did.
    """
    doing, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ClientGone
    finally:
        for task in (doing, gone):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


class EventStream(Response):
    """Server-sent events as they come; they end when the client hangs up.

    Args:
        events: the first one says nothing, but that the request was taken on: an error before it is a response of its
            own, one behind it an event.
    """

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(
            headers={
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
                "x-accel-buffering": "no",
            }
        )
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send(scope, receive, send))
        except ClientGone:  # no error any more: the response has begun
            scope["state"]["call"].is_gone = True

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.events) as events:
            try:
                await anext(events)
            except ApiError as error:
                await error_response(error)(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except ApiError as error:
                await send({"type": "http.response.body", "body": as_event(error.as_dict()), "more_body": True})
            await send({"type": "http.response.body", "body": DONE, "more_body": False})


def as_event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + as_json(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def as_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


class JSON(Response):
    """A JSON value as UTF-8."""

    media_type = "application/json"

    def __init__(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(as_json(value), status, headers)


def error_response(error: ApiError) -> Response:
    return JSON(error.as_dict(), error.status, error.headers)


def host_name(header: str) -> str:
    """The name in a Host header, without the port."""
    if header.startswith("["):
        return header.partition("]")[0][1:].lower()
    return header.partition(":")[0].lower()
