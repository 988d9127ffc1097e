"""Which checkpoint to continue from, and whether it is of the same run.

A checkpoint's plan.json is written last: a folder without it was interrupted while it was saved.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from firefly.console import notice
from firefly.errors import UsageError
from firefly.models.choices import Choices
from firefly.ranks import is_first
from firefly.runs.passport import write_json

REQUIRED_FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "plan.json")


@dataclass(frozen=True)
class RunPlan:
    """What must not change between a checkpoint and the run that continues it."""

    examples_per_step: int
    seed: int
    shuffle: bool
    data: str
    task_type: str
    objective: dict[str, Any]
    """Keys that shape the loss of this task, with their values."""
    train_mode: str
    lora_rank: int
    lora_alpha: float
    base_weights: str
    optimizer: dict[str, Any]
    world_size: int
    layout: str
    use_rslora: bool = False
    use_dora: bool = False
    lora_target: str | list[str] = "all-linear"
    modules_to_save: list[str] = field(default_factory=list)
    add_tokens: list[str] = field(default_factory=list)
    adapter: str | None = None
    """Hash of the adapter that the run starts from."""


# A different value of these would train other examples, or something else.
BINDING = (
    "examples_per_step",
    "seed",
    "shuffle",
    "data",
    "train_mode",
    "lora_rank",
    "lora_alpha",
    "base_weights",
)
# The same of keys that came later, with what a checkpoint without them had.
BINDING_SINCE: dict[str, Any] = {
    "task_type": "sft",
    "use_rslora": False,
    "use_dora": False,
    "lora_target": "all-linear",
    "modules_to_save": [],
    "add_tokens": [],
    "adapter": None,
}

# Settings that live in the optimizer's and the scheduler's saved state, which a resumed run takes as they were.
OPTIMIZER_SETTINGS = ("optim", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")


class PlanWriter(TrainerCallback):
    """Completes each checkpoint with its plan.json: the plan, and the choices as they stand at that moment."""

    def __init__(self, plan: RunPlan, choices: Callable[[], Choices]) -> None:
        self.plan = plan
        self.choices = choices

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            write_json(folder / "plan.json", asdict(self.plan) | {"choices": asdict(self.choices())})


def stored_choices(checkpoint: Path) -> Choices:
    """A measured choice is made once: the checkpoint's, whatever would be chosen today."""
    plan = json.loads((checkpoint / "plan.json").read_text(encoding="utf-8"))
    # Early checkpoints had the budget alone.
    return Choices(**plan.get("choices", {"tokens_per_microbatch": plan.get("tokens_per_microbatch")}))


def find_checkpoint(output_dir: Path, request: bool | str | None) -> Path | None:
    """Return the checkpoint to continue from: none, the newest complete one (true), or the one at a path.

    Raises:
        UsageError: the path is no complete checkpoint.
    """
    if not request:
        return None
    if isinstance(request, str):
        path = Path(request).expanduser()
        missing = missing_files(path)
        if missing:
            raise UsageError("resume.incomplete", path=path, missing=", ".join(missing))
        return path
    for path in reversed(checkpoints(output_dir)):
        missing = missing_files(path)
        if not missing:
            notice("resume.from", path=path)
            return path
        notice("resume.skipped", path=path, missing=", ".join(missing))
    notice("resume.none", path=output_dir)
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders checkpoint-N of a run, by N."""
    found = [
        (int(match[1]), path)
        for path in output_dir.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return [path for _, path in sorted(found) if path.is_dir()]


def missing_files(path: Path) -> list[str]:
    missing = [name for name in REQUIRED_FILES if not (path / name).is_file()]
    if not any(path.glob("rng_state*.pth")):
        missing.append("rng_state.pth")
    if not any(path.glob("*.safetensors")):
        missing.append("*.safetensors")
    return missing


def check_same_run(checkpoint: Path, plan: RunPlan) -> None:
    """Refuse to continue a checkpoint with other data, steps, seed or mode: it would be a different run.

    Raises:
        UsageError: naming what differs, with both values.
    """
    stored = json.loads((checkpoint / "plan.json").read_text(encoding="utf-8"))
    now = asdict(plan)
    before = stored.get("objective", {})
    stored, now = BINDING_SINCE | stored | before, now | plan.objective
    names = dict.fromkeys((*BINDING, *BINDING_SINCE, *before, *plan.objective))
    differing = [f"{name}: {stored.get(name)} → {now.get(name)}" for name in names if stored.get(name) != now.get(name)]
    if differing:
        raise UsageError("resume.changed", path=checkpoint, differences="; ".join(differing))
    for name, value in plan.optimizer.items():
        before = stored.get("optimizer", {}).get(name, value)
        if before != value:
            notice("resume.kept", key=name, value=value, before=before)


def set_aside_old_checkpoints(output_dir: Path) -> None:
    """A run that starts anew in a used folder moves earlier checkpoints aside: none is lost, none is mixed up."""
    old = checkpoints(output_dir)
    if not old or not is_first():
        return
    aside = output_dir / f"earlier-{time.strftime('%Y%m%d-%H%M%S')}"
    aside.mkdir()
    for path in old:
        path.rename(aside / path.name)
    notice("resume.set_aside", count=len(old), path=aside)
