"""Saved adapters, of our own runs and of other tools: the one gate through which train, merge and chat take them.

An adapter is used only where it is certain what it means on this base: its method can be served, every one of its
tensors has a place in the model and every place its tensors, the base it was made for can be had, and the vocabulary
is the one it was trained with. What is in doubt is refused by name. Nothing of an adapter is left out in silence.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from firefly.config import ModelConfig
from firefly.console import notice
from firefly.errors import UsageError
from firefly.hub import snapshot_of
from firefly.messages import render
from firefly.models.base_weights import differing_weights, identify_weights
from firefly.models.kernels.expert_linear import install_expert_kernels
from firefly.models.kernels.token_rows import install_token_rows
from firefly.models.loading import resolve_model
from firefly.models.tokens import is_tied, resize_embeddings, vocabulary_ends

SETTINGS, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")

PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
"""`init_lora_weights` that shape A and B alone. Once trained, the tensors hold all there is to know."""
EXACT_STARTS = ("pissa", "olora")
"""Starts that take a part out of the base's weights, by a decomposition that gives the same part again."""
CHANGING_STARTS = ("pissa_niter", "corda", "lora_ga", "loftq")
"""Starts that change the base's weights and cannot be repeated from the adapter's files: by random numbers, by looking
at data, or by quantising."""

SAME_FORWARD = {"use_dora", "velora_config"}
"""Of peft's variants, those that are computed here: DoRA, and VeLoRA, which is LoRA with a backward pass of its own."""

OUR_PREFIX = "base_model.model."
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Modules that torch.compile, FSDP and activation checkpointing put into a tensor's path."""
FACTORS = r"lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
TAIL = re.compile(rf"(?P<path>.+?)(?:\.base_layer)*\.(?P<tail>{FACTORS}|token_adapter\..+)")
PER_EXPERT = re.compile(r"\.experts\.\d+\.")
"""Experts as layers of their own, as transformers had them before version 5: peft turns their adapters into those of
the stacked weights."""


