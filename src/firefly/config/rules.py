"""What goes together in a run file, what is not done, and which keys have no effect beside others."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from firefly.config.checking import bad_type
from firefly.config.schema import (
    PREFERENCE_LOSS_NAMES,
    SMOOTHED_LOSSES,
    UNUSED,
    Config,
    PreferenceConfig,
    names_in,
    only_with,
    own_fields,
)
from firefly.config.training_arguments import FIELDS, asks_for_something
from firefly.console import notice
from firefly.errors import UsageError
from firefly.translation import Phrase

IN_BACKWARD = re.compile("(ada)?lomo|.*_layerwise")
"""Optimizers that move weights within the backward pass of each microbatch."""

TRACKER_KEYS: dict[str, tuple[str, ...]] = {
    "trackio": ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "hub_private_repo"),
}
"""TrainingArguments that one of transformers' trackers reads alone."""

LOSSES_OF_KEY: dict[str, tuple[str, ...]] = {
    "simpo_gamma": ("simpo",),
    "cpo_alpha": ("cpo",),
    "precompute_reference": tuple(name for name in PREFERENCE_LOSS_NAMES if name not in ("simpo", "orpo", "cpo")),
}
"""Keys of preference training that mean something under some of its losses alone."""


def check_together(config: Config) -> None:
    """Refuse values that contradict each other, or that need another key."""
    training, adapter, patience = config.training, config.adapter, config.evaluation.patience
    if config.precision.fp16 and config.precision.bf16:
        raise UsageError("config.two_precisions", "fp16 and bf16 are both true; set one of them to false.")
    if config.webhook and not re.match("https?://[^/]", config.webhook):
        raise UsageError(
            "config.bad_webhook", "webhook = {value!r} is no URL: write http://… or https://….", value=config.webhook
        )
    if config.data.eval_file and config.data.eval_ratio:
        raise UsageError("config.two_held_outs", "eval_file and eval_ratio are both set; keep one of them.")
    evaluating = {name: training.get(name) for name in ("eval_strategy", "eval_on_start", "load_best_model_at_end")}
    for name, value in (evaluating | {"early_stopping_patience": patience}).items():
        if not has_held_out(config) and value not in (None, "no", False):
            raise UsageError(
                "config.no_eval_file",
                "{key} = {value} needs held-out data: set eval_file or eval_ratio, or remove {key}.",
                key=name,
                value=json.dumps(value, default=str),
            )
    if adapter.mode == "full" and adapter.name_or_path:
        raise UsageError(
            "adapter.with_full",
            "adapter_name_or_path = {value} needs train_mode lora or qlora; full trains a model. Merge the adapter "
            "first: firefly merge.",
            value=adapter.name_or_path,
        )
    if not names_in(adapter.target):
        raise bad_type("lora_target", json.dumps(adapter.target), Phrase("a list of names"))


def has_held_out(config: Config) -> bool:
    """Whether a run evaluates on examples that it does not train."""
    return bool(config.data.eval_file) or config.data.eval_ratio > 0


def evaluated_training(config: Config) -> dict[str, Any]:
    """The TrainingArguments with what held-out data and early stopping bring along.

    Held-out data is there to be used: without a strategy it is evaluated every `eval_steps`, else each epoch. Early
    stopping keeps the best checkpoint: it saves when evaluating, and judges by loss unless another metric is named.
    """
    training = dict(config.training)
    if has_held_out(config) and "eval_strategy" not in training:
        training["eval_strategy"] = "steps" if training.get("eval_steps") else "epoch"
    if config.evaluation.patience is None:
        return training
    strategy = training["eval_strategy"]
    if strategy == "no":
        raise UsageError(
            "config.no_evaluation",
            'early_stopping_patience watches the evaluation, but eval_strategy is "no"; remove eval_strategy.',
        )
    training.setdefault("load_best_model_at_end", True)
    if training.get("metric_for_best_model") is None:
        training["metric_for_best_model"] = "loss"
    if "save_strategy" not in training:
        training["save_strategy"] = strategy
        if strategy == "epoch" and "save_steps" in training:
            note_no_effect("save_steps", "eval_strategy epoch")
    if training["save_strategy"] == "no" and training["load_best_model_at_end"]:
        raise UsageError(
            "config.no_saving",
            'early_stopping_patience keeps the best checkpoint, but save_strategy is "no"; remove save_strategy.',
        )
    if training["save_strategy"] == strategy == "steps":
        training.setdefault("save_steps", training.get("eval_steps") or training["logging_steps"])
    return training


