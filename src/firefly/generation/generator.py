"""The one door to answers: models loaded once, prompted with the templates they were trained with.

`chat`, `generate`, `serve` and whatever else needs answers ask here. Behind it an engine computes them (`engine`).
Nothing here touches the state of the process, so it may run beside a training run.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
from collections import abc, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from firefly.config import ModelConfig
from firefly.console import notice
from firefly.data.encoding import Encoder
from firefly.data.schema import Message
from firefly.errors import UsageError
from firefly.generation.answering_type import answering_precision
from firefly.generation.batched import BatchedEngine, BatchLimits, Unbatchable
from firefly.generation.engine import Delta, Engine, EngineFull, FinishReason, Request, Ticket, Token
from firefly.generation.loading import (
    Loaded,
    ServedModel,
    check_bases,
    load_for_generation,
    name_models,
    named_adapters,
    serve_models,
)
from firefly.generation.plain import PlainEngine
from firefly.generation.remote import RemoteLimits
from firefly.generation.settings import GenerationSettings
from firefly.generation.vllm import EngineChoice, open_vllm
from firefly.models.loading import stop_ids_of
from firefly.models.memory import PRIMITIVES
from firefly.models.serving_memory import UNKNOWN_CONTEXT, cache_tokens_for, context_of
from firefly.runs.memory import cap_onednn_cache
from firefly.translation import Phrase

POLL = 0.05
"""Seconds after which a thread that waits for a token looks whether it is to stop."""
PROMPT_END = 32
"""Tokens in which the end of a prompt lies."""
UNKNOWN_CACHE = 16384
"""Tokens of a cache whose size cannot be told from the model."""
AHEAD = 4
"""Prompts handed to the engine ahead of those that it computes, so that its batch stays full."""


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    Attributes:
        text: what was written, special tokens spelled out; without the stop token or stop text.
        tokens: its tokens, the stop token among them, with log-probabilities where they were asked for.
    """

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason

    @property
    def token_ids(self) -> list[int]:
        return [token.id for token in self.tokens]


class GenerationFailed(RuntimeError):
    """The engine could not answer."""


