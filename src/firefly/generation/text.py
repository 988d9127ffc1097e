"""Ids to text as they come: whole characters, and nothing that a stop text may still take back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"
"""What a tokenizer writes for bytes that are no whole character yet."""
LONGEST_CHARACTER = 8
"""Tokens after which bytes are no longer waited for: no character has more than four, and some tokens are one byte."""


class TextStream:
    """The text of one answer, token by token. Special tokens stand in it as they are spelled."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.stopped = False
        """Whether a stop text was met; the text ends before it, and what comes later is not looked at."""
        self._ids: list[int] = []
        self._shown = 0  # tokens whose text was given out
        self._context = 0  # where the token begins that the next ones are decoded behind: a space may depend on it
        self._held = ""

    def add(self, token: int) -> str:
        """Take a token; return the text that has become final with it."""
        self._ids.append(token)
        text = self._decode_new()
        if text.endswith(BROKEN) and len(self._ids) - self._shown < LONGEST_CHARACTER:
            return ""
        return self._release(text)

    def finish(self) -> str:
        """The answer has ended: return the text that was held back."""
        text = self._release(self._decode_new())
        held, self._held = self._held, ""
        return text + ("" if self.stopped else held)

    def _decode_new(self) -> str:
        """The text of tokens that was not given out yet."""
        before = self._decode(self._ids[self._context : self._shown])
        return self._decode(self._ids[self._context :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""

    def _release(self, new: str) -> str:
        self._context, self._shown = self._shown, len(self._ids)
        if self.stopped:
            return ""
        text = self._held + new
        places = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        border = len(text) - _begun(text, self.stop)
        self._held = text[border:]
        return text[:border]


def _begun(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of a stop text."""
    longest = max((len(stop) for stop in stops), default=0) - 1
    for count in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-count:]) for stop in stops):
            return count
    return 0
