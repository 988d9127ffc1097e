"""TRL's side of DPO: train on a dump with `DPOTrainer`, print one JSON line.

TRL tokenizes whatever it is given; that one method is replaced, so that the dump's ids go straight to its own collator.
"""

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import datasets
import transformers
import trl
from job import Job
from measuring import print_measurement, read_dump, stdout_kept_for_the_result
from pair_batches import CountingPairs, train_and_measure_pairs
from side import adapter_config, load_model, make_equal, memory_now, parse_side, trainer_arguments

IMPORTED = (trl.DPOTrainer, datasets.Dataset)


def main() -> None:
    """Train once as the command line says and print the measurement."""
    job, tuning = parse_side(__doc__)
    memory_after_imports = memory_now(job.device)
    pairs = read_dump(job.dump)
    with tempfile.TemporaryDirectory() as output_dir, stdout_kept_for_the_result():
        trainer = make_trainer(job, tuning, pairs, output_dir)
        make_equal(trainer.model, job)
        collator = CountingPairs(trainer.data_collator, lambda batch: batch["completion_mask"].bool())
        framework = "trl_liger" if tuning.liger else "trl"
        measurement = train_and_measure_pairs(framework, job, tuning, pairs, trainer, collator, memory_after_imports)
    print_measurement(measurement)


class DumpTrainer(trl.DPOTrainer):
    """TRL's trainer on pairs that are token ids already, in their order."""

    def _prepare_dataset(self, dataset: datasets.Dataset, *args: Any) -> datasets.Dataset:
        return dataset


def make_trainer(
    job: Job, tuning: argparse.Namespace, pairs: Sequence[dict[str, list[int]]], output_dir: str
) -> DumpTrainer:
    """Build TRL's trainer on the dump; the adapter is new, so that the reference is the model without it."""
    config = trl.DPOConfig(
        **trainer_arguments(job, tuning, output_dir)
        | {
            "loss_type": "sigmoid",
            "beta": job.beta,
            "precompute_ref_log_probs": False,
            "max_length": None,  # the dump has no pair that is too long
            "pad_to_multiple_of": None,
            "train_sampling_strategy": "sequential",
            "use_liger_kernel": tuning.liger,
        }
    )
    return DumpTrainer(
        model=load_model(job, tuning),
        args=config,
        train_dataset=datasets.Dataset.from_list(list(pairs)),
        processing_class=transformers.AutoTokenizer.from_pretrained(job.model),
        peft_config=adapter_config(job),
    )


if __name__ == "__main__":
    main()