@dataclass(frozen=True)
class Generator:
    """Models, their tokenizers and templates, and the engine that runs them. `close` it, or use it in a `with`; what is
    open when the program ends is closed then.

    Attributes:
        unserved: name → why it is not served, though it is loaded.
        computes_in: the type, where it was settled here; a server that runs already does not tell.
    """

    engine: Engine
    served: Mapping[str, ServedModel]
    unserved: Mapping[str, Phrase] = field(default_factory=dict)
    computes_in: str | None = None

    def __post_init__(self) -> None:
        # A thread that is inside of torch when Python ends it takes the whole process down with SIGABRT.
        atexit.register(self.engine.close)

    @classmethod
    def load(
        cls,
        model: ModelConfig,
        adapter: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
        template_name: str = "auto",
        load_in_4bit: bool = False,
        force: bool = False,
        limits: BatchLimits | None = None,
        dtype: str = "auto",
        engine: EngineChoice = EngineChoice(),  # noqa: B008  (frozen)
    ) -> Generator:
        """Load a model, or unmerged adapters over their base (which they name if `model` does not).

        Args:
            adapter: one, or several by the names they are to be served under.
            force: go on although the prompts are not those that the certificate beside the weights was made of, or the
                base is not the one that the adapter was trained on.
            limits: of the batch; its cache is made as large as memory and the model's context suggest, if no size is
                given.
            dtype: what to compute in: auto, float32, bfloat16 or float16.
            engine: what computes; this process, or vLLM in another one.

        Raises:
            UsageError: nothing found there, adapter and base do not fit, no usable template, or another one than the
                model was trained with.
        """
        limits = limits or BatchLimits()
        if adapter is None:
            adapters: Mapping[str, str | os.PathLike[str]] = {}
        elif isinstance(adapter, Mapping):
            adapters = adapter
        else:
            adapters = named_adapters([os.fspath(adapter)])
        if engine.is_vllm:
            named = name_models(model, adapters)
            check_bases(named, force)
            served, unserved = serve_models(named, template_name, tuple(stop_ids_of(named.model) or ()), force)
            tokenizers = {name: each.tokenizer for name, each in served.items()}
            computes_in = None
            if not engine.url:
                dtype = computes_in = answering_precision(dtype, named.model, named.adapters.values()).name
            remote = open_vllm(
                engine,
                named.model,
                named.adapters,
                tokenizers,
                load_in_4bit,
                limits=RemoteLimits(limits.max_requests, limits.max_waiting),
                dtype=dtype,
            )
            return cls(remote, served, unserved, computes_in)
        cap_onednn_cache(PRIMITIVES)
        loaded = load_for_generation(model, adapters, template_name, load_in_4bit, force, dtype=dtype)
        computes_in = str(loaded.model.dtype).removeprefix("torch.")
        return cls(make_engine(loaded, limits), loaded.served, loaded.unserved, computes_in)

    @property
    def name(self) -> str:
        """The model that is asked where none is named: the adapter, if there is one alone, else the first."""
        adapters = [name for name, each in self.served.items() if each.adapter is not None]
        return adapters[0] if len(adapters) == 1 else next(iter(self.served))

    @property
    def encoder(self) -> Encoder:
        return self.encoder_of(self.name)

    def encoder_of(self, model: str) -> Encoder:
        """Messages to ids.

        Raises:
            UsageError: this model has no template, and can only continue texts.
        """
        served = self.served[model]
        if served.encoder is None:
            assert served.no_template is not None
            raise served.no_template
        return served.encoder

    def encode(
        self, messages: Iterable[Message], tools: Sequence[Mapping[str, Any]] = (), model: str | None = None
    ) -> tuple[int, ...]:
        """The ids of a prompt.

        Raises:
            TemplateFailure: the template refuses these messages.
        """
        return tuple(self.encoder_of(model or self.name).encode_prompt(messages, tools))

    def text_encoder(self, model: str | None = None) -> Encoder:
        """As `ServedModel.text_encoder`."""
        return self.served[model or self.name].text_encoder

    def prompt_end(self, prompt_ids: Sequence[int], model: str | None = None) -> str:
        """The end of a prompt as text: it may have opened a thought (see `ReplyFormat.parse`)."""
        tokenizer = self.served[model or self.name].tokenizer
        return tokenizer.decode(list(prompt_ids[-PROMPT_END:]), skip_special_tokens=False)

    def request(
        self, prompt_ids: Sequence[int], settings: GenerationSettings, model: str | None = None, index: int = 0
    ) -> Request:
        """A request to the engine, for an answer of `max_new_tokens` or of those that the context has room for: then
        it ends with "length".

        Raises:
            UsageError: there is room for none.
        """
        name = model or self.name
        most = self.engine.context_length
        room = most - len(prompt_ids)
        if room < 1:
            raise UsageError(
                "generation.too_long",
                "the prompt has {prompt} tokens and leaves no room for an answer: this model's context and cache hold "
                "{most}.",
                prompt=len(prompt_ids),
                most=most,
            )
        if room < settings.max_new_tokens:
            settings = replace(settings, max_new_tokens=room)
        return Request(tuple(prompt_ids), settings, self.served[name].stop_ids, name, index)

    def stream(
        self,
        messages: Sequence[Message],
        settings: GenerationSettings,
        stop: threading.Event | None = None,
        model: str | None = None,
    ) -> abc.Generator[str, None, None]:
        """Yield the answer's text as it is generated. Setting `stop` ends it after the current token.

        Raises:
            TemplateFailure: the template refuses these messages.
            GenerationFailed: the engine failed.
        """
        request = self.request(self.encode(messages, model=model), settings, model)
        for delta in self.deltas(request, stop):
            if delta.text:
                yield delta.text

    def deltas(self, request: Request, stop: threading.Event | None = None) -> Iterator[Delta]:
        """What is added to one answer, as it comes.

        Raises:
            GenerationFailed: the engine failed.
        """
        pending = _Pending()
        pending.ticket = self.engine.submit(request, pending.deliver)
        try:
            yield from pending.arriving(self.engine, stop)
        finally:
            pending.ticket.cancel()

    def answer(self, messages: Sequence[Message], settings: GenerationSettings, model: str | None = None) -> str:
        """The whole answer, without surrounding white space."""
        return "".join(self.stream(messages, settings, model=model)).strip()

    def generate(
        self,
        prompts: Iterable[Sequence[int] | None],
        settings: GenerationSettings,
        samples: int = 1,
        model: str | None = None,
    ) -> Iterator[list[Answer]]:
        """Answers to prompts of token ids, in the order of the prompts, computed together.

        Prompts are read as they are needed, so there may be any number of them.

        Args:
            prompts: None keeps a place in the order and gets no answer.
            samples: answers to each prompt.

        Raises:
            GenerationFailed: the engine failed.
            UsageError: a prompt is too long.
        """
        waiting: deque[list[_Pending]] = deque()
        source, end = iter(prompts), object()
        room = AHEAD + self.engine.max_requests
        exhausted = False
        try:
            while True:
                # Those that are answered and wait for one before them leave their places in the batch to others.
                while not exhausted and sum(map(_places, waiting)) < room:
                    ids: Any = next(source, end)
                    if ids is end:
                        exhausted = True
                        break
                    numbers = range(0 if ids is None else samples)
                    requests = [self.request(ids or (), settings, model, number) for number in numbers]
                    waiting.append([self._submit(request) for request in requests])
                if not waiting:
                    return
                yield [pending.wait(self.engine) for pending in waiting.popleft()]
        finally:
            for pending in (each for group in waiting for each in group):
                pending.ticket.cancel()

    def _submit(self, request: Request) -> _Pending:
        pending = _Pending()
        while True:
            try:
                pending.ticket = self.engine.submit(request, pending.deliver)
                return pending
            except EngineFull:  # by others who share it
                threading.Event().wait(POLL)

    def close(self) -> None:
        atexit.unregister(self.engine.close)
        self.engine.close()

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _places(group: list[_Pending]) -> int:
    """How much of the window a prompt takes: its open answers, and for one that gets none its place in the order."""
    return sum(not pending.is_answered for pending in group) if group else 1


