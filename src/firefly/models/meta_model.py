"""A model from its config.json alone: what a run would load and train, on the "meta" device, where it takes no memory.

Which of our forwards fit an architecture is probed on numbers, which a meta model has none of. The probes run on a tiny
twin: the same configuration with a few narrow layers, random weights and a small vocabulary. What is patched there is
copied to the meta model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import nn

from firefly.config import AdapterConfig, Config, ModelConfig
from firefly.errors import UsageError
from firefly.models.adapters import attach_adapter, transformers_model
from firefly.models.attention import choose_layout, refuse_textless, use_segments
from firefly.models.dry_run import NoDryRun, unreached_without_numbers
from firefly.models.forwards import install_training_forwards
from firefly.models.loading import as_quantized, load_failure, model_class, nf4_config, read_config
from firefly.models.precision import Precision
from firefly.models.probe_cache import cached_unreached
from firefly.models.reach import Unreached, in_any_layer, unreached_like
from firefly.models.saved_adapter import adapter_settings
from firefly.models.scores import as_classifier, refuse_scores
from firefly.translation import translate

TWIN_VOCABULARY, TWIN_INNER = 512, 128
"""Sizes of the twin's vocabulary and feed-forward blocks: no probe depends on them, and they hold most parameters."""

INNER_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner")


@dataclass(frozen=True)
class MetaModel:
    """A model as a run would train it.

    Attributes:
        model: on "meta", adapters attached, our forwards installed.
        layout, reason: see `attention.choose_layout`.
        head: see `heads.install_target_head`.
        notes: what a run would say of layers that are left out.
    """

    model: Any
    layout: str
    reason: str
    head: str
    notes: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        return type(transformers_model(self.model)).__name__


def build_meta_model(
    config: Config, precision: Precision, rows: int = 0, new_tokens: Sequence[int] = (), scoring: bool = False
) -> MetaModel:
    """The meta model of what `config` trains.

    Args:
        rows: that embedding and head need at least (`fit_embeddings`), for a tokenizer that knows more tokens.
        new_tokens: whose rows are trained beside an adapter.
        scoring: as a reward model.

    Raises:
        UsageError: the configuration names no model, or layers that the model lacks; or DoRA is asked for, whose
            lengths are computed from weights.
    """
    if config.adapter.use_dora and config.adapter.mode != "full":
        raise UsageError(
            "plan.no_dora",
            "use_dora = true cannot be planned: what it adds is computed from the weights. Plan with --use_dora "
            "false: DoRA takes a little more.",
        )
    described = read_config(config.model)
    dtype = torch.float32 if config.adapter.mode == "full" else precision.compute
    with torch.device("meta"):
        model = _from_config(described, dtype, config.model)
    twin = make_tiny_twin(described, config.model)
    refuse_textless(twin)
    layout, reason = choose_layout(twin)
    if scoring:
        model, twin = as_classifier(model), as_classifier(twin)
    else:
        refuse_scores(model, config.model.name_or_path)
    unreached, of_twin = unreached_by(model, twin)
    notes: list[str] = []
    if config.adapter.mode == "qlora":
        _put_into_nf4(model, precision.compute)
    with torch.device("meta"):
        if rows > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(rows, mean_resizing=False)
        model = attach_adapter(
            model,
            _as_new(config.adapter),
            new_tokens,
            config.given,
            unreached=unreached,
            notify=lambda _, text, **values: notes.append(translate(text, **values)),
        )
    twin = with_small_adapter(twin, config.adapter, of_twin)
    head = install_training_forwards(twin)
    inner, small = transformers_model(model), transformers_model(twin)
    if layout == "segments":
        use_segments(inner)
    follow_forwards(inner, small)
    return MetaModel(model, layout, reason, head, tuple(notes))


def empty_model(described: Any, model: ModelConfig, dtype: torch.dtype, in_4_bits: bool = False) -> Any:
    """A model on "meta", its linear layers in NF4 if asked for (experts stay as they are)."""
    with torch.device("meta"):
        made = _from_config(described, dtype, model)
    if in_4_bits:
        _put_into_nf4(made, dtype)
    return made


