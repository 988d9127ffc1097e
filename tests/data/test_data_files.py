"""Places to files: what is read is what was named, what is left out is said, and a hub that fails says how to go on."""

from __future__ import annotations

import fnmatch
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

import firefly.hub
from firefly.console import take_notices
from firefly.data.readers import READERS
from firefly.data.readers.data_files import find_files
from firefly.errors import UsageError
from firefly.hub import NoAnswer


@pytest.fixture(autouse=True)
def _nowhere(tmp_path, monkeypatch):
    """Relative places start in an empty folder, and no test reaches a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda *_, **__: pytest.fail("asked the hub"))
    take_notices()


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")


def found(place: str, key: str = "train_file", **options) -> list[str]:
    return [path.as_posix() for path in find_files(place, key, **options)]


def refused(place: str, key: str = "train_file", **options) -> UsageError:
    with pytest.raises(UsageError) as caught:
        find_files(place, key, **options)
    assert f"{key} = " in str(caught.value) or caught.value.code == "model.no_modelscope"
    return caught.value


def notices() -> dict[str, str]:
    return {item["code"]: item["message"] for item in take_notices()}


# files, folders and globs


def test_a_file_is_itself_whatever_its_name(tmp_path, monkeypatch):
    make(tmp_path, "a[1]*.jsonl", "notes.docx", "org/name")
    assert [found(name) for name in ("a[1]*.jsonl", "notes.docx", "org/name")] == [
        ["a[1]*.jsonl"],
        ["notes.docx"],
        ["org/name"],
    ]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found("~/notes.docx") == [str(tmp_path / "notes.docx")]
    assert notices() == {}


def test_a_folder_is_every_data_file_below_it_in_order(tmp_path):
    every = [f"every/{name}{suffix}" for name, suffix in zip("bcdefghij", READERS, strict=True)]
    make(tmp_path, *every, "d/10.jsonl", "d/9.jsonl", "d/a/b/c.JSON", "d/Z.csv")
    assert found("every") == every
    assert found("d") == found("./d/") == ["d/10.jsonl", "d/9.jsonl", "d/Z.csv", "d/a/b/c.JSON"]
    assert found(str(tmp_path / "d"))[0] == str(tmp_path / "d/10.jsonl")
    assert notices() == {}


def test_what_is_never_data_is_passed_over_and_other_kinds_are_named(tmp_path):
    never = [
        ".gitattributes",
        ".cache/x.jsonl",
        ".x.jsonl",
        "README.md",
        "docs/card.md",
        "dataset_infos.json",
        "LICENSE",
    ]
    make(tmp_path, *(f"d/{name}" for name in never), "d/x.jsonl", "d/README.txt", "d/dataset_info.json")
    assert found("d") == ["d/x.jsonl"]
    assert notices() == {}
    make(tmp_path, "d/pictures/a.png", "d/b.zst", *(f"d/z{n}.arrow" for n in range(7)))
    assert found("d") == ["d/x.jsonl"]
    message = notices()["data.unknown_kinds"]
    assert "9 file(s)" in message
    assert "b.zst, pictures/a.png, z0.arrow, z1.arrow, z2.arrow, …" in message


def test_a_folder_without_data_says_what_it_holds(tmp_path):
    make(tmp_path, "d/a.docx", "d/README.md")
    error = refused("d")
    assert error.code == "data.no_known_files"
    assert "found there: a.docx." in str(error)
    assert ".jsonl, .json, " in str(error)
    (tmp_path / "empty").mkdir()
    assert "found there: –" in str(refused("empty"))


def test_links_to_folders_are_followed_once(tmp_path):
    make(tmp_path, "far/x.jsonl", "d/y.jsonl")
    for name, target in {"one": "../far", "two": "../far", "loop": "../d"}.items():
        os.symlink(target, tmp_path / "d" / name)
    os.symlink("../far/x.jsonl", tmp_path / "d" / "z.jsonl")
    assert found("d") == ["d/one/x.jsonl", "d/y.jsonl", "d/z.jsonl"]


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    make(tmp_path, "d/x.jsonl", "d/closed/y.jsonl")
    listing = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert "closed cannot be read: Permission denied" in str(refused("d"))


def test_a_glob_is_the_files_that_match_in_order(tmp_path, monkeypatch):
    make(tmp_path, "d/b.jsonl", "d/a.jsonl", "d/c.json", "d/in/a.jsonl", "d/in/er/a.jsonl", "d/test.jsonl", "d/x.md")
    assert found("d/*.jsonl") == ["d/a.jsonl", "d/b.jsonl", "d/test.jsonl"]
    assert found("d/[ab].*") == ["d/a.jsonl", "d/b.jsonl"]
    assert found("d/**/a.jsonl") == ["d/a.jsonl", "d/in/a.jsonl", "d/in/er/a.jsonl"]
    assert found("d/?.*") == ["d/a.jsonl", "d/b.jsonl", "d/c.json"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found("~/d/*.json") == [str(tmp_path / "d/c.json")]
    assert notices() == {}
    make(tmp_path, "d/a.bin")
    assert found("d/a.*") == ["d/a.jsonl"]
    assert "d/a.bin" in notices()["data.unknown_kinds"]


def test_a_glob_that_matches_nothing_says_what_is_there(tmp_path):
    make(tmp_path, "d/b.jsonl", "d/a.jsonl")
    error = refused("d/*.parquet", "eval_file")
    assert error.code == "data.no_match"
    assert "found there: a.jsonl, b.jsonl" in str(error)
    assert refused("none/**/*.jsonl").code == "data.no_match"


@pytest.mark.parametrize(
    "place",
    ["none.jsonl", "data/none.jsonl", "data/none.parquet", "./org/name", "../org/name", "/org/name", "~/none", "none",
     "a/b/c", "org/name:", "org//name", "-org/name", "组织/数据", "org/name with space", "org\\name", "x" * 5000],
)  # fmt: skip
def test_a_path_that_is_not_there_is_not_looked_for_on_a_hub(place):
    assert refused(place).code == "data.no_file"


# splits


def test_training_files_are_taken_where_there_are_held_out_ones_and_a_notice_says_so(tmp_path):
    make(tmp_path, "d/train.jsonl", "d/test.jsonl", "d/validation.jsonl")
    assert found("d") == ["d/train.jsonl"]
    message = notices()["data.split_chosen"]
    assert "train_file = d: reading train.jsonl; leaving out test.jsonl, validation.jsonl" in message
    assert found("d", "eval_file") == ["d/validation.jsonl"]
    make(tmp_path, "e/train/a.csv", "e/train/b.csv", "e/dev/a.csv")
    assert found("e") == ["e/train/a.csv", "e/train/b.csv"]
    assert "reading train/**; leaving out dev/**" in notices()["data.split_chosen"]
    make(tmp_path, *(f"f/data/{split}-0000{n}-of-00002-ab12.parquet" for split in ("train", "test") for n in (0, 1)))
    assert found("f") == [f"f/data/train-0000{n}-of-00002-ab12.parquet" for n in (0, 1)]
    assert "reading data/train-*; leaving out data/test-*" in notices()["data.split_chosen"]
    assert found("f", "eval_file") == [f"f/data/test-0000{n}-of-00002-ab12.parquet" for n in (0, 1)]


def test_files_of_no_split_are_for_training(tmp_path):
    make(tmp_path, "d/chats.jsonl", "d/more.jsonl", "d/test.jsonl")
    assert found("d") == ["d/chats.jsonl", "d/more.jsonl"]
    assert "reading chats.jsonl, more.jsonl; leaving out test.jsonl" in notices()["data.split_chosen"]
    make(tmp_path, "d/train_1.jsonl", "d/train_2.jsonl")
    assert found("d") == ["d/train_1.jsonl", "d/train_2.jsonl"]
    assert "reading train_*.jsonl; leaving out chats.jsonl, more.jsonl, test.jsonl" in notices()["data.split_chosen"]


@pytest.mark.parametrize(
    "names",
    [
        ["train_news.jsonl", "train_wiki.jsonl"],
        ["en/train.jsonl", "zh/train.jsonl"],
        ["contest.jsonl", "latest.jsonl", "train.jsonl"],
        ["test/a.jsonl", "test/b.jsonl"],
        ["eval.jsonl"],
    ],
)
def test_a_folder_without_two_kinds_of_splits_is_read_whole(tmp_path, names):
    make(tmp_path / "d", *names)
    assert found("d") == found("d", "eval_file") == [f"d/{name}" for name in names]
    assert notices() == {}


def test_the_split_is_read_from_the_file_before_its_folders(tmp_path):
    make(tmp_path, "alpaca_eval/train.jsonl", "alpaca_eval/test.jsonl", "alpaca_eval/sub/train/test/x.jsonl")
    assert found(".") == ["alpaca_eval/train.jsonl"]


# hubs

ULTRACHAT = [
    ".gitattributes",
    "README.md",
    *(f"data/train_gen-0000{n}-of-00003-a6c9.parquet" for n in range(3)),
    *(f"data/train_sft-0000{n}-of-00003-a3ec.parquet" for n in range(3)),
    "data/test_gen-00000-of-00001-3d4c.parquet",
    "data/test_sft-00000-of-00001-f7df.parquet",
]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one dataset; `asked` records the downloads, `reachable` says whether it can be asked: if not, there is
    a copy in the library's cache."""
    state = SimpleNamespace(names=["data/train.jsonl"], asked=[], reachable=True)

    def snapshot_download(name, **options):
        assert options.pop("local_files_only") is not state.reachable
        state.asked.append((name, options))
        chosen = [n for n in state.names if any(fnmatch.fnmatchcase(n, p) for p in options["allow_patterns"])]
        make(tmp_path / "cache", *chosen)
        return str(tmp_path / "cache")

    def dataset_info(name, *, revision, timeout):
        if not state.reachable:
            raise NoAnswer("no answer")
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=each) for each in state.names])

    def copy_in_cache(*_):
        return tmp_path / "cache" if not state.reachable else None

    monkeypatch.setattr("firefly.hub._copy_or_place", copy_in_cache)
    monkeypatch.setattr("firefly.hub._list_dataset", firefly.hub._list_dataset.__wrapped__)  # asked each time
    monkeypatch.setattr("firefly.hub.ask_modelscope", lambda: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda _: SimpleNamespace(dataset_info=dataset_info))
    return state


