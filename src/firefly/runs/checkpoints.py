"""Which checkpoint to continue from, and whether it is of the same run.

A checkpoint's plan.json is written last, with a list of the other files: what lacks one of them was never finished, or
lost it since.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from firefly.console import notice
from firefly.errors import UsageError
from firefly.files import seal
from firefly.models.tuning import Choices
from firefly.ranks import is_first
from firefly.runs.folders import finish_replacing, leftovers, numbered_checkpoints
from firefly.runs.manifest import write_json

PLAN = "plan.json"


@dataclass(frozen=True)
class RunPlan:
    """What must not change between a checkpoint and the run that continues it, and what it is worth knowing of it."""

    examples_per_step: int
    """Over all ranks."""
    seed: int
    shuffle: bool
    data: str
    """Hash of the prepared examples, in order: what they are, not what made them."""
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
    add_tokens: list[str]
    prepared: dict[str, Any]
    """What made the examples, to name the cause where `data` differs: hashes of template and tokenizer, of the data
    files with their paths, of the code that prepares them, and configuration keys with their values."""
    training: dict[str, Any]
    """Keys that shape every step, and the precision, with their values."""
    total_steps: int
    engine: str
    """What carried the steps over the ranks, and wrote the optimizer's state in its own form."""
    # What follows is of adapters; full training has no use for it.
    use_rslora: bool = False
    use_dora: bool = False
    lora_target: str | list[str] = "all-linear"
    modules_to_save: list[str] = field(default_factory=list)
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
    "task_type",
    "use_rslora",
    "use_dora",
    "lora_target",
    "modules_to_save",
    "add_tokens",
    "adapter",
)
# Of these, what decides which weights there are: a checkpoint with others cannot even be loaded.
STRUCTURE = ("train_mode", "lora_rank", "use_dora", "lora_target", "modules_to_save", "add_tokens")

