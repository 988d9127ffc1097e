"""Distributed backends: DDP, FSDP2 or DeepSpeed's ZeRO, as configuration or launcher ask.

All of them come from torch, accelerate and DeepSpeed; here their settings are made consistent with Firefly's loop (one
item of the data loader is one whole step, precision and schedule are ours), and what a backend cannot do is refused
before anything is loaded.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from firefly import ranks
from firefly.config import RECORDS_OF_TASK, Config, bad_choice
from firefly.console import notice
from firefly.errors import UsageError
from firefly.models.adapters import transformers_model
from firefly.models.checkpointing import decoder_layers
from firefly.models.memory import Forecast
from firefly.models.precision import Precision
from firefly.models.unread import UNREAD, read_here


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What the rest of the program needs to know about a backend.

    Attributes:
        name: as run.json and messages have it.
        shards: which of "weights", "gradients" and "optimizer" each rank holds only its share of.
        deepspeed: DeepSpeed runs the optimizer's step at the end of the step's last backward.
        settings: for `TrainingArguments`.
    """

    name: str
    shards: frozenset[str] = frozenset()
    deepspeed: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shards_weights(self) -> bool:
        return "weights" in self.shards

    def share(self, whole: Forecast) -> Forecast:
        """One rank's part of what a single process would need."""
        if not self.shards:
            return whole
        names = {OPTIMIZER: ("optimizer",), GRADIENTS: ("gradients",), WEIGHTS: ("weights", "adapter")}
        sharded = {part for kind in self.shards for part in names[kind]}
        count = ranks.world_size()
        parts = {name: size // count if name in sharded else size for name, size in whole.parts.items()}
        return replace(whole, parts=parts, loaded=0 if self.shards_weights else whole.loaded)

    def arguments(self, precision: Precision) -> dict[str, Any]:
        """`TrainingArguments` of this backend."""
        if "deepspeed" not in self.settings:
            return {"deepspeed": None, "fsdp": None, "fsdp_config": None} | dict(self.settings)
        # DeepSpeed casts a whole model to one compute type; ours is set weight by weight. Loss scaling for fp16 is
        # left to it.
        settings = dict(self.settings["deepspeed"])
        settings["fp16"] = {**settings.get("fp16", {}), "enabled": precision.scaled}
        settings["bf16"] = {"enabled": False}
        return {"deepspeed": settings, "fsdp": None, "fsdp_config": None}


OPTIMIZER, GRADIENTS, WEIGHTS = "optimizer", "gradients", "weights"

BACKENDS: Mapping[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(name="single"),
        Backend(name="ddp"),
        Backend(name="fsdp2", shards=frozenset((OPTIMIZER, GRADIENTS, WEIGHTS))),
        Backend(name="zero0", deepspeed=True),
        Backend(name="zero1", shards=frozenset((OPTIMIZER,)), deepspeed=True),
        Backend(name="zero2", shards=frozenset((OPTIMIZER, GRADIENTS)), deepspeed=True),
        Backend(name="zero3", shards=frozenset((OPTIMIZER, GRADIENTS, WEIGHTS)), deepspeed=True),
    )
}

# Sections of a DeepSpeed configuration that Firefly's own keys decide, and those keys.
DECIDED_ELSEWHERE: Mapping[str, str] = {
    "optimizer": "optim, learning_rate, weight_decay",
    "scheduler": "lr_scheduler_type, warmup_steps",
    "train_batch_size": "per_device_train_batch_size",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "amp": "bf16, fp16",
    "bf16": "bf16",
    "fp16": "fp16",
    "activation_checkpointing": "gradient_checkpointing",
}

# accelerate's settings for what Firefly's own keys decide; with the values that ask for nothing.
LAUNCHER_SETTINGS: Mapping[str, str] = {
    "ACCELERATE_MIXED_PRECISION": "bf16, fp16",
    "ACCELERATE_DYNAMO_BACKEND": "torch_compile",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "max_grad_norm",
}
NOTHING = ("", "no", "none", "false", "1", "1.0", "auto")


