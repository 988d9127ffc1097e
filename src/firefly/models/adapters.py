"""Adapters to train: which layers get one, how it is attached, and how a saved one is trained on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from firefly.config import AdapterConfig, names_in
from firefly.console import notice
from firefly.errors import UsageError
from firefly.files import one_line
from firefly.models.adapter_loading import load_adapter
from firefly.models.experts import expert_parameters, shortened
from firefly.models.kernels.expert_linear import install_expert_kernels
from firefly.models.kernels.lora_linear import install_lora_kernels
from firefly.models.kernels.peft_layers import install_saved_modules, install_token_rows, install_trained_biases
from firefly.models.probe_cache import cached_unreached
from firefly.models.reach import EXPERT_COUNTS, Unreached, alike
from firefly.models.saved_adapter import open_adapter
from firefly.models.scores import ADAPTER_TASK, HEAD, scores
from firefly.models.tokens import is_tied, vocabulary_ends
from firefly.models.unread import copies_unread

ALL_LINEAR = "all-linear"

REACHED = Unreached()
"""Of a model whose every part is reached by text."""


def attach_adapter(
    model: PreTrainedModel,
    config: AdapterConfig,
    new_tokens: Sequence[int] = (),
    given: Collection[str] = (),
    added_tokens: Sequence[int] = (),
    unreached: Unreached | None = None,
    notify: Callable[..., None] = notice,
) -> Any:
    """Return the model ready to train: itself with fp32 weights (full), or wrapped by peft with fp32 adapters.

    What text never reaches stays as it is: it has no gradient, and no use for an adapter.

    Args:
        new_tokens: ids whose rows in embedding and head are new, and trained with an adapter too.
        given: keys that the user wrote down, to say which of them an adapter to start from overrules.
        added_tokens: those of the new tokens that this run gave to the tokenizer: an adapter to start from has never
            seen them.
        unreached: what text does not reach in the model; None: probed on a short row.
        notify: is given what `notice` takes, for what was left out.

    Raises:
        UsageError: a name that matches no layer or one that cannot have an adapter, or an adapter to start from that is
            none or does not fit.
    """
    unreached = cached_unreached(model) if unreached is None else unreached
    _note_unreached(model, unreached, notify)
    if config.mode == "full":
        model.requires_grad_(True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in unreached.parameters)
        return model
    if config.name_or_path:
        wrapped = _continued(model, config, new_tokens, given, added_tokens)
        for name, parameter in wrapped.get_base_model().named_parameters():
            if parameter.requires_grad and unreached.has(name):
                parameter.requires_grad_(False)
        return wrapped
    from peft import PeftModel, get_peft_model

    settings = _settings(model, config, new_tokens, unreached, notify)
    try:
        if scores(model):  # peft's class for classifiers would not hand our arguments on
            settings.base_model_name_or_path = model.name_or_path
            wrapped: Any = PeftModel(model, settings, autocast_adapter_dtype=True)
        else:
            wrapped = get_peft_model(model, settings, autocast_adapter_dtype=True)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UsageError(
            "adapter.peft_refuses",
            "peft refuses this adapter (lora_target = {value}): {problem}",
            value=config.target,
            problem=one_line(error),
        ) from error
    _refuse_zero_rows(wrapped)
    wrapped = _ready_to_train(wrapped, config.dropout)
    copies_unread(wrapped)
    return wrapped


def _note_unreached(model: PreTrainedModel, unreached: Unreached, notify: Callable[..., None]) -> None:
    count = sum(numbers_in(p) for name, p in model.named_parameters() if name in unreached.parameters)
    if count:
        notify(
            "adapter.unreached",
            "text never reaches {names} ({count:,} parameters): they stay as they are, without adapters.",
            names=_listed(unreached.roots(model)),
            count=count,
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" … ({len(names)})" if len(names) > 8 else "")


def _settings(
    model: PreTrainedModel,
    config: AdapterConfig,
    new_tokens: Sequence[int],
    unreached: Unreached,
    notify: Callable[..., None],
) -> Any:
    """peft's configuration of a new adapter."""
    from peft import LoraConfig

    saved = saved_modules(model, config.modules_to_save, unreached)
    if scores(model):
        saved = sorted({*saved, HEAD})
    targets = target_layers(model, config.target, saved, unreached, notify)
    parameters = target_parameters(model, config.target, saved, unreached)
    if parameters and config.use_dora:
        raise UsageError(
            "adapter.dora_experts",
            "use_dora has no form for what is adapted by its parameter here ({names}). Set it to false, or name other "
            "layers in lora_target.",
            names=", ".join(parameters[:4]),
        )
    ends = [name for name, module in model.named_modules() if module in vocabulary_ends(model)]
    # A tied embedding that is trained whole stays the head's weight, as it was in the base. peft finds such a pair by
    # the name of the head, whichever of the two was asked for.
    tie = is_tied(model) and any(_names(saved, name) for name in ends)
    saved = sorted({*saved, *ends}) if tie else saved
    rows = _token_layers(model, saved) if new_tokens else []
    adapted = [name for name in rows if _names(targets, name)]
    if adapted:
        raise UsageError(
            "tokens.adapted",
            "lora_target names {names}, whose rows for new tokens are trained; leave it out, or use modules_to_save.",
            names=", ".join(adapted),
        )
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
        # peft refuses dropout beside target_parameters, also in an adapter that it loads: `_set_dropout` puts it in.
        lora_dropout=0.0 if parameters else config.dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        target_modules=targets,
        target_parameters=parameters or None,
        modules_to_save=saved or None,
        trainable_token_indices={name: list(new_tokens) for name in rows} or None,
        ensure_weight_tying=tie,
        task_type=ADAPTER_TASK if scores(model) else "CAUSAL_LM",
    )


