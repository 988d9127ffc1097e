"""What the page may see: the folders that it was given, and nothing by way of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from firefly.errors import UsageError
from firefly.studio.roots import Roots


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    for name in ("root", "second", "outside"):
        (tmp_path / name).mkdir()
    (tmp_path / "outside" / "secret.jsonl").write_text("{}")
    (tmp_path / "root" / "rows.jsonl").write_text("{}")
    (tmp_path / "root" / "link.jsonl").symlink_to(tmp_path / "outside" / "secret.jsonl")
    (tmp_path / "root" / "folder").symlink_to(tmp_path / "outside")
    (tmp_path / "root" / "data" / "below").mkdir(parents=True)
    (tmp_path / "root" / "data" / "below" / "rows.jsonl").symlink_to(tmp_path / "outside" / "secret.jsonl")
    return Roots.of([str(tmp_path / "root"), str(tmp_path / "second")])


def arrived(roots: Roots, name: str, text: str) -> Path:
    """A file as the page receives it."""
    path = roots.received / "1f2e" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


OUTSIDE = [
    "../outside/secret.jsonl",
    "/etc/passwd",
    "link.jsonl",
    "folder/secret.jsonl",
    "folder",
    "~root",
    "\0",
    "a/../../b",
]
OUTSIDE += ["//etc/passwd", "/proc/self/environ", "root/../../outside", "~/x"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_nothing_outside_of_the_roots_is_reached(roots, name):
    with pytest.raises(UsageError, match="outside of the folders"):
        roots.inside(name)


def test_what_lies_inside_is_reached_by_any_spelling(roots, tmp_path):
    for name in ("rows.jsonl", "./rows.jsonl", f"{tmp_path}/root/rows.jsonl", "new/../rows.jsonl", "  rows.jsonl "):
        assert roots.inside(name) == tmp_path / "root" / "rows.jsonl"
    assert roots.inside(tmp_path / "second" / "new") == tmp_path / "second" / "new"
    assert roots.inside("..rows") == tmp_path / "root" / "..rows"  # a name like any other


@pytest.mark.parametrize(
    "values",
    [
        {"train_file": "/etc/*.json"},
        {"train_file": ["rows.jsonl", {"path": "../outside/secret.jsonl", "weight": 2}]},
        {"model_name_or_path": "folder"},
        {"template_name": "link.jsonl"},
        {"output_dir": "/tmp/elsewhere"},
        {"deepspeed": "~/ds.json"},
        {"train_file": "folder/*.jsonl"},
        {"train_file": "*/secret.jsonl"},
        {"train_file": "*.jsonl"},
        {"train_file": "**/*.jsonl"},
        {"train_file": "l[i]nk.jsonl"},
        {"train_file": "."},
        {"train_file": "data"},
        {"train_file": ["rows.jsonl", "data"]},
    ],
)
def test_a_configuration_that_leads_outside_is_refused(roots, values):
    with pytest.raises(UsageError, match="outside of the folders"):
        roots.check(values)


def test_names_of_hubs_and_files_inside_pass(roots):
    roots.check(
        {
            "model_name_or_path": "Qwen/Qwen3-8B",
            "train_file": ["rows.jsonl", "new/*.jsonl", {"path": "rows.jsonl"}],
            "output_dir": "output/first",
            "learning_rate": 1e-4,
            "template_name": "auto",
            "bf16": None,
            "eval_file": "",
        }
    )


def test_files_are_offered_newest_first_and_no_links(roots, tmp_path):
    (tmp_path / "second" / "more.jsonl").write_text("{}")
    os.utime(tmp_path / "root" / "rows.jsonl", (1, 1))
    hidden = tmp_path / "root" / ".firefly"
    hidden.mkdir()
    (hidden / "job.json").write_text("{}")
    assert roots.files((".jsonl", ".json")) == [str(tmp_path / "second" / "more.jsonl"), "rows.jsonl"]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("rows.jsonl", "rows.jsonl"),
        ("数据 1.jsonl", "数据 1.jsonl"),
        ("<script>alert(1).json", "_script_alert_1_.json"),
        ("-rf.json", "-rf.json"),
        ("a\nb.json", "a_b.json"),
        ("...", "upload"),
    ],
)
def test_an_upload_keeps_its_name_as_far_as_it_is_harmless(roots, tmp_path, name, kept):
    found = roots.take(arrived(roots, name, "[]"))
    assert (found.parent, found.name) == (tmp_path / "root" / "uploads", kept)
    assert found.read_text() == "[]"


def test_uploads_of_one_name_are_both_kept(roots, tmp_path):
    for number in range(3):
        roots.take(arrived(roots, "rows.jsonl", str(number)))
    folder = tmp_path / "root" / "uploads"
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "rows.jsonl": "0",
        "rows-2.jsonl": "1",
        "rows-3.jsonl": "2",
    }


def test_uploads_that_are_a_link_elsewhere_are_refused(roots, tmp_path):
    (tmp_path / "root" / "uploads").symlink_to(tmp_path / "outside")
    with pytest.raises(UsageError, match="outside of the folders"):
        roots.take(arrived(roots, "rows.jsonl", "{}"))
    assert sorted(path.name for path in (tmp_path / "outside").iterdir()) == ["secret.jsonl"]


def test_what_was_not_uploaded_is_not_moved(roots, tmp_path):
    link = arrived(roots, "link.jsonl", "")
    link.unlink()
    link.symlink_to(tmp_path / "outside" / "secret.jsonl")
    for path in (tmp_path / "outside" / "secret.jsonl", tmp_path / "root" / "rows.jsonl", link):
        with pytest.raises(UsageError, match="was not uploaded here"):
            roots.take(path)
        assert path.read_text() == "{}"


def test_a_root_that_is_no_folder_is_named(tmp_path):
    with pytest.raises(UsageError, match="is no folder"):
        Roots.of([str(tmp_path / "missing")])
