"""Saved adapters onto a base: every tensor to its place, the vocabulary as large as the adapter's, or a refusal.

One adapter is wrapped around its base for good (`load_adapter`). Several over one base, for serving, take turns
(`load_adapters`, `use_adapter`): each is wrapped around the base alone, and what that put in place of modules and
parameters is taken out again and kept. To use one is to put its own back. So a model computes with it as if no other
were there, whatever kinds stand beside each other, and without any exactly as before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from firefly.console import notice
from firefly.errors import UsageError
from firefly.models.adapter_placement import Placed, mismatch, place_tensors, settings_for
from firefly.models.kernels.expert_linear import install_expert_kernels
from firefly.models.kernels.peft_layers import install_token_rows
from firefly.models.saved_adapter import OUR_PREFIX, SavedAdapter, is_exact_start, open_adapter
from firefly.models.scores import scores
from firefly.models.streaming import is_streamed, stream_weights
from firefly.models.tokens import is_tied, resize_embeddings, vocabulary_ends
from firefly.models.unread import read_here
from firefly.translation import Phrase, translate

WHOLE_UNDER_ROWS = "token_adapter.base_layer.weight"
"""The whole matrix that an adapter was saved with, beside rows of it that it trained."""


def load_adapter(base: Any, adapter: str | SavedAdapter, *, dropout: float | None = None) -> Any:
    """Wrap `base` with a saved adapter, its vocabulary made as large as the adapter's.

    Args:
        dropout: train it on with this dropout, from fp32 masters; None: it is to be served.

    Raises:
        UsageError: its tensors and the base's layers are not each other's, or what it needs to know of the base is
            nowhere written.
    """
    saved = open_adapter(adapter) if isinstance(adapter, str) else adapter
    _tell_of_subfolder(saved)
    return _wrap_for_good(base, saved, place_tensors(base, saved), dropout)


def _wrap_for_good(base: Any, saved: SavedAdapter, placed: Placed, dropout: float | None = None) -> Any:
    settings = settings_for(base, saved, placed)
    settings.inference_mode = dropout is None
    if dropout is not None:
        settings.lora_dropout = 0.0 if settings.target_parameters else dropout
    _fit_rows(base, saved, placed)
    written = [*placed.whole, *(f"{path}.weight" for path, tail in placed.factors if tail == WHOLE_UNDER_ROWS)]
    read_here(base.get_parameter(name) for name in written)  # the adapter's numbers are written over them
    if is_exact_start(saved.settings.init_lora_weights) and read_here(base.parameters()):
        notice(
            "engine.loads_whole",
            "every process loads the whole model: {reason}",
            reason=translate(
                "the adapter {path} began with init_lora_weights = {start!r}, which takes a part out of the base's "
                "weights.",
                path=saved.folder,
                start=saved.settings.init_lora_weights,
            ),
        )
    wrapped = _wrap(base, saved, placed, settings)
    return stream_weights(wrapped) if is_streamed(wrapped) else wrapped


def _tell_of_subfolder(saved: SavedAdapter) -> None:
    if saved.folder.parent == saved.given:
        notice(
            "adapter.in_subfolder",
            "{path} holds one adapter, in its folder {found}: that one is used.",
            path=saved.given,
            found=saved.folder.name,
        )


def _wrap(base: Any, saved: SavedAdapter, placed: Placed, settings: Any) -> Any:
    """peft's wrapper around `base`, with the adapter's numbers; to be trained unless settings.inference_mode.

    Raises:
        UsageError: peft does not take them.
    """
    from peft import PeftModel, PeftModelForCausalLM, set_peft_model_state_dict

    try:
        wrapped: Any = (PeftModel if scores(base) else PeftModelForCausalLM)(base, settings)
        if not settings.inference_mode:  # before the numbers come: the base's type would round them
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        state = {f"{OUR_PREFIX}{name}": value for name, value in placed.named().items()}
        result = set_peft_model_state_dict(wrapped, state)
    except KeyError as error:  # peft's word for a module trained whole without its tensors
        raise mismatch(saved, base, Phrase("its file has no tensor for {name}", name=error)) from error
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise mismatch(saved, base, " ".join(str(error).strip().splitlines()[:3])) from error
    lost = [*result.unexpected_keys, *_without_tensor(wrapped, set(result.missing_keys))]
    if lost:
        first = min(lost).removeprefix(OUR_PREFIX)
        raise mismatch(
            saved, base, Phrase("{count} weights have no counterpart, such as {name}", count=len(lost), name=first)
        )
    if settings.inference_mode:
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


# ---- several over one base ----

ADAPTERS = "firefly_adapters"
"""The attribute of a model that holds its adapters."""

Slot = tuple[nn.Module, str]
"""A module's attribute: one of its children, or one of its own parameters."""


