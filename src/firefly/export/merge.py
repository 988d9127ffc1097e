"""Merging an adapter into its base, and proof that the result is the model that was trained.

The merged model is written, reloaded from disk, and compared on fixed prompts with the unmerged adapter on the same
base weights. Only a merge that passes is called done.

A base in bf16 has about three decimal digits, and what a fine-tune adds to a weight is often less than half of the
last one: rounding to the nearest number would give the base weight back, and with it the base model. Sums are
therefore formed in fp32 and rounded up or down at random in proportion to the distance (stochastic rounding,
arXiv:1502.02551): right on average, so that small updates survive the many weights of a row. Measured on
SmolLM2-135M after six steps of LoRA: mean KL to the trained model 1.5e-4 instead of 1.3e-2.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firefly.config import ModelConfig
from firefly.console import notice
from firefly.data.certificate import FILE_NAME as CERTIFICATE
from firefly.data.certificate import read_certificate, recheck, stored_choices
from firefly.data.encoding import Encoder
from firefly.data.schema import Message
from firefly.data.templates import TemplateFailure, bind_template
from firefly.errors import UsageError, VerificationError
from firefly.inference.engine import base_of_adapter, recorded_config, tokenizer_source
from firefly.models.adapters import is_tied, load_adapter, trained_rows
from firefly.models.experts import dequantise_experts
from firefly.models.kernels.expert_linear import expert_factors
from firefly.models.kernels.lora_linear import dense
from firefly.models.loading import (
    eos_ids,
    load_model,
    load_tokenizer,
    mend_generation_config,
    pretrained,
)
from firefly.models.precision import Precision, pick_device
from firefly.runs.folders import RESULT, first_line, free_space, is_write_failure, make_empty, move_into, unfinished
from firefly.runs.passport import write_json

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ONTO = ("original", "dequantized")

# Limits of DESIGN.md, "Merging".
LARGEST_GAP_FP32 = 1e-4
LARGEST_KL = 1e-3
LEAST_AGREEMENT = 0.99
TIE = 0.05
"""Nats. A first choice that the trained model itself held within this of its own is a tie, not a disagreement."""

PROMPTS = (
    "Who are you, and who made you?",
    "What is the capital of France?",
    "Write a short poem about fireflies.",
    "Explain in two sentences why the sky is blue.",
    "用一句话介绍你自己。",
    "请把“知识就是力量”翻译成英文。",
    "def fibonacci(n):",
    "List three prime numbers greater than 10 and add them up: 11 + 13 + 17 =",
)


@dataclass(frozen=True)
class Comparison:
    """How two models differ on the fixed prompts: largest logit gap, mean KL in nats, share of equal first choices."""

    gap: float
    kl: float
    agreement: float

    def passes(self, dtype: torch.dtype) -> bool:
        if dtype == torch.float32:
            return self.gap <= LARGEST_GAP_FP32
        return self.kl <= LARGEST_KL and self.agreement >= LEAST_AGREEMENT


def merge(
    model: ModelConfig,
    adapter: str,
    save_path: str,
    onto: str = "original",
    dtype: str = "auto",
    force: bool = False,
) -> Path:
    """Merge `adapter` into its base and write a model that transformers loads; return its folder.

    Args:
        onto: "original" weights, or for QLoRA "dequantized": the 4-bit weights as they were trained on.
        dtype: type of the merged weights; "auto" is the base model's own.
        force: merge although the tokenizer and template are not those of the adapter's certificate.

    Raises:
        UsageError: adapter, base or options are at fault, the template is not the one that was trained, or the model
            could not be written. An earlier merge in the folder is there until a whole new one takes its place.
        VerificationError: the reloaded model is not the trained one; the folder is kept, with the figures inside.
    """
    for option, value, choices in (("onto", onto, ONTO), ("dtype", dtype, ("auto", *TYPES))):
        if value not in choices:
            raise UsageError("merge.bad_choice", option=option, value=value, choices=", ".join(choices))
    model = base_of_adapter(adapter, model)
    quantised = recorded_config(adapter).get("train_mode") == "qlora"
    if onto == "dequantized" and not quantised:
        raise UsageError("merge.not_quantised", path=adapter)
    target = folder_to_write(save_path, keep=(adapter, model.name_or_path))
    weights = base_type(model) if dtype == "auto" else TYPES[dtype]
    notice("merge.merging", adapter=adapter, base=model.name_or_path, dtype=str(weights).removeprefix("torch."))

    tokenizer = load_tokenizer(model, tokenizer_source(model, adapter))
    certificate = check_template(tokenizer, adapter, force)
    prompts = encode_prompts(tokenizer)
    if rows := trained_rows(adapter):  # the fixed prompts know nothing of added tokens
        prompts.append(sorted(rows))
    trained = load_adapter(load_base(model, weights, onto), adapter).eval()
    expected = all_logits(trained, prompts)
    partial = unfinished(target / RESULT)
    try:
        make_empty(partial)
        save_merged(trained, tokenizer, partial)
    except Exception as error:
        if is_write_failure(error):
            problem, free = first_line(error), free_space(target)
            raise UsageError("merge.write_failed", path=partial, problem=problem, free=free) from error
        raise
    if certificate:
        write_json(partial / CERTIFICATE, certificate)
    del trained
    gc.collect()

    notice("merge.verifying")
    written = ModelConfig(name_or_path=str(partial), trust_remote_code=model.trust_remote_code)
    merged = load_model(written, "lora", Precision(weights), pick_device()).eval()
    found = compare(expected, all_logits(merged, prompts), prompts)
    report = {"onto": onto, "dtype": str(weights), "adapter": adapter, "base": model.name_or_path, **vars(found)}
    if quantised and onto == "original":
        report["distance_to_4bit"] = vars(distance_to_4bit(model, adapter, weights, merged, prompts))
    passed = found.passes(weights)
    write_json(partial / "merge_report.json", report | {"passed": passed})
    for old in target.iterdir():  # an earlier merge; the folder itself may be a mounted one
        if old.is_dir() and old != partial:
            shutil.rmtree(old)
        elif old != partial:
            old.unlink()
    move_into(partial, target)
    if not passed:
        raise VerificationError("merge.failed", path=target, **vars(found))
    notice("merge.done", path=target, prompts=len(prompts), **vars(found))
    return target


def check_template(tokenizer: Any, adapter: str, force: bool) -> dict[str, Any] | None:
    """Recheck the adapter's template certificate, if it has one, and return it: it goes on with the merged model."""
    folder = Path(adapter).expanduser()
    certificate = read_certificate(folder)
    if certificate and tokenizer.chat_template:
        recheck(folder, Encoder(tokenizer, bind_template("auto", tokenizer, **stored_choices(folder))), force)
    return certificate


