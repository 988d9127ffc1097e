"""Whether this working tree trains what a commit trains, bit for bit. Run it by hand around every refactoring.

    python tests/frozen/compare_versions.py COMMIT
    python tests/frozen/compare_versions.py COMMIT --only sft/lora --only '*/ranks'
    python tests/frozen/compare_versions.py --against OTHER_TREE

Both sides train every cell of task × mode (and some more) on the same tiny random models, in fp32 on one thread, each
run in a fresh process with a cache of its own, in three ways:

- plain: from the first step to the last, with evaluations and checkpoints;
- resumed: killed behind the checkpoint in the middle of an epoch, then begun again to its end;
- ranks: on two processes, as torchrun starts them.

Compared are the weights of results and checkpoints and the state in checkpoints (the same bits; on ranks 1e-6), every
number of metrics.jsonl, of the log in trainer_state.json and of the reports but times and memory, what the files for
other programs say, the keys of every JSON file, and which files are left. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cells import CELLS, MORE_CELLS, STOPPED_AT, Cell, write_inputs, write_stand_in
from driver import Job, write_jobs
from recording import keys
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WAYS = ("plain", "resumed", "ranks")
RANKS = 2
TOLERANCE = {"plain": 0.0, "resumed": 0.0, "ranks": 1e-6}
"""The largest absolute difference of a weight; of other numbers relative to their size, too."""

ALLOWED: dict[str, str] = {}
"""Differences that are meant: pattern ("run.json: notices[].message") → why. Empty it once the change is merged."""

MEASURED = re.compile(r"(^|_)(time|runtime|seconds|memory|bytes|ended|started)(_|$)|per_second")
"""Keys of numbers that no two runs share."""

TEXT_OF_OTHERS = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json")
TEXT_OF_OTHERS += ("tokenizer.json", "special_tokens_map.json", "chat_template.jinja")
"""Files that other programs read: they say the same."""

NUMBERS = ("metrics.jsonl", "train_results.json", "trainer_state.json", "data_report.json")
SETTLED = ("config", "defaults", "resolved", "total_steps", "seed", "world_size")
"""The parts of run.json whose values are compared, beside its keys."""

STATE = ("optimizer.pt", "scheduler.pt")
ENTRY = re.compile(r"\[\d+\]")


@dataclass(frozen=True)
class Difference:
    place: str
    """The file and what in it: `run.json: notices[].code`."""
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", help="what to compare with; checked out into a temporary worktree")
    parser.add_argument("--against", type=Path, metavar="TREE", help="compare with this folder instead of a commit")
    parser.add_argument(
        "--only", action="append", default=[], metavar="CELL", help="task/mode/way or part of it; * stands for anything"
    )
    parser.add_argument("--allow", action="append", default=[], metavar="PLACE", help="a difference that is meant")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave inputs, runs and logs in this new folder")
    asked = parser.parse_args()
    if bool(asked.commit) == bool(asked.against):
        parser.error("either a COMMIT or --against TREE")
    chosen = [
        (cell, way)
        for cell in (*CELLS, *MORE_CELLS)
        for way in WAYS
        if not asked.only or any(is_chosen(f"{cell.name}/{way}", pattern) for pattern in asked.only)
    ]
    if not chosen:
        parser.error(f"--only names none of {', '.join(cell.name for cell in (*CELLS, *MORE_CELLS))} / {WAYS}")
    with ExitStack() as stack:
        if asked.keep:
            asked.keep.mkdir(parents=True)
        place = (asked.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="frozen-")))).resolve()
        tree = asked.against.resolve() if asked.against else stack.enter_context(checked_out(asked.commit, place))
        began = time.monotonic()
        inputs = write_inputs(place / "inputs")
        sides = {"before": tree, "now": ROOT}
        codes = train(sides, chosen, inputs, place)
        differing = 0
        for number, (cell, way) in enumerate(chosen):
            folders = [place / side / cell.name / way for side in sides]
            failed = [f"{side} {text}" for side in sides for text in codes[side][number]]
            found = [Difference("exit", text) for text in failed] or compare(*folders, TOLERANCE[way])
            differing += report(f"{cell.name}/{way}", found, [*ALLOWED, *asked.allow])
        print(f"{len(chosen) - differing} of {len(chosen)} equal, {time.monotonic() - began:.0f} s")
    return 1 if differing else 0


def is_chosen(name: str, pattern: str) -> bool:
    return fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name, f"{pattern}/*")


@contextmanager
def checked_out(commit: str, place: Path) -> Iterator[Path]:
    """A commit's files in a worktree of this repository, for as long as they are needed."""
    tree = place / "tree"
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--detach", "--quiet", str(tree), commit], check=True)
    try:
        yield tree
    finally:
        subprocess.run([*git, "remove", "--force", str(tree)], check=True)


