"""A hub that cannot be reached, refuses or does not know a name is one message, soon; what its cache holds is used."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from transformers import AutoConfig

from firefly import hub
from firefly.cli import main
from firefly.config import ModelConfig
from firefly.console import take_notices
from firefly.data.readers.data_files import find_files
from firefly.errors import UsageError
from firefly.models.loading import load_tokenizer, pretrained, resolve_model
from tiny import save_tiny_model, write_rows

COMMIT = "a1" * 20


class Server(ThreadingHTTPServer):
    """A hub: `answer` is what it says to everything, or None for one that has the files of `folder` as org/name."""

    daemon_threads = True
    answer: tuple[int, dict[str, str], bytes] | None = None
    folder = Path()
    hangs = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.closing = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if not path.startswith("/api/agent"):  # the library's own question, of no matter
            self.server.asked.append(f"{self.command} {path}")
        if self.server.hangs:
            self.server.closing.wait()
        elif self.server.answer is not None:
            self.reply(*self.server.answer)
        elif path.startswith(("/api/models/org/name", "/api/datasets/org/name")):
            names = sorted(file.name for file in self.server.folder.iterdir())
            about = {"id": "org/name", "sha": COMMIT, "tags": [], "siblings": [{"rfilename": name} for name in names]}
            tree = [{"type": "file", "path": name, "oid": "b1" * 20, "size": 1} for name in names]
            self.reply(
                200, {"Content-Type": "application/json"}, json.dumps(tree if "/tree/" in path else about).encode()
            )
        elif "org/name/resolve/" in path:
            file = self.server.folder / path.partition("/resolve/")[2].partition("/")[2]
            if file.is_file():
                self.reply(200, {"ETag": f'"{file.name}"', "X-Repo-Commit": COMMIT}, file.read_bytes())
            else:
                self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"")
        else:
            self.reply(404, {"X-Error-Code": "RepoNotFound"}, b"")

    do_HEAD = do_GET


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A hub that the libraries take for theirs, and an empty cache."""
    with Server() as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        use(monkeypatch, running.address, tmp_path / "hf")
        yield running
        running.closing.set()
        running.shutdown()


def use(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(hub.time, "sleep", lambda _: None)
    hub._find_model.cache_clear()
    hub._list_dataset.cache_clear()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("hub") / "model")


def refused(name: str = "org/name", **settings: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        resolve_model(ModelConfig(name_or_path=name, **settings))
    return caught.value


def keep_copy(cache: Path, files: Path, kind: str = "models") -> Path:
    """A snapshot as the library leaves it in its cache."""
    root = cache / "hub" / f"{kind}--org--name"
    shutil.copytree(files, root / "snapshots" / COMMIT)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    return root


# ---- hubs that do not answer ----


def test_a_hub_that_never_answers_is_given_up_in_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.hangs = True
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
    started = time.monotonic()
    error = refused()
    assert time.monotonic() - started < 3
    assert error.code == "hub.unreachable"
    assert all(
        remedy in str(error) for remedy in (server.address, "HF_ENDPOINT", '"hub": "modelscope"', "local folder")
    )


def test_by_default_no_hub_is_waited_for_more_than_ten_seconds() -> None:
    assert hub.DEADLINE < 10


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_hub_in_trouble_is_asked_again_before_it_is_given_up(server: Server, status: int) -> None:
    server.answer = status, {}, b"{}"
    error = refused()
    assert (error.code, str(error.values["problem"])) == ("hub.unreachable", f"HTTP {status}")
    assert server.asked == ["HEAD /org/name/resolve/main/config.json"] * 3


def test_what_answers_like_no_hub_is_none(server: Server) -> None:
    server.answer = 200, {"Content-Type": "text/html"}, b"<html>log in</html>"
    assert refused().code == "hub.unreachable"
    with pytest.raises(UsageError) as caught:
        find_files("org/name", "train_file")
    assert caught.value.code == "hub.unreachable"


@pytest.mark.parametrize("address", ["http://127.0.0.1:{port}", "127.0.0.1", "http://no such host"])
def test_an_address_where_nothing_is_is_one_message(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        use(monkeypatch, address.format(port=free.getsockname()[1]), tmp_path / "hf")
        assert refused().code == "hub.unreachable"
        with pytest.raises(UsageError) as caught:
            find_files("org/name", "eval_file")
    assert caught.value.code == "hub.unreachable"
    assert "eval_file = org/name" in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "--train_file", "rows.jsonl"],
        ["plan"],
        ["chat"],
        ["templates", "verify"],
        ["train", "config.json"],
        ["merge", "--adapter_name_or_path", "adapter", "--save_path", "merged"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_command_asks_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str]
) -> None:
    server.answer = 404, {}, b""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", 2)
    settings = {"train_file": "rows.jsonl", "output_dir": "out", "model_name_or_path": "org/name"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "target_modules": ["q"]}')
    (tmp_path / "adapter" / "adapter_model.safetensors").touch()  # not read before the base is there
    assert main([*arguments, "--model_name_or_path", "org/name"]) == 2
    assert server.asked == ["HEAD /org/name/resolve/main/config.json", "GET /api/models/org/name"]
    error = capsys.readouterr().err
    assert error.count("org/name is not a local path") == 1
    assert "Traceback" not in error


