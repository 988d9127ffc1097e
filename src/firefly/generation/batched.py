"""Continuous batching: requests join the batch as they arrive and leave it as they end.

Scheduler, paged key-value cache and prefix sharing are transformers' (generation/continuous_batching), driven step by
step from one thread of ours. Its sampler is replaced, on the instance, by `sampler.choose_tokens`: transformers' knows
temperature, top-k and top-p alone by request, and draws from the random state of the process.

Each model, the base or an adapter over it, has a scheduler and a cache of its own (`_Lane`), since keys and values that
one adapter made are wrong for another. Lanes with work take turns.

No other thread may call the model meanwhile: transformers changes the model's configuration for the time of a pass, and
two passes that overlap may leave it changed.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.requests import RequestState

from firefly.errors import UsageError
from firefly.files import first_line
from firefly.generation.engine import Delta, EngineFull, EngineStatus, FinishReason, Request, Token
from firefly.generation.job import Job, failed
from firefly.generation.sampler import choose_tokens
from firefly.generation.scoring import score_texts
from firefly.generation.settings import GenerationSettings
from firefly.models.adapters import transformers_model
from firefly.models.attention import WHOLE_MODEL, attending_by, choose_layout, model_configs, segmented
from firefly.models.paged_attention import LAYOUT, NAME, lay_out
from firefly.models.probing import agree, evaluating
from firefly.models.serving_memory import BATCH_TOKENS, PAGE, REQUESTS
from firefly.threads import release_team
from firefly.translation import translate

QUANTUM = 8
"""Steps of one lane before the next one with work has its turn: a switch of adapters costs a part of a step."""


FAILURES = 3
"""After so many failing steps in a row the engine gives up."""
PROBES = ((0, 5), (11, 23))
"""Two prompts of unlike lengths."""


@dataclass(frozen=True)
class BatchLimits:
    """What a batch may hold.

    Attributes:
        cache_tokens: keys and values kept for each model, in tokens; None: as `serving_memory` finds fitting.
        batch_tokens: the most tokens computed in one step: prompts longer than that are read in parts.
        max_requests: the most answers that grow at a time.
        max_waiting: the most requests that wait for a place.
        page_size: tokens of a page of the cache; whole pages of a common beginning are computed once.
    """

    cache_tokens: int | None = None
    batch_tokens: int = BATCH_TOKENS
    max_requests: int = REQUESTS
    max_waiting: int = 256
    page_size: int = PAGE


class _Lane:
    """One model's scheduler, cache and requests."""

    def __init__(self, model: Any, cache_tokens: int, limits: BatchLimits) -> None:
        settings = ContinuousBatchingConfig(
            page_size=limits.page_size,
            num_blocks=math.ceil(cache_tokens / limits.page_size),
            max_batch_tokens=limits.batch_tokens,
            max_requests_per_batch=min(limits.max_requests, limits.batch_tokens),
            max_memory_percent=0.95,
            # Our sampler decides on the host, so a step cannot be prepared before the last one's tokens are there.
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,  # it would fetch kernels from a hub
        )
        self.model = model
        own = str(model.config._attn_implementation)
        manager = model.init_continuous_batching(GenerationConfig(do_sample=False, eos_token_id=-1), settings)
        self._attention = NAME if model.device.type == "cpu" else str(model.config._attn_implementation)
        if str(model.config._attn_implementation) != own:
            model.set_attn_implementation(own)
        self._configs = model_configs(model)
        # Creating it seeds the generators of the process.
        with attending_by(self._attention, self._configs), torch.random.fork_rng():
            self.processor = manager._create_batch_processor()
        if self._attention == NAME:
            self._arguments = self.processor.inputs_and_outputs.get_model_kwargs
            self.processor.inputs_and_outputs.get_model_kwargs = self._laid_out
        self.processor.output_router = _Nowhere()
        self.processor.model_runner._sample = self._sample
        self.jobs: dict[str, Job] = {}
        self.seen: list[Tensor] | None = None
        """Where a list, the logits of each step are kept in it."""
        self._drawn: list[tuple[Job, Token]] = []

    @property
    def has_work(self) -> bool:
        return bool(self.jobs)

    def add(self, key: str, job: Job) -> None:
        self.jobs[key] = job
        self.processor.scheduler.add_waiting_request(
            RequestState(
                request_id=key,
                initial_tokens=list(job.request.prompt_ids),
                max_new_tokens=job.request.settings.max_new_tokens,
                eos_token_id=job.stop_ids or None,
            )
        )

    def step(self) -> None:
        """Compute one batch, and hand on what it gave."""
        for key, job in list(self.jobs.items()):
            if job.is_cancelled:
                job.end("cancelled")
                self._forget(key)
        if self.processor.prepare_next_batch():
            with attending_by(self._attention, self._configs):  # which serves nothing else
                self.processor._generation_step(self.model)
            self.processor.update_batch()
        drawn, self._drawn = self._drawn, []
        for job, token in drawn:
            job.take(token)
        for key, job in list(self.jobs.items()):
            if job.is_over:
                self._forget(key)

    def _laid_out(self, use_padding: bool = False) -> dict[str, Any]:
        """What transformers gives to the model, and how our attention finds the requests in it."""
        arguments: dict[str, Any] = dict(self._arguments(use_padding=use_padding))
        return arguments | {LAYOUT: lay_out(arguments, self.model.dtype)}

    def _forget(self, key: str) -> None:
        del self.jobs[key]
        self.processor.scheduler.set_request_cancellation(key)  # nothing, where the scheduler has ended it itself

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        """In place of transformers' sampler: scores (1, requests, vocabulary) to the first row of `output_ids`."""
        batch = self.processor.inputs_and_outputs.requests_in_batch
        jobs = [self.jobs[each.state.request_id] for each in batch if each.has_new_token]
        if self.seen is not None:
            self.seen.append(scores[0, : len(jobs)].clone())
        tokens = choose_tokens(scores[0, : len(jobs)], [job.sampler for job in jobs])
        output_ids[0, : len(jobs)] = torch.tensor([token.id for token in tokens], dtype=output_ids.dtype)
        self._drawn = list(zip(jobs, tokens, strict=True))

    def end_all(self, reason: FinishReason | None = None, error: str | None = None) -> None:
        for job in self.jobs.values():
            job.end(reason, error)

    def status(self) -> EngineStatus:
        scheduler, cache = self.processor.scheduler, self.processor.cache
        size = cache.num_blocks * self.processor.cb_config.page_size
        running = len(scheduler.active_requests)
        free = float(cache.compute_free_capacity())
        return EngineStatus(running, len(self.jobs) - running, size, round(size * (1 - free)))


