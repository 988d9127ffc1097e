"""Merging an adapter into its base, and proof that the result is the model that was trained.

The merged model is written, reloaded from disk, and compared on fixed prompts with the unmerged adapter on the same
base weights. Only a merge that passes is called done.
"""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

import firefly
from firefly.config import ModelConfig
from firefly.console import notice
from firefly.data.certificate import FILE_NAME as CERTIFICATE
from firefly.data.certificate import read_certificate, recheck, trained_template_options
from firefly.data.encoding import Encoder
from firefly.data.templates import bind_template
from firefly.errors import UsageError, VerificationError
from firefly.export.layers import merge_layers, refuse_unmergeable, sample_updates, untie_where_adapted
from firefly.export.shards import continue_folder, write_shards
from firefly.export.verification import (
    Comparison,
    Expected,
    all_logits,
    encode_prompts,
    has_effect,
    largest_gap,
    rounding_gap,
    wrong_updates,
)
from firefly.files import first_line, free_space, is_write_failure, source_hash, unfinished
from firefly.generation.answering_type import MERGED, trained_type
from firefly.models.adapter_loading import load_adapter
from firefly.models.base_weights import identify_weights, weight_files
from firefly.models.experts import dequantize_experts
from firefly.models.kernels.lora_linear import dense
from firefly.models.loading import (
    eos_ids,
    fix_generation_config,
    load_model,
    load_tokenizer,
    pretrained,
    resolve_model,
)
from firefly.models.precision import Precision, pick_device
from firefly.models.saved_adapter import (
    SETTINGS,
    SavedAdapter,
    base_of_adapter,
    check_base,
    open_adapter,
    tokenizer_source,
    trained_in_4_bits,
)
from firefly.models.scores import ADAPTER_TASK, as_classifier, scores
from firefly.models.streaming import is_streamed, load_streamed, stream_weights
from firefly.models.tokens import is_tied
from firefly.models.unread import UNREAD
from firefly.runs.folders import RESULT, move_into
from firefly.runs.manifest import write_json
from firefly.runs.records import read_object

REPORT, FAILED_REPORT = MERGED, "merge_report.failed.json"
TOKENS_COMPARED = 256
"""At most so many of the tokens that an adapter brought are compared."""

SHARD_SIZE = 2 * 10**9
"""Bytes of a file of merged weights at most; fewer where the base's files are smaller."""

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ONTO = ("original", "dequantized")


