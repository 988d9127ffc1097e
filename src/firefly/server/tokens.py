"""The text and the bytes of single tokens. A token may be a part of a character."""

from __future__ import annotations

import re
from typing import Any

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
BROKEN = "\ufffd"


class TokenTexts:
    """What each token of a tokenizer stands for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = getattr(backend, "decoder", None)
        state = decoder.__getstate__() if decoder is not None else b""
        self._letters = _byte_of_letter() if b'"ByteLevel"' in state else None
        self._has_byte_tokens = b'"ByteFallback"' in state
        self._space = "▁" if "▁".encode() in state or b"\\u2581" in state else None
        self._added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        if token not in self._known:
            self._known[token] = self._find(token)
        return self._known[token]

    def _find(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if isinstance(piece, bytes):  # as tokenizers in Python have them
            return piece
        if isinstance(piece, str):
            if self._letters is not None and all(letter in self._letters for letter in piece):
                return bytes(self._letters[letter] for letter in piece)
            if self._has_byte_tokens and (match := BYTE.fullmatch(piece)):
                return bytes([int(match[1], 16)])
            if self._space is not None:
                return piece.replace(self._space, " ").encode()
        return self._tokenizer.decode([token], skip_special_tokens=False).encode()

    def text_of(self, token: int) -> str:
        """Its text; bytes that are no whole characters as escapes."""
        return self.bytes_of(token).decode("utf-8", "backslashreplace")

    def name_of(self, token: int) -> str:
        """Its text as a key of completions' `top_logprobs`, where two parts of characters must not be the same."""
        try:
            return self.bytes_of(token).decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes_of(token))


def _byte_of_letter() -> dict[str, int]:
    """Byte-level BPE writes each byte as a letter."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}
