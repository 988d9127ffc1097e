"""`firefly train`: from a configuration to a trained model, in one straight line."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, set_seed

from firefly import ranks
from firefly.config import Config
from firefly.console import notice, stderr_console
from firefly.data.certificate import FILE_NAME as CERTIFICATE
from firefly.data.dataset import load_split
from firefly.errors import UsageError
from firefly.models import choices as choosing
from firefly.models.adapters import attach_adapter, count_parameters, transformers_model
from firefly.models.base_weights import identify_weights
from firefly.models.compilation import compile_layers
from firefly.models.forwards import install_training_forwards
from firefly.models.loading import eos_ids, load_model, load_tokenizer, mend_generation_config, resolve_model
from firefly.models.memory import kernels_kept
from firefly.models.precision import pick_device, resolve_precision
from firefly.models.saved_adapter import check_base, open_adapter, tokenizer_source
from firefly.models.tokens import add_tokens, fit_embeddings
from firefly.models.verdicts import known_layout
from firefly.objectives.engines import Engine, divide, refuse_uneven_passes, resolve_engine
from firefly.objectives.preference_trainer import PreferenceTrainer
from firefly.objectives.router import quiet_routers
from firefly.objectives.trainers import StepOptions
from firefly.runs.checkpoints import (
    check_same_run,
    find_checkpoint,
    set_aside_old_checkpoints,
    stored_optimizer,
)
from firefly.runs.folders import remove_leftovers
from firefly.runs.lock import only_run
from firefly.runs.memory import keep_few_kernels, keep_freed_memory, memory_in_use, peak_memory
from firefly.runs.metrics import RunRecorder
from firefly.runs.overview import show_peak
from firefly.runs.passport import record_memory, recorded_end, write_json
from firefly.training.arguments import FUSED_ADAM, PAGED_ADAM, join_ranks
from firefly.training.before_weights import (
    bind_encoder,
    check_best_metric,
    check_positions,
    make_output_dir,
    on_its_first_day,
    prove_template,
    refuse_own_source,
)
from firefly.training.measured import resolve_choices
from firefly.training.plans import identify_base, run_plan
from firefly.training.preference import ask_reference_first, objective_options, with_reference_first, without_dropout
from firefly.training.records import write_records
from firefly.training.tasks import TASKS
from firefly.training.telling import replace_progress, show_before_training
from firefly.translation import translate


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
        open_adapter(config.adapter.name_or_path)  # what is wrong with it is cheap to find now
    tokenizer = load_tokenizer(config.model, tokenizer_source(config.model, config.adapter.name_or_path))
    added = add_tokens(tokenizer, config.model.add_tokens)
    config = on_its_first_day(config, output_dir)
    encoder = bind_encoder(config, tokenizer)
    # Before weights: faults of the data are cheap to find. And before ranks are joined: none times out on it.
    data = load_split(config.data, encoder, config.task_type, config.model.hub)
    try:
        data.check(config.data)
    except UsageError:  # it names where all findings are
        write_json(output_dir / "data_report.json", data.report())
        raise
    check_positions(config.model, data)
    check_best_metric(config, task, data)
    if device.type == "cpu" and ranks.started_alone():
        notice(
            "engine.one_process",
            "accelerate launch started one process, which trains alone. On CPUs it starts several with --multi_gpu, "
            "or use torchrun --nproc_per_node=N.",
        )
    keep_few_kernels(kernels_kept(config.task_type, data.train.counts.lengths, data.train.counts.targets))
    args = join_ranks(config, engine, precision, device)
    checkpoint = ranks.from_first(find_checkpoint(output_dir, config.resume_from_checkpoint))
    set_seed(args.seed)
    # Divided weights are loaded whole into the CPU's memory, where the model is tested.
    place = torch.device("cpu") if engine.divides_weights else device
    with ThreadPoolExecutor(1) as beside:  # hashing leaves the interpreter free to load what is hashed
        weights = resolve_model(config.model)
        hashed = beside.submit(identify_weights, weights) if Path(weights).is_dir() else None
        model = load_model(config.model, config.adapter.mode, precision, place)
    # What a hub's model is, its files say once they are here.
    base = hashed.result() if hashed else identify_weights(weights, config.model.revision)
    if config.adapter.name_or_path:
        check_base(config.adapter.name_or_path, config.model, config.adapter.on_other_base, base)
    mend_generation_config(model.generation_config)
    layout = known_layout(model)
    refuse_uneven_passes(config, layout[0], engine)
    certificate = None
    if task.chats:
        stops = (*encoder.template.stop_ids, *eos_ids(model.generation_config))  # the base's others stay
        model.generation_config.eos_token_id = list(dict.fromkeys(stops))
        certificate = prove_template(encoder)
    new_tokens = fit_embeddings(model, tokenizer, added)
    model = attach_adapter(model, config.adapter, new_tokens, config.given, added)
    if quiet := quiet_routers(model):
        notice(
            "router.quiet",
            "{count} routers choose without the random noise that their architecture adds in training, so that a step "
            "does not depend on how it is packed.",
            count=len(quiet),
        )
    head = install_training_forwards(model)
    base = identify_base(base, model)
    plan = run_plan(config, args, layout[0], data.train, base, encoder, precision, engine)
    parameters = count_parameters(model)
    if checkpoint:
        check_same_run(checkpoint, plan, config.resume_anyway)
        args.optim = stored_optimizer(checkpoint, args.optim)
    if checkpoint is None or isinstance(config.resume_from_checkpoint, str):
        set_aside_old_checkpoints(output_dir, checkpoint)
    if certificate:  # not before: a run that is refused leaves an earlier one's as it was
        write_json(output_dir / CERTIFICATE, certificate.as_dict())
    elif ranks.is_first():
        (output_dir / CERTIFICATE).unlink(missing_ok=True)
    remove_leftovers(output_dir)
    choices, forecast = resolve_choices(
        config, args, model, data.train, layout[0], precision, device, checkpoint, engine, plan.total_steps
    )
    choosing.apply(choices, transformers_model(model), precision.compute)
    if choices.unpaged_optimizer and args.optim in PAGED_ADAM:
        notice(
            "optim.unpaged",
            "optim {asked}: its state fits into the GPU's memory, so {used} computes the same update without paging.",
            asked=args.optim.value,
            used=FUSED_ADAM.value,
        )
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
    show_before_training(config, trainer, data, parameters, layout, head, precision, forecast, device)
    write_records(
        config, output_dir, encoder, data, certificate, base, trainer, precision, device, checkpoint, forecast
    )
    keep_freed_memory(device)
    with recorded_end(output_dir):
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if checkpoint and not trainer.counts.steps:
            notice(
                "resume.nothing_left",
                "{path} is the last of the {steps} steps already, so nothing was trained and the results stay as they "
                "were. To train on, raise num_train_epochs or max_steps.",
                path=checkpoint,
                steps=trainer.state.global_step,
            )
        trainer.tell_best()
        trainer.save_result()
        if trainer.counts.steps or not (output_dir / "train_results.json").is_file():
            memory = forecast.beside(peak_memory(device) - imported, device.type)
            results = recorder.results(result.metrics, trainer.skipped, device)
            write_json(output_dir / "train_results.json", results | memory)
            record_memory(output_dir, memory)
            show_peak(stderr_console(), memory)
        recorder.draw()
    stderr_console().print(translate("done: the result is in {path}", path=output_dir), soft_wrap=True)
    return output_dir


def callbacks(config: Config) -> list[Any]:
    """What looks on while a run trains, besides the recorder and the writer of plans."""
    if config.evaluation.patience is None:
        return []
    return [EarlyStoppingCallback(config.evaluation.patience, config.evaluation.threshold)]


def wants_compiling(config: Config) -> bool:
    """Whether `torch_compile` is on; as in transformers, to choose its backend or mode is to ask for it."""
    named = any(config.training.get(name) for name in ("torch_compile_backend", "torch_compile_mode"))
    return bool(config.training.get("torch_compile", named))


def compile_model(config: Config, model: Any) -> None:
    """Compile what can be, and say what that is."""
    backend, mode = config.training.get("torch_compile_backend"), config.training.get("torch_compile_mode")
    if count := compile_layers(model, backend, mode):
        notice(
            "compile.layers",
            "torch_compile: each of {count} decoder layers is compiled when it first runs, which can take minutes; "
            "attention stays uncompiled.",
            count=count,
        )
    else:
        notice(
            "compile.nothing",
            "torch_compile has no effect: {name} has no decoder layers that could be compiled one by one.",
            name=type(transformers_model(model)).__name__,
        )
