"""TRL's side of SFT and pretraining: train on a dump with `SFTTrainer`, print one JSON line.

TRL takes a dataset that already has `input_ids` and `labels` as it is; what its collator really hands to the model is
counted and compared with the dump. A block of pretraining text goes in as one of TRL's own packs (`seq_lengths`), so
its documents are kept apart as TRL keeps packed rows apart.
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
from row_batches import CountingRows, packed_rows, segment_lengths, train_and_measure, whole_row
from side import adapter_config, load_model, make_equal, memory_now, parse_side, sampling, trainer_arguments

IMPORTED = (trl.SFTTrainer, datasets.Dataset)
LAYOUTS = ("padded", "padding_free", "grouped", "packed")


def main() -> None:
    """Train once as the command line says and print the measurement."""
    job, tuning = parse_side(__doc__, LAYOUTS)
    memory_after_imports = memory_now(job.device)
    rows = read_dump(job.dump)
    with tempfile.TemporaryDirectory() as output_dir, stdout_kept_for_the_result():
        trainer = make_trainer(job, tuning, rows, load_model(job, tuning), output_dir)
        make_equal(trainer.model, job)
        rows_of = rows_of_pack if tuning.layout == "packed" else whole_row
        collator = CountingRows(trainer.data_collator, rows_of)
        measurement = train_and_measure(
            "trl_liger" if tuning.liger else "trl",
            job,
            tuning,
            rows,
            trainer,
            collator,
            memory_after_imports,
            collate_alone=collator.collator,
        )
    print_measurement(measurement)


def rows_of_pack(example: dict[str, Any]) -> list[dict[str, list[int]]]:
    """Take one of TRL's packs apart."""
    return packed_rows(example, example["seq_lengths"])


def make_dataset(job: Job, tuning: argparse.Namespace, rows: Sequence[dict[str, list[int]]]) -> datasets.Dataset:
    """The dump as TRL's own preparation would leave it."""
    examples: list[dict[str, Any]] = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    if job.task == "pretrain":
        if job.isolated and tuning.layout != "padding_free":
            raise SystemExit("only --layout padding_free keeps the documents of a block apart")
        for example, row in zip(examples, rows, strict=True):
            if job.isolated:
                example["seq_lengths"] = segment_lengths(row)
    return datasets.Dataset.from_list(examples)


def accumulation_steps(job: Job, tuning: argparse.Namespace, dataset: datasets.Dataset) -> int:
    """Microbatches that bring an optimizer step to, or for packs nearest to, `examples_per_step` rows."""
    if tuning.layout != "packed":
        return job.examples_per_step // tuning.batch_size
    packs = len(trl.pack_dataset(dataset, job.max_tokens, "bfd"))
    return max(1, round(job.examples_per_step * packs / len(dataset) / tuning.batch_size))


def make_trainer(
    job: Job, tuning: argparse.Namespace, rows: Sequence[dict[str, list[int]]], model: Any, output_dir: str
) -> trl.SFTTrainer:
    """Build TRL's trainer on the dump; `model` may have its adapter already."""
    dataset = make_dataset(job, tuning, rows)
    packing = tuning.layout == "packed"
    config = trl.SFTConfig(
        **trainer_arguments(job, tuning, output_dir)
        | {
            "gradient_accumulation_steps": accumulation_steps(job, tuning, dataset),
            # Rows come truncated; TRL only wants a length to pack to.
            "max_length": job.max_tokens if packing else None,
            "packing": packing,
            "padding_free": tuning.layout == "padding_free",
            "train_sampling_strategy": sampling(tuning),
            "use_liger_kernel": tuning.liger,
        }
    )
    return trl.SFTTrainer(
        model=model,
        args=config,
        train_dataset=dataset,
        processing_class=transformers.AutoTokenizer.from_pretrained(job.model),
        peft_config=None if hasattr(model, "peft_config") else adapter_config(job),
    )


if __name__ == "__main__":
    main()
