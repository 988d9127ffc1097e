"""TRL's side of the LoRA benchmark: train on a dump with `SFTTrainer`, print one JSON line.

Runs in TRL's virtual environment (README.md). TRL takes a dataset that already has `input_ids` and `labels`
as it is; what its collator really hands to the model is counted and compared with the dump.
"""

import argparse
import tempfile
from collections.abc import Sequence
from itertools import chain
from typing import Any

import accelerate  # noqa: F401  (loaded before memory is read, as on our side)
import datasets
import peft
import torch
import transformers
import trl
from measuring import (
    IGNORE_INDEX,
    Work,
    common_parser,
    current_rss,
    measure,
    peak_rss,
    print_measurement,
    read_dump,
    stdout_kept_for_the_result,
    work_of,
)
from peer_side import PRECISIONS, LogTimes


def main() -> None:
    """Train once as the command line says and print the measurement."""
    # The classes are lazy attributes: touching them finishes the import before memory is read.
    imported = (trl.SFTTrainer, transformers.AutoModelForCausalLM, peft.LoraConfig, datasets.Dataset)
    assert all(imported)
    rss_after_imports = current_rss()
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    rows = read_dump(arguments.dump)
    with tempfile.TemporaryDirectory() as output_dir, stdout_kept_for_the_result():
        trainer = make_trainer(arguments, rows, output_dir)
        collator = trainer.data_collator = CountingCollator(trainer.data_collator)
        log = LogTimes()
        trainer.add_callback(log)
        trainer.train()
        peak = peak_rss()
        checks = check_labels(collator, rows)
        checks |= check_losses(trainer, collator, rows, arguments, log.losses[0])
    print_measurement(
        measure(
            framework="trl",
            work=collator.work_by_step(trainer.args.gradient_accumulation_steps),
            log_times=log.times,
            losses=log.losses,
            rss_after_imports=rss_after_imports,
            peak_rss=peak,
            threads=torch.get_num_threads(),
            settings={
                "precision": arguments.precision,
                "packing": arguments.packing,
                "padding_free": arguments.padding_free,
                "sampling": trainer.args.train_sampling_strategy,
                "per_device_train_batch_size": arguments.batch_size,
                "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
                "gradient_checkpointing": arguments.gradient_checkpointing,
                "attention": trainer.model.config._attn_implementation,
                "optimizer": str(trainer.args.optim),
                "positions_computed": sum(collator.positions),
                "rows_of_a_step_are_consecutive": sampling(arguments) == "sequential",
            },
            checks=checks,
        )
    )


def parse_arguments() -> argparse.Namespace:
    """Parse the command line: what is equal on both sides first, then TRL's own tuning."""
    parser = common_parser(__doc__, torch.get_num_threads())
    tuning = parser.add_argument_group("tuning")
    tuning.add_argument("--precision", choices=PRECISIONS, default="float32")
    tuning.add_argument("--packing", action="store_true", help="best-fit decreasing, to --max_seq_length")
    tuning.add_argument("--padding_free", action="store_true", help="concatenate a batch, not pad it")
    tuning.add_argument("--group_by_length", action="store_true", help="batch rows of like length")
    tuning.add_argument("--batch_size", type=int, default=8, help="rows, or packs, of one forward pass")
    tuning.add_argument("--gradient_checkpointing", action="store_true")
    tuning.add_argument("--attention", default="sdpa")
    return parser.parse_args()


def sampling(arguments: argparse.Namespace) -> str:
    """Choose the order of rows: that of the dump, unless the tuning brings an order of its own.

    Best-fit packing puts the longest rows first, so its packs are drawn at random (the Trainer's default);
    in their own order the steady steps would hold only short rows and flatter the rows per second.
    """
    if arguments.packing:
        return "random"
    return "group_by_length" if arguments.group_by_length else "sequential"


def accumulation_steps(arguments: argparse.Namespace, dataset: datasets.Dataset) -> int:
    """Microbatches that bring an optimizer step to, or for packs nearest to, `examples_per_step` rows."""
    if arguments.packing:
        packs = len(trl.pack_dataset(dataset, arguments.max_seq_length, "bfd"))
        packs_per_step = arguments.examples_per_step * packs / len(dataset)
        return max(1, round(packs_per_step / arguments.batch_size))
    if arguments.examples_per_step % arguments.batch_size:
        raise SystemExit(f"--batch_size {arguments.batch_size} does not divide --examples_per_step")
    return arguments.examples_per_step // arguments.batch_size


