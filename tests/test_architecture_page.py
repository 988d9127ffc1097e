"""What the pages on architecture point to is there: files, the names in them, and the order of the rooms."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import firefly
from test_arrows import ROOMS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(firefly.__file__).parent
PAGES = {"en": ROOT / "docs/architecture.md", "zh": ROOT / "docs/zh/architecture.md"}

CODE = re.compile(r"`([^`\n]+)`")
NAMES_IN_FILE = re.compile(r"([\w/]+\.py): (.+)")
BLOCK = re.compile(r"^```text\n(.*?)^```", re.MULTILINE | re.DOTALL)
TYPE = re.compile(r"\b(?:[A-Z][a-z]+){2,}\b")


def quoted(page: Path) -> list[str]:
    """What stands between backticks, in order; blocks are left out."""
    return CODE.findall(BLOCK.sub("", page.read_text(encoding="utf-8")))


def defined_in(body: list[ast.stmt], above: str = "") -> Iterator[str]:
    """What a module or class defines; members of classes as `Class.member`, those set on `self` among them."""
    for node in body:
        if isinstance(node, ast.FunctionDef):
            yield above + node.name
            if above:
                stores = (item for item in ast.walk(node) if isinstance(item, ast.Attribute))
                yield from (above + item.attr for item in stores if isinstance(item.ctx, ast.Store))
        elif isinstance(node, ast.ClassDef):
            yield above + node.name
            yield from defined_in(node.body, f"{above}{node.name}.")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (above + target.id for target in targets if isinstance(target, ast.Name))


@cache
def names_of(path: Path) -> set[str]:
    return set(defined_in(ast.parse(path.read_text(encoding="utf-8")).body))


@cache
def known_words() -> set[str]:
    """Names that any module defines, without their classes, and texts without a space that stand in the code."""
    words = set()
    for path in PACKAGE.rglob("*.py"):
        words |= {name.rpartition(".")[2] for name in names_of(path)}
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        words |= {text for text in texts if isinstance(text, str) and " " not in text}
    return words


def problem_with(text: str) -> str | None:
    """What is wrong with a reference; None where it leads somewhere."""
    if found := NAMES_IN_FILE.fullmatch(text):
        path = PACKAGE / found[1]
        if not path.is_file():
            return f"{found[1]} is no file of the package"
        missing = [name for name in found[2].split(", ") if name not in names_of(path)]
        return f"{found[1]} does not define {', '.join(missing)}" if missing else None
    if "/" in text or text.endswith((".py", ".md")):
        return None if (PACKAGE / text).exists() or (ROOT / text).exists() else f"{text} does not exist"
    unknown = [text] if text not in known_words() else []
    if unknown and re.fullmatch(r"\w+(\.\w+)+", text):
        unknown = [part for part in text.split(".") if part not in known_words()]
    return f"nothing is called {', '.join(unknown)}" if unknown else None


@pytest.mark.parametrize("language", PAGES)
def test_every_file_and_name_on_the_page_exists(language: str) -> None:
    found = quoted(PAGES[language])
    assert len([text for text in found if NAMES_IN_FILE.fullmatch(text)]) > 50
    assert [problem for text in found if (problem := problem_with(text))] == []


@pytest.mark.parametrize("language", PAGES)
def test_every_type_on_the_tokens_way_exists(language: str) -> None:
    way = BLOCK.findall(PAGES[language].read_text(encoding="utf-8"))[0]
    types = TYPE.findall(way)
    assert len(types) > 4
    assert [name for name in types if name not in known_words()] == []


@pytest.mark.parametrize("language", PAGES)
def test_the_diagram_of_rooms_is_the_order_that_imports_are_held_to(language: str) -> None:
    blocks = [block.splitlines() for block in BLOCK.findall(PAGES[language].read_text(encoding="utf-8"))]
    (rooms,) = (lines for lines in blocks if lines[0].startswith("cli"))
    drawn = [set(line.partition("  ")[0].split(" · ")) for line in rooms]
    assert drawn == [{name for name in row if name} for row in reversed(ROOMS)]


def test_both_pages_lead_to_the_same_places() -> None:
    places = [sorted(text for text in quoted(page) if ".py: " in text) for page in PAGES.values()]
    assert places[0] == places[1]


def test_a_reference_that_leads_nowhere_is_noticed() -> None:
    assert problem_with("loop.py: fit") is None
    for text in ("loop.py: fits", "loops.py: fit", "tasks/base.py: Task.forwards", "data/none.py", "Task.forwards"):
        assert problem_with(text), text
