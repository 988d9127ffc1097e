"""LLaMA-Factory's side of the DPO benchmark: train on a dump with its `CustomDPOTrainer`, print one JSON line.

Runs in LLaMA-Factory's virtual environment (README.md). Its configuration cannot name a file of token ids, so
this does what its `run_dpo` does, with a data set of the shape its `PairwiseDatasetProcessor` makes in place of
the loading and tokenising.
"""

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import accelerate  # noqa: F401  (loaded before memory is read, as on our side)
import datasets
import peft
import torch
import transformers
from llamafactory.data import PairwiseDataCollatorWithPadding, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_model, load_tokenizer
from llamafactory.train.dpo.trainer import CustomDPOTrainer
from llamafactory.train.trainer_utils import create_ref_model
from measuring import IGNORE_INDEX, current_rss, peak_rss, read_dump, stdout_kept_for_the_result
from pair_batches import CountingPairs
from peer_side import PRECISIONS, LogTimes, load_adapter, preference_arguments, print_preference_measurement


def main() -> None:
    """Train once as the command line says and print the measurement."""
    # The classes are lazy attributes: touching them finishes the import before memory is read.
    imported = (transformers.AutoModelForCausalLM, peft.LoraConfig, datasets.Dataset)
    assert all(imported)
    rss_after_imports = current_rss()
    arguments = preference_arguments(__doc__, tuple(PRECISIONS))
    torch.set_num_threads(arguments.threads)
    pairs = read_dump(arguments.dump)
    with tempfile.TemporaryDirectory() as output_dir, stdout_kept_for_the_result():
        trainer = make_trainer(arguments, pairs, output_dir)
        load_adapter(trainer.model, arguments.adapter)
        collator = CountingPairs(trainer.data_collator, lambda batch: batch["labels"] != IGNORE_INDEX)
        trainer.data_collator = collator
        log = LogTimes()
        trainer.add_callback(log)
        trainer.train()
        peak = peak_rss()
    print_preference_measurement(
        framework="llamafactory",
        arguments=arguments,
        trainer=trainer,
        pairs=pairs,
        collator=collator,
        log=log,
        rss_after_imports=rss_after_imports,
        peak_rss=peak,
    )


def configuration(arguments: argparse.Namespace, output_dir: str) -> dict[str, Any]:
    """Write out everything that could differ from ours, in the words of its YAML files."""
    return {
        "model_name_or_path": arguments.model,
        "stage": "dpo",
        "pref_loss": "sigmoid",
        "pref_beta": arguments.beta,
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": arguments.rank,
        "lora_alpha": 2 * arguments.rank,
        "lora_dropout": 0.0,
        "lora_target": "all",
        "dataset": "dump",  # must be named; not looked up here
        "template": "empty",
        "cutoff_len": arguments.max_seq_length,
        "disable_shuffling": True,
        "output_dir": output_dir,
        "per_device_train_batch_size": arguments.batch_size,
        "gradient_accumulation_steps": arguments.examples_per_step // arguments.batch_size,
        "num_train_epochs": 1,
        "learning_rate": arguments.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": PRECISIONS[arguments.precision][1],
        "flash_attn": {"sdpa": "sdpa", "eager": "disabled"}[arguments.attention],
        "disable_gradient_checkpointing": not arguments.gradient_checkpointing,
        "seed": arguments.seed,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }


def make_trainer(
    arguments: argparse.Namespace, pairs: Sequence[dict[str, list[int]]], output_dir: str
) -> CustomDPOTrainer:
    """Build its trainer as `run_dpo` does.

    It loads weights in the type they are saved in and has no setting for another; they are converted here, so
    that `--precision` means what it means in TRL.
    """
    model_args, data_args, training_args, finetuning_args, _ = get_train_args(configuration(arguments, output_dir))
    tokenizer_module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(tokenizer_module["tokenizer"], data_args)
    model = load_model(tokenizer_module["tokenizer"], model_args, finetuning_args, training_args.do_train)
    dtype, _ = PRECISIONS[arguments.precision]
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return CustomDPOTrainer(
        model=model,
        ref_model=create_ref_model(model_args, finetuning_args),
        args=training_args,
        finetuning_args=finetuning_args,
        data_collator=PairwiseDataCollatorWithPadding(
            template=template, model=model, pad_to_multiple_of=8, label_pad_token_id=IGNORE_INDEX, **tokenizer_module
        ),
        train_dataset=datasets.Dataset.from_list([processed(pair) for pair in pairs]),
        **tokenizer_module,
    )


def processed(pair: dict[str, list[int]]) -> dict[str, Any]:
    """Return a pair as `PairwiseDatasetProcessor` leaves it."""
    row: dict[str, Any] = {"images": None, "videos": None, "audios": None}
    for name in ("chosen", "rejected"):
        ids = pair["prompt_ids"] + pair[f"{name}_ids"]
        row[f"{name}_input_ids"] = ids
        row[f"{name}_attention_mask"] = [1] * len(ids)
        row[f"{name}_labels"] = [IGNORE_INDEX] * len(pair["prompt_ids"]) + pair[f"{name}_ids"]
    return row


if __name__ == "__main__":
    main()
