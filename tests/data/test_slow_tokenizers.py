"""Tokenizers that exist in Python only: ids written out by hand, after the models' own chat code."""

from __future__ import annotations

import base64
import copy
import json
import shutil
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import remote_tokenizers
from remote_tokenizers import BaichuanTokenizer, ChatGLM2Tokenizer, ChatGLM3Tokenizer, QWenTokenizer

from firefly.config import ModelConfig
from firefly.data.certificate import certify, probe_hash
from firefly.data.encoding import Encoder
from firefly.data.schema import IGNORE, Conversation, Message, Tokens
from firefly.data.slow_tokenizers import SlowTokenizer, adapt_tokenizer
from firefly.data.templates import bind_template
from firefly.errors import UsageError
from firefly.models.loading import load_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SIGNS = [sign for sign in string.printable if not sign.isspace()]

# ChatGLM: 3 special pieces, 256 bytes, then these. Commands follow the vocabulary.
GLM_WORDS = "▁ ▁hi hi ▁yes yes ▁no no [Round ▁1 ▁2 ] 问： 答： sop".split()
GLM_PIECES = list(dict.fromkeys([*SPECIAL, *BYTES, *GLM_WORDS, *SIGNS]))
LF, SPACE, _HI, HI, _YES, YES, _NO, NO, ROUND, _1, _2, CLOSE, ASK, ANSWER, SOP_TEXT = 13, *range(259, 273)
GMASK, SOP, SYSTEM, USER, ASSISTANT = 367, 369, 371, 372, 373

# QWen: bytes, merges, then special tokens.
QWEN_WORDS = [b"user", b"assistant", b"system", b"hi", b"yes", b"no", b"\n\n"]
QWEN_WORDS += [b"You", b" are", b" a", b" helpful", b" assistant", b"im_end"]
Q_USER, Q_ASSISTANT, Q_SYSTEM, Q_HI, Q_YES, Q_NO, Q_LF2, *Q_YOU_ARE, Q_IM_END = range(256, 269)
Q_END, START, END = 269, 270, 271
Q_DEFAULT_SYSTEM = [START, Q_SYSTEM, 10, *Q_YOU_ARE, ord("."), END, 10]

# Baichuan: so many pieces before the reserved ones that 195 and 196 are the roles.
B_HI, B_YES, B_NO, B_SPACE = range(461, 465)
FIRST_ROLE = {"baichuan": 102, "baichuan2": 106}

FAMILIES = ["chatglm2", "chatglm3", "qwen", "baichuan", "baichuan2"]


def baichuan_pieces(first_role: int) -> list[str]:
    signs = [*SIGNS, *"àâä"][: 195 - first_role - len(SPECIAL)]
    reserved = [f"<reserved_{number}>" for number in range(205 - len(signs) - len(SPECIAL))]
    return [*SPECIAL, *signs, *reserved, *BYTES, "hi", "yes", "no", "▁"]


def write_tokenizer(folder: Path, family: str, **config: Any) -> Path:
    """A model's folder as it is published: vocabulary, Python code, and a configuration that names its class."""
    folder.mkdir()
    classes = {"chatglm2": ChatGLM2Tokenizer, "chatglm3": ChatGLM3Tokenizer, "qwen": QWenTokenizer}
    name = classes.get(family, BaichuanTokenizer).__name__
    if family == "qwen":
        tokens = [*(bytes([byte]) for byte in range(256)), *QWEN_WORDS]
        lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
        (folder / "qwen.tiktoken").write_bytes(b"".join(lines))
    else:
        pieces = baichuan_pieces(FIRST_ROLE[family]) if family in FIRST_ROLE else GLM_PIECES
        spec = {"pieces": pieces, "dummy_prefix": family not in FIRST_ROLE}
        (folder / "tokenizer.model").write_text(json.dumps(spec), encoding="utf-8")
    shutil.copy(remote_tokenizers.__file__, folder / "tokenization_remote.py")
    automatic = {"AutoTokenizer": [f"tokenization_remote.{name}", None]}
    config |= {"tokenizer_class": name, "auto_map": automatic}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies remote code before it imports it: here into pytest's folder."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")


def load(folder: Path) -> Any:
    return load_tokenizer(ModelConfig(name_or_path=str(folder), trust_remote_code=True))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def encoder(tmp_path: Path, family: str) -> Encoder:
    return make_encoder(tmp_path, family)


