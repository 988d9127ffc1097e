"""The fixed probes: fair questions, texts of one length, and what counts as a right answer."""

from __future__ import annotations

import json
import re
import tomllib
import unicodedata
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import pytest

import firefly
from firefly.config import ModelConfig
from firefly.data.schema import Message
from firefly.evaluation.measurement import Question
from firefly.evaluation.probes import PROBES, READ_COLUMNS, ProbeText, is_right, probe_questions, probe_texts
from firefly.generation import GenerationSettings, Generator

QUESTIONS = probe_questions()
TEXTS = probe_texts()
SENTENCES = {
    "latin": (
        "{}",
        "{}.",
        "The answer is {}.",
        "**{}**",
        "Sure! It is \\boxed{{{}}}, of course.",
        "$\\text{{{}}}$",
        "<b>{}</b>",
        "'{}'",
        "It's called {}, and that is all.\n\nAnything else?",
    ),
    "zh": ("{}", "{}。", "答案是{}。", "**{}**", "好的，应该是“{}”，希望对你有帮助。", "是{}", "：{}！", "【{}】"),
}


def question(*accepted: str) -> Question:
    return Question("probe/x", "probe", (Message.of("user", "?"),), accepted=accepted)


def han(text: str) -> int:
    return len(re.findall(r"[\u4e00-\u9fff]", text))


@pytest.mark.parametrize("asked", QUESTIONS, ids=lambda asked: asked.key)
def test_accepted_answers_are_found_in_sentences_and_not_in_their_question(asked: Question) -> None:
    assert asked.accepted
    assert is_right(asked.shown, asked) is False
    for sentences in SENTENCES.values():
        missed = [
            (text, said) for text in asked.accepted for said in sentences if not is_right(said.format(text), asked)
        ]
        assert missed == []


def test_an_answer_to_one_question_is_right_for_few_others() -> None:
    firsts = {asked.key: asked.accepted[0] for asked in QUESTIONS}
    chance = {
        asked.key: sum(bool(is_right(text, asked)) for key, text in firsts.items() if key != asked.key)
        for asked in QUESTIONS
    }
    assert max(chance.values()) <= 1  # the same thing is asked in both languages, here and there


def test_keys_are_unique_and_say_their_language() -> None:
    keys = [asked.key for asked in QUESTIONS] + [text.key for text in TEXTS]
    assert len(set(keys)) == len(keys)
    for asked in QUESTIONS:
        assert asked.kind == "probe"
        assert re.fullmatch(r"probe/(en|zh)/[a-z0-9-]+", asked.key)
        assert {"latin": "en", "zh": "zh"}[asked.language] == asked.key.split("/")[1]
        assert (han(asked.shown) > len(asked.shown) / 4) == (asked.language == "zh")
    for text in TEXTS:
        assert text.language == text.key.split("/")[1]


def test_every_beginning_is_balanced() -> None:
    subjects = [row["subject"] for row in json.loads(PROBES.read_text(encoding="utf-8"))["questions"]]
    assert len(QUESTIONS) == len(subjects) == 60
    assert len(set(subjects)) == 6
    assert len(TEXTS) == 24
    for asked in (QUESTIONS, TEXTS):
        for count in range(1, len(asked) + 1):
            languages = Counter(item.language for item in asked[:count])
            assert max(languages.values()) - min(languages[name] for name in {item.language for item in asked}) <= 1
    for count in range(1, len(subjects) + 1):
        counts = [Counter(subjects[:count])[name] for name in set(subjects)]
        assert max(counts) - min(counts) <= 2
    kinds = [text.key.split("/")[2] for text in TEXTS]
    for count in range(1, len(kinds) + 1):
        assert len(set(kinds[:count])) == min(count, 12)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.key)
def test_texts_have_one_length(text: ProbeText) -> None:
    if text.language == "zh":
        assert 100 <= han(text.text) <= 200
    else:
        assert 60 <= len(text.text.split()) <= 120
    assert text.text == text.text.strip() == unicodedata.normalize("NFC", text.text)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("12", True),
        ("7 + 5 = 12.", True),
        ("①②", True),
        ("１２", True),
        ("12kg", True),
        ("It makes 12, I think.", True),
        ("12.5", False),
        ("112", False),
        ("1,12", False),
        ("12,000", False),
        ("H12", False),
        ("TWELVE", True),
        ("twelvefold", False),
        ("共十二个", True),
        ("二十二个", False),
        ("十二万", False),
        ("", False),
        ("I do not know.", False),
    ],
)
def test_numbers_are_found_whole(answer: str, right: bool) -> None:
    assert is_right(answer, question("12", "twelve", "十二")) is right


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("the city of PARIS.", True),
        ("Parisian", False),
        ("Écoparis", False),
        ("comparison", False),
        ("答案是Paris。", True),
        ("_Paris_", True),
        ("法国的首都是巴黎市", True),
        ("Paris2", False),
        ("Paris's streets", True),
    ],
)
def test_words_are_found_whole_and_chinese_within_a_sentence(answer: str, right: bool) -> None:
    assert is_right(answer, question("Paris", "巴黎")) is right


def test_subscripts_and_latex_are_the_same_formula() -> None:
    asked = question("H2O")
    assert all(is_right(text, asked) for text in ("H₂O", "$H_2O$", "H_{2}O", "\\mathrm{H_2O}", "h2o"))
    assert not is_right("H2O2", asked)


def test_an_answer_that_lists_everything_is_not_right() -> None:
    asked = question("Tokyo", "东京")
    cities = "Athens, Berlin, Cairo, Dublin, Helsinki, Kyiv, Lima, London, Madrid, Oslo, Ottawa, Paris, Prague, Quito, "
    assert len(cities) * 2 > READ_COLUMNS
    assert is_right(cities + "Tokyo", asked)
    assert not is_right(cities * 2 + "Tokyo", asked)
    assert is_right("首" * (READ_COLUMNS // 2 - 2) + "东京", asked)
    assert not is_right("首" * (READ_COLUMNS // 2 - 1) + "东京", asked)


def test_nobody_can_tell_where_nothing_is_accepted() -> None:
    assert is_right("Paris", question()) is None


def test_the_probes_are_in_the_package() -> None:
    root = Path(firefly.__file__).parent
    project = tomllib.loads((root.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["firefly"]
    assert any(fnmatch(PROBES.relative_to(root).as_posix(), pattern) for pattern in patterns)


@pytest.mark.slow
def test_the_questions_are_neither_beyond_a_small_model_nor_all_within_its_reach() -> None:
    asked = [item for item in QUESTIONS if item.language == "latin"]
    settings = GenerationSettings(max_new_tokens=24, temperature=0, top_p=1)
    with Generator.load(ModelConfig(name_or_path="smollm2-135m-instruct"), dtype="float32") as generator:
        answers = generator.generate((generator.encode(item.messages) for item in asked), settings)
        right = [is_right(answer.text, item) for item, (answer,) in zip(asked, answers, strict=True)]
    assert 0.25 * len(asked) <= sum(map(bool, right)) <= 0.65 * len(asked)
