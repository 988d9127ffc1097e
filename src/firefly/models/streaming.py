"""Models larger than memory: weights stay in their files, and a layer's are read for its own forward and let go after.

Peak memory is that of the largest layer (or embedding, or head) beside the activations. What a weight is, is computed
as it is read: in the asked type, from experts stacked as transformers stacks them, or with an adapter merged into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from firefly.config import ModelConfig
from firefly.console import notice
from firefly.files import first_line
from firefly.models.loading import load_model, read_config
from firefly.models.precision import Precision, pick_device
from firefly.models.unread import UNREAD, Unread, placeholder_like, read_here
from firefly.translation import Phrase, translate

HANDLES, HELD = "firefly_streaming", "firefly_held"
"""Attributes: of a module, the handles of its hooks; of a parameter that is read now, its placeholder and how many
modules use it."""


def load_streamed(model: ModelConfig, dtype: torch.dtype, device: torch.device | None = None) -> Any:
    """A causal language model (or reward model) for inference, whose weights are read from its files as it computes.

    Each forward reads all weights once, so texts are best given as one batch. `load_adapter` puts an adapter on it. A
    model that cannot be read so (no safetensors, weights quantized in the file, code that computes with weights while
    it loads) is loaded whole, with a notice. Nothing is written anywhere.

    Args:
        dtype: what the weights are converted to as they are read, and computed with.
        device: where it computes; by default the first GPU, else the CPU.

    Raises:
        UsageError: see `load_model`.
    """
    device = device or pick_device()
    before = torch.get_rng_state()
    problem = Phrase("its weights are quantized") if getattr(read_config(model), "quantization_config", None) else ""
    if not problem:
        try:
            return stream_weights(load_model(model, "lora", Precision(dtype), device, unread=True).eval())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # remote or unknown code may raise anything on weights without values
            problem = first_line(error)
    torch.set_rng_state(before)
    whole = load_model(model, "lora", Precision(dtype), device).eval()  # raises for the user's mistakes
    notice("streaming.whole", "{name} is loaded whole: {problem}", name=model.name_or_path, problem=problem)
    return whole


def is_streamed(model: nn.Module) -> bool:
    return any(HANDLES in vars(module) for module in model.modules())


def stream_weights(model: Any) -> Any:
    """Let modules read those of their parameters that are unread when they are called; once more after modules were
    replaced or wrapped.

    A decoder layer reads all of its weights together, whichever of its modules multiplies with them (some read the
    weights of a module without calling it); so does an embedding or a head with an adapter around it.
    """
    for module in model.modules():
        for handle in vars(module).pop(HANDLES, ()):
            handle.remove()
    for module in _units(model):
        handles = (
            module.register_forward_pre_hook(lambda unit, _: _acquire(unit.parameters())),
            module.register_forward_hook(lambda unit, *_: _release(unit.parameters()), always_call=True),
        )
        setattr(module, HANDLES, handles)
    return model


def _units(module: nn.Module, listed: bool = False) -> Iterator[nn.Module]:
    """The items of the outermost lists of layers, and what has no such list in it; parameters of modules around them
    are read for good."""
    if listed or not any(isinstance(inner, nn.ModuleList) for inner in module.modules()):
        yield module
        return
    read_here(module.parameters(recurse=False))
    for child in module.children():
        yield from _units(child, isinstance(module, nn.ModuleList))


def read_whole(model: nn.Module) -> bool:
    """Read all weights of a streamed model for good, with a notice; whether there were any.

    For one that gives NaN: some code multiplies with the weight of a module that it does not call, and finds the
    placeholder.
    """
    with torch.inference_mode(False):
        found = read_here(model.parameters()) > 0
    if found:
        problem = translate("it gives no numbers when its weights are read layer by layer.")
        notice("streaming.whole", "{name} is loaded whole: {problem}", name=type(model).__name__, problem=problem)
    return found


def _acquire(parameters: Iterable[Any]) -> None:
    for parameter in parameters:
        unread: Unread | None = getattr(parameter, UNREAD, None)
        if unread is None:
            continue
        placeholder, users = getattr(parameter, HELD, (parameter.data, 0))
        if not users:
            with torch.inference_mode(False), torch.no_grad():  # a parameter is no tensor of one inference
                parameter.data = unread.read().to(parameter.device, parameter.dtype)
        setattr(parameter, HELD, (placeholder, users + 1))


def _release(parameters: Iterable[Any]) -> None:
    for parameter in parameters:
        if not hasattr(parameter, HELD):
            continue
        placeholder, users = getattr(parameter, HELD)
        if users > 1:
            setattr(parameter, HELD, (placeholder, users - 1))
            continue
        parameter.data = placeholder
        delattr(parameter, HELD)


@contextmanager
def held(*parameters: Any) -> Iterator[None]:
    """Have the numbers of these parameters in memory during a `with` block."""
    _acquire(parameters)
    try:
        yield
    finally:
        _release(parameters)


Change = Callable[[Tensor, int], Tensor]
"""(rows of a weight, number of the first of them) → these rows as they are to be, in the same type."""


@torch.no_grad()
def change_weight(parameter: Any, change: Change, by_row: bool = False) -> None:
    """Change a weight: one in memory now and in place, one in a file each time it is read.

    Args:
        by_row: row by row (of stacked experts: each expert), so that one of them can be had without the others.
    """
    unread: Unread | None = getattr(parameter, UNREAD, None)
    if unread is None:
        if by_row:
            for number in range(len(parameter)):
                parameter[number : number + 1].copy_(change(parameter[number : number + 1], number))
        else:
            parameter.copy_(change(parameter.data, 0))
        return
    own = unread

    @torch.no_grad()
    def rows(first: int, last: int) -> Tensor:
        if by_row:
            each = [change(own.rows(n, n + 1).to(parameter.device), n).cpu() for n in range(first, last)]
            return torch.cat(each)
        whole = change(own.read().to(parameter.device), 0).cpu()
        return whole[first:last] if whole.dim() else whole

    setattr(parameter, UNREAD, Unread(unread, rows))


def separate_copy(parameter: Any) -> nn.Parameter:
    """A frozen parameter of its own with the same numbers, read or unread."""
    unread = getattr(parameter, UNREAD, None)
    data = parameter.detach().clone() if unread is None else placeholder_like(parameter, parameter.device)
    found = nn.Parameter(data, requires_grad=False)
    if unread is not None:
        setattr(found, UNREAD, unread)
    return found
