"""What the pages name is there: paths, modules, links, and the objects that CONTRIBUTING tells people to use."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "firefly"
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks" / "README.md")
    if path.name != "CHANGELOG.md"  # which speaks of what was, too
)
LEFT_BY_RUNS = re.compile(
    r"(output|checkpoint|runs|logs)/|.*\.jsonl|.*(_report(\.failed)?|results|certificate|run)\.json"
)
"""Places that commands of the pages write to, or data that are users' own."""
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"(?:\.\./)*[\w.-]+(?:/[\w.-]+)*/?", re.ASCII)
STANDS_FOR_ANOTHER = re.compile(r"\b(NAME|TASK|MODE|TREE|FILE)\b")
ENDINGS = (".py", ".toml", ".sh", ".md", ".jinja", ".txt", "/")


def named_paths(text: str) -> set[str]:
    """What stands in backticks and is a file or a folder of this repository, if it is anything."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    names = {name for name in CODE.findall(text) if PATH.fullmatch(name) and name.endswith(ENDINGS)}
    return {name for name in names if not LEFT_BY_RUNS.match(name) and not STANDS_FOR_ANOTHER.search(name)}


def section(page: str, title: str) -> str:
    return (ROOT / page).read_text("utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@cache
def definitions() -> dict[str, set[str]]:
    """What the package's modules define at their top (and classes in themselves): name → files."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
            names = [getattr(target, "id", getattr(target, "name", None)) for target in targets]
            if isinstance(node, ast.ClassDef):
                within = [
                    getattr(item, "name", getattr(getattr(item, "target", None), "id", None)) for item in node.body
                ]
                names += [f"{node.name}.{name}" for name in within]
                names += within
            for name in filter(None, names):
                found.setdefault(name, set()).add(path.relative_to(PACKAGE).as_posix())
    return found


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md", "README_zh.md"])
def test_every_path_of_contributing_and_the_code_maps_exists(page: str) -> None:
    titles = {"README.md": "Where things are in the code", "README_zh.md": "代码导览"}
    text = section(page, titles[page]) if page in titles else (ROOT / page).read_text("utf-8")
    names = named_paths(text)
    assert len(names) > 10
    places = (ROOT, PACKAGE)
    assert {name for name in names if not any((place / name).exists() for place in places)} == set()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_are_there(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
                target
            )


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_code_that_a_page_names_by_its_path_exists(page: str) -> None:
    ours = ("src/", "tests/", "benchmarks/", "script/", "examples/", "train_args/", "data/", "docs/")
    for name in named_paths((ROOT / page).read_text("utf-8")):
        if name.startswith(ours) or name.endswith(".py"):
            assert any((place / name).exists() for place in (ROOT, PACKAGE, ROOT / "benchmarks")), name


def test_the_objects_that_contributing_names_are_ours() -> None:
    """Names with a capital, an underscore or a dot, as our objects have them; others are keys, words or commands."""
    text = re.sub(r"```.*?```", "", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), flags=re.DOTALL)
    names = {re.sub(r"\(.*", "", name) for name in CODE.findall(text)}
    names = {name for name in names if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", name)}
    names = {
        name for name in names if re.search(r"[A-Z_.]", name) and not name.endswith((".py", ".json", ".toml", ".jinja"))
    }
    foreign = {"TrainingArguments", "FIREFLY_CI"}
    tests = {
        match for path in ROOT.glob("tests/**/*.py") for match in re.findall(r"def (test_\w+)", path.read_text("utf-8"))
    }
    known = definitions().keys() | tests | foreign
    unknown = {name for name in names if name not in known and name.rpartition(".")[2] not in known}
    assert len(names) > 15
    assert unknown == set()


def test_the_way_from_the_command_to_the_gradient_is_as_the_pages_say() -> None:
    for page in ("CONTRIBUTING.md", "README.md", "README_zh.md"):
        (way,) = set(re.findall(r"`(cli\.main → [^`]+)`", (ROOT / page).read_text("utf-8")))
        for name in way.split(" → "):
            place, _, function = name.partition(".")
            files = definitions()[name if place == "Task" else function]
            assert (f"{place}.py" if place != "Task" else "tasks/base.py") in files