def unreached_by(model: Any, twin: Any) -> tuple[Unreached, Unreached]:
    """What text does not reach in the meta model, and in its tiny twin.

    The meta model is asked first: the twin may lack layers of a kind. Where a forward pass depends on values, as
    routing to experts does, the twin is probed instead.
    """
    of_twin = cached_unreached(twin)
    try:
        return unreached_without_numbers(model), of_twin
    except NoDryRun:
        return unreached_like(model, twin, of_twin), of_twin


def _from_config(described: Any, dtype: torch.dtype, model: ModelConfig) -> Any:
    try:
        made: Any = model_class(described).from_config(
            copy.deepcopy(described), dtype=dtype, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:
        raise load_failure(error, model.name_or_path) from error
    return made


def _put_into_nf4(model: Any, compute: torch.dtype) -> None:
    """Linear layers become bitsandbytes' as in loading; their weights have the size and the constants of NF4."""
    from bitsandbytes.functional import quantize_4bit
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer: Any = AutoHfQuantizer.from_config(nf4_config(compute), pre_quantized=False)
    quantize_4bit(torch.zeros(64), compress_statistics=True)  # it keeps its table of constants, which must have numbers
    quantizer.preprocess_model(model=model, device_map={"": "meta"})
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.weight._quantize("meta")
    as_quantized(model, "cpu")
    model.is_loaded_in_4bit = True


def _as_new(adapter: AdapterConfig) -> AdapterConfig:
    """An adapter to go on from, as a new one of its size and places."""
    if not adapter.name_or_path or adapter.mode == "full":
        return adapter
    found = adapter_settings(adapter.name_or_path)
    targets = found.target_modules
    return replace(
        adapter,
        name_or_path=None,
        rank=found.r,
        target=targets if isinstance(targets, str) else tuple(sorted(targets)),
        modules_to_save=tuple(found.modules_to_save) if found.modules_to_save else None,
    )


def make_tiny_twin(described: Any, model: ModelConfig, share: float | None = None) -> Any:
    """A tiny model of the same architecture with random weights, on the CPU, in fp32.

    It has a layer of each kind; the widths that heads are split from stay as they are.

    Args:
        share: how much of the width of feed-forward blocks is left; None: as little as no probe depends on.
    """
    small = copy.deepcopy(described)
    text = small.get_text_config()
    kinds = list(dict.fromkeys(getattr(text, "layer_types", None) or ()))
    dense_first = getattr(text, "first_k_dense_replace", 0) or 0
    with suppress(NotImplementedError):  # some count their layers otherwise, and keep all of them
        text.num_hidden_layers = max(2, len(kinds), dense_first + 1)
    if kinds and "layer_types" in vars(text):  # Mamba's are all of one kind, told by a property
        text.layer_types = (kinds * text.num_hidden_layers)[: text.num_hidden_layers]
    text.vocab_size = min(text.vocab_size, TWIN_VOCABULARY)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(text, name, None) is not None:
            setattr(text, name, 0)
    for name in INNER_WIDTHS:
        width = getattr(text, name, None)
        if isinstance(width, int):
            setattr(text, name, min(width, TWIN_INNER) if share is None else max(int(width * share), 8))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _from_config(small, torch.float32, model)


def with_small_adapter(twin: Any, adapter: AdapterConfig, unreached: Unreached | None = None) -> Any:
    """The twin with an adapter on all layers, if the model gets one: kernels are probed with it."""
    if adapter.mode == "full":
        return twin
    small = AdapterConfig(mode="lora", rank=4, dropout=adapter.dropout)
    with torch.random.fork_rng(devices=[]):
        return attach_adapter(twin, small, unreached=unreached, notify=lambda *_, **__: None)


def follow_forwards(model: nn.Module, twin: nn.Module) -> None:
    """Copy the forwards installed on `twin` to the modules of the same path in `model`, unless already set."""
    given = {
        (in_any_layer(name), type(module)): vars(module)["forward"].__func__
        for name, module in twin.named_modules()
        if isinstance(vars(module).get("forward"), MethodType)
    }
    for name, module in model.named_modules():
        forward = given.get((in_any_layer(name), type(module)))
        if forward is not None and "forward" not in vars(module):
            module.forward = MethodType(forward, module)  # type: ignore[assignment]
