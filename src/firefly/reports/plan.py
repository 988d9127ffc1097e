"""`firefly plan`: what a run will take of memory and time, from the model's config.json, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from firefly import ranks
from firefly.config import Config, load_config
from firefly.data.dataset import Split, load_split
from firefly.distributed.backends import BACKENDS
from firefly.errors import UsageError
from firefly.files import first_line
from firefly.models import choices as choosing
from firefly.models.adapters import count_body, count_parameters, transformers_model
from firefly.models.attention import use_crossover
from firefly.models.checkpointing import Checkpointing, decoder_layers, install_checkpointing
from firefly.models.choices import Choices, Lengths
from firefly.models.dry_run import NoDryRun, counted_activations, dry_run
from firefly.models.flops import Products, necessary_flops
from firefly.models.kernels.lora_linear import cache_sizes
from firefly.models.kernels.segment_attention import GEMM_LONGEST
from firefly.models.known_shapes import known_shape
from firefly.models.loading import load_tokenizer, quiet_libraries, read_config, resolve_model
from firefly.models.memory import (
    Activations,
    Forecast,
    Peak,
    assemble,
    forecast_memory,
    kernels_kept,
    optimizer_bytes_of,
)
from firefly.models.outline import Outline, outline
from firefly.models.positions import positions_for
from firefly.models.precision import Precision
from firefly.models.saved_adapter import tokenizer_source
from firefly.models.tokens import add_tokens
from firefly.models.verdicts import known_crossover
from firefly.reports.machine import Machine, describe_machine, matmul_rate, precision_on
from firefly.reports.work import Work, assumed_work, work_of
from firefly.setup.checks import bind_encoder, check_positions
from firefly.tasks import TASKS
from firefly.tasks.preference_losses import PREFERENCE_LOSSES
from firefly.translation import translate

EFFICIENCY, EFFICIENCY_16_BIT = {"cpu": 0.6, "cuda": 0.65}, {"cpu": 0.5}
"""The share of the rate of matrix products that a run reaches (docs/performance.md): on a CPU 0.57 to 0.66 in fp32 and
0.42 to 0.55 where products in 16 bit are fast; on an H200 0.57 (small steps) to 0.74."""

NOT_TO_BE_HAD = ("model.no_folder", "model.not_found", "model.fetch_failed", "model.no_modelscope", "model.hub_failed")
NOT_TO_BE_HAD += ("hub.unreachable", "hub.offline", "hub.incomplete", "hub.missing", "hub.refused")
"""What it is called that a model is not here and cannot be fetched."""

TOKENIZER_FILES = ("token", "vocab", "merges", "spm", "spiece", ".model")
"""Parts of the names that files of a tokenizer have. Of some families transformers makes an empty one without any."""


@dataclass(frozen=True)
class Duration:
    """An estimate of time.

    Attributes:
        flops: necessary FLOPs of a mean step.
        rate: FLOPs a second of matrix products; None if it is not known.
        measured: whether `rate` was measured here and now, and not told.
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
    """Attributes:
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
    config_file: str, overrides: Mapping[str, Any], memory: str = "", device: str = "", teraflops: float | None = None
) -> tuple[Plan, Split | None]:
    """Plan a configuration (or overrides alone); the data come back, too, where they are there.

    Args:
        memory, device: the machine to plan for (`describe_machine`).
        teraflops: the rate of matrix products of that machine; None: measured, if it is this one.

    Raises:
        UsageError: the configuration, the data or an option is at fault.
    """
    given = load_config(config_file or {}, overrides, required=("model_name_or_path",))
    task = TASKS[given.task_type]
    config = task.settle(given, BACKENDS["single"])
    machine = describe_machine(memory, device, bool(config.training.get("use_cpu")))
    notes = [machine.assumed] if machine.assumed else []
    data, rows, new = None, 0, []
    config = _with_known_shape(config, notes)
    tokenizer = _tokenizer_of(config, notes)
    if tokenizer is not None:
        new = add_tokens(tokenizer, config.model.add_tokens)
        rows = len(tokenizer)
        if config.data.train_file:
            data = load_split(
                config.data, bind_encoder(config, tokenizer, task.CHATS), config.task_type, config.model.hub
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
    work = assumed_work(config) if data is None else work_of(data.train)
    rate = None if teraflops is None else teraflops * 1e12
    return forecast(config, machine, work, rate, rows, tuple(new), tuple(notes)), data


def _with_known_shape(config: Config, notes: list[str]) -> Config:
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


def forecast(
    config: Config,
    machine: Machine,
    work: Work,
    rate: float | None = None,
    rows: int = 0,
    new_tokens: tuple[int, ...] = (),
    notes: tuple[str, ...] = (),
    timed: bool = True,
) -> Plan:
    """Forecast memory and time of a run on examples of these sizes.

    Args:
        rate: of matrix products, FLOPs a second; None: measured where `timed`.
        rows, new_tokens: see `outline`.
    """
    precision = precision_on(machine, config.precision)
    with quiet_libraries():
        skeleton = outline(config, precision, rows, new_tokens)
    sizing = _Sizing(config, machine, work, precision, skeleton)
    choices, unknown = None, ""
    try:
        choices = sizing.choose()
        peak = sizing.peak(choices)
    except NoDryRun:
        unknown = translate(
            "{architecture}: what it computes depends on numbers (as a router's choice of experts does), so "
            "activations cannot be counted without computing. They are missing above; a run measures them at its "
            "start.",
            architecture=skeleton.architecture,
        )
        peak = Peak(0, 0, sizing.trained_bytes)
    return Plan(
        config=config,
        machine=machine,
        work=work,
        precision=precision,
        layout=skeleton.layout,
        architecture=skeleton.architecture,
        forecast=sizing.assemble(peak, choices),
        choices=choices,
        parameters=count_parameters(skeleton.model),
        duration=sizing.duration(choices, rate, timed),
        notes=(*notes, *skeleton.notes),
        unknown=unknown,
    )


@dataclass(frozen=True)
class _Sizing:
    """The steps from a skeleton to a forecast."""

    config: Config
    machine: Machine
    work: Work
    precision: Precision
    skeleton: Outline

    @property
    def inner(self) -> Any:
        return transformers_model(self.skeleton.model)

    @property
    def full(self) -> bool:
        return self.config.adapter.mode == "full"

    @property
    def autocast(self) -> torch.dtype | None:
        return self.precision.compute if self.full and self.precision.compute != torch.float32 else None

    @property
    def solo(self) -> bool:
        return self.skeleton.layout == "solo"

    @property
    def card(self) -> bool:
        return self.machine.kind == "cuda"

    @property
    def trained_bytes(self) -> int:
        return sum(4 * p.numel() for p in self.skeleton.model.parameters() if p.requires_grad)

    @property
    def lengths(self) -> Lengths:
        return Lengths(self.work.longest, self.work.largest_step(self.config.step.examples_per_rank))

    @property
    def optimizer_bytes(self) -> int:
        return optimizer_bytes_of(str(self.config.training.get("optim", "")))

    @property
    def with_reference(self) -> bool:
        """Whether a preference loss asks a reference in every step."""
        settings = self.config.preference
        return (
            self.config.task_type == "dpo"
            and bool(PREFERENCE_LOSSES[settings.loss].reference)
            and not settings.precompute_reference
        )

    @property
    def reference_bytes(self) -> int:
        """Of a second model (full), or of the adapter that training starts from."""
        if not self.with_reference:
            return 0
        if self.full:
            return sum(p.numel() for p in self.skeleton.model.parameters()) * self.precision.compute.itemsize
        return self.trained_bytes if self.config.adapter.name_or_path else 0

    def choose(self) -> Choices:
        """What a run on the machine would choose."""
        crossover = 0
        if self.machine.here:
            crossover = known_crossover(self.inner, self.machine.device, self.precision.compute)
        elif self.machine.kind == "cpu":
            crossover = GEMM_LONGEST
        use_crossover(self.inner, crossover)  # what attention keeps depends on it
        activations = counted_activations(
            self.inner, self.skeleton.layout, self.autocast, int(self.work.sides.max()), card=self.card
        )
        return choosing.choose(
            self.config.step,
            activations,
            lambda *asked: self._room(activations, *asked),
            self.lengths,
            self.machine.device,
            cache_sizes(self.inner, self.precision.compute),
            crossover,
            self.precision.compute,
        )

    def _room(self, activations: Activations, checkpointing: Checkpointing, tokens: int, cached: int) -> Forecast:
        """As a run sees it once the weights are loaded: they are gone from what is free."""
        state = self.optimizer_bytes
        arguments = (self.skeleton.model, self.machine.device, activations, checkpointing, tokens, state, cached)
        found = forecast_memory(*arguments, self.reference_bytes, available=self.machine.memory)
        held = found.parts["weights"] + found.parts["masters"]
        return replace(found, loaded=held if self.card else 0, available=max(self.machine.memory - held, 0))

    def peak(self, choices: Choices) -> Peak:
        """Of the largest microbatch that a step can draw, others of the step behind it."""
        install_checkpointing(self.inner, choices.checkpointing)
        examples = 1 if self.solo else self.config.step.examples_per_rank
        chosen = self.work.heaviest(examples, choices.tokens_per_microbatch)
        pairs = self.config.task_type == "dpo"
        prompts = pairs and PREFERENCE_LOSSES[self.config.preference.loss].trains_prompt
        return dry_run(
            self.inner,
            self.work.rows(chosen, self.solo, prompts),
            solo=self.solo,
            autocast=self.autocast,
            per_token=pairs,
            accumulated=self.microbatches(choices) > 1,
            card=self.card,
        )

    def microbatches(self, choices: Choices) -> int:
        """Of a large step."""
        examples = min(self.config.step.examples_per_rank, len(self.work.lengths))
        budget = choices.tokens_per_microbatch
        return examples if self.solo else min(examples, math.ceil(self.lengths.step / budget))

    def assemble(self, peak: Peak, choices: Choices | None) -> Forecast:
        cache = cache_sizes(self.inner, self.precision.compute)
        computed = 1 if choices is None else self.microbatches(choices)
        return assemble(
            self.skeleton.model,
            self.machine.kind,
            peak,
            optimizer_bytes=self.optimizer_bytes,
            cache=0 if choices is None else sum(cache[: choices.cached_weights]),
            reference=self.reference_bytes,
            microbatches=computed * (self.steps or 1000),
            shapes=len(np.unique(self.work.lengths)) if self.work.known else 1000,
            kernels=kernels_kept(self.config.task_type, self.work.lengths, self.work.targets),
            available=self.machine.memory,
        )

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the run on one process; None if the data are not known."""
        training = self.config.training
        if (most := int(training.get("max_steps", -1))) > 0:
            return most
        if not self.work.known:
            return None
        per_epoch = math.ceil(len(self.work.lengths) / self.config.step.examples_per_rank)
        return math.ceil(float(training.get("num_train_epochs", 3.0)) * per_epoch)

    def duration(self, choices: Choices | None, rate: float | None, timed: bool) -> Duration:
        products = products_of(self.skeleton.model, self.full)
        layers = len(decoder_layers(self.inner))
        again = choices.checkpointed_layers / layers if choices and layers else 0.0
        examples = min(self.config.step.examples_per_rank, len(self.work.lengths))
        flops = necessary_flops(
            products,
            tokens=round(float(self.work.lengths.mean()) * examples),
            targets=round(float(self.work.targets.mean()) * examples),
            reference=self.with_reference,
            again=again,
        )
        measured = rate is None and timed and self.machine.here
        if measured:
            rate = matmul_rate(_sizes(self.inner), self.precision.compute, self.machine.device)
        known = EFFICIENCY if self.precision.compute == torch.float32 else EFFICIENCY | EFFICIENCY_16_BIT
        return Duration(flops, rate, measured, known[self.machine.kind], self.steps)


