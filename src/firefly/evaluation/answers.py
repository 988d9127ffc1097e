"""Figures of answers: whether they end, how long they are, whether they loop, their script, how near the reference."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from firefly.evaluation.intervals import decide, mean_change
from firefly.evaluation.measurement import GivenAnswer, Question
from firefly.evaluation.report import Measure, MeasureName
from firefly.evaluation.text_metrics import UNSPACED, bleu, chrf, exact_match, has_text_metrics, rouge_l, words

_NO_LANGUAGE = re.compile(r"```.*?(?:```|\Z)|https?://[!-~]+|\\[A-Za-z]+", re.DOTALL)
"""Code between fences, addresses and LaTeX's commands: Latin letters in a text of any language."""
_SCRIPTS = {"cjk": "zh", "ideographic": "zh", "hiragana": "ja", "katakana": "ja", "katakana-hiragana": "ja"} | {
    "hangul": "ko",
    "thai": "th",
}
"""Names of letters in Unicode begin with their script; these scripts stand for a language."""
JAPANESE_KANA = 0.1
"""The share of kana among Han and kana from which on a text is Japanese: a の in a Chinese name makes it none."""
AMBIGUOUS_HAN = 10
"""Words up to which a text of Han alone may as well be Japanese."""

_LAYOUT = frozenset("-–—=_|:*#`.·~+")
"""Of Markdown's tables, rules, lists, headings and code, and of dotted lines."""
LEAST_WORDS = 16
"""Words under which nothing counts as repeated."""
LONGEST_WORD = 32
"""Letters of a word over which it is taken letter by letter: `hahaha…` is a loop, too."""


def language_of(text: str) -> str:
    """The script that most of a text is in; for those of one language, that language.

    "zh" (Han without kana), "ja", "ko", "th"; else the script's name in Unicode: "latin", "cyrillic", "arabic",
    "devanagari", "greek", … So no Latin text is English: letters do not say it. "" where nothing tells: digits,
    symbols, single Latin letters (`B`, `x = 5`), code between fences. Words count, not letters, and characters of
    scripts without spaces, so that a Chinese answer full of English terms is Chinese.
    """
    counts: Counter[str] = Counter()
    for word in words(unicodedata.normalize("NFKC", _NO_LANGUAGE.sub(" ", text))):
        letter = next((letter for letter in word if letter.isalpha()), "")
        script = unicodedata.name(letter, "").partition(" ")[0].lower() if letter else ""
        if script and (len(word) > 1 or script not in ("latin", "greek", "cyrillic")):
            counts[_SCRIPTS.get(script, script)] += 1
    if counts["ja"] and counts["ja"] >= JAPANESE_KANA * (counts["ja"] + counts["zh"]):
        counts["ja"] += counts.pop("zh", 0)
    return max(counts, key=lambda name: counts[name]) if any(counts.values()) else ""


def repetition(text: str) -> float:
    """The share of a text's n-grams that occurred in it before: 0 of normal prose, near 1 of a loop.

    It is `seq-rep-4` of S. Welleck et al. (arXiv:1908.04319), 1 - distinct n-grams / n-grams, over words and symbols;
    over eight characters in scripts without spaces, where four are hardly two words. Texts of fewer than 16 words have
    0. What only lays a text out does not count, and a text of symbols only counts by these.
    """
    whole = words(text, symbols=True)
    tokens = [token for token in whole if token not in _LAYOUT] or whole
    parts: list[str] = []
    for token in tokens:
        parts.extend(token if len(token) > LONGEST_WORD else [token])
    if len(parts) < LEAST_WORDS:
        return 0.0
    single = sum(1 for part in parts if UNSPACED.match(part))
    length = 8 if 2 * single > len(parts) else 4
    grams = list(zip(*(parts[start:] for start in range(length)), strict=False))
    return 1 - len(set(grams)) / len(grams)


POINTS = ("chrf", "bleu", "rouge_l")
"""Figures of 0 to 100; others are shares of 1."""