def _ready_to_train(wrapped: Any, dropout: float, whole_vocabulary: bool = False) -> Any:
    """fp32 masters for all that is trained, our forwards, and checkpoints of what was trained alone.

    Trained rows of the vocabulary are saved by themselves: peft would add both whole matrices where it has grown, and
    asks the hub about the base's to find out. An adapter that came with the whole matrices keeps them.
    """
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    left_to_peft = install_forwards(wrapped)
    if dropout and wrapped.peft_config["default"].target_parameters:
        _set_dropout(wrapped, dropout, left_to_peft)
    wrapped.save_pretrained = partial(wrapped.save_pretrained, save_embedding_layers=whole_vocabulary)
    return wrapped


def _refuse_zero_rows(wrapped: Any) -> None:
    """DoRA divides by the length of each output's weights, and some embeddings have rows of zeros (padding)."""
    lengths = {name: p for name, p in wrapped.get_base_model().named_parameters() if "lora_magnitude_vector" in name}
    empty = [name.partition(".lora_magnitude_vector")[0] for name, p in lengths.items() if (p == 0).any()]
    if empty:
        raise UsageError(
            "adapter.dora_zero_rows",
            "use_dora: {names} has rows of zeros, whose direction DoRA cannot keep. Take it out of lora_target.",
            names=", ".join(empty[:4]),
        )


def install_forwards(wrapped: Any) -> list[str]:
    """Our own forward for each kind of layer that peft put in and that we do better or more exactly.

    Returns:
        the stacks of experts that are left to peft.
    """
    install_lora_kernels(wrapped)
    left_to_peft = install_expert_kernels(wrapped)
    install_saved_modules(wrapped)
    install_trained_biases(wrapped)
    install_token_rows(wrapped)
    return left_to_peft