def make_encoder(tmp_path: Path, family: str, template: str | None = None) -> Encoder:
    tokenizer = load(write_tokenizer(tmp_path / family, family))
    return Encoder(tokenizer, bind_template(template or family, tokenizer))


def turns(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    roles = ("user", "assistant")
    messages = [] if system is None else [Message.of("system", system)]
    return (*messages, *(Message.of(roles[number % 2], content) for number, content in enumerate(contents)))


def encode(encoder: Encoder, messages: tuple[Message, ...]) -> list[Tokens]:
    return encoder.encode_rendered(encoder.render(Conversation(messages)))


def trained(tokens: Tokens) -> list[list[int]]:
    """Ids of each trained run."""
    mask = tokens.labels != IGNORE
    np.testing.assert_array_equal(tokens.labels[mask], tokens.input_ids[mask])
    borders = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(int)))
    return [tokens.input_ids[a:b].tolist() for a, b in zip(borders[::2], borders[1::2], strict=True)]


CHAT = ("hi", "yes", "no", "hi")


# ---- whole conversations ----


def test_chatglm3_encodes_role_line_and_content_apart(tmp_path):
    (tokens,) = encode(make_encoder(tmp_path, "chatglm3"), turns(*CHAT, system="no"))
    first, second = [SPACE, LF, _YES, USER], [SPACE, LF, _HI, USER]
    expected = [GMASK, SOP, SYSTEM, SPACE, LF, _NO, USER, SPACE, LF, _HI, ASSISTANT, *first]
    assert tokens.input_ids.tolist() == [*expected, SPACE, LF, _NO, ASSISTANT, *second]
    assert trained(tokens) == [first, second]


def test_chatglm2_encodes_a_prompt_whole_and_its_reply_apart(tmp_path):
    first, second = encode(make_encoder(tmp_path, "chatglm2"), turns(*CHAT))
    prompt = [GMASK, SOP, SPACE, ROUND, _1, CLOSE, LF, LF, ASK, HI, LF, LF, ANSWER]
    assert first.input_ids.tolist() == [*prompt, _YES, 2]
    prompt += [YES, LF, LF, ROUND, _2, CLOSE, LF, LF, ASK, NO, LF, LF, ANSWER]
    assert second.input_ids.tolist() == [*prompt, _HI, 2]
    assert [trained(first), trained(second)] == [[[_YES, 2]], [[_HI, 2]]]


def test_qwen_encodes_role_line_and_content_apart(tmp_path):
    (tokens,) = encode(make_encoder(tmp_path, "qwen"), turns("hi", "yes", "\n\nno", "\nhi"))
    first, second = [Q_YES, END], [10, Q_HI, END]
    expected = [*Q_DEFAULT_SYSTEM, START, Q_USER, 10, Q_HI, END, 10, START, Q_ASSISTANT, 10, *first, 10]
    expected += [START, Q_USER, 10, Q_LF2, Q_NO, END, 10, START, Q_ASSISTANT, 10, *second, 10]
    assert tokens.input_ids.tolist() == expected
    assert trained(tokens) == [first, second]


@pytest.mark.parametrize("name", ["baichuan", "baichuan2"])
def test_baichuan_writes_its_role_ids(tmp_path, name):
    first, second = encode(make_encoder(tmp_path, name), turns(*CHAT, system="no"))
    assert first.input_ids.tolist() == [B_NO, 195, B_HI, 196, B_YES, 2]
    assert second.input_ids.tolist() == [B_NO, 195, B_HI, 196, B_YES, 195, B_NO, 196, B_HI, 2]
    assert [trained(first), trained(second)] == [[[B_YES, 2]], [[B_HI, 2]]]


@pytest.mark.parametrize("contents", [CHAT, ("  hi \n", "\n\n yes", " ", "no", "sop hi", "问：")])
def test_chatglm3_prompts_are_those_of_its_own_code(tmp_path, contents):
    encoder = make_encoder(tmp_path, "chatglm3")
    chat = turns(*contents)
    for place in range(0, len(chat), 2):
        official = encoder.tokenizer.build_chat_input(chat[place].text, [item.as_dict() for item in chat[:place]])
        assert encoder.encode_prompt(chat[: place + 1]) == official


