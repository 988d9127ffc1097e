"""What a run will take of memory and time, from the model's config.json, before anything is loaded."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames, ParallelMode

from firefly.config import RECORDS_OF_TASK, Config, PrecisionConfig, load_config
from firefly.data.batching import PackedBatch, pack
from firefly.data.dataset import load_split
from firefly.data.examples import ExampleCounts
from firefly.data.pair_batching import pack_pairs
from firefly.data.schema import IGNORE, TokenPair, Tokens
from firefly.distributed.backends import BACKENDS
from firefly.errors import UsageError
from firefly.files import first_line
from firefly.models.adapters import count_parameters, transformers_model
from firefly.models.attention import use_crossover
from firefly.models.checkpointing import Checkpointing, decoder_layers, install_checkpointing
from firefly.models.dry_run import NoDryRun, counted_activations, dry_run
from firefly.models.flops import linears_of, matmul_rate, necessary_flops
from firefly.models.kernels.segment_attention import GEMM_LONGEST
from firefly.models.known_shapes import known_shape
from firefly.models.loading import load_tokenizer, quiet_libraries, read_config, resolve_model
from firefly.models.memory import Forecast, Peak, free_memory
from firefly.models.meta_model import MetaModel, build_meta_model
from firefly.models.positions import positions_for
from firefly.models.precision import Precision, pick_device, resolve_precision
from firefly.models.probe_cache import cached_crossover
from firefly.models.saved_adapter import tokenizer_source
from firefly.models.tokens import add_tokens
from firefly.models.tuning import Choices
from firefly.runs.checkpoints import missing_files, newest_complete
from firefly.setup.checks import bind_encoder, check_positions
from firefly.setup.compute import settle_precision
from firefly.setup.tuning import Sizing, autocast_type, optimizer_state_bytes
from firefly.tasks import TASKS
from firefly.translation import translate

EFFICIENCY, EFFICIENCY_16_BIT = {"cpu": 0.6, "cuda": 0.65}, {"cpu": 0.5}
"""The share of the rate of matmuls that a run reaches (docs/performance.md): on a CPU 0.57 to 0.66 in fp32 and 0.42 to
0.55 where matmuls in 16 bit are fast; on an H200 0.57 (small steps) to 0.74."""

NOT_TO_BE_HAD = ("model.no_folder", "model.not_found", "model.fetch_failed", "model.no_modelscope", "model.hub_failed")
NOT_TO_BE_HAD += ("hub.unreachable", "hub.offline", "hub.incomplete", "hub.missing", "hub.refused")
"""Error codes of a model that is neither here nor can be fetched."""

TOKENIZER_FILES = ("token", "vocab", "merges", "spm", "spiece", ".model")
"""Parts of the names that files of a tokenizer have. Of some families transformers makes an empty one without any."""

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
DEVICES = ("cpu", "cuda")

ASSUMED_EXAMPLES = 1 << 16
"""As many rows of the greatest length as any step can draw stand for data that are not there."""


# ---- the machine ----


@dataclass(frozen=True)
class Machine:
    """The machine that a plan is for.

    Attributes:
        kind: "cpu" or "cuda".
        memory: bytes that a run may take.
        here: whether it is this machine, whose speed can be measured.
        assumed: what was assumed, in a sentence; "" where nothing was assumed.
    """

    kind: str
    memory: int
    here: bool
    assumed: str = ""

    @property
    def device(self) -> torch.device:
        return torch.device(self.kind)


def parse_memory(text: str) -> int:
    """Bytes of "24GB", "24 GiB", "512 MB"; GB are powers of ten, GiB of two.

    Raises:
        UsageError: not a number with such a unit.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", text, re.IGNORECASE)
    unit = UNITS.get(found[2].upper()) if found else None
    size = int(float(found[1]) * unit) if found and unit else 0
    if not size:
        raise UsageError(
            "plan.bad_memory",
            "--memory {value!r} is not valid: write a number with its unit, such as 24GB or 80GiB.",
            value=text,
        )
    return size