# Settings that live in the optimizer's and the scheduler's saved state, which a resumed run takes as they were.
OPTIMIZER_SETTINGS = ("optim", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
# Settings of TrainingArguments that shape every step.
TRAINING_SETTINGS = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm")


def seal_checkpoint(partial: Path, folder: Path, plan: Mapping[str, Any]) -> None:
    """Complete a checkpoint with its plan.json, flush it to the disk and give it its name.

    Raises:
        OSError: the disk took not all of it.
    """
    files = {str(path.relative_to(partial)): path.stat().st_size for path in partial.rglob("*") if path.is_file()}
    write_json(partial / PLAN, {**plan, "files": files})
    seal(partial, folder)


def stored_plan(checkpoint: Path) -> dict[str, Any]:
    """What plan.json says; nothing where there is none."""
    path = checkpoint / PLAN
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def stored_choices(checkpoint: Path) -> Choices:
    """A measured choice is made once: the checkpoint's, whatever would be chosen today."""
    return Choices(**stored_plan(checkpoint)["choices"])


def stored_threads(checkpoint: Path) -> int | None:
    """How many CPU threads computed the first rank's part of the run; None in a checkpoint that does not say."""
    return stored_plan(checkpoint).get("threads")


def stored_optimizer(checkpoint: Path, asked: Any) -> Any:
    """The optimizer whose state a checkpoint holds, of the kind of `asked`: another one could not read it."""
    return type(asked)(stored_plan(checkpoint)["optimizer"]["optim"])


def find_checkpoint(output_dir: Path, request: bool | str | None) -> Path | None:
    """Return the checkpoint to continue from: none, the newest complete one (true), or the one at a path.

    Raises:
        UsageError: the path is no complete checkpoint, or one of the model alone.
    """
    finish_replacing(output_dir)
    if not request:
        return None
    if isinstance(request, str):
        path = Path(request).expanduser()
        if not path.exists():
            found = ", ".join(map(str, checkpoints(output_dir))) or "–"
            raise UsageError(
                "resume.absent",
                "resume_from_checkpoint = {path} does not exist. Complete checkpoints in {folder}: {found}. Use true "
                "for the newest.",
                path=path,
                folder=output_dir,
                found=found,
            )
        missing = missing_files(path)
        if missing:
            raise UsageError(
                "resume.incomplete",
                "resume_from_checkpoint = {path} is no complete checkpoint (missing: {missing}). Use true for the "
                "newest complete one.",
                path=path,
                missing=", ".join(missing),
            )
        if is_model_only(path):
            raise UsageError(
                "resume.model_only",
                "resume_from_checkpoint = {path} holds the model alone (save_only_model), without the state that "
                "training needs to continue. Choose another checkpoint, or start a new run from this one "
                "(adapter_name_or_path or model_name_or_path).",
                path=path,
            )
        return path
    for path in leftovers(output_dir):
        notice("resume.unfinished", "{path} was interrupted while it was written and is skipped.", path=path)
    for path in reversed(checkpoints(output_dir)):
        missing = missing_files(path)
        if missing:
            notice(
                "resume.skipped",
                "{path} is not complete (missing: {missing}) and is skipped.",
                path=path,
                missing=", ".join(missing),
            )
        elif is_model_only(path):
            notice(
                "resume.skipped_model",
                "{path} holds the model alone (save_only_model), without the state that training needs to continue, "
                "and is skipped.",
                path=path,
            )
        else:
            notice("resume.from", "resuming from {path}.", path=path)
            return path
    notice("resume.none", "no complete checkpoint in {path}: training starts from the beginning.", path=output_dir)
    return None


def newest_complete(output_dir: Path) -> Path | None:
    """The checkpoint that a run would continue from, without a word."""
    complete = (path for path in reversed(checkpoints(output_dir)) if not missing_files(path))
    return next((path for path in complete if not is_model_only(path)), None)


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders checkpoint-N of a run, by N."""
    return [path for _, path in numbered_checkpoints(output_dir)]


def missing_files(path: Path) -> list[str]:
    """Files that a checkpoint should have and has not, or not whole."""
    try:
        listed = stored_plan(path).get("files")
    except ValueError:
        return [PLAN]
    if listed is None:
        return [PLAN]
    return [
        name for name, size in listed.items() if not (path / name).is_file() or (path / name).stat().st_size != size
    ]


def is_model_only(path: Path) -> bool:
    """Whether a checkpoint was saved under save_only_model: there is no state to train on with."""
    return stored_plan(path)["model_only"]


def check_same_run(checkpoint: Path, plan: RunPlan, anyway: bool = False) -> None:
    """Refuse to continue a checkpoint with other data, steps, seed or mode: it would be a different run.

    What may differ (a longer schedule, other ranks, settings that the optimizer's state overrules) is said.

    Args:
        anyway: say what differs, and go on.

    Raises:
        UsageError: naming what differs, with both values.
    """
    stored = stored_plan(checkpoint)
    _check_engine(checkpoint, stored, plan)
    differing = differences(stored, plan)
    if differing:
        told = "; ".join(f"{name}: {_short(before)} → {_short(now)}" for name, (before, now) in differing.items())
        structure = [name for name in differing if name in STRUCTURE]
        if structure:
            raise UsageError(
                "resume.other_weights",
                "{path} has other weights than this run would train ({differences}), which nothing can override. "
                "Restore {keys}, or start a new run with resume_from_checkpoint: false.",
                path=checkpoint,
                keys=", ".join(structure),
                differences=told,
            )
        if not anyway:
            raise UsageError(
                "resume.changed",
                "{path} belongs to a different run ({differences}). Restore the configuration and data, start a new "
                "run with resume_from_checkpoint: false, or continue nevertheless with resume_anyway: true.",
                path=checkpoint,
                differences=told,
            )
        notice(
            "resume.anyway",
            "{path} belongs to a different run and is continued nevertheless because of resume_anyway ({differences}).",
            path=checkpoint,
            differences=told,
        )
    for name, value in plan.optimizer.items():
        before = stored["optimizer"].get(name)
        if before != value:
            notice(
                "resume.kept",
                "{key} = {value} has no effect on a resumed run: the checkpoint's optimizer state has {before}.",
                key=name,
                value=value,
                before=before,
            )
    before = stored["total_steps"]
    if before != plan.total_steps:
        notice(
            "resume.schedule",
            "the run has {steps} steps now, not {before}: from now on the learning rate follows the new schedule.",
            before=before,
            steps=plan.total_steps,
        )
    before = stored["world_size"]
    if before != plan.world_size:
        notice(
            "resume.ranks",
            "the checkpoint is of {before} rank(s), this run has {ranks}: each step has the same examples, but its "
            "rounding and its dropout masks differ.",
            before=before,
            ranks=plan.world_size,
        )


WHOLE = ("single", "ddp")
"""Engines that write the optimizer's state whole, and in one form."""


def _check_engine(checkpoint: Path, stored: Mapping[str, Any], plan: RunPlan) -> None:
    before, ranks = stored["engine"], stored["world_size"]
    if before != plan.engine and not (before in WHOLE and plan.engine in WHOLE):
        raise UsageError(
            "resume.engine",
            "{path} was written by {before}, whose optimizer {now} cannot read. Resume with the same engine, or start "
            "a new run from its weights.",
            path=checkpoint,
            before=before,
            now=plan.engine,
        )
    if plan.engine.startswith("zero") and ranks != plan.world_size:
        raise UsageError(
            "resume.divided",
            "{path} was written by {before} processes under {engine}, which shards the optimizer state over them; "
            "{ranks} cannot read it. Resume with {before}.",
            path=checkpoint,
            before=ranks,
            engine=before,
            ranks=plan.world_size,
        )


def _short(value: Any) -> Any:
    """A value as people compare it: of a hash its beginning."""
    return f"{value[:12]}…" if isinstance(value, str) and re.fullmatch("[0-9a-f]{32,}", value) else value


def differences(stored: Mapping[str, Any], plan: RunPlan) -> dict[str, tuple[Any, Any]]:
    """What binds and differs between a plan.json and a plan: name → (value before, value now)."""
    now = json.loads(json.dumps(asdict(plan), default=str))  # as it would have been stored
    found = {name: (stored[name], now[name]) for name in BINDING if stored[name] != now[name]}
    for part in ("objective", "training"):
        then, today = stored[part], now[part]
        keys = dict.fromkeys((*then, *today))
        found |= {key: (then.get(key), today.get(key)) for key in keys if then.get(key) != today.get(key)}
    causes = _causes(stored["prepared"], now["prepared"])
    if "data" not in found:  # these are saved with the model, whatever they make of the examples
        causes = {name: pair for name, pair in causes.items() if name in ("template", "tokenizer")}
    if causes:
        found.pop("data", None)
    return causes | found


def _causes(then: Mapping[str, Any], today: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Why other examples were prepared: settings and files that differ, or else the code that prepares them."""
    settings = {name: (then.get(name), value) for name, value in today.items() if name not in ("data", "code")}
    before, now = dict(then["data"]), dict(today["data"])
    files = {name: (before.get(name), now.get(name)) for name in dict.fromkeys((*before, *now))}
    differing = {name: pair for name, pair in (settings | files).items() if pair[0] != pair[1]}
    code = then.get("code"), today["code"]
    return differing or ({"code": code} if code[0] != code[1] else {})


def set_aside_old_checkpoints(output_dir: Path, start: Path | None = None) -> None:
    """Move the checkpoints of an earlier run aside: none is lost, and none is mixed up with what is trained now.

    Args:
        start: the checkpoint that the run continues from: what lies before it in this folder is its own past.
    """
    old = checkpoints(output_dir)
    known = [path.resolve() for path in old]
    if start is not None and start.resolve() in known:
        old = old[known.index(start.resolve()) + 1 :]
    if not old or not is_first():
        return
    aside = output_dir / f"earlier-{time.strftime('%Y%m%d-%H%M%S')}"
    aside.mkdir()
    for path in old:
        path.rename(aside / path.name)
    notice(
        "resume.set_aside", "{count} checkpoint(s) of an earlier run were moved to {path}.", count=len(old), path=aside
    )