def names(paths: list[str], tmp_path: Path) -> list[str]:
    return [Path(path).relative_to(tmp_path / "cache").as_posix() for path in paths]


@pytest.mark.parametrize("reachable", [True, False])
def test_a_dataset_is_fetched_by_its_id(tmp_path, hub, reachable):
    hub.reachable = reachable
    hub.names = ["README.md", "dataset_infos.json", "belle.json", "more/belle.CSV", ".cache/x.json"]
    assert names(found("BelleGroup/train_0.5M_CN"), tmp_path) == ["belle.json", "more/belle.CSV"]
    patterns = [f"*{suffix}" for suffix in (*READERS, *map(str.upper, READERS))]
    assert hub.asked == [
        ("BelleGroup/train_0.5M_CN", {"repo_type": "dataset", "revision": None, "allow_patterns": patterns})
    ]
    found("org/name", revision="v2")
    assert hub.asked[-1][1]["revision"] == "v2"


def test_a_glob_after_the_id_fetches_those_files_and_no_others(tmp_path, hub):
    hub.names = ULTRACHAT
    make(tmp_path / "cache", *ULTRACHAT)  # what an earlier run fetched
    place = "HuggingFaceH4/ultrachat_200k:data/train_sft-*"
    shards = [f"data/train_sft-0000{n}-of-00003-a3ec.parquet" for n in range(3)]
    assert names(found(place), tmp_path) == shards
    hub.reachable = False
    assert names(found(place), tmp_path) == shards
    assert [options["allow_patterns"] for _, options in hub.asked] == [["data/train_sft-*"]] * 2
    assert names(found(f"HuggingFaceH4/ultrachat_200k:{ULTRACHAT[-1]}"), tmp_path) == [ULTRACHAT[-1]]
    assert len(found("HuggingFaceH4/ultrachat_200k:data/")) == 8
    assert list(notices()) == ["hub.copy"]


