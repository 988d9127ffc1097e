"""Who comes in: who brings the token, in a cookie that other sites' pages cannot send along."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx")
from fastapi import FastAPI
from starlette.testclient import TestClient

from firefly.server.access import POLICY, Guard, stored_token

TOKEN = "the-token"
LOCAL = frozenset({"localhost", "127.0.0.1"})


def client(password: str | None = None, hosts: frozenset[str] | None = LOCAL) -> TestClient:
    app = FastAPI()

    @app.get("/")
    def front() -> str:
        return "the page"

    @app.post("/act")
    def act() -> str:
        return "done"

    return TestClient(Guard(app, TOKEN, password, hosts), base_url="http://127.0.0.1:7860", follow_redirects=False)


def let_in(found: TestClient) -> None:
    answer = found.get("/", params={"token": TOKEN})
    assert answer.status_code == 303
    assert answer.headers["location"] == "/"
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    assert TOKEN not in cookie


def test_the_address_with_the_token_opens_the_page_and_a_cookie_keeps_it_open():
    found = client()
    assert found.get("/").status_code == 401
    assert found.post("/act").status_code == 401
    let_in(found)
    answer = found.get("/")
    assert answer.json() == "the page"
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert found.post("/act").json() == "done"


@pytest.mark.parametrize("token", ["", "wrong", TOKEN[:-1], TOKEN + "x", "ü"])
def test_another_token_does_not(token):
    assert client().get("/", params={"token": token}).status_code == 401


@pytest.mark.parametrize("cookie", ["x", "", TOKEN, "é", ";;;="])
def test_nor_a_made_up_cookie(cookie: str):
    found = client()
    name = found.app.cookie  # type: ignore[attr-defined]
    answer = found.get("/", headers={"cookie": f"{name}={cookie}".encode("latin-1", "replace")})  # type: ignore[dict-item]
    assert answer.status_code == 401


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1:9999", "null", "https://127.0.0.1:7861"])
def test_another_sites_page_is_refused_whatever_it_brings(origin):
    found = client()
    let_in(found)
    assert found.post("/act", headers={"origin": origin}).status_code == 403
    assert found.post("/act", headers={"origin": "http://127.0.0.1:7860"}).status_code == 200


def test_a_name_that_leads_here_is_refused():
    found = client()
    let_in(found)
    assert found.get("/", headers={"host": "evil.example"}).status_code == 403
    assert found.get("/", headers={"host": "localhost:7860"}).status_code == 200


def test_with_a_password_the_page_asks_and_the_token_alone_does_not_open_it(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr("firefly.server.access.time.monotonic", lambda: now[0])
    found = client(password="open sesame", hosts=None)
    asked = found.get("/", params={"token": TOKEN})
    assert asked.status_code == 401
    assert "<form" in asked.text
    assert found.post("/login", data={"password": "guess"}).status_code == 403
    assert found.post("/login", data={"password": "open sesame"}).status_code == 403  # too soon behind a wrong one
    now[0] += 5
    assert found.post("/login", data={"password": "open sesame"}).status_code == 303
    assert found.get("/").json() == "the page"


def test_a_login_without_end_is_not_read():
    found = client(password="p")
    assert found.post("/login", content=b"password=" + b"x" * 10_000_000).status_code == 403


def test_another_password_makes_old_cookies_void():
    first, second = client(password="a"), client(password="b")
    first.post("/login", data={"password": "a"})
    assert first.get("/").status_code == 200
    second.cookies = first.cookies
    assert second.get("/").status_code == 401


def test_the_token_is_made_once_for_its_owner_alone(tmp_path: Path):
    token = stored_token(tmp_path / ".firefly")
    assert len(token) >= 30
    assert stored_token(tmp_path / ".firefly") == token
    (path,) = (tmp_path / ".firefly").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_socket_without_the_cookie_is_closed():
    found: Any = client()
    with pytest.raises(Exception, match=r".*"), found.websocket_connect("/ws"):
        pass