def make_trainer(
    arguments: argparse.Namespace, rows: Sequence[dict[str, list[int]]], output_dir: str
) -> trl.SFTTrainer:
    """Build TRL's trainer on the dump, everything that could differ from ours written out."""
    dtype, autocast = PRECISIONS[arguments.precision]
    dataset = datasets.Dataset.from_list(list(rows))
    config = trl.SFTConfig(
        output_dir=output_dir,
        per_device_train_batch_size=arguments.batch_size,
        gradient_accumulation_steps=accumulation_steps(arguments, dataset),
        num_train_epochs=1,
        # Rows come truncated; TRL only wants a length to pack to.
        max_length=arguments.max_seq_length if arguments.packing else None,
        packing=arguments.packing,
        padding_free=arguments.padding_free,
        train_sampling_strategy=sampling(arguments),
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
    return trl.SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=dtype, attn_implementation=arguments.attention
        ),
        args=config,
        train_dataset=dataset,
        processing_class=transformers.AutoTokenizer.from_pretrained(arguments.model),
        peft_config=peft.LoraConfig(
            r=arguments.rank,
            lora_alpha=2 * arguments.rank,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )


class CountingCollator:
    """TRL's collator, keeping what passed through it."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.batches: list[list[dict[str, list[int]]]] = []
        self.targets: list[int] = []
        self.positions: list[int] = []

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate as TRL does and count the result."""
        batch = self.collator(examples)
        self.batches.append([row for example in examples for row in rows_of(example)])
        labels, input_ids = batch["labels"], batch["input_ids"]
        trained = labels != IGNORE_INDEX
        if not torch.equal(labels[trained], input_ids[trained]):
            raise RuntimeError("TRL's collated labels are not the ids of their positions")
        self.targets.append(int(trained[:, 1:].sum()))
        self.positions.append(input_ids.numel())
        return batch

    def rows_of_batches(self, start: int, end: int) -> list[dict[str, list[int]]]:
        """Return the rows of some consecutive batches."""
        return list(chain.from_iterable(self.batches[start:end]))

    def work_by_step(self, batches_per_step: int) -> list[Work]:
        """Sum the batches of each optimizer step; an epoch's last step may have fewer."""
        starts = range(0, len(self.batches), batches_per_step)
        return [work_of(self.rows_of_batches(start, start + batches_per_step)) for start in starts]


def rows_of(example: dict[str, Any]) -> list[dict[str, list[int]]]:
    """Take a pack apart into the rows it holds; a row alone is itself."""
    rows, start = [], 0
    for length in example.get("seq_lengths") or [len(example["input_ids"])]:
        rows.append({name: example[name][start : start + length] for name in ("input_ids", "labels")})
        start += length
    return rows


def check_labels(collator: CountingCollator, rows: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
    """Fail unless the batches held the dump's rows, each once, and as many targets as it has."""
    seen = sorted((row["input_ids"], row["labels"]) for batch in collator.batches for row in batch)
    if seen != sorted((row["input_ids"], row["labels"]) for row in rows):
        raise RuntimeError("the rows TRL trained on are not those of the dump")
    wanted, collated = work_of(rows).target_tokens, sum(collator.targets)
    if collated != wanted:
        raise RuntimeError(f"TRL trains {collated} tokens, the dump has {wanted} targets")
    return {"target_tokens_in_collated_batches": collated}


def check_losses(
    trainer: trl.SFTTrainer,
    collator: CountingCollator,
    rows: Sequence[dict[str, list[int]]],
    arguments: argparse.Namespace,
    first_loss: float,
) -> dict[str, float]:
    """Recompute step 0 row by row, and give the loss a step on the dump's first rows would start from.

    A new LoRA adapter adds nothing, so the model with its adapter switched off is the model of step 0. The
    second figure is what our first step must show even where TRL's own first step holds other rows. Called
    when time and memory have been read.
    """
    first_step = collator.rows_of_batches(0, trainer.args.gradient_accumulation_steps)
    with trainer.accelerator.unwrap_model(trainer.model).disable_adapter():
        alone = loss_row_by_row(trainer, collator.collator, first_step)
        ours = list(rows[: arguments.examples_per_step])
        reference = alone if first_step == ours else loss_row_by_row(trainer, collator.collator, ours)
    return {
        "first_step_loss": first_loss,
        "first_step_loss_row_by_row": alone,
        "loss_of_first_rows_before_training": reference,
    }


@torch.no_grad()
def loss_row_by_row(trainer: trl.SFTTrainer, collate: Any, rows: Sequence[dict[str, list[int]]]) -> float:
    """Mean loss over the targets of `rows`, each in a forward pass of its own, through TRL's own loss."""
    num_targets = torch.tensor(work_of(rows).target_tokens)
    loss = 0.0
    for row in rows:
        loss += float(trainer.compute_loss(trainer.model, collate([row]), num_items_in_batch=num_targets))
    return loss


if __name__ == "__main__":
    main()
