"""English stands where it is raised; every template has its Chinese in locale/zh.json, which has nothing else."""

from __future__ import annotations

import ast
import json
import re
import string
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from jinja2 import Environment
from jinja2.ext import extract_from_ast

import firefly
from firefly.config.json_schema import descriptions
from firefly.errors import FireflyError, UsageError, VerificationError
from firefly.translation import CHINESE, Phrase, chinese, language, translate

SOURCE = Path(firefly.__file__).parent
TEXT_AT = {"translate": 0, "Phrase": 0, "MalformedRecord": 0, "TemplateFailure": 0, "say": 1} | dict.fromkeys(
    ("UsageError", "VerificationError", "ExportFailed", "Interrupted", "notice", "notify", "refused"), 1
)
"""Which argument of a call is the template."""


def templates_of(tree: ast.Module) -> Iterator[tuple[int, str | None]]:
    """(line, template) of every message of a module; None for one that cannot be read from the source.

    A template may be chosen among literals (`a if x else b`, or a local variable that takes nothing else), passed on
    by a function as its own argument `text`, or be the `text` of a phrase, which was read where the phrase was made.
    """
    scopes = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda))]
    inside = {id(node): scope for scope in scopes for node in ast.walk(scope)}  # the innermost comes last

    def read(node: ast.expr) -> list[str | None]:
        if isinstance(node, ast.Constant):
            return [node.value if isinstance(node.value, str) else None]
        if isinstance(node, ast.IfExp):
            return [*read(node.body), *read(node.orelse)]
        if isinstance(node, ast.Attribute) and node.attr == "text":
            return []
        if isinstance(node, ast.Name) and (scope := inside.get(id(node))):
            arguments = [*scope.args.posonlyargs, *scope.args.args]
            if node.id == "text" and any(argument.arg == "text" for argument in arguments):
                return []
            given = [
                item.value
                for item in ast.walk(scope)
                if isinstance(item, ast.Assign)
                and any(isinstance(t, ast.Name) and t.id == node.id for t in item.targets)
            ]
            if given:
                return [text for value in given for text in read(value)]
        return [None]

    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in TEXT_AT:
            position = TEXT_AT[node.func.id]
            if len(node.args) > position and not any(isinstance(item, ast.Starred) for item in node.args):
                yield from ((node.lineno, text) for text in read(node.args[position]))
            else:
                yield node.lineno, None


def templates_of_page(source: str) -> Iterator[tuple[int, str | None]]:
    """The same of a page that is made from a template of Jinja, where `translate` is called as in a module."""
    for line, _, texts in extract_from_ast(Environment().parse(source), ["translate"]):
        yield line, texts[0] if isinstance(texts, tuple) else texts


def helps_of(tree: ast.Module) -> Iterator[str]:
    """What `--help` shows: the help of options, arguments and groups, and the docstrings of commands in groups."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("typer.Option", "typer.Argument", "typer.Typer"):
            yield from (ast.literal_eval(item.value) for item in node.keywords if item.arg == "help")
        if isinstance(node, ast.FunctionDef) and any(".command('" in ast.unparse(d) for d in node.decorator_list):
            yield ast.get_docstring(node) or f"{node.name} has no help"  # a verb's own stands in the command line


def fields(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


@pytest.fixture(scope="module")
def raised() -> dict[str, str]:
    """Every template of the program → where it stands."""
    found = {}
    for path in sorted([*SOURCE.rglob("*.py"), *SOURCE.glob("evaluation/*.jinja")]):
        source = path.read_text(encoding="utf-8")
        for line, text in templates_of(ast.parse(source)) if path.suffix == ".py" else templates_of_page(source):
            place = f"{path.relative_to(SOURCE)}:{line}"
            assert text is not None, f"{place}: the template of a message is to be written out where it is raised"
            found[text] = place
    return found | dict.fromkeys(descriptions().values(), "config/schema.py")


@pytest.fixture(scope="module")
def helps() -> set[str]:
    return {text for path in SOURCE.rglob("*.py") for text in helps_of(ast.parse(path.read_text(encoding="utf-8")))}


def test_every_message_is_translated_with_the_same_fields_and_nothing_else_is(
    raised: dict[str, str], helps: set[str]
) -> None:
    known = chinese()
    assert len(raised) > 400
    assert len(helps) > 40
    assert {text: place for text, place in raised.items() if text not in known} == {}
    assert [text for text in helps if text not in known] == []
    assert [text for text in known if text not in raised and text not in helps] == []
    assert [text for text in raised if fields(text) != fields(known[text])] == []
    assert all(name.isidentifier() for text in raised for name in fields(text))


def test_chinese_is_chinese_and_english_is_not() -> None:
    # A field, a sign or a name alone is the same in both.
    alone = re.compile(r"[\u4e00-\u9fff\uff00-\uffef]")
    assert [text for text, translated in chinese().items() if not alone.search(translated)] == []
    assert [text for text in chinese() if alone.search(text)] == []


def test_the_translations_are_one_a_line_in_the_order_of_the_english() -> None:
    stored = CHINESE.read_text(encoding="utf-8")
    sorted_by_english = dict(sorted(chinese().items()))
    assert stored == json.dumps(sorted_by_english, ensure_ascii=False, indent=2) + "\n"
    lines = [json.loads(f"{{{line.rstrip(',')}}}") for line in stored.splitlines()[1:-1]]
    assert len(lines) == len(sorted_by_english)  # JSON would keep the last of two equal keys in silence


def test_the_translations_are_part_of_the_package() -> None:
    import tomllib

    assert json.loads(resources.files("firefly").joinpath("locale", "zh.json").read_text(encoding="utf-8")) == chinese()
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["firefly"]
    assert any(CHINESE in set(SOURCE.glob(pattern)) for pattern in patterns)


def test_a_module_with_an_untranslatable_message_is_found() -> None:
    source = """
