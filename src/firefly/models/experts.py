"""Experts of a mixture: which parameters they are, how peft targets them, and NF4 for QLoRA.

Current transformers keeps the experts of a layer as 3-D parameters (`experts.gate_up_proj`, `experts.down_proj`), which
neither peft's `target_modules` nor bitsandbytes sees.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from firefly.errors import UsageError
from firefly.models.kernels.expert_linear import QuantizedExperts, install_quantized_forward, is_known


def expert_stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(module's path, module, parameter's name) of every stack of expert weights, (experts, …, …)."""
    for path, module in model.named_modules():
        count = getattr(module, "num_experts", None)
        for name, parameter in module.named_parameters(recurse=False):
            if len(parameter.shape) == 3 and parameter.shape[0] == count:
                yield path, module, name


def expert_parameters(model: PreTrainedModel, without: Collection[str] = ()) -> list[str]:
    """Names of the experts for `LoraConfig(target_parameters=…)`; empty for a dense model.

    Args:
        without: paths of modules whose experts are left out.
    """
    return shortened({f"{path}.{name}" for path, _, name in expert_stacks(model) if path not in without}, model)


def shortened(chosen: Iterable[str], model: nn.Module) -> list[str]:
    """Names that peft matches with exactly the parameters `chosen`: their last parts, or whole paths if ambiguous.

    Two parts at least: an adapter for all `down_proj` would take in dense layers of other modules.
    """
    chosen = set(chosen)
    if not chosen:
        return []
    every = {name for name, _ in model.named_parameters()}
    for parts in range(2, 5):
        short = {".".join(name.split(".")[-parts:]) for name in chosen}
        if {name for name in every if any(name.endswith(f".{end}") for end in short)} == chosen:
            return sorted(short)
    return sorted(chosen)


def quantize_experts(model: Any, compute: torch.dtype) -> Any:
    """Put every stack of experts into NF4, in place, as bitsandbytes does with linear layers; return the model.

    Raises:
        UsageError: the experts of this architecture compute in a way of their own; they would stay in 16 bit.
    """
    stacks = list(expert_stacks(model))
    unknown = {module for _, module, _ in stacks if not is_known(module)}
    if unknown:
        left = sum(getattr(module, name).numel() for _, module, name in stacks if module in unknown)
        kinds = ", ".join(sorted({type(module).__name__ for module in unknown}))
        raise UsageError(
            "model.experts_in_16_bit",
            "qlora cannot quantize the experts of this model ({kinds}): {size} GiB would stay in 16 bit. Use "
            "train_mode lora, which holds the whole model in 16 bit.",
            kinds=kinds,
            size=f"{left * compute.itemsize / 2**30:.1f}",
        )
    for _, module, name in stacks:
        module_: Any = module
        weight = getattr(module, name)
        if not isinstance(weight, QuantizedExperts):
            setattr(module, name, QuantizedExperts.of(weight.data.to(compute), module_.is_transposed))
        install_quantized_forward(module)
    return model


@contextmanager
def quantizing_while_loading() -> Iterator[None]:
    """Let transformers put each stack of experts into NF4 as it is read; `quantize_experts` does the rest.

    Without it all experts lie on the device in 16 bit before the first is quantized. The quantizer of transformers 5.23
    takes linear layers only; should a later one be asked in another way, experts are quantized after loading.
    """
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as QUANTIZERS

    original: Any = QUANTIZERS["bitsandbytes_4bit"]

    class Operation(Bnb4bitQuantize):
        def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
            model, converted, others = kwargs["model"], {}, {}
            for name, value in input_dict.items():
                experts: Any = _known_experts(model, name)
                if experts is None:
                    others[name] = value
                else:
                    weight = value[0] if isinstance(value, list) else value
                    converted[name] = QuantizedExperts.of(weight, experts.is_transposed)
            return converted | (super().convert(others, *args, **kwargs) if others else {})

    class Quantizer(original):
        def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
            known = _known_experts(model, param_name) is not None
            return known or super().param_needs_quantization(model, param_name, **kwargs)

        def get_quantize_ops(self) -> Operation:
            return Operation(self)

    QUANTIZERS["bitsandbytes_4bit"] = Quantizer
    try:
        yield
    finally:
        QUANTIZERS["bitsandbytes_4bit"] = original


def _known_experts(model: nn.Module, parameter: str) -> nn.Module | None:
    """The experts that the stack named `parameter` belongs to; None for any other parameter."""
    path, _, name = parameter.rpartition(".")
    module = model.get_submodule(path)
    stacked = any(found == name for _, owner, found in expert_stacks(module) if owner is module)
    return module if stacked and is_known(module) else None


def dequantize_experts(model: Any, dtype: torch.dtype) -> None:
    """Undo `quantize_experts`, with the numbers that training saw."""
    for _, module, name in list(expert_stacks(model)):
        weight = getattr(module, name)
        if isinstance(weight, QuantizedExperts):
            setattr(module, name, nn.Parameter(weight.dequantized(dtype), requires_grad=False))
            vars(module).pop("forward", None)