def resolve_backend(config: Config, launched: Mapping[str, Any]) -> Backend:
    """The backend of this run, with its settings.

    Args:
        launched: what `take_launcher_settings` found.

    Raises:
        UsageError: a settings file that cannot be read, two backends at once, or something the backend cannot do.
    """
    deepspeed = config.training.get("deepspeed") or launched.get("deepspeed")
    fsdp, fsdp_config = config.training.get("fsdp"), config.training.get("fsdp_config")
    if not fsdp and "fsdp" in launched:
        fsdp, fsdp_config = True, launched["fsdp"]
    if deepspeed and fsdp:
        raise UsageError("engine.two", "both deepspeed and fsdp are asked for; keep one of them.")
    if deepspeed:
        backend = _deepspeed_backend(deepspeed)
    elif ranks.world_size() == 1:
        if fsdp:
            notice("engine.fsdp_alone", "fsdp is ignored: there is one process, and nothing to shard.")
        backend = BACKENDS["single"]
    elif fsdp:
        backend = replace(BACKENDS["fsdp2"], settings=_fsdp_settings(fsdp, fsdp_config))
    else:
        backend = BACKENDS["ddp"]
    _refuse(backend, config)
    return backend


def _refuse(backend: Backend, config: Config) -> None:
    """What a backend cannot do, by name."""
    if backend.shards_weights and config.adapter.mode == "qlora":
        raise UsageError(
            "engine.no_qlora",
            "train_mode qlora cannot run with {engine}, which shards weights over ranks: 4-bit weights cannot be "
            "sharded. Use train_mode lora, or plain torchrun (DDP) or ZeRO-2 with qlora.",
            engine=backend.name,
        )
    best = config.training.get("load_best_model_at_end")
    if (backend.deepspeed or backend.shards) and config.training.get("save_only_model") and best:
        raise UsageError(
            "engine.no_best",
            "load_best_model_at_end (early stopping switches it on) cannot go with save_only_model and {engine}, which "
            "loads its own checkpoints alone. Leave one of the keys out.",
            engine=backend.name,
        )
    if backend.deepspeed and config.step.on_nonfinite_loss == "skip":
        raise UsageError(
            "engine.no_skip",
            'on_nonfinite_loss "skip" cannot run with {engine}: DeepSpeed updates the weights within backward. Use '
            '"stop".',
            engine=backend.name,
        )
    compiled = any(config.training.get(f"torch_compile{part}") for part in ("", "_backend", "_mode"))
    if backend.shards and compiled:
        raise UsageError(
            "engine.no_compile",
            "torch_compile cannot run with {engine}; remove the key, or use plain torchrun (DDP).",
            engine=backend.name,
        )
    if backend.shards_weights and config.adapter.mode != "full" and config.adapter.use_dora:
        raise UsageError(
            "engine.no_dora",
            "use_dora cannot run with {engine}, which shards weights over ranks; remove the key, or use plain "
            "torchrun (DDP) or ZeRO-2.",
            engine=backend.name,
        )


def refuse_uneven_passes(config: Config, layout: str, backend: Backend) -> None:
    """Ranks with sharded weights have to call the model equally often.

    Raises:
        UsageError: a block of documents would take as many passes as it holds documents.
    """
    documents = RECORDS_OF_TASK[config.task_type] == "document" and config.data.document_attention == "isolated"
    if backend.shards_weights and layout == "solo" and documents:
        raise UsageError(
            "engine.documents_apart",
            "{engine} shards the weights, and this model takes each document of a block by itself: ranks would wait "
            'for each other for ever. Set "document_attention": "joined", or leave fsdp and ZeRO-3 out.',
            engine=backend.name,
        )


# ---- DeepSpeed ----


