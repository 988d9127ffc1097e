"""A file or a folder that is written whole or not at all leaves nothing else behind."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from firefly.files import atomic_file, atomic_folder, first_line


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("old")
    with atomic_file(path) as scratch:
        scratch.write_text("ne")
        assert path.read_text() == "old"
        scratch.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("old")

    def write() -> None:
        with atomic_file(path) as scratch:
            scratch.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_take_its_name_leaves_no_other(tmp_path: Path) -> None:
    (tmp_path / "loss.png").mkdir()
    with pytest.raises(OSError, match="directory"), atomic_file(tmp_path / "loss.png") as scratch:
        scratch.touch()
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_two_threads_that_write_one_file_do_not_meet(tmp_path: Path) -> None:
    path, both = tmp_path / "verdict.json", threading.Barrier(2, timeout=10)
    failed: list[Exception] = []

    def write(text: str) -> None:
        try:
            with atomic_file(path) as scratch:
                scratch.write_text(text)
                both.wait()
                assert scratch.read_text() == text
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in ("one", "other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "entry"

    def write_half() -> None:
        with atomic_folder(folder) as scratch:
            (scratch / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert list(tmp_path.iterdir()) == []
    before = os.umask(0o022)
    try:
        with atomic_folder(folder) as scratch:
            (scratch / "whole").touch()
            assert not folder.exists()
    finally:
        os.umask(before)
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert list(tmp_path.iterdir()) == [folder]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_of_two_that_make_a_folder_at_once_the_first_stays(tmp_path: Path) -> None:
    folder = tmp_path / "entry"
    with atomic_folder(folder) as slow:
        (slow / "slow").touch()
        with atomic_folder(folder) as quick:
            (quick / "quick").touch()
    assert [path.name for path in folder.iterdir()] == ["quick"]
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("text", "line"), [("one\nstack\n", "one"), ("\n  padded  \n", "padded"), ("", "ValueError"), ("\n", "ValueError")]
)
def test_an_error_is_told_in_one_line(text: str, line: str) -> None:
    assert first_line(ValueError(text)) == line
