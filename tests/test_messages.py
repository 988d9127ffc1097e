"""One catalogue, two languages, no message that nobody reads."""

from __future__ import annotations

import re
import string
from pathlib import Path

import pytest

import firefly
from firefly.errors import FireflyError, UsageError, VerificationError
from firefly.messages import language, render
from firefly.messages.catalogue import CATALOGUE

SOURCE = Path(firefly.__file__).parent
PROGRAM = "\n".join(
    path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py")) if path.name != "catalogue.py"
)


def placeholders(text: str) -> list[tuple[str, str | None, str | None]]:
    """(name, format, conversion) of each value in a message."""
    return sorted((name, spec, turn) for _, name, spec, turn in string.Formatter().parse(text) if name is not None)


@pytest.mark.parametrize("code", CATALOGUE)
def test_both_languages_name_the_same_values(code):
    english, chinese = CATALOGUE[code]
    names = {name for name, _, _ in placeholders(english)}
    assert names == {name for name, _, _ in placeholders(chinese)}
    assert all(name.isidentifier() for name in names)


@pytest.mark.parametrize("code", CATALOGUE)
def test_a_chinese_message_is_chinese(code):
    english, chinese = CATALOGUE[code]
    assert re.search(r"[\u4e00-\u9fff：]", chinese)
    assert not re.search(r"[\u4e00-\u9fff]", english)


def test_every_code_that_the_program_names_exists():
    named = re.findall(
        r'(?:UsageError|VerificationError|MalformedRecord|render|notice|message)\(\s*"([a-z]+\.\w+)"', PROGRAM
    )
    assert len(named) > 80
    assert set(named) <= CATALOGUE.keys()
    from firefly.arguments import FIELDS

    assert {field.by for field in FIELDS.values() if field.how == "refused"} <= CATALOGUE.keys()


def test_no_code_is_unused():
    assert [code for code in CATALOGUE if not re.search(f"[\"']{re.escape(code)}[\"']", PROGRAM)] == []


def test_the_values_of_a_message_are_text_and_never_a_format():
    nasty = "{0} {path} {{x}} %s 100%"
    assert nasty in render("config.no_file", path=nasty)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FIREFLY_LANG": "zh"}, "zh"),
        ({"FIREFLY_LANG": "ZH_CN"}, "zh"),
        ({"FIREFLY_LANG": "en", "LANG": "zh_CN.UTF-8"}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LC_ALL": "C", "LANG": "zh_CN.UTF-8"}, "en"),
        ({"LC_MESSAGES": "zh_TW", "LANG": "en_US"}, "zh"),
        ({"LC_ALL": "", "LANG": "zh_CN"}, "zh"),
        ({}, "en"),
        ({"FIREFLY_LANG": "fr"}, "en"),
    ],
)
def test_the_language_is_firefly_lang_or_else_the_locale(monkeypatch, environment, expected):
    for name in ("FIREFLY_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert language() == expected
    assert render("label.error") == ("错误：" if expected == "zh" else "error:")


def test_an_error_carries_its_code_its_values_and_its_exit_code(monkeypatch):
    error = UsageError("config.no_file", path="a.json")
    assert (error.code, error.values, error.exit_code) == ("config.no_file", {"path": "a.json"}, 2)
    assert isinstance(error, FireflyError)
    assert VerificationError("config.no_file", path="a").exit_code == 3
    monkeypatch.setenv("FIREFLY_LANG", "zh")
    assert str(UsageError("config.no_file", path="a.json")) == "配置文件 a.json 不存在。"
