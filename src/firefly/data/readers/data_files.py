"""From what a configuration says to files: a file, a folder, a glob, or a dataset of a hub."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from firefly import hub as hubs
from firefly.console import notice
from firefly.data.readers import READERS, known_suffix, no_file
from firefly.errors import UsageError
from firefly.files import first_line

DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:.+)?", re.ASCII)
METADATA = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "configuration.json"}
"""What hubs and `datasets` keep beside the data."""
NO_DATA = re.compile(r".*\.md|(readme|licen[sc]e)(\.txt)?", re.IGNORECASE)

SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
}
SPLIT_OF_WORD = {word: split for split, words in SPLITS.items() for word in words}
SHARD = re.compile(r"-\d+-of-\d+.*")
FEW = 5


def find_files(place: str, key: str, hub: str = "huggingface", revision: str | None = None) -> list[Path]:
    """The data files that `place` names, in a fixed order.

    Args:
        place: a file; a folder (every file of a known kind below it); a glob (`**` too); or a dataset id of the hub,
            `org/name` or `org/name:GLOB` (there `*` matches `/` too). `~` is expanded. Of a folder or dataset that has
            training and held-out files the training ones are taken (for `eval_file`: validation, else test).
        key: the configuration key that names the place, for messages and for choosing the split.
        hub: `huggingface` (HF_ENDPOINT and HF_HUB_OFFLINE are honoured) or `modelscope`.

    Raises:
        UsageError: no such place, no file of a known kind, several splits to choose from, or a hub that fails.
    """
    path = os.path.expanduser(place)
    if os.path.isdir(path):
        path = str(hubs.snapshot_of(Path(path), revision)) if "datasets--" in path else path
        try:
            names = _walk(path)
        except OSError as error:
            raise UsageError(
                "data.unreadable",
                "{key} = {path} cannot be read: {problem}.",
                key=key,
                path=error.filename or path,
                problem=error.strerror,
            ) from None
        return [Path(path, name) for name in _choose(place, key, names)]
    if os.path.exists(path):
        return [Path(path)]
    is_glob = any(character in path for character in "*?[")
    matches = sorted(filter(os.path.isfile, glob.glob(path, recursive=True))) if is_glob else []
    if matches:
        return [Path(name) for name in _known(place, key, matches)]
    if DATASET_ID.fullmatch(place) and not known_suffix(place.partition(":")[0]):
        return _fetch(place, key, hub, revision)
    if is_glob:
        # What lies in the deepest folder that is named without wildcards.
        folder = Path(re.split(r"[*?[]", path)[0] + "x").parent
        raise _no_match(place, key, sorted(Path(name).name for name in glob.glob(f"{glob.escape(str(folder))}/*")))
    raise no_file(key, place)


def _no_match(place: str, key: str, found: list[str]) -> UsageError:
    return UsageError(
        "data.no_match",
        "{key} = {place} matches no file. Check the pattern (** stands for folders of any depth); found there: "
        "{found}.",
        key=key,
        place=place,
        found=_few(found) or "–",
    )


def _walk(root: str) -> list[str]:
    """Files below a folder, relative to it, sorted; hidden ones are skipped, links to folders followed once.

    Raises:
        OSError: a folder cannot be read.
    """

    def stop(error: OSError) -> None:
        raise error

    names, seen = [], set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        names += [Path(folder, name).relative_to(root).as_posix() for name in files if not name.startswith(".")]
    return sorted(names)


def _known(place: str, key: str, names: list[str]) -> list[str]:
    """The files that can be read; a notice names the others, but for what is never data."""
    paths = {name: PurePosixPath(name).name for name in names}
    data = [name for name, file in paths.items() if file not in METADATA and not NO_DATA.fullmatch(file)]
    known = [name for name in data if known_suffix(name)]
    others = [name for name in data if not known_suffix(name)]
    if not known:
        raise UsageError(
            "data.no_known_files",
            "{key} = {place} holds no data file. Known kinds: {known}; found there: {found}.",
            key=key,
            place=place,
            known=", ".join(READERS),
            found=_few(others or names) or "–",
        )
    if others:
        notice(
            "data.unknown_kinds",
            "{key} = {place}: {count} file(s) of other kinds are not read: {names}.",
            key=key,
            place=place,
            count=len(others),
            names=_few(others),
        )
    return known


def _few(names: list[str]) -> str:
    return ", ".join(names[:FEW]) + (", …" if len(names) > FEW else "")


def _choose(place: str, key: str, names: list[str], *, from_hub: bool = False) -> list[str]:
    """Of a folder's or a dataset's files those that can be read and belong to the split that `key` asks for.

    A folder without held-out files is read whole, whatever its files are called. Everything else that names splits must
    name one: `train_sft` and `train_gen` are different data.
    """
    known = _known(place, key, names)
    splits = {name: (_split_part(name) or (0, None))[1] for name in known}
    held_out = not {"validation", "test"}.isdisjoint(splits.values())
    # Files that name no split are for training.
    order = ("validation", "test", None, "train") if key == "eval_file" else ("train", None, "validation", "test")
    wanted = next(split for split in order if split in splits.values())
    chosen = [name for name in known if splits[name] == wanted] if held_out else known
    different = _patterns([name for name in chosen if splits[name]])
    if len(different) > 1 and (held_out or from_hub):
        start = f"{place}:" if from_hub else f"{place.rstrip('/')}/"
        listed = "".join(f"\n  {start}{pattern}" for pattern in different)
        raise UsageError(
            "data.many_splits",
            "{key} = {place} has several splits. Name one of them:{splits}",
            key=key,
            place=place,
            splits=listed,
        )
    if left := [name for name in known if name not in set(chosen)]:
        notice(
            "data.split_chosen",
            "{key} = {place}: reading {taken}; leaving out {left}.",
            key=key,
            place=place,
            taken=_few(_patterns(chosen)),
            left=_few(_patterns(left)),
        )
    return chosen


def _split_part(name: str) -> tuple[int, str] | None:
    """Which part of a path names a split, and the split; the file's own name comes before its folders."""
    parts = name.split("/")
    for index in reversed(range(len(parts))):
        found = {SPLIT_OF_WORD.get(word) for word in re.findall("[a-z]+", parts[index].lower())}
        for split in SPLITS:
            if split in found:
                return index, split
    return None


