"""What the frozen cells leave, recorded once: losses, and the keys of the files that Firefly writes.

    python tests/frozen/recording.py        # writes recorded.json anew

A recording that changes says that runs changed for everyone. The commit that brings it says why in its message; a
refactoring brings none.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import CELLS, Cell, write_inputs

RECORDED = Path(__file__).with_name("recorded.json")
OWN_FILES = ("run.json", "train_args.json", "train_results.json", "data_report.json", "metrics.jsonl")
OWN_FILES += ("template_certificate.json", "plan.json", "trainer_state.json")
OF_THE_MACHINE = re.compile(r"(defaults|versions|hardware)\..*")
"""Keys of run.json that are transformers', the installed packages' and the platform's."""


@dataclass(frozen=True)
class Left:
    """What a run left. Checkpoints count as one folder, checkpoint-N.

    Attributes:
        losses, eval_losses: by step.
        places: its files, and `FILE: KEY` for each key of Firefly's own.
    """

    losses: dict[int, float]
    eval_losses: dict[int, float]
    places: set[str]


def train(cell: Cell, inputs: Path, folder: Path, **changes: Any) -> Left:
    """Train a cell in this process and read what it leaves in `folder`."""
    from firefly.cli import main

    config = inputs / f"{folder.name}.json"
    config.write_text(json.dumps(cell.settings(inputs, str(folder)) | {"compare": False} | changes), encoding="utf-8")
    assert main(["train", str(config)]) == 0
    return read(folder)


@contextmanager
def without_pictures() -> Iterator[None]:
    """No loss.png: drawing one takes longer than the training."""
    own = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "matplotlib"}
    for name in own:
        del sys.modules[name]
    sys.modules["matplotlib"] = None  # type: ignore[assignment]
    yield
    del sys.modules["matplotlib"]
    sys.modules.update(own)


def read(folder: Path) -> Left:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses, eval_losses = (
        {line["step"]: line[name] for line in lines if name in line} for name in ("loss", "eval_loss")
    )
    places = set()
    for path in folder.rglob("*"):
        name = re.sub(r"checkpoint-\d+", "checkpoint-N", path.relative_to(folder).as_posix())
        places.add(name)
        if path.name in OWN_FILES:
            value = lines if path.suffix == ".jsonl" else json.loads(path.read_text(encoding="utf-8"))
            found = keys(value)
            places |= {f"{name}: {key}" for key in found if not OF_THE_MACHINE.fullmatch(key)}
    return Left(losses, eval_losses, places)


def keys(value: Any, place: str = "") -> set[str]:
    """The key of everything in a JSON value, behind those it lies under; the elements of a list together."""
    if isinstance(value, dict):
        return {f"{place}{name}" for name in value}.union(*(keys(one, f"{place}{n}.") for n, one in value.items()))
    if isinstance(value, list):
        return set().union(*(keys(one, f"{place.removesuffix('.')}[].") for one in value))
    return set()


def recorded() -> dict[str, Left]:
    """Cell → what it left when it was recorded."""
    file = json.loads(RECORDED.read_text(encoding="utf-8"))
    return {
        name: Left(
            *({int(step): loss for step, loss in file[kind][name].items()} for kind in ("losses", "eval_losses")),
            {place for place, cells in file["places"].items() if cells == "all" or name in cells.split()},
        )
        for name in file["losses"]
    }


def write(left: Mapping[str, Left]) -> None:
    places = {
        place: [name for name, one in left.items() if place in one.places]
        for place in sorted(set().union(*(one.places for one in left.values())))
    }
    file = {
        "losses": {name: one.losses for name, one in left.items()},
        "eval_losses": {name: one.eval_losses for name, one in left.items()},
        "places": {place: "all" if len(cells) == len(left) else " ".join(cells) for place, cells in places.items()},
    }
    RECORDED.write_text(json.dumps(file, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
    with tempfile.TemporaryDirectory() as name, without_pictures():
        place = Path(name)
        os.environ |= {"FIREFLY_CACHE": str(place / "cache"), "FIREFLY_LANG": "en", "OMP_NUM_THREADS": "1"}
        inputs = write_inputs(place / "inputs")
        write({cell.name: train(cell, inputs, place / f"{cell.task}-{cell.mode}") for cell in CELLS})
    print(f"{RECORDED}: say in the commit's message why runs leave something else", file=sys.stderr)


if __name__ == "__main__":
    main()