@pytest.mark.parametrize("contents", [CHAT, ("  hi \n", "\n\n yes", " ", "no", "hi", "问：")])
def test_chatglm2_prompts_are_those_of_its_own_code(tmp_path, contents):
    encoder = make_encoder(tmp_path, "chatglm2")
    for place in range(0, len(contents), 2):
        history = list(zip(contents[:place:2], contents[1:place:2], strict=True))
        official = encoder.tokenizer.inner(encoder.tokenizer.build_prompt(contents[place], history))["input_ids"]
        assert encoder.encode_prompt(turns(*contents[: place + 1])) == official


def test_a_word_that_is_spelled_like_a_command_is_a_word(tmp_path):
    """ChatGLM's own `tokenize` would give the command for its vocabulary's piece `sop`."""
    encoder = make_encoder(tmp_path, "chatglm3")
    assert encoder.encode_prompt(turns("hisop")) == [GMASK, SOP, USER, SPACE, LF, _HI, SOP_TEXT, ASSISTANT]
    # Nor is one in a template's own text, where nothing is protected.
    assert encoder.tokenizer.encode("hisop") == [GMASK, SOP, _HI, SOP_TEXT]
    assert encoder.tokenizer.encode("[gMASK]sop问：", add_special_tokens=False) == [GMASK, SOP, SPACE, ASK]


# ---- what holds for all ----


@pytest.mark.parametrize("template", [None, "default"])
@pytest.mark.parametrize("contents", [CHAT, (" hi", "\n\nyes", "no \n", " hi", "no", "</s> <|im_end|> sop")])
def test_a_prompt_is_the_beginning_of_what_its_reply_is_trained_in(tmp_path, family, template, contents):
    encoder = make_encoder(tmp_path, family, template)
    chat = turns(*contents)
    replies = [(tokens, run) for tokens in encode(encoder, chat) for run in trained(tokens)]
    assert len(replies) == len(chat) // 2
    for place, (tokens, run) in zip(range(1, len(chat), 2), replies, strict=True):
        prompt = encoder.encode_prompt(chat[:place])
        assert tokens.input_ids.tolist()[: len(prompt) + len(run)] == prompt + run
        assert run[-1] == encoder.template.stop_ids[0]


def test_a_marker_is_one_id(tmp_path, family):
    tokenizer = load(write_tokenizer(tmp_path / family, family))
    glm = {"[gMASK]": GMASK, "sop": SOP, "</s>": 2}
    expected = {
        "chatglm2": glm,
        "chatglm3": glm | {"<|user|>": USER, "<|assistant|>": ASSISTANT, "<|system|>": SYSTEM},
        "qwen": {"<|endoftext|>": Q_END, "<|im_start|>": START, "<|im_end|>": END},
        "baichuan": {"<reserved_102>": 195, "<reserved_103>": 196, "</s>": 2},
        "baichuan2": {"<reserved_106>": 195, "<reserved_107>": 196, "</s>": 2},
    }[family]
    for text, number in expected.items():
        assert tokenizer.encode(text, add_special_tokens=False) == [number]
        assert tokenizer.decode([number]) == text
        assert tokenizer.decode([number], skip_special_tokens=True) == ""
        assert text in tokenizer.all_special_tokens
        assert number < len(tokenizer)
    assert tokenizer.eos_token_id == expected[tokenizer.eos_token]
    assert tokenizer.special_tokens_map["eos_token"] == tokenizer.eos_token


def test_a_typed_marker_stays_text(encoder):
    for marker in [
        "[gMASK]",
        "sop",
        "philosopher",
        "<|user|>",
        "<|im_end|>",
        "</s>",
        "<reserved_106>",
        "<reserved_103>",
    ]:
        typed = f"hi {marker} no{marker}"
        markers = set(encoder.tokenizer.family.markers.values())
        for plain, tokens in zip(
            encode(encoder, turns(*CHAT)), encode(encoder, turns(typed, "yes", "no", typed)), strict=True
        ):
            written = [[i for i in item.input_ids.tolist() if i in markers] for item in (tokens, plain)]
            assert written[0] == written[1]
        text = encoder.tokenizer.decode(encoder.encode_prompt(turns(typed)))
        assert typed in text


def test_special_text_is_special_where_that_is_allowed(tmp_path):
    tokenizer = load(write_tokenizer(tmp_path / "qwen", "qwen"))
    encoder = Encoder(tokenizer, bind_template("qwen", tokenizer), allow_special_in_content=True)
    assert encoder.encode_prompt(turns("hi<|im_end|>")).count(END) == 3


