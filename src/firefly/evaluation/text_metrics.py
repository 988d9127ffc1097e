"""How near an answer is to its reference: the same, by characters, by n-grams, by their longest common subsequence.

Libraries' defaults know English: rouge-score drops all that is not a-z or 0-9, sacreBLEU's tokenizer takes a Chinese
sentence for one word, and so both give 0.0 to equal Chinese texts. Here scripts that are written without spaces
(Chinese, Japanese, Thai, …) count by characters, and words of other scripts within them stay whole. Equal texts have
100 points in every metric, whatever they hold.

Scores are of single answers. Their mean over answers, which a report shows, is not the BLEU or chrF of a corpus, which
adds counts before it divides and so weighs long answers more; only a mean has rows to take an interval over.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

MEASURED_CHARACTERS = 10_000
"""Of each text, the characters that metrics look at: an answer that loops to its limit costs no more than that."""

UNSPACED = re.compile(
    "["
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Burmese
    "\u1780-\u17ff"  # Khmer
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f\U0001b000-\U0001b16f"  # Japanese kana
    "\u3105-\u312f\u31a0-\u31bf"  # Bopomofo
    "]"
)
"""A character of a script that is written without spaces between words."""

# What may stand around an answer without being part of it. A leading point, a sign, # and % are: .5, -5, C#, 50%.
_BEFORE = " ¿¡"
_AFTER = " .,;:!?~·。、।॥؟،؛۔։។။"
_AROUND = {"(": ")", "「": "」", "『": "』", "《": "》", "〈": "〉", "【": "】", "«": "»"}
_AROUND |= {mark: mark for mark in "\"'*`"}
_ALIKE = str.maketrans(
    {"‘": "'", "’": "'", "‚": "'", "“": '"', "”": '"', "„": '"', **dict.fromkeys("\u00ad\u200b\u2060\ufeff")}
)
"""Quotes as they are typed, and nothing for characters that nobody sees."""


def has_text_metrics() -> bool:
    """Whether sacreBLEU is there, which `chrf` and `bleu` need; callers leave these out without it, with a note."""
    return find_spec("sacrebleu") is not None


def exact_match(answer: str, reference: str) -> bool:
    """Whether both say the same, but for how it is written.

    What does not count: case; width and other forms that Unicode holds compatible (NFKC: `Ａ`, `ﬁ`, `①`); how much
    whitespace there is, and any beside a character of a script without spaces; curly quotes; the punctuation that ends
    a sentence, of other scripts too (`。`, `؟`); quotes, Markdown's `*` and backquotes, and brackets, where they
    enclose all of it. Any other punctuation counts, and in a text of punctuation only all does.
    """
    return _plain(answer) == _plain(reference)


def chrf(answer: str, reference: str) -> float:
    """chrF2 of 100: F2 of character n-grams up to 6, without whitespace; sacreBLEU's `sentence_chrf`, in any script.

    Raises:
        ModuleNotFoundError: sacreBLEU is missing.
    """
    answer, reference = _measured(answer), _measured(reference)
    if answer == reference:
        return 100.0
    return min(100.0, _chrf().sentence_score(answer, [reference]).score)


def bleu(answer: str, reference: str) -> float:
    """BLEU-4 of 100 of one answer; sacreBLEU's `sentence_bleu`.

    Its defaults hold: exponential smoothing, and of a text of fewer than four tokens only the orders that it has. Its
    tokenizer is `13a`; where one of both texts holds a character of a script without spaces it is `zh`, which
    separates Chinese characters, with those of other such scripts separated likewise.

    Raises:
        ModuleNotFoundError: sacreBLEU is missing.
    """
    answer, reference = _measured(answer), _measured(reference)
    if answer == reference:
        return 100.0
    tokenizer = "13a"
    if UNSPACED.search(answer) or UNSPACED.search(reference):
        tokenizer = "zh"
        answer, reference = (UNSPACED.sub(r" \g<0> ", text) for text in (answer, reference))
    return min(100.0, _bleu(tokenizer).sentence_score(answer, [reference]).score)


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L of 100: F1 of the longest common subsequence of both texts' words, without stemming.

    Of English text it is rouge-score's `rougeL`; of others its words are those of `words`. Where neither text has any
    (emoji, punctuation) it is of their characters. Our own computation: rouge-score fills a table of answer times
    reference in Python, which takes 40 seconds and a GB for two Chinese texts of 10,000 characters.
    """
    answer, reference = _measured(answer), _measured(reference)
    if answer == reference:
        return 100.0
    given, expected = words(answer), words(reference)
    if not given and not expected:
        given, expected = list("".join(answer.split())), list("".join(reference.split()))
    if not given or not expected:
        return 0.0

    # Bits of `unmatched` are the places of `expected`; a column of the table at a time, in one addition (H. Hyyrö,
    # "Bit-parallel LCS-length computation revisited", 2004).
    places: dict[str, int] = {}
    for place, word in enumerate(expected):
        places[word] = places.get(word, 0) | 1 << place
    everything = (1 << len(expected)) - 1
    unmatched = everything
    for word in given:
        matched = unmatched & places.get(word, 0)
        unmatched = ((unmatched + matched) | (unmatched - matched)) & everything
    common = len(expected) - unmatched.bit_count()
    return 100.0 * 2 * common / (len(given) + len(expected))


def words(text: str, symbols: bool = False) -> list[str]:
    """Words in lower case; each character of a script without spaces is one.

    Of ASCII text they are rouge-score's. Accents and vowel signs stay with the letter that they stand on.

    Args:
        symbols: whether each character of punctuation and each symbol is a word, too; else they only part words.
    """
    found: list[str] = []
    open_word = marked = False  # whether a letter joins the last word, and whether a mark does
    for character in unicodedata.normalize("NFC", text).lower():
        category = unicodedata.category(character)
        if category[0] in "LN":
            alone = UNSPACED.match(character) is not None
            if open_word and not alone:
                found[-1] += character
            else:
                found.append(character)
            open_word, marked = not alone, True
        elif category[0] == "M":
            if marked:
                found[-1] += character
        elif category != "Cf":  # joiners and direction marks stand within words
            open_word = marked = False
            if symbols and not character.isspace():
                found.append(character)
    return found


def _plain(text: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text.translate(_ALIKE)).casefold())
    whole = " ".join(folded.split())
    whole = re.sub(rf"(?<={UNSPACED.pattern}) | (?={UNSPACED.pattern})", "", whole)
    bare, before = whole, None
    while bare != before:
        before = bare
        bare = bare.lstrip(_BEFORE).rstrip(_AFTER)
        if len(bare) > 1 and _AROUND.get(bare[0]) == bare[-1]:
            bare = bare[1:-1]
    return bare or whole


def _measured(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip()[:MEASURED_CHARACTERS])


@cache
def _chrf() -> CHRF:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


@cache
def _bleu(tokenizer: str) -> BLEU:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize=tokenizer, effective_order=True)
