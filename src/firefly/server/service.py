"""What every route needs: the models, who may still come in, and what was counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from firefly.errors import UsageError
from firefly.generation import GenerationSettings, Generator
from firefly.generation.engine import Request, Token
from firefly.generation.loading import ServedModel
from firefly.generation.replies import ReplyFormat
from firefly.server.answers import Answers, Handover, engine_is_down, queue_is_full, shutting_down
from firefly.server.errors import ApiError
from firefly.server.metrics import Metrics
from firefly.server.tokens import TokenTexts
from firefly.translation import translate

T = TypeVar("T")

WORKERS = 2
"""Threads that render and tokenize, and as many that wait for scores."""
CHARACTERS = 8
"""A prompt of more characters for each token of the context than that is tokenized in part first."""
SCORED_AT_A_TIME = 2048
"""Tokens of prompts that are scored in one go; answers that grow have their turn in between."""


@dataclass(frozen=True)
class ServerLimits:
    """What a server takes on.

    Attributes:
        max_open: answers that grow or wait, of all requests together.
        max_body_bytes: of a request.
        client_seconds: within which a client has to have sent its request, and to read on where it was slow.
        request_seconds: within which it is answered.
        drain_seconds: after SIGTERM, for the requests that are there.
    """

    max_open: int = 320
    max_body_bytes: int = 4 << 20
    client_seconds: float = 30.0
    request_seconds: float = 600.0
    drain_seconds: float = 30.0


@dataclass(frozen=True)
class ServerOptions:
    """How a server answers.

    Attributes:
        defaults: what requests leave open: temperature, top_p and, for chat, the longest answer.
        api_keys: one of them has to come with each request; none: no key is asked for.
        hosts: the names that a request may call this server by where no key is asked for (None: any). A page in a
            browser can let its own name lead here, and would read the answers.
        origins: of pages whose scripts may call this server from a browser.
    """

    limits: ServerLimits = ServerLimits()
    defaults: GenerationSettings = field(default_factory=GenerationSettings)
    api_keys: tuple[str, ...] = ()
    hosts: frozenset[str] | None = None
    origins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """One of the models that are served.

    Attributes:
        tokens: the texts of its tokens.
        replies: how its replies are read; None where it has no template.
        vocabulary: the number of its tokens that the engine knows.
    """

    served: ServedModel
    tokens: TokenTexts
    replies: ReplyFormat | None
    vocabulary: int

    @property
    def name(self) -> str:
        return self.served.name

    @property
    def tokenizer(self) -> Any:
        return self.served.tokenizer

    def replies_for(self, tools: Sequence[Any]) -> ReplyFormat:
        """How a reply is read; where no functions are offered, what looks like a call is text.

        Raises:
            ApiError: the model has no template, and so no replies.
        """
        if self.replies is None:
            raise ApiError(400, "no_template", str(self.served.no_template), "model")
        return self.replies if tools else replace(self.replies, markers=replace(self.replies.markers, calls=None))


@dataclass
class Call:
    """What the log says of a request, beside path and status."""

    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    began: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    is_gone: bool = False
    """Whether the client hung up in the middle of the response."""


class Service:
    """A generator behind an event loop. Its methods are called on that loop, but for those that say otherwise."""

    def __init__(self, generator: Generator, options: ServerOptions = ServerOptions()) -> None:
        self.generator, self.options = generator, options
        self.metrics = Metrics()
        self.started = int(time.time())
        self.is_draining = False
        self.models = {
            name: Model(
                served,
                TokenTexts(served.tokenizer),
                None if served.encoder is None else ReplyFormat.of(served.encoder.template),
                min(len(served.tokenizer), generator.engine.vocabulary_size or len(served.tokenizer)),
            )
            for name, served in generator.served.items()
        }
        self._open = 0
        self._live: set[Answers] = set()
        self._preparing = ThreadPoolExecutor(WORKERS, thread_name_prefix="prepare")
        self._scoring = ThreadPoolExecutor(WORKERS, thread_name_prefix="score")
        self._handover: Handover | None = None

    def model(self, name: str | None) -> Model:
        """The model of this name; where none is named, the adapter if there is one alone, else the base.

        Raises:
            ApiError: there is none of this name.
        """
        found = self.models.get(self.generator.name if name is None else name)
        if found is None:
            known = ", ".join(self.models)
            raise ApiError(
                404,
                "model_not_found",
                translate("there is no model {name!r} here; there is: {known}.", name=name, known=known),
                "model",
            )
        return found

    def check_tokens(self, model: Model, ids: Sequence[int], field: str) -> None:
        """Refuse ids that are no tokens: the engine would look for them in its tables."""
        if ids and max(ids) >= model.vocabulary:
            raise ApiError(
                400,
                "invalid_value",
                translate(
                    "{field}: {token} is no token of this model, which has {count}.",
                    field=field,
                    token=max(ids),
                    count=model.vocabulary,
                ),
                field,
            )

    def room_for(self, prompt: int, asked: int | None, field: str) -> int:
        """How long an answer may become; `field` holds the prompt.

        Raises:
            ApiError: prompt and answer are longer together than the context.
        """
        most = self.generator.engine.context_length
        wanted = min(self.options.defaults.max_new_tokens, max(most - prompt, 1)) if asked is None else asked
        if prompt + wanted > most:
            raise ApiError(
                400,
                "context_length_exceeded",
                translate(
                    "the prompt has {prompt} tokens, and {new} more are asked for: together more than the {most} that "
                    "this model's context and cache hold.",
                    prompt=prompt,
                    new=wanted,
                    most=most,
                ),
                "max_tokens" if asked is not None and prompt < most else field,
            )
        return wanted

    def refuse_hopeless(self, model: Model, text: str, field: str) -> None:
        """Refuse a text that is far longer than the context before all of it is tokenized: that would take a hundred
        times its size of memory. From any thread.

        Raises:
            ApiError: it is.
        """
        most = self.generator.engine.context_length
        size = CHARACTERS * most
        backend = getattr(model.tokenizer, "backend_tokenizer", model.tokenizer)
        while size < len(text):
            part = len(backend.encode(text[:size]))
            if part > most + most // 16 + 64:  # the end of the part may be cut in more tokens than it has in the whole
                raise ApiError(
                    400,
                    "context_length_exceeded",
                    translate(
                        "the prompt has more tokens than the {most} that this model's context and cache hold.",
                        most=most,
                    ),
                    field,
                )
            size *= 2

    async def prepare(self, work: Callable[[], T]) -> T:
        """What `work` returns; it runs in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._preparing, work)

    @contextmanager
    def place_for(self, count: int) -> Iterator[Answers]:
        """Room for `count` answers, which are stopped and whose places are given back on the way out.

        Raises:
            ApiError: too many are there, the engine has ended or the server does.
        """
        if not self.generator.engine.is_alive:
            raise engine_is_down()
        if self.is_draining:
            raise shutting_down()
        if self._open + count > self.options.limits.max_open:
            raise queue_is_full()
        self._open += count
        if self._handover is None:
            self._handover = Handover(asyncio.get_running_loop())
        answers = Answers(self._handover, self._give_back)
        self._live.add(answers)
        try:
            yield answers
        finally:
            self._live.discard(answers)
            answers.cancel()
            # The places of those that were submitted are given back by the engine, when it has ended them.
            self._open -= count - answers.count

    def _give_back(self) -> None:
        self._open -= 1

    def requests(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        n: int = 1,
        stop_ids: Sequence[int] = (),
    ) -> list[Request]:
        """`n` requests to the engine for each prompt. `stop_ids` end an answer beside the model's own."""
        found = []
        for ids in prompts:
            request = self.generator.request(ids, settings, model.name)
            request = replace(request, stop_ids=tuple(dict.fromkeys((*request.stop_ids, *stop_ids))))
            found += [replace(request, index=index) for index in range(n)]
        return found

    async def score(self, prompts: Sequence[Sequence[int]], model: Model, top: int) -> list[list[Token]]:
        """The tokens of prompts with their log-probabilities.

        Raises:
            ApiError: the engine cannot score, or has ended.
        """
        found: list[list[Token]] = []
        while len(found) < len(prompts):
            group, size = [], 0
            for ids in prompts[len(found) :]:
                if group and size + len(ids) > SCORED_AT_A_TIME:
                    break
                group.append(ids)
                size += len(ids)
            try:
                scoring = partial(self.generator.engine.score, group, model.name, top)
                found += await asyncio.get_running_loop().run_in_executor(self._scoring, scoring)
            except UsageError as error:
                raise ApiError(400, "unsupported_parameter", str(error)) from None
            except RuntimeError:
                if self.generator.engine.is_alive:
                    raise
                raise engine_is_down() from None
        return found

    def count(self, call: Call, finish_reasons: Sequence[str]) -> None:
        """Add an answered request to the metrics."""
        self.metrics.prompt_tokens[call.model] += call.prompt_tokens
        self.metrics.completion_tokens[call.model] += call.completion_tokens
        self.metrics.finished.update(finish_reasons)
        if call.first_token is not None:
            self.metrics.first_token_seconds.observe(call.first_token - call.began)
            if finish_reasons and call.completion_tokens > len(finish_reasons):
                each = call.completion_tokens / len(finish_reasons) - 1
                self.metrics.token_seconds.observe((time.monotonic() - call.first_token) / each)

    def timed_out(self) -> ApiError:
        seconds = self.options.limits.request_seconds
        return ApiError(504, "request_timeout", translate("no answer within {seconds:g} s.", seconds=seconds))

    def drain(self) -> None:
        """Take on nothing more, and end what is not answered in time."""
        self.is_draining = True
        asyncio.get_running_loop().call_later(self.options.limits.drain_seconds, self.stop_all)

    def stop_all(self) -> None:
        for answers in self._live:
            answers.stop()

    def close(self) -> None:
        self._preparing.shutdown(wait=False, cancel_futures=True)
        self._scoring.shutdown(wait=False, cancel_futures=True)
        self.generator.close()
