"""Which parts of a model text reaches: run a short row, and find the modules that its logits do not depend on.

Towers for images and sound, their projections, layers for predicting further tokens ahead and other parts that no text
comes to have no gradient. They are neither adapted nor trained; DDP would hang waiting for their gradients.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from firefly.models.attention import UnsupportedAttention, short_row
from firefly.models.checkpointing import decoder_layers
from firefly.models.probing import decoder
from firefly.models.scores import scores, scores_of

LONGER = 256
"""Tokens of a second row, where a layer seems to be used in part: some attend to blocks that a short row does not
fill."""

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Unreached:
    """What text does not reach.

    Attributes:
        modules: paths of modules whose output the logits do not depend on, those inside them too: an adapter there
            would never be used. Some have weights that are reached: Mamba computes with those of `dt_proj` and does not
            call it.
        parameters: names of parameters that the logits do not depend on.
    """

    modules: frozenset[str] = frozenset()
    parameters: frozenset[str] = frozenset()

    def has(self, path: str) -> bool:
        """Whether the module at `path` lies in an unreached one."""
        return any(above in self.modules for above in _upwards(path))

    def roots(self, model: nn.Module) -> list[str]:
        """The outermost modules of `model` whose parameters are all unreached, and unreached parameters beside them;
        those of several layers as one."""
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        trained = {path for name in names if name not in self.parameters for path in _upwards(name)}
        outermost = {next(path for path in _upwards(name) if path not in trained) for name in self.parameters}
        return alike(outermost)


def alike(names: Collection[str]) -> list[str]:
    """Paths in which a number is left out where several differ by it alone."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        found.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name), []).append(name)
    return [paths[0] if len(paths) == 1 else pattern for pattern, paths in found.items()]


def find_unreached(model: Any) -> Unreached:
    """Run `model` (of transformers, nothing attached yet) on a short row, and find what its logits do not depend on.

    Raises:
        Exception: whatever a model raises that cannot be run on text alone, or on "meta" where it looks at numbers.
    """
    modules, parameters = _reached(model, short_row(model))
    holders = _holders(model)
    decoders = set(decoder_layers(model))
    layers = {name for name, module in model.named_modules() if module in decoders}
    used = {path for name in modules for path in _upwards(name) if path in layers}
    missed = (name for name, p in model.named_parameters() if p.is_floating_point() and name not in parameters)
    if any(path in used for name in missed for path in _upwards(name)):
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGER
        more, further = _reached(model, short_row(model, min(LONGER, most)))
        modules, parameters = modules | more, parameters | further
    lists = _expert_lists(model)
    called, held = {_pooled(name, lists) for name in modules}, {_pooled(name, lists) for name in parameters}
    reached = {path for name in holders if _pooled(name, lists) in called for path in _upwards(name)}
    every = {path for name in holders for path in _upwards(name)}
    modules, parameters = every - reached, set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # Weights in 4 bit are no numbers with gradients.
        known = _pooled(name, lists) in held if parameter.is_floating_point() else name.rpartition(".")[0] in reached
        if not known:
            parameters.add(name)
    return Unreached(frozenset(modules), frozenset(parameters))


def unreached_like(model: Any, twin: Any, found: Unreached) -> Unreached:
    """What text does not reach in `model`, mapped from `twin`, a smaller model of the same architecture: a layer is
    assumed to behave as the twin's of its kind."""
    reached = {in_any_layer(name) for name, module in twin.named_modules() if not found.has(name)}
    absent = {in_any_layer(name) for name in found.modules} - reached
    every = {name for name, _ in twin.named_parameters(remove_duplicate=False)}
    never = {in_any_layer(name) for name in found.parameters} - {
        in_any_layer(name) for name in every - found.parameters
    }
    return Unreached(
        frozenset(name for name, _ in model.named_modules() if in_any_layer(name) in absent),
        frozenset(n for n, _ in model.named_parameters(remove_duplicate=False) if in_any_layer(n) in never),
    )


