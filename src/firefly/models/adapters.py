"""Adapters: which layers get one, and how it is attached."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from firefly.config import AdapterConfig
from firefly.console import notice
from firefly.models.kernels.lora_linear import install_lora_kernels


def attach_adapter(model: PreTrainedModel, config: AdapterConfig) -> Any:
    """Return the model ready to train: itself with fp32 weights (full), or wrapped by peft with fp32 adapters."""
    if config.mode == "full":
        return model.requires_grad_(True)
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=config.dropout,
        target_modules=lora_targets(model),
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, lora, autocast_adapter_dtype=True)
    install_lora_kernels(wrapped)
    return wrapped


def transformers_model(model: Any) -> PreTrainedModel:
    """The transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def lora_targets(model: PreTrainedModel) -> list[str]:
    """Every linear layer but the output head and MoE routers, found by module type.

    Short names (`q_proj`) where they mean exactly these layers, as other tools expect them; whole paths otherwise.
    """
    head = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if _is_linear(module)}
    chosen = {name for name, module in linear.items() if module is not head and not _is_router(name, module, model)}
    of_experts = _names_of_experts(model)
    claimed = {name for name in chosen if name.rpartition(".")[2] in of_experts}
    if claimed:
        notice(
            "adapter.beside_experts",
            count=len(claimed),
            names=", ".join(sorted({n.rpartition(".")[2] for n in claimed})),
        )
        chosen -= claimed
    short = {name.rpartition(".")[2] for name in chosen}
    matched = {name for name in linear if name.rpartition(".")[2] in short}
    return sorted(short if matched == chosen else chosen)


def _names_of_experts(model: PreTrainedModel) -> set[str]:
    """Layer names that peft takes for experts of a mixture, whatever module they stand for.

    In these architectures peft (0.21) turns `gate_proj` and its like into adapters of the fused 3-D experts, of
    another rank, also when dense layers are meant. Experts are not adapted in this version, and neither are those.
    """
    from peft.utils import transformers_weight_conversion

    conversion: Any = transformers_weight_conversion
    family = conversion._MODEL_TO_CONVERSION_PATTERN.get(model.config.get_text_config().model_type)
    fused = conversion._MOE_FUSED_TARGETS.get(family, {})
    return set(conversion._MOE_TARGET_MODULE_MAPPING.get(family, {})) if fused else set()


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))  # bitsandbytes' Linear4bit is an nn.Linear


def _is_router(name: str, module: nn.Module, model: PreTrainedModel) -> bool:
    """A router scores experts: its output is as wide as there are experts (or 1, for a shared expert's gate)."""
    config = model.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    experts = {count for field in names if (count := getattr(config, field, None))}
    width = getattr(module, "out_features", None)
    named = any(part in ("gate", "router") or part.endswith("_gate") for part in name.split("."))
    return bool(experts) and named and width in {*experts, 1}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a 4-bit weight counts as the numbers it stands for."""
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            count = int(torch.Size(state.shape).numel())
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total
