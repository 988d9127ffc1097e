"""Tasks by their names: one line for each objective."""

from __future__ import annotations

from firefly.data.formats import TaskName
from firefly.tasks.base import Task
from firefly.tasks.causal import Pretraining, SupervisedFineTuning
from firefly.tasks.preference import PreferenceTask

TASKS: dict[TaskName, type[Task]] = {
    "pretrain": Pretraining,
    "sft": SupervisedFineTuning,
    "dpo": PreferenceTask,
}