def _set_dropout(wrapped: nn.Module, probability: float, left_to_peft: list[str]) -> None:
    """Dropout in every adapter that our kernels compute; peft's forward of stacked experts has none."""
    from peft.tuners.lora import LoraLayer

    for name, module in wrapped.named_modules():
        if isinstance(module, LoraLayer) and name not in left_to_peft:
            for adapter in module.lora_dropout:
                module.lora_dropout[adapter] = nn.Dropout(probability)
    if left_to_peft:
        notice(
            "adapter.experts_no_dropout",
            "lora_dropout does not apply to {count} stacks of experts: the way they compute leaves no place for it.",
            count=len(left_to_peft),
        )


# ---- a saved adapter that is trained on ----


def _continued(
    model: PreTrainedModel,
    config: AdapterConfig,
    new_tokens: Sequence[int],
    given: Collection[str],
    added_tokens: Sequence[int],
) -> Any:
    """The adapter at `adapter_name_or_path`, trained on from the numbers it was saved with."""
    saved = open_adapter(str(config.name_or_path))
    settings = saved.settings
    _note_differences(config, settings, given)
    whole_vocabulary = saved.holds_vocabulary(model)
    trained_whole = any(_names(settings.modules_to_save or (), name) for name in _token_layers(model, ()))
    wrapped = load_adapter(model, saved, dropout=config.dropout)
    embedding: Any = transformers_model(wrapped).get_input_embeddings()
    rows = embedding.weight.shape[0]
    if trained_whole:
        unknown = {token for token in new_tokens if token >= rows}
    elif whole_vocabulary:
        unknown = {token for token in new_tokens if token >= rows or token in added_tokens}
    else:
        unknown = set(new_tokens) - saved.token_rows
    if unknown:
        raise UsageError(
            "tokens.new_to_adapter",
            "{count} tokens are new to the adapter {path}, and a saved adapter gets no more rows. Merge it first, and "
            "train a new one on the result.",
            path=str(config.name_or_path),
            count=len(unknown),
        )
    return _ready_to_train(wrapped, config.dropout, whole_vocabulary)


def _note_differences(config: AdapterConfig, settings: Any, given: Collection[str]) -> None:
    """Notify of keys set to something else than the adapter has: the adapter's values are used."""
    default = AdapterConfig()
    for key, asked, standard, found in (
        ("lora_rank", config.rank, default.rank, settings.r),
        ("lora_alpha", config.alpha, default.alpha, settings.lora_alpha),
        ("use_rslora", config.use_rslora, default.use_rslora, settings.use_rslora),
        ("use_dora", config.use_dora, default.use_dora, settings.use_dora),
        ("lora_target", _sorted(config.target), ALL_LINEAR, _sorted(settings.target_modules)),
        ("modules_to_save", _sorted(config.modules_to_save), None, _sorted(settings.modules_to_save)),
    ):
        explicit = key in given and asked != ALL_LINEAR  # whose layers an adapter has by their names
        if asked != found and (explicit or asked != standard):
            notice(
                "adapter.its_own",
                "{key} = {value} differs from the adapter's setting; the adapter's value is used: {found}.",
                key=key,
                value=asked,
                found=found,
            )


def _sorted(names: Any) -> Any:
    found = names if names is None or names == ALL_LINEAR or _is_pattern(names) else sorted(names_in(names))
    return ", ".join(found) if isinstance(found, list) else found