def test_a_path_that_exists_comes_before_the_hub(tmp_path, monkeypatch, hub):
    make(tmp_path, "org/name/x.jsonl", "org/other:y.jsonl")
    assert found("org/name") == ["org/name/x.jsonl"]
    assert found("org/other:*") == ["org/other:y.jsonl"]
    assert hub.asked == []


@pytest.mark.parametrize("reachable", [True, False])
def test_one_of_several_training_splits_must_be_named(hub, reachable):
    hub.names, hub.reachable = ULTRACHAT, reachable
    error = refused("HuggingFaceH4/ultrachat_200k")
    assert error.code == "data.many_splits"
    assert str(error).splitlines()[1:] == [
        "  HuggingFaceH4/ultrachat_200k:data/train_gen-*",
        "  HuggingFaceH4/ultrachat_200k:data/train_sft-*",
    ]
    assert bool(hub.asked) is not reachable  # refused before gigabytes are fetched, where the hub can be asked


def test_configurations_of_a_dataset_are_different_splits_too(tmp_path, hub):
    hub.names = [
        f"{subset}/{split}-00000-of-00001.parquet" for subset in ("main", "socratic") for split in ("train", "test")
    ]
    assert "openai/gsm8k:main/train-*" in str(refused("openai/gsm8k"))
    assert names(found("openai/gsm8k:main/train-*"), tmp_path) == ["main/train-00000-of-00001.parquet"]
    hub.names = ["en/train.jsonl", "zh/train.jsonl"]
    assert "org/name:en/train.jsonl" in str(refused("org/name"))


