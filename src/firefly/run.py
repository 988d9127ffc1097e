"""One run: configuration, data, tokenizer, device and ranks; none of it changes during training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from firefly import ranks
from firefly.config import RECORDS_OF_TASK, Config
from firefly.console import notice
from firefly.data.batching import StepSettings, steps_per_epoch
from firefly.data.dataset import Split, load_split
from firefly.data.encoding import Encoder
from firefly.distributed.backends import Backend, resolve_backend, settle_rank_variables, take_launcher_settings
from firefly.errors import UsageError
from firefly.models.loading import load_tokenizer
from firefly.models.memory import primitives_kept
from firefly.models.precision import Precision, pick_device, resolve_precision
from firefly.models.saved_adapter import open_adapter, tokenizer_source
from firefly.models.tokens import add_tokens
from firefly.runs.checkpoints import find_checkpoint, stored_threads
from firefly.runs.lock import only_run
from firefly.runs.manifest import write_json
from firefly.runs.memory import cap_onednn_cache, memory_in_use
from firefly.setup.arguments import join_ranks, total_steps
from firefly.setup.checks import (
    bind_encoder,
    check_best_metric,
    check_positions,
    make_output_dir,
    on_its_first_day,
    refuse_own_source,
)
from firefly.setup.compute import settle_precision
from firefly.tasks import TASKS
from firefly.tasks.base import Task


@dataclass(frozen=True)
class Run:
    """Everything about a run but its model.

    Attributes:
        config: with the values that the task and a checkpoint set.
        folder: output_dir, which no other run writes into.
        started: seconds since the epoch.
        imported_bytes: memory that the process held before anything was loaded.
        added_tokens: those that the tokenizer did not have.
        args: transformers' arguments, of which Firefly's own keys are left out or settled.
        checkpoint: that the run resumes from.
    """

    config: Config
    task: Task
    folder: Path
    started: float
    device: torch.device
    imported_bytes: int
    precision: Precision
    backend: Backend
    encoder: Encoder
    added_tokens: list[int]
    data: Split
    args: TrainingArguments
    checkpoint: Path | None

    @property
    def tokenizer(self) -> Any:
        return self.encoder.tokenizer

    @property
    def chats(self) -> bool:
        """Whether its records are rendered by a chat template."""
        return RECORDS_OF_TASK[self.config.task_type] != "document"

    @property
    def step_settings(self) -> StepSettings:
        args = self.args
        return StepSettings(
            examples_per_step=self.config.step.examples_per_rank * args.world_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
            shuffle=self.config.data.shuffle,
            drop_last=args.dataloader_drop_last,
        )

    @property
    def loading(self) -> dict[str, Any]:
        """Workers and pinning, for the data loader."""
        args, workers = self.args, self.args.dataloader_num_workers
        found: dict[str, Any] = {"num_workers": workers}
        found["pin_memory"] = args.dataloader_pin_memory and self.device.type == "cuda"
        if workers:
            found["persistent_workers"] = args.dataloader_persistent_workers
            found["prefetch_factor"] = args.dataloader_prefetch_factor
        return found

    @property
    def stored_threads(self) -> int | None:
        """How many CPU threads computed before the checkpoint; None where there is none, or another device computes."""
        return stored_threads(self.checkpoint) if self.checkpoint and self.device.type == "cpu" else None

    @property
    def total_steps(self) -> int:
        steps = self.step_settings
        return total_steps(self.args, steps_per_epoch(len(self.data.train), steps.examples_per_step, steps.drop_last))


@contextmanager
def open_run(config: Config) -> Iterator[Run]:
    """A run in its locked folder: its data prepared, and its ranks joined.

    Faults of tokenizer, template and data are found before any weights are loaded, where they are cheap, and before the
    process group is formed, so that no rank times out while another reads data.

    Raises:
        UsageError: the configuration, the data or the checkpoint to continue from is at fault.
    """
    started = time.time()
    backend = resolve_backend(config, take_launcher_settings())
    settle_rank_variables(backend)
    folder = Path(config.output_dir).expanduser()
    refuse_own_source(config, folder)
    make_output_dir(folder)
    with only_run(folder):
        kind = TASKS[config.task_type]
        settled = on_its_first_day(kind.settle(config, backend), folder)
        device = pick_device(bool(config.training.get("use_cpu")))
        imported = memory_in_use(device)
        ruled = resolve_precision(config.precision, device)
        adapter = config.adapter.name_or_path
        if adapter:
            open_adapter(adapter)  # what is wrong with it is cheap to find now
        tokenizer = load_tokenizer(config.model, tokenizer_source(config.model, adapter))
        added = add_tokens(tokenizer, config.model.add_tokens)
        records = RECORDS_OF_TASK[settled.task_type]
        encoder = bind_encoder(settled, tokenizer, records != "document")
        data = load_split(settled.data, encoder, records, settled.model.hub)
        try:
            data.check(settled.data)
        except UsageError:  # it names where all findings are
            write_json(folder / "data_report.json", data.report())
            raise
        check_positions(settled.model, data)
        check_best_metric(settled, kind.METRICS, data)
        if device.type == "cpu" and ranks.started_alone():
            notice(
                "engine.one_process",
                "accelerate launch started one process, which trains alone. On CPUs it starts several with "
                "--multi_gpu, or use torchrun --nproc_per_node=N.",
            )
        counts = data.train.counts
        cap_onednn_cache(primitives_kept(int(counts.lengths.sum()), int(counts.segments.sum())))
        args = join_ranks(settled, backend, ruled, device)
        checkpoint = ranks.from_first(find_checkpoint(folder, settled.resume_from_checkpoint))
        precision = settle_precision(settled, ruled, device, counts, checkpoint, backend)
        yield Run(
            config=settled,
            task=kind(settled),
            folder=folder,
            started=started,
            device=device,
            imported_bytes=imported,
            precision=precision,
            backend=backend,
            encoder=encoder,
            added_tokens=added,
            data=data,
            args=args,
            checkpoint=checkpoint,
        )