def transformers_model(model: Any) -> PreTrainedModel:
    """The transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# ---- which layers ----


def target_layers(
    model: PreTrainedModel,
    request: str | Sequence[str],
    saved: Collection[str] = (),
    unreached: Unreached = REACHED,
    notify: Callable[..., None] = notice,
) -> list[str]:
    """The layers that `lora_target` asks for, in the shortest names that mean them, but those that are trained whole.

    "all-linear" leaves out what peft refuses, and reports it by `notify`.

    Args:
        request: "all-linear", names (a list, or separated by commas), or one regular expression for whole paths.

    Raises:
        UsageError: a name or the expression matches no layer that can have an adapter, or one that peft refuses.
    """
    chosen = _chosen_layers(model, request, saved, unreached)
    refused = _refused_by_peft(chosen, model)
    if refused and request != ALL_LINEAR:
        names, problem = ", ".join(sorted({_last(name) for name in refused})), next(iter(refused.values()))
        raise UsageError(
            "adapter.target_refused",
            "lora_target = {value}: peft refuses {names} here. Take it out, or use all-linear. peft says: {problem}",
            value=request,
            names=names,
            problem=problem,
        )
    if refused:
        names = ", ".join(sorted({_last(name) for name in refused}))
        notify(
            "adapter.refused_layers",
            "lora_target: {names} ({count} layers) get no adapter; peft refuses them in {architecture}.",
            names=names,
            count=len(refused),
            architecture=type(model).__name__,
        )
        chosen -= refused.keys()
    if request == ALL_LINEAR and (passed := _passed_by(model, saved, unreached)):
        notify(
            "adapter.passed_by",
            "lora_target: {names} ({count} layers) get no adapter; the model uses their weights without calling them.",
            names=_listed(alike(passed)),
            count=len(passed),
        )
    if not chosen:
        raise UsageError(
            "adapter.no_layers",
            "lora_target = {value} leaves no layer to adapt: all of them are trained whole, or belong to experts.",
            value=request,
        )
    plain = chosen - _taken_for_experts(chosen, model)
    short = {_last(name) for name in plain}
    matched = {name for name, _ in model.named_modules() if _last(name) in short}
    return sorted(short if matched == plain else plain)


def target_parameters(
    model: PreTrainedModel,
    request: str | Sequence[str],
    saved: Collection[str] = (),
    unreached: Unreached = REACHED,
) -> list[str]:
    """What peft adapts by the parameter's name: experts (of "all-linear"), and the weights of dense layers that it
    takes for experts."""
    chosen = _chosen_layers(model, request, saved, unreached)
    beside = {f"{name}.weight" for name in _taken_for_experts(chosen, model)}
    experts = expert_parameters(model, unreached.modules) if request == ALL_LINEAR else ()
    return sorted([*experts, *shortened(beside, model)])


def _chosen_layers(
    model: PreTrainedModel, request: str | Sequence[str], saved: Collection[str], unreached: Unreached
) -> set[str]:
    if request == ALL_LINEAR:
        chosen = {name for name in _all_linear(model) if not unreached.has(name)}
    else:
        layers = [name for name, module in model.named_modules() if _is_linear(module) or type(module) is nn.Embedding]
        chosen = _matching(layers, request, unreached)
    return {name for name in chosen if not _inside(saved, name)}


def _passed_by(model: PreTrainedModel, saved: Collection[str], unreached: Unreached) -> list[str]:
    """Linear layers whose weights text reaches and that are never called, so that an adapter would be passed by."""
    found = (name for name in _all_linear(model) if name in unreached.modules and not _inside(saved, name))
    return sorted(name for name in found if f"{name}.weight" not in unreached.parameters)


def _refused_by_peft(layers: Collection[str], model: PreTrainedModel) -> dict[str, str]:
    """Of these layers those that peft adds no adapter to in a model of this kind, and what it says.

    It is asked with a layer of the same name, alone in a model with this configuration: it tells by the name and by
    the architecture (Mamba's kernels take the weights of `out_proj` and pass by its adapter).
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    refusals: dict[str, str] = {}
    for name in sorted({_last(layer) for layer in layers} - _names_of_experts(model)):
        alone: Any = nn.Module()
        alone.config = model.config
        try:
            with torch.random.fork_rng(devices=[]):  # the adapter that is trained begins with the numbers of the seed
                alone.add_module(name, nn.Linear(1, 1))
                LoraModel(alone, LoraConfig(r=1, target_modules=[name]), "default")
        except (ValueError, TypeError, NotImplementedError) as error:
            refusals[name] = one_line(error)
    return {layer: refusals[_last(layer)] for layer in sorted(layers) if _last(layer) in refusals}


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _all_linear(model: PreTrainedModel) -> set[str]:
    head = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if _is_linear(module)}
    return {name for name, module in linear.items() if module is not head and not _is_router(name, module, model)}


