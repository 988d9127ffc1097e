"""Models of real shapes without their weights: a configuration is enough, the numbers are made up while loading.

Every weight is a view of one random buffer in main memory, so that a 14B model needs neither 28 GB on the disk nor in
memory: transformers moves each view to the device, and quantizes it there, as it does with weights from a file. Equal
numbers in equal places cost a matrix product as much as different ones.
"""

from typing import Any

import torch
import transformers

STANDARD_DEVIATION = 0.02


def install_random_weights(seed: int = 0) -> None:
    """Let `AutoModelForCausalLM.from_pretrained` make weights up, for every side of a benchmark alike."""

    def from_pretrained(place: Any, **options: Any) -> Any:
        config = transformers.AutoConfig.from_pretrained(place)
        with torch.device("meta"):
            shape = transformers.AutoModelForCausalLM.from_config(config)
        model = type(shape).from_pretrained(None, config=config, state_dict=made_up(shape, seed), **options)
        model.config._name_or_path = str(place)
        return model

    transformers.AutoModelForCausalLM.from_pretrained = from_pretrained


def made_up(model: Any, seed: int) -> dict[str, torch.Tensor]:
    """A state for `model` (on the meta device): norms are 1, all else looks into one random bf16 buffer."""
    largest = max(parameter.numel() for parameter in model.parameters())
    period = min(largest, 1 << 24)  # drawing random numbers is slow, repeating them is not
    drawn = torch.randn(period, generator=torch.Generator().manual_seed(seed)) * STANDARD_DEVIATION
    buffer = drawn.bfloat16().repeat(-(-largest // period))
    return {
        name: torch.ones(parameter.shape, dtype=torch.bfloat16)
        if name.endswith("norm.weight")
        else buffer[: parameter.numel()].view(parameter.shape)
        for name, parameter in model.named_parameters()
    }
