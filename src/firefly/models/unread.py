"""Lazily loaded weights: they stay in their files until it is known which shard of them a rank keeps.

`open_weights` gives transformers a checkpoint of tensors with shape and dtype but no data. What it does with
them (casts, stacked experts, matrices cut apart) is recorded, and done to the numbers when they are asked for: to the
rows of one rank's shard alone, where an operation computes each row by itself. The model meanwhile holds
placeholders: probes that need values run on another model (`probes`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

aten = torch.ops.aten

UNREAD = "unread"
"""Attribute of a parameter whose numbers are still in their file: the `Unread` that reads them."""

ROW_BY_ROW = (aten._to_copy.default, aten.detach.default, aten.alias.default, aten.clone.default)
"""Operations that make row n of row n of their first argument."""

Rows = Callable[[int, int], Tensor]
"""(first, last) → those rows of a tensor; of a scalar, all of it."""


class Unread(Tensor):
    """A tensor without data that knows how to compute it from files."""

    rows: Rows

    @staticmethod
    def __new__(cls, like: Tensor, rows: Rows) -> Unread:
        return Tensor._make_wrapper_subclass(
            cls, like.shape, like.stride(), dtype=like.dtype, device=torch.device("cpu")
        )

    def __init__(self, like: Tensor, rows: Rows) -> None:
        self.rows = rows

    def read(self) -> Tensor:
        """All of it."""
        return self.rows(0, self.shape[0] if self.dim() else 1)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Unread({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.is_mutable:
            raise NotImplementedError(f"{function} changes weights, which have not been read")
        kwargs = {name: value for name, value in (kwargs or {}).items() if name not in ("device", "pin_memory")}
        shapes = tree_map(lambda x: _without_numbers(x) if isinstance(x, Tensor) else x, args)
        found = function(*shapes, **kwargs)

        def compute() -> Any:
            return function(*tree_map(lambda x: x.read() if isinstance(x, Unread) else x, args), **kwargs)

        if isinstance(found, list | tuple):
            known = _by_rows_of_parts(function, args, kwargs)
            return [
                Unread(one, known(n) if known else lambda a, b, n=n: _cut(compute()[n], a, b))
                for n, one in enumerate(found)
            ]
        return Unread(found, _by_rows(function, args, kwargs) or (lambda a, b: _cut(compute(), a, b)))


def _without_numbers(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _cut(tensor: Tensor, first: int, last: int) -> Tensor:
    return tensor[first:last] if tensor.dim() else tensor


def _by_rows(function: Any, args: Any, kwargs: Any) -> Rows | None:
    """How rows of a result are computed from those rows of the arguments; None where more is needed."""
    if function in ROW_BY_ROW:
        return lambda first, last: function(args[0].rows(first, last), *args[1:], **kwargs)
    dim = args[1] if len(args) > 1 else 0
    if function == aten.stack.default and dim == 0:  # experts: each is a row
        return lambda first, last: torch.stack([one.read() for one in args[0][first:last]])
    if function == aten.cat.default and dim > 0:
        return lambda first, last: torch.cat([one.rows(first, last) for one in args[0]], dim)
    if function == aten.squeeze.dim and dim == 0 and args[0].shape[0] == 1 and args[0].dim() > 1:  # one expert
        return lambda first, last: args[0].rows(0, 1)[0, first:last]
    return None


def _by_rows_of_parts(function: Any, args: Any, kwargs: Any) -> Callable[[int], Rows] | None:
    """As `_by_rows`, for the numbered parts that a tensor is split into."""
    if function != aten.split.Tensor or kwargs:
        return None
    tensor, size, dim = args[0], args[1], args[2] if len(args) > 2 else 0
    if dim == 0:
        return lambda n: lambda first, last: tensor.rows(n * size + first, n * size + last)
    if dim > 0:
        return lambda n: lambda first, last: function(tensor.rows(first, last), size, dim)[n]
    return None


# ---- a model of such weights ----


def open_weights(files: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors of safetensors files by name, none of them read."""
    found: dict[str, Tensor] = {}
    for file in files:
        opened = safe_open(file, "pt", backend="pread")  # pages of a file that is mapped would stay in memory
        for name in opened.keys():  # noqa: SIM118
            found[name] = _unread_part(opened.get_slice(name))
    return found