def _matching(layers: Sequence[str], request: str | Sequence[str], unreached: Unreached) -> set[str]:
    if _is_pattern(request):
        try:
            found = {name for name in layers if re.fullmatch(str(request), name)}
        except re.error as error:
            raise UsageError(
                "adapter.bad_pattern",
                "lora_target = {value!r} is not a valid regular expression: {problem}.",
                value=request,
                problem=error,
            ) from None
        if not found:
            raise _no_layer("lora_target", str(request), layers)
        return _without_unreached(found, "lora_target", str(request), unreached)
    chosen: set[str] = set()
    for wanted in names_in(request):
        found = {name for name in layers if _names([wanted], name)}
        if not found:
            raise _no_layer("lora_target", wanted, layers)
        chosen |= _without_unreached(found, "lora_target", wanted, unreached)
    return chosen


def _without_unreached(found: set[str], key: str, wanted: str, unreached: Unreached) -> set[str]:
    """What a name of the user's means where text comes.

    Raises:
        UsageError: it means nothing else than modules whose output no text depends on.
    """
    kept = {name for name in found if not unreached.has(name)}
    if not kept:
        raise UsageError(
            "adapter.only_unreached",
            "{key}: {value!r} means only {names}, which text never reaches, or whose weights the model uses without "
            "calling the module: an adapter there would learn nothing. Take it out.",
            key=key,
            value=wanted,
            names=", ".join(sorted(found)[:3]),
        )
    return kept


def _is_pattern(request: str | Sequence[str]) -> bool:
    """Whether a text is a regular expression: it has a character that no module's name has. A dot stands in paths."""
    return isinstance(request, str) and re.search(r"[^\w.,\s-]", request) is not None


def saved_modules(
    model: PreTrainedModel, request: str | Sequence[str] | None, unreached: Unreached = REACHED
) -> list[str]:
    """The modules that `modules_to_save` asks for, in the shortest names that peft takes for exactly them.

    Raises:
        UsageError: a name matches no module with weights of its own type, one in 4 bits, or nothing that text reaches.
    """
    modules = {
        name: module
        for name, module in model.named_modules()
        if name and next(module.parameters(), None) is not None and type(module).forward is not nn.Module.forward
    }
    chosen: set[str] = set()
    for wanted in names_in(request or ()):
        found = {name for name in modules if _names([wanted], name)}
        if not found:
            raise _no_layer("modules_to_save", wanted, list(modules))
        found = _without_unreached(found, "modules_to_save", wanted, unreached)
        if any(not p.is_floating_point() for name in found for p in modules[name].parameters()):
            raise UsageError(
                "adapter.save_quantised",
                "modules_to_save: {name!r} is held in 4 bits and cannot be trained whole. Use train_mode lora, or "
                "drop it.",
                name=wanted,
            )
        chosen |= found
    # peft compares the ends of paths without regard to their dots: `norm` would be `input_layernorm` too.
    short = {_last(name) for name in chosen}
    matched = {name for name, _ in model.named_modules() if name.endswith(tuple(short))}
    return sorted(short if matched == chosen else chosen)


def _no_layer(key: str, wanted: str, layers: Collection[str]) -> UsageError:
    """Names of the model that are most like the wrong one: last parts first, as they are mostly given."""
    last = sorted(name for name in set(map(_last, layers)) if not name.isdigit())
    near = difflib.get_close_matches(wanted, last, n=3, cutoff=0.4) or last
    return UsageError(
        "adapter.no_layer",
        "{key}: {value!r} matches no layer of this model. Nearest: {near}.",
        key=key,
        value=wanted,
        near=", ".join(near[:8]),
    )


