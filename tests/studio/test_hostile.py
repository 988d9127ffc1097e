"""Requests that no page of ours makes, to a studio that runs: nothing is read, written or started outside its roots."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from studio_server import StudioServer

pytestmark = [
    pytest.mark.browser,  # with the walk: a studio takes seconds to start
    pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed"),
]

SECRET = "what nobody may read"
API = "/en/gradio_api"
MODEL = "smollm2-135m-instruct"
WRITTEN = json.dumps({"model_name_or_path": MODEL, "train_file": "SECRET", "output_dir": "OUT"})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the root of a studio, and a secret beside it."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "root").mkdir()
    (folder / "secret.jsonl").write_text(json.dumps({"instruction": SECRET, "output": SECRET}), encoding="utf-8")
    (folder / "root" / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}', encoding="utf-8")
    (folder / "report.html").write_text(SECRET, encoding="utf-8")
    (folder / "root" / "link").symlink_to(folder)
    return folder


@pytest.fixture(scope="module")
def studio(place: Path) -> Iterator[StudioServer]:
    found = StudioServer(place / "root", ("--max_upload", "1MB"))
    found.start()
    yield found
    found.end()


@pytest.fixture(scope="module")
def cookie(studio: StudioServer) -> str:
    status, headers, _ = ask(studio, "/?token=" + studio.address.partition("token=")[2])
    assert status == 303
    return headers["set-cookie"].partition(";")[0]


def ask(
    studio: StudioServer,
    path: str,
    method: str = "GET",
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, dict[str, str], bytes]:
    """The path is sent as it stands: no client here takes .. out of it."""
    connection = http.client.HTTPConnection("127.0.0.1", studio.port, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def post(studio: StudioServer, path: str, value: Any, cookie: str) -> tuple[int, bytes]:
    headers = {"Cookie": cookie, "Content-Type": "application/json"}
    status, _, body = ask(studio, path, "POST", json.dumps(value).encode(), headers)
    return status, body


def upload(studio: StudioServer, name: str, content: bytes, cookie: str) -> tuple[int, bytes]:
    part = f'--xx\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    headers = {"Cookie": cookie, "Content-Type": "multipart/form-data; boundary=xx"}
    status, _, body = ask(studio, f"{API}/upload", "POST", part + content + b"\r\n--xx--\r\n", headers)
    return status, body


def act(studio: StudioServer, cookie: str, element: str, event: str, data: list[Any]) -> str:
    """Call what hangs on an event of an element as the page does, with any values; returns all that is answered."""
    _, _, described = ask(studio, "/en/config", headers={"Cookie": cookie})
    config = json.loads(described)
    (target,) = [item["id"] for item in config["components"] if item["props"].get("elem_id") == element]
    numbers = [
        item["id"] for item in config["dependencies"] if [target, event] in item["targets"] and item["backend_fn"]
    ]
    assert numbers, f"nothing hangs on {element}.{event}"
    said = ""
    for number in numbers:
        session = f"hostile{number}"
        called = {"data": data, "fn_index": number, "session_hash": session, "event_data": None, "trigger_id": target}
        status, body = post(studio, f"{API}/queue/join", called, cookie)
        said += body.decode()
        if status == 200:
            _, _, body = ask(studio, f"{API}/queue/data?session_hash={session}", headers={"Cookie": cookie})
            said += body.decode()
    return said


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "root" not in path.relative_to(folder).parts}


def jobs_of(place: Path) -> set[str]:
    return {job.name for job in (place / "root" / ".firefly" / "jobs").glob("*")}


PATHS = [
    "/",
    "/en/",
    "/zh/",
    "/en/config",
    "/en/theme.css",
    "/report?path=.",
    f"{API}/info",
    f"{API}/startup-events",
    f"{API}/file=/etc/passwd",
    f"{API}/queue/data?session_hash=x",
    f"{API}/queue/status",
    "/en/monitoring",
    "/en/assets/../config",
    "/docs",
    "/openapi.json",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "PUT", "DELETE"])
def test_nothing_answers_without_the_token(method: str, path: str, studio: StudioServer) -> None:
    for headers in ({}, {"Cookie": "firefly_studio=x"}, {"Authorization": "Bearer x"}):
        status, _, body = ask(studio, path, method, b"{}" if method in ("POST", "PUT") else None, headers)
        assert status == 401
        assert b"gradio" not in body


def test_a_page_elsewhere_cannot_use_the_cookie_and_no_other_name_leads_here(studio: StudioServer, cookie: str) -> None:
    assert ask(studio, "/en/config", headers={"Cookie": cookie})[0] == 200
    assert ask(studio, "/en/config", headers={"Cookie": cookie, "Origin": "http://elsewhere.example"})[0] == 403
    assert ask(studio, "/en/config", headers={"Cookie": cookie, "Host": "elsewhere.example"})[0] == 403


@pytest.mark.parametrize(
    "path",
    [
        f"{API}/file=/etc/passwd",
        f"{API}/file=%2Fetc%2Fpasswd",
        f"{API}/file=" + "../" * 12 + "etc/passwd",
        f"{API}/file=SECRET",
        f"{API}/file=link/secret.jsonl",
        f"{API}/file=.firefly/studio_token",
        f"{API}/file=ROOT/.firefly/studio_token",
        f"{API}/file/etc/passwd",
        f"{API}/proxy=http://example.com/",
        f"{API}/file=http://example.com/",
        "/en/assets/" + "../" * 14 + "etc/passwd",
        "/en/static/" + "..%2f" * 14 + "etc/passwd",
        "/en/svelte/" + "../" * 14 + "etc/passwd",
        "/report?path=..",
        "/report?path=link",
        "/report?path=PLACE",
        "/report?path=%00",
    ],
)
def test_no_file_is_read_outside_of_the_roots(path: str, studio: StudioServer, place: Path, cookie: str) -> None:
    for name, value in (
        ("SECRET", place / "secret.jsonl"),
        ("ROOT", place / "root"),
        ("PLACE", place),
    ):
        path = path.replace(name, quote(str(value)))
    status, headers, body = ask(studio, path, headers={"Cookie": cookie})
    assert status in (400, 403, 404), (status, body[:200])
    assert SECRET.encode() not in body
    assert b"root:" not in body
    assert "example.com" not in headers.get("location", "")


def test_an_upload_stays_in_the_folder_for_uploads_whatever_its_name_and_size(
    studio: StudioServer, place: Path, cookie: str
) -> None:
    before = files_below(place)
    for name in ("../../../out.jsonl", "/tmp/out.jsonl", "..\\out.jsonl", ".bashrc", "a/b/../../c.jsonl", "x" * 300):
        status, body = upload(studio, name, b"{}\n", cookie)
        assert status in (200, 400, 500), body
        for path in json.loads(body) if status == 200 else ():
            assert Path(path).resolve().is_relative_to(place / "root" / ".firefly" / "tmp")
            said = act(studio, cookie, "upload", "upload", [[{"path": path, "meta": {"_type": "gradio.FileData"}}]])
            assert "process_completed" in said
    assert files_below(place) == before
    kept = place / "root" / "uploads"
    assert all(path.parent == kept and not path.name.startswith(".") for path in kept.iterdir())
    status, _ = upload(studio, "large.jsonl", b"x" * (2 << 20), cookie)
    assert status == 413


@pytest.mark.parametrize("path", ["SECRET", "TOKEN"])
def test_no_forged_upload_moves_a_file_that_was_not_uploaded(
    path: str, studio: StudioServer, place: Path, cookie: str
) -> None:
    path = {"SECRET": str(place / "secret.jsonl"), "TOKEN": str(place / "root/.firefly/studio_token")}.get(path, path)
    for value in ([{"path": path, "meta": {"_type": "gradio.FileData"}}], [path], [{"path": path}]):
        said = act(studio, cookie, "upload", "upload", [value])
        assert '"success":true' not in said.replace(" ", ""), said
    assert Path(path).is_file()
    kept = place / "root" / "uploads"
    assert not any(SECRET in file.read_text(errors="replace") for file in kept.rglob("*") if file.is_file())


ACTS: dict[tuple[str, str], list[list[Any]]] = {
    ("check", "click"): [
        ["SECRET", None, MODEL, "auto", "sft", 64, 1],
        ["link/secret.jsonl", None, MODEL, "auto", "sft", 64, 1],
        ["link", None, MODEL, "auto", "sft", 64, 1],
        [".", None, MODEL, "auto", "sft", 64, 1],
        ['["SECRET"]', None, MODEL, "auto", "auto", 64, 1],
        ["*/secret.jsonl", None, MODEL, "auto", "auto", 64, 1],
        ["../*.jsonl", None, MODEL, "auto", "auto", 64, 1],
        ["rows.jsonl", "SECRET", MODEL, "auto", "auto", 64, 1],
        ["rows.jsonl", None, MODEL, "SECRET", "auto", 64, 1],
        ["rows.jsonl --output_dir=OUT", None, MODEL, "auto", "auto", 64, 1],
    ],
    ("start", "click"): [[WRITTEN], [WRITTEN.replace("SECRET", "rows.jsonl")], [WRITTEN.replace("OUT", "made")]],
    ("resume", "click"): [[WRITTEN]],
    ("enqueue", "click"): [[WRITTEN], [WRITTEN.replace("SECRET", "rows.jsonl")]],
    ("config-save", "click"): [["{}", "../../../out"], ["{}", "/etc/out"], ["{}", "../link/out"]],
    ("preset", "input"): [["SECRET"], ["link/secret.jsonl"], ["/etc/passwd"]],
    ("talk-load", "click"): [["PLACE", ""], ["", "PLACE"], ["link", ""], ["--help", ""]],
    ("begin-compare", "click"): [["PLACE", "", "SECRET", 4], ["link", "", None, 4], [".", "PLACE", None, 4]],
    ("begin-export", "click"): [
        ["PLACE", "", "gguf", "q8_0", ""],
        ["rows.jsonl", "", "merge", "q8_0", "OUT"],
        ["rows.jsonl", "PLACE", "--help", "q8_0", ""],
    ],
    ("watched", "change"): [[["PLACE"]], [["link"]]],
    ("stop", "click"): [[["PLACE"]]],
    ("watch-resume", "click"): [[["PLACE"]]],
    ("history-run", "change"): [["PLACE"], ["link"]],
    ("history-delete", "click"): [["PLACE", "NAME"], ["link", "NAME"], [".", "root"]],
    ("queue-remove", "click"): [["../../../.."], ["."], ["PLACE"]],
    ("queue-stop", "click"): [["../../../.."], ["PLACE"]],
    ("export-job", "change"): [["../../../.."], ["PLACE"]],
    ("export-stop", "click"): [["../../../.."], ["PLACE"]],
}


@pytest.mark.parametrize(("element", "event"), list(ACTS))
def test_no_handler_reaches_beyond_the_roots(
    element: str, event: str, studio: StudioServer, place: Path, cookie: str
) -> None:
    names = {"SECRET": place / "secret.jsonl", "OUT": place / "made", "PLACE": place, "NAME": place.name}
    before, started = files_below(place), jobs_of(place)
    for data in ACTS[element, event]:
        text = json.dumps(data)
        for name, value in names.items():
            text = text.replace(name, str(value))
        said = act(studio, cookie, element, event, json.loads(text))
        assert SECRET not in said
        assert "root:" not in said
        assert "Traceback" not in said
    assert files_below(place) == before
    assert jobs_of(place) == started
