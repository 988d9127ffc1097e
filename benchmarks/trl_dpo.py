"""TRL's side of the DPO benchmark: train on a dump with `DPOTrainer`, print one JSON line.

Runs in TRL's virtual environment (README.md). `DPOTrainer` renders and tokenises whatever it is given; its
preparation is replaced, so that the dump's ids go straight to its own collator.
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
import trl
from measuring import current_rss, peak_rss, read_dump, stdout_kept_for_the_result
from pair_batches import CountingPairs
from peer_side import PRECISIONS, LogTimes, load_adapter, preference_arguments, print_preference_measurement


def main() -> None:
    """Train once as the command line says and print the measurement."""
    # The classes are lazy attributes: touching them finishes the import before memory is read.
    imported = (trl.DPOTrainer, transformers.AutoModelForCausalLM, peft.LoraConfig, datasets.Dataset)
    assert all(imported)
    rss_after_imports = current_rss()
    arguments = preference_arguments(__doc__, tuple(PRECISIONS))
    torch.set_num_threads(arguments.threads)
    pairs = read_dump(arguments.dump)
    with tempfile.TemporaryDirectory() as output_dir, stdout_kept_for_the_result():
        trainer = make_trainer(arguments, pairs, output_dir)
        load_adapter(trainer.model, arguments.adapter)
        collator = CountingPairs(trainer.data_collator, lambda batch: batch["completion_mask"].bool())
        trainer.data_collator = collator
        log = LogTimes()
        trainer.add_callback(log)
        trainer.train()
        peak = peak_rss()
    print_preference_measurement(
        framework="trl",
        arguments=arguments,
        trainer=trainer,
        pairs=pairs,
        collator=collator,
        log=log,
        rss_after_imports=rss_after_imports,
        peak_rss=peak,
    )


class DumpTrainer(trl.DPOTrainer):
    """TRL's trainer on pairs that are token ids already, in their order."""

    def _prepare_dataset(self, dataset: datasets.Dataset, *args: Any) -> datasets.Dataset:
        return dataset


def make_trainer(arguments: argparse.Namespace, pairs: Sequence[dict[str, list[int]]], output_dir: str) -> DumpTrainer:
    """Build TRL's trainer on the dump, everything that could differ from ours written out."""
    dtype, autocast = PRECISIONS[arguments.precision]
    config = trl.DPOConfig(
        output_dir=output_dir,
        loss_type="sigmoid",
        beta=arguments.beta,
        precompute_ref_log_probs=False,
        per_device_train_batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.examples_per_step // arguments.batch_size,
        num_train_epochs=1,
        max_length=None,  # the dump has no pair that is too long
        pad_to_multiple_of=None,
        train_sampling_strategy="sequential",
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=autocast,
        gradient_checkpointing=arguments.gradient_checkpointing,
        seed=arguments.seed,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        eval_strategy="no",
    )
    return DumpTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=dtype, attn_implementation=arguments.attention
        ),
        args=config,
        train_dataset=datasets.Dataset.from_list(list(pairs)),
        processing_class=transformers.AutoTokenizer.from_pretrained(arguments.model),
        # A new adapter, so that the reference is the model without it; its start is loaded afterwards.
        peft_config=peft.LoraConfig(
            r=arguments.rank,
            lora_alpha=2 * arguments.rank,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )


if __name__ == "__main__":
    main()
