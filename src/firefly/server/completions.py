"""/v1/completions: text or token ids go to the model as they are."""

from __future__ import annotations

import asyncio
import codecs
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from firefly.generation import GenerationSettings
from firefly.generation.engine import FinishReason, Token
from firefly.server.chat import usage
from firefly.server.errors import ApiError
from firefly.server.protocol import CompletionBody, json_number
from firefly.server.service import Call, Model, Service
from firefly.server.tokens import TokenTexts
from firefly.server.transport import as_event
from firefly.translation import translate


def encode_text(model: Model, text: str) -> list[int]:
    """Ids of a text as the tokenizer makes them by itself: what looks like a special token is one, and BOS is added
    where it is not there already."""
    tokenizer = model.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    ids = list(tokenizer.encode(text) if backend is None else backend.encode(text).ids)
    return ids[1:] if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id else ids


@dataclass
class Completion:
    """One answer as it grows, or a prompt that is scored."""

    index: int
    texts: TokenTexts
    wants_logprobs: bool
    text: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    offset: int = 0
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))
    logprobs: dict[str, list[Any]] = field(
        default_factory=lambda: {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    )

    def add(self, text: str, tokens: Sequence[Token], finish_reason: FinishReason | None = None) -> dict[str, Any]:
        """Take more of it; the choice of a chunk that says so."""
        self.text.append(text)
        self.finish_reason = finish_reason
        new = self._describe(tokens) if self.wants_logprobs else None
        for name, values in (new or {}).items():
            self.logprobs[name] += values
        return {"index": self.index, "text": text, "logprobs": new, "finish_reason": finish_reason}

    def _describe(self, tokens: Sequence[Token]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {name: [] for name in self.logprobs}
        for token in tokens:
            found["tokens"].append(self.texts.name_of(token.id))
            found["text_offset"].append(self.offset)
            found["token_logprobs"].append(None if token.logprob is None else json_number(token.logprob))
            # The first token of a prompt has nothing before it. Of two tokens with one text the likelier one stays.
            likely = {}
            for other, logprob in (*token.top, *([] if token.logprob is None else [(token.id, token.logprob)])):
                likely.setdefault(self.texts.name_of(other), json_number(logprob))
            found["top_logprobs"].append(likely or None)
            self.offset += len(self.decoder.decode(self.texts.bytes_of(token.id)))
        return found

    def whole(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "text": "".join(self.text),
            "logprobs": self.logprobs if self.wants_logprobs else None,
            "finish_reason": self.finish_reason,
        }


@dataclass
class CompletionRun:
    """A request to /v1/completions and its answers."""

    service: Service
    body: CompletionBody
    model: Model
    call: Call
    choices: list[Completion] = field(default_factory=list)
    identity: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    async def chunks(self) -> AsyncGenerator[list[dict[str, Any]], None]:
        """Choices of chunks as they come; the first list is empty: the request was taken on.

        Raises:
            ApiError: it cannot be answered.
        """
        service, body, model, call = self.service, self.body, self.model, self.call
        call.model = model.name
        prompts = body.prompts()
        service.check_tokens(model, body.named_tokens(), "logit_bias" if body.logit_bias else "stop_token_ids")
        wants_logprobs = body.logprobs is not None
        count = len(prompts) * body.n
        self.choices = [Completion(index, model.tokens, wants_logprobs) for index in range(count)]

        def prepare() -> tuple[list[list[int]], list[str]]:
            for each in prompts:
                if isinstance(each, str):
                    service.refuse_hopeless(model, each, "prompt")
            ids = [encode_text(model, each) if isinstance(each, str) else each for each in prompts]
            if not all(ids):
                raise ApiError(400, "invalid_value", translate("a prompt has no token."), "prompt")
            for each in ids:
                service.check_tokens(model, each, "prompt")
            shown = [
                each if isinstance(each, str) else model.tokenizer.decode(each, skip_special_tokens=False)
                for each in (prompts if body.echo else ())
            ]
            return ids, shown

        try:
            async with asyncio.timeout(service.options.limits.request_seconds):
                with service.place_for(count) as answers:
                    ids, shown = await service.prepare(prepare)
                    call.prompt_tokens = sum(map(len, ids))
                    for each in ids:
                        service.room_for(len(each), body.max_tokens, "prompt")
                    settings = body.settings(service.options.defaults, max(body.max_tokens, 1), body.logprobs)
                    scored = await self._score(ids, settings) if body.echo and wants_logprobs else []
                    is_scored_alone = not body.max_tokens or (bool(scored) and self._needs_no_engine(settings))
                    requests = service.requests(model, ids, settings, body.n, body.stop_token_ids)
                    answers.submit(service.generator.engine, () if is_scored_alone else requests)
                    yield []
                    if body.echo:
                        prompt_tokens = (
                            [row[: len(each)] for row, each in zip(scored, ids, strict=True)] if scored else []
                        )
                        yield [
                            self.choices[n].add(shown[n // body.n], prompt_tokens[n // body.n] if scored else ())
                            for n in range(count)
                        ]
                    if is_scored_alone:
                        yield [
                            choice.add(*self._next(scored[choice.index][-1], request.stop_ids))
                            if body.max_tokens
                            else choice.add("", (), "length")
                            for choice, request in zip(self.choices, requests, strict=True)
                        ]
                    while any(choice.finish_reason is None for choice in self.choices):
                        arrived = await answers.arriving()
                        if call.first_token is None:
                            call.first_token = time.monotonic()
                        call.completion_tokens += sum(len(delta.tokens) for _, delta in arrived)
                        yield [
                            self.choices[n].add(delta.text, delta.tokens, delta.finish_reason) for n, delta in arrived
                        ]
        except TimeoutError:
            raise service.timed_out() from None
        finally:
            service.count(call, [choice.finish_reason for choice in self.choices if choice.finish_reason])

    def _needs_no_engine(self, settings: GenerationSettings) -> bool:
        """Whether the scores of a prompt have its whole answer: the likeliest token behind it (`lm-eval` asks so)."""
        plain = replace(
            settings, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=None, logprobs=None,
            ignore_stop_tokens=False,
        )  # fmt: skip
        return settings.is_greedy and self.body.n == 1 and plain == GenerationSettings(1, temperature=0.0, top_p=1.0)

    async def _score(self, ids: Sequence[Sequence[int]], settings: GenerationSettings) -> list[list[Token]]:
        """The tokens of prompts; where these scores are the whole answer, with the likeliest token behind each."""
        top = self.body.logprobs or 0
        if not self.body.max_tokens or not self._needs_no_engine(settings):
            return await self.service.score(ids, self.model, top)
        rows = await self.service.score([[*each, each[-1]] for each in ids], self.model, max(top, 1))
        return [
            [
                *(replace(token, top=token.top[:top]) for token in row[:-1]),
                replace(row[-1], id=row[-1].top[0][0], logprob=row[-1].top[0][1], top=row[-1].top[:top]),
            ]
            for row in rows
        ]

    def _next(self, token: Token, stop_ids: Sequence[int]) -> tuple[str, list[Token], FinishReason]:
        self.call.completion_tokens += 1
        if token.id in stop_ids and not self.body.ignore_eos:
            return "", [token], "stop"
        return self.model.tokenizer.decode([token.id], skip_special_tokens=False), [token], "length"

    async def whole(self) -> dict[str, Any]:
        """The response, once all is there."""
        async for _ in self.chunks():
            pass
        return self._head() | {"choices": [choice.whole() for choice in self.choices], "usage": usage(self.call)}

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The events of a stream."""
        with_usage = self.body.stream_options.include_usage
        head = self._head() | ({"usage": None} if with_usage else {})
        async for choices in self.chunks():
            yield b"".join(as_event(head | {"choices": [choice]}) for choice in choices)
        if with_usage:
            yield as_event(head | {"choices": [], "usage": usage(self.call)})

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.identity,
            "object": "text_completion",
            "created": self.created,
            "model": self.model.name,
        }
