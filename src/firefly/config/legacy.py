"""Spellings that older versions of Firefly or transformers used, mapped to today's with a one-line notice each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

RENAMED: dict[str, str] = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "include_tokens_per_second": "include_num_input_tokens_seen",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "torchdynamo": "torch_compile_backend",
    "xpu_backend": "ddp_backend",
    "warmup_ratio": "warmup_steps",  # transformers 5: a value below 1 is a share of all steps
}

IGNORED: tuple[str, ...] = (
    *("use_unsloth", "group_by_length", "save_safetensors", "use_mps_device", "use_ipex", "jit_mode_eval"),
    *("past_index", "ray_scope", "mp_parameters", "sharded_ddp", "tpu_num_cores", "fp16_backend", "fp16_opt_level"),
    *("half_precision_backend", "include_inputs_for_metrics", "dispatch_batches", "split_batches"),
    *("fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap", "push_to_hub_organization", "tpu_metrics_debug"),
    *("use_legacy_prediction_loop", "overwrite_output_dir", "logging_dir"),
)

# Launchers add it (`--local_rank=0`); torchrun's environment says the same, so it is accepted and dropped.
LAUNCHER_KEYS: tuple[str, ...] = ("local_rank",)

OPTIMIZERS: dict[str, str] = {
    "adamw_hf": "adamw_torch",
    "adamw_apex_fused": "adamw_torch_fused",
    "paged_adamw": "paged_adamw_32bit",
}


def current_name(name: str) -> str:
    """The key that `name` sets in today's spelling."""
    return {"activation_checkpointing": "gradient_checkpointing", "adafactor": "optim"}.get(
        name, RENAMED.get(name, name)
    )


def translate(given: Mapping[str, Any], known: Collection[str], notice: Callable[..., None]) -> dict[str, Any]:
    """Return `given` in today's spelling. `notice(code, **values)` is called once for each thing changed.

    A key that transformers still knows is never touched: this table only speaks where the library fell silent.
    """
    values: dict[str, Any] = {
        name: value
        for name, value in given.items()
        if name not in LAUNCHER_KEYS and (name in known or name not in (*RENAMED, *IGNORED, "adafactor"))
    }
    # Two names of one thing in today's transformers.
    if "activation_checkpointing" in values:
        other = values.pop("activation_checkpointing")
        if values.setdefault("gradient_checkpointing", other) != other:
            notice(
                "legacy.both",
                "{old} is ignored: {new} is set too.",
                old="activation_checkpointing",
                new="gradient_checkpointing",
            )
    for name, value in given.items():
        if name in known:
            continue
        if name in RENAMED:
            new = RENAMED[name]
            # Files sometimes carry both: today's spelling wins, but for warmup_steps 0, which used to mean "not set".
            if new in given and not (name == "warmup_ratio" and given[new] == 0):
                notice("legacy.both", "{old} is ignored: {new} is set too.", old=name, new=new)
            else:
                values[new] = value
                notice("legacy.renamed", "{old} is read as {new}, its name today.", old=name, new=new)
        elif name in IGNORED and value not in (None, False, "", -1):
            notice("legacy.ignored", "{old} has no effect any more and is ignored.", old=name)
        elif name == "adafactor" and value:
            values["optim"] = "adafactor"
            notice("legacy.value", "{key} {old} is read as {new}.", key="adafactor", old=True, new='optim "adafactor"')
    optim = values.get("optim")
    if isinstance(optim, str) and optim in OPTIMIZERS:
        values["optim"] = OPTIMIZERS[optim]
        notice("legacy.value", "{key} {old} is read as {new}.", key="optim", old=optim, new=OPTIMIZERS[optim])
    if "report_to" in values and values["report_to"] in (None, []):
        values["report_to"] = "none"
    return values
