"""`firefly train`: from a configuration to a trained model, in one straight line."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.training_args import OptimizerNames
from transformers.utils import logging as transformers_logging

from firefly import ranks
from firefly.config import SMOOTHED_LOSSES, AdapterConfig, Config, names_in
from firefly.console import notice, stderr_console, take_notices
from firefly.data.batching import ExampleList, steps_per_epoch
from firefly.data.blocks import Blocks
from firefly.data.certificate import FILE_NAME as CERTIFICATE
from firefly.data.certificate import Certificate, certify
from firefly.data.dataset import PREPARATION_KEYS, Split, cache_folder, load_split
from firefly.data.encoding import Encoder
from firefly.data.examples import Examples
from firefly.data.formats import TaskName
from firefly.data.templates import bind_template, plain_template
from firefly.errors import UsageError
from firefly.inference.engine import tokenizer_source
from firefly.messages import render
from firefly.models import choices as choosing
from firefly.models.adapters import adapter_settings, attach_adapter, count_parameters, transformers_model
from firefly.models.checkpointing import Checkpointing, decoder_layers
from firefly.models.choices import Choices, Lengths
from firefly.models.compilation import compile_layers
from firefly.models.forwards import install_training_forwards
from firefly.models.kernels import segment_attention
from firefly.models.kernels.segment_attention import describe_attention
from firefly.models.kernels.weight_cache import cache_sizes
from firefly.models.loading import load_model, load_tokenizer, resolve_model
from firefly.models.memory import (
    Forecast,
    assemble,
    estimated_peak,
    forecast_memory,
    free_memory,
    kernels_kept,
    optimizer_bytes_of,
)
from firefly.models.precision import Precision, pick_device, resolve_precision
from firefly.models.tokens import add_tokens, fit_embeddings
from firefly.models.verdicts import known_activations, known_crossover, known_layout
from firefly.objectives.engines import Engine, divide, load_whole, resolve_engine
from firefly.objectives.preference import PREFERENCE_LOSSES
from firefly.objectives.preference_trainer import PreferenceTrainer, disable_dropout
from firefly.objectives.reference import AdapterOff, FrozenAdapter, FrozenModel, Reference, Untrained
from firefly.objectives.router import quiet_routers
from firefly.objectives.trainers import BeforeTraining, CausalTrainer, StepOptions, StepTrainer, training_arguments
from firefly.runs.checkpoints import (
    OPTIMIZER_SETTINGS,
    TRAINING_SETTINGS,
    RunPlan,
    check_same_run,
    find_checkpoint,
    set_aside_old_checkpoints,
    stored_choices,
)
from firefly.runs.folders import remove_leftovers
from firefly.runs.lock import only_run
from firefly.runs.memory import keep_few_kernels, keep_freed_memory, memory_in_use, peak_memory
from firefly.runs.metrics import Guarded, Progress, RunRecorder
from firefly.runs.overview import show_example, show_peak, show_run
from firefly.runs.passport import (
    adapter_hash,
    git_commit,
    hardware,
    package_versions,
    record_memory,
    recorded_end,
    weights_hash,
    write_json,
)
from firefly.runs.state import RUNNING, this_process
from firefly.runs.trackers import PassportReporter, choose_trackers, never_ask


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

PAGED_ADAM = (OptimizerNames.PAGED_ADAMW,)
"""Adam with 32-bit state that bitsandbytes moves to the CPU's memory when the card runs out of its own."""

FUSED_ADAM = OptimizerNames.ADAMW_TORCH_FUSED
"""The same update in a few launches for all weights, where the other has one for each."""


def train(config: Config) -> Path:
    """Train as configured; return the directory that holds the result.

    Raises:
        UsageError: the configuration, the data or the checkpoint to continue from is at fault, and nothing was trained;
            or a loss was not a number, or the disk did not take the result: checkpoints are there.
        Interrupted: a signal stopped the run between two steps, and left a checkpoint.
    """
    started = time.time()
    engine = resolve_engine(config)
    output_dir = Path(config.output_dir).expanduser()
    refuse_own_source(config, output_dir)
    make_output_dir(output_dir)
    with only_run(output_dir):
        return train_into(output_dir, config, engine, started)


