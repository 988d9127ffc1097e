"""A request on its way: what every engine that runs in this process does with each of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from firefly.files import first_line
from firefly.generation.engine import Delta, FinishReason, Request, Token
from firefly.generation.sampler import Sampler
from firefly.generation.text import TextStream
from firefly.translation import translate


class Job:
    """A request, what was drawn for it so far, and whom to tell. It is its own ticket."""

    def __init__(self, request: Request, tokenizer: Any, deliver: Callable[[Delta], None]) -> None:
        self.request = request
        self.sampler = Sampler(request)
        self.is_cancelled = False
        self.is_over = False
        self._text = TextStream(tokenizer, request.settings.stop)
        self._stops = frozenset(() if request.settings.ignore_stop_tokens else request.stop_ids)
        self._count = 0
        self._deliver = deliver

    @property
    def stop_ids(self) -> list[int]:
        return sorted(self._stops)

    def cancel(self) -> None:
        self.is_cancelled = True

    def take(self, token: Token) -> None:
        """Take the next token and hand on what it adds; `is_over` tells whether it was the last."""
        if self.is_over:
            return
        self._count += 1
        reason: FinishReason | None = None
        text = ""
        if token.id in self._stops:
            reason = "stop"
        else:
            text = self._text.add(token.id)
            if self._text.stopped:
                reason = "stop"
            elif self._count == self.request.settings.max_new_tokens:
                reason = "length"
        if reason is not None:
            text += self._text.finish()
        elif self.is_cancelled:
            reason = "cancelled"
        self._tell(Delta(text, (token,), reason))

    def end(self, reason: FinishReason | None = None, error: str | None = None) -> None:
        """End it between two tokens."""
        if not self.is_over:
            self._tell(Delta(finish_reason=reason, error=error))

    def _tell(self, delta: Delta) -> None:
        self.is_over = delta.is_last
        try:
            self._deliver(delta)
        except Exception:  # whoever asked is gone (a closed event loop): that is no fault of the engine
            self.is_over = self.is_cancelled = True


def failed(error: BaseException) -> str:
    """What a request is told that ended with a failure."""
    return translate("generation has failed: {problem}", problem=f"{type(error).__name__}: {first_line(error)}")
