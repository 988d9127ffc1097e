"""Held-out examples: their metrics without logits, of all of them and of each source."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers.trainer_utils import speed_metrics

from firefly.data.batching import ExampleList, StepTotals
from firefly.distributed.model import TrainableModel
from firefly.tasks.base import Forward, Task


def evaluate(
    task: Task, model: TrainableModel, examples: ExampleList, tick: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Metrics over the held-out examples, and the loss of each source, without logits of all of them.

    Args:
        tick: called after each step of the evaluation.
    """
    started = time.time()
    model.rest()
    module = model.wrapped if model.backend.deepspeed else model.module
    forward = Forward(model, module)
    sums, totals, of_sources = None, StepTotals(0, 0, 0, 0), {}
    for number in np.unique(examples.counts.sources):
        rows = np.flatnonzero(examples.counts.sources == number)
        ours, counted = torch.zeros((), dtype=torch.float64, device=model.device), StepTotals(0, 0, 0, 0)
        with torch.no_grad():
            for step in task.in_order(examples, True, model, rows):
                batches = [batch.to(model.device) for batch in step.microbatches]
                of_step = task.over_step(forward, batches, step.totals)
                for batch in batches:
                    ours = ours + task.evaluation_sums(forward, batch, of_step).double()
                counted = counted + step.totals
                tick()
        ours = model.summed(ours)
        sums, totals = ours if sums is None else sums + ours, totals + counted
        names = examples.names
        of_sources[names[number] if number < len(names) else str(number)] = (ours, counted)
    assert sums is not None
    metrics = task.evaluation_metrics(sums.tolist(), totals)
    if len(of_sources) > 1:
        for name, (ours, counted) in of_sources.items():
            metrics[f"loss/{name}"] = task.evaluation_metrics(ours.tolist(), counted)["loss"]
    named = {f"eval_{name}": value for name, value in metrics.items()}
    batches = math.ceil(len(examples) / (model.args.eval_batch_size * model.ranks))
    return named | speed_metrics("eval", started, num_samples=len(examples), num_steps=batches)