def train_into(output_dir: Path, config: Config, engine: Engine, started: float) -> Path:
    """`train`, in a folder that is there and that no other run writes into."""
    task = TASKS[config.task_type]
    config = with_reference_first(without_dropout(config), engine)
    device = pick_device(bool(config.training.get("use_cpu")))
    imported = memory_in_use(device)
    precision = resolve_precision(config.precision, device)
    if config.adapter.name_or_path:
        adapter_settings(config.adapter.name_or_path)  # a wrong path is cheap to find now
    tokenizer = load_tokenizer(config.model, tokenizer_source(config.model, config.adapter.name_or_path))
    added = add_tokens(tokenizer, config.model.add_tokens)
    encoder = bind_encoder(config, tokenizer)
    # Before weights: faults of the data are cheap to find. And before ranks are joined: none times out on it.
    data = load_split(config.data, encoder, config.task_type, config.model.hub)
    try:
        data.check(config.data)
    except UsageError:  # it names where all findings are
        write_json(output_dir / "data_report.json", data.report())
        raise
    check_best_metric(config, task, data)
    if device.type == "cpu" and ranks.started_alone():
        notice("engine.one_process")
    keep_few_kernels(kernels_kept(config.task_type, data.train.counts.lengths, data.train.counts.targets))
    args = join_ranks(config, engine, precision, device)
    checkpoint = ranks.from_first(find_checkpoint(output_dir, config.resume_from_checkpoint))
    set_seed(args.seed)
    # Divided weights are loaded whole into the CPU's memory, where the model is tested.
    place = torch.device("cpu") if engine.divides_weights else device
    with ThreadPoolExecutor(1) as beside:  # hashing leaves the interpreter free to load what is hashed
        hashed = beside.submit(weights_hash, resolve_model(config.model))
        model = load_model(config.model, config.adapter.mode, precision, place)
    layout = known_layout(model)
    certificate = None
    if task.chats:
        model.generation_config.eos_token_id = list(encoder.template.stop_ids)
        certificate = prove_template(encoder)
    model = attach_adapter(model, config.adapter, fit_embeddings(model, tokenizer, added), config.given)
    if quiet := quiet_routers(model):
        notice("router.quiet", count=len(quiet))
    head = install_training_forwards(model)
    base = identify_base(hashed.result(), model)
    plan = run_plan(config, args, layout[0], data.train, base, encoder, precision, engine)
    parameters = count_parameters(model)
    if checkpoint:
        check_same_run(checkpoint, plan, config.resume_anyway)
    if checkpoint is None or isinstance(config.resume_from_checkpoint, str):
        set_aside_old_checkpoints(output_dir, checkpoint)
    if certificate:  # not before: a run that is refused leaves an earlier one's as it was
        write_json(output_dir / CERTIFICATE, certificate.as_dict())
    remove_leftovers(output_dir)
    choices, forecast = resolve_choices(
        config, args, model, data.train, layout[0], precision, device, checkpoint, engine, plan.total_steps
    )
    choosing.apply(choices, transformers_model(model), precision.compute)
    if choices.unpaged_optimizer and args.optim in PAGED_ADAM:
        notice("optim.unpaged", asked=args.optim.value, used=FUSED_ADAM.value)
        args.optim = FUSED_ADAM
    options = objective_options(config, model, precision)
    divide(engine, model, args)
    trainer = task.trainer(
        model=model,
        args=args,
        examples=data.train,
        held_out=data.held_out,
        sources=data.train.names if data.held_out is None else data.held_out.names,
        tokenizer=tokenizer,
        options=StepOptions(
            plan.examples_per_step,
            choices,
            plan.seed,
            plan.shuffle,
            plan.layout,
            config.step.on_nonfinite_loss,
            engine,
        ),
        precision=precision,
        masters=config.adapter.mode == "full",
        callbacks=callbacks(config),
        **options,
    )
    if ranks.rank():
        torch.manual_seed(args.seed + ranks.rank())  # ranks draw dropout of their own
    if wants_compiling(config):  # a copied reference stays as it is
        compile_model(config, model)
    if isinstance(trainer, PreferenceTrainer) and config.preference.precompute_reference and trainer.reference:
        ask_reference_first(trainer, config, plan, precision, data, engine, checkpoint)
    trainer.checkpoint_plan = lambda: asdict(plan) | {"choices": asdict(trainer.options.choices)}
    recorder = RunRecorder(output_dir, trainer.counts, started)
    replace_progress(trainer, recorder)
    console = stderr_console()
    show_example(console, data.train[0], tokenizer)
    show_run(
        console,
        data.train,
        describe_steps(config, data, trainer),
        parameters,
        layout,
        head,
        precision,
        forecast,
        device,
    )
    if ranks.world_size() > 1:
        console.print(describe_ranks(config, trainer), soft_wrap=True)
    console.print(describe_choices(choices, transformers_model(model), precision, device), soft_wrap=True)
    write_records(
        config, output_dir, encoder, data, certificate, base, trainer, precision, device, checkpoint, forecast
    )
    keep_freed_memory(device)
    with recorded_end(output_dir):
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if checkpoint and not trainer.counts.steps:
            notice("resume.nothing_left", path=checkpoint, steps=trainer.state.global_step)
        trainer.save_result()
        if trainer.counts.steps or not (output_dir / "train_results.json").is_file():
            measured = peak_memory(device) - imported
            results = recorder.results(result.metrics, trainer.skipped, device)
            write_json(output_dir / "train_results.json", results | forecast.beside(measured, device.type))
            record_memory(output_dir, forecast.beside(measured, device.type))
            show_peak(console, forecast.beside(measured, device.type))
        recorder.draw()
    console.print(render("train.done", path=output_dir), soft_wrap=True)
    return output_dir