def describe_machine(memory: str, device: str, use_cpu: bool) -> Machine:
    """What `--memory` and `--device` name, or this machine.

    Without `--device`, memory is that of a CUDA GPU: whoever asks for another machine mostly means a GPU. A
    configuration that says `use_cpu` means a CPU.

    Raises:
        UsageError: an impossible size, an unknown device, or a GPU without its memory on a machine that has none.
    """
    if device and device not in DEVICES:
        raise UsageError(
            "plan.bad_device",
            "--device {value!r} is unknown; choose one of: {choices}.",
            value=device,
            choices=", ".join(DEVICES),
        )
    own = pick_device(use_cpu or device == "cpu")
    if not memory:
        if device == "cuda" and own.type != "cuda":
            raise UsageError(
                "plan.no_card",
                "--device cuda: this machine has no CUDA GPU; give the memory of the one to plan for, such as "
                "--memory 24GB.",
            )
        return Machine(own.type, free_memory(own), here=True)
    size = parse_memory(memory)
    if device or use_cpu:
        kind = device or "cpu"
        return Machine(kind, size, here=kind == own.type)
    return Machine(
        "cuda",
        size,
        here=own.type == "cuda",
        assumed=translate(
            "--memory {memory} without --device: planned for a CUDA GPU (--device cpu plans for a CPU).", memory=memory
        ),
    )


def precision_on(machine: Machine, request: PrecisionConfig) -> Precision:
    """As `resolve_precision`, by the hardware alone; a GPU that is not here is taken to compute in bf16, as all since
    2020 do."""
    if machine.kind == "cpu" or torch.cuda.is_available():
        return resolve_precision(request, machine.device)
    return Precision(torch.float32 if request.bf16 is False and not request.fp16 else torch.bfloat16)


# ---- the examples ----


@dataclass(frozen=True)
class Work:
    """The sizes of a run's examples.

    Attributes:
        known: whether they are the data's; else the greatest lengths are assumed.
    """

    counts: ExampleCounts
    known: bool

    @property
    def longest(self) -> int:
        return int(self.counts.lengths.max())

    def heaviest(self, examples: int, budget: int) -> list[int]:
        """The examples of the largest microbatch under a budget that a step can draw: the longest one, and as many of
        the next longest as fit."""
        lengths = self.counts.lengths
        order = np.argsort(lengths)[::-1]
        chosen = [int(order[0])]
        room, rank = budget - int(lengths[order[0]]), 1
        descending = lengths[order]
        while len(chosen) < examples and rank < len(order) and room > 0:
            rank = max(rank, int(np.searchsorted(-descending, -room, side="left")))
            if rank < len(order):
                chosen.append(int(order[rank]))
                room -= int(descending[rank])
                rank += 1
        return chosen

    def rows(self, chosen: Sequence[int], solo: bool, prompts: bool = False) -> list[PackedBatch]:
        """A microbatch of these examples, of any tokens: what the model is called with, one after another."""
        counts = self.counts
        made: list[Any] = []
        for index in chosen:
            length, targets = int(counts.lengths[index]), int(counts.targets[index])
            prompt, answer = int(counts.prompt[index]), int(counts.chosen[index])
            ids, labels = np.zeros(length, np.int32), np.full(length, IGNORE, np.int32)
            if not answer:  # trained at its end; where the targets lie makes no difference to memory
                labels[length - targets :] = 0
                made.append(Tokens(ids, labels))
                continue
            in_answer = int(counts.chosen_targets[index])
            labels[prompt + answer - in_answer : prompt + answer] = 0
            labels[length - (targets - in_answer) :] = 0
            made.append(TokenPair(ids, labels, prompt, answer))
        if counts.chosen[chosen[0]]:
            return list(pack_pairs(made, shared=not solo, prompts=prompts).rows)
        batch = pack(made)
        return list(batch.apart()) if solo else [batch]


