"""/v1/chat/completions: messages to a prompt as training wrote it, and the reply taken apart again."""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from firefly.data.formats.fields import Fields, MalformedRecord, read_tools
from firefly.data.formats.messages import CALLS, REASONING_PARTS, TEXT_PARTS, read_message
from firefly.data.schema import Message
from firefly.data.templates import TemplateFailure
from firefly.generation.engine import Delta, FinishReason, Token
from firefly.generation.replies import CallDelta, CallDropped, ContentDelta, Piece, ReasoningDelta, Reply, ReplyStream
from firefly.server.errors import ApiError
from firefly.server.protocol import ChatBody, TutorialBody, json_number
from firefly.server.service import Call, Model, Service
from firefly.server.tokens import TokenTexts
from firefly.server.transport import as_event
from firefly.translation import translate

TAIL = 64
"""Tokens at the end of a prompt in which a thought may be opened."""


def read_conversation(items: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> tuple[list[Message], Any]:
    """Messages and tools, by the readers of training data.

    Raises:
        ApiError: they are none, or hold something that would not reach the model.
    """
    record = Fields({"tools": list(tools)})
    messages = []
    try:
        for number, item in enumerate(items):
            place = f"messages[{number}]"
            if not isinstance(item.get("role"), str):
                raise MalformedRecord("{field} is missing", field=f"{place}.role")
            for index, part in enumerate(item["content"] if isinstance(item.get("content"), list) else ()):
                kind = part.get("type", "text") if isinstance(part, dict) else "text"
                if kind not in (*TEXT_PARTS, *REASONING_PARTS, *CALLS):
                    raise ApiError(
                        400,
                        "unsupported_content",
                        translate(
                            "{field}: these models read text, not {type}.", field=f"{place}.content[{index}]", type=kind
                        ),
                        "messages",
                    )
            messages.append(read_message(record.inner(item, place, is_message=True)))
        read = read_tools(record)
    except MalformedRecord as error:
        raise ApiError(400, "invalid_value", f"{error.phrase}.", "messages") from None
    for number, tool in enumerate(read):
        if tool["function"].get("strict") is True:
            field = f"tools[{number}].function.strict"
            message = translate("{field} is not supported by this server; leave it out.", field=field)
            raise ApiError(400, "unsupported_parameter", message, "tools")
    for place in (*record.unread(), *record.unheeded()):
        raise ApiError(
            400, "unknown_parameter", translate("{field} is unknown to this server.", field=place), "messages"
        )
    return messages, read


def encode(service: Service, model: Model, messages: Sequence[Message], tools: Any) -> tuple[int, ...]:
    """The ids of a prompt.

    Raises:
        ApiError: the template refuses the messages, or there is none.
    """
    model.replies_for(tools)
    service.refuse_hopeless(model, "\n".join(message.text for message in messages), "messages")
    try:
        ids = service.generator.encode(messages, tools, model.name)
    except (TemplateFailure, RecursionError) as error:
        problem = str(error) if isinstance(error, TemplateFailure) else translate("nested too deeply")
        raise ApiError(400, "template_refuses", f"{problem}.", "messages") from None
    service.check_tokens(model, ids, "messages")
    return ids


async def describe_prompt(service: Service, body: ChatBody, model: Model) -> dict[str, Any]:
    """The prompt of a chat, as vLLM's /tokenize has it (`count`, `tokens`), and the text that the template wrote.

    Raises:
        ApiError: the template refuses the messages, or there is none.
    """
    tools = body.offered_tools()

    def prepare() -> tuple[int, ...]:
        return encode(service, model, *read_conversation(body.messages, tools))

    ids = await service.prepare(prepare)
    return {"count": len(ids), "tokens": list(ids), "prompt": model.tokenizer.decode(ids, skip_special_tokens=False)}


@dataclass
class Choice:
    """One answer as it grows."""

    index: int
    parser: ReplyStream
    tokens: list[Token] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def take(self, delta: Delta) -> list[Piece]:
        self.tokens += delta.tokens
        self.finish_reason = delta.finish_reason
        pieces = list(self.parser.feed(delta.text)) if delta.text else []
        if delta.is_last:
            pieces += self.parser.finish()
        self.pieces += pieces
        return pieces

    @property
    def reason(self) -> str | None:
        """Why it ended, as OpenAI calls it."""
        called = {piece.index for piece in self.pieces if isinstance(piece, CallDelta)}
        called -= {piece.index for piece in self.pieces if isinstance(piece, CallDropped)}
        return "tool_calls" if called and self.finish_reason == "stop" else self.finish_reason


Event = tuple[Choice, list[Piece], Delta]


@dataclass
class ChatRun:
    """A request to /v1/chat/completions and its answers."""

    service: Service
    body: ChatBody
    model: Model
    call: Call
    stop_ids: frozenset[int] = frozenset()
    choices: list[Choice] = field(default_factory=list)
    identity: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    async def events(self) -> AsyncGenerator[list[Event], None]:
        """What is added to the answers, as it comes; the first list is empty: the request was taken on.

        Raises:
            ApiError: it cannot be answered.
        """
        service, body, model, call = self.service, self.body, self.model, self.call
        call.model = model.name
        asked, logprobs, tools = body.asked_tokens, body.asked_logprobs, body.offered_tools()
        service.check_tokens(model, body.named_tokens(), "logit_bias" if body.logit_bias else "stop_token_ids")

        def prepare() -> tuple[tuple[int, ...], Any, str]:
            messages, read = read_conversation(body.messages, tools)
            ids = encode(service, model, messages, read)
            return ids, read, model.tokenizer.decode(ids[-TAIL:], skip_special_tokens=False)

        try:
            async with asyncio.timeout(service.options.limits.request_seconds):
                with service.place_for(body.n) as answers:
                    ids, read, tail = await service.prepare(prepare)
                    call.prompt_tokens = len(ids)
                    settings = body.settings(
                        service.options.defaults, service.room_for(len(ids), asked, "messages"), logprobs
                    )
                    requests = service.requests(model, [ids], settings, body.n, body.stop_token_ids)
                    self.stop_ids = frozenset(() if body.ignore_eos else requests[0].stop_ids)
                    replies = model.replies_for(read)
                    self.choices = [
                        Choice(index, replies.stream(read, tail, f"{self.identity}-{index}")) for index in range(body.n)
                    ]
                    answers.submit(service.generator.engine, requests)
                    yield []
                    while any(choice.finish_reason is None for choice in self.choices):
                        arrived = await answers.arriving()
                        events = [(choice := self.choices[n], choice.take(delta), delta) for n, delta in arrived]
                        if call.first_token is None:
                            call.first_token = time.monotonic()
                        call.completion_tokens = sum(len(choice.tokens) for choice in self.choices)
                        yield events
        except TimeoutError:
            raise service.timed_out() from None
        finally:
            service.count(call, [choice.reason for choice in self.choices if choice.reason])

    async def whole(self) -> dict[str, Any]:
        """The response, once all is there."""
        async for _ in self.events():
            pass
        texts = self.model.tokens
        return self._head("chat.completion") | {
            "choices": [
                {
                    "index": choice.index,
                    "message": _message(Reply.of(choice.pieces)),
                    "logprobs": self._logprobs(texts, choice.tokens, choice.finish_reason),
                    "finish_reason": choice.reason,
                }
                for choice in self.choices
            ],
            "usage": self.usage(),
        }

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The events of a stream."""
        started: set[int] = set()
        with_usage = {"usage": None} if self.body.stream_options.include_usage else {}
        head = self._head("chat.completion.chunk") | with_usage
        async for events in self.events():
            out: list[bytes] = []

            def send(choice: Choice, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> None:
                body = {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
                out.append(as_event(head | {"choices": [body]}))  # noqa: B023  (called in this turn of the loop)

            for choice, pieces, delta in events:
                if choice.index not in started:
                    started.add(choice.index)
                    send(choice, {"role": "assistant", "content": ""})
                logprobs = self._logprobs(self.model.tokens, delta.tokens, delta.finish_reason)
                deltas = [found for piece in pieces if (found := _delta(piece)) is not None]
                if logprobs and logprobs["content"] and not deltas:
                    deltas = [{"content": ""}]
                for each in deltas:
                    send(choice, each, logprobs)
                    logprobs = None
                if delta.is_last:
                    send(choice, {}, reason=choice.reason)
            yield b"".join(out)
        if self.body.stream_options.include_usage:
            yield as_event(head | {"choices": [], "usage": self.usage()})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.identity, "object": kind, "created": self.created, "model": self.model.name}

    def usage(self) -> dict[str, int]:
        return usage(self.call)

    def _logprobs(
        self, texts: TokenTexts, tokens: Sequence[Token], reason: FinishReason | None
    ) -> dict[str, Any] | None:
        """Of the tokens that are text: not of a stop token."""
        if not self.body.logprobs:
            return None
        if reason == "stop" and tokens and tokens[-1].id in self.stop_ids:
            tokens = tokens[:-1]

        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            return {
                "token": texts.text_of(token),
                "logprob": json_number(-math.inf if logprob is None else logprob),
                "bytes": list(texts.bytes_of(token)),
            }

        found = [
            entry(token.id, token.logprob) | {"top_logprobs": [entry(*likely) for likely in token.top]}
            for token in tokens
        ]
        return {"content": found, "refusal": None}


def usage(call: Call) -> dict[str, int]:
    return {
        "prompt_tokens": call.prompt_tokens,
        "completion_tokens": call.completion_tokens,
        "total_tokens": call.prompt_tokens + call.completion_tokens,
    }


def _message(reply: Reply) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.content, "refusal": None}
    if reply.reasoning is not None:
        message["reasoning_content"] = reply.reasoning
    if reply.tool_calls:
        message["content"] = reply.content or None
        message["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "function": {
                    "name": call["function"]["name"],
                    "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
                },
            }
            for call in reply.tool_calls
        ]
    return message


def _delta(piece: Piece) -> dict[str, Any] | None:
    """A piece of a reply as a stream has it. A call that turned out to be none cannot be taken back there: its text
    follows, and the finish reason is not `tool_calls`."""
    if isinstance(piece, ContentDelta):
        return {"content": piece.text}
    if isinstance(piece, ReasoningDelta):
        return {"reasoning_content": piece.text}
    if isinstance(piece, CallDropped):
        return None
    function: dict[str, Any] = {"arguments": piece.arguments}
    call: dict[str, Any] = {"index": piece.index, "function": function}
    if piece.name is not None:
        call = {"index": piece.index, "id": piece.id, "type": "function", "function": {"name": piece.name} | function}
    return {"tool_calls": [call]}


async def answer_tutorial(service: Service, body: TutorialBody, model: Model, call: Call) -> dict[str, str]:
    """/firefly: one question, one answer; the whole reply as text, as the tutorial's service gives it."""
    question = body.inputs.strip()
    call.model = model.name

    def prepare() -> tuple[int, ...]:
        return encode(service, model, *read_conversation([{"role": "user", "content": question}], ()))

    parts: list[str] = []
    reasons: list[str] = []
    try:
        async with asyncio.timeout(service.options.limits.request_seconds):
            with service.place_for(1) as answers:
                ids = await service.prepare(prepare)
                call.prompt_tokens = len(ids)
                room = service.room_for(len(ids), body.max_new_tokens, "inputs")
                settings = body.settings(service.options.defaults, room)
                answers.submit(service.generator.engine, service.requests(model, [ids], settings))
                while not reasons:
                    for _, delta in await answers.arriving():
                        call.first_token = call.first_token or time.monotonic()
                        call.completion_tokens += len(delta.tokens)
                        parts.append(delta.text)
                        reasons += [delta.finish_reason] if delta.finish_reason else []
    except TimeoutError:
        raise service.timed_out() from None
    finally:
        service.count(call, reasons)
    return {"input": question, "output": "".join(parts).strip()}
