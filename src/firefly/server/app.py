"""The routes, and what stands before them: who may come in, what is logged, and how an error looks."""

from __future__ import annotations

import hashlib
import hmac
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from firefly.server.chat import ChatRun, answer_tutorial, describe_prompt
from firefly.server.completions import CompletionRun
from firefly.server.errors import ApiError, ClientGone
from firefly.server.protocol import ChatBody, CompletionBody, TutorialBody, parse_json
from firefly.server.service import Call, Service
from firefly.server.transport import JSON, EventStream, error_response, host_name, read_body, unless_gone
from firefly.translation import translate

OPEN = ("/health",)
"""Paths that ask for no key: a load balancer has none."""
CLIENT_GONE = 499
"""The status in log and metrics of a request whose client hung up, as nginx has it."""


def print_line(line: str) -> None:
    with suppress(OSError):  # a log on a full disk must not end a server
        print(line, file=sys.stderr, flush=True)


def make_app(service: Service, log: Callable[[str], None] = print_line) -> ASGIApp:
    """The server as an ASGI application.

    Args:
        log: takes one line for each request: when, who, what, how it ended, how long it took; nothing that was said.
    """
    app = FastAPI(title="Firefly", docs_url=None, redoc_url=None, openapi_url=None)
    limits = service.options.limits

    async def read(request: Request, kind: type[Any]) -> Any:
        return kind.read(parse_json(await read_body(request, limits)))

    async def run(request: Request, made: ChatRun | CompletionRun) -> Response:
        if made.body.stream:
            return EventStream(made.stream())
        return JSON(await unless_gone(request.receive, made.whole()))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body: ChatBody = await read(request, ChatBody)
        return await run(request, ChatRun(service, body, service.model(body.model), request.state.call))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body: CompletionBody = await read(request, CompletionBody)
        return await run(request, CompletionRun(service, body, service.model(body.model), request.state.call))

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body: ChatBody = await read(request, ChatBody)
        return JSON(await unless_gone(request.receive, describe_prompt(service, body, service.model(body.model))))

    @app.post("/firefly")
    async def tutorial(request: Request) -> Response:
        body: TutorialBody = await read(request, TutorialBody)
        answer = answer_tutorial(service, body, service.model(body.model), request.state.call)
        return JSON(await unless_gone(request.receive, answer))

    def describe(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": service.started, "owned_by": "firefly"}

    @app.get("/v1/models")
    async def models() -> Response:
        return JSON({"object": "list", "data": [describe(name) for name in service.models]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSON(describe(service.model(name).name))

    @app.get("/health")
    async def health() -> Response:
        is_alive = service.generator.engine.is_alive
        state = "draining" if service.is_draining else "ok" if is_alive else "dead"
        return JSON({"status": state}, 200 if state == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        engine = service.generator.engine
        text = service.metrics.render(engine.status(), engine.is_alive)
        return Response(text, media_type="text/plain; version=0.0.4")

    add_error_handlers(app)
    guarded: ASGIApp = Guard(app, service, log)
    if service.options.origins:
        guarded = CORSMiddleware(
            guarded, allow_origins=service.options.origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return guarded


def add_error_handlers(app: FastAPI) -> None:
    """Give every error the shape that clients read."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(ClientGone)
    async def client_gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {_shown(request.url.path)}"
        if error.status_code == 405:
            found = ApiError(405, "method_not_allowed", translate("{what}: this path takes another method.", what=what))
        else:
            found = ApiError(error.status_code, "not_found", translate("{what}: there is no such path.", what=what))
        return error_response(found)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return error_response(ApiError(500, "internal_error", translate("this server has failed; its log says how.")))


def _shown(path: str) -> str:
    """A path as a line of a log can have it."""
    return ascii(path)[1:-1][:120]


class Guard:
    """Asks for a key, counts and logs, and turns what nobody foresaw into an error 500."""

    def __init__(self, app: ASGIApp, service: Service, log: Callable[[str], None]) -> None:
        self.app, self.service, self.log = app, service, log
        self._keys = [_digest(key) for key in service.options.api_keys]
        self._paths = {route.path for route in getattr(app, "routes", ()) if hasattr(route, "path")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        call = Call()
        scope.setdefault("state", {})["call"] = call
        status, is_complete = CLIENT_GONE, False

        async def watched(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
            is_complete = is_complete or (message["type"] == "http.response.body" and not message.get("more_body"))
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, receive, watched)
        except ApiError as error:
            await error_response(error)(scope, receive, watched)
        except ClientGone:
            status = CLIENT_GONE
        except Exception:
            self.log(traceback.format_exc())
            if not is_complete:
                raise  # which breaks the connection off: a client must not take a part for the whole
        finally:
            self._note(scope, call, CLIENT_GONE if call.is_gone else status)

    def _check(self, scope: Scope) -> None:
        """Refuse who may not come in.

        Raises:
            ApiError: no such key, or the request comes from a page of another site.
        """
        headers, options = Headers(scope=scope), self.service.options
        if self._keys:
            if scope["path"] in OPEN:
                return
            kind, _, key = headers.get("authorization", "").partition(" ")
            given = _digest(key.strip() if kind.lower() == "bearer" else "")
            fits = [hmac.compare_digest(given, known) for known in self._keys]  # all of them, in equal time
            if not any(fits):
                raise ApiError(401, "invalid_api_key", translate("the API key is missing or wrong."))
            return
        origin = headers.get("origin")
        if origin is not None and origin not in options.origins and "*" not in options.origins:
            raise ApiError(
                403,
                "origin_not_allowed",
                translate("pages of {origin} may not call this server (--cors_origin).", origin=_shown(origin)),
            )
        if options.hosts is not None and host_name(headers.get("host", "")) not in options.hosts:
            raise ApiError(
                403,
                "host_not_allowed",
                translate(
                    "this server is not called {host}; behind a proxy it needs a key (--api_key).",
                    host=_shown(headers.get("host", "")),
                ),
            )

    def _note(self, scope: Scope, call: Call, status: int) -> None:
        path = scope["path"] if scope["path"] in self._paths else "other"
        seconds = time.monotonic() - call.began
        self.service.metrics.requests[path, status] += 1
        if call.model:
            self.service.metrics.request_seconds.observe(seconds)
        client = (scope.get("client") or ("-",))[0]
        when = time.strftime("%Y-%m-%dT%H:%M:%S")
        tokens = (
            f" model={_shown(call.model)} in={call.prompt_tokens} out={call.completion_tokens}" if call.model else ""
        )
        if path in OPEN and status == 200:
            return
        self.log(f"{when} {client} {scope['method']} {_shown(scope['path'])} {status} {seconds:.3f}s{tokens}")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
