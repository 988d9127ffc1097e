"""A cache that cannot be made is one message with its path and the variable that moves it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from firefly.cli import main
from firefly.errors import UsageError
from firefly.files import make_cache
from firefly.models.loading import embedded_model
from firefly.models.probe_cache import cached_activations, cached_layout
from firefly.tasks.reference import cache_path, store
from tiny import save_tiny_model, tiny_model, write_rows


@pytest.fixture(params=["file", "/proc/firefly", "below"])
def unusable(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache where a file lies in a folder's place, at three depths, or where nothing can be made."""
    folder = tmp_path / request.param
    if request.param == "file":
        folder.touch()
    elif request.param == "below":
        folder.mkdir()
        for name in ("examples", "models", "probes", "reference"):
            (folder / name).touch()
    monkeypatch.setenv("FIREFLY_CACHE", str(folder))
    return folder


@pytest.mark.parametrize("command", ["check", "train", "plan"])
def test_no_command_ends_in_a_traceback_for_its_cache(
    unusable: Path, tmp_path: Path, capsys: Any, command: str
) -> None:
    config = tmp_path / "config.json"
    settings = {"model_name_or_path": str(save_tiny_model(tmp_path / "model")), "output_dir": str(tmp_path / "out")}
    settings |= {"train_file": str(write_rows(tmp_path / "rows.jsonl", 2)), "template_name": "qwen"}
    config.write_text(json.dumps(settings))
    assert main([command, str(config)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: the cache at {unusable / 'examples'} cannot be made or written: ")
    assert "FIREFLY_CACHE" in error


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("models", embedded_model),
        ("probes", lambda: cached_layout(tiny_model("llama"))),
        ("probes", lambda: cached_activations(tiny_model("llama"), "segments", None, 8)),
        ("reference", lambda: store(cache_path(["key"]), np.zeros((2, 2)))),
    ],
)
def test_every_part_of_the_cache_says_so(unusable: Path, name: str, use: Callable[[], Any]) -> None:
    with pytest.raises(UsageError) as caught:
        use()
    assert caught.value.code == "cache.unusable"
    assert caught.value.values["path"] == unusable / name


def test_a_full_disk_is_not_the_caches_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(OSError, match="No space left"):
        make_cache(tmp_path / "cache")


def test_a_cache_that_can_be_made_is_left_empty(tmp_path: Path) -> None:
    assert list(make_cache(tmp_path / "a" / "b").iterdir()) == []
