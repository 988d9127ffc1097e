"""From names to models that answer: a base and adapters over it, each with the tokenizer and the template that it was
trained with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from firefly.config import ModelConfig
from firefly.console import notice
from firefly.data.certificate import allows_special, recheck, trained_template_options
from firefly.data.encoding import Encoder
from firefly.data.templates import bind_template, plain_template
from firefly.errors import UsageError
from firefly.generation.answering_type import answering_precision
from firefly.models.adapter_loading import has_base, load_adapters, use_adapter
from firefly.models.base_weights import identify_weights
from firefly.models.loading import EMBEDDED, eos_ids, load_model, load_tokenizer, read_config, resolve_model
from firefly.models.precision import Precision, pick_device
from firefly.models.saved_adapter import (
    SavedAdapter,
    adapter_folder,
    base_of_adapter,
    check_base,
    is_adapter,
    open_adapter,
    tokenizer_source,
)
from firefly.models.scores import ADAPTER_TASK, as_classifier, refuse_scores
from firefly.models.serving_memory import spread_over, weight_bytes
from firefly.ranks import local_world_size
from firefly.translation import Phrase

OF_NO_SAMPLING = ("use_cache", "cache_implementation", "output_attentions", "output_hidden_states", "output_scores")
OF_NO_SAMPLING += ("return_dict_in_generate", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id")
"""What a generation_config.json holds besides how an answer is drawn."""


@dataclass(frozen=True)
class ServedModel:
    """A base or an adapter, under the name that requests ask for it by.

    Attributes:
        encoder: messages to ids; None where no template is to be had, so that it can only continue texts.
        no_template: why not.
        stop_ids: tokens that end an answer.
        adapter: the adapter as it was named; None: this is the base.
        folder: where its weights and its certificate lie.
    """

    name: str
    tokenizer: Any
    encoder: Encoder | None
    stop_ids: tuple[int, ...]
    adapter: str | None
    folder: Path
    no_template: UsageError | None = None

    @property
    def text_encoder(self) -> Encoder:
        """Texts that are to go on to ids (`Encoder.encode_text`), which needs no template."""
        return self.encoder or Encoder(self.tokenizer, plain_template())


@dataclass(frozen=True)
class Loaded:
    """A model and the names that it answers under.

    Attributes:
        served: the base first, where it can be served, then the adapters as they were given.
        unserved: name → why it is not served, though it is loaded.
        defaults: how the model's generation_config.json would have answers drawn. Nothing of it acts by itself.
    """

    model: Any
    served: dict[str, ServedModel]
    unserved: dict[str, Phrase] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)

    def select(self, name: str) -> None:
        """Let the model compute as the one of this name."""
        use_adapter(self.model, None if self.served[name].adapter is None else name)


def load_for_generation(
    model: ModelConfig,
    adapters: Mapping[str, str | os.PathLike[str]],
    template_name: str = "auto",
    load_in_4bit: bool = False,
    force: bool = False,
    devices: Literal["auto", "one", "all"] = "auto",
    with_base: bool = True,
    dtype: str = "auto",
) -> Loaded:
    """Load a model, or unmerged adapters over their base (which they name if `model` does not).

    Args:
        adapters: by the names that they are to be served under.
        template_name: of all of them; "auto": each has its own.
        force: go on although the prompts are not those that the certificate beside the weights was made of, or the base
            is not the one that an adapter was trained on.
        devices: "one": the first GPU, or the CPU; "all": the layers laid over all GPUs; "auto": one if the weights fit.
        with_base: serve the base beside adapters, too.
        dtype: what to compute in: auto (see `answering_type`), float32, bfloat16 or float16.

    Raises:
        UsageError: nothing found there, adapters and base do not fit, no usable template, or another one than the
            model was trained with.
    """
    named = name_models(model, adapters)
    precision = answering_precision(dtype, named.model, named.adapters.values(), load_in_4bit)
    loaded = _load_base(named.model, load_in_4bit, devices, precision)
    for name, adapter in named.saved.items():
        if adapter.settings.task_type == ADAPTER_TASK:
            refuse_scores(as_classifier(loaded), named.adapters[name])
    refuse_scores(loaded, named.model.name_or_path)
    check_bases(named, force)
    loaded = load_adapters(loaded, named.saved) if named.saved else loaded.eval()
    loaded.config.use_cache = True
    stops, defaults = eos_ids(loaded.generation_config), _sampling_of(loaded.generation_config)
    _forget_sampling(loaded)
    served, unserved = serve_models(named, template_name, stops, force, with_base, has_base(loaded))
    return Loaded(loaded, served, unserved, defaults)


@dataclass(frozen=True)
class Named:
    """What was named, settled: the base, and the adapters over it by the names that they are served under."""

    model: ModelConfig
    adapters: dict[str, str]
    saved: dict[str, SavedAdapter]


def name_models(model: ModelConfig, adapters: Mapping[str, str | os.PathLike[str]]) -> Named:
    """Open the adapters and find the base.

    Raises:
        UsageError: nothing was named, or is there; the adapters name different bases.
    """
    given = {name: os.fspath(path) for name, path in adapters.items()}
    if not given and not model.name_or_path:
        raise UsageError(
            "chat.no_model",
            "no model given. Name one with --model_name_or_path (a folder, a hub id or smollm2-135m-instruct), or "
            "a trained adapter with --adapter_name_or_path.",
        )
    if not given and is_adapter(model.name_or_path):
        given, model = {_last_part(model.name_or_path): model.name_or_path}, replace(model, name_or_path="")
    saved = {name: open_adapter(path) for name, path in given.items()}
    return Named(common_base(given, model), given, saved)


def check_bases(named: Named, force: bool) -> None:
    """See that the base is the one that each adapter was trained on.

    Raises:
        UsageError: it is another, and `force` is false.
    """
    found = identify_weights(resolve_model(named.model), named.model.revision) if len(named.saved) > 1 else None
    for path in named.adapters.values():
        check_base(path, named.model, force, found)


def serve_models(
    named: Named,
    template_name: str,
    stops: tuple[int, ...],
    force: bool = False,
    with_base: bool = True,
    is_base_left: bool = True,
) -> tuple[dict[str, ServedModel], dict[str, Phrase]]:
    """The prompts of each: what is served, the base first, and why the base is not where it is not.

    Args:
        stops: what the model's generation_config ends answers with.
        is_base_left: an adapter has not changed the base's own weights.

    Raises:
        UsageError: see `load_for_generation`.
    """
    served: dict[str, ServedModel] = {}
    unserved: dict[str, Phrase] = {}
    model = named.model
    name = base_name(model)
    if name in named.adapters:
        name = model.name_or_path
    if not is_base_left:
        path = next(iter(named.adapters.values()))
        unserved[name] = Phrase("the adapter {path} changes the base's own weights", path=path)
    elif not named.adapters:
        served[name] = _served(name, model, None, template_name, stops, force)
    elif with_base:
        try:  # nobody may ever ask for it, so it keeps nothing from being served
            served[name] = _served(name, model, None, template_name, stops, force, beside=True)
        except UsageError as error:
            unserved[name] = error.phrase
    for name, path in named.adapters.items():
        served[name] = _served(name, model, path, template_name, stops, force)
    return served, unserved


def named_adapters(given: Sequence[str]) -> dict[str, str]:
    """Adapters by the names that they are served under: each written as `name=path`, or as a path, whose last part is
    then its name.

    Raises:
        UsageError: an empty name, or one that two of them would have.
    """
    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or Path(text).expanduser().is_dir():  # a folder's name may have the sign in it
            name, path = _last_part(text), text
        if not name or not path:
            raise UsageError(
                "generation.bad_adapter_name",
                "--adapter_name_or_path {value} is not valid: write a folder, or name=folder.",
                value=text,
            )
        if name in found:
            raise UsageError(
                "generation.same_name",
                "two adapters would be served as {name}: {first} and {second}. Give one another name: "
                "--adapter_name_or_path NAME={second}.",
                name=name,
                first=found[name],
                second=path,
            )
        found[name] = path
    return found


def base_name(model: ModelConfig) -> str:
    """What a model is served as: the last part of its path or hub id."""
    return EMBEDDED if model.name_or_path.lower() == EMBEDDED else _last_part(model.name_or_path)


def _last_part(path: str) -> str:
    return Path(os.path.normpath(path)).name or Path(path).expanduser().resolve().name


def common_base(adapters: Mapping[str, str], model: ModelConfig) -> ModelConfig:
    """The base given, or the one that all adapters name.

    Raises:
        UsageError: they name different ones.
    """
    bases = [(path, base_of_adapter(path, model)) for path in adapters.values()]
    for path, base in bases[1:]:
        if base != bases[0][1]:
            raise UsageError(
                "generation.two_bases",
                "the adapters name different bases: {first} names {base}, and {second} names {other}. Give "
                "--model_name_or_path if these are the same model; else serve them apart.",
                first=bases[0][0],
                base=bases[0][1].name_or_path,
                second=path,
                other=base.name_or_path,
            )
    return bases[0][1] if bases else model


def _load_base(model: ModelConfig, in_4_bits: bool, devices: str, precision: Precision) -> Any:
    device = pick_device()
    free = []
    if device.type == "cuda" and local_world_size() == 1:
        free = [torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())]
    spread = devices == "all" and len(free) > 1
    if devices == "auto" and len(free) > 1:
        needed = weight_bytes(read_config(model), model, precision.compute, in_4_bits)
        if spread := spread_over(needed, free):
            notice(
                "generation.spread",
                "the weights take {size} GiB, and the first GPU has {free} GiB free: they are laid over {count} GPUs.",
                size=f"{needed / 2**30:.1f}",
                free=f"{free[0] / 2**30:.1f}",
                count=len(free),
            )
    return load_model(model, "qlora" if in_4_bits else "lora", precision, device, spread=spread)


def _sampling_of(generation: Any) -> dict[str, Any]:
    """What a GenerationConfig says of how answers are drawn."""
    said = generation.to_diff_dict()
    return {name: value for name, value in said.items() if name not in OF_NO_SAMPLING and not name.startswith("_")}


def _forget_sampling(model: Any) -> None:
    """Let `generate` do what it is asked for and nothing else: what a published generation_config.json says (a
    repetition penalty, tokens that are forced or suppressed) would act on every answer, and nobody would see it."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig()


def _served(
    name: str,
    model: ModelConfig,
    adapter: str | None,
    template_name: str,
    stops: tuple[int, ...],
    force: bool,
    beside: bool = False,
) -> ServedModel:
    """The tokenizer and template of a model or adapter, as it was trained with them.

    Args:
        stops: what the model's generation_config ends answers with.
        beside: without a template that fits it can still continue texts.

    Raises:
        UsageError: see `load_for_generation`.
    """
    tokenizer = load_tokenizer(model, tokenizer_source(model, adapter))
    trained = adapter_folder(adapter) if adapter else Path(resolve_model(model))
    try:
        template = bind_template(template_name, tokenizer, eos_ids=stops, **trained_template_options(trained))
        encoder = Encoder(tokenizer, template, allows_special(trained))
        recheck(trained, encoder, force)
    except UsageError as error:
        if not beside and error.code != "template.tokenizer_has_none":
            raise
        ends = stops or tuple(token for token in (tokenizer.eos_token_id,) if token is not None)
        return ServedModel(name, tokenizer, None, ends, adapter, trained, error)
    return ServedModel(name, tokenizer, encoder, template.stop_ids, adapter, trained)