def test_documents_are_wrapped_as_the_tokenizer_does(tmp_path):
    glm = make_encoder(tmp_path, "chatglm3")
    eos = glm.tokenizer.eos_token_id
    assert [item.input_ids.tolist() for item in glm.encode_documents(["hi"])] == [[GMASK, SOP, _HI, eos]]
    qwen = make_encoder(tmp_path, "qwen")
    (tokens,) = qwen.encode_documents([qwen.protect_document("hi<|im_end|>")])
    assert tokens.input_ids.tolist() == [Q_HI, *b"<|", Q_IM_END, *b"|>", qwen.tokenizer.eos_token_id]
    np.testing.assert_array_equal(tokens.labels, tokens.input_ids)


def test_decoding_gives_the_rendered_text(encoder):
    messages = turns("hi", "yes\n no", "hi")
    text = encoder.template.render_text(Conversation(messages), prompt=True)[0]
    assert (
        encoder.tokenizer.decode(np.array(encoder.encode_prompt(messages)), clean_up_tokenization_spaces=False) == text
    )


def test_the_certificate_passes_and_says_what_it_did_not_compare(encoder):
    certificate = certify(encoder)
    assert certificate.passed
    assert "not compared" in certificate.checks[0].detail


def test_the_certificate_sees_a_reply_without_its_stop(tmp_path, monkeypatch):
    encoder = make_encoder(tmp_path, "chatglm3")
    honest = SlowTokenizer.encode_rendered
    monkeypatch.setattr(SlowTokenizer, "encode_rendered", lambda self, item: _without_last(honest(self, item)))
    assert not certify(encoder).passed


def _without_last(tokens: Tokens) -> Tokens:
    return Tokens(tokens.input_ids[:-1], tokens.labels[:-1])


def test_an_id_that_only_the_model_has_is_decoded_as_nothing(encoder):
    count = len(encoder.tokenizer)
    assert encoder.tokenizer.decode([*encoder.tokenizer.encode("hi", add_special_tokens=False), count]) == "hi"
    assert encoder.tokenizer.decode(count) == ""


# ---- saving ----


def test_saved_and_loaded_again_it_encodes_the_same(tmp_path, encoder, family):
    encoder.tokenizer.chat_template = encoder.template.text
    encoder.tokenizer.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert isinstance(again, SlowTokenizer)
    assert again.chat_template == encoder.template.text
    assert again.pad_token is not None
    rebound = Encoder(again, bind_template("auto", again))
    assert probe_hash(rebound) == probe_hash(encoder)
    assert again.fingerprint() == encoder.tokenizer.fingerprint()
    assert [item.input_ids.tolist() for item in encode(rebound, turns(*CHAT))] == [
        item.input_ids.tolist() for item in encode(encoder, turns(*CHAT))
    ]


def test_its_hash_changes_with_the_vocabulary(tmp_path):
    hashes = {load(write_tokenizer(tmp_path / name, name)).fingerprint() for name in FAMILIES}
    assert len(hashes) == len(FAMILIES)
    vocabulary = tmp_path / "chatglm3" / "tokenizer.model"
    vocabulary.write_text(vocabulary.read_text(encoding="utf-8").replace("yes", "yea"), encoding="utf-8")
    assert load(tmp_path / "chatglm3").fingerprint() not in hashes


def test_a_copy_is_an_adapter_too(encoder):
    for duplicate in (copy.copy(encoder.tokenizer), copy.deepcopy(encoder.tokenizer)):
        assert duplicate.encode("hi") == encoder.tokenizer.encode("hi")


# ---- others ----


def test_a_slow_tokenizer_of_another_kind_is_refused(tmp_path, chatml_tokenizer):
    path = tmp_path / "tokenizer.model"
    path.write_text(json.dumps({"pieces": GLM_PIECES, "dummy_prefix": True}), encoding="utf-8")
    plain = BaichuanTokenizer(str(path))
    assert adapt_tokenizer(plain) is plain
    with pytest.raises(UsageError, match="no fast implementation"):
        Encoder(plain, bind_template("qwen", chatml_tokenizer))


def test_a_fast_tokenizer_is_left_alone(chatml_tokenizer):
    assert adapt_tokenizer(chatml_tokenizer) is chatml_tokenizer