def without_dropout(config: Config) -> Config:
    """Preference training compares two passes of one model, so no dropout may stand between them."""
    if config.task_type != "dpo" or config.adapter.mode == "full" or not config.adapter.dropout:
        return config
    if "lora_dropout" in config.given:
        notice("preference.no_dropout", value=config.adapter.dropout)
    return replace(config, adapter=replace(config.adapter, dropout=0.0))


def with_reference_first(config: Config, engine: Engine) -> Config:
    """Where weights are divided among ranks, a reference that is no adapter switched off is asked before training."""
    settings = config.preference
    needed = config.task_type == "dpo" and bool(PREFERENCE_LOSSES[settings.loss].reference)
    second = config.adapter.mode == "full" or config.adapter.name_or_path
    if not (needed and second and engine.divides_weights) or settings.precompute_reference:
        return config
    notice("engine.reference_first", engine=engine.name)
    return replace(config, preference=replace(settings, precompute_reference=True))


def ask_reference_first(
    trainer: PreferenceTrainer,
    config: Config,
    plan: RunPlan,
    precision: Precision,
    data: Split,
    engine: Engine,
    checkpoint: Path | None,
) -> None:
    """The reference's log-probabilities, once and before the first step; where weights are divided, after they are."""
    parts = reference_parts(config, plan, precision)
    fingerprints = data.train.fingerprint, data.held_out.fingerprint if data.held_out else None
    if not engine.divides_weights:
        trainer.precompute_reference(parts, fingerprints)
    elif checkpoint is None:
        trainer.add_callback(BeforeTraining(lambda: trainer.precompute_reference(parts, fingerprints)))
    elif not trainer.take_reference(parts, fingerprints):
        raise UsageError("engine.no_reference", path=cache_folder(), engine=engine.name)


def objective_options(config: Config, model: Any, precision: Precision) -> dict[str, Any]:
    """What a preference trainer takes beside what every trainer takes; the reference is copied before any step."""
    if config.task_type != "dpo":
        return {}
    disable_dropout(model)
    loss = PREFERENCE_LOSSES[config.preference.loss]
    return {
        "preference": config.preference,
        "reference": make_reference(config, model, precision) if loss.reference else None,
    }


def make_reference(config: Config, model: Any, precision: Precision) -> Reference:
    """The model as it stands now, before this run changes it."""
    if config.adapter.mode == "full":
        # With the log-probabilities computed beforehand the untrained model itself serves, and no copy is kept.
        return Untrained() if config.preference.precompute_reference else FrozenModel(model, precision.compute)
    if config.adapter.name_or_path:
        return Untrained() if config.preference.precompute_reference else FrozenAdapter(model)
    return AdapterOff()


def reference_parts(config: Config, plan: RunPlan, precision: Precision) -> list[Any]:
    """What the log-probabilities of a reference depend on, besides the examples."""
    return [plan.base_weights, plan.add_tokens, plan.adapter, config.adapter.mode == "qlora", precision.name]


