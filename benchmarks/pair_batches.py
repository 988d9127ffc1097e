"""Count what a peer's preference collator really hands to its model."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from job import Job
from measuring import Measurement, Work, measure, work_of_pairs
from side import LogTimes, peak_memory, settings_of

Pair = dict[str, list[int]]


class CountingPairs:
    """A peer's collator, keeping the pairs read back from its batches.

    Both peers put the chosen sequences in a batch's first half and the rejected ones in its second;
    `answers_of` says which positions of a batch are scored.
    """

    def __init__(self, collator: Any, answers_of: Callable[[Any], torch.Tensor]) -> None:
        self.collator = collator
        self.answers_of = answers_of
        self.batches: list[list[Pair]] = []
        self.positions = 0

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        """Collate as the peer does and read the result back."""
        batch = self.collator(examples)
        self.batches.append(pairs_of(batch, self.answers_of(batch)))
        self.positions += batch["input_ids"].numel()
        return batch

    def work_by_step(self, batches_per_step: int) -> list[Work]:
        """Sum the batches of each optimizer step."""
        starts = range(0, len(self.batches), batches_per_step)
        return [
            work_of_pairs([pair for batch in self.batches[start : start + batches_per_step] for pair in batch])
            for start in starts
        ]

    def check(self, pairs: Sequence[Pair]) -> None:
        """Fail unless the batches held the dump's pairs, in its order."""
        if [pair for batch in self.batches for pair in batch] != list(pairs):
            raise RuntimeError("the pairs the peer trained on are not those of the dump, in its order")


def pairs_of(batch: Any, answers: torch.Tensor) -> list[Pair]:
    """Take the padding off a batch and its sequences apart into prompt and answers."""
    prompts, endings = [], []
    for ids, present, scored in zip(batch["input_ids"], batch["attention_mask"].bool(), answers, strict=True):
        prompts.append(ids[present & ~scored].tolist())
        endings.append(ids[present & scored].tolist())
    half = len(prompts) // 2
    if prompts[:half] != prompts[half:]:
        raise RuntimeError("the chosen and rejected sequences of a batch have different prompts")
    return [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for prompt, chosen, rejected in zip(prompts[:half], endings[:half], endings[half:], strict=True)
    ]


def train_and_measure_pairs(
    framework: str,
    job: Job,
    tuning: argparse.Namespace,
    pairs: Sequence[Pair],
    trainer: Any,
    collator: CountingPairs,
    memory_after_imports: int,
) -> Measurement:
    """Train, read time and memory, then check what was trained on."""
    trainer.data_collator = collator
    log = LogTimes()
    trainer.add_callback(log)
    trainer.train()
    peak = peak_memory(job.device)
    collator.check(pairs)
    return measure(
        framework=framework,
        work=collator.work_by_step(trainer.args.gradient_accumulation_steps),
        log_times=log.times,
        losses=log.losses,
        memory_after_imports=memory_after_imports,
        peak_memory=peak,
        threads=torch.get_num_threads(),
        settings=settings_of(job, tuning, trainer, collator.positions),
        checks={"gradient_norms": log.gradient_norms},
    )
