"""Who may come in. Every request brings the token of this studio, in a cookie that no other site's page can send along.

Without a password the token stands in the address that the command prints; with one, the page asks for it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from dataclasses import dataclass, field
from html import escape
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from urllib.parse import parse_qs

from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from firefly.server.transport import host_name
from firefly.translation import translate

COOKIE = "firefly_studio"
TOKEN_FILE = "studio_token"
COOKIE_SECONDS = 30 * 86400
LOGIN_BYTES = 4096
"""The largest login that is read."""
WAIT_SECONDS = 1.0
"""After a wrong password, for all: guessing takes longer than a life."""

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "frame-src 'self'; frame-ancestors 'self'; form-action 'self'; base-uri 'self'; object-src 'none'"
)
"""The browser asks nobody else for anything, whatever a library's page names."""


def stored_token(folder: Path) -> str:
    """The token of a folder's studio, made at its first start: pages that are open outlive a restart."""
    path = folder / TOKEN_FILE
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(24))
    except FileExistsError:
        pass
    return path.read_text(encoding="ascii").strip()


@dataclass
class Guard:
    """Lets requests through that bring the token, and adds what a browser has to know to every answer.

    Attributes:
        password: None: whoever has the address with the token comes in.
        hosts: names that this server goes by; None: any. A page elsewhere may have a name of its own lead here.
    """

    app: ASGIApp
    token: str
    password: str | None = None
    hosts: frozenset[str] | None = None
    _next_try: float = field(default=0.0, init=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("Content-Security-Policy", POLICY)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["X-Frame-Options"] = "SAMEORIGIN"
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        answer = await self._stopped(scope, receive)
        if answer is None:
            await self.app(scope, receive, sealed)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await answer(scope, receive, sealed)

    async def _stopped(self, scope: Scope, receive: Receive) -> Response | None:
        """What is answered in place of the page; None where the request may pass."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.hosts is not None and host_name(host) not in self.hosts:
            return PlainTextResponse(translate("this studio is not called so."), 403)
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return PlainTextResponse(translate("pages of other sites may not call this studio."), 403)
        if scope["type"] == "http" and scope["path"] == "/login" and scope["method"] == "POST":
            return await self._login(receive)
        if hmac.compare_digest(self._brought(headers.get("cookie", "")), self._seal()):
            return None
        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[0]
        if self.password is None and given and hmac.compare_digest(given.encode(), self.token.encode()):
            return self._let_in()
        if self.password is not None and scope["type"] == "http" and scope["method"] == "GET":
            return self._ask(401)
        text = translate("open the address that `firefly studio` printed: it has the token of this studio.")
        return PlainTextResponse(text, 401)

    async def _login(self, receive: Receive) -> Response:
        body, more = b"", True
        while more and len(body) <= LOGIN_BYTES:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        given = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True).get("password", [""])[0]
        now = time.monotonic()
        if (
            self.password is None
            or now < self._next_try
            or not hmac.compare_digest(given.encode(), self.password.encode())
        ):
            self._next_try = max(self._next_try, now + WAIT_SECONDS)
            return self._ask(403)
        return self._let_in()

    def _let_in(self) -> Response:
        answer = RedirectResponse("/", 303)
        answer.set_cookie(self.cookie, self._seal().decode(), httponly=True, samesite="lax", max_age=COOKIE_SECONDS)
        return answer

    @property
    def cookie(self) -> str:
        """Its name: browsers keep one jar for all ports of a machine, where another studio may listen."""
        return f"{COOKIE}_{hashlib.sha256(self.token.encode()).hexdigest()[:8]}"

    def _brought(self, header: str) -> bytes:
        try:
            found = SimpleCookie(header).get(self.cookie)
        except CookieError:
            return b""
        return b"" if found is None else found.value.encode()

    def _seal(self) -> bytes:
        """What the cookie holds: another password makes the old cookies void."""
        text = f"{self.token}:{self.password or ''}".encode()
        return hashlib.sha256(text).hexdigest().encode()

    def _ask(self, status: int) -> Response:
        wrong = escape(translate("That was not the password.")) if status == 403 else ""
        page = LOGIN_PAGE.format(
            title="Firefly Studio", label=escape(translate("Password")), button=escape(translate("Open")), wrong=wrong
        )
        return HTMLResponse(page, status)


LOGIN_PAGE = """<!doctype html>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }}
body {{ min-height: 90vh; display: grid; place-items: center; }}
form {{ display: grid; gap: .8rem; width: min(20rem, 90vw); }}
input, button {{ font: inherit; padding: .5rem .7rem; }}
p {{ color: #c33; min-height: 1.5em; margin: 0; }}
</style>
<form method="post" action="/login">
<h1>{title}</h1>
<label for="password">{label}</label>
<input id="password" name="password" type="password" autofocus autocomplete="current-password">
<p role="alert">{wrong}</p>
<button>{button}</button>
</form>
"""
