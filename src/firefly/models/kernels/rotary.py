"""Rotary positions in fewer passes: in the module of a model's class, its own function gives way to one that chooses.

Every model of that class then calls the new function, on whatever device it lies. So the choice is made anew at each
call, by what is called: arrays on a card, of the form that the trial has seen. Anything else goes to the own function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from firefly.models.kernels.elementwise import implementation
from firefly.models.kernels.rotation import rotate
from firefly.models.precision import has_bf16
from firefly.models.probing import agree, first_call

NAME = "apply_rotary_pos_emb"
"""What transformers calls it, in every modelling module: (q, k, cos, sin) → (q, k)."""

Rotary = Callable[..., Any]


def install_rotary(model: Any) -> int:
    """Let the attention of `model`, a transformers model, take our way; return in how many modules it does.

    It does so after a trial on arrays that the model itself made.
    """
    if model.device.type == "meta":
        return 0
    count = 0
    for names in _modules_with_rotary(model):
        own: Rotary = getattr(names[NAME], "own", names[NAME])
        names[NAME] = own  # a trial is of the own function; what fails it stays, also if another model passed before
        arguments = _rotary_call(model, names)
        keeps_type = None if arguments is None else _same_result(own, arguments)
        if keeps_type is not None:
            names[NAME] = _choosing(own, keeps_type)
            count += 1
    return count


def _modules_with_rotary(model: nn.Module) -> list[dict[str, Any]]:
    """The names of each module of code that the model's classes look their rotary function up in."""
    found = {}
    for module in model.modules():
        forward = inspect.unwrap(type(module).forward)
        names = getattr(forward, "__globals__", {})
        if callable(names.get(NAME)):
            found[id(names)] = names
    return list(found.values())


def _rotary_call(model: Any, names: dict[str, Any]) -> tuple[Tensor, ...] | None:
    """What the model's first layer calls the function with, for a row of two examples; None if it does otherwise."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(12, device=model.device)[None] * 7919 % max(vocabulary - 2, 1)
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None].to(model.device)
    call = first_call(model, {"input_ids": ids, "position_ids": positions}, partial(_instead_of, names))
    return call[0] if call and _fits(*call) else None


@contextmanager
def _instead_of(names: dict[str, Any], function: Callable[..., None]) -> Iterator[None]:
    """Call `function` in the place of the rotary function."""
    own = names[NAME]
    names[NAME] = function
    try:
        yield
    finally:
        names[NAME] = own


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

    rotary.own = own  # type: ignore[attr-defined]
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
