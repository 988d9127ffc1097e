"""Saved adapters, of our own runs and of other tools: the one way in which train, merge and chat open them.

An adapter is used only where it is certain what it means on this base: its method can be served, every one of its
tensors has a place in the model and every place its tensors, the base it was made for can be had, and the vocabulary
is the one it was trained with. What is in doubt is refused by name. Nothing of an adapter is left out in silence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from firefly.config import ModelConfig
from firefly.console import notice
from firefly.errors import UsageError
from firefly.hub import snapshot_of
from firefly.models.base_weights import differing_weights, identify_weights
from firefly.models.loading import resolve_model
from firefly.models.tokens import vocabulary_ends

SETTINGS, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")

PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
"""`init_lora_weights` that shape A and B alone. Once trained, the tensors hold all there is to know."""
EXACT_STARTS = ("pissa", "olora")
"""Starts that take a part out of the base's weights, by a decomposition that gives the same part again."""
CHANGING_STARTS = ("pissa_niter", "corda", "lora_ga", "loftq")
"""Starts that change the base's weights and cannot be repeated from the adapter's files: by random numbers, by looking
at data, or by quantizing."""

SAME_FORWARD = {"use_dora", "velora_config"}
"""Of peft's variants, those that are computed here: DoRA, and VeLoRA, which is LoRA with a backward pass of its own."""

OUR_PREFIX = "base_model.model."
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Modules that torch.compile, FSDP and activation checkpointing put into a tensor's path."""


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
            raise UsageError(
                "adapter.unreadable_weights",
                "the adapter's weights {path} cannot be read: {problem}. Copy or save them again.",
                path=self.weights,
                problem=problem,
            ) from error
        found: dict[str, Tensor] = {}
        for key, value in loaded.items():
            name = _plain_name(key)
            if ".original_module." in name:
                continue  # peft's copy of what a module trained whole was before
            if name in found and not torch.equal(found[name], value):
                raise UsageError(
                    "adapter.two_tensors",
                    "the adapter's weights {path} hold two different tensors for {name}. Save the adapter again.",
                    path=self.weights,
                    name=name,
                )
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise UsageError(
                    "adapter.not_finite",
                    "the adapter's weights {path} hold numbers that are not finite, in {name} for one. Its training "
                    "diverged, or the file is damaged: take an earlier checkpoint.",
                    path=self.weights,
                    name=name,
                )
            found[name] = value
        if not found:
            raise UsageError(
                "adapter.no_tensors",
                "the adapter's weights {path} hold no tensor. Save the adapter again.",
                path=self.weights,
            )
        return found

    def holds_vocabulary(self, base: Any) -> bool:
        """Whether it brings the whole matrix of the embedding or head of `base` along, without training it whole."""
        ends = {name.rpartition(".")[2] for name, module in base.named_modules() if module in vocabulary_ends(base)}
        trained = {str(name).rpartition(".")[2] for name in self.settings.modules_to_save or ()} & ends
        if trained and self.settings.ensure_weight_tying:  # the other one follows
            return False
        whole = (name for name in self.tensors if name.endswith(".weight") and ".lora_" not in name)
        held = {module_of(name).removesuffix(".token_adapter").rpartition(".")[2] for name in whole}
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


def module_of(name: str) -> str:
    """The module that a parameter belongs to; peft's `base_layer` is the module itself."""
    path = name.rpartition(".")[0]
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path


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
        raise UsageError(
            "adapter.several",
            "{path} holds no adapter itself, but these folders in it do: {names}. Name one of them.",
            path=folder,
            names=", ".join(path.name for path in inside),
        )
    raise UsageError(
        "model.no_adapter",
        "{path} holds no adapter (adapter_config.json is missing). Give the output_dir or a checkpoint of a LoRA or "
        "QLoRA run.",
        path=adapter,
    )


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
        raise UsageError(
            "adapter.unreadable",
            "the adapter_config.json of {path} cannot be read: {problem}",
            path=adapter,
            problem=error,
        ) from error
    kind = str(written.get("peft_type"))
    if kind != "LORA":
        raise UsageError(
            "adapter.not_lora",
            "the adapter {path} is of the kind {kind}; only LoRA adapters can be trained on, merged and served. Use "
            "it with the tool that made it, or train a LoRA adapter.",
            path=adapter,
            kind=kind,
        )
    _refuse_start(adapter, written.get("init_lora_weights", True))
    try:
        settings: Any = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise UsageError(
            "adapter.unreadable",
            "the adapter_config.json of {path} cannot be read: {problem}",
            path=adapter,
            problem=" ".join(str(error).split()),
        ) from error
    _refuse_variants(adapter, settings, written)
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise UsageError(
            "adapter.no_weights",
            "{path} has an adapter_config.json but no weights ({names}).",
            path=folder,
            names=", ".join(WEIGHTS),
        )
    return SavedAdapter(Path(adapter).expanduser(), folder, settings, weights)


def _refuse_start(adapter: str, start: Any) -> None:
    if not isinstance(start, str) or start.lower() in (*PLAIN_STARTS, "true", "false") or is_exact_start(start):
        return
    if start.lower().startswith(CHANGING_STARTS):
        raise UsageError(
            "adapter.start",
            "the adapter {path} began with init_lora_weights = {start!r}, which changed the base model's weights in a "
            "way that its files do not hold, so its own weights mean nothing without that changed base. Convert it to "
            "a plain LoRA adapter with the tool that trained it: peft's save_pretrained(…, "
            "path_initial_model_for_weight_conversion=…); LLaMA-Factory's pissa_convert: true; of loftq, give the "
            "quantized base it was saved with and set init_lora_weights to true in adapter_config.json.",
            path=adapter,
            start=start,
        )
    raise UsageError(
        "adapter.start_unknown",
        "the adapter {path} began with init_lora_weights = {start!r}, which is not known here: it may have changed "
        "the base model. If it did not, set init_lora_weights to true in its adapter_config.json.",
        path=adapter,
        start=start,
    )


def is_exact_start(start: Any) -> bool:
    return isinstance(start, str) and start.lower() in EXACT_STARTS


def _refuse_variants(adapter: str, settings: Any, written: Mapping[str, Any]) -> None:
    """LoRA with another forward than x Wᵀ + s x Aᵀ Bᵀ or DoRA's, or on a base with other layers than it has.

    Also what the installed peft does not know and would skip: a switch that a later version brought.
    """
    known = {field.name: field for field in fields(settings)}
    variants = {name for name, field in known.items() if field.metadata.get("is_lora_variant")}
    refused = (variants | {"use_qalora", "layer_replication", "megatron_config"}) - SAME_FORWARD
    for name, value in written.items():
        switch = value is True or (isinstance(value, dict | list) and bool(value))
        if (name in refused and value) or (name not in known and switch):
            raise UsageError(
                "adapter.variant",
                "the adapter {path} uses {key}, a variant of LoRA that computes in another way than a merged or "
                "served model would. Train it without {key}.",
                path=adapter,
                key=name,
            )


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
        raise UsageError(
            "model.no_base",
            "the adapter {path} does not say which base model it belongs to; give --model_name_or_path.",
            path=adapter,
        )
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
        raise UsageError(
            "adapter.other_base",
            "the adapter {path} was trained on other weights than those of {base}: {count} of {total} layers and "
            "tensors differ, {name} first. Give the base it was trained on, or go on with --force (training: "
            "adapter_on_other_base: true).",
            **values,
            name=differing[0],
        )
    notice(
        "adapter.other_base_forced",
        "the adapter {path} was trained on other weights than those of {base} ({count} of {total} layers and tensors "
        "differ), and is used all the same.",
        **values,
    )
