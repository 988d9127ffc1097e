"""docs/compare.md says what the command takes, what its page shows, and what report.json holds."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import typer

from firefly.commands.compare import compare_command
from firefly.evaluation import wording
from firefly.evaluation.intervals import LEAST_ROWS
from firefly.evaluation.probes import probe_questions, probe_texts
from firefly.evaluation.report import Report

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = {"en": "compare.md", "zh": "zh/compare.md"}


def page(lang: str) -> str:
    return (DOCS / PAGES[lang]).read_text("utf-8")


def options() -> set[str]:
    app = typer.Typer(add_completion=False)
    app.command()(compare_command)
    return {name for option in typer.main.get_command(app).params for name in option.opts}


def test_both_languages_have_the_same_commands_and_sections() -> None:
    commands = [re.findall(r"```bash\n(.*?)```", page(lang), re.DOTALL) for lang in PAGES]
    assert commands[0] == commands[1]
    assert len(commands[0]) == 3
    shapes = [re.findall(r"^(#+ |\| |- |<!--.*)", page(lang), re.MULTILINE) for lang in PAGES]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("lang", PAGES)
def test_the_page_names_the_options_of_the_command_and_no_others(lang: str) -> None:
    assert set(re.findall(r"(?<![\w-])--[a-z]\w+", page(lang))) == options()


@pytest.mark.parametrize("lang", PAGES)
def test_every_figure_is_explained_by_the_name_that_it_has_on_the_report(
    lang: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIREFLY_LANG", lang)
    text = page(lang).lower()
    names = [re.split("[:：]", str(name))[0].lower() for name, _ in wording.MEASURES.values()]
    assert [name for name in names if not re.search(rf"^(\| |- \*\*(the )?){name}( |\*|（)", text, re.MULTILINE)] == []
    words = [str(word) for _, word in (*wording.VERDICTS.values(), *wording.RETENTIONS.values())]
    assert [word for word in words if f"*{word}*" not in text] == []


@pytest.mark.parametrize("lang", PAGES)
def test_every_key_of_the_report_is_named(lang: str) -> None:
    keys = page(lang).partition("## report.json")[2]
    assert [item.name for item in fields(Report) if f"`{item.name}`" not in keys] == []


@pytest.mark.parametrize("lang", PAGES)
def test_the_numbers_of_the_page_are_those_of_the_code(lang: str) -> None:
    numbers = [len(probe_questions()), len(probe_texts()), LEAST_ROWS]
    assert [number for number in numbers if not re.search(rf"(?<!\d){number} ", page(lang))] == []
