"""The seam between what asks for answers (chat, generate, serve, compare, …) and what computes them.

An engine takes requests of token ids and hands back text, ids and log-probabilities as they come. There is one that
batches requests as they arrive (`batched`), one that runs them one after another through `model.generate` (`plain`),
and one that asks another process (`remote`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from firefly.generation.settings import GenerationSettings

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Request:
    """One answer to be generated.

    Attributes:
        prompt_ids: what the model is fed, template and all; at least one token.
        stop_ids: tokens that end an answer. One that ends it is the last of its ids and no part of its text.
        model: the name of one of the engine's models: the base or an adapter.
        index: which of several answers to one prompt this is; it decides, with the seed, what is drawn.
    """

    prompt_ids: tuple[int, ...]
    settings: GenerationSettings
    stop_ids: tuple[int, ...]
    model: str
    index: int = 0


@dataclass(frozen=True, slots=True)
class Token:
    """A token in its place.

    Attributes:
        logprob: its log-probability as the model gives it, where it was asked for; None for the first of a prompt, too.
        top: the likeliest tokens in this place with their log-probabilities, likeliest first.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What was added to an answer. The last one of a request, and no other, has a `finish_reason` or an `error`.

    Attributes:
        text: text that is final. A character whose bytes are not complete is held back, and so is what may be the
            beginning of a stop text. Special tokens other than the stop token stand in it as they are spelled.
        tokens: the tokens that were generated; their text may come with a later delta.
        error: why no answer came of it, in the user's language.
    """

    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


class Ticket(Protocol):
    """A request that was handed in."""

    def cancel(self) -> None:
        """End it after the step that is under way; a last delta says "cancelled". Nothing, once it has ended."""
        ...


@dataclass(frozen=True)
class EngineStatus:
    """What an engine is doing.

    Attributes:
        running, waiting: requests.
        cache_tokens, cache_used: the size of the key-value cache and what of it requests occupy, in tokens; 0 where
            that is not known.
    """

    running: int = 0
    waiting: int = 0
    cache_tokens: int = 0
    cache_used: int = 0


class EngineFull(Exception):
    """More requests wait than may."""


class Engine(Protocol):
    """Any thread may call it.

    Attributes:
        models: the names it answers under: the base's first, then one for each adapter.
        context_length: the most tokens that prompt and answer may have together.
        max_requests: as many at a time keep it busy.
        vocabulary_size: rows of the model's table of tokens, where it is known: an id beyond it would end the engine. A
            tokenizer may have more tokens than that.
    """

    models: tuple[str, ...]
    context_length: int
    max_requests: int
    vocabulary_size: int | None

    def submit(self, request: Request, deliver: Callable[[Delta], None]) -> Ticket:
        """Take on a request; `deliver` gets its deltas in order, on a thread of the engine's, and must not block.

        Raises:
            EngineFull: too many requests wait.
            UsageError: a setting that this engine does not honour.
            RuntimeError: the engine has failed or was closed.
        """
        ...

    def score(self, prompts: Sequence[Sequence[int]], model: str, top: int) -> list[list[Token]]:
        """The tokens of texts with the log-probability of each behind those before it (`echo`)."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether it still computes: false for good once it has failed."""
        ...

    def status(self) -> EngineStatus: ...

    def close(self, drain: bool = False) -> None:
        """End it: at once, or with `drain` when all requests that it has are answered. It takes on no more."""
        ...
