"""Held-out examples: the loss of each, and their metrics without logits, of all of them and of each source."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers.trainer_utils import speed_metrics

from firefly.data.batching import ExampleList, StepTotals
from firefly.distributed.model import TrainableModel
from firefly.tasks.base import Forward, Task


@dataclass(frozen=True)
class Evaluation:
    """What was found of the held-out examples, the same on every rank.

    Attributes:
        metrics: by the names that they are logged under.
        losses: of each example, summed over its targets, fp64 (examples,): nats, or what the loss of a pair or of a
            labelled answer is.
        targets: of each example, int64 (examples,): its tokens; 1 for a pair or a labelled answer.
        prefers: of each pair: whether its better answer is preferred, bool (examples,); None where there are no pairs.
    """

    metrics: dict[str, float]
    losses: np.ndarray
    targets: np.ndarray
    prefers: np.ndarray | None = None


def evaluate(
    task: Task, model: TrainableModel, examples: ExampleList, tick: Callable[[], None] = lambda: None
) -> Evaluation:
    """Evaluate the held-out examples without logits of all of them.

    Args:
        tick: called after each step of the evaluation.
    """
    started = time.time()
    model.rest()
    module = model.wrapped if model.backend.deepspeed else model.module
    forward = Forward(model, module)
    numbers: list[torch.Tensor] = []
    found: list[torch.Tensor] = []
    totals: dict[int, StepTotals] = {}
    for source in np.unique(examples.counts.sources).tolist():  # a step has examples of one source
        totals[source] = StepTotals(0, 0, 0, 0)
        rows = np.flatnonzero(examples.counts.sources == source)
        with torch.no_grad():
            for step in task.in_order(examples, True, model, rows):
                batches = [batch.to(model.device) for batch in step.microbatches]
                of_step = task.over_step(forward, batches, step.totals)
                for batch, of_batch in zip(batches, step.example_ids, strict=True):
                    found.append(task.evaluation_values(forward, batch, len(of_batch), of_step))
                    numbers.append(torch.tensor(of_batch, dtype=torch.long))
                totals[source] += step.totals
                tick()
    ours = torch.cat(found)  # this rank's examples
    at = torch.cat(numbers).to(ours.device)
    values = model.summed(ours.new_zeros(len(examples), ours.shape[1]).index_copy(0, at, ours)).cpu().numpy()
    of_all = sum(totals.values(), StepTotals(0, 0, 0, 0))
    metrics = task.evaluation_metrics(values.sum(0).tolist(), of_all)
    if len(totals) > 1:
        for source, counted in totals.items():
            sums = values[examples.counts.sources == source].sum(0).tolist()
            name = examples.names[source] if source < len(examples.names) else str(source)
            metrics[f"loss/{name}"] = task.evaluation_metrics(sums, counted)["loss"]
    named = {f"eval_{name}": value for name, value in metrics.items()}
    batches = math.ceil(len(examples) / (model.args.eval_batch_size * model.ranks))
    speed = speed_metrics("eval", started, num_samples=len(examples), num_steps=batches)
    targets = examples.counts.targets if task.UNIT == "token" else np.ones(len(examples), dtype=np.int64)
    return Evaluation(named | speed, task.example_losses(values, of_all), targets, task.prefers(values))
