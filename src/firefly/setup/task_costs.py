"""What an objective's steps take, as far as memory and time depend on it."""

from __future__ import annotations

from dataclasses import dataclass

from firefly.config import Config
from firefly.data.examples import ExampleCounts
from firefly.models.memory import primitives_kept
from firefly.tasks.preference_losses import PREFERENCE_LOSSES


@dataclass(frozen=True)
class TaskCosts:
    """What of an objective the forecast has to know.

    Attributes:
        pairs: an example is a prompt with two answers, of which each token's log-probability is kept.
        documents: an example is a block of documents, each of which is trained but for its first token.
        trains_prompt: a pair's prompt is trained, too.
        reference: each step asks a reference besides.
    """

    pairs: bool = False
    documents: bool = False
    trains_prompt: bool = False
    reference: bool = False

    def primitives(self, counts: ExampleCounts) -> int:
        """See `primitives_kept`."""
        each = int((counts.lengths - counts.targets).sum()) if self.documents else len(counts.lengths)
        return primitives_kept(int(counts.lengths.sum()), 3 * each if self.pairs else each)


def task_costs(config: Config) -> TaskCosts:
    """The one place of the forecast that asks for a task's name."""
    if config.task_type != "dpo":
        return TaskCosts(documents=config.task_type == "pretrain")
    loss = PREFERENCE_LOSSES[config.preference.loss]
    reference = bool(loss.reference) and not config.preference.precompute_reference
    return TaskCosts(pairs=True, trains_prompt=loss.trains_prompt, reference=reference)
