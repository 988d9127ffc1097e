"""Count what a peer's collator really hands to its model, and take its packs apart."""

import argparse
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from job import Job
from measuring import IGNORE_INDEX, Measurement, Work, measure, work_of
from side import LogTimes, peak_memory, sampling, settings_of

Row = dict[str, list[int]]


class CountingRows:
    """A peer's collator, keeping what passed through it. `rows_of` takes one of its examples apart into rows."""

    def __init__(self, collator: Any, rows_of: Callable[[dict[str, Any]], list[Row]]) -> None:
        self.collator = collator
        self.rows_of = rows_of
        self.batches: list[list[Row]] = []
        self.targets = 0
        self.positions = 0

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        """Collate as the peer does and count the result."""
        self.batches.append([row for example in examples for row in self.rows_of(example)])
        batch = self.collator(examples)
        labels, input_ids = batch["labels"], batch["input_ids"]
        trained = labels != IGNORE_INDEX
        if not torch.equal(labels[trained], input_ids[trained]):
            raise RuntimeError("the peer's collated labels are not the ids of their positions")
        self.targets += int(trained[:, 1:].sum())
        self.positions += input_ids.numel()
        return batch

    def rows_of_batches(self, start: int, end: int) -> list[Row]:
        """Return the rows of some consecutive batches."""
        return list(chain.from_iterable(self.batches[start:end]))

    def work_by_step(self, batches_per_step: int) -> list[Work]:
        """Sum the batches of each optimizer step; an epoch's last step may have fewer."""
        starts = range(0, len(self.batches), batches_per_step)
        return [work_of(self.rows_of_batches(start, start + batches_per_step)) for start in starts]

    def check(self, rows: Sequence[Row]) -> None:
        """Fail unless the batches held the dump's rows, each once, and as many targets as it has."""
        seen = sorted((row["input_ids"], row["labels"]) for batch in self.batches for row in batch)
        if seen != sorted((row["input_ids"], row["labels"]) for row in rows):
            raise RuntimeError("the rows the peer trained on are not those of the dump")
        if self.targets != (wanted := work_of(rows).target_tokens):
            raise RuntimeError(f"the peer trains {self.targets} tokens, the dump has {wanted} targets")


def whole_row(example: dict[str, Any]) -> list[Row]:
    """An example that is not packed is a row by itself."""
    return [{name: list(example[name]) for name in ("input_ids", "labels")}]


def packed_rows(example: dict[str, Any], lengths: Sequence[int]) -> list[Row]:
    """Take a pack apart into rows of these lengths; what is left over is padding."""
    rows, start = [], 0
    for length in lengths:
        rows.append({name: list(example[name][start : start + length]) for name in ("input_ids", "labels")})
        start += length
    return rows


def segment_lengths(row: dict[str, list[int]]) -> list[int]:
    """Lengths of the documents in a block of pretraining text; a chat is one segment."""
    starts = row.get("starts") or [0]
    return [end - start for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True)]


def train_and_measure(
    framework: str,
    job: Job,
    tuning: argparse.Namespace,
    rows: Sequence[dict[str, list[int]]],
    trainer: Any,
    collator: CountingRows,
    memory_after_imports: int,
    collate_alone: Any,
) -> Measurement:
    """Train, read time and memory, then check what was trained on."""
    trainer.data_collator = collator
    log = LogTimes()
    trainer.add_callback(log)
    trainer.train()
    peak = peak_memory(job.device)
    collator.check(rows)
    checks: dict[str, Any] = {"gradient_norms": log.gradient_norms}
    if sampling(tuning) != "sequential" and job.mode != "full":
        first = collator.rows_of_batches(0, trainer.args.gradient_accumulation_steps)
        # A new adapter adds nothing: switched off, the model is that of step 0.
        with trainer.accelerator.unwrap_model(trainer.model).disable_adapter():
            checks["first_step_loss_row_by_row"] = loss_row_by_row(trainer, collate_alone, first)
    return measure(
        framework=framework,
        work=collator.work_by_step(trainer.args.gradient_accumulation_steps),
        log_times=log.times,
        losses=log.losses,
        memory_after_imports=memory_after_imports,
        peak_memory=peak,
        threads=torch.get_num_threads(),
        settings=settings_of(job, tuning, trainer, collator.positions),
        checks=checks,
    )


@torch.no_grad()
def loss_row_by_row(trainer: Any, collate: Any, rows: Sequence[Row]) -> float:
    """Mean loss over the targets of `rows`, each in a forward pass of its own, through the peer's own loss."""
    num_targets = torch.tensor(work_of(rows).target_tokens)
    batches = (trainer._prepare_inputs(collate([row])) for row in rows)
    return sum(float(trainer.compute_loss(trainer.model, batch, num_items_in_batch=num_targets)) for batch in batches)
