"""What differs between pretraining, SFT and DPO."""

from __future__ import annotations

from dataclasses import dataclass

from firefly.data.formats import TaskName
from firefly.objectives.preference_trainer import PreferenceTrainer
from firefly.objectives.trainers import CausalTrainer, StepTrainer


@dataclass(frozen=True)
class Task:
    """What differs between pretraining, SFT and DPO: which loss trains, and whether rows are rendered as chats."""

    trainer: type[StepTrainer]
    chats: bool


TASKS: dict[TaskName, Task] = {
    "pretrain": Task(CausalTrainer, chats=False),
    "sft": Task(CausalTrainer, chats=True),
    "dpo": Task(PreferenceTrainer, chats=True),
}