@dataclass
class Adapters:
    """The adapters of one model, of which at most one computes.

    Attributes:
        replaced: name → what the adapter puts into places of the base; None: the base, which replaces nothing. Where
            None is missing, the base's own weights were changed.
        base: what stands in all of these places without an adapter.
        active: the name of the one that computes.
    """

    replaced: dict[str | None, dict[Slot, nn.Module | nn.Parameter]]
    base: dict[Slot, nn.Module | nn.Parameter]
    active: str | None


def load_adapters(base: Any, adapters: Mapping[str, SavedAdapter]) -> Any:
    """Let `use_adapter` choose among these adapters and `base` itself; returns `base`, in which none computes yet.

    An adapter alone may bring new rows of the vocabulary, or a start that changes the base's weights: then it computes
    from now on, and the base is no longer to be had.

    Raises:
        UsageError: one does not fit the base (see `load_adapter`), or cannot stand beside another on it.
    """
    placed: dict[str, Placed] = {}
    for name, saved in adapters.items():  # all, before the first one is wrapped
        _tell_of_subfolder(saved)
        placed[name] = place_tensors(base, saved)
        if len(adapters) > 1 and (problem := _changes_base(base, saved, placed[name])):
            raise UsageError(
                "adapter.not_beside",
                "the adapter {path} cannot be served beside others: {problem}. Serve it alone, or merge it and serve "
                "the merged model.",
                path=saved.folder,
                problem=problem,
            )
    known = Adapters({None: {}}, {}, None)
    for name, saved in adapters.items():
        if _changes_base(base, saved, placed[name]):
            _wrap_for_good(base, saved, placed[name])
            known = Adapters({name: {}}, {}, name)
            break
        known.replaced[name] = _taken_out(base, saved, placed[name], known.base)
    setattr(base, ADAPTERS, known)
    return base.eval()


def use_adapter(model: Any, name: str | None) -> None:
    """Let a model of `load_adapters` compute with this adapter; None: as the base alone.

    Nothing may be computing meanwhile. What was recorded of a forward pass (a CUDA graph) still holds the other one.

    Raises:
        KeyError: no such adapter, or no base beside it.
    """
    known: Adapters | None = getattr(model, ADAPTERS, None)
    if known is None:
        if name is not None:
            raise KeyError(name)
        return
    coming, leaving = known.replaced[name], known.replaced[known.active]
    if coming is leaving:
        return
    for slot in leaving.keys() - coming.keys():
        setattr(*slot, known.base[slot])
    for slot, own in coming.items():
        setattr(*slot, own)
    known.active = name


def has_base(model: Any) -> bool:
    """Whether `use_adapter(model, None)` is possible."""
    known: Adapters | None = getattr(model, ADAPTERS, None)
    return known is None or None in known.replaced


def _changes_base(base: Any, saved: SavedAdapter, placed: Placed) -> Phrase | None:
    """What an adapter changes in the base, so that nothing else can be computed with it; None: nothing."""
    if is_exact_start(saved.settings.init_lora_weights):
        return Phrase(
            "it began with init_lora_weights = {start!r}, which takes a part out of the base's weights",
            start=saved.settings.init_lora_weights,
        )
    if asked := _asked_rows(base, saved, placed):
        return Phrase(
            "it was trained with a vocabulary of {rows} rows, and the base model has {base}",
            rows=asked[0],
            base=asked[1],
        )
    return None


def _taken_out(
    base: Any, saved: SavedAdapter, placed: Placed, originals: dict[Slot, nn.Module | nn.Parameter]
) -> dict[Slot, nn.Module | nn.Parameter]:
    """Wrap `base` with an adapter, and put all as it was; returns what was replaced, and adds what stood there to
    `originals`."""
    settings = settings_for(base, saved, placed)
    settings.inference_mode, settings.lora_dropout = True, 0.0
    copies = _copy_written(base, placed)
    for slot, (_, copied) in copies.items():
        setattr(*slot, copied)
    before = dict(base.named_modules(remove_duplicate=False))
    _wrap(base, saved, placed, settings)
    after = dict(base.named_modules(remove_duplicate=False))
    found: dict[Slot, nn.Module | nn.Parameter] = {}
    for path, module in before.items():
        parent, _, leaf = path.rpartition(".")
        # Of a module that was replaced, what lies below it has other paths now, and is as it was.
        if path and after.get(path) is not module and after.get(parent) is before[parent]:
            slot = before[parent], leaf
            found[slot], originals[slot] = after[path], module
    for slot, original in originals.items():
        if slot in found:
            setattr(*slot, original)
    for slot, (original, copied) in copies.items():
        setattr(*slot, original)
        if not torch.equal(copied, original):  # else its numbers went into a module that was replaced
            found[slot], originals[slot] = copied, original
    del base.peft_config  # or peft would take the next one for an addition to this one
    return found