def test_every_way_that_is_offered_to_name_a_split_names_it(tmp_path, hub):
    hub.names = ["a/train/1.json", "a/train/deep/2.json", "b/train_1.csv", "b/train_2.csv", "train.json", "test.json"]
    for line in str(refused("org/name")).splitlines()[1:]:
        assert found(line.strip())
    make(tmp_path / "d", *hub.names)
    offered = [found(line.strip()) for line in str(refused("d")).splitlines()[1:]]
    assert sorted(name for group in offered for name in group) == sorted(f"d/{name}" for name in hub.names[:-1])


@pytest.mark.parametrize("reachable", [True, False])
def test_training_files_of_a_dataset_are_taken_and_a_notice_says_so_once(tmp_path, hub, capsys, reachable):
    hub.names, hub.reachable = ["train.jsonl", "test.jsonl", "images/x.png"], reachable
    assert names(found("org/name"), tmp_path) == ["train.jsonl"]
    assert capsys.readouterr().err.count("leaving out test.jsonl") == 1
    assert names(found("org/name", "eval_file"), tmp_path) == ["test.jsonl"]


@pytest.mark.parametrize("reachable", [True, False])
def test_a_dataset_without_a_file_that_fits_says_what_it_holds(hub, reachable):
    hub.names, hub.reachable = ["train.jsonl", "x.py"], reachable
    error = refused("org/name:data/*")
    assert error.code == "data.no_match"
    hub.names = ["data.zip", "README.md"]
    error = refused("org/name")
    assert error.code == "data.no_known_files"
    if reachable:
        assert "found there: data.zip" in str(error)


@pytest.mark.parametrize(
    "failure",
    [
        LocalEntryNotFoundError("An error happened.\nCheck your connection."),
        ConnectionError("An error happened."),
        ValueError("An error happened."),
    ],
)
def test_a_hub_that_fails_is_one_message_with_its_first_line_and_remedies(hub, monkeypatch, failure):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = str(refused("org/name:data/*", "eval_file"))
    assert message.startswith("eval_file = org/name:data/* is neither a path here nor a dataset that huggingface gives")
    assert "An error happened." in message
    assert "Check your connection" not in message
    assert "HF_ENDPOINT" in message
    assert "modelscope" in message


def test_modelscope_is_asked_where_it_is_chosen(tmp_path, hub, monkeypatch):
    asked = []

    def dataset_snapshot_download(name, **options):
        asked.append((name, options))
        make(tmp_path / "cache", "train.jsonl", "test.jsonl", "configuration.json", "README.md")
        return str(tmp_path / "cache")

    patterns = [f"*{suffix}" for suffix in (*READERS, *map(str.upper, READERS))]
    package = SimpleNamespace(dataset_snapshot_download=dataset_snapshot_download)
    monkeypatch.setitem(sys.modules, "modelscope", package)
    assert names(found("org/name", hub="modelscope"), tmp_path) == ["train.jsonl"]
    assert asked == [("org/name", {"allow_file_pattern": patterns})]
    assert names(found("org/name:te*", hub="modelscope", revision="v1"), tmp_path) == ["test.jsonl"]
    assert asked[1:] == [("org/name", {"allow_file_pattern": ["te*"], "revision": "v1"})]
    assert hub.asked == []


def test_modelscope_without_its_package_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    assert "pip install modelscope" in str(refused("org/name", hub="modelscope"))
