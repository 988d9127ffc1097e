"""The head enters the loss at target positions only.

A prepared model, called with `targets`, returns {"loss": Σ NLL over them} instead of logits or, with `per_token`,
{"logps": the log-probability of each}. It is the same module tree with the same weights, so saving, tying, PEFT and
sharding see nothing new. `router_logits` come along where the model was asked for them.
"""

from __future__ import annotations

import inspect
from functools import wraps
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from firefly.models.attention import UnsupportedAttention, short_row
from firefly.models.kernels.token_nll import summed_nll, token_logps
from firefly.models.probing import agree, decoder, evaluating


def install_target_head(model: PreTrainedModel) -> str:
    """Let `model(..., target_index=…, targets=…)` return the summed loss; return "fused" or "logits", the way found.

    The fused head is used only where the head is a plain linear layer, fed with the decoder's last hidden states, and
    the model passes its output on untouched (`_is_plain`): a soft cap, scale or bias around the head would be lost
    otherwise. Every other model computes its own logits, at the target positions only (`logits_to_keep`) where its
    architecture can leave the others out.
    """
    head: Any = model.get_output_embeddings()
    fused = type(head) is nn.Linear and "forward" not in vars(head) and _is_plain(model, head)
    if fused:
        head.forward = MethodType(_head_forward, head)
    model.forward = MethodType(_forward_with_targets(type(model).forward, fused), model)  # type: ignore[method-assign]
    return "fused" if fused else "logits"


def _is_plain(model: PreTrainedModel, head: nn.Linear) -> bool:
    """Let the head answer with made-up logits and see whether they come out as they are.

    Comparing losses would not do: a soft cap hardly bends the small logits of an untrained model.
    """
    inputs = short_row(model)
    seen: list[Tensor] = []
    calls: list[tuple[dict[str, Any], Any]] = []

    def record(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        count = hidden[..., 0].numel() * head.out_features
        made_up = torch.arange(count, device=hidden.device) * 7919 % 201 - 100
        return made_up.view(*hidden.shape[:-1], head.out_features).to(hidden.dtype)

    def note_call(_: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        calls.append(({} if args else kwargs, output))

    head.forward = record  # type: ignore[method-assign]
    watch = None
    try:
        body = decoder(model)
        watch = body.register_forward_hook(note_call, with_kwargs=True)
        with evaluating(model), torch.no_grad():
            logits = type(model).forward(model, **inputs, use_cache=False).logits
            # What the decoder makes of the inputs as they are: mostly just what the model asked of it.
            if len(calls) != 1 or not _same(calls[0][0], inputs | {"use_cache": False}):
                body(**inputs, use_cache=False)
            hidden = calls[-1][1].last_hidden_state
        untouched = torch.equal(logits.float(), record(hidden).float())
        return untouched and agree(seen[0], hidden)
    except (AttributeError, NotImplementedError, UnsupportedAttention):
        return False
    finally:
        if watch is not None:
            watch.remove()
        del head.forward


def _same(given: dict[str, Any], inputs: dict[str, Any]) -> bool:
    """Whether a module was called with these very values and nothing else."""
    given = {name: value for name, value in given.items() if value is not None}
    return given.keys() == inputs.keys() and all(given[name] is value for name, value in inputs.items())


def _head_forward(self: nn.Linear, hidden: Tensor, targets: Tensor | None = None, per_token: bool = False) -> Tensor:
    if targets is None:
        return F.linear(hidden, self.weight, self.bias)
    return (token_logps if per_token else summed_nll)(hidden, self.weight, self.bias, targets)


def _forward_with_targets(own: Any, fused: bool) -> Any:
    """A model's forward that can return the loss; without targets it is `own`, whose signature it has, since `generate`
    reads there what it may pass."""
    keeps = "logits_to_keep" in inspect.signature(own).parameters

    @wraps(own)
    def forward(
        self: Any,
        *args: Any,
        target_index: Tensor | None = None,
        targets: Tensor | None = None,
        per_token: bool = False,
        **kwargs: Any,
    ) -> Any:
        if target_index is None or targets is None:
            return own(self, *args, **kwargs)
        if fused:
            output = decoder(self)(*args, use_cache=False, **kwargs)
            chosen = output.last_hidden_state[0].index_select(0, target_index)
            # Through the head's __call__, so that sharded engines gather its weight.
            result = self.get_output_embeddings()(chosen, targets, per_token)
        else:
            asked = {"logits_to_keep": target_index} if keeps else {}
            output = own(self, *args, use_cache=False, **asked, **kwargs)
            logits = output.logits[0] if keeps else output.logits[0].index_select(0, target_index)
            nll = F.cross_entropy(logits.float(), targets, reduction="none" if per_token else "sum")
            result = -nll if per_token else nll
        return {"logps" if per_token else "loss": result, "router_logits": getattr(output, "router_logits", None)}

    return forward