def _copy_written(base: Any, placed: Placed) -> dict[Slot, tuple[nn.Parameter, nn.Parameter]]:
    """(parameter, a copy of it) for each parameter of the base that the adapter's numbers would be written over: biases
    that it trained, embeddings that were saved with it. Tied weights stay tied."""
    written = placed.whole | {
        f"{path}.weight": tensor for (path, tail), tensor in placed.factors.items() if tail == WHOLE_UNDER_ROWS
    }
    copies: dict[int, nn.Parameter] = {}
    for name, tensor in written.items():
        parameter = base.get_parameter(name)
        same = parameter.shape == tensor.shape and torch.equal(tensor.to(parameter), parameter)
        if not same and getattr(parameter, "quant_state", None) is None:
            copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
    return {
        (module, leaf): (parameter, copies[id(parameter)])
        for module in base.modules()
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if id(parameter) in copies
    }


# ---- the vocabulary ----


def _asked_rows(base: Any, saved: SavedAdapter, placed: Placed) -> tuple[int, int] | None:
    """How many rows embedding and head have in the adapter, and in the base; None: as many.

    Raises:
        UsageError: the adapter's embedding and head differ in this.
    """
    ends = {name: module for name, module in base.named_modules() if module in vocabulary_ends(base)}
    present = {name: module.weight.shape[0] for name, module in ends.items()}
    asked = {name: rows for name in ends if (rows := _rows_of(name, placed))}
    if not asked:  # rows of single tokens say how many there are at least
        least = max(saved.token_rows, default=-1) + 1
        asked = {name: max(least, rows) for name, rows in present.items()}
    if all(present[name] == rows for name, rows in asked.items()):
        return None
    if len(set(asked.values())) > 1:
        described = ", ".join(f"{name}: {count}" for name, count in sorted(asked.items()))
        raise mismatch(saved, base, Phrase("its vocabulary has two sizes ({sizes})", sizes=described))
    return next(iter(asked.values())), present[next(iter(asked))]


def _fit_rows(base: Any, saved: SavedAdapter, placed: Placed) -> None:
    """Give embedding and head as many rows as the adapter was trained with.

    Raises:
        UsageError: the adapter's embedding and head differ in this, or rows that the base lacks are in no file.
    """
    if (asked := _asked_rows(base, saved, placed)) is None:
        return
    rows, before = asked
    held = [_holds_rows(name, placed) for name, module in base.named_modules() if module in vocabulary_ends(base)]
    if rows > before and not (any(held) if is_tied(base) else all(held)):
        unknown = set(range(before, rows)) - saved.token_rows
        if unknown:
            raise UsageError(
                "adapter.rows_unknown",
                "the adapter {path} was trained with a vocabulary of {rows} rows, the base model has {base}, and the "
                "values of {count} new rows are in no file. Save the adapter again with them: save_pretrained(…, "
                "save_embedding_layers=True), or modules_to_save with the embedding and the head.",
                path=saved.folder,
                count=len(unknown),
                rows=rows,
                base=before,
            )
    resize_embeddings(base, rows)
    notice(
        "adapter.resized",
        "the adapter {path} was trained with a vocabulary of {rows} rows; the base model has {base} and is made the "
        "same.",
        path=saved.folder,
        rows=rows,
        base=before,
    )


def _holds_rows(name: str, placed: Placed) -> bool:
    """Whether the adapter's file has the whole matrix of an embedding or head."""
    return f"{name}.weight" in placed.whole or (name, WHOLE_UNDER_ROWS) in placed.factors


def _rows_of(name: str, placed: Placed) -> int:
    """How many tokens an adapter's embedding or head has; 0 if its tensors do not say."""
    if (tensor := placed.whole.get(f"{name}.weight")) is not None:
        return tensor.shape[0]
    for tail, dim in ((WHOLE_UNDER_ROWS, 0), ("lora_embedding_A", 1), ("lora_B.weight", 0)):
        if (tensor := placed.factors.get((name, tail))) is not None:
            return tensor.shape[dim]
    return 0
