"""transformers' TrainingArguments of a run."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from firefly.config import Config
from firefly.config.training_arguments import FIELDS
from firefly.console import notice
from firefly.distributed.backends import Backend, load_plainly
from firefly.distributed.model import no_optimizer
from firefly.errors import UsageError
from firefly.files import one_line
from firefly.models.precision import Precision
from firefly.runs.trackers import choose_trackers

PAGED_ADAM = (OptimizerNames.PAGED_ADAMW,)
"""Adam with 32-bit state that bitsandbytes moves to the CPU's memory when the GPU runs out of its own."""

FUSED_ADAM = OptimizerNames.ADAMW_TORCH_FUSED
"""The same update in a few launches for all weights, where the other has one for each."""


def join_ranks(config: Config, backend: Backend, precision: Precision, device: torch.device) -> TrainingArguments:
    """TrainingArguments of this run; to make them forms the process group, where there are several ranks."""
    args = training_arguments(resolved_arguments(config, precision, device) | backend.arguments(precision))
    if device.type == "cpu" and args.world_size > 1 and "ddp_timeout" in config.given:  # transformers leaves it out
        notice("key.no_effect", "{key} has no effect with {setting}.", key="ddp_timeout", setting="use_cpu")
    if args.n_gpu > 1:  # one process: transformers would split each batch among the GPUs (DataParallel)
        notice(
            "engine.one_card",
            "this machine has {count} GPUs and this run uses one. To use them all: torchrun --nproc_per_node={count} "
            "train.py --train_args_file CONFIG",
            count=args.n_gpu,
        )
        args._n_gpu = 1
    load_plainly(args)
    check_schedule(args)
    check_optimizer(args)
    return args


def check_schedule(args: TrainingArguments) -> None:
    """Build the schedule once on nothing: what it lacks, or does not know, is found before weights are loaded.

    Raises:
        UsageError: it cannot be built from `lr_scheduler_kwargs`.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate or 1.0)
    options: Any = args.lr_scheduler_kwargs  # text until TrainingArguments has read it
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 10, 100, options)
    except (TypeError, ValueError) as error:
        kind, problem = SchedulerType(args.lr_scheduler_type), one_line(error)
        raise UsageError(
            "config.schedule",
            "lr_scheduler_type = {value!r} cannot be built: {problem}; see lr_scheduler_kwargs.",
            value=kind.value,
            problem=problem,
        ) from error


def check_optimizer(args: TrainingArguments) -> None:
    """Look the optimizer up once: a package that is missing is found before weights are loaded.

    Raises:
        UsageError: it is not installed, or `optim_args` cannot be read.
    """
    asked = copy.copy(args)
    if asked.optim_target_modules:  # which modules there are, the model says later
        asked.optim_target_modules = "all-linear"
    try:
        Trainer.get_optimizer_cls_and_kwargs(asked, torch.nn.Sequential(torch.nn.Linear(1, 1)))  # type: ignore[arg-type]
    except (ImportError, ValueError, TypeError) as error:
        raise no_optimizer(args, error) from error


def resolved_arguments(config: Config, precision: Precision, device: torch.device) -> dict[str, Any]:
    """TrainingArguments of this run: the user's, with what Firefly consumes itself folded or switched off."""
    values = {
        name: value
        for name, value in config.training.items()
        if name not in FIELDS or FIELDS[name].how not in ("without effect", "refused")
    }
    values |= {
        "output_dir": str(Path(config.output_dir).expanduser()),
        "per_device_train_batch_size": config.step.examples_per_rank,
        "per_device_eval_batch_size": config.step.examples_per_rank,
        "gradient_accumulation_steps": 1,
        "fp16": precision.scaled,  # loss scaling for GPUs without bf16; types are otherwise ours
        "bf16": False,
        "use_cpu": device.type == "cpu",
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,  # a host sync in every step
        "ddp_find_unused_parameters": False,
        "label_names": [],
        # A model compiled whole would recompile for every packing (see `models.compilation`).
        "torch_compile": False,
        "torch_compile_backend": None,
        "torch_compile_mode": None,
        # A signal leaves a checkpoint anyway (see `runs.interruption`).
        "enable_jit_checkpoint": False,
        "restore_callback_states_from_checkpoint": config.evaluation.patience is not None,
        "report_to": choose_trackers(values.get("report_to"), "report_to" in config.given) or "none",
        "run_name": values.get("run_name") or Path(config.output_dir).expanduser().name,  # what trackers call it
    }
    best = values.get("metric_for_best_model")
    if best and values.get("greater_is_better") is None:  # transformers takes a perplexity for better the higher it is
        values["greater_is_better"] = not any(word in best for word in ("loss", "perplexity"))
    optim = str(values.get("optim", ""))
    if device.type == "cpu" and optim.startswith("paged_"):
        values["optim"] = "adamw_torch_fused" if optim == "paged_adamw_32bit" else optim.removeprefix("paged_")
        notice(
            "optim.paged",
            "optim {asked} pages GPU memory; on this CPU the same optimizer runs without paging ({used}).",
            asked=optim,
            used=values["optim"],
        )
    if device.type == "cpu" and values.get("dataloader_pin_memory") is None:
        values["dataloader_pin_memory"] = False
    return values


def training_arguments(values: Mapping[str, Any]) -> TrainingArguments:
    """`TrainingArguments` from resolved values; its own complaints become the user's message."""
    try:
        return TrainingArguments(**values)
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise UsageError(
            "config.training_arguments",
            "the training arguments are not valid: {problem}",
            problem=one_line(error),
        ) from error


def total_steps(args: TrainingArguments, per_epoch: int) -> int:
    """Optimizer steps of the whole run, as transformers counts them."""
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