# ---- training both sides ----


def train(
    sides: dict[str, Path], chosen: Sequence[tuple[Cell, str]], inputs: Path, place: Path
) -> dict[str, list[list[str]]]:
    """Train everything on both sides at once; of each cell and way, what went wrong."""
    jobs: dict[str, list[list[Job]]] = {}
    processes = {}
    for side, tree in sides.items():
        jobs[side] = [list(jobs_of(cell, way, inputs, place / side)) for cell, way in chosen]
        write_jobs([job for several in jobs[side] for job in several], place / side / "jobs.json")
        processes[side] = subprocess.Popen(
            [sys.executable, str(HERE / "driver.py"), str(place / side / "jobs.json")],
            cwd=place / side,  # output_dir is relative: both sides write the same paths
            env=environment(tree, place),
            stdout=subprocess.PIPE,
            text=True,
        )
    codes = {}
    for side, process in processes.items():
        said = process.communicate()[0]
        answers = dict(map(int, line.split()) for line in said.splitlines() if re.fullmatch(r"\d+ -?\d+", line))
        codes[side] = list(faults(jobs[side], answers))
    return codes


def environment(tree: Path, place: Path) -> dict[str, str]:
    """One thread, English, no launcher's variables and no pictures."""
    taken = ("FIREFLY_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "ACCELERATE_", "FSDP_", "XDG_CACHE_HOME")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(taken)}
    path = os.pathsep.join((str(tree / "src"), str(write_stand_in(place / "without"))))
    own = {"PYTHONPATH": path, "FIREFLY_LANG": "en", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return kept | own | threads


def jobs_of(cell: Cell, way: str, inputs: Path, place: Path) -> Iterator[Job]:
    """A run, or the two that a killed one takes."""
    folder = f"{cell.name}/{way}"
    notes = place / "notes" / folder
    notes.mkdir(parents=True)
    settings = cell.settings(inputs, folder, RANKS if way == "ranks" else 1)
    (notes / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    job = {"config": str(notes / "config.json"), "log": str(notes / "log.txt"), "cache": str(notes / "cache")}
    if way != "resumed":
        yield Job(**job, ranks=RANKS if way == "ranks" else 1)
        return
    yield Job(**job, killed_after=f"{folder}/checkpoint-{STOPPED_AT}")
    again = notes / "again.json"
    again.write_text(json.dumps(settings | {"resume_from_checkpoint": True}), encoding="utf-8")
    yield Job(**job | {"config": str(again)})


def faults(jobs: Sequence[Sequence[Job]], codes: dict[int, int]) -> Iterator[list[str]]:
    """Of each cell and way, the jobs that did not end as they should, with the end of what they said."""
    number = 0
    for several in jobs:
        found = []
        for job in several:
            code = codes.get(number, "none: the driver died")
            if code != job.code:
                log = Path(job.log)
                said = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
                found.append(f"{Path(job.config).stem} ended with {code}, not {job.code}\n{said[-3000:]}")
            number += 1
        yield found


# ---- comparing what they left ----


def report(name: str, found: Sequence[Difference], allowed: Sequence[str]) -> bool:
    """One line if nothing differs, else what does, same things of several files together; whether anything does."""
    meant = [one for one in found if any(fits(one.place, pattern) for pattern in allowed)]
    rest = [one for one in found if one not in meant]
    suffix = f" but for {len(meant)} that are meant" if meant else ""
    if not rest:
        print(f"{name:28} equal{suffix}", flush=True)
        return False
    print(f"{name:28} DIFFERS{suffix}", flush=True)
    for one in rest[:12]:
        print(f"    {one}")
    if len(rest) > 12:
        print(f"    … and {len(rest) - 12} more")
    return True


def fits(place: str, pattern: str) -> bool:
    """Whether a pattern names a place, in whichever folder its file lies; * stands for anything."""
    named = re.escape(pattern).replace(r"\*", ".*")
    return re.fullmatch(rf"(.*/)?{named}", place) is not None


def compare(before: Path, now: Path, tolerance: float) -> list[Difference]:
    """Everything in which two runs' folders differ; what explains the rest first."""
    left = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (before, now)]
    found = [Difference(name, "is not left any more") for name in sorted(left[0] - left[1])]
    found += [Difference(name, "was not left before") for name in sorted(left[1] - left[0])]
    for name in sorted(left[0] & left[1], key=lambda name: (name.count("/"), name != "metrics.jsonl", name)):
        both = before / name, now / name
        if both[0].is_file() and both[1].is_file():
            found += compare_files(name, *both, tolerance)
    return found


def compare_files(name: str, before: Path, now: Path, tolerance: float) -> Iterator[Difference]:
    file = before.name
    if before.suffix == ".safetensors":
        yield from compare_values(name, load_file(before), load_file(now), tolerance, together=True)
    elif file in STATE:
        values = [torch.load(path, map_location="cpu", weights_only=False) for path in (before, now)]
        yield from compare_values(name, *values, tolerance, together=True)
    elif before.suffix in (".json", ".jsonl"):
        values = [read_json(path) for path in (before, now)]
        if file == "run.json":  # which of two ranks prepares the data, and which waits, is chance
            for manifest in values:
                manifest["notices"] = [one for one in manifest.get("notices", []) if one["code"] != "data.waiting"]
        if file in TEXT_OF_OTHERS:
            yield from compare_values(name, *map(in_order, values), 0.0)
        elif file in NUMBERS:
            yield from compare_values(name, *values, tolerance, numbers_only=True)
        elif file == "run.json":
            yield from compare_values(name, *({key: one[key] for key in SETTLED if key in one} for one in values), 0.0)
        yield from compare_keys(name, *values)
    elif file in TEXT_OF_OTHERS and before.read_bytes() != now.read_bytes():
        yield Difference(name, "says something else")


def read_json(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    return list(map(json.loads, text.splitlines())) if path.suffix == ".jsonl" else json.loads(text)


def in_order(value: Any) -> Any:
    """peft writes sets as lists, in any order."""
    if isinstance(value, dict):
        return {name: in_order(one) for name, one in value.items()}
    return sorted(value, key=str) if isinstance(value, list) else value


def compare_keys(name: str, before: Any, now: Any) -> Iterator[Difference]:
    """The keys that only one of two nested objects has."""
    old, new = keys(before), keys(now)
    yield from (Difference(f"{name}: {key}", "is gone") for key in sorted(old - new))
    yield from (Difference(f"{name}: {key}", "is new") for key in sorted(new - old))


def compare_values(
    name: str, before: Any, now: Any, tolerance: float, numbers_only: bool = False, together: bool = False
) -> Iterator[Difference]:
    """The values of two nested objects that stand in both under the same keys, the entries of a list as one.

    Args:
        numbers_only: leave out texts and what is measured.
        together: sum all up, and say what keys only one has.
    """
    found: dict[str, list[tuple[str, float, str]]] = {}
    for where, size, text in differences(before, now, tolerance, "", numbers_only):
        key = "" if together else f": {ENTRY.sub('[]', where)}"
        found.setdefault(name + key, []).append((where, size, text))
    for key, several in found.items():
        where, _, text = max(several, key=lambda one: one[1])
        others = f"; {len(several)} differ, the first of them {several[0][0]}" if len(several) > 1 else ""
        yield Difference(key, f"{text} ({where}{others})")
    if together:
        yield from compare_keys(name, before, now)


def differences(
    before: Any, now: Any, tolerance: float, place: str, numbers_only: bool
) -> Iterator[tuple[str, float, str]]:
    """(where, how much, in words)."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in [name for name in before if name in now]:
            if not (numbers_only and MEASURED.search(str(name))):
                where = f"{place}.{name}" if place else str(name)
                yield from differences(before[name], now[name], tolerance, where, numbers_only)
    elif isinstance(before, list | tuple) and isinstance(now, list | tuple):
        if len(before) != len(now):
            yield place, math.inf, f"{len(before)} entries → {len(now)}"
        for number, pair in enumerate(zip(before, now, strict=False)):
            yield from differences(*pair, tolerance, f"{place}[{number}]", numbers_only)
    elif isinstance(before, torch.Tensor) and isinstance(now, torch.Tensor):
        yield from differences_of_tensors(before, now, tolerance, place)
    elif is_number(before) and is_number(now):
        size = abs(before - now)
        if before != now and not size <= tolerance * max(1.0, abs(before)):
            yield place, size, f"{before!r} → {now!r}"
    elif not numbers_only and before != now:
        yield place, math.inf, f"{str(before)[:80]!r} → {str(now)[:80]!r}"


def differences_of_tensors(
    before: torch.Tensor, now: torch.Tensor, tolerance: float, place: str
) -> Iterator[tuple[str, float, str]]:
    if (before.dtype, before.shape) != (now.dtype, now.shape):
        kinds = [f"{value.dtype} {tuple(value.shape)}" for value in (before, now)]
        yield place, math.inf, f"{kinds[0]} → {kinds[1]}"
    elif not torch.equal(before, now):
        size = (before.double() - now.double()).abs().max().item()
        if not size <= tolerance:
            yield place, size, f"differs by up to {size:.3g}"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


if __name__ == "__main__":
    sys.exit(main())