@dataclass(frozen=True)
class SavedAdapter:
    """A LoRA adapter on disk, whose method can be served.

    Attributes:
        given: the folder that was named.
        folder: where adapter_config.json lies.
        settings: peft's LoraConfig, as it was saved.
        weights: the file of its tensors.
    """

    given: Path
    folder: Path
    settings: Any
    weights: Path

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors on the CPU, by names without the wrappers of whatever saved them.

        Raises:
            UsageError: the file is damaged, or holds two different tensors for one place.
        """
        try:
            if self.weights.suffix == ".bin":
                loaded = torch.load(self.weights, map_location="cpu", weights_only=True)
            else:
                with safe_open(self.weights, "pt") as file:
                    loaded = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
                raise ValueError("no table of tensors")
        except Exception as error:  # whatever a damaged file makes its reader say
            problem = next(iter(str(error).splitlines()), type(error).__name__)
            raise UsageError("adapter.unreadable_weights", path=self.weights, problem=problem) from error
        found: dict[str, Tensor] = {}
        for key, value in loaded.items():
            name = _plain_name(key)
            if ".original_module." in name:
                continue  # peft's copy of what a module trained whole was before
            if name in found and not torch.equal(found[name], value):
                raise UsageError("adapter.two_tensors", path=self.weights, name=name)
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise UsageError("adapter.not_finite", path=self.weights, name=name)
            found[name] = value
        if not found:
            raise UsageError("adapter.no_tensors", path=self.weights)
        return found

    def holds_vocabulary(self, base: Any) -> bool:
        """Whether it brings the whole matrix of the embedding or head of `base` along, without training it whole."""
        ends = {name.rpartition(".")[2] for name, module in base.named_modules() if module in vocabulary_ends(base)}
        trained = {str(name).rpartition(".")[2] for name in self.settings.modules_to_save or ()} & ends
        if trained and self.settings.ensure_weight_tying:  # the other one follows
            return False
        whole = (name for name in self.tensors if name.endswith(".weight") and ".lora_" not in name)
        held = {_module_of(name).removesuffix(".token_adapter").rpartition(".")[2] for name in whole}
        return bool(held & (ends - trained))

    @property
    def token_rows(self) -> set[int]:
        """Ids of the tokens that it has rows of its own for."""
        found = self.settings.trainable_token_indices or {}
        return {row for rows in (found.values() if isinstance(found, dict) else [found]) for row in rows}


def _plain_name(key: str) -> str:
    """A tensor's path in the model, without peft's prefix and without what DDP, FSDP and others put into it."""
    parts = [part for part in key.split(".") if part not in WRAPPERS]
    while parts[0] == "module":
        parts = parts[1:]
    name = ".".join(parts)
    while name.startswith(OUR_PREFIX):
        name = name.removeprefix(OUR_PREFIX)
    # The adapter's own name stands in keys that were not saved by peft.
    name = re.sub(r"\.(lora_[AB])\.(?!(?:weight|bias)$)[^.]+\.(weight|bias)$", r".\1.\2", name)
    name = re.sub(r"\.(lora_embedding_[AB])\.[^.]+$", r".\1", name)
    name = re.sub(r"\.lora_magnitude_vector(?:\.[^.]+)*$", ".lora_magnitude_vector", name)
    name = re.sub(r"\.trainable_tokens_delta\.[^.]+$", ".trainable_tokens_delta", name)
    return re.sub(r"\.modules_to_save(?:\.default)?\.", ".", name)


# ---- what an adapter's folder says ----


def is_adapter(path: str) -> bool:
    """Whether a folder that was given as a model holds an adapter, or named ones and no model."""
    folder = Path(path).expanduser()
    named = folder.is_dir() and any(folder.glob(f"*/{SETTINGS}"))
    return (folder / SETTINGS).is_file() or (named and not (folder / "config.json").is_file())


def adapter_folder(adapter: str) -> Path:
    """The folder with adapter_config.json: the one named, or the only one inside it (peft saves a named adapter so).

    Raises:
        UsageError: there is none, or more than one.
    """
    folder = Path(adapter).expanduser()
    if folder.is_dir():
        folder = snapshot_of(folder)
    if (folder / SETTINGS).is_file():
        return folder
    inside = sorted(path.parent for path in folder.glob(f"*/{SETTINGS}")) if folder.is_dir() else []
    named = [path for path in inside if not path.name.startswith("checkpoint-")]
    if len(named) == 1:
        return named[0]
    if inside:
        raise UsageError("adapter.several", path=folder, names=", ".join(path.name for path in inside))
    raise UsageError("model.no_adapter", path=adapter)


def adapter_settings(adapter: str) -> Any:
    """peft's configuration of a saved LoRA adapter.

    Raises:
        UsageError: none there, unreadable, or of a method that is not served.
    """
    return open_adapter(adapter).settings


def open_adapter(adapter: str) -> SavedAdapter:
    """Read what a saved adapter is, without its tensors.

    Raises:
        UsageError: none there, unreadable, of another method, or bound to a base that cannot be had.
    """
    from peft import PeftConfig

    folder = adapter_folder(adapter)
    try:
        written = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if not isinstance(written, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise UsageError("adapter.unreadable", path=adapter, problem=error) from error
    kind = str(written.get("peft_type"))
    if kind != "LORA":
        raise UsageError("adapter.not_lora", path=adapter, kind=kind)
    _refuse_start(adapter, written.get("init_lora_weights", True))
    try:
        settings: Any = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise UsageError("adapter.unreadable", path=adapter, problem=" ".join(str(error).split())) from error
    _refuse_variants(adapter, settings, written)
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise UsageError("adapter.no_weights", path=folder, names=", ".join(WEIGHTS))
    return SavedAdapter(Path(adapter).expanduser(), folder, settings, weights)


def _refuse_start(adapter: str, start: Any) -> None:
    if not isinstance(start, str) or start.lower() in (*PLAIN_STARTS, "true", "false") or _is_exact(start):
        return
    known = start.lower().startswith(CHANGING_STARTS)
    raise UsageError("adapter.start" if known else "adapter.start_unknown", path=adapter, start=start)


def _is_exact(start: Any) -> bool:
    return isinstance(start, str) and start.lower() in EXACT_STARTS


def _refuse_variants(adapter: str, settings: Any, written: Mapping[str, Any]) -> None:
    """LoRA with another forward than x Wᵀ + s x Aᵀ Bᵀ or DoRA's, or on a base with other layers than it has.

    Also what the installed peft does not know and would pass over: a switch that a later version brought.
    """
    known = {field.name: field for field in fields(settings)}
    variants = {name for name, field in known.items() if field.metadata.get("is_lora_variant")}
    refused = (variants | {"use_qalora", "layer_replication", "megatron_config"}) - SAME_FORWARD
    for name, value in written.items():
        switch = value is True or (isinstance(value, dict | list) and bool(value))
        if (name in refused and value) or (name not in known and switch):
            raise UsageError("adapter.variant", path=adapter, key=name)


# ---- what belongs to an adapter: its base, its run, its tokenizer ----


def base_of_adapter(adapter: str, model: ModelConfig) -> ModelConfig:
    """The base model that an adapter belongs to: the one given, else the one its run recorded, else its config's.

    Raises:
        UsageError: no adapter there, or no base named anywhere.
    """
    folder = adapter_folder(adapter)
    if model.name_or_path:
        return model
    run = recorded_run(folder).get("config")
    if isinstance(run, dict) and run.get("model_name_or_path"):
        hub, revision = run.get("hub", model.hub), run.get("model_revision")
        return replace(model, name_or_path=run["model_name_or_path"], hub=hub, revision=revision)
    name = open_adapter(str(folder)).settings.base_model_name_or_path
    if not name:
        raise UsageError("model.no_base", path=adapter)
    return replace(model, name_or_path=name)


def recorded_run(folder: Path) -> dict[str, Any]:
    """run.json of the run that made an adapter (a checkpoint lies inside its run's folder); empty where there is none,
    or a file of that name which is no such record."""
    for place in (folder, folder.parent):
        path = place / "run.json"
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                return {}
            return found if isinstance(found, dict) else {}
    return {}


def trained_in_4_bits(adapter: str) -> bool:
    """Whether a run of ours trained it on 4-bit weights."""
    config = recorded_run(adapter_folder(adapter)).get("config")
    return isinstance(config, dict) and config.get("train_mode") == "qlora"


def tokenizer_source(model: ModelConfig, adapter: str | None) -> str:
    """A run saves its tokenizer with its template beside the adapter; other tools beside the folder of a named one, or
    not at all: then the base's serves."""
    if adapter:
        folder = adapter_folder(adapter)
        places = (folder, Path(adapter).expanduser())
        if found := next((place for place in places if (place / "tokenizer_config.json").is_file()), None):
            return str(found)
    return resolve_model(model)


def check_base(adapter: str, model: ModelConfig, force: bool, found: Mapping[str, Any] | None = None) -> None:
    """Compare the base with the one that the adapter's run recorded; nothing to do where none did.

    Args:
        force: go on with another one, and say so.
        found: what `identify_weights` says of the base, where that is known.

    Raises:
        UsageError: it is another one.
    """
    folder = adapter_folder(adapter)
    hashes = recorded_run(folder).get("hashes")
    recorded = hashes.get("base_weights") if isinstance(hashes, dict) else None
    if not isinstance(recorded, dict) or "groups" not in recorded:
        return
    found = found or identify_weights(resolve_model(model), model.revision)
    differing = differing_weights(recorded, found)
    if not differing:
        return
    values = {"path": adapter, "base": model.name_or_path, "count": len(differing), "total": len(recorded["groups"])}
    if not force:
        raise UsageError("adapter.other_base", **values, name=differing[0])
    notice("adapter.other_base_forced", **values)


# ---- onto a base ----


def load_adapter(base: Any, adapter: str | SavedAdapter, *, dropout: float | None = None) -> Any:
    """Wrap `base` with a saved adapter, its vocabulary made as large as the adapter's.

    Args:
        dropout: train it on with this dropout, from fp32 masters; None: it is to be served.

    Raises:
        UsageError: its tensors and the base's layers are not each other's, or what it needs to know of the base is
            nowhere written.
    """
    from peft import PeftModelForCausalLM, set_peft_model_state_dict

    saved = open_adapter(adapter) if isinstance(adapter, str) else adapter
    if saved.folder.parent == saved.given:
        notice("adapter.in_subfolder", path=saved.given, found=saved.folder.name)
    placed = _place(base, saved)
    settings = _settings_for(base, saved, placed)
    settings.inference_mode = dropout is None
    if dropout is not None:
        settings.lora_dropout = 0.0 if settings.target_parameters else dropout
    _fit_rows(base, saved, placed)
    try:
        wrapped: Any = PeftModelForCausalLM(base, settings)
        if dropout is not None:  # before the numbers come: the base's type would round them
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        state = {f"{OUR_PREFIX}{name}": value for name, value in placed.named().items()}
        result = set_peft_model_state_dict(wrapped, state)
    except KeyError as error:  # peft's word for a module trained whole without its tensors
        raise _mismatch(saved, base, render("adapter.lacks_tensor", name=error)) from error
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise _mismatch(saved, base, str(error)) from error
    lost = [*result.unexpected_keys, *_without_tensor(wrapped, set(result.missing_keys))]
    if lost:
        first = min(lost).removeprefix(OUR_PREFIX)
        raise _mismatch(saved, base, render("adapter.no_counterpart", count=len(lost), name=first))
    if dropout is None:
        wrapped.eval()
    install_expert_kernels(wrapped)  # peft's own forward cannot read experts in 4 bit
    install_token_rows(wrapped)
    return wrapped


def _without_tensor(wrapped: nn.Module, missing: set[str]) -> list[str]:
    """Weights of the adapter that the file had nothing for, under none of the names that they share."""
    named = list(wrapped.named_parameters(remove_duplicate=False))
    given = {id(parameter) for name, parameter in named if name not in missing}
    own = re.compile(r"\.(lora_|modules_to_save\.|token_adapter\.trainable)")
    return [name for name, parameter in named if own.search(name) and id(parameter) not in given]


@dataclass(frozen=True)
class _Placed:
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


def _place(base: Any, saved: SavedAdapter) -> _Placed:
    """Find each tensor's place, also where it was saved under another prefix (a bare backbone, a wrapped model).

    Raises:
        UsageError: a tensor has no place, or more than one.
    """
    modules, tensors = dict(base.named_modules()), saved.tensors
    experts = {name: value for name, value in tensors.items() if PER_EXPERT.search(f".{name}") and name not in modules}
    experts = {name: value for name, value in experts.items() if _module_of(name) not in modules}
    split: dict[str, tuple[str, str | None]] = {}
    for name in tensors.keys() - experts.keys():
        match = TAIL.fullmatch(name)
        split[name] = (match["path"], name[len(match["path"]) + 1 :]) if match else (_module_of(name), None)
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
            raise _mismatch(saved, base, render("adapter.no_parameter", name=name))
        whole[f"{target}.{leaf}"] = tensors[name]
    placed = _Placed(factors, whole, experts, {target: path for path, target in places.items()})
    if len(placed.source) != len(places):
        twice = next(path for path, target in places.items() if placed.source[target] != path)
        raise _mismatch(saved, base, render("adapter.shared_place", name=twice))
    if placed.renamed:
        target, path = min(placed.renamed.items())
        notice("adapter.renamed", path=saved.folder, count=len(placed.renamed), saved=path, found=target)
    return placed


def _module_of(name: str) -> str:
    """The module that a parameter belongs to; peft's `base_layer` is the module itself."""
    path = name.rpartition(".")[0]
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path


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
            raise _mismatch(saved, base, render("adapter.no_place", name=members[0]))
        if len(candidates) > 1:
            named = ", ".join(candidate[members[0]] for candidate in candidates[:3])
            raise _mismatch(saved, base, render("adapter.many_places", name=members[0], found=named))
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


def _settings_for(base: Any, saved: SavedAdapter, placed: _Placed) -> Any:
    """peft's configuration that wraps exactly the layers that there are tensors for.

    Raises:
        UsageError: layers that it names, in a stack that it adapts, have no tensors.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    settings = copy.deepcopy(saved.settings)
    if not _is_exact(settings.init_lora_weights):
        settings.init_lora_weights = True
    elif any(getattr(parameter, "quant_state", None) is not None for parameter in base.parameters()):
        raise UsageError("adapter.start_in_4_bit", path=saved.folder, start=settings.init_lora_weights)
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
        raise _mismatch(saved, base, render("adapter.layers_without_tensors", count=len(missing), name=missing[0]))
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
        notice("adapter.not_adapted", count=len(elsewhere), name=min(elsewhere))
    settings.target_modules = sorted(placed.adapted - parameters)
    settings.exclude_modules = settings.layers_to_transform = settings.layers_pattern = None
    return settings


def _pattern_for(pattern: dict[str, Any] | None, placed: _Placed) -> dict[str, Any]:
    """Ranks or alphas of single layers, by the layers' paths in this model."""
    from peft.utils.other import get_pattern_key

    found = {}
    for path in placed.adapted if pattern else ():
        key = get_pattern_key(list(pattern or ()), placed.source[path])
        if pattern and key in pattern:
            found[f"^{re.escape(path)}"] = pattern[key]
    return found


# ---- the vocabulary ----


def _fit_rows(base: Any, saved: SavedAdapter, placed: _Placed) -> None:
    """Give embedding and head as many rows as the adapter was trained with.

    Raises:
        UsageError: the adapter's embedding and head differ in this, or rows that the base lacks are in no file.
    """
    ends = {name: module for name, module in base.named_modules() if module in vocabulary_ends(base)}
    present = {name: module.weight.shape[0] for name, module in ends.items()}
    asked = {name: rows for name in ends if (rows := _rows_of(name, placed))}
    if not asked:  # rows of single tokens say how many there are at least
        least = max(saved.token_rows, default=-1) + 1
        asked = {name: max(least, rows) for name, rows in present.items()}
    if all(present[name] == rows for name, rows in asked.items()):
        return
    if len(set(asked.values())) > 1:
        described = ", ".join(f"{name}: {count}" for name, count in sorted(asked.items()))
        raise _mismatch(saved, base, render("adapter.two_vocabularies", sizes=described))
    rows, before = next(iter(asked.values())), present[next(iter(asked))]
    held = [_holds_rows(name, placed) for name in ends]
    if rows > before and not (any(held) if is_tied(base) else all(held)):
        unknown = set(range(before, rows)) - saved.token_rows
        if unknown:
            raise UsageError("adapter.rows_unknown", path=saved.folder, count=len(unknown), rows=rows, base=before)
    resize_embeddings(base, rows)
    notice("adapter.resized", path=saved.folder, rows=rows, base=before)


def _holds_rows(name: str, placed: _Placed) -> bool:
    """Whether the adapter's file has the whole matrix of an embedding or head."""
    return f"{name}.weight" in placed.whole or (name, "token_adapter.base_layer.weight") in placed.factors


def _rows_of(name: str, placed: _Placed) -> int:
    """How many tokens an adapter's embedding or head has; 0 if its tensors do not say."""
    if (tensor := placed.whole.get(f"{name}.weight")) is not None:
        return tensor.shape[0]
    for tail, dim in (("token_adapter.base_layer.weight", 0), ("lora_embedding_A", 1), ("lora_B.weight", 0)):
        if (tensor := placed.factors.get((name, tail))) is not None:
            return tensor.shape[dim]
    return 0


def _mismatch(saved: SavedAdapter, base: Any, problem: str) -> UsageError:
    lines = " ".join(problem.strip().splitlines()[:3])
    return UsageError("model.adapter_mismatch", path=saved.folder, base=base.config.name_or_path, problem=lines)