def refuse_what_is_not_done(config: Config) -> None:
    """Exit 2 for what Firefly does not do, by name: nothing is accepted and then ignored."""
    flat = config.flat()
    for name, treatment in FIELDS.items():
        if isinstance(treatment.by, Phrase) and asks_for_something(name, flat.get(name)):
            value = json.dumps(flat[name], default=str)
            raise UsageError(f"refused.{name}", treatment.by.text, key=name, value=value)
    if IN_BACKWARD.fullmatch(str(flat["optim"])):
        raise UsageError(
            "refused.optim",
            "{key} = {value} is not supported: it moves the weights within the backward pass of each microbatch, "
            "where a step here is clipped, looked at and applied whole. Choose another optimizer.",
            key="optim",
            value=json.dumps(flat["optim"]),
        )
    if "tpu_metrics_debug" in str(flat.get("debug")):
        raise UsageError(
            "refused.debug",
            "{key} = {value} is not supported: there are no TPUs here. Remove it.",
            key="debug",
            value=json.dumps(flat["debug"]),
        )


def check_preference(config: Config) -> None:
    """A loss with beta needs one above 0; a notice for label smoothing where it has no effect."""
    settings, pairs = config.preference, config.task_type in PreferenceConfig.TASKS
    if config.task_type in only_with("beta")["task_type"] and not settings.beta:
        raise UsageError(
            "config.beta_zero",
            "beta = 0 leaves {setting} without a signal; set it above 0.",
            setting=f"preference_loss {settings.loss}" if pairs else f"task_type {config.task_type}",
        )
    weights = (settings.desirable_weight, settings.undesirable_weight)
    if config.task_type in only_with("desirable_weight")["task_type"] and not any(weights):
        raise UsageError(
            "config.no_weight",
            "desirable_weight and undesirable_weight are both 0: nothing would be trained. Set one of them above 0.",
        )
    if pairs and settings.label_smoothing and settings.loss not in SMOOTHED_LOSSES:
        notice(
            "preference.no_smoothing",
            "label_smoothing has no effect with preference_loss {loss}; robust, simpo and cpo use it.",
            loss=settings.loss,
        )


def note_unused(config: Config, values: Mapping[str, Any]) -> None:
    """Say which of the given keys do nothing in this run."""
    flat = config.flat()
    own = own_fields()
    for name in values:
        treatment = FIELDS.get(name)
        if treatment is None and name not in own:
            notice(
                "key.new",
                "{key} is new in the transformers that is installed: it is handed on, and this version of Firefly may "
                "not honour it.",
                key=name,
            )
        elif treatment and treatment.how == "without effect" and asks_for_something(name, flat[name]):
            notice("key.unused", "{key} has no effect: Firefly decides it by itself or has no use for it.", key=name)
    for tracker, names in TRACKER_KEYS.items():
        for name in names if tracker not in str(flat["report_to"]) else ():
            if name in values and asks_for_something(name, flat[name]):
                note_no_effect(name, f"report_to without {tracker}")
    if values.get("optim_target_modules") and not re.match("galore|apollo", str(flat["optim"])):
        note_no_effect("optim_target_modules", f"optim {flat['optim']}")
    if config.evaluation.patience is None and config.evaluation.threshold:
        note_no_effect("early_stopping_threshold", "early_stopping_patience null")
    if config.task_type in PreferenceConfig.TASKS:
        for name, losses in LOSSES_OF_KEY.items():
            if values.get(name) and config.preference.loss not in losses:
                note_no_effect(name, f"preference_loss {config.preference.loss}")
    for setting, value, names in UNUSED:
        for name in names if flat[setting] == value else ():
            if name in values:
                note_no_effect(name, f"{setting} {value}")


def note_no_effect(key: str, setting: str) -> None:
    notice("key.no_effect", "{key} has no effect with {setting}.", key=key, setting=setting)