def merge(
    model: ModelConfig,
    adapter: str | os.PathLike[str],
    save_path: str | os.PathLike[str],
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
            could not be written.
        VerificationError: the adapter changes nothing, or the reloaded model is not the trained one. Of what was
            written the figures stay (merge_report.failed.json). An earlier merge stays until a good one replaces it.
    """
    adapter, save_path = os.fspath(adapter), os.fspath(save_path)
    refuse_options(adapter, onto, dtype)
    saved = open_adapter(adapter)
    model = base_of_adapter(adapter, model)
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
    base = load_base(model, weights, onto, saved)
    place = resolve_model(model)
    identity = identify_weights(place, model.revision)
    check_base(adapter, model, force, identity)
    trained, expected = attach_and_record(base, saved, tokenizer, weights)

    partial = unfinished(target / RESULT)
    files = weight_files(place, model.revision)
    limit = min(SHARD_SIZE, max(file.stat().st_size for file in files)) if len(files) > 1 else SHARD_SIZE
    inputs = {
        "base": {name: value for name, value in identity.items() if name != "groups"},
        "base_files": [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files],
        "adapter": [hash_of(file) for file in (saved.weights, saved.folder / SETTINGS)],
        "options": {"onto": onto, "dtype": str(weights), "limit": limit},
        "code": source_hash(Path(firefly.__file__).parent, *(one.__version__ for one in (torch, peft, transformers))),
    }
    write_merged(trained, tokenizer, certificate, partial, inputs, limit)
    del base, trained
    gc.collect()

    notice("merge.verifying", "reloading from disk and comparing with the unmerged model …")
    merged = load_base(replace(model, name_or_path=str(partial), revision=None), weights, "original", saved).eval()
    found, wrong = expected.compare(merged), wrong_updates(merged, expected.updates)
    report = {"onto": onto, "dtype": str(weights), "adapter": adapter, "base": model.name_or_path, **found.report()}
    if in_type := trained_type(saved.folder):  # served so: see `generation.answering_type`
        report["trained_in"] = str(in_type).removeprefix("torch.")
    if wrong or not found.passes(weights):
        write_json(target / FAILED_REPORT, report | {"passed": False, "wrong_updates": wrong})
        shutil.rmtree(partial)
        raise failure(target, found, wrong)
    if trained_in_4_bits(adapter) and onto == "original":
        report["distance_to_4bit"] = distance_to_4bit(model, saved, weights, merged, expected).report()
    files = sorted(path.name for path in partial.iterdir())
    write_json(partial / REPORT, report | {"passed": True, "files": [*files, REPORT]})
    replace_earlier(target, partial)
    notice(
        "merge.done",
        "merged model in {path}; verified on {prompts} prompts ({positions} positions): {figures}",
        path=target,
        prompts=len(expected.prompts),
        positions=found.positions,
        figures=found.figures,
    )
    return target


def hash_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def refuse_options(adapter: str, onto: str, dtype: str) -> None:
    """Raise UsageError for an option that is unknown, or not for this adapter."""
    for option, value, choices in (("onto", onto, ONTO), ("dtype", dtype, ("auto", *TYPES))):
        if value not in choices:
            raise UsageError(
                "merge.bad_choice",
                "--{option} = {value!r}; choose one of: {choices}.",
                option=option,
                value=value,
                choices=", ".join(choices),
            )
    if onto == "dequantized" and not trained_in_4_bits(adapter):
        raise UsageError(
            "merge.not_quantised",
            "--onto dequantized is for adapters of a QLoRA run; {path} was not trained on 4-bit weights.",
            path=adapter,
        )


def attach_and_record(base: Any, saved: SavedAdapter, tokenizer: Any, weights: torch.dtype) -> tuple[Any, Expected]:
    """Put the adapter on its base, and record what the merged model has to reproduce.

    Raises:
        UsageError: what the adapter trained has no place in the merged model.
        VerificationError: the adapter changes nothing.
    """
    prompts, rows = encode_prompts(tokenizer), base.get_input_embeddings().weight.shape[0]
    known = [ids for ids in prompts if max(ids) < rows]
    untrained = all_logits(base, known)
    trained = load_adapter(base, saved).eval()
    refuse_unmergeable(trained, str(saved.given))
    # The fixed prompts know nothing of tokens that the adapter brought.
    brought = saved.token_rows | set(range(rows, trained.get_input_embeddings().weight.shape[0]))
    if brought:
        prompts.append(sorted(brought)[:TOKENS_COMPARED])
    logits = all_logits(trained, prompts)
    rounding = rounding_gap(trained, prompts, known=logits)
    tuned = [of_prompt for ids, of_prompt in zip(prompts, logits, strict=True) if ids in known]
    if not brought and not has_effect(untrained, tuned, rounding):
        raise VerificationError(
            "merge.no_effect",
            "the adapter {adapter} changes nothing: the logits are those of the base model (largest gap {gap:.2e}, no "
            "more than rounding). Nothing was written. Was it trained, and is this its base?",
            adapter=saved.given,
            gap=largest_gap(untrained, tuned),
        )
    del untrained, tuned
    if weights != torch.float32:  # what a choice between two tokens may turn on where the model is served
        rounding = rounding_gap(trained, prompts, as_served=True)
    return trained, Expected(prompts, logits, rounding, sample_updates(trained))


def failure(target: Path, found: Comparison, wrong: dict[str, float]) -> VerificationError:
    """What to say of a merged model that is not the trained one."""
    if not wrong:
        return VerificationError(
            "merge.failed",
            "the merged model differs from the trained one: {figures}, in {positions} positions. It was removed; the "
            "figures are in {report}, and what was in {path} before is as it was.",
            path=target,
            report=target / FAILED_REPORT,
            positions=found.positions,
            figures=found.figures,
        )
    name, share = next(iter(wrong.items()))
    return VerificationError(
        "merge.wrong_update",
        "{count} merged weights are not what the adapter makes of them: {name} got {share:.2%} of its update. "
        "The merged model was removed; the figures are in {report}.",
        count=len(wrong),
        name=name,
        share=share,
        report=target / FAILED_REPORT,
    )


def check_template(tokenizer: Any, folder: Path, force: bool) -> dict[str, Any] | None:
    """Recheck the adapter's template certificate, if it has one, and return it: it goes on with the merged model."""
    certificate = read_certificate(folder)
    if certificate and tokenizer.chat_template:
        recheck(folder, Encoder(tokenizer, bind_template("auto", tokenizer, **trained_template_options(folder))), force)
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


def load_base(model: ModelConfig, weights: torch.dtype, onto: str, adapter: SavedAdapter) -> Any:
    """The base in the type to merge in, its weights left in their files, with the kind of head that the adapter was
    trained with; "dequantized" turns 4-bit weights into the matrices they stand for."""
    if onto == "original":
        base = load_streamed(model, weights)
    else:
        tell_of_4_bits(model)
        base = dequantized(load_model(model, "qlora", Precision(weights), pick_device()), weights)
    if adapter.settings.task_type != ADAPTER_TASK:
        return base
    streamed, base = is_streamed(base), as_classifier(base, weights)
    return stream_weights(base) if streamed else base


def tell_of_4_bits(model: ModelConfig) -> None:
    notice(
        "merge.in_4_bits",
        "{name} is loaded whole in 4 bits: it needs memory for all of it, not for one file.",
        name=model.name_or_path,
    )


def dequantized(model: Any, dtype: torch.dtype) -> Any:
    """Replace every 4-bit linear layer by a plain one with the weights that training saw."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ != "Linear4bit":
            continue
        plain = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        plain.weight = torch.nn.Parameter(dense(module.weight, dtype), requires_grad=False)
        plain.bias = module.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    dequantize_experts(model, dtype)
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = model.is_loaded_in_4bit = False
    return model


def write_merged(
    trained: Any,
    tokenizer: Any,
    certificate: dict[str, Any] | None,
    partial: Path,
    inputs: Mapping[str, Any],
    limit: int,
) -> None:
    """Merge, and write the model with the certificate of its template into a folder, where what an interrupted merge of
    the same `inputs` wrote there is kept.

    Args:
        limit: bytes of a file of weights.

    Raises:
        UsageError: the disk did not take it.
    """
    try:
        continue_folder(partial, inputs)
        save_merged(trained, tokenizer, partial, limit)
    except Exception as error:
        if not is_write_failure(error):
            raise
        raise UsageError(
            "merge.write_failed",
            "{path} could not be written: {problem}; {free} are free. Free some space, or choose another folder.",
            path=partial,
            problem=first_line(error),
            free=free_space(partial.parent),
        ) from error
    if certificate:
        write_json(partial / CERTIFICATE, certificate)


def save_merged(trained: Any, tokenizer: Any, target: Path, limit: int) -> None:
    """Merge in place and write weights, tokenizer, chat template and stop tokens.

    Weights that lie in the base's files are merged one after another as they are written.
    """
    untie_where_adapted(trained)
    merge_layers(trained)
    merged = trained.unload()
    if not is_tied(merged):  # an adapter trained one of the two, or a copy of each
        merged.config.get_text_config().tie_word_embeddings = merged.config.tie_word_embeddings = False
    if scores(merged):
        merged.config.pad_token_id = tokenizer.pad_token_id  # one that no text ends in
    else:
        fix_generation_config(merged.generation_config)
    if tokenizer.chat_template and not scores(merged):
        stops = bind_template("auto", tokenizer, eos_ids=eos_ids(merged.generation_config)).stop_ids
        merged.generation_config.eos_token_id = list(stops)
    merged.config.use_cache = True
    write_shards(weights_to_save(merged), target, limit)
    save_settings(merged, target)
    tokenizer.save_pretrained(target)


def weights_to_save(model: Any) -> dict[str, Tensor]:
    """A model's weights as `save_pretrained` (transformers 5.23) names and lays them out, those in files unread."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    own = model.state_dict(keep_vars=True)
    ignored = model._keys_to_ignore_on_save or ()
    named = {name: tensor for name, tensor in own.items() if name not in ignored}
    named = remove_tied_weights_from_state_dict(named, model)
    return revert_weight_conversion(
        model, {name: getattr(tensor, UNREAD, tensor.detach()) for name, tensor in named.items()}
    )


def save_settings(model: Any, target: Path) -> None:
    """What `save_pretrained` writes of a model besides its weights."""
    from transformers.dynamic_module_utils import custom_object_save

    model.config.dtype, model.config.architectures = model.dtype, [type(model).__name__]
    if model.is_remote_code():
        custom_object_save(model, target, config=model.config)
    model.config.save_pretrained(target)
    if model.can_generate():
        model.generation_config.save_pretrained(target)


def replace_earlier(target: Path, partial: Path) -> None:
    """Move a verified merge into its folder. Files that an earlier one wrote there go, and nothing else."""
    for name in [*read_object(target / REPORT).get("files", []), FAILED_REPORT]:
        if (earlier := target / Path(name).name).is_file():
            earlier.unlink()
    move_into(partial, target)


def distance_to_4bit(
    model: ModelConfig, saved: SavedAdapter, weights: torch.dtype, merged: Any, expected: Expected
) -> Comparison:
    """Information, not a verdict: QLoRA trained on 4-bit weights, and the original ones are not the same."""
    tell_of_4_bits(model)
    base = load_model(model, "qlora", Precision(weights), pick_device())
    base = as_classifier(base, weights) if saved.settings.task_type == ADAPTER_TASK else base
    trained = load_adapter(base, saved).eval()
    found = replace(expected, logits=all_logits(trained, expected.prompts)).compare(merged)
    notice(
        "merge.distance",
        "for information: the merged model against the 4-bit model that was trained: {figures} (--onto dequantized "
        "merges onto the weights as they were trained).",
        figures=found.figures,
    )
    return found
