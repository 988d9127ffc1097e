"""The text of an answer as its tokens come is the text of the whole, and a stop text ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from firefly.generation.text import BROKEN, TextStream

TEXTS = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters=BROKEN), max_size=40)
MIXED = TEXTS | st.sampled_from(
    ["a 🙂 b", "中文，“引号”", "👩‍👩‍👧‍👦!", "  two  spaces\n\n", "é" * 5, "don't , I 'm . "]
)


def pieces(tokenizer: Any, ids: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    stream = TextStream(tokenizer, stop)
    found = []
    for token in ids:
        found.append(stream.add(token))
        if stream.stopped:
            break
    return [*found, stream.finish()]


@pytest.fixture(params=["qwen_tokenizer", "sentencepiece_tokenizer", "chatml_tokenizer"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


QUICK = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(text=MIXED)
@QUICK
def test_the_pieces_are_the_whole_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert "".join(pieces(tokenizer, ids)) == whole


@given(text=MIXED, cut=st.integers(0, 30), length=st.integers(1, 4))
@QUICK
def test_a_stop_text_ends_the_answer_before_it(tokenizer: Any, text: str, cut: int, length: int) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    stop = whole[cut : cut + length]
    if not stop:
        return
    found = pieces(tokenizer, ids, (stop, "never there"))
    assert "".join(found) == whole[: whole.find(stop)]


def test_no_piece_holds_half_a_character(qwen_tokenizer: Any) -> None:
    ids = qwen_tokenizer.encode("🙂🙂 中文 👩‍👩‍👧‍👦 ۞", add_special_tokens=False)
    assert len(ids) > 8
    assert not any(BROKEN in piece for piece in pieces(qwen_tokenizer, ids))


def test_bytes_that_never_become_a_character_are_shown_at_last(qwen_tokenizer: Any) -> None:
    ids = qwen_tokenizer.encode("🙂", add_special_tokens=False)[:1]
    assert "".join(pieces(qwen_tokenizer, ids)) == qwen_tokenizer.decode(ids)
    many = ids * 20
    assert any(BROKEN in piece for piece in pieces(qwen_tokenizer, many)[:12])


def test_special_tokens_are_spelled(qwen_tokenizer: Any) -> None:
    special = qwen_tokenizer.all_special_tokens[0]
    ids = [*qwen_tokenizer.encode("a", add_special_tokens=False), qwen_tokenizer.convert_tokens_to_ids(special)]
    assert "".join(pieces(qwen_tokenizer, ids)) == f"a{special}"
