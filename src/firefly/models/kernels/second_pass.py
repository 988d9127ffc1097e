"""A checkpointed layer's second pass: who runs it, and that it is one, for kernels that then leave something out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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


def checkpoint_anywhere(function: Any, *args: Any) -> Any:
    """torch's checkpoint of one layer, which every engine and every kind of layer goes with.

    Not reentrant: inputs without a gradient are fine, and random state is restored for the second pass.
    """
    return checkpoint(function, *args, use_reentrant=False, context_fn=both_passes)


def checkpoint_plainly(function: Any, hidden: Tensor, *args: Any) -> Any:
    """The same for a layer whose only differentiable input is `hidden`: a quarter of what Python has to do.

    torch's own way calls hooks for each tensor that any operation keeps. Here the layer is one operation that keeps its
    input. Whatever does not fit goes torch's way.
    """
    if torch.is_autocast_enabled(hidden.device.type) or _learns(args) or _learns(getattr(function, "keywords", {})):
        return checkpoint_anywhere(function, hidden, *args)
    if not hidden.requires_grad:  # the first layer's: its own weights need the pass all the same
        hidden = hidden.detach().requires_grad_()
    return _Layer.apply(hidden, partial(_call, function, args))


def _call(function: Any, args: Any, hidden: Tensor) -> Any:
    return function(hidden, *args)


def _learns(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, dict):
        return any(_learns(each) for each in value.values())
    return isinstance(value, list | tuple) and any(_learns(each) for each in value)


class _Layer(torch.autograd.Function):
    """A layer as one operation: hidden → its output, weights that it trains inside."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, run: Any) -> Tensor:
        ctx.run, ctx.random = run, _random_state(hidden.device)
        ctx.save_for_backward(hidden)
        return run(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        (kept,) = ctx.saved_tensors
        hidden = kept.detach().requires_grad_()
        now = _random_state(hidden.device)
        _set_random_state(hidden.device, ctx.random)
        with torch.enable_grad(), second_pass():
            out = ctx.run(hidden)
        _set_random_state(hidden.device, now)
        torch.autograd.backward(out, grad)
        return hidden.grad, None


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
