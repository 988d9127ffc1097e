"""What the code uses of a causal language model: transformers' own, or PEFT's around it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import nn


class CausalLM(Protocol):
    """Both kinds are `nn.Module`s; neither library has one type that says what they share."""

    config: Any
    training: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Logits, or with `targets` what `heads.install_target_head` says."""
        ...

    def get_input_embeddings(self) -> nn.Module: ...

    def get_output_embeddings(self) -> nn.Module | None: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...