def _reached(model: Any, inputs: dict[str, Any]) -> tuple[set[str], set[str]]:
    """(modules with weights of their own, parameters) that the logits of `inputs` have a gradient for.

    A 0 of ours is added to each such module's output: it is in the logits' graph if the output is. So weights that
    another module computes with, without calling their own, are distinguished from those of a layer that an adapter can
    wrap; and weights in 4 bit, which have no gradients, need none.
    """
    leaves: dict[int, str] = {}
    kept: list[Tensor] = []  # or an id might come again
    holders = _holders(model)

    def watch(name: str) -> Any:
        def add(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            def one(value: Any) -> Any:
                if not isinstance(value, Tensor) or not value.is_floating_point():
                    return value
                leaf = torch.zeros((), dtype=value.dtype, device=value.device, requires_grad=True)
                kept.append(leaf)
                leaves[id(leaf)] = name
                return value + leaf

            return type(output)(map(one, output)) if type(output) in (tuple, list) else one(output)

        return add

    def release() -> None:
        for parameter, asked in before:
            parameter.requires_grad_(asked)

    before = [(p, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    named = {id(p): name for name, p in model.named_parameters()}
    with ExitStack() as stack:
        stack.callback(release)
        stack.enter_context(_as_in_training(model))
        stack.enter_context(torch.enable_grad())
        for parameter, _ in before:
            parameter.requires_grad_(True)
        for name, module in holders.items():
            stack.callback(module.register_forward_hook(watch(name)).remove)
        # Positions are those of a row from its beginning; given, they are looked at, which nothing on "meta" can be.
        inputs = {name: value for name, value in inputs.items() if name != "position_ids"}
        found = {id(leaf) for leaf in _leaves_of(_logits(model, inputs))}
    modules = {name for leaf, name in leaves.items() if leaf in found}
    parameters = {name for parameter, name in named.items() if parameter in found}
    tied = {n for n, p in model.named_parameters(remove_duplicate=False) if named.get(id(p)) in parameters}
    return modules, parameters | tied


def _logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    if scores(model):
        return scores_of(model, **inputs)
    try:
        return model(**inputs, use_cache=False).logits
    except UnsupportedAttention:  # the decoder takes segments, and what is around it does not pass them on
        return model.get_output_embeddings()(decoder(model)(**inputs, use_cache=False).last_hidden_state)


def _leaves_of(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that the graph of `tensor` begins with."""
    met, waiting = set(), [tensor.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in met:
            continue
        met.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting.extend(before for before, _ in node.next_functions)


def _holders(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have parameters of their own."""
    return {
        name: module
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }


@contextmanager
def _as_in_training(model: nn.Module) -> Iterator[None]:
    """Training mode, as some forwards differ by it, with the random state of before; no layer is left out at random."""
    was_training = {module: module.training for module in model.modules()}
    dropping = [(m, m.layerdrop) for m in model.modules() if isinstance(getattr(m, "layerdrop", None), float)]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            model.train()
            for module, _ in dropping:
                module.layerdrop = 0.0  # type: ignore[assignment]
            yield
    finally:
        for module, training in was_training.items():
            module.training = training
        for module, share in dropping:
            module.layerdrop = share


def _expert_lists(model: Any) -> list[str]:
    """Paths of lists of experts: a row's tokens choose some of them, and the others are reached by other rows."""
    text = model.config.get_text_config()
    counts = {getattr(text, field, None) for field in EXPERT_COUNTS} - {None, 0, 1}
    layers = set(decoder_layers(model))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and layers.isdisjoint(module)
        and ("expert" in name.rpartition(".")[2] or len(module) in counts)
    ]


def _pooled(name: str, lists: list[str]) -> str:
    """A path in which all experts of a list are one."""
    for path in lists:
        if name.startswith(f"{path}."):
            rest = name[len(path) + 1 :].partition(".")
            return f"{path}.#{rest[1]}{_pooled(rest[2], [])}"
    return name


def _upwards(path: str) -> list[str]:
    """A path and all above it."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def in_any_layer(name: str) -> str:
    """A module's path without the layers' numbers."""
    return re.sub(r"\d+", "#", name)
