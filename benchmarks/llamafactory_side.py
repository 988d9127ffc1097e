"""What LLaMA-Factory's sides share: its configuration, and the parts its `run_…` functions begin with.

It loads weights in the type they are saved in and has no setting for another; they are converted here, so that
`--precision` means what it means for the other peers.
"""

import argparse
from dataclasses import dataclass
from typing import Any

from job import Job
from llamafactory.data import get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_model, load_tokenizer
from side import PRECISIONS, trainer_arguments


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Its parsed arguments, tokenizer, template and model with adapter."""

    model_args: Any
    data_args: Any
    training_args: Any
    finetuning_args: Any
    tokenizer_module: dict[str, Any]
    template: Any
    model: Any


def configuration(job: Job, tuning: argparse.Namespace, output_dir: str, own: dict[str, Any]) -> dict[str, Any]:
    """Write out everything that could differ from ours, in the words of its YAML files."""
    words = trainer_arguments(job, tuning, output_dir) | {
        "model_name_or_path": job.model,
        "do_train": True,
        "dataset": "dump",  # must be named; not looked up here
        "template": "empty",
        "cutoff_len": job.max_tokens,
        "finetuning_type": "full" if job.mode == "full" else "lora",
        "flash_attn": {"sdpa": "sdpa", "eager": "disabled"}[tuning.attention],
        "disable_gradient_checkpointing": not tuning.gradient_checkpointing,
    }
    if job.mode != "full":
        words |= {
            "lora_rank": job.rank,
            "lora_alpha": job.alpha,
            "lora_dropout": job.dropout,
            "lora_target": "all",
        }
    if job.mode == "qlora":
        words |= {"quantization_bit": 4, "quantization_method": "bnb", "double_quantization": True}
    return words | own


def load_parts(job: Job, tuning: argparse.Namespace, output_dir: str, own: dict[str, Any]) -> Parts:
    """Begin as its `run_…` functions do."""
    words = configuration(job, tuning, output_dir, own)
    del words["gradient_checkpointing"]  # it has a word of its own for it
    model_args, data_args, training_args, finetuning_args, _ = get_train_args(words)
    tokenizer_module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(tokenizer_module["tokenizer"], data_args)
    model = load_model(tokenizer_module["tokenizer"], model_args, finetuning_args, training_args.do_train)
    dtype, _ = PRECISIONS[tuning.precision]
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return Parts(
        model_args=model_args,
        data_args=data_args,
        training_args=training_args,
        finetuning_args=finetuning_args,
        tokenizer_module=tokenizer_module,
        template=template,
        model=model,
    )
