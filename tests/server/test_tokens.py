"""The text and the bytes of single tokens."""

from __future__ import annotations

from typing import Any

import pytest

from firefly.server.tokens import TokenTexts


@pytest.mark.parametrize("name", ["chatml_tokenizer", "qwen_tokenizer", "byte_fallback_tokenizer"])
def test_the_bytes_of_tokens_add_up_to_the_text(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Any = request.getfixturevalue(name)
    texts = TokenTexts(tokenizer)
    for text in (
        "a def add(a, b):\n",
        "你好，请介绍",
        "é 𝄞 🤗 x",
        "<|im_end|>" if name != "byte_fallback_tokenizer" else "z",
    ):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(texts.bytes_of, ids)).decode().removeprefix(" ") == text.removeprefix(" ")
        names = [texts.name_of(token) for token in set(ids)]
        assert len(set(names)) == len(names)


def test_parts_of_characters_have_names_of_their_own(qwen_tokenizer: Any) -> None:
    texts = TokenTexts(qwen_tokenizer)
    parts = [token for token in range(256) if texts.bytes_of(token)[0] >= 0x80]
    assert len(parts) == 128
    assert len({texts.name_of(token) for token in parts}) == 128
    assert all(texts.name_of(token).startswith("bytes:\\x") for token in parts)
    assert {texts.text_of(token) for token in parts} == {f"\\x{byte:02x}" for byte in range(0x80, 0x100)}


@pytest.fixture(scope="module")
def byte_fallback_tokenizer() -> Any:
    """As Llama 2's: ▁ for spaces, and a token for each byte that no other token has."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "x", "z", "▁a"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