def _unread_part(part: Any) -> Unread:
    shape = part.get_shape()
    like = torch.empty(shape, dtype=(part[:0] if shape else part[...]).dtype, device="meta")
    return Unread(like, lambda first, last: part[first:last] if shape else part[...])


def build_unread(kind: Any, described: Any, name: str, dtype: torch.dtype, **hub: Any) -> Any:
    """As `kind.from_pretrained(name, dtype=dtype)`, with parameters that are `Unread`.

    Args:
        described: the model's configuration.
        hub: `revision`, `trust_remote_code`.

    Raises:
        LookupError: the weights lie elsewhere than in model.safetensors or the files of its index.
    """
    from transformers import GenerationConfig

    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        skeleton = kind.from_config(described, dtype=dtype, trust_remote_code=hub.get("trust_remote_code"))
    files = _weight_files(name, hub.get("revision"))
    model = type(skeleton).from_pretrained(None, config=skeleton.config, state_dict=open_weights(files), dtype=dtype)
    model.name_or_path = model.config.name_or_path = name  # an adapter's file says it
    options = {"revision": hub["revision"]} if hub.get("revision") else {}
    try:
        model.generation_config = GenerationConfig.from_pretrained(name, **options)
    except OSError:  # an old model, whose config.json has these settings
        options |= {"config_file_name": "config.json", "_from_model_config": True}
        model.generation_config = GenerationConfig.from_pretrained(name, **options)
    return model


def _weight_files(name: str, revision: str | None) -> list[Path]:
    """The safetensors files of a folder or a hub's model, which are downloaded where they are not here."""

    def find(file: str) -> str | None:
        return cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)

    if single := find(SAFE_WEIGHTS_NAME):
        return [Path(single)]
    if index := find(SAFE_WEIGHTS_INDEX_NAME):
        parts = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
        return [Path(str(cached_file(name, part, revision=revision))) for part in parts]
    raise LookupError(f"no {SAFE_WEIGHTS_NAME} in {name}")


def set_aside(model: nn.Module, device: torch.device) -> nn.Module:
    """Replace each unread weight by a placeholder without memory: one NaN on the device, expanded to the shape, so that
    any use of it shows, and writing fails. The weight is its attribute `UNREAD`."""
    made: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, Unread):
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(placeholder_like(parameter, device), parameter.requires_grad)
                    setattr(made[id(parameter)], UNREAD, parameter)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if isinstance(buffer, Unread):
                module._buffers[name] = buffer.read()
    return model.to(device)


def placeholder_like(tensor: Tensor, device: torch.device) -> Tensor:
    value = math.nan if tensor.is_floating_point() else 0
    return torch.full((), value, dtype=tensor.dtype, device=device).expand(tensor.shape)


def read_here(parameters: Iterable[Any]) -> int:
    """Read those of these parameters that have not been read, whole, on this rank; return how many there were."""
    count = 0
    for parameter in parameters:
        unread = vars(parameter).pop(UNREAD, None)
        if unread is not None:
            parameter.data = unread.read().to(parameter.device, parameter.dtype)  # a copy to train is wider
            count += 1
    return count


def copies_unread(wrapped: nn.Module) -> None:
    """Let what peft copied of unread modules, to train it whole, be read from where the originals are."""
    from peft.utils.other import ModulesToSaveWrapper

    for wrapper in wrapped.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            originals: Any = dict(wrapper.original_module.named_parameters())
            for copied in wrapper.modules_to_save.values():
                for name, parameter in copied.named_parameters():
                    if hasattr(originals.get(name), UNREAD):
                        parameter.data = placeholder_like(parameter, parameter.device)
                        setattr(parameter, UNREAD, getattr(originals[name], UNREAD))


def unread_of(model: nn.Module) -> dict[str, Unread]:
    """The weights that have not been read, by their parameters' names."""
    return {name: getattr(p, UNREAD) for name, p in model.named_parameters() if hasattr(p, UNREAD)}
