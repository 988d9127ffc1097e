"""Where each tensor of a saved adapter belongs in a model, and peft's configuration that wraps exactly those layers."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from firefly.console import notice
from firefly.errors import UsageError
from firefly.models.saved_adapter import SavedAdapter, is_exact_start, module_of
from firefly.translation import Phrase

FACTORS = r"lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
TAIL = re.compile(rf"(?P<path>.+?)(?:\.base_layer)*\.(?P<tail>{FACTORS}|token_adapter\..+)")
PER_EXPERT = re.compile(r"\.experts\.\d+\.")
"""Experts as layers of their own, as transformers had them before version 5: peft turns their adapters into those of
the stacked weights."""


@dataclass(frozen=True)
class Placed:
    """An adapter's tensors, each with its place in the model.

    Attributes:
        factors: (module's path, what it is of the adapter there) → tensor.
        whole: parameter's path → the whole weight or bias that takes its place.
        left_to_peft: tensors of single experts, which peft stacks.
        source: module's path in the model → the path it was saved under.
    """

    factors: dict[tuple[str, str], Tensor]
    whole: dict[str, Tensor]
    left_to_peft: dict[str, Tensor]
    source: dict[str, str]

    @property
    def renamed(self) -> dict[str, str]:
        return {path: saved for path, saved in self.source.items() if path != saved}

    @property
    def adapted(self) -> set[str]:
        """Modules with low-rank factors."""
        return {path for path, tail in self.factors if not tail.startswith("token_adapter.")}

    def named(self) -> dict[str, Tensor]:
        """By the names that peft looks for once the layers are wrapped."""
        found = dict(self.left_to_peft)
        for (path, tail), tensor in self.factors.items():
            found[f"{path}.{tail}"] = tensor
        for name, tensor in self.whole.items():
            path, _, leaf = name.rpartition(".")
            found[f"{path}.base_layer.{leaf}" if path in self.adapted else name] = tensor
        return found


def place_tensors(base: Any, saved: SavedAdapter) -> Placed:
    """Find each tensor's place, also where it was saved under another prefix (a bare backbone, a wrapped model).

    Raises:
        UsageError: a tensor has no place, or more than one.
    """
    modules, tensors = dict(base.named_modules()), saved.tensors
    experts = {name: value for name, value in tensors.items() if PER_EXPERT.search(f".{name}") and name not in modules}
    experts = {name: value for name, value in experts.items() if module_of(name) not in modules}
    split: dict[str, tuple[str, str | None]] = {}
    for name in tensors.keys() - experts.keys():
        match = TAIL.fullmatch(name)
        split[name] = (match["path"], name[len(match["path"]) + 1 :]) if match else (module_of(name), None)
    sizes = _widths(split, tensors)
    places = _find_places({path for path, _ in split.values()}, modules, sizes, saved, base)
    factors: dict[tuple[str, str], Tensor] = {}
    whole: dict[str, Tensor] = {}
    for name, (path, tail) in split.items():
        target = places[path]
        if tail is not None:
            factors[target, tail] = tensors[name]
            continue
        leaf = name.rpartition(".")[2]
        parameter = getattr(modules[target], leaf, None)
        if not isinstance(parameter, Tensor):
            raise mismatch(saved, base, Phrase("it has no parameter for {name}", name=name))
        whole[f"{target}.{leaf}"] = tensors[name]
    placed = Placed(factors, whole, experts, {target: path for path, target in places.items()})
    if len(placed.source) != len(places):
        twice = next(path for path, target in places.items() if placed.source[target] != path)
        raise mismatch(
            saved,
            base,
            Phrase("two of the adapter's layers match one layer of the model, {name} among them", name=twice),
        )
    if placed.renamed:
        target, path = min(placed.renamed.items())
        notice(
            "adapter.renamed",
            "the adapter {path} names {count} layers differently from the base model, {saved} for {found}: they are "
            "the same layers with another prefix, and are taken for them.",
            path=saved.folder,
            count=len(placed.renamed),
            saved=path,
            found=target,
        )
    return placed


def _widths(split: Mapping[str, tuple[str, str | None]], tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the linear layers that low-rank factors were saved for, by path; 0: not known."""
    found: dict[str, tuple[int, int]] = {}
    for name, (path, tail) in split.items():
        if tail in ("lora_A.weight", "lora_B.weight") and tensors[name].dim() == 2:
            known = found.get(path, (0, 0))
            shape = tensors[name].shape
            found[path] = (shape[1], known[1]) if tail == "lora_A.weight" else (known[0], shape[0])
    return found


def _find_places(
    paths: set[str],
    modules: Mapping[str, nn.Module],
    widths: Mapping[str, tuple[int, int]],
    saved: SavedAdapter,
    base: Any,
) -> dict[str, str]:
    """A module of the model for every path: the same, or the one in whose path only the beginning is another.

    Layers of one stack (`language_model.model.layers`) are looked for together: a beginning counts only if it fits all
    of them, in names and in widths.
    """
    found = {path: path for path in paths if path in modules}
    stacks: dict[tuple[str, ...], list[str]] = {}
    for path in sorted(paths - found.keys()):
        parts = path.split(".")
        stacks.setdefault(tuple(parts[: _stack_length(parts)]), []).append(path)
    for stack, members in stacks.items():
        candidates: list[dict[str, str]] = []
        # From the longest common end to the shortest: the fewer names are given up, the less is in doubt.
        numbered = any(part.isdigit() for part in members[0].split("."))
        for drop in range(len(stack) if numbered else len(stack) + 1):
            ends = {path: ".".join(path.split(".")[drop:]) for path in members}
            first = ends[members[0]]
            beginnings = {name[: -len(first)] for name in modules if name == first or name.endswith(f".{first}")}
            for beginning in sorted(beginnings):
                fitting = {path: beginning + end for path, end in ends.items()}
                if all(
                    target in modules and _has_width(modules[target], widths.get(path))
                    for path, target in fitting.items()
                ):
                    candidates.append(fitting)
            if candidates:
                break
        if not candidates:
            raise mismatch(saved, base, Phrase("it has no layer {name}, nor one whose path ends so", name=members[0]))
        if len(candidates) > 1:
            named = ", ".join(candidate[members[0]] for candidate in candidates[:3])
            raise mismatch(saved, base, Phrase("{name} may be any of {found}", name=members[0], found=named))
        found |= candidates[0]
    return found


def _stack_length(parts: list[str]) -> int:
    """How many names lead to a numbered layer; for a module outside of such a stack, to its parent."""
    return next((place for place, part in enumerate(parts) if part.isdigit()), len(parts) - 1)


def _has_width(module: nn.Module, widths: tuple[int, int] | None) -> bool:
    if widths is None:
        return True
    if isinstance(module, Conv1D):
        own = (module.weight.shape[0], module.weight.shape[1])
    else:
        own = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(not asked or size is None or size == asked for asked, size in zip(widths, own, strict=True))


def settings_for(base: Any, saved: SavedAdapter, placed: Placed) -> Any:
    """peft's configuration that wraps exactly the layers that there are tensors for.

    Raises:
        UsageError: layers that it names, in a stack that it adapts, have no tensors.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    settings = copy.deepcopy(saved.settings)
    if not is_exact_start(settings.init_lora_weights):
        settings.init_lora_weights = True
    elif any(getattr(parameter, "quant_state", None) is not None for parameter in base.parameters()):
        raise UsageError(
            "adapter.start_in_4_bit",
            "the adapter {path} began with init_lora_weights = {start!r}, which takes a part out of the base's "
            "weights; that cannot be done in 4 bits. Load the base in 16 bits (train_mode lora; chat without "
            "--load_in_4bit), or merge it.",
            path=saved.folder,
            start=settings.init_lora_weights,
        )
    settings.velora_config = None
    if placed.renamed:
        settings.rank_pattern = _pattern_for(settings.rank_pattern, placed)
        settings.alpha_pattern = _pattern_for(settings.alpha_pattern, placed)
    if placed.left_to_peft or not placed.adapted or settings.target_modules is None:
        return settings
    linear = [name for name, module in base.named_modules() if isinstance(module, (nn.Linear, nn.Embedding, Conv1D))]
    asked = {name for name in linear if check_target_module_exists(settings, name)}
    stacks = {tuple(path.split(".")[: _stack_length(path.split("."))]) for path in placed.adapted}
    without = asked - placed.adapted
    elsewhere = {name for name in without if tuple(name.split(".")[: _stack_length(name.split("."))]) not in stacks}
    if without - elsewhere:
        missing = sorted(without - elsewhere)
        raise mismatch(
            saved,
            base,
            Phrase(
                "{count} layers that its settings name have no tensors, such as {name}",
                count=len(missing),
                name=missing[0],
            ),
        )
    # What `target_parameters` names is adapted without being a target module: stacks of experts, for one.
    ends = tuple(f".{name}" for name in settings.target_parameters or ())
    parameters = {
        path
        for path in placed.adapted
        if any(f".{path}.{leaf}".endswith(ends) for leaf, _ in base.get_submodule(path).named_parameters(recurse=False))
    }
    if asked == placed.adapted - parameters:
        return settings
    if elsewhere:
        notice(
            "adapter.not_adapted",
            "{count} layers that the adapter's settings would match have no tensors in it, all of them in other parts "
            "of the model, such as {name}: they stay as they are in the base.",
            count=len(elsewhere),
            name=min(elsewhere),
        )
    settings.target_modules = sorted(placed.adapted - parameters)
    settings.exclude_modules = settings.layers_to_transform = settings.layers_pattern = None
    return settings


def _pattern_for(pattern: dict[str, Any] | None, placed: Placed) -> dict[str, Any]:
    """Ranks or alphas of single layers, by the layers' paths in this model."""
    from peft.utils.other import get_pattern_key

    found = {}
    for path in placed.adapted if pattern else ():
        key = get_pattern_key(list(pattern or ()), placed.source[path])
        if pattern and key in pattern:
            found[f"^{re.escape(path)}"] = pattern[key]
    return found


def mismatch(saved: SavedAdapter, base: Any, problem: Phrase | str) -> UsageError:
    return UsageError(
        "model.adapter_mismatch",
        "the adapter {path} does not fit the base model {base}: {problem}",
        path=saved.folder,
        base=base.config.name_or_path,
        problem=problem,
    )
