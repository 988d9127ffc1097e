"""Tasks by their names: one line for each objective."""

from __future__ import annotations

from firefly.tasks.base import Task
from firefly.tasks.causal import TokenTask
from firefly.tasks.kto import KTO
from firefly.tasks.preference import PreferenceTask
from firefly.tasks.reward import RewardTask

TASKS: dict[str, type[Task]] = {
    "pretrain": TokenTask,
    "sft": TokenTask,
    "dpo": PreferenceTask,
    "kto": KTO,
    "reward": RewardTask,
}
