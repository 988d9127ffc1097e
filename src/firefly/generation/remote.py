"""Answers from another process: a server that speaks OpenAI's /v1/completions as vLLM does.

It is sent token ids, which our template and tokenizer made, and gives token ids, which our tokenizer decodes: its own
chat template and its own idea of where an answer ends have no part in it. So the text of an answer, its stop texts and
its end are found by the same code as in this process (`Job`), and only the numbers are the server's.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from urllib.parse import urlsplit

from firefly.errors import UsageError
from firefly.files import first_line
from firefly.generation.engine import Delta, EngineFull, EngineStatus, Request, Token
from firefly.generation.job import Job
from firefly.generation.sampler import seed_of
from firefly.generation.settings import GenerationSettings
from firefly.translation import translate

PATIENCE = 20.0
"""Seconds within which a server has to take a connection, and to answer what it need not compute."""
LONGEST = 600.0
"""Seconds for what is computed at a stroke: the log-probabilities of a text, or the first token of all."""
WATCHED_EVERY = 5.0
FAILURES = 3
"""So often in a row a server's /health has to fail before it is given up: one that compiles is silent for a while."""
SCORED_AT_ONCE = 16
OTHER_VERSION = re.compile(r"/v\d+(alpha|beta)?\d*(/openai)?$")
"""The end of an address that names the API's version itself, in place of /v1."""


@dataclass(frozen=True)
class RemoteLimits:
    """What is sent to a server, which has a queue and a batch of its own.

    Attributes:
        max_requests: as many at a time keep its batch full.
        max_waiting: beyond these, so many are sent on to its queue; more are not taken on.
    """

    max_requests: int = 64
    max_waiting: int = 256


