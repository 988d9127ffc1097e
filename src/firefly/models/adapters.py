"""Adapters: which layers get one, and how it is attached."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from firefly.config import AdapterConfig
from firefly.console import notice
from firefly.models.experts import expert_parameters, shortened
from firefly.models.kernels.expert_linear import install_expert_kernels
from firefly.models.kernels.lora_linear import install_lora_kernels


def attach_adapter(model: PreTrainedModel, config: AdapterConfig) -> Any:
    """Return the model ready to train: itself with fp32 weights (full), or wrapped by peft with fp32 adapters."""
    if config.mode == "full":
        return model.requires_grad_(True)
    from peft import LoraConfig, get_peft_model

    parameters = lora_parameters(model)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
        # peft refuses dropout beside target_parameters, also in an adapter that it loads: `_set_dropout` puts it in.
        lora_dropout=0.0 if parameters else config.dropout,
        target_modules=lora_targets(model),
        target_parameters=parameters or None,
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, lora, autocast_adapter_dtype=True)
    install_lora_kernels(wrapped)
    left_to_peft = install_expert_kernels(wrapped)
    if parameters and config.dropout > 0:
        _set_dropout(wrapped, config.dropout, left_to_peft)
    return wrapped


def _set_dropout(wrapped: nn.Module, probability: float, left_to_peft: list[str]) -> None:
    """Dropout in every adapter that our kernels compute; peft's forward of stacked experts has none."""
    from peft.tuners.lora import LoraLayer

    for name, module in wrapped.named_modules():
        if isinstance(module, LoraLayer) and name not in left_to_peft:
            for adapter in module.lora_dropout:
                module.lora_dropout[adapter] = nn.Dropout(probability)
    if left_to_peft:
        notice("adapter.experts_no_dropout", count=len(left_to_peft))


def transformers_model(model: Any) -> PreTrainedModel:
    """The transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def lora_targets(model: PreTrainedModel) -> list[str]:
    """Every linear layer but the output head and MoE routers, found by module type.

    Short names (`q_proj`) where they mean exactly these layers, as other tools expect them; whole paths otherwise.
    """
    linear = {name for name, module in model.named_modules() if _is_linear(module)}
    chosen = _adaptable(model)
    chosen -= _taken_for_experts(chosen, model)
    short = {name.rpartition(".")[2] for name in chosen}
    matched = {name for name in linear if name.rpartition(".")[2] in short}
    return sorted(short if matched == chosen else chosen)


def lora_parameters(model: PreTrainedModel) -> list[str]:
    """What peft adapts by the parameter's name: experts, and the weights of dense layers that it takes for experts."""
    beside = {f"{name}.weight" for name in _taken_for_experts(_adaptable(model), model)}
    return sorted([*expert_parameters(model), *shortened(beside, model)])


def _adaptable(model: PreTrainedModel) -> set[str]:
    head = model.get_output_embeddings()
    linear = [(name, module) for name, module in model.named_modules() if _is_linear(module)]
    return {name for name, module in linear if module is not head and not _is_router(name, module, model)}


def _taken_for_experts(names: set[str], model: PreTrainedModel) -> set[str]:
    of_experts = _names_of_experts(model)
    return {name for name in names if name.rpartition(".")[2] in of_experts}


def _names_of_experts(model: PreTrainedModel) -> set[str]:
    """Layer names that peft takes for experts of a mixture, whatever module they stand for.

    In these architectures peft (0.21) turns `gate_proj` and its like into adapters of the fused 3-D experts, of
    another rank, also when dense layers are meant by their whole path. By their weight's name they are adapted right.
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
        state = getattr(parameter, "quant_state", None)
        shape = parameter.shape if state is None else torch.Size(state.shape)
        count = int(shape.numel())
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total
