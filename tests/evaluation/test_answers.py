"""Figures of answers say what a reader would: in which script they are, whether they loop, which model did better."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path

import pytest

from firefly.data.schema import Message
from firefly.evaluation import answers
from firefly.evaluation.answers import language_of, measure_answers, measure_correct, repetition
from firefly.evaluation.measurement import GivenAnswer, Question
from firefly.evaluation.report import Measure
from firefly.evaluation.text_metrics import bleu, chrf, rouge_l

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is the capital of France?", "latin"),
        ("Đây là thủ đô của Pháp.", "latin"),
        ("ＦＵＬＬ ｗｉｄｔｈ", "latin"),
        ("法国的首都是哪里？", "zh"),
        ("法國的首都是巴黎。", "zh"),
        ("是", "zh"),
        ("使用 Python 的 pandas 库读取 data.csv，再用 matplotlib 画图。", "zh"),
        ("请访问 https://www.example.com/docs/en/getting-started/index.html 了解更多。", "zh"),
        ("结果是 \\frac{\\alpha}{\\beta} \\times \\sqrt{\\gamma}。", "zh"),
        ("代码如下：\n```python\nfor number in range(10):\n    print(number, end=' ')\n```\n", "zh"),
        ("没有写完的代码：\n```python\nimport os\nimport sys\nprint(sys.path)", "zh"),
        ("我很喜欢吃鲜の每日牌子的牛奶，味道真的很好。", "zh"),
        ("フランスの首都はどこですか。", "ja"),
        ("カタカナ", "ja"),
        ("ｶﾀｶﾅ", "ja"),
        ("東京大学の入学試験", "ja"),
        ("프랑스의 수도는 어디입니까?", "ko"),
        ("เมืองหลวงของฝรั่งเศสคืออะไร", "th"),
        ("Какая столица Франции?", "cyrillic"),
        ("ما هي عاصمة فرنسا؟", "arabic"),
        ("फ्रांस की राजधानी क्या है?", "devanagari"),
        ("Ποια είναι η πρωτεύουσα;", "greek"),
        ("מהי בירת צרפת?", "hebrew"),
        ("The Chinese for “good morning” is 早上好.", "latin"),
        ("", ""),
        ("42", ""),
        ("٤٢", ""),
        ("3.14 + 2 = ?", ""),
        ("x = 5", ""),
        ("B", ""),
        ("👍！？", ""),
        ("```\nprint(number)\n```", ""),
    ],
)
def test_the_script_that_most_of_a_text_is_in(text: str, language: str) -> None:
    assert language_of(text) == language


LOOPS = {
    "a word": "the " * 200,
    "a sentence": "I am a language model and I can help you with that. " * 30,
    "a chinese sentence": "我是一个语言模型，我可以帮助你解决这个问题。" * 30,
    "a chinese character": "的" * 200,
    "japanese": "申し訳ありませんが、お答えできません。" * 20,
    "korean": "저는 언어 모델입니다. 도와드리겠습니다. " * 30,
    "arabic": "أنا نموذج لغوي ويمكنني مساعدتك. " * 30,
    "exclamation marks": "!" * 300,
    "a word and exclamation marks": "Hello" + "!" * 300,
    "letters without a space": "ha" * 400,
    "emoji": "😀🎉" * 100,
    "lines": "- item\n" * 100,
    "dashes": "- " * 200,
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_almost_all_repetition(name: str) -> None:
    assert 0.9 < repetition(LOOPS[name]) < 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Paris",
        "No, no, no, no!",
        "哈哈哈哈",
        "yes " * 15,
        "| a | b |\n|---|---|\n" + "".join(f"| {number} | {number**2} |\n" for number in range(40)),
        "Contents\n" + "".join(f"{'.' * 60} {number}\n" for number in range(40)),
        "dGhlIHF1aWNrIGJyb3duIGZveCBqdW1wcyBvdmVyIHRoZSBsYXp5IGRvZw",
    ],
)
def test_short_answers_and_tables_do_not_repeat(text: str) -> None:
    assert repetition(text) == 0


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/adapters.md", "docs/zh/adapters.md", "docs/zh/data.md"])
def test_prose_does_not_repeat(page: str) -> None:
    prose = (ROOT / page).read_text(encoding="utf-8")[:2500]
    assert repetition(prose) < 0.08  # of pages full of names, the most
    half_looped = prose[:500] + prose[:100] * 20
    assert 0.5 < repetition(half_looped) < 0.9


def test_a_chinese_term_may_come_again() -> None:
    said = ("的历史很长", "已经进入医院", "改变了翻译这一行", "需要大量数据", "离不开芯片", "还不会做饭", "也会出错")
    assert repetition("".join(f"人工智能技术{one}。" for one in said)) == 0


def question(key: str, asked: str, reference: str | None = None, language: str = "") -> Question:
    return Question(key, "held_out", (Message.of("user", asked),), reference=reference, language=language)


def by_name(*given: tuple[Measure, ...]) -> dict[str, Measure]:
    (measures,) = given
    return {measure.name: measure for measure in measures}


def answered(texts: list[str], finish: str | None = "stop", tokens: int = 5) -> list[GivenAnswer]:
    return [GivenAnswer(f"rows.jsonl:{number}", text, tokens, finish) for number, text in enumerate(texts)]


def test_a_model_that_learnt_its_answers_is_better_in_all() -> None:
    references = [f"{name} 是萤火虫，由第{number}组开发。" for number, name in enumerate("甲乙丙丁戊己庚辛壬癸")]
    questions = [question(f"rows.jsonl:{number}", "你是谁？", text) for number, text in enumerate(references)]
    base = answered(["I am a large language model. " * 20] * 10, "length", 100)
    tuned = answered(references)
    found = by_name(measure_answers(questions, base, tuned))
    assert list(found) == ["stop_rate", "tokens", "repetition", "language", "exact_match", "chrf", "bleu", "rouge_l"]
    assert {name: measure.verdict for name, measure in found.items()} == {
        **dict.fromkeys(found, "better"),
        "tokens": "no_difference",
    }
    assert all(measure.count == 10 for measure in found.values())
    for name in ("stop_rate", "language", "exact_match"):
        assert (found[name].base, found[name].tuned) == (0, 1)
    for name in ("chrf", "bleu", "rouge_l"):
        assert found[name].tuned == 100
        assert found[name].difference.value == pytest.approx(100 - found[name].base)
    assert (found["tokens"].base, found["tokens"].tuned) == (100, 5)
    assert found["repetition"].base > 0.9
    assert {one.verdict for one in measure_answers(questions, tuned, base)} == {"worse", "no_difference"}
    assert {one.verdict for one in measure_answers(questions[:5], base, tuned)} == {"too_few", "no_difference"}


def test_figures_are_means_over_single_answers() -> None:
    questions = [question("b", "Where?", "in the old town"), question("a", "Who?", "a man of letters")]
    base = [GivenAnswer("a", "a man"), GivenAnswer("b", "in the new town")]
    tuned = [GivenAnswer("b", "in the old town hall"), GivenAnswer("a", "someone")]
    found = by_name(measure_answers(questions, base, tuned))
    for name, metric in {"chrf": chrf, "bleu": bleu, "rouge_l": rouge_l}.items():
        before = [metric("in the new town", "in the old town"), metric("a man", "a man of letters")]
        after = [metric("in the old town hall", "in the old town"), metric("someone", "a man of letters")]
        assert found[name].base == pytest.approx(sum(before) / 2)
        assert found[name].tuned == pytest.approx(sum(after) / 2)
    assert set(found) == {"repetition", "language", "exact_match", "chrf", "bleu", "rouge_l"}  # nothing else is known


def test_only_questions_that_both_answered_count() -> None:
    questions = [question(f"rows.jsonl:{number}", "Who?", "me") for number in range(4)]
    base = answered(["me", "you", "me"])
    tuned = [*answered(["me"]), GivenAnswer("rows.jsonl:1", "", error="timed out"), *answered(["you"] * 4)[2:]]
    found = by_name(measure_answers(questions, base, tuned))
    assert found["exact_match"].count == 2
    assert (found["exact_match"].base, found["exact_match"].tuned) == (1, 0.5)
    assert measure_answers(questions, base, []) == ()
    assert measure_answers([], base, tuned) == ()


def test_what_a_side_does_not_say_is_left_out() -> None:
    questions = [question(f"rows.jsonl:{number}", "Who?") for number in range(3)]
    base = [GivenAnswer(one.key, "me", 5, "stop") for one in questions]
    tuned = [
        GivenAnswer("rows.jsonl:0", "me", 0, "stop"),
        GivenAnswer("rows.jsonl:1", "me", 7, None),
        GivenAnswer("rows.jsonl:2", "me", 9, "tool_calls"),
    ]
    found = by_name(measure_answers(questions, base, tuned))
    assert (found["stop_rate"].count, found["stop_rate"].tuned) == (2, 1)
    assert (found["tokens"].count, found["tokens"].tuned) == (2, 8)
    assert "bleu" not in found


@pytest.mark.parametrize(
    ("asked", "reference", "language", "answer", "expected"),
    [
        ("Who are you?", None, "", "I am Firefly.", 1),
        ("Who are you?", None, "", "我是萤火虫。", 0),
        ("你是谁？", None, "", "我是 Firefly，一个 AI 助手。", 1),
        ("Translate into Chinese: good morning", "早上好", "", "早上好", 1),
        ("Translate into Chinese: good morning", "早上好", "latin", "Good morning", 0),
        ("6 乘 7 等于多少？", "42", "", "等于四十二", 1),
        ("6 * 7 = ?", None, "", "forty-two", None),
        ("6 * 7 = ?", None, "zh", "四十二", 1),
        ("How many?", None, "", "42", None),
        ("日本の首都はどこですか？", None, "", "東京", 1),
        ("日本の首都はどこですか？", None, "", "日本的首都是东京，它位于本州岛的关东平原。", 0),
    ],
)
def test_an_answer_is_expected_in_the_script_of_its_reference_or_question(
    asked: str, reference: str | None, language: str, answer: str, expected: int | None
) -> None:
    given = [GivenAnswer("a", answer)]
    found = by_name(measure_answers([question("a", asked, reference, language)], given, given))
    assert (found["language"].tuned if "language" in found else None) == expected


def test_a_text_that_goes_on_has_its_language_from_itself() -> None:
    given = [GivenAnswer("a", "and all was well")]
    found = by_name(measure_answers([Question("a", "held_out", text="Once upon a time")], given, given))
    assert found["language"].tuned == 1


def test_without_sacrebleu_its_scores_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "has_text_metrics", lambda: False)
    given = [GivenAnswer("a", "me")]
    found = by_name(measure_answers([question("a", "Who?", "me")], given, given))
    assert set(found) == {"repetition", "language", "exact_match", "rouge_l"}
    assert set(by_name(measure_answers([question("a", "Who?", " ")], given, given))) == {"repetition", "language"}


def test_shuffled_models_do_not_differ() -> None:
    drawn = random.Random(3)
    towns = ["Paris", "Rome", "Oslo", "Lima", "Bern", "Riga"]
    rows = range(60)
    questions = [question(f"rows.jsonl:{number}", "Where is it?", drawn.choice(towns)) for number in rows]
    verdicts: list[str] = []
    for _ in range(20):
        base, tuned = (
            answered([" ".join(drawn.choices([*towns, "in", "the"], k=3)) for _ in rows], tokens=3) for _ in range(2)
        )
        verdicts.extend(measure.verdict for measure in measure_answers(questions, base, tuned))
    assert verdicts.count("no_difference") > 0.93 * len(verdicts)
    same = measure_answers(questions, base, base)
    assert {measure.verdict for measure in same} == {"no_difference"}
    assert all(measure.difference.low < 0 < measure.difference.high for measure in same)  # 60 answers prove no equality


def test_right_answers_are_compared_question_by_question() -> None:
    found = measure_correct([True] * 10 + [False] * 10, [True] * 20)
    assert (found.name, found.count, found.base, found.tuned, found.verdict) == ("correct", 20, 0.5, 1, "better")
    assert 0 < found.difference.low < 0.5 < found.difference.high < 1
    assert measure_correct([True] * 20, [True] * 16 + [False] * 4).verdict == "no_difference"
    assert measure_correct([True] * 20, [False] * 10 + [True] * 10).verdict == "worse"
    assert measure_correct([True] * 4, [False] * 4).verdict == "too_few"
    with pytest.raises(ValueError, match="row"):
        measure_correct([], [])


def test_answers_that_loop_to_their_limit_are_measured_in_seconds() -> None:
    questions = [question(f"rows.jsonl:{number}", "你是谁？", "我是萤火虫。" * 2000) for number in range(4)]
    base = answered(["我是一个语言模型，" * 3333] * 4)
    tuned = answered(["the cat sat on " * 2000] * 4)
    started = time.perf_counter()
    found = measure_answers(questions, base, tuned)
    assert time.perf_counter() - started < 8
    assert all(math.isfinite(measure.difference.value) for measure in found)


def test_an_interval_ends_where_the_figure_does() -> None:
    asked = [question(f"q{n}", "?", reference="one two three four five six") for n in range(4)]
    base = [GivenAnswer(each.key, "one two three four five six", 6, "stop") for each in asked]
    told = zip(asked, ("one", "", "six", "one two"), strict=True)
    tuned = [GivenAnswer(each.key, text, 2, "stop") for each, text in told]
    for measure in measure_answers(asked, base, tuned):
        if measure.name != "tokens":
            most = 100 if measure.name in ("chrf", "bleu", "rouge_l") else 1
            assert -most <= measure.difference.low <= measure.difference.high <= most