# ---- hubs that say no ----


@pytest.mark.parametrize(
    ("status", "headers", "code"),
    [
        (404, {}, "hub.missing"),
        (404, {"X-Error-Code": "RepoNotFound"}, "hub.missing"),
        (401, {}, "hub.missing"),
        (401, {"X-Error-Code": "GatedRepo"}, "hub.refused"),
        (403, {"X-Error-Code": "GatedRepo"}, "hub.refused"),
        (403, {}, "hub.refused"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "hub.no_revision"),
    ],
)
def test_a_refusal_has_its_own_message_and_is_not_asked_again(
    server: Server, status: int, headers: dict[str, str], code: str
) -> None:
    server.answer = status, headers, b""
    assert refused(revision="v2").code == code
    assert len(server.asked) == (2 if headers == {} and status == 404 else 1)
    with pytest.raises(UsageError) as caught:
        find_files("org/name", "train_file")
    assert caught.value.code == code


@pytest.mark.parametrize("name", ["a b", "org/na me", "x--y..z", "模型"])
def test_what_is_no_name_is_not_asked_for(server: Server, name: str) -> None:
    assert refused(name).code == "hub.bad_id"
    assert server.asked == []


# ---- hubs that answer ----


def test_a_model_is_fetched_as_before(server: Server, model: Path) -> None:
    server.folder = model
    config = ModelConfig(name_or_path="org/name")
    assert resolve_model(config) == "org/name"
    assert pretrained(AutoConfig, config).to_dict() == AutoConfig.from_pretrained(model).to_dict() | {
        "_name_or_path": "org/name"
    }
    text = "two blue 天"
    assert (
        load_tokenizer(config)(text).input_ids == load_tokenizer(ModelConfig(name_or_path=str(model)))(text).input_ids
    )
    assert server.asked.count("HEAD /org/name/resolve/main/config.json") == 1


def test_a_tokenizer_without_a_model_is_there(server: Server, tmp_path: Path, model: Path) -> None:
    server.folder = shutil.copytree(model, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("config.json"))
    assert load_tokenizer(ModelConfig(name_or_path="org/name"))("red").input_ids


def test_a_dataset_is_fetched_as_before(server: Server, tmp_path: Path) -> None:
    server.folder = tmp_path / "data"
    server.folder.mkdir()
    write_rows(server.folder / "train.jsonl", 3)
    (found,) = find_files("org/name", "train_file")
    assert found.read_bytes() == (server.folder / "train.jsonl").read_bytes()


# ---- what the cache holds ----


