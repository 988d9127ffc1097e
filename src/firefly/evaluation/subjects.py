"""The models that `firefly compare` puts side by side: folders, adapters on a base, and endpoints.

Two that share their base are loaded once: the weights of the adapters take turns.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from firefly.config import DataConfig, ModelConfig
from firefly.console import notice
from firefly.data.dataset import find_kind
from firefly.data.encoding import Encoder
from firefly.evaluation.asking import ask, in_plain_text
from firefly.evaluation.endpoints import Endpoint
from firefly.evaluation.losses import load_rows, row_losses, text_losses
from firefly.evaluation.measurement import GivenAnswer, Measurement, Question, RowLoss
from firefly.evaluation.probes import ProbeText
from firefly.evaluation.progress import Progress
from firefly.generation.answering_type import answering_precision
from firefly.generation.batched import BatchLimits
from firefly.generation.generator import Generator, make_engine
from firefly.generation.loading import Loaded, ServedModel, load_for_generation, name_models, serve_models
from firefly.models.base_weights import identify_weights
from firefly.models.loading import resolve_model, stop_ids_of
from firefly.models.memory import PRIMITIVES
from firefly.models.saved_adapter import base_of_adapter, is_adapter
from firefly.models.serving_memory import context_of
from firefly.runs.memory import cap_onednn_cache
from firefly.translation import translate

HELD_OUT_TOKENS, PROBE_TOKENS = 128, 24
"""The longest answers to held-out questions and to probes."""


@dataclass(frozen=True)
class Asked:
    """What every model is asked.

    Attributes:
        rows: the held-out rows whose losses are compared; None: none.
        trained: rows that the tuned model was trained on, likewise.
        whole_documents: see `losses.WholeDocuments`.
        questions: see `Material`.
        texts: plain texts whose losses are compared.
        max_new_tokens: of answers to held-out questions.
    """

    rows: DataConfig | None = None
    trained: DataConfig | None = None
    questions: tuple[Question, ...] = ()
    texts: tuple[ProbeText, ...] = ()
    whole_documents: bool = False
    max_new_tokens: int = HELD_OUT_TOKENS

    def by_length(self) -> Iterator[tuple[list[Question], int]]:
        """The questions of each kind, with the longest answer to them."""
        for kind, longest in (("held_out", self.max_new_tokens), ("probe", PROBE_TOKENS)):
            if questions := [question for question in self.questions if question.kind == kind]:
                yield questions, longest


@dataclass(frozen=True)
class Measured:
    """What one model said.

    Attributes:
        trained: losses of the rows that the tuned model was trained on.
    """

    measurement: Measurement
    trained: tuple[RowLoss, ...] | None = None


@dataclass(frozen=True)
class LoadingOptions:
    """How models that run here are loaded; see `load_for_generation`."""

    hub: str = "huggingface"
    trust_remote_code: bool = False
    template_name: str = "auto"
    load_in_4bit: bool = False
    dtype: str = "auto"
    force: bool = False


@dataclass(frozen=True)
class LocalModel:
    """A model that runs in this process.

    Attributes:
        role: "base" or "tuned", which is what it is served as.
        given: as the user named it.
        adapter: over `model`; None: this is `model` itself.
    """

    role: str
    given: str
    model: ModelConfig
    adapter: str | None = None

    @property
    def name(self) -> str:
        return shown_name(self.given)


def shown_name(given: str) -> str:
    """What a report calls a model: the end of its path, or as much of an address as names it."""
    if is_endpoint(given):
        return given
    parts = Path(given).expanduser().parts
    return "/".join(parts[-2:]) if parts else given


def is_endpoint(given: str) -> bool:
    return given.startswith(("http://", "https://"))


def name_model(role: str, given: str, options: LoadingOptions) -> LocalModel:
    """A folder, hub id or adapter, with the base that an adapter names.

    Raises:
        UsageError: an adapter that names no base.
    """
    model = ModelConfig(name_or_path=given, hub=options.hub, trust_remote_code=options.trust_remote_code)
    if not is_adapter(given):
        return LocalModel(role, given, model)
    return LocalModel(role, given, base_of_adapter(given, replace(model, name_or_path="")), given)


def have_one_base(models: Sequence[LocalModel]) -> bool:
    """Whether models are the same weights with other adapters over them."""
    first, *others = (_weights_of(model.model) for model in models)
    return all(first == other for other in others)


def _weights_of(model: ModelConfig) -> Any:
    path = resolve_model(model)
    known = identify_weights(path, model.revision)
    return known.get("sha256") or (path, model.revision)


def measure_local(models: Sequence[LocalModel], asked: Asked, options: LoadingOptions) -> list[Measured]:
    """What models that run here say, one after another, loaded once if they have one base.

    Raises:
        UsageError: see `load_for_generation` and `load_rows`.
    """
    if len(models) > 1 and have_one_base(models):
        with loaded_models(models, options) as loaded:
            if all(model.role in loaded.served for model in models):
                return measure_loaded(loaded, models, asked)
        notice(
            "compare.apart",
            "the adapter changes the base's own weights, so that the two models are loaded one after the other.",
        )
    options = replace(options, dtype=type_of_all(models, options))
    measured: list[Measured] = []
    asked, lenders = replace(asked, whole_documents=True), [served_as(model, options) for model in models]
    for model in models:
        with loaded_models([model], options, lenders) as loaded:
            measured += measure_loaded(loaded, [model], asked)
    return measured


def type_of_all(models: Sequence[LocalModel], options: LoadingOptions) -> str:
    """What models that are compared are computed in, each of them: the type of the last one, which was tuned."""
    last = models[-1]
    adapters = [] if last.adapter is None else [last.adapter]
    return answering_precision(options.dtype, last.model, adapters, options.load_in_4bit).name


@contextmanager
def loaded_models(
    models: Sequence[LocalModel], options: LoadingOptions, lenders: Sequence[ServedModel] = ()
) -> Iterator[Loaded]:
    """Models of one base, each served under its role.

    Args:
        lenders: of whose templates one is taken, where a model has none.
    """
    cap_onednn_cache(PRIMITIVES)
    adapters = {model.role: model.adapter for model in models if model.adapter is not None}
    loaded = load_for_generation(
        models[0].model,
        adapters,
        options.template_name,
        options.load_in_4bit,
        options.force,
        with_base=any(model.adapter is None for model in models),
        dtype=options.dtype,
    )
    served: dict[str, ServedModel] = {}
    for model in models:
        found = loaded.served.get(model.role) if model.adapter else _base_of(loaded)
        if found is not None:
            served[model.role] = replace(found, name=model.role)
    try:
        vocabulary = loaded.model.config.get_text_config().vocab_size
        yield replace(loaded, served=_with_templates(served, [*served.values(), *lenders], vocabulary))
    finally:
        del loaded
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _base_of(loaded: Loaded) -> ServedModel | None:
    return next((each for each in loaded.served.values() if each.adapter is None), None)


def served_as(model: LocalModel, options: LoadingOptions) -> ServedModel:
    """Its tokenizer and template, without its weights."""
    adapters = {} if model.adapter is None else {model.role: model.adapter}
    stops = tuple(stop_ids_of(model.model) or ())
    named = name_models(model.model, adapters)
    served, _ = serve_models(named, options.template_name, stops, options.force, with_base=not adapters)
    return next(iter(served.values()))


def _with_templates(
    served: Mapping[str, ServedModel], lenders: Sequence[ServedModel], vocabulary: int
) -> dict[str, ServedModel]:
    """A base without a chat template is asked by the template of what was made of it, as it was before training.

    Args:
        vocabulary: rows of the model's table of tokens; a tokenizer with more of them lends nothing.
    """
    able = next((each for each in lenders if each.encoder is not None and len(each.tokenizer) <= vocabulary), None)
    if able is None:
        return dict(served)
    for name, each in served.items():
        if each.encoder is None:
            notice(
                "compare.borrowed_template",
                "{name} has no chat template; it is asked by that of {other}.",
                name=name,
                other=able.name,
            )
    return {
        name: each
        if each.encoder is not None
        else replace(each, tokenizer=able.tokenizer, encoder=able.encoder, stop_ids=able.stop_ids, no_template=None)
        for name, each in served.items()
    }


def measure_loaded(loaded: Loaded, models: Sequence[LocalModel], asked: Asked) -> list[Measured]:
    """Losses first, then answers: while the engine computes, nothing else may call the model."""
    measured = []
    for model in models:
        began = time.monotonic()
        served = loaded.served[model.role]
        loaded.select(model.role)
        context = context_of(loaded.model.config)
        found = Measurement(
            name=model.name,
            described=describe(loaded, model) | {"max_new_tokens": asked.max_new_tokens},
            losses=losses_of(loaded.model, served, model, asked, asked.rows),
            probe_losses=text_losses(loaded.model, served.text_encoder, asked.texts, context),
        )
        trained = losses_of(loaded.model, served, model, asked, asked.trained)
        measured.append(Measured(replace(found, seconds=time.monotonic() - began), trained))
    if not asked.questions:
        return measured
    engine = make_engine(loaded, BatchLimits())
    answered = []
    with Generator(engine, loaded.served):
        for model, found in zip(models, measured, strict=True):
            began = time.monotonic()
            answers = ask_all(Generator(engine, {model.role: loaded.served[model.role]}), asked, model.name)
            seconds = found.measurement.seconds + time.monotonic() - began
            answered.append(replace(found, measurement=replace(found.measurement, answers=answers, seconds=seconds)))
    return answered


def losses_of(
    model: Any, served: ServedModel, named: LocalModel, asked: Asked, rows: DataConfig | None
) -> tuple[RowLoss, ...] | None:
    """Losses of rows; None without any.

    Raises:
        UsageError: conversations, and no template to write them with.
    """
    if rows is None:
        return None
    kind = find_kind(rows, named.model.hub)
    encoder: Encoder | None = served.encoder
    if encoder is None and kind != "document":
        assert served.no_template is not None
        raise served.no_template
    encoder = encoder or served.text_encoder
    examples = load_rows(rows, encoder, kind, named.model.hub, asked.whole_documents)
    texts = len(examples) * (2 if kind == "pair" else 1)
    with Progress(named.name, sys.stderr).count(translate("losses"), texts) as tick:
        return row_losses(model, examples, served.tokenizer, tick)


def ask_all(generator: Generator, asked: Asked, name: str) -> tuple[GivenAnswer, ...]:
    """The answers to all questions, each kind of them in its length."""
    plain = generator.served[generator.name].encoder is None
    answers: dict[str, GivenAnswer] = {}
    with Progress(name, sys.stderr).count(translate("answers"), len(asked.questions)) as tick:
        for questions, longest in asked.by_length():
            written = [in_plain_text(question) for question in questions] if plain else questions
            answers |= {answer.key: answer for answer in ask(generator, written, longest, tick)}
    return tuple(answers[question.key] for question in asked.questions)


def describe(loaded: Loaded, model: LocalModel) -> dict[str, Any]:
    """What tells a model from others, for the report."""
    served = loaded.served[model.role]
    template = None if served.encoder is None else served.encoder.template
    return {
        "given": model.given,
        "model": model.model.name_or_path,
        "adapter": model.adapter,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "template": None if template is None else template.name,
        "template_hash": None if template is None else template.hash,
        "tokenizer_hash": None if served.encoder is None else served.encoder.tokenizer_hash,
    }


def measure_endpoint(endpoint: Endpoint, asked: Asked) -> Measured:
    """What a server answers; it tells no losses of texts.

    Raises:
        UsageError: it answers nothing.
    """
    began, endpoint = time.monotonic(), endpoint.named()
    answers: dict[str, GivenAnswer] = {}
    with Progress(endpoint.model, sys.stderr).count(translate("answers"), len(asked.questions)) as tick:
        for questions, longest in asked.by_length():
            given = endpoint.answer(questions, longest, lambda: tick(1))
            answers |= {answer.key: answer for answer in given}
    in_order = tuple(answers[question.key] for question in asked.questions)
    described = {"endpoint": endpoint.shown_url, "model": endpoint.model, "max_new_tokens": asked.max_new_tokens}
    seconds = time.monotonic() - began
    return Measured(Measurement(endpoint.model, described, answers=in_order, seconds=seconds))
