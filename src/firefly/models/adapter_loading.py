"""A saved adapter onto a base: every tensor to its place, the vocabulary as large as the adapter's, or a refusal."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from firefly.console import notice
from firefly.errors import UsageError
from firefly.models.adapter_placement import Placed, mismatch, place_tensors, settings_for
from firefly.models.kernels.expert_linear import install_expert_kernels
from firefly.models.kernels.peft_layers import install_token_rows
from firefly.models.saved_adapter import OUR_PREFIX, SavedAdapter, is_exact_start, open_adapter
from firefly.models.scores import scores
from firefly.models.tokens import is_tied, resize_embeddings, vocabulary_ends
from firefly.models.unread import read_here
from firefly.translation import Phrase, translate


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
    placed = place_tensors(base, saved)
    settings = settings_for(base, saved, placed)
    settings.inference_mode = dropout is None
    if dropout is not None:
        settings.lora_dropout = 0.0 if settings.target_parameters else dropout
    _fit_rows(base, saved, placed)
    read_here(base.get_parameter(name) for name in placed.whole)  # the adapter's numbers are written over them
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
    return _wrap(base, saved, placed, settings)


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


# ---- the vocabulary ----


def _fit_rows(base: Any, saved: SavedAdapter, placed: Placed) -> None:
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
        raise mismatch(saved, base, Phrase("its vocabulary has two sizes ({sizes})", sizes=described))
    rows, before = next(iter(asked.values())), present[next(iter(asked))]
    held = [_holds_rows(name, placed) for name in ends]
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
    return f"{name}.weight" in placed.whole or (name, "token_adapter.base_layer.weight") in placed.factors


def _rows_of(name: str, placed: Placed) -> int:
    """How many tokens an adapter's embedding or head has; 0 if its tensors do not say."""
    if (tensor := placed.whole.get(f"{name}.weight")) is not None:
        return tensor.shape[0]
    for tail, dim in (("token_adapter.base_layer.weight", 0), ("lora_embedding_A", 1), ("lora_B.weight", 0)):
        if (tensor := placed.factors.get((name, tail))) is not None:
            return tensor.shape[dim]
    return 0