def _patterns(names: list[str]) -> list[str]:
    """A glob for each different split, its shards and numbered parts together; files of no split by their names."""
    return sorted({_pattern(name) for name in names})


def _pattern(name: str) -> str:
    part = _split_part(name)
    if part is None:
        return name
    parts = name.split("/")
    if part[0] < len(parts) - 1:
        return "/".join(parts[: part[0] + 1]) + "/**"
    stem = name.removesuffix(name[-len(known_suffix(name) or "") :])
    if SHARD.search(stem):
        return SHARD.sub("-*", stem)
    return re.sub(r"\d+$", "*", stem) + name[len(stem) :]


def _fetch(place: str, key: str, hub: str, revision: str | None) -> list[Path]:
    """Download a dataset's files, or some of them; the library keeps them in its own cache."""
    name, _, pattern = place.partition(":")
    pattern += "*" if pattern.endswith("/") else ""  # as the library does
    patterns = [pattern] if pattern else [f"*{suffix}" for suffix in (*READERS, *map(str.upper, READERS))]
    # Asked before the download: several splits may be many gigabytes, to be refused after all.
    listed = None if hub == "modelscope" else hubs.list_dataset(key, name, revision)
    if listed:
        listed = [path for path in listed if not any(part.startswith(".") for part in path.split("/"))]
    chosen = None if listed is None else _select(place, key, listed, pattern)
    try:
        if hub == "modelscope":
            root = _modelscope(place, key, name, revision, patterns)
        else:
            from huggingface_hub import snapshot_download

            options: dict[str, Any] = {"allow_patterns": patterns, "local_files_only": listed is None}
            root = snapshot_download(name, repo_type="dataset", revision=revision, **options)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            "data.hub_failed",
            "{key} = {place} is neither a path here nor a dataset that {hub} gives out: {problem}\n"
            "Check the name (org/name, or org/name:GLOB for some of its files) and the network, log in for a private "
            'or gated one, set HF_ENDPOINT to a mirror, or use "hub": "modelscope".',
            key=key,
            place=place,
            hub=hub,
            problem=first_line(error),
        ) from error
    if chosen is None:
        fetched = _walk(root) if os.path.isdir(root) else []  # where nothing matched, the library makes no folder
        chosen = _select(place, key, fetched, pattern)
    return [Path(root, name) for name in chosen]


def _select(place: str, key: str, names: list[str], pattern: str) -> list[str]:
    if not pattern:
        return _choose(place, key, names, from_hub=True)
    matching = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not matching:
        raise _no_match(place, key, names)
    return _known(place, key, matching)


def _modelscope(place: str, key: str, name: str, revision: str | None, patterns: list[str]) -> str:
    download = hubs.modelscope_package().dataset_snapshot_download
    try:
        hubs.ask_modelscope()
    except hubs.NoAnswer as error:
        hubs.unreachable(key, place, hubs.modelscope(), error)
    options = {"revision": revision} if revision else {}
    return str(download(name, allow_file_pattern=patterns, **options))