@pytest.mark.parametrize("answer", [None, (500, {}, b""), (403, {}, b"")], ids=["hangs", "500", "403"])
def test_a_copy_in_the_cache_is_used_where_the_hub_gives_nothing_and_a_notice_says_so(
    server: Server, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    keep_copy(tmp_path / "hf", model)
    server.hangs, server.answer = answer is None, answer
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
    take_notices()
    config = ModelConfig(name_or_path="org/name")
    assert load_tokenizer(config)("two blue").input_ids
    assert pretrained(AutoConfig, config).hidden_size == 32
    assert {path.partition(" /")[2] for path in server.asked} == {"org/name/resolve/main/config.json"}
    assert [note["code"] for note in take_notices()] == ["hub.copy"]
    assert constants.HF_HUB_OFFLINE is False


def test_what_a_copy_lacks_is_said_at_once(server: Server, tmp_path: Path, model: Path) -> None:
    shutil.copytree(model, tmp_path / "part", ignore=shutil.ignore_patterns("*.safetensors"))
    keep_copy(tmp_path / "hf", tmp_path / "part")
    server.answer = 500, {}, b""
    from transformers import AutoModelForCausalLM

    with pytest.raises(UsageError) as caught:
        pretrained(AutoModelForCausalLM, ModelConfig(name_or_path="org/name"), use_safetensors=True)
    assert caught.value.code == "hub.incomplete"
    assert "model.safetensors" in str(caught.value)
    assert len(server.asked) == 3


def test_a_commit_that_is_in_the_cache_is_found_without_a_hub(server: Server, tmp_path: Path, model: Path) -> None:
    keep_copy(tmp_path / "hf", model)
    server.answer = 500, {}, b""
    assert load_tokenizer(ModelConfig(name_or_path="org/name", revision=COMMIT))("red").input_ids
    assert server.asked == [f"HEAD /org/name/resolve/{COMMIT}/config.json"] * 3


def test_a_dataset_in_the_cache_is_used_where_the_hub_gives_nothing(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.jsonl", 3)
    root = keep_copy(tmp_path / "hf", tmp_path / "data", "datasets")
    server.answer = 500, {}, b""
    assert find_files("org/name", "train_file") == [root / "snapshots" / COMMIT / "train.jsonl"]
    assert "hub.copy" in [note["code"] for note in take_notices()]


def test_offline_a_hub_is_not_asked(
    server: Server, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refused().code == "hub.offline"
    with pytest.raises(UsageError) as caught:
        find_files("org/name", "train_file")
    assert caught.value.code == "hub.offline"
    keep_copy(tmp_path / "hf", model)
    assert load_tokenizer(ModelConfig(name_or_path="org/name"))("red").input_ids
    assert server.asked == []


@pytest.mark.parametrize("place", ["file", "/proc/firefly"])
def test_a_cache_of_the_hub_that_cannot_be_made_is_named_with_its_variable(
    server: Server, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    server.folder = model
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / place / "hub"))
    with pytest.raises(UsageError) as caught:
        find_files("org/name", "train_file")
    for error in (refused(), caught.value):
        assert error.code == "cache.unusable"
        assert str(tmp_path / place / "hub") in str(error)
        assert "HF_HOME" in str(error)
    assert server.asked == []


# ---- a folder of the cache as a path ----


@pytest.mark.parametrize("below", ["", "snapshots"])
def test_a_root_in_the_cache_is_followed_to_main(tmp_path: Path, model: Path, below: str) -> None:
    root = keep_copy(tmp_path, model)
    shutil.copytree(model, root / "snapshots" / ("c" * 40))  # newer, and not main
    config = ModelConfig(name_or_path=str(root / below))
    take_notices()
    assert resolve_model(config) == resolve_model(config) == str(root / "snapshots" / COMMIT)
    assert [note["code"] for note in take_notices()] == ["hub.followed"]
    assert load_tokenizer(config)("red").input_ids
    (root / "refs" / "v2").write_text("c" * 40)
    other = ModelConfig(name_or_path=str(root / below), revision="v2")
    assert resolve_model(other) == str(root / "snapshots" / ("c" * 40))


def test_without_a_reference_the_newest_snapshot_is_taken(tmp_path: Path, model: Path) -> None:
    root = keep_copy(tmp_path, model)
    shutil.rmtree(root / "refs")
    assert resolve_model(ModelConfig(name_or_path=str(root))) == str(root / "snapshots" / COMMIT)
    other = tmp_path / "models--org--other"
    for age, name in enumerate(("b" * 40, "a" * 40, "c" * 40)):
        shutil.copytree(model, other / "snapshots" / name)
        os.utime(other / "snapshots" / name, (1e9 - age, 1e9 - age))
    assert resolve_model(ModelConfig(name_or_path=str(other))) == str(other / "snapshots" / ("b" * 40))


def test_a_root_without_a_whole_snapshot_says_what_is_missing(tmp_path: Path, model: Path) -> None:
    empty = tmp_path / "models--org--empty"
    (empty / "blobs").mkdir(parents=True)
    assert refused(str(empty)).values["missing"] == "snapshots/*"
    (empty / "snapshots" / COMMIT).mkdir(parents=True)
    assert refused(str(empty)).code == "hub.no_snapshot"
    root = keep_copy(tmp_path, model)
    assert refused(str(root), revision="v3").values["missing"] == "refs/v3"
    weights = root / "snapshots" / COMMIT / "model.safetensors"
    weights.unlink()
    weights.symlink_to("../../blobs/gone")
    assert refused(str(root)).values["missing"] == "model.safetensors"


def test_a_folder_that_only_looks_like_a_root_is_itself(tmp_path: Path, model: Path) -> None:
    named = shutil.copytree(model, tmp_path / "models--org--name")
    (named / "snapshots").mkdir()
    assert resolve_model(ModelConfig(name_or_path=str(named))) == str(named)
    assert resolve_model(ModelConfig(name_or_path=str(model))) == str(model)


def test_a_root_of_a_dataset_is_followed_too(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.jsonl", 3)
    root = keep_copy(tmp_path, tmp_path / "data", "datasets")
    shutil.copytree(tmp_path / "data", root / "snapshots" / ("c" * 40))
    assert find_files(str(root), "train_file") == [root / "snapshots" / COMMIT / "train.jsonl"]


# ---- ModelScope ----


def test_modelscope_that_cannot_be_reached_is_one_message_or_its_copy(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append(options)
        if options.get("local_files_only") and not (tmp_path / "kept").is_dir():
            raise ValueError("nothing there")
        return str(tmp_path / "kept")

    package = SimpleNamespace(snapshot_download=snapshot_download, dataset_snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "modelscope", package)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.address)
    server.answer = 404, {}, b""
    assert resolve_model(ModelConfig(name_or_path="org/name", hub="modelscope")) == str(tmp_path / "kept")
    assert asked == [{}]
    server.answer = 503, {}, b""
    error = refused(hub="modelscope")
    assert (error.code, error.values["hub"]) == ("hub.unreachable", server.address)
    with pytest.raises(UsageError) as caught:
        find_files("org/name", "train_file", "modelscope")
    assert caught.value.code == "hub.unreachable"
    (tmp_path / "kept").mkdir()
    assert resolve_model(ModelConfig(name_or_path="org/name", hub="modelscope")) == str(tmp_path / "kept")
    assert asked[1:] == [{"local_files_only": True}] * 2
