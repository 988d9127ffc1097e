"""From a base model to one that is ready for its first step: weights, adapter, kernels, tuned microbatches, backend."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import enable_full_determinism

from firefly import ranks
from firefly.config import Config
from firefly.console import notice
from firefly.data.certificate import FILE_NAME as CERTIFICATE
from firefly.data.certificate import Certificate
from firefly.distributed.backends import refuse_uneven_passes, shard_weights
from firefly.distributed.model import TrainableModel
from firefly.errors import UsageError
from firefly.models import tuning
from firefly.models.adapters import attach_adapter, count_parameters, transformers_model
from firefly.models.base_weights import identify_weights
from firefly.models.compilation import compile_layers
from firefly.models.loading import eos_ids, fix_generation_config, resolve_model
from firefly.models.memory import Forecast
from firefly.models.probes import Probes, load_for_training
from firefly.models.router import disable_router_noise
from firefly.models.saved_adapter import check_base
from firefly.models.scores import as_classifier, padding_beside, refuse_scores
from firefly.models.tokens import fit_embeddings
from firefly.run import Run
from firefly.runs.checkpoints import check_same_run, set_aside_old_checkpoints, stored_optimizer
from firefly.runs.folders import remove_leftovers
from firefly.runs.manifest import write_json
from firefly.runs.memory import map_large_arrays
from firefly.setup.arguments import FUSED_ADAM, PAGED_ADAM
from firefly.setup.checks import prove_template
from firefly.setup.identity import identify_base, identify_run
from firefly.setup.tuning import resolve_choices
from firefly.translation import translate

EXAMPLES_LOOKED_AT = 256
"""For the tokens that texts end in."""


@dataclass(frozen=True)
class ModelFacts:
    """What the banner and records report of a model that is ready to be trained.

    Attributes:
        layout: "segments" or "solo", and why not segments.
        head: how it is computed (see `models.heads`).
        parameters: those that are trained, and all.
        certificate: of the chat template, where there is one.
        base_weights: what identifies the base model.
    """

    layout: tuple[str, str]
    head: str
    parameters: tuple[int, int]
    certificate: Certificate | None
    base_weights: dict[str, Any]
    forecast: Forecast


def build_model(run: Run) -> tuple[TrainableModel, ModelFacts]:
    """Load, adapt, tune and wrap the model of a run, and take up its checkpoint.

    Raises:
        UsageError: the model or its adapter cannot be trained so, or the checkpoint is another run's.
    """
    config, args, checkpoint = run.config, run.args, run.checkpoint
    set_seed(args.seed)
    probes, base = load_base(run)
    module, layout = probes.model, probes.layout()
    refuse_uneven_passes(config, layout[0], run.backend)
    if run.chats and getattr(module, "generation_config", None):  # a reward model has none
        stops = (*run.encoder.template.stop_ids, *eos_ids(module.generation_config))  # the base's others stay
        module.generation_config.eos_token_id = list(dict.fromkeys(stops))
    certificate = prove_template(run.encoder) if run.chats else None
    probes = with_head(run, probes)
    new_tokens = fit_embeddings(probes.model, run.tokenizer, run.added_tokens)
    module = attach_adapter(
        probes.model, config.adapter, new_tokens, config.given, run.added_tokens, unreached=probes.unreached()
    )
    if noisy := disable_router_noise(module):
        notice(
            "router.quiet",
            "{count} routers choose without the random noise that their architecture adds in training, so that a step "
            "does not depend on how it is packed.",
            count=len(noisy),
        )
    head = probes.install_forwards(module, config.adapter)
    identity = identify_run(run, layout[0], base)
    parameters = count_parameters(module)
    if checkpoint:
        check_same_run(checkpoint, identity, config.resume_anyway)
        args = with_optimizer(args, stored_optimizer(checkpoint, args.optim))
    choices, forecast = resolve_choices(run, args, module, probes, layout[0])
    del probes  # a twin is not small beside a shard
    tuning.apply(choices, transformers_model(module), run.precision.compute)
    if choices.unpaged_optimizer and args.optim in PAGED_ADAM:
        notice(
            "optim.unpaged",
            "optim {asked}: its state fits into the GPU's memory, so {used} computes the same update without paging.",
            asked=args.optim.value,
            used=FUSED_ADAM.value,
        )
        args = with_optimizer(args, FUSED_ADAM)
    run.task.attach(module, run.precision)
    shard_weights(run.backend, module, args)
    # Seeded again: building the adapter and probing drew random numbers. Each rank draws its own dropout.
    enable_full_determinism(args.seed) if args.full_determinism else set_seed(args.seed)
    torch.manual_seed(args.seed + ranks.rank())
    compile_model(config, module)  # where that is asked for; a copied reference stays as it is
    model = TrainableModel(
        module,
        args,
        run.backend,
        layout=layout[0],
        choices=choices,
        precision=run.precision,
        identity=asdict(identity),
    )
    reference = [identity.base_weights, identity.add_tokens, identity.adapter, config.adapter.mode == "qlora"]
    asked = (model, run.data, [*reference, run.precision.name], checkpoint)
    if not run.backend.shards_weights:  # before the checkpoint's weights take the place of the first ones
        run.task.ask_reference(*asked)
    model.prepare(run.tokenizer, run.total_steps, checkpoint)
    if run.backend.shards_weights:
        run.task.ask_reference(*asked)
    take_over_folder(run, certificate)  # not before: a run that is refused leaves an earlier one's folder as it was
    return model, ModelFacts(layout, head, parameters, certificate, base, forecast)


def load_base(run: Run) -> tuple[Probes, dict[str, Any]]:
    """The base model, and what identifies its weights.

    Raises:
        UsageError: it cannot be loaded, or the adapter to start from belongs to another one.
    """
    config = run.config
    if run.backend.shards_weights:
        map_large_arrays()
    with ThreadPoolExecutor(1) as beside:  # hashing releases the GIL while weights are loaded
        weights = resolve_model(config.model)
        hashed = beside.submit(identify_weights, weights) if Path(weights).is_dir() else None
        new_head = translate("a reward model's head is new") if run.task.HEAD == "score" else ""
        probes = load_for_training(
            config.model, config.adapter.mode, run.precision, run.device, run.backend.shards_weights, new_head
        )
    # What a hub's model is, its files say once they are here.
    identified = hashed.result() if hashed else identify_weights(weights, config.model.revision)
    if config.adapter.name_or_path:
        check_base(config.adapter.name_or_path, config.model, config.adapter.on_other_base, identified)
    if settings := getattr(probes.model, "generation_config", None):
        fix_generation_config(settings)
    return probes, identify_base(identified, probes.model)


def with_head(run: Run, probes: Probes) -> Probes:
    """The base with the head that the task trains: a language model's is there. A reward model's is new, and its texts
    are padded with a token that none ends in: transformers scores a text at its last token that is no padding.

    Raises:
        UsageError: the base scores texts and the task does not, or no special token is left for padding.
    """
    if run.task.HEAD != "score":
        refuse_scores(probes.model, run.config.model.name_or_path)
        return probes
    classifier = as_classifier(probes.model)
    examples: Any = run.data.train  # pairs
    looked_at = (examples[number] for number in range(min(len(examples), EXAMPLES_LOOKED_AT)))
    ends = {int(side.input_ids[-1]) for pair in looked_at for side in pair.sides}
    padding = padding_beside(run.tokenizer, ends)
    if padding is None:
        raise UsageError(
            "model.no_padding",
            "the texts end in each of the tokenizer's special tokens, so that none can pad them: transformers scores a "
            "text at its last token that is no padding. Give the tokenizer a pad_token, or use add_tokens.",
        )
    run.tokenizer.pad_token_id = classifier.config.pad_token_id = padding
    return replace(probes, model=classifier)


def with_optimizer(args: TrainingArguments, optimizer: Any) -> TrainingArguments:
    """The same arguments but for the optimizer."""
    changed = copy.copy(args)
    changed.optim = optimizer
    return changed


def take_over_folder(run: Run, certificate: Certificate | None) -> None:
    """Set an earlier run's checkpoints aside, and write this one's certificate."""
    if run.checkpoint is None or isinstance(run.config.resume_from_checkpoint, str):
        set_aside_old_checkpoints(run.folder, run.checkpoint)
    if certificate:
        write_json(run.folder / CERTIFICATE, certificate.as_dict())
    elif ranks.is_first():
        (run.folder / CERTIFICATE).unlink(missing_ok=True)
    remove_leftovers(run.folder)


def compile_model(config: Config, module: Any) -> None:
    """Compile what can be, and say what that is, if `torch_compile` is on; as in transformers, to choose its backend or
    mode is to ask for it."""
    backend, mode = config.training.get("torch_compile_backend"), config.training.get("torch_compile_mode")
    if not config.training.get("torch_compile", bool(backend or mode)):
        return
    if count := compile_layers(module, backend, mode):
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
            name=type(transformers_model(module)).__name__,
        )
