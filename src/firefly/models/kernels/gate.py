"""The gate of a feed-forward block, φ(g) ∘ u, and its gradients, as steps of a larger autograd function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from firefly.models.kernels.elementwise import implementation


@dataclass(frozen=True)
class Activation:
    """φ, and the gradient of its argument from that of its value."""

    name: str
    value: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = (
    Activation("silu", F.silu, lambda grad, x: torch.ops.aten.silu_backward(grad, x)),
    Activation(
        "gelu_tanh",
        lambda x: F.gelu(x, approximate="tanh"),
        lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    ),
    Activation("gelu", F.gelu, lambda grad, x: torch.ops.aten.gelu_backward(grad, x)),
)


class Gate(Protocol):
    """g, u and all results: (rows, inner width) in the compute type."""

    def forward(self, g: Tensor, u: Tensor) -> Tensor:
        """φ(g) ∘ u."""
        ...

    def again(self, g: Tensor, u: Tensor, product: bool) -> tuple[Tensor | None, Tensor | None]:
        """In backward: (φ(g) ∘ u if `product`, what `backward` is to be given as `value`)."""
        ...

    def backward(self, g: Tensor, u: Tensor, grad: Tensor, value: Tensor | None, spend: bool) -> tuple[Tensor, Tensor]:
        """The gradients of g and u from `grad`, that of φ(g) ∘ u, which is overwritten.

        `spend`: g and u will not be read again, so their memory may be taken for the gradients.
        """
        ...


def gate_for(activation: Activation, device: torch.device, width: int) -> Gate:
    """The implementation for arrays of `width` columns on `device`."""
    if implementation(device) == "liger":
        from firefly.models.kernels import liger

        if activation.name in liger.GATES and width <= liger.WIDEST:
            return LigerGate(activation.name)
    return TorchGate(activation)


@dataclass(frozen=True)
class TorchGate:
    """By PyTorch's operations."""

    activation: Activation

    def forward(self, g: Tensor, u: Tensor) -> Tensor:
        return self.activation.value(g).mul_(u)

    def again(self, g: Tensor, u: Tensor, product: bool) -> tuple[Tensor | None, Tensor | None]:
        value = self.activation.value(g)
        return (value * u if product else None), value

    def backward(self, g: Tensor, u: Tensor, grad: Tensor, value: Tensor | None, spend: bool) -> tuple[Tensor, Tensor]:
        assert value is not None
        grad_u = value.mul_(grad)
        return self.activation.backward(grad.mul_(u), g), grad_u


@dataclass(frozen=True)
class LigerGate:
    """By one kernel each way."""

    kind: str

    def forward(self, g: Tensor, u: Tensor) -> Tensor:
        from firefly.models.kernels import liger

        return liger.gated(self.kind, g, u)

    def again(self, g: Tensor, u: Tensor, product: bool) -> tuple[Tensor | None, Tensor | None]:
        return (self.forward(g, u) if product else None), None

    def backward(self, g: Tensor, u: Tensor, grad: Tensor, value: Tensor | None, spend: bool) -> tuple[Tensor, Tensor]:
        from firefly.models.kernels import liger

        return liger.gated_backward(self.kind, *((g, u) if spend else (g.clone(), u.clone())), grad)


def graph_is_kept() -> bool:
    """Whether autograd may run the backward that is running now once more (retain_graph, create_graph)."""
    autograd: Any = getattr(torch._C, "_autograd", None)
    ask = getattr(autograd, "_get_current_graph_task_keep_graph", None)  # what torch.compile asks, too
    return ask is None or bool(ask())
