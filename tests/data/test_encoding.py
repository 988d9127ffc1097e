"""Ids equal the official ones, labels lie on replies, and what a person typed stays text."""

from __future__ import annotations

import copy
import unicodedata
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firefly.data.encoding import ALIAS, BREAK, Encoder
from firefly.data.rendering import CLOSE, OPEN
from firefly.data.schema import IGNORE, Conversation, Message, Rendered, TextPart, Tokens
from firefly.data.templates import TemplateFailure, bind_template
from firefly.errors import UsageError

CHATML = ["qwen", "qwen1.5", "qwen2.5", "smollm2"]
NAMES = ["default", *CHATML]
SPECIALS = ("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<s>", "</s>", "<unk>")
CONTENTS = (
    "Hello, who are you?",
    "你好，请介绍一下你自己。",
    "🎉 é e\u0301 नमस्ते ﷺ 𝒳",
    "  two  spaces \n\n and\ttabs\r\n",
    "",
    "\n",
    "{x} {{y}} %s {% endfor %}",
    "def f():\n    return '</div>' < 1 | 2",
)


def turns(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    messages = [] if system is None else [Message.of("system", system)]
    for number, content in enumerate(contents):
        messages.append(Message.of("assistant" if number % 2 else "user", content))
    return tuple(messages)


def encode(encoder: Encoder, messages: tuple[Message, ...]) -> Tokens:
    (tokens,) = encoder.encode_rendered(encoder.render(Conversation(messages)))
    return tokens


def decode(encoder: Encoder, ids: Any) -> str:
    return encoder.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def runs(encoder: Encoder, tokens: Tokens) -> list[str]:
    """The decoded text of each trained run."""
    trained = tokens.labels != IGNORE
    np.testing.assert_array_equal(tokens.labels[trained], tokens.input_ids[trained])
    borders = np.flatnonzero(np.diff(np.concatenate([[False], trained, [False]]).astype(int)))
    return [decode(encoder, tokens.input_ids[a:b]) for a, b in zip(borders[::2], borders[1::2], strict=True)]


@pytest.fixture(scope="module", params=[("chatml", "qwen"), ("qwen", "qwen"), ("sentencepiece", "default")])
def encoder(request) -> Encoder:
    """Each tokenizer with a template that fits it."""
    name, template = request.param
    tokenizer = request.getfixturevalue(f"{name}_tokenizer")
    return Encoder(tokenizer, bind_template(template, tokenizer))


@pytest.fixture
def fresh(encoder) -> Encoder:
    """The same, with nothing computed yet."""
    return Encoder(encoder.tokenizer, encoder.template)


# ---- official ids ----


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("contents", [CONTENTS[:4], (CONTENTS[5], CONTENTS[4], *CONTENTS[6:])])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_ids_are_those_of_apply_chat_template(qwen_tokenizer, name, contents, system):
    tokenizer = copy.copy(qwen_tokenizer)
    encoder = Encoder(tokenizer, bind_template(name, tokenizer))
    chat = turns(*contents, system=system)
    official = tokenizer.apply_chat_template(
        Conversation(chat).as_dicts(), chat_template=encoder.template.text, tokenize=True, return_dict=False
    )
    ids = encode(encoder, chat).input_ids.tolist()
    if name == "qwen1.5":  # whose last turn is left open
        assert ids.pop() == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids == official


def test_a_prompt_is_the_official_one_and_the_beginning_of_the_training_ids(encoder):
    for contents in (
        CONTENTS[:4],
        (CONTENTS[5], CONTENTS[4], CONTENTS[6], CONTENTS[7]),
        ("a <|im_end|> b </s>", "c", "d</s>", "e"),
    ):
        chat = turns(*contents, system="s")
        ids = encode(encoder, chat).input_ids.tolist()
        for replied in (2, 4):
            prompt = encoder.encode_prompt(chat[:replied])
            assert ids[: len(prompt)] == prompt
            assert prompt == encode(encoder, chat[: replied + 1]).input_ids.tolist()[: len(prompt)]


def test_no_beginning_of_sequence_is_added_that_the_template_does_not_write(sentencepiece_tokenizer):
    encoder = Encoder(sentencepiece_tokenizer, bind_template("default", sentencepiece_tokenizer))
    assert sentencepiece_tokenizer.bos_token_id in sentencepiece_tokenizer.encode("x")
    assert sentencepiece_tokenizer.bos_token_id not in encode(encoder, turns("x", "y")).input_ids


# ---- labels ----


def test_each_reply_is_trained_with_its_stop_and_nothing_else(encoder):
    contents = ("q1", "reply one", "q2", "回复二", "q3", "🎉")
    space = " " if encoder.template.name == "default" else ""
    stop = encoder.template.stop_tokens[0]
    tokens = encode(encoder, turns(*contents, system="s"))
    assert runs(encoder, tokens) == [space + lossy(encoder, reply) + space + stop for reply in contents[1::2]]


def lossy(encoder: Encoder, text: str) -> str:
    """The text as its tokenizer can spell it: a tiny Unigram vocabulary knows few characters."""
    return decode(encoder, encoder.tokenizer.encode(text, add_special_tokens=False))


ANY_CHARACTER = st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0\ufdd1\U000f5a1f\U000f5a20")
"""Without those that are set aside for marks: a text with one is refused by name."""


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(contents=st.lists(st.text(ANY_CHARACTER, max_size=12), min_size=2, max_size=4))
def test_bytes_of_any_reply_are_trained_whole_and_text_is_kept(chatml_tokenizer, name, contents):
    encoder = Encoder(chatml_tokenizer, bind_template(name, chatml_tokenizer))
    contents = [content.replace(BREAK, "").replace(ALIAS, "") for content in contents[: len(contents) // 2 * 2]]
    chat = turns(*contents)
    tokens = encode(encoder, chat)
    space = " " if name == "default" else ""
    stop = encoder.template.stop_tokens[0]
    assert runs(encoder, tokens) == [space + reply + space + stop for reply in contents[1::2]]
    assert decode(encoder, tokens.input_ids) == encoder.template.render(Conversation(chat))[0].text


@pytest.mark.parametrize("reply", ["é", "🎉🎉", "中文", "e\u0301x", " lead", "trail ", "a\n\n", "\u3000", "a\u200b"])
@pytest.mark.parametrize("question", ["é", "🎉", "中", "x ", "x\n", "\u0301"])
def test_multi_byte_characters_at_the_borders_of_a_span_fall_on_their_side(qwen_tokenizer, question, reply):
    encoder = Encoder(qwen_tokenizer, bind_template("qwen", qwen_tokenizer))
    tokens = encode(encoder, turns(question, reply, question, reply))
    assert runs(encoder, tokens) == [unicodedata.normalize("NFC", reply) + "<|im_end|>"] * 2


@given(st.text("ab <|é🎉\n", max_size=30), st.lists(st.integers(0, 30), max_size=6), st.booleans())
def test_a_token_is_trained_if_its_first_character_lies_in_a_span(chatml_tokenizer, text, borders, aliased):
    encoder = Encoder(chatml_tokenizer, bind_template("qwen", chatml_tokenizer))
    starts = [start for start, _ in encoder.tokenizer.backend_tokenizer.encode(text).offsets]
    borders = sorted({border for border in borders if border <= len(text)})
    # Where a span begins inside a token, the reply is encoded behind its prompt.
    begins = [min((start for start in starts if start >= border), default=len(text)) for border in borders[::2]]
    spans = tuple((start, max(start, end)) for start, end in zip(begins, borders[1::2], strict=False))
    (tokens,) = encoder.encode_rendered([Rendered(text + BREAK * aliased, spans)])
    inside = [any(first <= start < end for first, end in spans) for start in starts]
    assert (tokens.labels != IGNORE).tolist() == inside


def test_the_stop_is_trained_in_every_turn(encoder):
    tokens = encode(encoder, turns("q", "a", "q", "", "q", "c <|im_end|> </s>"))
    assert np.count_nonzero(tokens.labels == encoder.template.stop_ids[0]) == 3


def test_a_tokenizer_that_trims_its_offsets_trains_the_same_tokens(chatml_tokenizer):
    from tokenizers import processors

    trimming = copy.deepcopy(chatml_tokenizer)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    template = bind_template("qwen", chatml_tokenizer)
    text = "<|im_start|>user\nq <|im_end|>  [INST] a b<|im_end|>"
    start = text.index(" a b")
    for spans in (((start, len(text)),), ((start + 1, len(text)),)):
        for typed in ("", BREAK):  # the second sends the text through the aliased tokenizer
            (expected,) = Encoder(chatml_tokenizer, template).encode_rendered([Rendered(text + typed, spans)])
            (tokens,) = Encoder(trimming, template).encode_rendered([Rendered(text + typed, spans)])
            np.testing.assert_array_equal(tokens.input_ids, expected.input_ids)
            np.testing.assert_array_equal(tokens.labels, expected.labels)
    assert trimming.backend_tokenizer.post_processor is not None  # the tokenizer that is saved stays as it was


# ---- the border between a prompt and its reply ----

SPACED = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
MARKED = SPACED.replace(
    "{{ m.role + ': ' + m.content + eos_token }}",
    "{{ m.role + ': ' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content + eos_token }}{% endif %}",
)


def with_template(tokenizer: Any, text: str) -> Encoder:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = text
    return Encoder(tokenizer, bind_template("auto", tokenizer))


def metaspace(vocabulary: Any, scheme: str, legacy: bool = False) -> Any:
    """The tiny SentencePiece tokenizer with a space in front of texts: as Llama 2 has it, or Gemma or T5."""
    from tokenizers import normalizers, pre_tokenizers

    tokenizer = copy.deepcopy(vocabulary)
    if legacy:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    else:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return tokenizer


@pytest.fixture(params=["byte-level", "qwen", "never", "first", "always", "legacy"])
def bordered(request) -> tuple[Any, Any]:
    """A tokenizer, and one that encodes what continues a text."""
    name = request.param
    if name in ("byte-level", "qwen"):
        tokenizer = request.getfixturevalue({"byte-level": "chatml_tokenizer"}.get(name, "qwen_tokenizer"))
        return tokenizer, tokenizer
    vocabulary = request.getfixturevalue("sentencepiece_tokenizer")
    return metaspace(vocabulary, name, legacy=name == "legacy"), metaspace(vocabulary, "never")


def as_served(encoder: Encoder, continuing: Any, chat: tuple[Message, ...], reply: int) -> tuple[list[int], list[int]]:
    """A prompt's ids, and those of the reply that a model would write behind it."""
    written = continuing.encode(chat[reply].text, add_special_tokens=False)
    return encoder.encode_prompt(chat[:reply]), [*written, encoder.template.stop_ids[0]]


@pytest.mark.parametrize("template", [SPACED, MARKED])
@pytest.mark.parametrize("typed", ["what is it?", "typed </s> <|im_end|>"])
def test_a_reply_that_one_tokenization_would_join_to_its_prompt_stands_behind_it_as_served(bordered, template, typed):
    tokenizer, continuing = bordered
    encoder = with_template(tokenizer, template)
    for reply, is_joined in (("help", True), (" assistant", False), ("\nhelp", False), ("", False)):
        chat = turns(typed, reply)
        rendered = encoder.render(Conversation(chat))
        (text,) = encoder.label(rendered, encoder.tokenize(rendered))
        assert text.joined or not is_joined
        (tokens,) = text.examples
        prompt, written = as_served(encoder, continuing, chat, 1)
        assert tokens.input_ids.tolist() == prompt + written
        assert tokens.labels.tolist() == [IGNORE] * len(prompt) + written


def test_official_ids_stay_where_nothing_is_joined(bordered):
    tokenizer, _ = bordered
    encoder = with_template(tokenizer, SPACED.replace("': '", "':'").replace("'assistant: '", "'assistant:'"))
    for reply in ("language model", "help", "answer"):
        (rendered,) = encoder.render(Conversation(turns("q", reply, "one two", reply)))
        ids = encoder.encode_rendered([rendered])[0].input_ids.tolist()
        assert ids == tokenizer.encode(rendered.text, add_special_tokens=False)
        assert encoder.label([rendered], encoder.tokenize([rendered]))[0].joined == 0


def test_only_the_last_reply_joined_is_one_example_and_an_earlier_one_makes_one_for_each(qwen_tokenizer):
    encoder = Encoder(qwen_tokenizer, bind_template("qwen", qwen_tokenizer))
    chat = turns("q", "a", "q", "\n\nb")
    (tokens,) = encoder.encode_rendered(encoder.render(Conversation(chat)))
    prompt, written = as_served(encoder, qwen_tokenizer, chat, 3)
    assert tokens.input_ids.tolist() == [*prompt, *written, *qwen_tokenizer.encode("\n")]
    assert runs(encoder, tokens) == ["a<|im_end|>", "\n\nb<|im_end|>"]

    chat = turns("q", "\na", "q", "b", "q", " \nc", "thanks")
    examples = encoder.encode_rendered(encoder.render(Conversation(chat)))
    assert [runs(encoder, tokens) for tokens in examples] == [["\na<|im_end|>"], ["b<|im_end|>"], [" \nc<|im_end|>"]]
    for tokens, reply in zip(examples, (1, 3, 5), strict=True):
        prompt, written = as_served(encoder, qwen_tokenizer, chat, reply)
        assert tokens.input_ids.tolist() == prompt + written

    untrained = (chat[0], replace(chat[1], trained=False), *chat[2:])
    (tokens,) = encoder.encode_rendered(encoder.render(Conversation(untrained)))
    assert runs(encoder, tokens) == ["b<|im_end|>", " \nc<|im_end|>"]


def test_a_character_that_a_normalizer_would_join_to_the_prompt_is_the_replys(qwen_tokenizer):
    encoder = with_template(qwen_tokenizer, SPACED.replace("': '", "': e'").replace("'assistant: '", "'assistant: e'"))
    chat = turns("q", "\u0301x")
    prompt, written = as_served(encoder, qwen_tokenizer, chat, 1)
    assert encode(encoder, chat).input_ids.tolist() == prompt + written


def test_white_space_that_a_role_token_would_swallow_is_the_replys(chatml_tokenizer):
    """Phi-3's role tokens take the white space behind them, as far as it goes."""
    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(chatml_tokenizer)
    roles = [AddedToken(f"<|{name}|>", rstrip=True, special=True) for name in ("user", "assistant", "end")]
    tokenizer.add_special_tokens({"additional_special_tokens": roles})
    encoder = with_template(
        tokenizer,
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    )
    chat = turns("q", "\n a")
    tokens = encode(encoder, chat)
    prompt, written = as_served(encoder, chatml_tokenizer, chat, 1)
    assert tokens.input_ids[: len(prompt) + len(written)].tolist() == prompt + written
    assert runs(encoder, tokens) == ["\n a<|end|>"]


def test_behind_its_first_added_token_a_reply_is_tokenized_as_in_one_text(sentencepiece_tokenizer):
    tokenizer = metaspace(sentencepiece_tokenizer, "always")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[CALL]"]})
    encoder = with_template(
        tokenizer, SPACED.replace("m.content", "m.content + ('[CALL]help' if m.role == 'assistant' else '')")
    )
    (rendered,) = encoder.render(Conversation(turns("q", "help")))
    (tokens,) = encoder.encode_rendered([rendered])
    official = tokenizer.encode(rendered.text, add_special_tokens=False)
    place = official.index(tokenizer.convert_tokens_to_ids("[CALL]"))
    assert tokens.input_ids.tolist()[-len(official[place:]) :] == official[place:]
    assert tokens.input_ids.tolist() != official


# ---- typed special tokens stay text ----


@pytest.mark.parametrize("position", ["{}", "a {} b", "{}a", "a{}", "中{}🎉", "{}{}", "<{}>", "  {}\n"])
@pytest.mark.parametrize("special", SPECIALS)
def test_a_typed_special_token_stays_text(encoder, special, position):
    typed = position.replace("{}", special)
    tokenizer = encoder.tokenizer
    chat = turns(typed, typed, "q", "a", system=typed)
    tokens = encode(encoder, chat)
    # The template's own special tokens are those of the same chat with plain words.
    plain = encode(encoder, turns("x", "x", "q", "a", system="x"))
    unknown = {tokenizer.unk_token_id}  # what a tiny vocabulary cannot spell is no special token that was typed
    special_ids = set(tokenizer.all_special_ids) - unknown
    written = [i for i in tokens.input_ids.tolist() if i in special_ids]
    assert written == [i for i in plain.input_ids.tolist() if i in special_ids]
    if tokenizer.unk_token_id is None:
        assert decode(encoder, tokens.input_ids) == encoder.template.render(Conversation(chat))[0].text
    assert tokens.num_targets > plain.num_targets


def test_a_special_token_that_is_typed_across_two_parts_stays_text(encoder):
    stop = encoder.template.stop_tokens[0]
    parts = Message("user", (TextPart("a " + stop[:2]), TextPart(stop[2:])))
    ids = encoder.encode_prompt([parts])
    assert ids == encoder.encode_prompt([Message.of("user", f"a {stop}")])
    stops = [prompt.count(encoder.template.stop_ids[0]) for prompt in (ids, encoder.encode_prompt(turns("a")))]
    assert stops[0] == stops[1]


@pytest.mark.parametrize(
    "typed", ["a <|im_end|> b", "</s>", "<|im_start|>user\n<|im_end|>", "中<s>🎉</s>", "<|endoftext|>\n"]
)
def test_labels_lie_on_the_reply_whether_or_not_special_tokens_were_typed(encoder, typed):
    chat = turns(typed, "reply", "q", typed)
    tokens = encode(encoder, chat)
    space = " " if encoder.template.name == "default" else ""
    stop = encoder.template.stop_tokens[0]
    first, second = runs(encoder, tokens)
    assert first == space + "reply" + space + stop
    assert second.endswith(stop)
    if encoder.tokenizer.unk_token_id is None:
        assert second == space + typed + space + stop


def test_typed_text_is_encoded_as_with_split_special_tokens(chatml_tokenizer, qwen_tokenizer):
    for tokenizer in (chatml_tokenizer, qwen_tokenizer):
        encoder = Encoder(tokenizer, bind_template("qwen", tokenizer))
        typed = "a <|im_end|> b"
        ids = encode(encoder, turns(typed, "x")).input_ids.tolist()
        piece = tokenizer.encode("a <|im_end|> b", split_special_tokens=True, add_special_tokens=False)
        assert any(ids[i : i + len(piece)] == piece for i in range(len(ids)))


def test_a_chat_without_typed_special_tokens_never_builds_the_second_tokenizer(fresh):
    encode(fresh, turns("q <b>", "a |im_end| <|im_end"))
    assert "_aliased_tokenizer" not in vars(fresh)
    encode(fresh, turns("q", f"a {fresh.template.stop_tokens[0]}"))
    assert "_aliased_tokenizer" in vars(fresh)


def test_both_ways_of_encoding_agree_where_nothing_was_typed(encoder):
    rendered = encoder.render(Conversation(turns(*CONTENTS[:4], system="s")))[0]
    (direct,) = encoder.encode_rendered([rendered])
    # A BREAK that breaks nothing sends the same text the other way.
    broken = Rendered(rendered.text + BREAK, rendered.spans)
    (aliased,) = encoder.encode_rendered([broken])
    np.testing.assert_array_equal(aliased.input_ids, direct.input_ids)
    np.testing.assert_array_equal(aliased.labels, direct.labels)


def test_texts_keep_their_order_whichever_way_they_are_encoded(encoder):
    stop = encoder.template.stop_tokens[0]
    chats = [turns("q", "one"), turns("q", f"two {stop}"), turns("q", "three"), turns("q", f"{stop} four")]
    rendered = [text for chat in chats for text in encoder.render(Conversation(chat))]
    for tokens, chat in zip(encoder.encode_rendered(rendered), chats, strict=True):
        expected = encode(encoder, chat)
        np.testing.assert_array_equal(tokens.input_ids, expected.input_ids)
        np.testing.assert_array_equal(tokens.labels, expected.labels)
    assert encoder.encode_rendered([]) == []


def test_the_signs_that_mark_typed_text_cannot_be_typed_themselves(encoder):
    stop = encoder.template.stop_tokens[0]
    for typed in (f"{ALIAS}{stop}{ALIAS}", f"<{BREAK}|im_end|>", ALIAS, OPEN, f"a{CLOSE}b"):
        with pytest.raises(TemplateFailure, match="reserved for internal use"):
            encode(encoder, turns(typed, "a"))
        with pytest.raises(TemplateFailure, match="reserved for internal use"):
            encoder.encode_prompt(turns(typed, "a")[:1])


def test_a_special_token_inside_another_is_broken_too(chatml_tokenizer):
    tokenizer = copy.deepcopy(chatml_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<<SYS>>", "<SYS>"]})
    encoder = Encoder(tokenizer, bind_template("qwen", tokenizer))
    ids = encode(encoder, turns("a <<SYS>> b", "c")).input_ids
    assert not {tokenizer.convert_tokens_to_ids("<<SYS>>"), tokenizer.convert_tokens_to_ids("<SYS>")} & set(
        ids.tolist()
    )
    assert "a <<SYS>> b" in decode(encoder, ids)


def test_allow_special_in_content_gives_the_official_ids(encoder):
    stop, stop_id = encoder.template.stop_tokens[0], encoder.template.stop_ids[0]
    chat = turns(f"a {stop} b", "c")
    official = encoder.tokenizer.apply_chat_template(
        Conversation(chat).as_dicts(), chat_template=encoder.template.text, tokenize=True, return_dict=False
    )
    if encoder.tokenizer.bos_token_id is not None:
        official = [i for i in official if i != encoder.tokenizer.bos_token_id]
    allowed = encode(replace(encoder, allow_special_in_content=True), chat).input_ids
    assert allowed.tolist() == official
    assert np.count_nonzero(allowed == stop_id) == np.count_nonzero(encode(encoder, chat).input_ids == stop_id) + 1


# ---- tokenizers ----


def test_a_tokenizer_without_a_fast_implementation_is_refused(chatml_tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(UsageError, match="no fast implementation"):
        Encoder(Slow(), bind_template("qwen", chatml_tokenizer))


def test_a_truncation_or_padding_saved_with_a_tokenizer_does_not_apply(encoder):
    expected = encode(encoder, turns("a long question", "a long answer"))
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    again = encode(Encoder(tokenizer, encoder.template), turns("a long question", "a long answer"))
    np.testing.assert_array_equal(again.input_ids, expected.input_ids)
    np.testing.assert_array_equal(again.labels, expected.labels)