def f(found, text):
    notice("a.b", "literal {x}", x=1)
    raise UsageError("a.c", "one" if found else "other")
    chosen = "first"
    chosen = "second"
    translate(chosen)
    Phrase(text, x=2)
    Phrase(found)
    translate(f"{found}")
    notice("a.d")
"""
    assert [text for _, text in sorted(templates_of(ast.parse(source)), key=lambda item: item[0])] == [
        "literal {x}", "one", "other", "first", "second", None, None, None
    ]  # fmt: skip


def test_a_page_with_an_untranslatable_message_is_found() -> None:
    source = '{{ translate("one") }}{% for x in (translate("two {a}", a=3), translate(name)) %}{{ x }}{% endfor %}'
    assert [text for _, text in templates_of_page(source)] == ["one", "two {a}", None]


def test_the_values_of_a_message_are_text_and_never_a_format() -> None:
    nasty = "{0} {path} {{x}} %s 100%"
    assert nasty in translate("configuration file {path} does not exist.", path=nasty)
    assert nasty in str(Phrase("{problem}.", problem=Phrase("{path}", path=nasty)))


def test_a_phrase_is_rendered_when_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Phrase("{field} is missing", field="output")
    phrase = Phrase("{side}: {message}", side="chosen", message=inner)
    monkeypatch.setenv("FIREFLY_LANG", "en")
    assert str(phrase) == "chosen: output is missing"
    monkeypatch.setenv("FIREFLY_LANG", "zh")
    assert str(phrase) == "chosen：缺少 output"


def test_a_phrase_keeps_what_an_exception_says_and_not_the_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    """A JSON error holds the text that it is about, and any error the frames that it came through."""
    phrase = Phrase("the row cannot be read: {problem}", problem=ValueError(3))
    assert phrase.values == {"problem": "3"}
    inner = Phrase("{field} is missing", field="output")
    phrase = Phrase("the row cannot be read: {problem}", problem=RuntimeError(inner))
    monkeypatch.setenv("FIREFLY_LANG", "zh")
    assert str(phrase) == "无法读取此行：缺少 output"


def test_a_stored_phrase_is_the_phrase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIREFLY_LANG", "en")
    values = {"path": Path("a/b"), "count": np.int64(12345), "share": np.float32(0.5), "none": None, "yes": True}
    phrase = Phrase(
        "{problem} {path} {count:,} {share:.1%} {none} {yes} {error}",
        problem=Phrase("{field} is empty", field="{x}"),
        error=ValueError("not {this}"),
        **values,
    )
    stored = json.loads(json.dumps(phrase.as_json()))
    assert str(Phrase.from_json(stored)) == str(phrase) == "{x} is empty a/b 12,345 50.0% None True not {this}"


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
def test_the_language_is_firefly_lang_or_else_the_locale(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str
) -> None:
    for name in ("FIREFLY_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert language() == expected
    assert translate("error:") == ("错误：" if expected == "zh" else "error:")


def test_an_error_carries_its_code_its_values_and_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    error = UsageError("config.no_file", "configuration file {path} does not exist.", path="a.json")
    assert (error.code, error.values, error.exit_code) == ("config.no_file", {"path": "a.json"}, 2)
    assert isinstance(error, FireflyError)
    assert VerificationError("merge.failed", "{path} differs.", path="a").exit_code == 3
    monkeypatch.setenv("FIREFLY_LANG", "zh")
    assert str(error) == "配置文件 a.json 不存在。"
    monkeypatch.setenv("FIREFLY_LANG", "en")
    assert str(error) == "configuration file a.json does not exist."
