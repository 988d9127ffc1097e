"""Which number type a run computes in: what was asked for, and what the hardware has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from firefly.config import PrecisionConfig
from firefly.console import notice
from firefly.errors import UsageError
from firefly.ranks import local_rank
from firefly.translation import translate


@dataclass(frozen=True)
class Rates:
    """FLOPs a second of products with matrices of a model's shapes on this CPU (`products.measure_rates`)."""

    float32: float
    bfloat16: float

    def of(self, dtype: torch.dtype) -> float:
        return self.float32 if dtype == torch.float32 else self.bfloat16


@dataclass(frozen=True)
class Precision:
    """`compute` is the type of frozen weights and activations; trainable weights have fp32 masters besides.

    `scaled` says that gradients need loss scaling (fp16 on GPUs without bf16). `rates` is what the choice rests on,
    where it was measured.
    """

    compute: torch.dtype
    scaled: bool = False
    rates: Rates | None = None

    @property
    def name(self) -> str:
        return str(self.compute).removeprefix("torch.")

    def __str__(self) -> str:
        if self.rates is None or self.compute not in (torch.float32, torch.bfloat16):
            return self.name
        other = torch.bfloat16 if self.compute == torch.float32 else torch.float32
        return translate(
            "{name} (products at {rate} GFLOP/s, {other} {others_rate})",
            name=self.name,
            rate=f"{self.rates.of(self.compute) / 1e9:.0f}",
            other=Precision(other).name,
            others_rate=f"{self.rates.of(other) / 1e9:.0f}",
        )


def compute_type(x: Tensor) -> torch.dtype:
    """What a linear layer computes in when called with `x`: autocast's type, where that is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def pick_device(use_cpu: bool = False) -> torch.device:
    """This rank's CUDA GPU if there is one (the first one for a single process), else the CPU."""
    if use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank())


def has_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 matrices natively. Emulated bf16 is several times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # pyright: ignore


DTYPES = ("auto", "float32", "bfloat16", "float16")


def named_precision(dtype: str, device: torch.device) -> Precision:
    """What a model that only answers computes in; `auto` is what training would take by the hardware alone.

    Raises:
        UsageError: `dtype` is none of DTYPES.
    """
    if dtype not in DTYPES:
        raise UsageError(
            "config.bad_choice",
            "{key} = {value} is not valid; choose one of: {choices}.",
            key="dtype",
            value=repr(dtype),
            choices=", ".join(DTYPES),
        )
    return resolve_precision(PrecisionConfig(), device) if dtype == "auto" else Precision(getattr(torch, dtype))


def resolve_precision(request: PrecisionConfig, device: torch.device) -> Precision:
    """By the hardware alone: bf16 where it has it, else fp16 with loss scaling on a GPU, else fp32.

    `"bf16": false` (without fp16) asks for fp32 everywhere. Any replacement is a notice. On a CPU that has bf16, what
    is not asked for is measured (`compute_type.measured_precision`).
    """
    if request.bf16 is False and not request.fp16:
        return Precision(torch.float32)
    if has_bf16(device):
        if request.fp16:
            notice(
                "precision.fp16_to_bf16",
                "fp16 was asked for; this hardware has bf16, which needs no loss scaling and is used instead.",
            )
        return Precision(torch.bfloat16)
    asked = "bf16" if request.bf16 else "fp16"
    if device.type == "cuda":
        if request.bf16:
            notice(
                "precision.replaced",
                "{asked} was asked for; this hardware lacks it, so {used} is used.",
                asked=asked,
                used="fp16",
            )
        return Precision(torch.float16, scaled=True)
    if request.bf16 or request.fp16:
        notice(
            "precision.replaced",
            "{asked} was asked for; this hardware lacks it, so {used} is used.",
            asked=asked,
            used="fp32",
        )
    return Precision(torch.float32)