def products_of(model: Any, full: bool) -> Products:
    """The linear layers of a prepared model; adapters are what is trained of it."""
    inner = transformers_model(model)
    adapters = 0 if full else count_parameters(model)[0]
    head = inner.get_output_embeddings()
    own = 0 if head is None else head.weight.numel()
    tied = head is not None and head.weight is inner.get_input_embeddings().weight
    return Products(body=count_body(model) - adapters - (0 if tied else own), head=own, adapters=adapters)


def _sizes(model: Any) -> list[tuple[int, int]]:
    """(outputs, inputs) of the linear layers of one decoder layer, each shape once."""
    layers = decoder_layers(model)
    found = {}
    for module in (layers[0] if layers else model).modules():
        features = getattr(module, "out_features", None), getattr(module, "in_features", None)
        if all(isinstance(size, int) for size in features):
            found[features] = None
    return [(int(out), int(into)) for out, into in found] or [(1024, 1024)]


def plan_with(plan: Plan, config: Config, work: Work | None = None, rows: int = 0) -> Plan:
    """The same plan with another configuration, without measuring time."""
    return forecast(config, plan.machine, work or plan.work, plan.duration.rate, rows, timed=False)


def local_cards() -> int:
    """CUDA cards of this machine, or processes that share a step, if more."""
    return max(torch.cuda.device_count() if torch.cuda.is_available() else 0, ranks.world_size())
