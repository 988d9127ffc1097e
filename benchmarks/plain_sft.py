"""Plain transformers and peft: SFT and pretraining as a short script of one's own does it, printing one JSON line.

`Trainer` with the padding collator of transformers. Blocks of pretraining text that hold several documents go in with
restarted positions, from which transformers makes the mask that keeps them apart.
"""

import argparse
import tempfile
from collections.abc import Sequence
from itertools import chain
from typing import Any

import peft
import torch
import transformers
from job import Job
from measuring import print_measurement, read_dump, stdout_kept_for_the_result
from row_batches import CountingRows, segment_lengths, train_and_measure, whole_row
from side import adapter_config, load_model, make_equal, memory_now, parse_side, sampling, trainer_arguments


def main() -> None:
    """Train once as the command line says and print the measurement."""
    job, tuning = parse_side(__doc__, ("padded", "grouped"))
    memory_after_imports = memory_now(job.device)
    rows = read_dump(job.dump)
    with tempfile.TemporaryDirectory() as output_dir, stdout_kept_for_the_result():
        tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
        if job.task == "pretrain" and job.isolated:
            collate: Any = collate_block
        else:
            collate = PaddedRows(transformers.DataCollatorForSeq2Seq(tokenizer))
        trainer = make_trainer(job, tuning, rows, output_dir)
        collator = CountingRows(collate, whole_row)
        measurement = train_and_measure(
            "plain", job, tuning, rows, trainer, collator, memory_after_imports, collate_alone=collate
        )
    print_measurement(measurement)


class PaddedRows:
    """transformers' padding collator, on the dump's rows without what only other collators use."""

    def __init__(self, collator: transformers.DataCollatorForSeq2Seq) -> None:
        self.collator = collator

    def __call__(self, rows: list[dict[str, list[int]]]) -> Any:
        return self.collator([{name: row[name] for name in ("input_ids", "labels")} for row in rows])


def collate_block(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Put blocks one behind the other; each document's positions start at 0."""
    lengths = [length for row in rows for length in segment_lengths(row)]
    columns = {name: list(chain.from_iterable([row[name] for row in rows])) for name in ("input_ids", "labels")}
    columns["position_ids"] = list(chain.from_iterable(range(length) for length in lengths))
    return {name: torch.tensor([values]) for name, values in columns.items()}


def make_trainer(
    job: Job, tuning: argparse.Namespace, rows: Sequence[dict[str, list[int]]], output_dir: str
) -> transformers.Trainer:
    """Build the trainer as the libraries' guides do, but for frozen 16-bit weights, which they would hold in fp32."""
    model = load_model(job, tuning)
    if (config := adapter_config(job)) is not None:
        if tuning.gradient_checkpointing:
            model.enable_input_require_grads()
        model = peft.get_peft_model(model, config)
    make_equal(model, job)
    arguments = trainer_arguments(job, tuning, output_dir) | {
        "train_sampling_strategy": sampling(tuning),
        "remove_unused_columns": False,
        "use_liger_kernel": tuning.liger,
    }
    return transformers.Trainer(model=model, args=transformers.TrainingArguments(**arguments), train_dataset=rows)


if __name__ == "__main__":
    main()