def callbacks(config: Config) -> list[Any]:
    """What looks on while a run trains, besides the recorder and the writer of plans."""
    if config.evaluation.patience is None:
        return []
    return [EarlyStoppingCallback(config.evaluation.patience, config.evaluation.threshold)]


def identify_base(hashed: dict[str, Any], model: Any) -> dict[str, Any]:
    """The passport's word on the base: the hash of its files or, for a hub's model, the commit that was loaded."""
    if "sha256" in hashed:
        return hashed
    return hashed | {"commit": getattr(transformers_model(model).config, "_commit_hash", None)}


def wants_compiling(config: Config) -> bool:
    """Whether `torch_compile` is on; as in transformers, to choose its backend or mode is to ask for it."""
    named = any(config.training.get(name) for name in ("torch_compile_backend", "torch_compile_mode"))
    return bool(config.training.get("torch_compile", named))


def compile_model(config: Config, model: Any) -> None:
    """Compile what can be, and say what that is."""
    backend, mode = config.training.get("torch_compile_backend"), config.training.get("torch_compile_mode")
    if count := compile_layers(model, backend, mode):
        notice("compile.layers", count=count)
    else:
        notice("compile.nothing", name=type(transformers_model(model)).__name__)


def join_ranks(config: Config, engine: Engine, precision: Precision, device: torch.device) -> TrainingArguments:
    """TrainingArguments of this run; to make them forms the process group, where there are several ranks."""
    args = training_arguments(resolved_arguments(config, precision, device) | engine.arguments(precision))
    if args.n_gpu > 1:  # one process: transformers would split each batch among the cards (DataParallel)
        notice("engine.one_card", count=args.n_gpu)
        args._n_gpu = 1
    load_whole(args)
    return args


def refuse_own_source(config: Config, output_dir: Path) -> None:
    """A run must not write over the model or the adapter that it starts from."""
    sources = {"model_name_or_path": config.model.name_or_path, "adapter_name_or_path": config.adapter.name_or_path}
    for key, source in sources.items():
        if not source:
            continue
        place, output = Path(source).expanduser().resolve(), output_dir.resolve()
        if place == output or (place.parent == output and place.name.startswith("checkpoint-")):
            raise UsageError("config.output_is_source", key=key, path=output_dir)


def make_output_dir(path: Path) -> None:
    """Create the output folder, and find out now rather than at the first checkpoint that it cannot be written."""
    if not ranks.is_first():
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".firefly-write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError("config.output_dir", path=path, problem=error.strerror or error) from None


def bind_encoder(config: Config, tokenizer: Any) -> Encoder:
    """The template of the configuration on this tokenizer; the tokenizer carries it from here on, and saves it.

    Pretraining renders nothing: the tokenizer keeps the template it came with, if any.
    """
    data = config.data
    if not TASKS[config.task_type].chats:
        return Encoder(tokenizer, plain_template(), data.allow_special_in_content)
    template = bind_template(
        data.template_name, tokenizer, on_system=data.on_system, thinking=data.thinking, date=data.template_date
    )
    if template.system_role != "rendered" and data.on_system == "merge":
        notice("template.merges_system", name=template.name)
    tokenizer.chat_template = template.text
    return Encoder(tokenizer, template, config.data.allow_special_in_content)


def prove_template(encoder: Encoder) -> Certificate:
    """Prove the template on this tokenizer; what of it fails is said."""
    certificate = certify(encoder, encoder.template.stop_ids)
    for check in certificate.checks:
        if not check.passed:
            notice("certificate.failed", name=encoder.template.name, check=check.name, detail=check.detail)
    return certificate


def check_best_metric(config: Config, task: Task, data: Split) -> None:
    """Refuse a metric that no evaluation of this run will have: transformers would miss it after the first one."""
    asked = config.training.get("metric_for_best_model")
    sources = data.train.names if data.held_out is None else data.held_out.names
    known = [*task.trainer.METRICS, *(f"loss/{name}" for name in sources if len(sources) > 1)]
    if asked and asked.removeprefix("eval_") not in known:
        choices = ", ".join(map(json.dumps, known))
        raise UsageError("config.bad_choice", key="metric_for_best_model", value=json.dumps(asked), choices=choices)


