"""The head enters the loss at target positions only.

A prepared model, called with `targets`, returns {"loss": Σ NLL over them} instead of logits. It is the same module
tree with the same weights, so saving, tying, PEFT and sharding see nothing new.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from firefly.models.kernels.token_nll import summed_nll


def install_target_head(model: PreTrainedModel) -> str:
    """Let `model(..., target_index=…, targets=…)` return the summed loss; return "fused" or "logits", the way found.

    The fused head is used only where the head is a plain linear layer and a check on this very model shows the loss
    that its own logits give: soft caps, scales and biases that a model applies after the head would be lost
    otherwise. Every other model computes its own logits, at the target positions only (`logits_to_keep`).
    """
    head = model.get_output_embeddings()
    model.forward = MethodType(_forward_logits, model)  # type: ignore[method-assign]
    if type(head) is not nn.Linear or _is_patched(head):
        return "logits"
    probe = _probe(model)
    expected = _loss(model, probe)
    head.forward = MethodType(_head_forward, head)
    model.forward = MethodType(_forward_fused, model)  # type: ignore[method-assign]
    found = _loss(model, probe)
    tolerance = 1e-4 if head.weight.dtype == torch.float32 else 2e-2
    if torch.isfinite(found) and (found - expected).abs() <= tolerance * expected.abs():
        return "fused"
    del head.forward
    model.forward = MethodType(_forward_logits, model)  # type: ignore[method-assign]
    return "logits"


def _is_patched(head: nn.Module) -> bool:
    return "forward" in vars(head)


def _head_forward(self: nn.Linear, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
    if targets is None:
        return F.linear(hidden, self.weight, self.bias)
    return summed_nll(hidden, self.weight, self.bias, targets)


def _forward_fused(self: Any, *args: Any, target_index: Tensor | None = None, targets: Tensor | None = None, **kwargs: Any) -> Any:
    if target_index is None:
        return type(self).forward(self, *args, **kwargs)
    hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
    # Through the head's __call__, so that sharded engines gather its weight.
    return {"loss": self.get_output_embeddings()(hidden[0].index_select(0, target_index), targets)}


def _forward_logits(self: Any, *args: Any, target_index: Tensor | None = None, targets: Tensor | None = None, **kwargs: Any) -> Any:
    if target_index is None or targets is None:
        return type(self).forward(self, *args, **kwargs)
    logits = type(self).forward(self, *args, use_cache=False, logits_to_keep=target_index, **kwargs).logits
    return {"loss": F.cross_entropy(logits[0].float(), targets, reduction="sum")}


def _probe(model: PreTrainedModel) -> dict[str, Any]:
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(12, device=model.device) * 7919 % vocabulary
    return {
        "input_ids": ids[None],
        "position_ids": torch.arange(12, device=model.device)[None],
        "segment_borders": (0, 12),
        "target_index": torch.tensor([2, 5, 10], device=model.device),
        "targets": ids[[3, 6, 11]],
    }


def _loss(model: PreTrainedModel, probe: dict[str, Any]) -> Tensor:
    inputs = dict(probe)
    if model.config._attn_implementation != "firefly_segments":
        del inputs["segment_borders"]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model(**inputs)["loss"].float()
    finally:
        model.train(was_training)