def _names(names: Collection[str], path: str) -> bool:
    """Whether one of `names` is the path or its last parts."""
    return any(path == name or path.endswith(f".{name}") for name in names)


def _inside(names: Collection[str], path: str) -> bool:
    parts = path.split(".")
    return any(_names(names, ".".join(parts[:end])) for end in range(1, len(parts) + 1))


def _token_layers(model: PreTrainedModel, saved: Collection[str]) -> list[str]:
    """Embedding and head by name, without a tied head, which follows the embedding, and what is trained whole."""
    ends = vocabulary_ends(model)[: 1 if is_tied(model) else 2]
    names = [name for name, module in model.named_modules() if module in ends]
    return [name for name in names if not _inside(saved, name)]


def _taken_for_experts(names: set[str], model: PreTrainedModel) -> set[str]:
    of_experts = _names_of_experts(model)
    return {name for name in names if _last(name) in of_experts}


def _names_of_experts(model: PreTrainedModel) -> set[str]:
    """Layer names that peft takes for experts of a mixture, whatever module they stand for.

    In these architectures peft (0.21) turns `gate_proj` and its like into adapters of the fused 3-D experts, of
    another rank, also when dense layers are meant by their whole path. By their weight's name they are adapted right.
    The tables are private: `tests/test_private_names.py` says which.
    """
    text = model.config.get_text_config()
    if not any(hasattr(text, name) for name in EXPERT_COUNTS):
        return set()
    from peft.utils import transformers_weight_conversion

    conversion: Any = transformers_weight_conversion
    family = conversion._MODEL_TO_CONVERSION_PATTERN.get(text.model_type)
    fused = conversion._MOE_FUSED_TARGETS.get(family, {})
    return set(conversion._MOE_TARGET_MODULE_MAPPING.get(family, {})) if fused else set()


def _is_linear(module: nn.Module) -> bool:
    """Whether an adapter can stand beside a layer: rows of its inputs give rows of its outputs.

    Some classes inherit of `nn.Linear` and compute otherwise (DeepSeek-V4's projection of each group of heads by a
    matrix of its own): peft would add an adapter of the wrong shape.
    """
    if not isinstance(module, (nn.Linear, Conv1D)):  # bitsandbytes' Linear4bit is an nn.Linear
        return False
    weight = module.weight
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward or hasattr(weight, "quant_state"):
        return True
    try:
        with torch.no_grad():
            out = module(torch.zeros(2, module.in_features, dtype=weight.dtype, device=weight.device))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    return isinstance(out, torch.Tensor) and out.shape == (2, module.out_features)


def _is_router(name: str, module: nn.Module, model: PreTrainedModel) -> bool:
    """A router scores experts: its output is as wide as there are experts (or 1, for a shared expert's gate)."""
    config = model.config.get_text_config()
    experts = {count for field in EXPERT_COUNTS if (count := getattr(config, field, None))}
    width = getattr(module, "out_features", None)
    named = any(part in ("gate", "router") or part.endswith("_gate") for part in name.split("."))
    return bool(experts) and named and width in {*experts, 1}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a 4-bit weight counts as the numbers it stands for."""
    trainable = total = 0
    for parameter in model.parameters():
        count = numbers_in(parameter)
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def count_body(model: nn.Module) -> int:
    """Parameters without embeddings, and without a head that is tied to one."""
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    return sum(numbers_in(p) for p in model.parameters() if id(p) not in embeddings)


def numbers_in(parameter: Any) -> int:
    """How many numbers a parameter stands for, in 4 bits or sharded by ZeRO-3 as it may be."""
    if (sharded := getattr(parameter, "ds_numel", None)) is not None:
        return int(sharded)
    state = getattr(parameter, "quant_state", None)
    return int((parameter.shape if state is None else torch.Size(state.shape)).numel())