def resolved_arguments(config: Config, precision: Precision, device: torch.device) -> dict[str, Any]:
    """TrainingArguments of this run: the user's, with what Firefly consumes itself folded or switched off."""
    values = dict(config.training)
    values |= {
        "output_dir": str(Path(config.output_dir).expanduser()),
        "per_device_train_batch_size": config.step.examples_per_rank,
        "gradient_accumulation_steps": 1,
        "fp16": precision.scaled,  # loss scaling for GPUs without bf16; types are otherwise ours
        "bf16": False,
        "use_cpu": device.type == "cpu",
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,  # it waits for the device in every step
        "ddp_find_unused_parameters": False,
        "label_names": [],
        # Compiled whole, a model would be compiled again for every packing (see `models.compilation`).
        "torch_compile": False,
        "torch_compile_backend": None,
        "torch_compile_mode": None,
        # A signal leaves a checkpoint anyway (see `runs.interruption`).
        "enable_jit_checkpoint": False,
        "restore_callback_states_from_checkpoint": config.evaluation.patience is not None,
        "report_to": choose_trackers(values.get("report_to"), "report_to" in config.given) or "none",
        "run_name": values.get("run_name") or Path(config.output_dir).expanduser().name,  # what trackers call it
    }
    values.setdefault("per_device_eval_batch_size", config.step.examples_per_rank)
    best = values.get("metric_for_best_model")
    if best and values.get("greater_is_better") is None:  # transformers takes a perplexity for better the higher it is
        values["greater_is_better"] = not any(word in best for word in ("loss", "perplexity"))
    optim = str(values.get("optim", ""))
    if device.type == "cpu" and optim.startswith("paged_"):
        values["optim"] = "adamw_torch_fused" if optim == "paged_adamw_32bit" else optim.removeprefix("paged_")
        notice("optim.paged", asked=optim, used=values["optim"])
    if device.type == "cpu" and values.get("dataloader_pin_memory") is None:
        values["dataloader_pin_memory"] = False
    return values


def resolve_choices(
    config: Config,
    args: TrainingArguments,
    model: Any,
    examples: ExampleList,
    layout: str,
    precision: Precision,
    device: torch.device,
    checkpoint: Path | None,
    engine: Engine,
    steps: int,
) -> tuple[Choices, Forecast]:
    """Resolve what is "auto", by measurement or from the checkpoint, and forecast the memory of a run so trained.

    The same on every rank: the choices of the one with the least memory. The forecast is `firefly plan`'s, but for what
    a step takes besides weights: that is estimated from what a pass was measured to keep.
    """
    inner, full = transformers_model(model), config.adapter.mode == "full"
    largest = np.sort(examples.counts.lengths)[::-1][: config.step.examples_per_rank]
    lengths = Lengths(longest=int(largest[0]), step=int(largest.sum()))
    by_products = known_crossover(inner, device, precision.compute)
    segment_attention.use_crossover(by_products)  # what attention keeps is measured below
    autocast = precision.compute if full and precision.compute != torch.float32 else None
    activations = known_activations(inner, layout, autocast, int(examples.counts.sides.max()))
    keeps_copy = config.task_type == "dpo" and full and not config.preference.precompute_reference
    copied = sum(p.numel() for p in model.parameters()) * precision.compute.itemsize if keeps_copy else 0
    cacheable = cache_sizes(inner, precision.compute)

    def forecast(checkpointing: Checkpointing, tokens: int, cached: int) -> Forecast:
        state = optimizer_bytes_of(args.optim)
        whole = forecast_memory(model, device, activations, checkpointing, tokens, state, cached, copied)
        return engine.share(whole)

    choices = choosing.choose(
        config.step, activations, forecast, lengths, device, cacheable, by_products, precision.compute
    )
    if args.optim in PAGED_ADAM and device.type == "cuda" and not (engine.deepspeed or engine.divides):
        tokens = lengths.largest_microbatch(choices.tokens_per_microbatch)
        expected = forecast(choices.checkpointing, tokens, sum(cacheable[: choices.cached_weights]))
        choices = replace(choices, unpaged_optimizer=choosing.fits(expected))
    choices = choosing.most_careful(ranks.all_of(choices))
    if checkpoint:
        choices = choosing.settled(config.step, stored_choices(checkpoint), choices)
    tokens = lengths.largest_microbatch(choices.tokens_per_microbatch)
    peak = estimated_peak(inner, device, activations, choices.checkpointing, tokens, precision.compute.itemsize)
    each = min(config.step.examples_per_rank, math.ceil(lengths.step / choices.tokens_per_microbatch))
    whole = assemble(
        model,
        device.type,
        peak,
        optimizer_bytes=optimizer_bytes_of(args.optim),
        cache=sum(cacheable[: choices.cached_weights]),
        reference=copied,
        microbatches=steps * each,
        shapes=lengths.longest,
        kernels=kernels_kept(config.task_type, examples.counts.lengths, examples.counts.targets),
        available=free_memory(device),
    )
    return choices, engine.share(whole)


