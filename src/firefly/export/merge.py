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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from firefly.config import ModelConfig
from firefly.console import notice
from firefly.data.certificate import FILE_NAME as CERTIFICATE
from firefly.data.certificate import read_certificate, recheck, stored_choices
from firefly.data.encoding import Encoder
from firefly.data.templates import bind_template
from firefly.errors import UsageError, VerificationError
from firefly.export.verification import (
    Comparison,
    SampledUpdate,
    all_logits,
    compare,
    encode_prompts,
    has_effect,
    largest_gap,
    rounding_gap,
    sample_update,
    wrong_updates,
)
from firefly.files import first_line, free_space, is_write_failure, make_empty, unfinished
from firefly.models.adapter_loading import load_adapter
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
from firefly.models.saved_adapter import (
    OUR_PREFIX,
    SavedAdapter,
    base_of_adapter,
    check_base,
    open_adapter,
    tokenizer_source,
    trained_in_4_bits,
)
from firefly.models.tokens import is_tied
from firefly.runs.folders import RESULT, move_into
from firefly.runs.passport import write_json
from firefly.runs.records import read_object

REPORT, FAILED_REPORT = "merge_report.json", "merge_report.failed.json"
OF_A_MERGE = (
    *("model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"),
    *("tokenizer*", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json", CERTIFICATE, REPORT),
)
"""Files of a merge whose report does not list them."""
TOKENS_COMPARED = 256
"""At most so many of the tokens that an adapter brought are compared."""

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ONTO = ("original", "dequantized")


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
        force: merge although the tokenizer and template are not those of the adapter's certificate, or the base is not
            the one that it was trained on.

    Raises:
        UsageError: adapter, base or options are at fault, the template is not the one that was trained, or the model
            could not be written. An earlier merge in the folder is there until a whole new one takes its place.
        VerificationError: the adapter changes nothing, or the reloaded model is not the trained one. What was written
            is removed but for the figures (merge_report.failed.json); an earlier merge stays.
    """
    for option, value, choices in (("onto", onto, ONTO), ("dtype", dtype, ("auto", *TYPES))):
        if value not in choices:
            raise UsageError(
                "merge.bad_choice",
                "--{option} = {value!r}; choose one of: {choices}.",
                option=option,
                value=value,
                choices=", ".join(choices),
            )
    saved = open_adapter(adapter)
    model = base_of_adapter(adapter, model)
    quantised = trained_in_4_bits(adapter)
    if onto == "dequantized" and not quantised:
        raise UsageError(
            "merge.not_quantised",
            "--onto dequantized is for adapters of a QLoRA run; {path} was not trained on 4-bit weights.",
            path=adapter,
        )
    target = folder_to_write(save_path, keep=(adapter, model.name_or_path))
    weights = base_type(model) if dtype == "auto" else TYPES[dtype]
    notice(
        "merge.merging",
        "merging {adapter} into {base} ({dtype})",
        adapter=adapter,
        base=model.name_or_path,
        dtype=str(weights).removeprefix("torch."),
    )

    tokenizer = load_tokenizer(model, tokenizer_source(model, adapter))
    certificate = check_template(tokenizer, saved.folder, force)
    base = load_base(model, weights, onto)
    check_base(adapter, model, force)
    prompts, rows = encode_prompts(tokenizer), base.get_input_embeddings().weight.shape[0]
    known = [ids for ids in prompts if max(ids) < rows]
    untrained = all_logits(base, known)
    trained = load_adapter(base, saved).eval()
    refuse_unmergeable(trained, adapter)
    # The fixed prompts know nothing of tokens that the adapter brought.
    brought = saved.token_rows | set(range(rows, trained.get_input_embeddings().weight.shape[0]))
    if brought:
        prompts.append(sorted(brought)[:TOKENS_COMPARED])
    expected = all_logits(trained, prompts)
    rounding = rounding_gap(trained, prompts)
    tuned = [logits for ids, logits in zip(prompts, expected, strict=True) if ids in known]
    if not brought and not has_effect(untrained, tuned, rounding):
        raise VerificationError(
            "merge.no_effect",
            "the adapter {adapter} changes nothing: the logits are those of the base model (largest gap {gap:.2e}, no "
            "more than rounding). Nothing was written. Was it trained, and is this its base?",
            adapter=adapter,
            gap=largest_gap(untrained, tuned),
        )
    if weights != torch.float32:  # what a choice between two tokens may turn on where the model is served
        rounding = rounding_gap(trained, prompts, as_served=True)
    updates = sample_updates(trained)

    partial = unfinished(target / RESULT)
    try:
        make_empty(partial)
        save_merged(trained, tokenizer, partial)
    except Exception as error:
        if is_write_failure(error):
            problem, free = first_line(error), free_space(target)
            raise UsageError(
                "merge.write_failed",
                "{path} could not be written: {problem}; {free} are free. Free some space, or choose another folder.",
                path=partial,
                problem=problem,
                free=free,
            ) from error
        raise
    if certificate:
        write_json(partial / CERTIFICATE, certificate)
    del trained
    gc.collect()

    notice("merge.verifying", "reloading from disk and comparing with the unmerged model …")
    written = ModelConfig(name_or_path=str(partial), trust_remote_code=model.trust_remote_code)
    merged = load_model(written, "lora", Precision(weights), pick_device()).eval()
    found, wrong = compare(expected, all_logits(merged, prompts), prompts, rounding), wrong_updates(merged, updates)
    report = {"onto": onto, "dtype": str(weights), "adapter": adapter, "base": model.name_or_path, **vars(found)}
    if wrong or not found.passes(weights):
        failed = target / FAILED_REPORT
        write_json(failed, report | {"passed": False, "wrong_updates": wrong})
        shutil.rmtree(partial)
        if wrong:
            name, share = next(iter(wrong.items()))
            raise VerificationError(
                "merge.wrong_update",
                "{count} merged weights are not what the adapter makes of them: {name} got {share:.2%} of its update. "
                "The merged model was removed; the figures are in {report}.",
                count=len(wrong),
                name=name,
                share=share,
                report=failed,
            )
        raise VerificationError(
            "merge.failed",
            "the merged model differs from the trained one: largest logit gap {gap:.2e} (rounding alone: "
            "{rounding:.2e}), mean KL {kl:.2e}, top-1 agreement {agreement:.2%} of {positions} positions, ties left "
            "out: {ties}. It was removed; the figures are in {report}, and what was in {path} before is as it was.",
            path=target,
            report=failed,
            **vars(found),
        )
    if quantised and onto == "original":
        report["distance_to_4bit"] = vars(distance_to_4bit(model, saved, weights, merged, prompts, rounding))
    files = sorted(path.name for path in partial.iterdir())
    write_json(partial / REPORT, report | {"passed": True, "files": [*files, REPORT]})
    remove_earlier(target)
    move_into(partial, target)
    notice(
        "merge.done",
        "merged model in {path}; verified on {prompts} prompts ({positions} positions): largest logit gap {gap:.2e} "
        "(rounding alone: {rounding:.2e}), mean KL {kl:.2e}, top-1 agreement {agreement:.2%}, ties left out: {ties}",
        path=target,
        prompts=len(prompts),
        **vars(found),
    )
    return target


def remove_earlier(target: Path) -> None:
    """Remove what an earlier merge wrote into the folder, and leave what others put beside it."""
    report = read_object(target / REPORT)
    for name in [*report.get("files", OF_A_MERGE), FAILED_REPORT]:
        for path in target.glob(str(name)):
            if path.is_file():
                path.unlink()


def check_template(tokenizer: Any, folder: Path, force: bool) -> dict[str, Any] | None:
    """Recheck the adapter's template certificate, if it has one, and return it: it goes on with the merged model."""
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
    taken = any(path.resolve() in (folder, *folder.parents) for folder in kept) or (path.exists() and not path.is_dir())
    if not taken:
        path.mkdir(parents=True, exist_ok=True)
        # What merges left that were killed, or failed.
        held = {entry.name for entry in path.iterdir()} - {unfinished(path / RESULT).name, FAILED_REPORT}
        taken = bool(held) and REPORT not in held
    if taken:
        raise UsageError(
            "merge.save_path",
            "save_path = {path} is not empty, or holds the base or the adapter. Choose another folder.",
            path=path,
        )
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
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    updates = []
    layers: list[tuple[str, Any]] = [item for item in model.named_modules() if isinstance(item[1], LoraLayer)]
    for name, layer in layers:
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
    from peft.tuners.lora import LoraLayer

    layers: list[tuple[str, Any]] = [item for item in model.named_modules() if isinstance(item[1], LoraLayer)]
    for name, layer in layers:
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


def distance_to_4bit(
    model: ModelConfig,
    saved: SavedAdapter,
    weights: torch.dtype,
    merged: Any,
    prompts: list[list[int]],
    rounding: float,
) -> Comparison:
    """Information, not a verdict: QLoRA trained on 4-bit weights, and the original ones are not the same."""
    trained = load_adapter(load_model(model, "qlora", Precision(weights), pick_device()), saved).eval()
    found = compare(all_logits(trained, prompts), all_logits(merged, prompts), prompts, rounding)
    notice(
        "merge.distance",
        "for information: the merged model against the 4-bit model that was trained: mean KL {kl:.2e}, top-1 "
        "agreement {agreement:.2%} (--onto dequantized merges onto the weights as they were trained).",
        kl=found.kl,
        agreement=found.agreement,
    )
    return found
