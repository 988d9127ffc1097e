"""What is exported: a trained model as a folder of weights, and what it says on the battery."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firefly.config import ModelConfig
from firefly.data.certificate import allows_special, recheck, trained_template_options
from firefly.data.encoding import Encoder
from firefly.data.templates import bind_template
from firefly.errors import UsageError
from firefly.export.agreement import Expected, expect
from firefly.export.battery import Battery, make_battery, text_battery
from firefly.export.merge import base_type, merge
from firefly.models.adapter_loading import load_adapter
from firefly.models.loading import load_tokenizer, read_config, resolve_model, stop_ids_of
from firefly.models.saved_adapter import (
    adapter_folder,
    base_of_adapter,
    check_base,
    open_adapter,
    tokenizer_source,
)
from firefly.models.scores import ADAPTER_TASK
from firefly.models.serving_memory import UNKNOWN_CONTEXT, context_of
from firefly.models.streaming import load_streamed

MERGED = "merged"


@dataclass(frozen=True)
class Source:
    """A trained model.

    Attributes:
        model: the base, or the model itself.
        adapter: the adapter over it, if any.
        encoder: None for a model without a chat template.
        force: merge although template or base are not those of the adapter's training.
    """

    model: ModelConfig
    adapter: str | None
    tokenizer: Any
    encoder: Encoder | None
    battery: Battery
    expected: list[Expected]
    force: bool = False

    @property
    def first_tokens(self) -> list[int]:
        """The likeliest first token of each reply."""
        return [int(known.tokens[0, 0]) for known in self.expected]

    def folder(self, scratch: Path) -> Path:
        """The model as transformers and converters read it: its own folder, or the adapter merged into one below
        `scratch`."""
        if self.adapter is None:
            return Path(resolve_model(self.model))
        return merge(self.model, self.adapter, scratch / MERGED, force=self.force)


def open_source(model: ModelConfig, adapter: str | None, force: bool = False) -> Source:
    """Ask a trained model what an export has to reproduce.

    Raises:
        UsageError: a reward model, an adapter of another base, a template that is not the trained one, or one that
            takes none of the conversations.
    """
    saved = open_adapter(adapter) if adapter else None
    if saved is not None:
        model = base_of_adapter(str(saved.given), model)
    if saved is not None and saved.settings.task_type == ADAPTER_TASK:
        raise UsageError(
            "export.scores",
            "{path} is a reward model: it gives a score and no text, and is not exported. Merge it (firefly merge).",
            path=saved.given,
        )
    tokenizer = load_tokenizer(model, tokenizer_source(model, adapter))
    trained = adapter_folder(adapter) if adapter else Path(resolve_model(model))
    encoder = trained_encoder(tokenizer, trained, tuple(stop_ids_of(model) or ()), force)
    if encoder is not None:
        battery = make_battery(encoder)
    else:
        ends = stop_ids_of(model) or [tokenizer.eos_token_id]
        battery = text_battery(tokenizer.encode, [token for token in ends if token is not None])
    context = context_of(read_config(model)) or UNKNOWN_CONTEXT
    if battery.rows and not battery.within(context).rows:
        raise UsageError(
            "export.short_context",
            "{path}: the model has positions for {context} tokens, fewer than any conversation has that an export is "
            "judged on.",
            path=trained,
            context=context,
        )
    battery = battery.within(context)
    if not battery.rows:
        raise UsageError(
            "export.template_refuses",
            "{path}: the chat template takes none of the conversations that an export is judged on.",
            path=trained,
        )
    loaded = load_streamed(model, base_type(model))
    if saved is not None:
        check_base(str(saved.given), model, force)
        loaded = load_adapter(loaded, saved)
    expected = expect(loaded.eval(), battery)
    del loaded
    gc.collect()
    return Source(model, adapter, tokenizer, encoder, battery, expected, force)


def trained_encoder(tokenizer: Any, trained: Path, ends: tuple[int, ...], force: bool) -> Encoder | None:
    """The way from messages to ids that the model was trained with, on the day it is today: an engine knows no other.

    Returns:
        None for a tokenizer without a chat template.
    """
    if not tokenizer.chat_template:
        return None
    options, special = trained_template_options(trained), allows_special(trained)
    recheck(trained, Encoder(tokenizer, bind_template("auto", tokenizer, eos_ids=ends, **options), special), force)
    options.pop("date", None)
    return Encoder(tokenizer, bind_template("auto", tokenizer, eos_ids=ends, **options), special)