def measure_answers(
    questions: Sequence[Question], base: Sequence[GivenAnswer], tuned: Sequence[GivenAnswer]
) -> tuple[Measure, ...]:
    """Figures of both models' answers to the questions that both answered; those that nothing tells are left out.

    - stop_rate: answers that the model ended itself, where both say how they ended.
    - tokens: their mean, where both were counted. Neither more nor fewer is better.
    - repetition: see `repetition`.
    - language: answers in the script that is expected: of the reference, or, where that tells none, of the question.
      Questions of which an answer tells none (a number, code) are left out.
    - exact_match, rouge_l, and chrf and bleu where sacreBLEU is there: over questions with a reference; means of the
      scores of single answers.
    """
    of_base = {answer.key: answer for answer in base if answer.error is None}
    of_tuned = {answer.key: answer for answer in tuned if answer.error is None}
    answered = [
        (question, of_base[question.key], of_tuned[question.key])
        for question in questions
        if question.key in of_base and question.key in of_tuned
    ]
    measures: list[Measure] = []

    def add(name: MeasureName, values: Sequence[tuple[float, float]], lower_is_better: bool = False) -> None:
        if values:
            measures.append(_measure(name, [one for one, _ in values], [other for _, other in values], lower_is_better))

    # A call of a function ends an answer as well, in the words of an endpoint.
    ended = [(one.finish_reason, other.finish_reason) for _, one, other in answered]
    add("stop_rate", [(float(one != "length"), float(other != "length")) for one, other in ended if one and other])
    add("tokens", [(one.tokens, other.tokens) for _, one, other in answered if one.tokens and other.tokens])
    add("repetition", [(repetition(one.text), repetition(other.text)) for _, one, other in answered], True)
    add("language", _languages(answered))
    metrics: dict[MeasureName, Callable[[str, str], float]] = {"exact_match": exact_match}
    if has_text_metrics():
        metrics |= {"chrf": chrf, "bleu": bleu}
    metrics["rouge_l"] = rouge_l
    for name, metric in metrics.items():
        scored = [
            (float(metric(one.text, question.reference)), float(metric(other.text, question.reference)))
            for question, one, other in answered
            if question.reference and question.reference.strip()
        ]
        add(name, scored)
    return tuple(measures)


def measure_correct(base: Sequence[bool], tuned: Sequence[bool]) -> Measure:
    """The shares of right answers, question by question.

    Raises:
        ValueError: there are no questions, or their numbers differ.
    """
    return _measure("correct", [float(right) for right in base], [float(right) for right in tuned], False)


def _measure(name: MeasureName, base: Sequence[float], tuned: Sequence[float], lower_is_better: bool) -> Measure:
    change = mean_change(base, tuned)
    if name != "tokens":  # the rest have a largest figure, beyond which an interval of few answers says nothing
        most = 100.0 if name in POINTS else 1.0
        change = replace(change, low=max(change.low, -most), high=min(change.high, most))
    return Measure(
        name=name,
        count=len(base),
        base=sum(base) / len(base),
        tuned=sum(tuned) / len(tuned),
        difference=change,
        verdict="no_difference" if name == "tokens" else decide(change, len(base), lower_is_better),
    )


def _languages(answered: Sequence[tuple[Question, GivenAnswer, GivenAnswer]]) -> list[tuple[float, float]]:
    found = []
    for question, *answers in answered:
        expected = language_of(question.reference or "") or question.language or language_of(question.shown)
        seen = [language_of(answer.text) for answer in answers]
        if expected == "ja":  # a name or a term in Han alone
            short = [len(words(answer.text)) <= AMBIGUOUS_HAN for answer in answers]
            seen = ["ja" if name == "zh" and few else name for name, few in zip(seen, short, strict=True)]
        if expected and all(seen):
            found.append((float(seen[0] == expected), float(seen[1] == expected)))
    return found
