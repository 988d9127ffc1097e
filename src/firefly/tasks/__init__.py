"""Tasks by their names: one line for each objective."""

from __future__ import annotations

from firefly.tasks.base import Task
from firefly.tasks.causal import TokenTask
from firefly.tasks.preference import PreferenceTask

TASKS: dict[str, type[Task]] = {
    "pretrain": TokenTask,
    "sft": TokenTask,
    "dpo": PreferenceTask,
}
