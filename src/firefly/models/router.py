"""The load-balancing loss of a mixture of experts, over a whole optimizer step (Switch, arXiv:2101.03961, eq. 4–6).

With f_e the choices of expert e per token (no gradient) and P_e its mean probability, over all tokens of the step and
all layers together, loss = coef · E · Σ_e f_e P_e. It is a product of two means over the step, so the loss of a
microbatch needs the choices of all of them: they are counted first (where there is one microbatch, from the same
logits). Summed over microbatches it is what transformers' `load_balancing_loss_func` gives for the step as one batch
without padding, times its coefficient.

Every architecture that has this loss records logits, (tokens, experts), not probabilities: the decoder, called with
`output_router_logits=True`, gives them as `router_logits`, one tensor per sparse layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

JITTER = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps")
"""Random factors on a router's input in training. Not PhiMoE's `router_jitter_noise`, which is a threshold."""

SAMPLING_ROUTERS = ("PhimoeTopKRouter",)
"""Routers that draw experts at random in training (SparseMixer, arXiv:2409.12136)."""


@dataclass(frozen=True)
class RouterSettings:
    """What the loss of this model depends on."""

    num_experts: int
    top_k: int
    coef: float


def router_settings(model: PreTrainedModel) -> RouterSettings | None:
    """Settings of the model's load-balancing loss, None if it has none, weighs it with 0 or has no experts.

    Read from the model, not its configuration: Llama4's has a coefficient that no code uses, and so have those of the
    dense members of families with experts (Granite 4.0 with `num_local_experts` 0, Qwen3-MoE whose every layer is in
    `mlp_only_layers`, Doge without `is_moe`).
    """
    model_: Any = model
    coef = getattr(model_, "router_aux_loss_coef", None) or getattr(model_, "aux_loss_coef", None)
    experts, top_k = getattr(model_, "num_experts", None), getattr(model_, "num_experts_per_tok", None)
    if not coef or not isinstance(experts, int) or not isinstance(top_k, int):
        return None
    routers = recording_routers(model)
    if routers is not None and not routers:
        return None
    # Doge counts choices per choice, the others per token.
    per_choice = any(hasattr(router, "num_keys") for router in routers or ())
    return RouterSettings(experts, top_k, float(coef) / (top_k if per_choice else 1))


def recording_routers(model: nn.Module) -> list[nn.Module] | None:
    """The modules whose logits transformers records as `router_logits`; None for a model that does not declare them.

    A dense layer has none, and the forward pass of a model with none records an empty tuple.
    """
    declared = False
    found: dict[int, nn.Module] = {}
    for part in model.modules():
        recorders = getattr(part, "_can_record_outputs", None) if isinstance(part, PreTrainedModel) else None
        if not recorders or "router_logits" not in recorders:
            continue
        declared = True
        each = recorders["router_logits"]
        for recorder in each if isinstance(each, list | tuple) else [each]:
            kind = getattr(recorder, "target_class", recorder)
            if not isinstance(kind, type):
                return None  # named by the end of its path
            found |= {id(module): module for module in part.modules() if isinstance(module, kind)}
    return list(found.values()) if declared else None


def recorded_logits(output: Any, settings: RouterSettings) -> tuple[Tensor, ...]:
    """Router logits (tokens, experts) of each sparse layer, from what the decoder returned; dense layers have none.

    Raises:
        RuntimeError: the decoder recorded none; it was not called with `output_router_logits=True`.
    """
    recorded = output.get("router_logits") if hasattr(output, "get") else None
    if not recorded:
        raise RuntimeError("the decoder recorded no router logits")
    return tuple(_by_expert(logits, settings.num_experts) for logits in recorded)


def _by_expert(logits: Tensor, experts: int) -> Tensor:
    """(tokens, experts); with product keys (Doge) an expert's logit is the sum of those of its two keys."""
    if logits.dim() == 3 and len(logits) == 2 and logits.shape[-1] ** 2 == experts:
        first, second = logits
        return (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(-2)
    return logits.reshape(-1, experts)


@torch.no_grad()
def count_choices(router_logits: tuple[Tensor, ...], settings: RouterSettings, weights: Tensor | None = None) -> Tensor:
    """How often each expert was chosen, (experts,), all layers together; sums over microbatches and ranks add up.

    Args:
        weights: (tokens,), how many times a token counts; None counts each once.
    """
    counts = torch.zeros(settings.num_experts, dtype=torch.float32, device=router_logits[0].device)
    for logits in router_logits:
        chosen = logits.float().softmax(dim=-1).topk(settings.top_k, dim=-1).indices
        share = torch.ones(len(logits), device=logits.device) if weights is None else weights.float()
        counts.index_add_(0, chosen.reshape(-1).to(counts.device), share.repeat_interleave(settings.top_k))
    return counts


def router_loss(
    router_logits: tuple[Tensor, ...],
    settings: RouterSettings,
    weights: Tensor | None,
    choices_of_step: Tensor,
    tokens_of_step: float | Tensor,
) -> Tensor:
    """A microbatch's part of the step's loss, a scalar with its gradient; the parts sum to the whole.

    Args:
        weights: as for `count_choices`.
        choices_of_step: `count_choices`, summed over all microbatches of the step (and all ranks).
        tokens_of_step: tokens of the step, each times its weight; layers are not counted in.
    """
    rows = tokens_of_step * len(router_logits)
    frequency = choices_of_step.detach() / rows
    probability = torch.zeros_like(frequency)
    for logits in router_logits:
        each = logits.float().softmax(dim=-1).to(frequency.device)
        probability = probability + (each.sum(dim=0) if weights is None else weights.float() @ each)
    return settings.coef * settings.num_experts * (frequency @ (probability / rows))


def disable_router_noise(model: nn.Module) -> list[str]:
    """Disable router noise; return the affected module names (none in most models).

    Random routing depends on how a step is split into microbatches, and the pass that counts choices would see other
    states than the training pass. PhiMoE's sampling is disabled too: its routers then choose as in evaluation.
    """
    changed = []
    for name, module in model.named_modules():
        noisy = [field for field in JITTER if getattr(module, field, None)]
        for field in noisy:
            setattr(module, field, 0.0)
        sampling = type(module).__name__ in SAMPLING_ROUTERS
        if sampling:
            module.eval()
            module.train = MethodType(lambda self, mode=True: self, module)  # type: ignore[method-assign]
        if noisy or sampling:
            changed.append(name)
    return changed
