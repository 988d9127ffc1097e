"""The kind of device that kernels cut their work up for: that of their arrays or, in a forecast, another one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_forecast_for: ContextVar[str | None] = ContextVar("forecast_for", default=None)


def device_kind(device: torch.device) -> str:
    """ "cpu" or "cuda": what arrays on `device` are to be treated as."""
    return _forecast_for.get() or device.type


@contextmanager
def sized_for(kind: str) -> Iterator[None]:
    """Within the block, in this thread alone, kernels work in the chunks of a device of this kind."""
    before = _forecast_for.set(kind)
    try:
        yield
    finally:
        _forecast_for.reset(before)