def _note(heard: list[Token], delta: Delta) -> None:
    heard.extend(delta.tokens)


class _Nowhere:
    """In place of transformers' router of outputs: what was drawn is taken from the sampler."""

    def deliver(self, output: object) -> None: ...

    def deliver_batch(self, outputs: object) -> None: ...

    def fail_and_deliver(self, state: object, error: object) -> None: ...


class Unbatchable(Exception):
    """A model that continuous batching does not run, or not rightly."""


class BatchedEngine:
    """Answers many requests at a time, for a base model and adapters over it.

    Args:
        model: transformers' model or PEFT's around it, on one device.
        tokenizers: by the name of each model that is served, the base's first.
        select: makes the model compute as the one of this name.

    Raises:
        Unbatchable: the architecture cannot be batched.
        UsageError: the cache does not fit.
    """

    def __init__(
        self,
        model: Any,
        tokenizers: Mapping[str, Any],
        select: Callable[[str], None],
        context_length: int,
        limits: BatchLimits = BatchLimits(),
    ) -> None:
        self.models = tuple(tokenizers)
        self._cache_tokens = limits.cache_tokens or context_length
        self.context_length = min(context_length, self._cache_tokens)
        self.max_requests = limits.max_requests
        self.vocabulary_size: int | None = transformers_model(model).config.get_text_config().vocab_size
        self.limits = limits
        self._model, self._tokenizers, self._select = model, tokenizers, select
        self._lanes: dict[str, _Lane] = {}
        self._selected: str | None = None
        self._numbers = itertools.count()
        self._inbox: deque[Job] = deque()
        self._tasks: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closing = self._draining = False
        self._chose_layout = segmented(transformers_model(model)) is not None
        self._failure: BaseException | None = None
        self._failures = 0
        self._status = EngineStatus()
        self._use(self.models[0])
        with evaluating(model):  # the manager of a lane leaves it in eval mode
            self._prove()
        release_team()
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    # ---- from any thread

    @property
    def is_alive(self) -> bool:
        return self._failure is None and self._thread.is_alive()

    def submit(self, request: Request, deliver: Callable[[Delta], None]) -> Job:
        job = Job(request, self._tokenizers[request.model], deliver)
        with self._changed:
            self._refuse_if_closed()
            if len(self._inbox) + self._status.waiting >= self.limits.max_waiting:
                raise EngineFull
            self._inbox.append(job)
            self._changed.notify()
        return job

    def score(self, prompts: Sequence[Sequence[int]], model: str, top: int) -> list[list[Token]]:
        done = threading.Event()
        found: list[list[Token]] = []
        failure: list[Exception] = []

        def compute() -> None:
            try:
                self._use(model)
                inner = transformers_model(self._model)
                if not self._chose_layout:
                    choose_layout(inner)
                    self._chose_layout = True
                found.extend(score_texts(inner, prompts, top, self.limits.batch_tokens))
            except Exception as error:  # handed to the one who waits
                failure.append(error)
            finally:
                done.set()

        with self._changed:
            self._refuse_if_closed()
            self._tasks.append(compute)
            self._changed.notify()
        while not done.wait(timeout=1.0):
            if not self.is_alive:
                raise RuntimeError("the engine has ended") from self._failure
        if failure:
            raise failure[0]
        return found

    def status(self) -> EngineStatus:
        return self._status

    def close(self, drain: bool = False) -> None:
        with self._changed:
            self._closing, self._draining = True, drain
            self._changed.notify()
        self._thread.join()

    def _refuse_if_closed(self) -> None:
        if self._closing or not self.is_alive:
            raise RuntimeError("the engine has ended") from self._failure

    # ---- on the engine's own thread

    def _run(self) -> None:
        try:
            if torch.cuda.is_available() and self._model.device.type == "cuda":
                torch.cuda.set_device(self._model.device)
            with evaluating(self._model), torch.no_grad():
                while self._wait_for_work():
                    for task in self._take(self._tasks):
                        task()
                    for job in self._take(self._inbox):
                        try:
                            self._lane_of(job.request.model).add(str(next(self._numbers)), job)
                        except Exception as error:  # a second model's cache that does not fit is no end of the first
                            job.end(error=str(error) if isinstance(error, UsageError) else failed(error))
                    self._work()
        except BaseException as error:
            self._failure = error
            self._end_all(error=failed(error))
            raise
        self._end_all(reason="cancelled")

    def _prove(self) -> None:
        """Let two prompts be continued together, and compare with what the model gives for each alone.

        An attention that does not know of the paged cache would answer without having read the prompt.
        """
        name = self.models[0]
        inner = transformers_model(self._model)
        vocabulary = inner.config.get_text_config().vocab_size
        settings = GenerationSettings(max_new_tokens=3, temperature=0, ignore_stop_tokens=True)
        prompts = [tuple(number * 7919 % vocabulary for number in range(first, last)) for first, last in PROBES]
        heard: list[list[Token]] = [[] for _ in prompts]
        try:
            lane = self._lane_of(name)
            lane.seen = []
            for number, prompt in enumerate(prompts):
                deliver = partial(_note, heard[number])
                lane.add(f"probe {number}", Job(Request(prompt, settings, (), name), self._tokenizers[name], deliver))
            with torch.no_grad():
                while lane.has_work:
                    lane.step()
                for number, (prompt, tokens) in enumerate(zip(prompts, heard, strict=True)):
                    row = torch.tensor([[*prompt, *(token.id for token in tokens)]], device=inner.device)
                    expected = inner(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
                    found = torch.stack([logits[number] for logits in lane.seen])
                    if not agree(found, expected, inner.dtype, WHOLE_MODEL):
                        raise Unbatchable(translate("in a batch it computes something else than alone"))
            lane.seen = None
        except (UsageError, Unbatchable, torch.OutOfMemoryError):
            raise
        except Exception as error:  # an architecture, or code that it brings along, may fail in any way
            raise Unbatchable(f"{type(error).__name__}: {first_line(error)}") from error

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do; whether to go on."""
        with self._changed:
            while not (self._inbox or self._tasks or self._closing or self._busy()):
                self._changed.wait()
            if not self._closing:
                return True
            return self._draining and bool(self._inbox or self._tasks or self._busy())

    def _take(self, queue: deque[Any]) -> list[Any]:
        with self._changed:
            taken = list(queue)
            queue.clear()
        return taken

    def _busy(self) -> list[str]:
        return [name for name, lane in self._lanes.items() if lane.has_work]

    def _work(self) -> None:
        """Let each lane that has something to do compute: a step, or a few where others wait for their turn."""
        busy = self._busy()
        for name in busy:
            lane = self._lanes[name]
            self._use(name)
            try:
                for _ in range(QUANTUM if len(busy) > 1 else 1):
                    if lane.has_work:
                        lane.step()
                self._failures = 0
            except Exception as error:
                # Its requests are lost, its cache may hold anything; the next one begins anew.
                self._failures += 1
                if self._failures == FAILURES:
                    raise
                del self._lanes[name]
                lane.end_all(error=failed(error))
        statuses = [lane.status() for lane in self._lanes.values()]
        self._status = EngineStatus(
            *(sum(getattr(each, field) for each in statuses) for field in EngineStatus.__dataclass_fields__)
        )

    def _lane_of(self, name: str) -> _Lane:
        if name not in self._lanes:
            try:
                self._lanes[name] = _Lane(transformers_model(self._model), self._cache_tokens, self.limits)
            except MemoryError as error:
                raise UsageError(
                    "generation.no_memory_for_cache",
                    "a cache of {tokens} tokens for {name} does not fit: {problem}. Lower --cache_tokens.",
                    tokens=self._cache_tokens,
                    name=name,
                    problem=first_line(error),
                ) from error
        return self._lanes[name]

    def _use(self, name: str) -> None:
        if self._selected != name:
            self._select(name)
            self._selected = name

    def _end_all(self, reason: FinishReason | None = None, error: str | None = None) -> None:
        for job in self._take(self._inbox):
            job.end(reason, error)
        for lane in self._lanes.values():
            lane.end_all(reason, error)
