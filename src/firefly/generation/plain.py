"""One request after another through `model.generate`, for architectures that cannot be batched (`batched`) and models
that lie on several devices."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer

from firefly.generation.engine import Delta, EngineFull, EngineStatus, Request, Token
from firefly.generation.job import Job, failed
from firefly.generation.sampler import choose_tokens
from firefly.generation.scoring import score_texts
from firefly.models.adapters import transformers_model
from firefly.models.probing import evaluating
from firefly.threads import release_team

SCORED_AT_A_TIME = 512
"""Tokens of a text whose logits are held at a time."""


class _Drawn(LogitsProcessor):
    """Draws each token itself, and leaves `generate` one finite logit to take."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        (token,) = choose_tokens(scores.float(), [self.job.sampler])
        self.job.take(token)
        chosen = torch.tensor([[token.id]], device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


class _Over(StoppingCriteria):
    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return torch.full((input_ids.shape[0],), self.job.is_over, device=input_ids.device)


@dataclass(frozen=True)
class _Kept:
    """Keys and values of the last request: the next turn of a chat begins with its tokens."""

    model: str
    ids: list[int]
    cache: DynamicCache

    def beginning_of(self, request: Request) -> DynamicCache | None:
        """What is known of a request's prompt, less its last token, which `generate` has to compute."""
        pairs = zip(self.ids, request.prompt_ids[:-1], strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        if not shared or request.model != self.model:
            return None
        if excess := self.cache.get_seq_length() - shared:
            self.cache.crop(-excess)
        return self.cache


class PlainEngine:
    """Answers one request at a time; its arguments are those of `BatchedEngine`."""

    def __init__(
        self,
        model: Any,
        tokenizers: Mapping[str, Any],
        select: Callable[[str], None],
        context_length: int,
        max_waiting: int = 256,
    ) -> None:
        self.models = tuple(tokenizers)
        self.context_length = context_length
        self.max_requests = 1
        self.vocabulary_size: int | None = transformers_model(model).config.get_text_config().vocab_size
        self._model, self._tokenizers, self._select = model, tokenizers, select
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._jobs: set[Job] = set()
        self._max_waiting = max_waiting
        self._closing = threading.Event()
        self._failure: BaseException | None = None
        self._kept: _Kept | None = None
        release_team()
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._failure is None and self._thread.is_alive()

    def submit(self, request: Request, deliver: Callable[[Delta], None]) -> Job:
        self._refuse_if_closed()
        if len(self._jobs) > self._max_waiting:
            raise EngineFull
        job = Job(request, self._tokenizers[request.model], deliver)
        self._jobs.add(job)
        self._queue.put(lambda: self._answer(job))
        return job

    def score(self, prompts: Sequence[Sequence[int]], model: str, top: int) -> list[list[Token]]:
        self._refuse_if_closed()
        done: queue.Queue[list[list[Token]] | Exception] = queue.Queue()

        def compute() -> None:
            try:
                self._select(model)
                done.put(score_texts(transformers_model(self._model), prompts, top, SCORED_AT_A_TIME))
            except Exception as error:  # handed to the one who waits
                done.put(error)

        self._queue.put(compute)
        result = done.get()
        if isinstance(result, Exception):
            raise result
        return result

    def status(self) -> EngineStatus:
        count = len(self._jobs)
        return EngineStatus(min(count, 1), max(count - 1, 0))

    def close(self, drain: bool = False) -> None:
        self._closing.set()
        if not drain:
            for job in list(self._jobs):
                job.cancel()
        self._queue.put(None)
        self._thread.join()

    def _refuse_if_closed(self) -> None:
        if self._closing.is_set() or not self.is_alive:
            raise RuntimeError("the engine has ended") from self._failure

    def _run(self) -> None:
        try:
            with evaluating(self._model), torch.no_grad():
                while (task := self._queue.get()) is not None:
                    task()
        except BaseException as error:
            self._failure = error
            for job in list(self._jobs):
                job.end(error=failed(error))
            raise

    def _answer(self, job: Job) -> None:
        try:
            if job.is_cancelled:
                job.end("cancelled")
                return
            self._select(job.request.model)
            ids = torch.tensor([job.request.prompt_ids], device=self._model.device)
            kept, self._kept = self._kept, None
            known = None if kept is None else kept.beginning_of(job.request)
            model: Any = transformers_model(self._model)
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **({} if known is None else {"past_key_values": known}),
                generation_config=GenerationConfig(
                    do_sample=False,  # the processor has drawn
                    max_new_tokens=job.request.settings.max_new_tokens,
                    return_dict_in_generate=True,
                    pad_token_id=0,
                    # Its own would end an answer unseen by the job, which knows when to stop: one that none has.
                    eos_token_id=self._model.config.get_text_config().vocab_size,
                ),
                logits_processor=LogitsProcessorList([_Drawn(job)]),
                stopping_criteria=StoppingCriteriaList([_Over(job)]),
            )
            job.end("stop")  # nothing, unless the model's own code ended it
            cache = getattr(output, "past_key_values", None)
            if isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers):
                computed = output.sequences[0, : cache.get_seq_length()].tolist()
                self._kept = _Kept(job.request.model, computed, cache)
        except Exception as error:  # an architecture, or code that it brings along, may fail in any way
            job.end(error=failed(error))
        finally:
            self._jobs.discard(job)
