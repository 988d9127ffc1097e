"""LLaMA-Factory's side of DPO: train on a dump with its `CustomDPOTrainer`, print one JSON line.

Its configuration cannot name a file of token ids, so this does what its `run_dpo` does, with a data set of the shape
its `PairwiseDatasetProcessor` makes in place of the loading and tokenizing.
"""

import tempfile
from typing import Any

import datasets
from llamafactory.data import PairwiseDataCollatorWithPadding
from llamafactory.train.dpo.trainer import CustomDPOTrainer
from llamafactory.train.trainer_utils import create_ref_model
from llamafactory_side import Parts, load_parts
from measuring import IGNORE_INDEX, print_measurement, read_dump, stdout_kept_for_the_result
from pair_batches import CountingPairs, train_and_measure_pairs
from side import make_equal, memory_now, parse_side


def main() -> None:
    """Train once as the command line says and print the measurement."""
    job, tuning = parse_side(__doc__)
    memory_after_imports = memory_now(job.device)
    pairs = read_dump(job.dump)
    with tempfile.TemporaryDirectory() as output_dir, stdout_kept_for_the_result():
        own = {"stage": "dpo", "pref_loss": "sigmoid", "pref_beta": job.beta, "disable_shuffling": True}
        parts = load_parts(job, tuning, output_dir, own)
        make_equal(parts.model, job)
        trainer = make_trainer(parts, [processed(pair) for pair in pairs])
        collator = CountingPairs(trainer.data_collator, lambda batch: batch["labels"] != IGNORE_INDEX)
        measurement = train_and_measure_pairs(
            "llamafactory", job, tuning, pairs, trainer, collator, memory_after_imports
        )
    print_measurement(measurement)


def make_trainer(parts: Parts, examples: list[dict[str, Any]]) -> CustomDPOTrainer:
    """Build its trainer as `run_dpo` does."""
    return CustomDPOTrainer(
        model=parts.model,
        ref_model=create_ref_model(parts.model_args, parts.finetuning_args),
        args=parts.training_args,
        finetuning_args=parts.finetuning_args,
        data_collator=PairwiseDataCollatorWithPadding(
            template=parts.template,
            model=parts.model,
            pad_to_multiple_of=8,
            label_pad_token_id=IGNORE_INDEX,
            **parts.tokenizer_module,
        ),
        train_dataset=datasets.Dataset.from_list(examples),
        **parts.tokenizer_module,
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
