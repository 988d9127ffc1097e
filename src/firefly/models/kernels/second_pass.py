"""Whether a checkpointed layer is being computed again, for kernels that can then leave something out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

_running: ContextVar[bool] = ContextVar("second_pass", default=False)


def in_second_pass() -> bool:
    """Whether this is a layer's second pass: nobody reads its output, only what its gradient needs."""
    return _running.get()


@contextmanager
def second_pass() -> Iterator[None]:
    """The second pass of a layer."""
    token = _running.set(True)
    try:
        yield
    finally:
        _running.reset(token)


def both_passes() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of a layer's first and second pass, as `torch.utils.checkpoint` takes them."""
    return nullcontext(), second_pass()
