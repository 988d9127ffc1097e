"""What computes operations without matmuls (norms, rotary positions, gated activations): Liger's kernels or PyTorch.

Liger (arXiv:2410.10989) reads and writes each array once, where PyTorch's operations take several trips to memory. It
is used on CUDA GPUs where `liger-kernel` is installed and passes a probe; everywhere else the plain forms are.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from firefly.console import notice
from firefly.models.precision import has_bf16
from firefly.models.probing import agree

Function = Callable[..., Tensor]


def implementation(device: torch.device) -> str:
    """The implementation for `device`: "liger" or "torch". Probed once for each device.

    Compiled code is PyTorch's: its compiler joins such operations by itself, and cannot look into Liger's functions.
    """
    if torch.compiler.is_compiling():
        return "torch"
    return "liger" if is_cuda_device(device) and _liger_works(device) else "torch"


def is_cuda_device(device: torch.device) -> bool:
    """Whether Liger's kernels are for such a device."""
    return device.type == "cuda"


@cache
def _liger_works(device: torch.device) -> bool:
    """Whether Liger is there and gives PyTorch's results; a notice if it is installed and fails."""
    if importlib.util.find_spec("liger_kernel") is None:
        return False
    try:
        fault = trial(device)
    except Exception as error:  # Triton needs a C compiler and a fitting driver, and fails in many ways without
        fault = f"{type(error).__name__}: {error}"
    if fault is not None:
        notice(
            "kernels.liger_failed",
            "liger-kernel fails on this GPU ({reason}); PyTorch computes norms, rotary positions and gates instead.",
            reason=" ".join(fault.split())[:300],
        )
    return fault is None


def trial(device: torch.device) -> str | None:
    """Run each of Liger's kernels, forward and backward, on small arrays; return which differs from PyTorch, or None.

    Each is tried in fp32 and in the 16-bit type of the GPU.
    """
    for dtype in (torch.float32, torch.bfloat16 if has_bf16(device) else torch.float16):
        for name, pairs in _results(device, dtype).items():
            if not all(agree(*pair, computed=dtype) for pair in pairs):
                return f"{name} in {dtype} differs"
    return None


def _results(device: torch.device, dtype: torch.dtype) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """By kernel: outputs and gradients, Liger's beside PyTorch's."""
    from firefly.models.kernels import liger

    def numbers(*shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.linspace(-3, 3, count, device=device).mul_(7).sin_().view(shape).to(dtype)

    def gates(kind: str, activation: Function) -> list[tuple[Tensor, Tensor]]:
        found = [liger.gated(kind, g, u), *liger.gated_backward(kind, g.clone(), u.clone(), grad.clone())]
        return _beside(found, _with_gradients(lambda a, b: activation(a) * b, (g, u), grad))

    def norms(offset: float, scales_in_fp32: bool) -> list[tuple[Tensor, Tensor]]:
        def plain(x: Tensor, w: Tensor) -> Tensor:
            return (F.rms_norm(x.float(), (48,), eps=1e-6) * (w + offset)).to(dtype)

        def kernel(x: Tensor, w: Tensor) -> Tensor:
            return liger.rms_norm(x, w, 1e-6, offset, scales_in_fp32)

        return _beside(*(_with_gradients(function, (g, numbers(48) + 1), grad) for function in (kernel, plain)))

    def rotations() -> list[tuple[Tensor, Tensor]]:
        angles = numbers(1, 5, 4).repeat(1, 1, 2)
        cos, sin = angles.cos(), angles.sin()

        def plain(q: Tensor, k: Tensor) -> Tensor:
            heads = torch.cat((q, k), 1)
            left, right = heads.chunk(2, dim=-1)
            return heads * cos[:, None] + torch.cat((-right, left), -1) * sin[:, None]

        def kernel(q: Tensor, k: Tensor) -> Tensor:
            return torch.cat(liger.rotate(q, k, cos, sin, dtype), 1)

        inputs, weights = (numbers(1, 4, 5, 8), numbers(1, 2, 5, 8)), numbers(1, 6, 5, 8)
        return _beside(*(_with_gradients(function, inputs, weights) for function in (kernel, plain)))

    g, u, grad = numbers(3, 48), numbers(48, 3).T.contiguous(), numbers(3, 48) + 0.5
    return {
        "SwiGLU": gates("silu", F.silu),
        "GeGLU": gates("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        "RMS norm of Llama": norms(0.0, False),
        "RMS norm of Gemma": norms(1.0, True),
        "rotary positions": rotations(),
    }


def _with_gradients(function: Function, inputs: tuple[Tensor, ...], grad: Tensor) -> list[Tensor]:
    """The output, and the gradients of the inputs."""
    with torch.enable_grad():
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _beside(found: list[Tensor], expected: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(found, expected, strict=True))
