"""Of several processes that need the same examples, one prepares them."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from firefly.config import DataConfig
from firefly.console import take_notices
from firefly.data import dataset
from firefly.data.dataset import cache_folder, load_split
from firefly.data.encoding import Encoder
from firefly.data.preparation import prepare, prepare_once
from firefly.data.templates import bind_template
from firefly.files import hold
from tiny import tiny_tokenizer, write_rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FIREFLY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def encoder() -> Encoder:
    tokenizer = tiny_tokenizer()
    return Encoder(tokenizer, bind_template("default", tokenizer))


def test_the_others_wait_and_take_what_the_first_has_made(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", 9)
    config, calls, waits = DataConfig(train_file=str(file)), [], threading.Event()
    original, said = dataset.prepare, []

    def slowly(*arguments: Any) -> None:
        calls.append(threading.current_thread().name)
        assert waits.wait(30)
        original(*arguments)

    def note(code: str, text: str, **values: Any) -> None:
        said.append((code, values["file"]))
        if len(said) == 2:
            waits.set()

    monkeypatch.setattr(dataset, "prepare", slowly)
    monkeypatch.setattr("firefly.data.preparation.notice", note)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(load_split(config, encoder).train)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(calls) == 1
    assert said == [("data.waiting", str(file))] * 2
    assert len(found) == 3
    for examples in found[1:]:
        assert len(examples) == len(found[0])
        np.testing.assert_array_equal(examples[3].input_ids, found[0][3].input_ids)


def test_what_a_killed_preparation_left_is_removed_by_the_next(tmp_path: Path, encoder: Encoder) -> None:
    entries = cache_folder() / "examples"
    file = write_rows(tmp_path / "rows.jsonl", 9)
    load_split(DataConfig(train_file=str(file)), encoder)
    (entry,) = entries.iterdir()
    whole = sorted(path.name for path in entry.iterdir())
    (entry / "ledger.json").unlink()  # as a cache that was cleared half
    for scratch in (f"{entry.name}.abc", "0123.def", "4567.ghi"):
        (entries / scratch).mkdir()
        (entries / scratch / "examples.arrow").touch()
    with hold(entries / "4567.lock"):  # this one's process is alive
        load_split(DataConfig(train_file=str(file)), encoder)
        assert sorted(path.name for path in entries.iterdir()) == sorted([entry.name, "4567.ghi", "4567.lock"])
    assert sorted(path.name for path in entry.iterdir()) == whole


def test_what_another_process_finished_meanwhile_is_not_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "entry"

    def make() -> None:
        folder.mkdir()
        (folder / "ledger.json").touch()

    prepare_once(folder, "rows.jsonl", make)
    prepare_once(folder, "rows.jsonl", lambda: pytest.fail("made again"))
    take_notices()


def test_what_is_prepared_in_a_shared_cache_can_be_read_by_others(tmp_path: Path, encoder: Encoder) -> None:
    before = os.umask(0o022)
    try:
        folder = tmp_path / "entry"
        prepare(iter(()), "f", DataConfig(train_file="f"), encoder, "conversation", folder)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