def _deepspeed_backend(given: Any) -> Backend:
    settings = _read_settings("deepspeed", given)
    try:
        import deepspeed  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UsageError(
            "engine.no_deepspeed",
            "the key deepspeed needs the package deepspeed, which is not installed: pip install --no-build-isolation "
            'deepspeed. Without it: remove the key (DDP), or set "fsdp": true.',
        ) from None
    # On CPUs it would compile an extension, which takes a compiler and a minute, for what gloo does as well.
    compatible = getattr(getattr(deepspeed, "ops", None), "__compatible_ops__", {})
    compatible["deepspeed_shm_comm"] = False
    overruled = [name for name in DECIDED_ELSEWHERE if _says_something(settings.get(name))]
    for name in overruled:
        notice("engine.overruled", "{key} is ignored: {keys} decides.", key=name, keys=DECIDED_ELSEWHERE[name])
    settings = {name: value for name, value in settings.items() if name not in DECIDED_ELSEWHERE or name == "fp16"}
    zero = dict(settings.get("zero_optimization", {}))
    stage = zero.get("stage", 0)
    if f"zero{stage}" not in BACKENDS:
        raise bad_choice("zero_optimization.stage", stage, "0123")
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True  # the files that one process would leave
    settings |= {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # `optim` decides; DeepSpeed's own has to be compiled
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    return replace(BACKENDS[f"zero{stage}"], settings={"deepspeed": settings})


def _says_something(value: Any) -> bool:
    """Whether a section of a DeepSpeed configuration sets something: not absent, "auto" or switched off."""
    if isinstance(value, dict):
        return value.get("enabled", True) not in (False, "auto") and bool(value)
    return value not in (None, "auto", False)


def _read_settings(key: str, given: Any) -> dict[str, Any]:
    if isinstance(given, Mapping):
        return dict(given)
    path = Path(str(given)).expanduser()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            "engine.no_file",
            "{key}: the file {path} does not exist (paths are taken from the folder that the command runs in).",
            key=key,
            path=path,
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(
            "config.unreadable", "cannot read configuration {path}: {problem}.", path=path, problem=error
        ) from None
    if not isinstance(found, dict):
        raise UsageError(
            "config.not_an_object", '{path} must hold one object of keys and values: {{"key": value, …}}.', path=path
        )
    return found


def load_plainly(args: Any) -> None:
    """Let transformers load models as without ZeRO-3, until `shard_weights`."""
    if getattr(args, "hf_deepspeed_config", None) is not None:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def shard_weights(backend: Backend, model: Any, args: Any) -> None:
    """Shard a model's weights under ZeRO-3, before DeepSpeed would move it whole to a GPU.

    Our kernels use the weights of a decoder layer's parts directly, so a layer is gathered as one. (FSDP2 shards by
    layers, too, when accelerate prepares the model.)
    """
    if not backend.deepspeed:
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config

    set_hf_deepspeed_config(args.hf_deepspeed_config)
    if not backend.shards_weights:
        return
    import deepspeed  # pyright: ignore[reportMissingImports]
    from deepspeed.utils import set_z3_leaf_modules  # pyright: ignore[reportMissingImports]

    layers = sorted({type(layer) for layer in decoder_layers(model)}, key=lambda kind: kind.__name__)
    if layers:
        set_z3_leaf_modules(model, layers)
        # Such a layer's gradients are taken when that of its input is there, so the first one has to have one, too.
        transformers_model(model).enable_input_require_grads()
    deepspeed.init_distributed()  # or DeepSpeed assumes a single rank

    def one_by_one(recurse: bool = True) -> Iterator[Any]:
        """Parameters whole for as long as it takes to share each out: of the first rank's numbers, which it sends."""
        for parameter in model.parameters(recurse):
            if ranks.is_first():
                read_here([parameter])
            elif hasattr(parameter, UNREAD):
                parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
                delattr(parameter, UNREAD)
            yield parameter

    shared_out: Any = nn.Module()
    shared_out.parameters = one_by_one
    deepspeed.zero.Init(module=shared_out, config_dict_or_path=args.hf_deepspeed_config.config)


def gathered(backend: Backend, parameters: list[Any]) -> Any:
    """A context in which these parameters are whole on every rank."""
    if backend.name != "zero3":
        return nullcontext()
    import deepspeed  # pyright: ignore[reportMissingImports]

    return deepspeed.zero.GatheredParameters(parameters)


# ---- FSDP ----


def _fsdp_settings(fsdp: Any, config: Any) -> dict[str, Any]:
    """FSDP2's settings from a switch, older words ("full_shard auto_wrap offload") and `fsdp_config`."""
    settings = _read_settings("fsdp_config", config) if config else {}
    settings = {name.removeprefix("fsdp_"): value for name, value in settings.items()}
    words = fsdp.split() if isinstance(fsdp, str) else list(fsdp) if isinstance(fsdp, list | tuple) else []
    for word in (str(word) for word in words):
        if word in ("full_shard", "shard_grad_op"):
            settings.setdefault("reshard_after_forward", word == "full_shard")
        elif word == "offload":
            settings.setdefault("cpu_offload", True)
        elif word not in ("auto_wrap", "true"):
            known = ("true", "full_shard", "shard_grad_op", "offload", "auto_wrap")
            raise bad_choice("fsdp", json.dumps(word), known)
    if str(settings.get("version", 2)) != "2":
        notice("engine.fsdp2", "fsdp_config asks for FSDP 1, which transformers is about to drop; FSDP2 is used.")
    if str(settings.get("state_dict_type", "FULL_STATE_DICT")) != "FULL_STATE_DICT":
        notice(
            "engine.overruled",
            "{key} is ignored: {keys} decides.",
            key="fsdp_config.state_dict_type",
            keys="FULL_STATE_DICT",
        )
    if str(settings.pop("activation_checkpointing", False)).lower() == "true":
        notice(
            "engine.overruled",
            "{key} is ignored: {keys} decides.",
            key="fsdp_config.activation_checkpointing",
            keys="gradient_checkpointing",
        )
    known = ("reshard_after_forward", "cpu_offload", "auto_wrap_policy", "min_num_params")
    kept = {name: settings[name] for name in (*known, "transformer_layer_cls_to_wrap") if name in settings}
    return {"fsdp": True, "fsdp_config": kept | {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}


# ---- launchers ----


def take_launcher_settings() -> dict[str, Any]:
    """The settings of `accelerate launch`, removed from the environment: from here on only Firefly's apply."""
    environment, found = os.environ, {}
    for name, key in LAUNCHER_SETTINGS.items():
        value = environment.pop(name, "")
        if value.lower() not in NOTHING:
            notice("engine.overruled", "{key} is ignored: {keys} decides.", key=name, keys=key)
    if environment.pop("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        found["deepspeed"] = environment.pop("ACCELERATE_DEEPSPEED_CONFIG_FILE", "") or _launched_zero()
    if environment.pop("ACCELERATE_USE_FSDP", "false").lower() == "true":
        found["fsdp"] = _launched_fsdp()
    if environment.pop("ACCELERATE_USE_MEGATRON_LM", "false").lower() == "true":
        raise UsageError(
            "engine.no_megatron",
            "accelerate is configured for Megatron-LM, which Firefly does not run; choose DDP, FSDP or DeepSpeed "
            "there.",
        )
    return found


def _launched_zero() -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": int(os.environ.pop("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}
    for part in ("optimizer", "param"):
        device = os.environ.pop(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
        if device != "none":
            zero[f"offload_{part}"] = {"device": device}
    return {"zero_optimization": zero}


def _launched_fsdp() -> dict[str, Any]:
    found: dict[str, Any] = {}
    names = {"RESHARD_AFTER_FORWARD": "reshard_after_forward", "OFFLOAD_PARAMS": "cpu_offload"}
    for variable, name in names.items():
        value = os.environ.pop(f"FSDP_{variable}", "").lower()
        if value:
            found[name] = value in ("true", "full_shard")
    if layers := os.environ.pop("FSDP_TRANSFORMER_CLS_TO_WRAP", ""):
        found["transformer_layer_cls_to_wrap"] = layers.split(",")
    return found


RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")


def settle_rank_variables(backend: Backend) -> None:
    """Let the environment, which torch and DeepSpeed read, name the ranks that the backend has.

    torchrun with one process asks for a process group of one; a run without it does the same work with less. DeepSpeed
    wants a group even where it was started without a launcher.
    """
    if backend.name == "single":
        for name in RANK_VARIABLES:
            os.environ.pop(name, None)
    elif backend.deepspeed and "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
