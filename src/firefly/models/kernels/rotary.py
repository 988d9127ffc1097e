"""Rotary positions in half as many passes over q and k as models' own functions take.

A model's attention looks the rotary function up by name in its class's module. The attention modules of a trained model
get a forward of the same code whose globals have ours under that name; the class, and so every other model, keeps its
own. Each call decides by its arguments: ours is used for arrays of the form that the probe has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from firefly.models.kernels.elementwise import implementation
from firefly.models.precision import has_bf16
from firefly.models.probing import agree, first_call

NAME = "apply_rotary_pos_emb"
"""What transformers calls it, in every modelling module: (q, k, cos, sin) → (q, k)."""

Rotary = Callable[..., Any]


def install_rotary(model: Any) -> int:
    """Let the attention of `model`, a transformers model, use our rotary function; return how many modules do.

    Each class of modules is probed first, on arrays that the model itself made.
    """
    if model.device.type == "meta":
        return 0
    by_class: dict[type[nn.Module], list[nn.Module]] = {}
    for module in model.modules():
        code = getattr(type(module).forward, "__code__", None)  # none of a forward in other code: its names are others
        if code is not None and NAME in code.co_names and "forward" not in vars(module):
            by_class.setdefault(type(module), []).append(module)
    count = 0
    for kind, modules in by_class.items():
        own: Any = kind.forward.__globals__.get(NAME)
        arguments = _rotary_call(model, modules) if callable(own) else None
        keeps_type = None if arguments is None else _same_result(own, arguments)
        if keeps_type is None:
            continue
        forward = _forward_with(kind, _choosing(own, keeps_type))
        for module in modules:
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]
        count += len(modules)
    return count


def _forward_with(kind: type[nn.Module], rotary: Rotary) -> Any:
    """The forward of a class of modules, calling `rotary` where it calls the rotary function by its name."""
    own: Any = kind.forward
    names = {**own.__globals__, NAME: rotary}
    forward = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    return forward


def _rotary_call(model: Any, modules: list[nn.Module]) -> tuple[Tensor, ...] | None:
    """What modules of a class call the function with, for a row of two examples; None if they do otherwise."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(12, device=model.device)[None] * 7919 % max(vocabulary - 2, 1)
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None].to(model.device)
    call = first_call(model, {"input_ids": ids, "position_ids": positions}, partial(_calling, modules))
    return call[0] if call and _fits(*call) else None


@contextmanager
def _calling(modules: list[nn.Module], function: Callable[..., None]) -> Iterator[None]:
    """Let modules of a class call `function` in the place of the rotary function."""
    forward = _forward_with(type(modules[0]), function)
    for module in modules:  # some layers turn nothing
        module.forward = MethodType(forward, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _same_result(own: Rotary, arguments: tuple[Tensor, ...]) -> bool | None:
    """Whether results have the type of q even under wider angles; None if ours differ from the function's own.

    Outputs and gradients are compared, in the model's type, and in 16 bit with fp32 angles, as under autocast.
    """
    q, k, cos, sin = (each.detach() for each in arguments)
    half = torch.bfloat16 if has_bf16(q.device) else torch.float16
    cases = (q, k, cos, sin), (q.to(half), k.to(half), cos.float(), sin.float())
    keeps_type = _results(own, cases[1])[0].dtype == half
    for case in cases:
        expected, found = _results(own, case), _results(_choosing(own, keeps_type), case)
        if not all(agree(*pair, computed=case[0].dtype) for pair in zip(found, expected, strict=True)):
            return None
    return keeps_type


def _results(rotary: Rotary, case: tuple[Tensor, ...]) -> list[Tensor]:
    """q and k turned, and the gradients of q and k."""
    with torch.enable_grad():
        q, k = (each.clone().requires_grad_() for each in case[:2])
        turned = rotary(q, k, *case[2:])
        weights = [torch.linspace(-1, 2, out.numel(), device=out.device).view(out.shape).to(out) for out in turned]
        return [*(out.detach() for out in turned), *torch.autograd.grad(turned, (q, k), weights)]


def _choosing(own: Rotary, keeps_type: bool) -> Rotary:
    """The function that takes Liger's kernel or our operations where it can."""

    @wraps(own)
    def rotary(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not _fits(args, kwargs):
            return own(*args, **kwargs)
        q, k, cos, sin = args
        dtype = q.dtype if keeps_type else cos.dtype
        if implementation(q.device) != "liger":
            return rotate(q, k, cos, sin, dtype)
        from firefly.models.kernels import liger

        return liger.rotate(q, k, cos, sin, dtype)

    return rotary


def _fits(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this is q, k (rows, heads, tokens, width) and cos, sin (rows or 1, tokens, width), whole heads turned."""
    if kwargs or len(args) != 4 or not all(isinstance(each, Tensor) for each in args):
        return False
    q, k, cos, sin = args
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape or cos.requires_grad:
        return False
    rows, _, tokens, width = q.shape
    return (
        (k.shape[0], *k.shape[2:]) == (rows, tokens, width)
        and (cos.shape[0] in (1, rows) and cos.shape[1:] == (tokens, width))
        and width % 2 == 0
        and q.dtype == k.dtype
        and cos.dtype == sin.dtype == torch.promote_types(q.dtype, cos.dtype)
    )


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Turn the halves of q and k by their positions' angles.

    Args:
        q: (rows, heads, tokens, width), as k, which may have fewer heads.
        cos: (rows or 1, tokens, width), as sin; the second half repeats the first.
        dtype: what is returned.
    """
    return _Rotation.apply(q, k, cos, sin, dtype)  # pyright: ignore[reportReturnType]


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        cos, sin = cos[:, None], sin[:, None]
        ctx.save_for_backward(cos, sin)
        ctx.types = q.dtype, k.dtype
        return _turned(q, cos, sin, 1, dtype), _turned(k, cos, sin, 1, dtype)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return (
            _turned(grad_q, cos, sin, -1, ctx.types[0]),
            _turned(grad_k, cos, sin, -1, ctx.types[1]),
            None,
            None,
            None,
        )


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: int, dtype: torch.dtype) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-direction)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=direction)
    return out.to(dtype)
