"""Tiny runs of every task and mode leave what was recorded of them, and what others rely on lies where it was.

`compare_versions.py` beside this compares far more, of two versions on one machine.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from cells import CELLS, STOPPED_AT, Cell, write_inputs
from recording import Left, recorded, train, without_pictures

RESUMED = [cell for cell in CELLS if cell.name in ("pretrain/lora", "sft/lora", "dpo/full", "kto/lora")]
Trained = Callable[[Cell], Left]

# Dropout's masks are MKL's where torch has it, and others elsewhere.
same_generator = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="recorded with MKL's generator")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("frozen")
    write_inputs(folder / "inputs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine take ten times as long
    gc.freeze()  # accelerate collects garbage after each run
    with without_pictures():
        yield folder
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(place: Path) -> Trained:
    """What a cell left; each is trained once."""
    return cache(lambda cell: train(cell, place / "inputs", folder_of(cell, place)))


def folder_of(cell: Cell, place: Path) -> Path:
    return place / f"{cell.task}-{cell.mode}"


def close(losses: dict[int, float]) -> object:
    return pytest.approx(losses, rel=1e-5, abs=1e-5)


@same_generator
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_run_has_the_losses_that_were_recorded(cell: Cell, trained: Trained) -> None:
    found, expected = trained(cell), recorded()[cell.name]
    assert len(expected.losses) >= 4
    assert found.losses == close(expected.losses)
    assert found.eval_losses == close(expected.eval_losses)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_run_leaves_the_files_and_keys_that_were_recorded(cell: Cell, trained: Trained) -> None:
    found, expected = trained(cell).places, recorded()[cell.name].places
    assert sorted(expected - found) == [], "gone"
    assert sorted(found - expected) == [], "new"


@same_generator
@pytest.mark.parametrize("cell", RESUMED, ids=lambda cell: cell.name)
def test_a_run_resumed_within_an_epoch_has_the_losses_that_were_recorded(
    cell: Cell, trained: Trained, place: Path
) -> None:
    trained(cell)
    checkpoint = folder_of(cell, place) / f"checkpoint-{STOPPED_AT}"
    again = place / f"{cell.task}-{cell.mode}-again"
    found = train(cell, place / "inputs", again, resume_from_checkpoint=str(checkpoint))
    expected = recorded()[cell.name]
    assert found.losses == close({step: loss for step, loss in expected.losses.items() if step > STOPPED_AT})
    assert found.eval_losses == close({step: loss for step, loss in expected.eval_losses.items() if step > STOPPED_AT})


CACHES = {
    "FIREFLY_CACHE": ({"FIREFLY_CACHE": "{here}/own", "XDG_CACHE_HOME": "{here}/xdg"}, "own"),
    "FIREFLY_CACHE in the home folder": ({"FIREFLY_CACHE": "~/own"}, "own"),
    "XDG_CACHE_HOME": ({"XDG_CACHE_HOME": "{here}/xdg"}, "xdg/firefly"),
    "neither": ({}, ".cache/firefly"),
}


@pytest.mark.parametrize("said", CACHES)
def test_the_cache_lies_where_programs_around_firefly_look_for_it(
    said: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from firefly.cli import main

    variables, expected = CACHES[said]
    for name in ("FIREFLY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "{here}", **variables}.items():
        monkeypatch.setenv(name, value.format(here=tmp_path))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CELLS[3].settings(place / "inputs", str(tmp_path / "out"))), encoding="utf-8")
    assert main(["check", str(config)]) == 0
    assert any((tmp_path / expected / "examples").iterdir())


def test_the_embedded_model_is_asked_for_without_arguments_and_lies_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from firefly.models.loading import embedded_model

    folder = tmp_path / "models" / "smollm2-135m-instruct"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()  # it was fetched before
    monkeypatch.setenv("FIREFLY_CACHE", str(tmp_path))
    assert embedded_model() == folder