class ServerError(Exception):
    """The server did not do what was asked of it, in its own words.

    Attributes:
        status: HTTP's; None where it answered, but otherwise than it should.
        retry_after: seconds after which it wants to be asked again, where it says so.
    """

    def __init__(self, text: str, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.status, self.retry_after = status, retry_after


class Process(Protocol):
    """The server's process, where it is ours."""

    def failure(self) -> str | None:
        """Why it has ended, in the user's language; None while it runs."""
        ...

    def stop(self) -> None: ...


@dataclass(frozen=True)
class Server:
    """Where a server listens.

    Attributes:
        url: with or without the closing /v1. Some have another version there (/api/paas/v4), or a name behind it.
    """

    url: str
    api_key: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        with suppress(ValueError):
            parts = urlsplit(self.url)
            if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
                return
        raise UsageError(
            "remote.bad_url",
            "--engine_url = {url} is no address of a server. Write it as http://HOST:PORT.",
            url=self.url,
        )

    def connect(self, seconds: float) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        host, port = parts.hostname or "", parts.port
        if parts.scheme == "https":
            return http.client.HTTPSConnection(host, port, timeout=seconds, context=ssl.create_default_context())
        return http.client.HTTPConnection(host, port, timeout=seconds)

    def send(self, connection: http.client.HTTPConnection, path: str, body: Mapping[str, Any] | None) -> None:
        base = urlsplit(self.url).path.rstrip("/").removesuffix("/v1")
        if OTHER_VERSION.search(base):
            path = path.removeprefix("/v1")
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        if body is None:
            connection.request("GET", base + path, headers=headers)
        else:
            headers["Content-Type"] = "application/json"
            connection.request("POST", base + path, json.dumps(body).encode(), headers)

    def ask(self, path: str, body: Mapping[str, Any] | None = None, seconds: float = PATIENCE) -> Any:
        """What it answers, as JSON where it is any.

        Raises:
            ServerError: an answer that says so.
            OSError, http.client.HTTPException: none.
        """
        deadline = time.monotonic() + seconds
        with closing(self.connect(min(seconds, PATIENCE))) as connection:
            connection.connect()
            connection.sock.settimeout(seconds)
            self.send(connection, path, body)
            response = connection.getresponse()
            answer = b""
            # Blank lines that keep a connection open would put off the end of a single read again and again.
            while part := response.read1(1 << 16):
                answer += part
                if time.monotonic() > deadline:
                    raise TimeoutError(translate("no whole answer in {seconds:.0f} seconds", seconds=seconds))
        if response.length:
            raise http.client.IncompleteRead(answer, response.length)
        if response.status != http.client.OK:
            wait = response.headers.get("Retry-After", "")
            raise ServerError(
                complaint(answer, response.status), response.status, float(wait) if wait.isdecimal() else None
            )
        return json.loads(answer) if answer else None


def complaint(answer: bytes, status: int | None = None) -> str:
    """What a server says is wrong, in OpenAI's or FastAPI's form or another."""
    text = answer.decode(errors="replace").strip()
    with suppress(ValueError, AttributeError):
        said = json.loads(text)
        said = said.get("error") or said.get("detail") or said
        text = str(said.get("message", said)) if isinstance(said, dict) else str(said)
    return f"{status or ''} {http.client.responses.get(status or 0, '')}: {text[:500]}".strip(": ")


def completion_body(request: Request, model: str) -> dict[str, Any]:
    """What is sent for a request. Every setting is named, or the server would put its own defaults in.

    Stop texts are not sent: they are found in the text that our tokenizer makes of the ids, and end the connection.
    """
    settings = request.settings
    return {
        "model": model,
        "prompt": list(request.prompt_ids),
        "max_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "min_p": settings.min_p,
        "repetition_penalty": settings.repetition_penalty,
        "presence_penalty": settings.presence_penalty,
        "frequency_penalty": settings.frequency_penalty,
        "logit_bias": {str(token): bias for token, bias in settings.logit_bias.items()},
        "seed": seed_of(request),
        # Of the tokens that end an answer the template decides, not the server's generation_config.json.
        "ignore_eos": True,
        "stop_token_ids": [] if settings.ignore_stop_tokens else list(request.stop_ids),
        "logprobs": settings.logprobs,
        "stream": True,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "skip_special_tokens": False,
    }


def refuse_unhonoured(settings: GenerationSettings) -> None:
    """
    Raises:
        UsageError: vLLM would do something else than these settings say.
    """
    for name, honoured, expected in (
        # It would take 0.01 for what lies between.
        ("temperature", settings.temperature == 0 or settings.temperature >= 0.01, "0, or ≥ 0.01"),
        ("presence_penalty", abs(settings.presence_penalty) <= 2, "-2 ≤ x ≤ 2"),
        ("frequency_penalty", abs(settings.frequency_penalty) <= 2, "-2 ≤ x ≤ 2"),
        # It would take ±100 for what lies beyond.
        ("logit_bias", all(abs(bias) <= 100 for bias in settings.logit_bias.values()), "-100 ≤ x ≤ 100"),
        # It adds the bias first, and then multiplies the sum.
        ("repetition_penalty", settings.repetition_penalty == 1 or not settings.logit_bias, "1 beside a logit_bias"),
    ):
        if not honoured:
            raise UsageError(
                "remote.not_honoured",
                "{option} = {value} is not honoured by vLLM: {expected}.",
                option=name,
                value=getattr(settings, name),
                expected=expected,
            )


def read_tokens(choice: Mapping[str, Any], top: int | None) -> list[Token]:
    """The tokens of one event of a stream.

    Args:
        top: how many of the likeliest tokens were asked for; None: no log-probabilities.

    Raises:
        ServerError: it has no ids, or not the log-probabilities.
    """
    ids = choice.get("token_ids")
    if ids is None:
        raise ServerError(
            translate("it gives text without token ids; vLLM gives them since version 0.10.2 (return_token_ids)")
        )
    if top is None:
        return [Token(token) for token in ids]
    found = choice.get("logprobs") or {}
    own, near = found.get("token_logprobs") or [], found.get("top_logprobs") or [{}] * len(ids)
    if not len(own) == len(near) == len(ids):
        raise ServerError(translate("it gives no log-probabilities (logprobs)"))
    return [
        Token(token, logprob, _likeliest({_id_of(name): value for name, value in places.items()}, top))
        for token, logprob, places in zip(ids, own, near, strict=True)
    ]


def _id_of(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def _likeliest(logprobs: Mapping[int, float], top: int) -> tuple[tuple[int, float], ...]:
    """The server names the token itself too, whether it is among the likeliest or not."""
    return tuple(sorted(logprobs.items(), key=lambda item: -item[1])[:top])


class _Call:
    """A request on its way to the server, and its ticket."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.has_begun = False
        """Whether a token of the answer has come."""
        self._socket: socket.socket | None = None
        self._ended = False
        self._lock = threading.Lock()

    def cancel(self) -> None:
        self.job.cancel()
        self.hang_up()

    def hang_up(self) -> None:
        """Close the connection, by which the server learns that nobody waits; a read from it ends, too."""
        with self._lock:
            self._ended = True
            if self._socket is not None:
                with suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def events(self, server: Server, body: Mapping[str, Any]) -> Generator[Mapping[str, Any], None, None]:
        """The events of the server's stream."""
        with closing(server.connect(PATIENCE)) as connection:
            connection.connect()
            with self._lock:
                if self._ended:
                    return
                self._socket = connection.sock
            # The first token may be long in coming. If the server is gone, the engine's watch ends the wait.
            connection.sock.settimeout(None)
            server.send(connection, "/v1/completions", body)
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise ServerError(complaint(response.read(), response.status))
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if event.get("error"):
                    raise ServerError(complaint(data))
                yield event


class RemoteEngine:
    """An engine over a server.

    Args:
        models: our name of each model → the server's, the base's first, if it is served.
        tokenizers: by our names.
        context_length: the most tokens that the server takes for prompt and answer.
        process: the server's, if it is to end with the engine.
    """

    def __init__(
        self,
        server: Server,
        models: Mapping[str, str],
        tokenizers: Mapping[str, Any],
        context_length: int,
        process: Process | None = None,
        limits: RemoteLimits = RemoteLimits(),
    ) -> None:
        self.models = tuple(models)
        self.context_length = context_length
        self.max_requests = limits.max_requests
        self.vocabulary_size: int | None = None  # the server refuses what it does not know
        self.limits = limits
        self._server, self._names, self._tokenizers = server, dict(models), dict(tokenizers)
        self._process = process
        self._calls: dict[_Call, threading.Thread] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._failure: str | None = None
        self._failures = 0
        self._closed = threading.Event()
        self._watch = threading.Thread(target=self._watch_server, name="generation-watch", daemon=True)
        self._watch.start()

    @property
    def is_alive(self) -> bool:
        ended = self._process is not None and self._process.failure() is not None
        return self._failure is None and not ended and not self._closed.is_set()

    def submit(self, request: Request, deliver: Callable[[Delta], None]) -> _Call:
        """As an engine does.

        Raises:
            UsageError: a setting that the server does not honour.
        """
        refuse_unhonoured(request.settings)
        most = min(request.settings.max_new_tokens, max(1, self.context_length - len(request.prompt_ids)))
        request = replace(request, settings=replace(request.settings, max_new_tokens=most))
        call = _Call(Job(request, self._tokenizers[request.model], deliver))
        with self._changed:
            self._refuse_if_closed()
            if len(self._calls) >= self.limits.max_requests + self.limits.max_waiting:
                raise EngineFull
            thread = threading.Thread(target=self._answer, args=(call,), name="generation-call", daemon=True)
            self._calls[call] = thread
            thread.start()
        return call

    def score(self, prompts: Sequence[Sequence[int]], model: str, top: int) -> list[list[Token]]:
        """As an engine does.

        Raises:
            RuntimeError: the server did not answer, or refused.
        """
        self._refuse_if_closed()

        def one(ids: Sequence[int]) -> list[Token]:
            if not ids:
                return []
            body = {
                "model": self._names[model],
                "prompt": list(ids),
                "max_tokens": 1,
                "temperature": 0,
                "prompt_logprobs": top,
            }
            try:
                found = self._server.ask("/v1/completions", body, LONGEST)["choices"][0]["prompt_logprobs"]
                return [
                    Token(
                        token,
                        None if places is None else places[str(token)]["logprob"],
                        _likeliest({int(near): each["logprob"] for near, each in (places or {}).items()}, top),
                    )
                    for token, places in zip(ids, found, strict=True)
                ]
            except (OSError, http.client.HTTPException, ServerError, ValueError, KeyError, TypeError) as error:
                raise RuntimeError(self._say(error)) from error

        with ThreadPoolExecutor(SCORED_AT_ONCE, "generation-score") as pool:
            return list(pool.map(one, prompts))

    def status(self) -> EngineStatus:
        with self._changed:
            running = sum(call.has_begun for call in self._calls)
            return EngineStatus(running, len(self._calls) - running)

    def close(self, drain: bool = False) -> None:
        with self._changed:
            self._closing = True
            while drain and self._calls and self._failure is None:
                self._changed.wait()
            calls = dict(self._calls)
        for call in calls:
            call.cancel()
        for thread in calls.values():
            thread.join()
        self._closed.set()
        self._watch.join()
        if self._process is not None:
            self._process.stop()

    def _refuse_if_closed(self) -> None:
        if self._closing or not self.is_alive:
            raise RuntimeError(self._failure or "the engine has ended")

    def _say(self, error: Exception) -> str:
        of_process = self._process.failure() if self._process is not None else None
        return (
            self._failure
            or of_process
            or translate(
                "the server at {url} does not answer as it should: {problem}",
                url=self._server.url,
                problem=first_line(error),
            )
        )

    # ---- on threads of the engine's own

    def _answer(self, call: _Call) -> None:
        """Hand on one answer as it comes."""
        job = call.job
        request = job.request
        try:
            with closing(call.events(self._server, completion_body(request, self._names[request.model]))) as events:
                reason = None
                for event in events:
                    for choice in event.get("choices") or ():
                        for token in read_tokens(choice, request.settings.logprobs):
                            call.has_begun, self._failures = True, 0
                            job.take(token)
                        reason = choice.get("finish_reason") or reason
                    if job.is_over:
                        return
            raise ServerError(translate("it ended an answer early (finish_reason: {reason})", reason=reason))
        except Exception as error:  # whatever it is, somebody waits for the last delta
            if job.is_cancelled:
                job.end("cancelled")
            else:
                job.end(error=self._say(error))
        finally:
            with self._changed:
                del self._calls[call]
                self._changed.notify_all()

    def _watch_server(self) -> None:
        """Look every few seconds whether the server lives, and end all requests when it does not."""
        while not self._closed.wait(WATCHED_EVERY):
            failure = self._process.failure() if self._process is not None else None
            if failure is None:
                try:
                    with suppress(ValueError):  # it may say so in words of its own
                        self._server.ask("/health")
                    self._failures = 0
                    continue
                except (OSError, http.client.HTTPException, ServerError) as error:
                    self._failures += 1
                    if self._failures < FAILURES:
                        continue
                    failure = self._say(error)
            with self._changed:
                self._failure = failure
                calls = list(self._calls)
                self._changed.notify_all()
            for call in calls:
                call.hang_up()
            return
