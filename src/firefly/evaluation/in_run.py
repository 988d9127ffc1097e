"""What a run asks of its own model before the first step and after the last, so that both can be compared.

The model in training is asked itself: there is no second one in memory, and nothing that is trained changes by it.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from firefly.config import DataConfig
from firefly.data.batching import pack_owned, plan_microbatches
from firefly.data.blocks import Blocks
from firefly.data.encoding import Encoder
from firefly.data.examples import Examples
from firefly.data.formats import MalformedRecord
from firefly.data.formats.prompts import read_prompts
from firefly.data.readers import read_records
from firefly.data.schema import Document, RawRecord, Source, Tokens
from firefly.data.templates import TemplateFailure
from firefly.distributed.model import TrainableModel
from firefly.evaluation.asking import ask, in_plain_text, question_of
from firefly.evaluation.held_out import Evaluation
from firefly.evaluation.losses import row_key
from firefly.evaluation.measurement import GivenAnswer, Question, RowLoss
from firefly.evaluation.probes import ProbeText
from firefly.generation.batched import BatchLimits
from firefly.generation.files import Row
from firefly.generation.generator import Generator, make_engine
from firefly.generation.loading import Loaded, ServedModel
from firefly.models.sampling import sampling
from firefly.runs.memory import give_back_freed_memory
from firefly.tasks.base import Forward, shares

HELD_OUT_QUESTIONS = 8
HELD_OUT_TOKENS, PROBE_TOKENS = 48, 24
"""The longest answers to held-out questions and to probes: enough to see what a model says."""
PROMPT_TOKENS = 512
"""Longer prompts are not asked within a run: on a CPU one would take the time of many."""
DOCUMENT_CHARACTERS = 1200
"""Of a held-out document, half of which is given."""
LINES = 20_000
"""Of a file, among which held-out questions are looked for: a file of millions is not read to its end."""

CPU_SECONDS, DEVICE_SECONDS = 25.0, 240.0
"""For asking before the first step. On a CPU that is part of what a small model can be asked; afterwards the tuned
model is asked the same. On a GPU the set takes seconds; the limit is below that of collectives, in which ranks wait."""
SHARES = {"texts": 0.4, "held_out": 0.65, "probes": 1.0}
"""The part of that time until which each kind is asked, in this order."""
AT_A_TIME = {"texts": 4, "held_out": 8, "probes": 16}
"""The clock is looked at between so many at most. A CPU answers sixteen in half the time of twice eight."""
GROWTH = 4
"""Of each kind one is asked first, whose time says how many more there is time for: up to so many times as many."""

LIMITS = BatchLimits(cache_tokens=2048, max_requests=16)
"""A small cache: it exists beside all that training holds."""
NAME = "model"
"""What the model in training is served as."""

T = TypeVar("T", Question, ProbeText)


@dataclass(frozen=True)
class Asked:
    """What a model in training said.

    Attributes:
        text_losses: None where it was asked for none.
    """

    answers: tuple[GivenAnswer, ...] = ()
    text_losses: tuple[RowLoss, ...] | None = None


# ---- held-out rows


def held_out_losses(examples: Examples | Blocks, evaluation: Evaluation) -> tuple[RowLoss, ...]:
    """The loss of each held-out example, by the key that `firefly compare` gives it."""
    names, sources = examples.names, examples.counts.sources.tolist()
    return tuple(
        RowLoss(
            key=row_key(examples, number),
            source=names[source] if source < len(names) else str(source),
            total=float(evaluation.losses[number]),
            targets=int(evaluation.targets[number]),
            prefers=None if evaluation.prefers is None else bool(evaluation.prefers[number]),
        )
        for number, source in enumerate(sources)
    )


def held_out_questions(
    examples: Examples | Blocks, data: DataConfig, encoder: Encoder, most: int = HELD_OUT_QUESTIONS
) -> tuple[Question, ...]:
    """Up to `most` questions out of held-out rows, as their files have them: of each source in turn, spread over its
    rows, with prompts that are not too long to be asked.

    Raises:
        UsageError: a file can no longer be read.
    """
    documents = examples.documents if isinstance(examples, Blocks) else examples
    places = _spread(documents, most)
    found = _read(places, data, encoder)
    fitting = [found[place] for place in places if place in found and _tokens(found[place], encoder) <= PROMPT_TOKENS]
    return tuple(fitting[:most])


def _spread(examples: Examples, most: int) -> list[Source]:
    """Places of rows, of each source in turn: `most`, and behind them others for those that will not do."""
    numbers = np.unique(examples.sources)
    of_sources: list[list[Source]] = []
    for source in numbers:
        rows = np.flatnonzero(examples.sources == source)
        near = rows[examples.index["line"][rows] <= LINES]
        rows = near if len(near) else rows[:1]
        lengths = examples.lengths[rows]
        short = rows[lengths <= PROMPT_TOKENS]
        if not len(short):
            short = rows[np.sort(np.argsort(lengths, kind="stable")[:most])]
        each = math.ceil(most / len(numbers))
        first, others = (np.linspace(0, len(short) - 1, min(count, len(short))) for count in (each, 4 * each))
        chosen = short[np.concatenate([first, others]).round().astype(int)]
        of_sources.append(list(dict.fromkeys(examples.place(int(row)) for row in chosen)))
    turns = range(max(map(len, of_sources), default=0))
    return [places[turn] for turn in turns for places in of_sources if turn < len(places)]


def _read(places: Sequence[Source], data: DataConfig, encoder: Encoder) -> dict[Source, Question]:
    found: dict[Source, Question] = {}
    for file in dict.fromkeys(place.file for place in places):
        missing = {place for place in places if place.file == file}
        for record in read_records(Path(file), documents=data.text_documents):
            if record.source in missing:
                missing.remove(record.source)
                question = _question_in(record, data.data_format, encoder)
                if question is not None:
                    found[record.source] = question
            if not missing:
                break
    return found


def _question_in(record: RawRecord, data_format: str, encoder: Encoder) -> Question | None:
    """What a row asks; None of one that is tokenized, or has changed since it was prepared."""
    try:
        prompts = read_prompts(record.value, data_format).prompts
    except (MalformedRecord, RecursionError):
        return None
    prompt = prompts[0]
    if isinstance(prompt.asked, tuple):
        return None
    if isinstance(prompt.asked, Document):
        text = prompt.asked.text[:DOCUMENT_CHARACTERS]
        with suppress(TemplateFailure):
            while len(encoder.encode_text(text)) > 2 * PROMPT_TOKENS:  # half of it is given
                text = text[: len(text) // 2]
        prompt = replace(prompt, asked=Document(text))
    return question_of(Row(0, record.source, prompt, instance=0 if len(prompts) > 1 else None))


def _tokens(item: Question | ProbeText, encoder: Encoder) -> float:
    """How many tokens are given to a model; infinitely many of what cannot be asked."""
    try:
        if isinstance(item, Question) and item.messages:
            return len(encoder.encode_prompt(item.messages, item.tools))
        return len(encoder.encode_text(item.text or "")) or math.inf
    except TemplateFailure:
        return math.inf


def that_fit(items: Sequence[T], encoder: Encoder, chats: bool, context: int | None) -> tuple[T, ...]:
    """Those that the model has positions for, of questions with one for an answer: where positions are learnt, a longer
    one fails, on CUDA with all that the process does there.

    Args:
        chats: whether questions are rendered by the chat template.
        context: see `context_of`.
    """

    def needs(item: T) -> float:
        if not isinstance(item, Question):
            return _tokens(item, encoder)
        return _tokens(item if chats else in_plain_text(item), encoder) + 1

    return tuple(items) if context is None else tuple(item for item in items if needs(item) <= context)


# ---- asking


def ask_model(
    model: TrainableModel,
    served: ServedModel,
    questions: Sequence[Question],
    texts: Sequence[ProbeText],
    seconds: float | None = None,
) -> Asked:
    """Losses of texts and answers to questions of the model in training, in the order of both.

    Training goes on afterwards as if nothing had been: weights, gradients, random states and modes are as before. The
    engine's memory is the caller's to free (`free_memory`): an error that goes on from here still holds it.

    Args:
        served: its tokenizer and template; without one questions are written out as plain text.
        seconds: within which to ask: what is left out then is the end of texts, of held-out questions, or of probes.
            None: all, however long it takes.

    Raises:
        GenerationFailed: the engine failed.
    """
    began = time.monotonic()

    def chunks(items: Sequence[T], kind: str) -> Iterator[Sequence[T]]:
        end = None if seconds is None else began + seconds * SHARES[kind]
        return _until(end, items, AT_A_TIME[kind])

    model.rest()
    with sampling(model.module):
        losses = [loss for chunk in chunks(texts, "texts") for loss in _text_losses(model, served.text_encoder, chunk)]
        answers: list[GivenAnswer] = []
        if questions:
            engine = make_engine(_InTraining(model.module, {NAME: served}), LIMITS, quiet=True)
            with Generator(engine, {NAME: served}) as generator:
                for kind, name, tokens in (
                    ("held_out", "held_out", HELD_OUT_TOKENS),
                    ("probe", "probes", PROBE_TOKENS),
                ):
                    of_kind = [question for question in questions if question.kind == kind]
                    for chunk in chunks(of_kind, name):
                        written = chunk if served.encoder else [in_plain_text(question) for question in chunk]
                        answers += ask(generator, written, tokens)
    return Asked(tuple(answers), tuple(losses) if texts else None)


def _until(end: float | None, items: Sequence[T], most: int) -> Iterator[Sequence[T]]:
    """Some items at a time, as many as are likely to be done before `end` by the time that those before them took; one
    in any case."""
    start, count = 0, 1
    while start < len(items):
        chunk = items[start : start + count]
        began = time.monotonic()
        yield chunk
        now = time.monotonic()
        start += len(chunk)
        count = min(len(chunk) * GROWTH, most)
        if end is not None:
            in_time = (end - now) * len(chunk) / max(now - began, 1e-9)
            if in_time < 1:
                return
            count = min(count, math.floor(in_time))


def _text_losses(model: TrainableModel, encoder: Encoder, texts: Sequence[ProbeText]) -> list[RowLoss]:
    """By the forward pass of training and evaluation, in their type; each text behind what the tokenizer puts before
    one."""
    arrays = [np.asarray(encoder.encode_text(text.text), dtype=np.int32) for text in texts]
    tokens = [Tokens(array, array) for array in arrays]
    forward = Forward(model, model.module)
    found: dict[int, float] = {}
    for group in plan_microbatches([len(each.input_ids) for each in tokens], max(model.budget, 1)):
        batch = pack_owned([tokens[number] for number in group], shares(model, True)).to(model.device)
        rows = batch.apart() if forward.solo else batch.rows
        sums = forward.summed_logps(rows, len(group), torch.float64).tolist()
        found |= {number: -total for number, total in zip(group, sums, strict=True)}
    return [
        RowLoss(text.key, text.language, found[number], tokens[number].num_targets, len(text.text.encode()))
        for number, text in enumerate(texts)
    ]


class _InTraining(Loaded):
    """The model that trains: it has the adapter that is trained, and no other to choose."""

    def select(self, name: str) -> None: ...


def free_memory() -> None:
    """Give back what the cache of an engine took that nobody uses any more: it is part of a circle."""
    gc.collect()
    give_back_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def asked_again(items: Sequence[T], keys: Sequence[str]) -> tuple[T, ...]:
    """Those of `items` that were asked before."""
    known = set(keys)
    return tuple(item for item in items if item.key in known)


def seconds_for_asking(device: torch.device) -> float:
    return CPU_SECONDS if device.type == "cpu" else DEVICE_SECONDS


def serve(encoder: Encoder, stop_ids: Sequence[int], chats: bool, folder: Path) -> ServedModel:
    """The tokenizer and template of a run, as an engine takes them."""
    return ServedModel(NAME, encoder.tokenizer, encoder if chats else None, tuple(stop_ids), None, folder)