def run_plan(
    config: Config,
    args: TrainingArguments,
    layout: str,
    examples: Examples | Blocks,
    base: dict[str, Any],
    encoder: Encoder,
    precision: Precision,
    engine: Engine,
) -> RunPlan:
    """What a checkpoint of this run is bound to."""
    adapted = config.adapter.mode != "full"
    examples_per_step = config.step.examples_per_rank * args.world_size
    per_epoch = steps_per_epoch(len(examples), examples_per_step, args.dataloader_drop_last)
    prepared = {"data": examples.content, "template": encoder.template.hash, "tokenizer": encoder.tokenizer_hash}
    return RunPlan(
        examples_per_step=examples_per_step,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        shuffle=config.data.shuffle,
        data=examples.fingerprint,
        task_type=config.task_type,
        objective=objective_settings(config),
        train_mode=config.adapter.mode,
        lora_rank=config.adapter.rank if adapted else 0,
        lora_alpha=config.adapter.alpha if adapted else 0,
        base_weights=str(base.get("sha256") or base.get("commit")),
        optimizer={name: getattr(args, name) for name in OPTIMIZER_SETTINGS},
        world_size=args.world_size,
        layout=layout,
        prepared=prepared | {name: value for name, value in config.flat().items() if name in PREPARATION_KEYS},
        training={name: getattr(args, name) for name in TRAINING_SETTINGS}
        | {"precision": precision.name, "lora_dropout": config.adapter.dropout if adapted else 0.0},
        total_steps=total_steps(args, per_epoch),
        engine=engine.name,
        add_tokens=list(config.model.add_tokens or ()),
        **adapter_plan(config.adapter),
    )


def adapter_plan(adapter: AdapterConfig) -> dict[str, Any]:
    """The part of a plan that full training has no use for."""
    if adapter.mode == "full":
        return {}
    return {
        "use_rslora": adapter.use_rslora,
        "use_dora": adapter.use_dora,
        "lora_target": adapter.target if isinstance(adapter.target, str) else list(adapter.target),
        "modules_to_save": names_in(adapter.modules_to_save or ()),
        "adapter": adapter_hash(adapter.name_or_path) if adapter.name_or_path else None,
    }


def objective_settings(config: Config) -> dict[str, Any]:
    """What of the preference keys shapes the loss of this run; where the reference is computed does not."""
    settings = config.preference
    if config.task_type != "dpo":
        return {}
    own = {"simpo": {"simpo_gamma": settings.simpo_gamma}, "cpo": {"cpo_alpha": settings.cpo_alpha}}
    smoothing = {"label_smoothing": settings.label_smoothing} if settings.loss in SMOOTHED_LOSSES else {}
    common = {"preference_loss": settings.loss, "beta": settings.beta, "rpo_alpha": settings.rpo_alpha}
    return common | smoothing | own.get(settings.loss, {})


def replace_progress(trainer: StepTrainer, recorder: RunRecorder) -> None:
    """Our progress line instead of transformers' printed dictionaries, trackers that are told all, quiet libraries."""
    transformers_logging.set_verbosity_error()
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    names = list(trainer.args.report_to or ())
    never_ask(names)
    handler = trainer.callback_handler
    boards = [one for one in handler.callbacks if isinstance(one, TensorBoardCallback)]
    trackers = [one for one in handler.callbacks if type(one).__module__.startswith("transformers.integrations")]
    handler.callbacks = [Guarded(one, recorder) if one in trackers else one for one in handler.callbacks]
    handler.callbacks.insert(1, recorder)  # behind the flow of control, before the trackers
    trainer.add_callback(Guarded(PassportReporter(recorder.path.parent, boards), recorder))
    if ranks.is_first():
        trainer.add_callback(Progress(show_bar=not trainer.args.disable_tqdm and sys.stderr.isatty()))


