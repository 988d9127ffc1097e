"""Rooms import in one direction: what lies lower knows nothing of what lies higher."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import firefly

ROOT = Path(firefly.__file__).parent

ROOMS = (
    # the ground
    (
        "",
        "translation",
        "ranks",
        "errors",
        "console",
        "files",
        "segments",
        "config",
        "hub",
        "control_groups",
        "threads",
    ),
    ("data",),
    ("models",),
    ("runs", "generation", "distributed"),
    ("tasks", "evaluation"),
    ("setup", "run", "saving", "samples"),
    ("loop",),
    ("training", "before_after", "export", "server"),
    ("commands", "studio"),
    ("cli", "__main__"),
)
"""From the lowest to the highest: a room imports from lower ones and from its own row. "" is the package itself."""

BELOW_KERNELS = {"firefly.models.precision", "firefly.models.probing"}
"""What kernels use of the models' room, which they lie at the bottom of."""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str) -> Iterator[str]:
    """Full names of what a module imports of ours, inside its functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what they point to"
            yield from (
                f"{node.module}.{alias.name}" for alias in node.names if (node.module or "").startswith("firefly")
            )
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "firefly")


SOURCES = {module_of(path): path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}


@cache
def imported_modules(name: str) -> set[str]:
    if name == "firefly":  # names what programs import, and imports it when they do
        return set()
    found = {imported if imported in SOURCES else imported.rpartition(".")[0] for imported in imports_of(SOURCES[name])}
    assert found <= SOURCES.keys()
    return found - {name}


def room_of(module: str) -> int:
    name = [*module.split("."), ""][1]
    return next(number for number, row in enumerate(ROOMS) if name in row)


def test_every_module_lies_in_a_room() -> None:
    names = {name for row in ROOMS for name in row}
    assert {[*module.split("."), ""][1] for module in SOURCES} == names


def test_no_import_points_up() -> None:
    up = {(module, name) for module in SOURCES for name in imported_modules(module) if room_of(name) > room_of(module)}
    assert up == set()


def test_kernels_know_nothing_of_the_models_that_use_them() -> None:
    for module in SOURCES:
        if module.startswith("firefly.models.kernels.") or module in BELOW_KERNELS:
            inside = {name for name in imported_modules(module) if name.startswith("firefly.models.")}
            kernels = () if module in BELOW_KERNELS else ("firefly.models.kernels",)
            assert {name for name in inside if not name.startswith(kernels)} <= BELOW_KERNELS, module


def test_no_module_imports_itself_by_way_of_others() -> None:
    def reached(start: str) -> set[str]:
        found, ahead = set(), [start]
        while ahead:
            new = imported_modules(ahead.pop()) - found
            found |= new
            ahead += new
        return found

    assert [module for module in SOURCES if module in reached(module)] == []
