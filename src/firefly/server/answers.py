"""From the engine's thread to the event loop: the answers to one request as they grow."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from firefly.errors import UsageError
from firefly.generation.engine import Delta, Engine, EngineFull, Request, Ticket
from firefly.server.errors import ApiError
from firefly.translation import translate

RETRY_AFTER = 1


def queue_is_full() -> ApiError:
    return ApiError(
        429, "queue_full", translate("more requests wait than this server takes on; try again later."),
        retry_after=RETRY_AFTER,
    )  # fmt: skip


def engine_is_down() -> ApiError:
    return ApiError(503, "engine_down", translate("the engine has ended; this server has to be started again."))


def shutting_down() -> ApiError:
    return ApiError(503, "shutting_down", translate("this server is shutting down."), retry_after=RETRY_AFTER)


class Handover:
    """Calls back on the event loop for what is delivered on another thread: once for all that came meanwhile."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Callable[[Delta], None], Delta]] = deque()
        self._is_called = False

    def give(self, take: Callable[[Delta], None], delta: Delta) -> None:
        """From any thread.

        Raises:
            RuntimeError: the event loop is closed.
        """
        with self._lock:
            self._waiting.append((take, delta))
            if self._is_called:
                return
            self._is_called = True
        self._loop.call_soon_threadsafe(self._hand_over)

    def _hand_over(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, deque()
            self._is_called = False
        for take, delta in waiting:
            take(delta)


class Answers:
    """Answers to some prompts, computed together. Used on the event loop.

    Args:
        on_end: called once for each request that was submitted, when it has ended.
    """

    def __init__(self, handover: Handover, on_end: Callable[[], None]) -> None:
        self._handover, self._on_end = handover, on_end
        self._tickets: list[Ticket] = []
        self._arrived: list[tuple[int, Delta]] = []
        self._is_there = asyncio.Event()
        self._is_cancelled = False

    @property
    def count(self) -> int:
        """Requests that were submitted."""
        return len(self._tickets)

    def submit(self, engine: Engine, requests: Sequence[Request]) -> None:
        """Hand them all in, or none.

        Raises:
            ApiError: too many wait, the engine does not honour a setting, or it has ended.
        """
        try:
            for request in requests:
                self._tickets.append(engine.submit(request, self._deliver_to(len(self._tickets))))
        except EngineFull:
            self.cancel()
            raise queue_is_full() from None
        except UsageError as error:  # a setting that this engine does not honour
            self.cancel()
            raise ApiError(400, "unsupported_parameter", str(error)) from None
        except RuntimeError:
            self.cancel()
            raise engine_is_down() from None

    def _deliver_to(self, number: int) -> Callable[[Delta], None]:
        def take(delta: Delta) -> None:  # on the event loop
            self._arrived.append((number, delta))
            self._is_there.set()
            if delta.is_last:
                self._on_end()

        return lambda delta: self._handover.give(take, delta)

    async def arriving(self) -> list[tuple[int, Delta]]:
        """What has come for any of the answers, once there is something.

        Raises:
            ApiError: the engine has failed, or the server ends.
        """
        if not self._arrived:
            self._is_there.clear()
            await self._is_there.wait()
        arrived, self._arrived = self._arrived, []
        for _, delta in arrived:
            if delta.error is not None:
                raise ApiError(500, "generation_failed", delta.error)
            if delta.finish_reason == "cancelled" and not self._is_cancelled:
                raise shutting_down()
        return arrived

    def cancel(self) -> None:
        self._is_cancelled = True
        self.stop()

    def stop(self) -> None:
        """End the answers for whoever awaits them."""
        for ticket in self._tickets:
            with suppress(RuntimeError):
                ticket.cancel()