def folder_to_write(save_path: str, keep: tuple[str, ...] = ()) -> Path:
    """The folder to write into; one that holds an earlier merge will be replaced, anything else is left alone.

    Raises:
        UsageError: it holds something else, or is one of `keep` (the base may itself be an earlier merge) or above one.
    """
    path = Path(save_path).expanduser()
    kept = [Path(name).expanduser().resolve() for name in keep]
    if any(path.resolve() in (folder, *folder.parents) for folder in kept):
        raise UsageError("merge.save_path", path=path)
    if path.exists() and not path.is_dir():
        raise UsageError("merge.save_path", path=path)
    path.mkdir(parents=True, exist_ok=True)
    held = {entry.name for entry in path.iterdir()} - {unfinished(path / RESULT).name}  # of a merge that was killed
    if held and "merge_report.json" not in held:
        raise UsageError("merge.save_path", path=path)
    return path


def base_type(model: ModelConfig) -> torch.dtype:
    """The number type of the base model's weights, as its config.json says."""
    from transformers import AutoConfig

    config = pretrained(AutoConfig, model)
    dtype: Any = config.get_text_config().dtype or config.dtype
    return dtype if dtype in TYPES.values() else torch.float32


def load_base(model: ModelConfig, weights: torch.dtype, onto: str) -> Any:
    """The base in the type to merge in; "dequantized" turns 4-bit weights into the matrices they stand for."""
    device = pick_device()
    if onto == "original":
        return load_model(model, "lora", Precision(weights), device)
    return dequantised(load_model(model, "qlora", Precision(weights), device), weights)


