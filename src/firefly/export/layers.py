"""What a merge makes of the weights of a layer.

A base in bf16 has about three decimal digits, and what a fine-tune adds to a weight is often less than half of the
last one: rounding to the nearest number would give the base weight back, and with it the base model. Sums are
therefore formed in fp32 and rounded up or down at random in proportion to the distance (stochastic rounding,
arXiv:1502.02551): right on average, so that small updates survive the many weights of a row. Measured on
SmolLM2-135M after six steps of LoRA: mean KL to the trained model 1.5e-4 instead of 1.3e-2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from firefly.errors import UsageError, VerificationError
from firefly.export.verification import SampledUpdate, sample_update
from firefly.models.kernels.expert_linear import expert_factors
from firefly.models.saved_adapter import OUR_PREFIX
from firefly.models.tokens import is_tied


def lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Every layer with an adapter on it, by its path."""
    from peft.tuners.lora import LoraLayer

    return [item for item in model.named_modules() if isinstance(item[1], LoraLayer)]


@torch.no_grad()
def merge_layers(model: Any, seed: int = 0) -> None:
    """Add every layer's adapter to its weight, in fp32, rounded once; the same seed gives the same weights.

    Trained rows of an embedding or head replace the base's.

    Raises:
        VerificationError: a sum is not finite.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            module.merge(safe_merge=True)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in lora_layers(model):
        name_of = layer.active_adapters[0] if len(layer.active_adapters) == 1 else ""
        variant = type(getattr(layer, "lora_variant", {}).get(name_of)).__name__
        if not name_of or variant not in ("NoneType", "DoraLinearVariant"):
            layer.merge(safe_merge=True)  # peft knows its other variants
            continue
        for weight, delta in weights_and_deltas(layer):
            total = weight.float() + delta
            if variant == "DoraLinearVariant":
                magnitude = layer.lora_magnitude_vector[name_of].weight.float()
                total = with_magnitude(total, magnitude, layer.fan_in_fan_out)
            if not torch.isfinite(total).all():
                raise VerificationError(
                    "merge.not_finite",
                    "merging {layer} gives numbers that are not finite. Check the adapter, or try --dtype float32.",
                    layer=name,
                )
            weight.copy_(round_unbiased(total, weight.dtype, generator))
        if (own := bias_of_adapter(layer, name_of)) is not None:
            bias = layer.get_base_layer().bias
            bias.copy_(round_unbiased(bias.float() + layer.scaling[name_of] * own.float(), bias.dtype, generator))


@torch.no_grad()
def sample_updates(model: Any) -> list[SampledUpdate]:
    """What peft says that each adapted weight becomes, for a look at the merged ones. Left out: stacks of experts, and
    variants that peft merges itself, which the logits alone judge."""
    from peft.tuners.lora.layer import ParamWrapper

    updates = []
    for name, layer in lora_layers(model):
        (adapter,) = layer.active_adapters
        variant = type(layer.lora_variant.get(adapter)).__name__
        if isinstance(layer, ParamWrapper) or variant not in ("NoneType", "DoraLinearVariant"):
            continue
        weight = layer.get_base_layer().weight
        target = weight.float() + layer.get_delta_weight(adapter).float()
        if variant == "DoraLinearVariant":
            target = with_magnitude(target, layer.lora_magnitude_vector[adapter].weight.float(), layer.fan_in_fan_out)
        updates.append(sample_update(f"{name.removeprefix(OUR_PREFIX)}.weight", weight, target))
    return updates


def bias_of_adapter(layer: Any, name: str) -> Tensor | None:
    """What `lora_bias` trained beside B; None where it was not asked for."""
    return getattr(layer.lora_B[name], "bias", None) if name in layer.lora_B else None


def refuse_unmergeable(model: Any, adapter: str) -> None:
    """Refuse what has no place in the merged model's layers.

    Raises:
        UsageError: an adapter with a bias lies on a layer without one.
    """
    for name, layer in lora_layers(model):
        biased = any(bias_of_adapter(layer, one) is not None for one in layer.active_adapters)
        if biased and getattr(layer.get_base_layer(), "bias", None) is None:
            raise UsageError(
                "merge.lora_bias",
                "the adapter {path} has a bias (lora_bias) on {layer}, and that layer of the model has none to merge "
                "it into. It can be used unmerged (firefly chat --adapter_name_or_path).",
                path=adapter,
                layer=name.removeprefix(OUR_PREFIX),
            )


def weights_and_deltas(layer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """A layer's weight and what its adapter adds to it, in fp32; for stacked experts one after the other."""
    from peft.tuners.lora.layer import ParamWrapper

    if isinstance(layer, ParamWrapper):
        stack = layer.get_param().data
        a, b, scale = expert_factors(layer)
        for weight, low, high in zip(stack if stack.dim() == 3 else stack[None], a, b, strict=True):
            delta = scale * (high.float() @ low.float())
            # A stack (in, out) whose module says so; peft takes every other one for (out, in).
            yield weight, delta.T if getattr(layer.get_base_layer(), "is_transposed", False) else delta
        return
    yield layer.get_base_layer().weight.data, layer.get_delta_weight(layer.active_adapters[0]).float()


def with_magnitude(direction: Tensor, magnitude: Tensor, transposed: bool) -> Tensor:
    """DoRA, equation 5 of arXiv:2402.09353: every output's weights scaled to its trained length.

    Args:
        direction: base weight plus update, (out, in), or (in, out) if `transposed`.
        magnitude: (out,).
    """
    dim = 0 if transposed else 1
    return direction * (magnitude / direction.norm(dim=dim)).unsqueeze(dim)


def untie_where_adapted(model: Any) -> None:
    """Give the head a weight of its own where an adapter lies on it or on a tied embedding: the sums differ."""
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    if not is_tied(base):
        return
    if any(isinstance(end, LoraLayer) for end in (base.get_input_embeddings(), base.get_output_embeddings())):
        head: Any = base.get_output_embeddings()
        plain: Any = head.get_base_layer() if isinstance(head, LoraLayer) else head
        plain.weight = nn.Parameter(plain.weight.detach().clone(), requires_grad=False)


def round_unbiased(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round fp32 numbers to one of their two neighbours in `dtype`; the probabilities make the mean exact."""
    nearest = x.to(dtype)
    error = x - nearest.float()
    if dtype == torch.float32:
        return nearest
    infinity = torch.full_like(nearest, torch.inf)
    other = torch.nextafter(nearest, torch.where(error > 0, infinity, -infinity))
    probability = error / (other.float() - nearest.float())
    draws = torch.rand(x.shape, generator=generator).to(x.device)
    return torch.where(draws < probability, other, nearest)