class _Pending:
    """An answer that is awaited."""

    ticket: Ticket

    def __init__(self) -> None:
        self.deltas: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        self.is_answered = False

    def deliver(self, delta: Delta) -> None:
        self.deltas.put(delta)
        self.is_answered = delta.is_last

    def arriving(self, engine: Engine, stop: threading.Event | None = None) -> Iterator[Delta]:
        """Its deltas as they come; setting `stop` cancels it.

        Raises:
            GenerationFailed: the engine failed.
        """
        while True:
            if stop is not None and stop.is_set():
                self.ticket.cancel()
            try:
                delta = self.deltas.get(timeout=POLL)
            except queue.Empty:
                if not engine.is_alive:
                    raise GenerationFailed("the engine has ended") from None
                continue
            if delta.error is not None:
                raise GenerationFailed(delta.error)
            yield delta
            if delta.is_last:
                return

    def wait(self, engine: Engine) -> Answer:
        arrived = list(self.arriving(engine))
        tokens = tuple(token for delta in arrived for token in delta.tokens)
        reason = arrived[-1].finish_reason
        assert reason is not None  # the last delta has one, or an error
        return Answer("".join(delta.text for delta in arrived), tokens, reason)


def make_engine(loaded: Loaded, limits: BatchLimits, quiet: bool = False) -> Engine:
    """The engine for a model: batched where its architecture allows, which is tried; else one request at a time.

    Args:
        quiet: do not say that it is one at a time.
    """
    tokenizers = {name: each.tokenizer for name, each in loaded.served.items()}
    context = context_of(loaded.model.config) or UNKNOWN_CONTEXT
    if limits.cache_tokens is None:
        tokens = cache_tokens_for(loaded.model, context, len(loaded.served))
        limits = replace(limits, cache_tokens=tokens or min(context, UNKNOWN_CACHE))
    if len(set((getattr(loaded.model, "hf_device_map", None) or {}).values())) > 1:
        return PlainEngine(loaded.model, tokenizers, loaded.select, context, limits.max_waiting)
    try:
        return BatchedEngine(loaded.model, tokenizers, loaded.select, context, limits)
    except Unbatchable as error:
        if not quiet:
            notice(
                "generation.one_by_one",
                "requests are answered one after another: {problem}.",
                problem=error,
            )
        return PlainEngine(loaded.model, tokenizers, loaded.select, context, limits.max_waiting)
