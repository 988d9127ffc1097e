"""LLaMA-Factory's side of SFT and pretraining: train on a dump with its own trainers, print one JSON line.

Its configuration cannot name a file of token ids, so this does what its `run_sft` (for joined pretraining blocks: its
`run_pt`) does; the data set is made by its own processors, which are handed the dump's ids in place of a template's.
"""

import argparse
import tempfile
from collections.abc import Sequence
from itertools import chain
from typing import Any

import datasets
import transformers
from job import Job
from llamafactory.data import SFTDataCollatorWith4DAttentionMask
from llamafactory.data.processor import PackedSupervisedDatasetProcessor, SupervisedDatasetProcessor
from llamafactory.train.pt.trainer import CustomTrainer
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from llamafactory_side import Parts, load_parts
from measuring import IGNORE_INDEX, print_measurement, read_dump, stdout_kept_for_the_result
from row_batches import CountingRows, packed_rows, segment_lengths, train_and_measure, whole_row
from side import make_equal, memory_now, parse_side

LAYOUTS = ("padded", "grouped", "packed")


def main() -> None:
    """Train once as the command line says and print the measurement."""
    job, tuning = parse_side(__doc__, LAYOUTS)
    memory_after_imports = memory_now(job.device)
    rows = read_dump(job.dump)
    with tempfile.TemporaryDirectory() as output_dir, stdout_kept_for_the_result():
        neat = tuning.layout == "packed" or (job.task == "pretrain" and job.isolated)
        parts = load_parts(job, tuning, output_dir, own_configuration(job, tuning, neat))
        make_equal(parts.model, job)
        examples = make_examples(job, tuning, rows, parts)
        if tuning.layout == "packed":
            steps = job.examples_per_step * len(examples) / len(rows) / tuning.batch_size
            parts.training_args.gradient_accumulation_steps = max(1, round(steps))
        trainer = make_trainer(job, parts, examples, neat)
        collator = CountingRows(trainer.data_collator, rows_of_pack if tuning.layout == "packed" else whole_row)
        measurement = train_and_measure(
            "llamafactory",
            job,
            tuning,
            rows,
            trainer,
            collator,
            memory_after_imports,
            collate_alone=AloneCollator(make_collator(parts, neat=False)),
        )
    print_measurement(measurement)


def own_configuration(job: Job, tuning: argparse.Namespace, neat: bool) -> dict[str, Any]:
    """The words of its YAML files for what its other stages do not have."""
    return {
        "stage": "pt" if job.task == "pretrain" and not job.isolated else "sft",
        "packing": neat,
        "neat_packing": neat,
        # Its packing keeps one token of the length for a border and drops rows that are longer without it; and its
        # collator pads all but the positions to a multiple of 8.
        "cutoff_len": job.max_tokens + (8 if neat else 0),
        "disable_shuffling": tuning.layout == "padded",
        "train_sampling_strategy": "group_by_length" if tuning.layout == "grouped" else "random",
    }


def make_examples(
    job: Job, tuning: argparse.Namespace, rows: Sequence[dict[str, list[int]]], parts: Parts
) -> list[dict[str, Any]]:
    """The data set as its processors leave it."""
    if job.task == "pretrain":
        return [block(row, job.isolated) for row in rows]
    processor = (DumpPacker if tuning.layout == "packed" else DumpProcessor)(
        template=parts.template, data_args=parts.data_args, **parts.tokenizer_module
    )
    processor.left = iter(rows)
    count = len(rows)
    made = processor.preprocess_dataset(
        {"_prompt": [[{}]] * count, "_response": [[{}]] * count}
        | {name: [None] * count for name in ("_system", "_tools", "_images", "_videos", "_audios")}
    )
    return [{name: values[number] for name, values in made.items()} for number in range(len(made["input_ids"]))]


class FromDump:
    """Hands the dump's next row to a processor in place of the encoding of a conversation."""

    left: Any = iter(())

    def _encode_data_example(self, **_: Any) -> tuple[list[int], list[int]]:
        row = next(self.left)
        return list(row["input_ids"]), list(row["labels"])


class DumpProcessor(FromDump, SupervisedDatasetProcessor):
    """One example a row."""


class DumpPacker(FromDump, PackedSupervisedDatasetProcessor):
    """Knapsacks of rows."""


def block(row: dict[str, list[int]], isolated: bool) -> dict[str, Any]:
    """A block of pretraining text; its documents are told apart by the numbers of `neat_packing`'s mask."""
    lengths = segment_lengths(row) if isolated else [len(row["input_ids"])]
    masks = [[number] * length for number, length in enumerate(lengths, start=1)]
    example = {
        "input_ids": row["input_ids"],
        "labels": row["labels"],
        "attention_mask": list(chain.from_iterable(masks)),
    }
    if not isolated:
        return example
    return example | {"position_ids": list(chain.from_iterable(range(length) for length in lengths))}


def rows_of_pack(example: dict[str, Any]) -> list[dict[str, list[int]]]:
    """Take one of its packs apart: rows are numbered from 1 in the mask, padding is 0."""
    mask = example["attention_mask"]
    return packed_rows(example, [mask.count(number) for number in range(1, max(mask) + 1)])


class AloneCollator:
    """Its collator for rows that carry ids and labels alone."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, rows: list[dict[str, list[int]]]) -> Any:
        return self.collator([{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows])


def make_collator(parts: Parts, neat: bool) -> SFTDataCollatorWith4DAttentionMask:
    """The collator of `run_sft`."""
    return SFTDataCollatorWith4DAttentionMask(
        template=parts.template,
        model=parts.model,
        pad_to_multiple_of=8,
        label_pad_token_id=IGNORE_INDEX,
        block_diag_attn=neat,
        neat_packing=neat,
        attn_implementation=parts.model.config._attn_implementation,
        compute_dtype=parts.model_args.compute_dtype,
        **parts.tokenizer_module,
    )


def make_trainer(job: Job, parts: Parts, examples: list[dict[str, Any]], neat: bool) -> transformers.Trainer:
    """Build the trainer of `run_sft`, or that of `run_pt` for blocks without borders."""
    common = {
        "model": parts.model,
        "args": parts.training_args,
        "finetuning_args": parts.finetuning_args,
        "train_dataset": datasets.Dataset.from_list(examples),
        **parts.tokenizer_module,
    }
    if job.task == "pretrain" and not job.isolated:
        tokenizer = parts.tokenizer_module["tokenizer"]
        collator: Any = transformers.DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False)
        return CustomTrainer(data_collator=JoinedBlocks(collator), **common)
    return CustomSeq2SeqTrainer(data_collator=make_collator(parts, neat), **common)


class JoinedBlocks:
    """transformers' collator makes the labels of a block itself, so it gets none."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        return self.collator(
            [{name: example[name] for name in ("input_ids", "attention_mask")} for example in examples]
        )


if __name__ == "__main__":
    main()
