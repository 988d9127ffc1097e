"""The machine that a plan is for: this one, or one of which only the memory is told."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch

from firefly.config import PrecisionConfig
from firefly.errors import UsageError
from firefly.models.memory import free_memory
from firefly.models.precision import Precision, pick_device, resolve_precision
from firefly.translation import translate

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Machine:
    """Attributes:
    kind: "cpu" or "cuda".
    memory: bytes that a run may take.
    here: whether it is this machine, whose speed can be measured.
    assumed: what was not told, in a sentence; "" where nothing was assumed.
    """

    kind: str
    memory: int
    here: bool
    assumed: str = ""

    @property
    def device(self) -> torch.device:
        return torch.device(self.kind)


def parse_memory(text: str) -> int:
    """Bytes of "24GB", "24 GiB", "512 MB"; GB are powers of ten, GiB of two.

    Raises:
        UsageError: not a number with such a unit.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", text, re.IGNORECASE)
    unit = UNITS.get(found[2].upper()) if found else None
    size = int(float(found[1]) * unit) if found and unit else 0
    if not size:
        raise UsageError(
            "plan.bad_memory",
            "--memory {value!r} is not valid: write a number with its unit, such as 24GB or 80GiB.",
            value=text,
        )
    return size


def describe_machine(memory: str, device: str, use_cpu: bool) -> Machine:
    """What `--memory` and `--device` name, or this machine.

    Without `--device`, memory is that of a CUDA card: whoever asks for another machine mostly means a card. A
    configuration that says `use_cpu` means a CPU.

    Raises:
        UsageError: an impossible size, an unknown device, or a card without its memory on a machine that has none.
    """
    if device and device not in DEVICES:
        raise UsageError(
            "plan.bad_device",
            "--device {value!r} is unknown; choose one of: {choices}.",
            value=device,
            choices=", ".join(DEVICES),
        )
    own = pick_device(use_cpu or device == "cpu")
    if not memory:
        if device == "cuda" and own.type != "cuda":
            raise UsageError(
                "plan.no_card",
                "--device cuda: this machine has no CUDA GPU; give the memory of the one to plan for, such as "
                "--memory 24GB.",
            )
        return Machine(own.type, free_memory(own), here=True)
    size = parse_memory(memory)
    if device:
        return Machine(device, size, here=device == own.type)
    if use_cpu:
        return Machine("cpu", size, here=own.type == "cpu")
    return Machine(
        "cuda",
        size,
        here=own.type == "cuda",
        assumed=translate(
            "--memory {memory} without --device: planned for a CUDA GPU (--device cpu plans for a CPU).", memory=memory
        ),
    )


def precision_on(machine: Machine, request: PrecisionConfig) -> Precision:
    """As `resolve_precision`; a card that is not here is taken to compute in bf16, as all since 2020 do."""
    if machine.kind == "cpu" or torch.cuda.is_available():
        return resolve_precision(request, machine.device)
    return Precision(torch.float32 if request.bf16 is False and not request.fp16 else torch.bfloat16)


def matmul_rate(sizes: list[tuple[int, int]], dtype: torch.dtype, device: torch.device, rows: int = 512) -> float:
    """FLOPs a second of products with weights of these (outputs, inputs), each the fastest of a few; takes a second."""
    flops = seconds = 0.0
    for outputs, inputs in sizes:
        left = torch.ones(rows, inputs, device=device, dtype=dtype)
        right = torch.ones(outputs, inputs, device=device, dtype=dtype)
        seconds += _fastest(left, right.T, device, limit=0.5 / len(sizes))
        flops += 2 * rows * inputs * outputs
    return flops / seconds


def _fastest(left: torch.Tensor, right: torch.Tensor, device: torch.device, limit: float) -> float:
    best, end = float("inf"), time.perf_counter() + limit
    torch.mm(left, right)  # the first call prepares
    while best == float("inf") or time.perf_counter() < end:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