def total_steps(args: TrainingArguments, per_epoch: int) -> int:
    """Optimizer steps of the whole run, as transformers counts them."""
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)


def describe_steps(config: Config, data: Split, trainer: StepTrainer) -> str:
    """How many examples make a step, on which ranks, and how many steps the run."""
    per_epoch = len(trainer.get_train_dataloader())
    return render(
        "overview.steps",
        examples=trainer.options.examples_per_step,
        device=config.step.per_device_examples,
        accumulation=config.step.accumulation,
        budget=trainer.options.choices.tokens_per_microbatch,
        steps=total_steps(trainer.args, per_epoch),
        count=len(data.train),
        held_out=len(data.held_out) if data.held_out is not None else 0,
    )


def describe_ranks(config: Config, trainer: StepTrainer) -> str:
    """How many processes share a step, and by which engine."""
    return render(
        "engine.ranks",
        ranks=ranks.world_size(),
        engine=trainer.options.engine.name,
        per_rank=config.step.examples_per_rank,
        total=trainer.options.examples_per_step,
    )


def describe_choices(choices: Choices, model: Any, precision: Precision, device: torch.device) -> str:
    """What was chosen by measurement, or by the configuration in its place."""
    return render(
        "overview.choices",
        again=choices.checkpointed_layers,
        layers=len(decoder_layers(model)),
        offload=render("overview.offload") if choices.offload else "",
        cached=choices.cached_weights,
        weights=len(cache_sizes(model, precision.compute)),
        attention=describe_attention(device, precision.compute),
    )


def describe_template(encoder: Encoder, certificate: Certificate) -> dict[str, Any]:
    """What run.json says of the chat template."""
    return {
        "name": encoder.template.name,
        "sha256": encoder.template.hash,
        "stop_tokens": encoder.template.stop_tokens,
        "stop_ids": encoder.template.stop_ids,
        "date": certificate.date,
        "certificate": certificate.hash,
    }


def without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """Access tokens stay out of files that people pass on."""
    return {name: value for name, value in values.items() if not name.endswith("_token")}


def unnamed_defaults(config: Config) -> dict[str, Any]:
    """transformers' keys that the configuration leaves alone, at the defaults of the version that trains."""
    named = config.flat()
    specs = (spec for spec in fields(TrainingArguments) if spec.init and spec.default is not MISSING)
    return {spec.name: spec.default for spec in specs if spec.name not in named}


def write_records(
    config: Config,
    output_dir: Path,
    encoder: Encoder,
    data: Split,
    certificate: Certificate | None,
    base_weights: dict[str, Any],
    trainer: StepTrainer,
    precision: Precision,
    device: torch.device,
    checkpoint: Path | None,
    forecast: Forecast,
) -> None:
    """train_args.json (as given) and run.json (the passport, which says "running" until the run ends)."""
    options = trainer.options
    write_json(output_dir / "data_report.json", data.report())
    write_json(output_dir / "train_args.json", without_secrets(config.given))
    write_json(
        output_dir / "run.json",
        {
            "config": without_secrets(config.flat()),
            "defaults": unnamed_defaults(config),
            "resolved": {
                "precision": precision.name,
                "layout": options.layout,
                **asdict(options.choices),
                "examples_per_step": options.examples_per_step,
                "engine": options.engine.name,
            },
            "template": None if certificate is None else describe_template(encoder, certificate),
            "hashes": {
                "data": data.train.fingerprint,
                "eval_data": data.held_out.fingerprint if data.held_out else None,
                "tokenizer": encoder.tokenizer_hash,
                "base_weights": base_weights,
            },
            "seed": options.seed,
            "versions": package_versions(),
            "hardware": hardware(device),
            "git_commit": git_commit(Path.cwd()),
            "firefly_commit": git_commit(Path(__file__).parent),
            "notices": take_notices(),
            "total_steps": total_steps(trainer.args, len(trainer.get_train_dataloader())),
            "memory": {"forecast_parts": forecast.parts, "available_bytes": forecast.available},
            "world_size": trainer.args.world_size,
            "resumed_from": None if checkpoint is None else str(checkpoint),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "state": RUNNING,
            "process": this_process(),
        },
    )