def dequantised(model: Any, dtype: torch.dtype) -> Any:
    """Replace every 4-bit linear layer by a plain one with the weights that training saw."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ != "Linear4bit":
            continue
        plain = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        plain.weight = torch.nn.Parameter(dense(module.weight, dtype), requires_grad=False)
        plain.bias = module.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    dequantise_experts(model, dtype)
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = model.is_loaded_in_4bit = False
    return model


def save_merged(trained: Any, tokenizer: Any, target: Path) -> None:
    """Merge in place and write weights, tokenizer, chat template and stop tokens."""
    untie_where_adapted(trained)
    merge_layers(trained)
    merged = trained.unload()
    if not is_tied(merged):  # an adapter trained one of the two, or a copy of each
        merged.config.get_text_config().tie_word_embeddings = merged.config.tie_word_embeddings = False
    mend_generation_config(merged.generation_config)
    if tokenizer.chat_template:
        stops = bind_template("auto", tokenizer, eos_ids=eos_ids(merged.generation_config)).stop_ids
        merged.generation_config.eos_token_id = list(stops)
    merged.config.use_cache = True
    merged.save_pretrained(target)
    tokenizer.save_pretrained(target)


@torch.no_grad()
def merge_layers(model: Any, seed: int = 0) -> None:
    """Add every layer's adapter to its weight, in fp32, rounded once; the same seed gives the same weights.

    Trained rows of an embedding or head replace the base's.

    Raises:
        VerificationError: a sum is not finite.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            module.merge(safe_merge=True)
    generator = torch.Generator().manual_seed(seed)
    layers: list[tuple[str, Any]] = [item for item in model.named_modules() if isinstance(item[1], LoraLayer)]
    for name, layer in layers:
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
                raise VerificationError("merge.not_finite", layer=name)
            weight.copy_(round_unbiased(total, weight.dtype, generator))


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


def encode_prompts(tokenizer: Any) -> list[list[int]]:
    """The fixed prompts as ids, in the model's own chat format where it has one."""
    if not tokenizer.chat_template:
        return [tokenizer.encode(prompt) for prompt in PROMPTS]
    encoder = Encoder(tokenizer, bind_template("auto", tokenizer))
    try:
        return [encoder.encode_prompt([Message("user", prompt)]) for prompt in PROMPTS]
    except TemplateFailure:
        return [tokenizer.encode(prompt) for prompt in PROMPTS]


def all_logits(model: Any, prompts: list[list[int]]) -> list[Tensor]:
    """Logits of every position of each prompt, (tokens, vocabulary), on the CPU.

    Weights of 16 bits are multiplied in fp32: the rounding of activations would drown what is compared here.
    """
    with fp32_products(model), torch.inference_mode():
        return [
            model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float().cpu()
            for ids in prompts
        ]


@contextmanager
def fp32_products(model: Any) -> Iterator[None]:
    """Compute `model` in fp32 from the weights it holds, converting one layer's at a time."""
    kinds = {nn.Linear: lambda self, x: F.linear(x.float(), self.weight.float(), _float(self.bias)), nn.Embedding: None}
    if any(type(m).__name__ in ("Linear4bit", "Conv1D") for m in model.modules()) or has_bare_weights(model):
        yield  # layers that convert for themselves, or that this would not reach
        return
    patched = []
    for module in model.modules():
        if type(module) in kinds and "forward" not in vars(module):
            forward = kinds[type(module)]
            module.forward = MethodType(forward or _float_embedding, module)
            patched.append(module)
    try:
        yield
    finally:
        for module in patched:
            del module.forward


def has_bare_weights(model: Any) -> bool:
    """Whether the model multiplies with 3-D weights of its own (mixture-of-experts layers)."""
    return any(parameter.dim() == 3 for parameter in model.parameters())


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


def _float_embedding(self: nn.Embedding, ids: Tensor) -> Tensor:
    return type(self).forward(self, ids).float()


def compare(expected: list[Tensor], found: list[Tensor], prompts: list[list[int]]) -> Comparison:
    """Compare logits position by position; a beginning that prompts share counts once."""
    gaps, kl, agree, positions = list[Tensor](), 0.0, 0, 0
    for number, (one, other) in enumerate(zip(expected, found, strict=True)):
        start = max((_common_prefix(prompts[number], earlier) for earlier in prompts[:number]), default=0)
        one, other = one[start:], other[start:]
        gaps.append((one - other).abs().max())
        p, q = torch.log_softmax(one, -1), torch.log_softmax(other, -1)
        kl += (p.exp() * (p - q)).sum().item()
        chosen = p.gather(1, q.argmax(-1, keepdim=True))
        agree += int((p.max(-1, keepdim=True).values - chosen <= TIE).sum())
        positions += len(one)
    return Comparison(torch.stack(gaps).max().item(), kl / positions, agree / positions)  # NaN stays NaN


def _common_prefix(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def distance_to_4bit(
    model: ModelConfig, adapter: str, weights: torch.dtype, merged: Any, prompts: list[list[int]]
) -> Comparison:
    """Information, not a verdict: QLoRA trained on 4-bit weights, and the original ones are not the same."""
    trained = load_adapter(load_model(model, "qlora", Precision(weights), pick_device()), adapter).eval()
    found = compare(all_logits(trained, prompts), all_logits(merged, prompts), prompts)
    notice("merge.distance", kl=found.kl, agreement=found.agreement)
    return found