def assumed_work(config: Config) -> Work:
    """Rows as long as the configuration allows, trained in every token (pairs: in every token of their answers)."""
    limit = config.data.max_seq_length
    count = min(config.step.examples_per_rank, ASSUMED_EXAMPLES)
    prompt, answer = 0, 0
    length, targets = limit, limit - 1
    if RECORDS_OF_TASK[config.task_type] == "pair":
        prompt = min(config.data.max_prompt_length or limit // 2, limit // 2)
        answer = limit - prompt
        length, targets = prompt + 2 * answer, 2 * answer
    sizes = (length, targets, length + prompt, prompt, answer, answer, 3 if answer else 1, 0)
    return Work(ExampleCounts(*(np.full(count, size, np.int64) for size in sizes)), known=False)


# ---- the plan ----


@dataclass(frozen=True)
class Duration:
    """An estimate of time.

    Attributes:
        flops: necessary FLOPs of a mean step.
        rate: FLOPs a second of matmuls; None if it is not known.
        measured: whether `rate` was measured, not given.
        steps: of the run; None if the data are not known.
    """

    flops: int
    rate: float | None
    measured: bool
    efficiency: float
    steps: int | None

    @property
    def step_seconds(self) -> float | None:
        return None if self.rate is None else self.flops / (self.rate * self.efficiency)

    @property
    def seconds(self) -> float | None:
        return None if self.step_seconds is None or self.steps is None else self.step_seconds * self.steps


@dataclass(frozen=True)
class Plan:
    """A run's memory and time, and what they rest on.

    Attributes:
        forecast: memory by part; without activations where `unknown` says why.
        choices: what a run would choose; None where it cannot be said.
        parameters: (trained, all).
        notes: what was assumed, in sentences.
        unknown: why activations cannot be forecast; "" where they are.
    """

    config: Config
    machine: Machine
    work: Work
    precision: Precision
    layout: str
    architecture: str
    forecast: Forecast
    choices: Choices | None
    parameters: tuple[int, int]
    duration: Duration
    notes: tuple[str, ...] = ()
    unknown: str = ""

    @property
    def fits(self) -> bool:
        return self.forecast.total <= self.forecast.available

    def as_dict(self) -> dict[str, Any]:
        """The value that `firefly plan --json` prints."""
        duration = self.duration
        return {
            "fits": self.fits,
            "complete": not self.unknown,
            "total_bytes": self.forecast.total,
            "available_bytes": self.forecast.available,
            "parts": self.forecast.parts,
            "machine": asdict(self.machine),
            "precision": self.precision.name,
            "product_rates": None if self.precision.rates is None else asdict(self.precision.rates),
            "architecture": self.architecture,
            "layout": self.layout,
            "trained_parameters": self.parameters[0],
            "parameters": self.parameters[1],
            "choices": None if self.choices is None else asdict(self.choices),
            "longest_example": self.work.longest,
            "lengths_known": self.work.known,
            "steps": duration.steps,
            "flops_per_step": duration.flops,
            "flops_per_second": duration.rate,
            "rate_measured": duration.measured,
            "efficiency": duration.efficiency,
            "seconds_per_step": duration.step_seconds,
            "seconds": duration.seconds,
            "notes": list(self.notes),
            "unknown": self.unknown or None,
        }


def make_plan(
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    memory: str = "",
    device: str = "",
    teraflops: float | None = None,
) -> Plan:
    """Plan a configuration (or overrides alone).

    Args:
        memory, device: the machine to plan for (`describe_machine`).
        teraflops: the rate of matmuls of that machine; None: measured, if it is this one.

    Raises:
        UsageError: the configuration, the data or an option is at fault.
    """
    given = load_config(source or {}, overrides, required=("model_name_or_path",))
    records = RECORDS_OF_TASK[given.task_type]
    config = TASKS[given.task_type].settle(given, BACKENDS["single"])
    machine = describe_machine(memory, device, bool(config.training.get("use_cpu")))
    notes = [machine.assumed] if machine.assumed else []
    data, rows, new = None, 0, []
    config = with_known_shape(config, notes)
    tokenizer = _tokenizer_of(config, notes)
    if tokenizer is not None:
        new = add_tokens(tokenizer, config.model.add_tokens)
        rows = len(tokenizer)
        if config.data.train_file:
            data = load_split(
                config.data, bind_encoder(config, tokenizer, records != "document"), records, config.model.hub
            )
            if not len(data.train):
                raise UsageError(
                    "plan.no_examples",
                    "train_file has no example to train; `firefly check` says what became of its rows.",
                )
            check_positions(config.model, data)
        else:
            notes.append(
                translate(
                    "no train_file, so lengths are not known: every example is taken to have {length} tokens "
                    "(max_seq_length).",
                    length=config.data.max_seq_length,
                )
            )
    if data is None and (most := positions_for(config.model, config.data.max_seq_length).most) is not None:
        notes.append(
            translate(
                "the model has {most:,} positions: rows longer than that are refused, whatever max_seq_length says.",
                most=most,
            )
        )
    work = assumed_work(config) if data is None else Work(data.train.counts, known=True)
    rate = None if teraflops is None else teraflops * 1e12
    return plan_run(config, machine, work, rate, rows, tuple(new), tuple(notes))


def with_known_shape(config: Config, notes: list[str]) -> Config:
    """Where the model's configuration cannot be had, and its shapes came along, those in its place, with a note."""
    try:
        read_config(config.model)
    except UsageError as error:
        shape = known_shape(config.model.name_or_path)
        if shape is None or error.code not in NOT_TO_BE_HAD:
            raise
        reason = first_line(error)
        notes.append(
            translate(
                "the shapes of {name} are those that Firefly brings along: {reason}",
                name=config.model.name_or_path,
                reason=reason,
            )
        )
        return replace(config, model=replace(config.model, name_or_path=str(shape), hub="huggingface", revision=None))
    return config


def _tokenizer_of(config: Config, notes: list[str]) -> Any:
    """The model's tokenizer; None, and a note, where there is none."""
    source = tokenizer_source(config.model, config.adapter.name_or_path)
    folder = Path(source or resolve_model(config.model))
    if not folder.is_dir() or any(part in file.name for file in folder.iterdir() for part in TOKENIZER_FILES):
        try:
            return load_tokenizer(config.model, source)
        except UsageError as error:
            if error.code not in ("model.unreadable", *NOT_TO_BE_HAD):
                raise
    notes.append(
        translate(
            "the model has no tokenizer here, so lengths are not known: every example is taken to have {length} "
            "tokens (max_seq_length).",
            length=config.data.max_seq_length,
        )
    )
    return None


def plan_run(
    config: Config,
    machine: Machine,
    work: Work,
    rate: float | None = None,
    rows: int = 0,
    new_tokens: tuple[int, ...] = (),
    notes: tuple[str, ...] = (),
) -> Plan:
    """Forecast memory and time of a run on examples of these sizes.

    Args:
        rate: of matmuls, FLOPs a second; None: measured, if the machine is this one.
        rows, new_tokens: see `build_meta_model`.
    """
    told: list[str] = []
    precision = settle_precision(
        config,
        precision_on(machine, config.precision),
        machine.device,
        work.counts,
        checkpoint_of(config),
        available=machine.memory,
        notify=lambda _, text, **values: told.append(translate(text, **values)),
    )
    with quiet_libraries():
        meta = build_meta_model(config, precision, rows, new_tokens, TASKS[config.task_type].HEAD == "score")
    inner, autocast = transformers_model(meta.model), autocast_type(config, precision.compute)
    crossover = GEMM_LONGEST.get(precision.compute, 0) if machine.kind == "cpu" else 0
    if machine.here:
        crossover = cached_crossover(inner, machine.device, precision.compute)
    use_crossover(inner, crossover)  # what attention keeps depends on it
    activations, unknown = None, ""
    try:
        longest = int(work.counts.sides.max())
        activations = counted_activations(inner, meta.layout, autocast, longest, device=machine.kind)
    except NoDryRun:
        unknown = translate(
            "{architecture}: what it computes depends on numbers (as a router's choice of experts does), so "
            "activations cannot be counted without computing. They are missing above; a run measures them at its "
            "start.",
            architecture=meta.architecture,
        )
    sizing = Sizing(
        config=config,
        model=meta.model,
        compute=precision.compute,
        device=machine.device,
        counts=work.counts,
        activations=activations,
        optimizer=optimizer_state_bytes(meta.model, _optimizer_arguments(config)),
        crossover=crossover,
        available=machine.memory,
    )
    if activations is None:
        choices, trained = None, sum(4 * p.numel() for p in meta.model.parameters() if p.requires_grad)
        forecast = sizing.forecast(Peak(0, 0, trained), 0)
    else:
        choices, forecast = _forecast(sizing, meta, work, autocast)
    measured = rate is None and machine.here
    if measured:
        rates = precision.rates  # where the type was chosen by them
        rate = rates.of(precision.compute) if rates else matmul_rate(inner, precision.compute, machine.device)
    return Plan(
        config=config,
        machine=machine,
        work=work,
        precision=precision,
        layout=meta.layout,
        architecture=meta.architecture,
        forecast=forecast,
        choices=choices,
        parameters=count_parameters(meta.model),
        duration=_duration(sizing, choices, work, rate, measured),
        notes=(*notes, *told, *meta.notes),
        unknown=unknown,
    )


def checkpoint_of(config: Config) -> Path | None:
    """The checkpoint that a run would continue from, if it is there."""
    asked = config.resume_from_checkpoint
    if isinstance(asked, str):
        found = Path(asked).expanduser()
        return found if found.is_dir() and not missing_files(found) else None
    return newest_complete(Path(config.output_dir).expanduser()) if asked and config.output_dir else None


def _forecast(sizing: Sizing, meta: MetaModel, work: Work, autocast: torch.dtype | None) -> tuple[Choices, Forecast]:
    """What a run would choose, and its memory with the peak of the largest microbatch that a step can draw, others of
    the step behind it."""
    inner, task, solo = transformers_model(meta.model), TASKS[sizing.config.task_type], meta.layout == "solo"
    # A run chooses once its weights are loaded: they are gone from what is free.
    empty = sizing.estimate(Checkpointing(), 0, 0)
    held = empty.loaded or sum(empty.parts.get(name, 0) for name in ("weights", "adapter"))
    choices = replace(sizing, available=max(sizing.available - held, 0)).choose()
    install_checkpointing(inner, choices.checkpointing)
    budget, examples = choices.tokens_per_microbatch, sizing.config.step.examples_per_rank
    peak = dry_run(
        inner,
        work.rows(work.heaviest(1 if solo else examples, budget), solo, task.trains_prompt(sizing.config)),
        solo=solo,
        autocast=autocast,
        per_token=task.HEAD == "logps",
        accumulated=min(examples, len(work.counts.lengths)) > 1 if solo else sizing.lengths.step > budget,
        device=sizing.device.type,
    )
    return choices, sizing.forecast(peak, sum(sizing.cacheable[: choices.cached_weights]))


def _optimizer_arguments(config: Config) -> Any:
    """What of `TrainingArguments` an optimizer is made from, on any machine. Made as a whole they would set
    accelerate's state of the process."""
    own = {field.name: field.default for field in fields(TrainingArguments)} | dict(config.training)
    optim = OptimizerNames(own["optim"])
    return SimpleNamespace(**(own | {"optim": optim, "parallel_mode": ParallelMode.NOT_PARALLEL}))


def _duration(sizing: Sizing, choices: Choices | None, work: Work, rate: float | None, measured: bool) -> Duration:
    config, lengths = sizing.config, work.counts.lengths
    layers = len(decoder_layers(transformers_model(sizing.model)))
    examples = min(config.step.examples_per_rank, len(lengths))
    flops = necessary_flops(
        linears_of(sizing.model, config.adapter.mode == "full"),
        tokens=round(float(lengths.mean()) * examples),
        targets=round(float(work.counts.targets.mean()) * examples),
        reference=TASKS[config.task_type].asks_reference(config),
        recomputed=choices.checkpointed_layers / layers if choices and layers else 0.0,
    )
    steps = None  # on one process
    if (most := int(config.training.get("max_steps", -1))) > 0:
        steps = most
    elif work.known:
        per_epoch = math.ceil(len(lengths) / config.step.examples_per_rank)
        steps = math.ceil(float(config.training.get("num_train_epochs", 3.0)) * per_epoch)
    known = EFFICIENCY if sizing.compute == torch.float32 else EFFICIENCY | EFFICIENCY_16_BIT
    return Duration(flops, rate, measured, known[sizing.device.type], steps)
