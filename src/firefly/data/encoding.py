"""Conversations to token ids: one tokenisation of the rendered text, labels by character span.

Text that a person typed stays text: a typed `</s>` never becomes the end-of-sequence token. Rows in which no
special-looking text was typed (nearly all) take the tokenizer as it is; the others take a copy of it whose special
tokens are spelled with private-use characters, so that only the template's own are recognised.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from firefly.data.schema import IGNORE, Conversation, Message, Rendered, Tokens
from firefly.data.templates import ChatTemplate
from firefly.errors import UsageError

# Private-use characters: BREAK is put inside typed special-looking text while the template renders, ALIAS starts the
# second spelling of a special token.
BREAK, ALIAS = "\U000f5a1f", "\U000f5a20"


@dataclass(frozen=True)
class Encoder:
    """The one way from messages to ids, shared by training, chat and server."""

    tokenizer: Any
    template: ChatTemplate
    allow_special_in_content: bool = False

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "is_fast", False):
            raise UsageError("tokenizer.not_fast", name=type(self.tokenizer).__name__)
        # Some tokenizer.json files carry a truncation or padding that would silently apply to every text.
        self.tokenizer.backend_tokenizer.no_truncation()
        self.tokenizer.backend_tokenizer.no_padding()

    @cached_property
    def _plain_tokenizer(self) -> Any:
        """The tokenizer, less a post-processor that moves the start of a token behind its white space."""
        from tokenizers import Tokenizer

        backend = self.tokenizer.backend_tokenizer
        if backend.post_processor is None or b'"trim_offsets":true' not in backend.post_processor.__getstate__():
            return backend
        plain = Tokenizer.from_str(backend.to_str())
        plain.post_processor = None
        return plain

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """Special tokens of the tokenizer, longest first."""
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        return tuple(sorted({*added, *self.tokenizer.all_special_tokens} - {""}, key=lambda text: (-len(text), text)))

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.special_tokens)) or r"(?!)")

    def render(self, conversation: Conversation) -> list[Rendered]:
        """Render one conversation: one text, or one for each reply if the template rewrites earlier turns.

        Typed special-looking text is broken by BREAK characters until it is encoded.

        Raises:
            TemplateFailure: the template refuses the conversation.
        """
        return self.template.render(self._protect(conversation))

    def encode_rendered(self, rendered: Sequence[Rendered]) -> list[Tokens]:
        """Tokenise texts in one call. A token is a target if its first character lies in a trained span."""
        plain = [i for i, item in enumerate(rendered) if BREAK not in item.text]
        result: list[Tokens | None] = [None] * len(rendered)
        encodings = self._plain_tokenizer.encode_batch([rendered[i].text for i in plain], add_special_tokens=False)
        for i, encoding in zip(plain, encodings, strict=True):
            result[i] = _label(encoding, rendered[i])
        for i, item in enumerate(rendered):
            if result[i] is None:
                aliased = self._alias(item)
                encoding = self._aliased_tokenizer.encode(aliased.text, add_special_tokens=False)
                result[i] = _label(encoding, aliased)
        return [tokens for tokens in result if tokens is not None]

    def encode_prompt(self, messages: Iterable[Message]) -> list[int]:
        """Ids of the messages up to and with the generation prompt: what chat and server feed the model."""
        conversation = self._protect(Conversation(tuple(messages)))
        text = self.template.render_prompt(conversation.as_dicts())
        return self.encode_rendered([Rendered(text, ())])[0].input_ids.tolist()

    def _protect(self, conversation: Conversation) -> Conversation:
        """Break special-looking text in contents, so that the rendered text holds only the template's own tokens."""
        if self.allow_special_in_content:
            return conversation
        contents = [self._special.sub(_broken, _plain(item.content)) for item in conversation.messages]
        if all(new == item.content for new, item in zip(contents, conversation.messages, strict=True)):
            return conversation
        messages = zip(conversation.messages, contents, strict=True)
        return Conversation(tuple(replace(item, content=content) for item, content in messages))

    def _alias(self, rendered: Rendered) -> Rendered:
        """Respell the template's own special tokens for the aliased tokenizer, drop BREAKs, move the spans along."""
        pieces: list[str] = []
        moved: dict[int, int] = {}  # positions of span borders in the new text
        borders = sorted({border for span in rendered.spans for border in span})
        length, position, pending = 0, 0, iter([*borders, None])
        border = next(pending)
        matches = re.finditer(f"{BREAK}|{self._special.pattern}", rendered.text)
        for start, end, new in [
            *((match.start(), match.end(), _respell(match.group())) for match in matches),
            (len(rendered.text), len(rendered.text), ""),
        ]:
            # A border never falls inside a special token, so it maps by the plain text before it.
            while border is not None and border <= start:
                moved[border] = length + border - position
                border = next(pending)
            pieces += rendered.text[position:start], new
            length += start - position + len(new)
            position = end
        return Rendered("".join(pieces), tuple((moved[start], moved[end]) for start, end in rendered.spans))

    @cached_property
    def _aliased_tokenizer(self) -> Any:
        """A copy of the tokenizer that knows its special tokens by another spelling only; every id stays the same."""
        from tokenizers import Tokenizer

        spec = json.loads(self.tokenizer.backend_tokenizer.to_str())
        names = {token: _respell(token) for token in self.special_tokens}
        for token in spec["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        vocabulary = spec["model"].get("vocab")
        if isinstance(vocabulary, dict):
            spec["model"]["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
        elif isinstance(vocabulary, list):
            spec["model"]["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
        if spec["model"].get("unk_token") in names:
            spec["model"]["unk_token"] = names[spec["model"]["unk_token"]]
        spec["post_processor"] = None  # adds BOS and the like, which a chat template writes itself
        aliased = Tokenizer.from_str(json.dumps(spec))
        for token, name in names.items():
            if aliased.token_to_id(name) != self.tokenizer.backend_tokenizer.token_to_id(token):
                raise RuntimeError(f"special token {token!r} lost its id in the aliased tokenizer")
        return aliased


def _plain(content: str) -> str:
    """Without the two private-use characters: typed, they could spell an alias."""
    return content.replace(BREAK, "").replace(ALIAS, "")


def _broken(match: re.Match[str]) -> str:
    """Broken after every character: a special token may hold a shorter one."""
    return BREAK.join(match.group())


def _respell(token: str) -> str:
    """The second spelling of a special token; nothing for a BREAK, which only kept typed text apart."""
    return "" if token == BREAK else ALIAS + token + ALIAS


def _label(encoding: Any, rendered: Rendered) -> Tokens:
    ids = np.asarray(encoding.ids, dtype=np.int32)
    labels = np.full(len(ids), IGNORE, dtype=np.int32)
    if rendered.spans:
        starts = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)[:, 0]
        for first, end in rendered.spans:
            # Offsets never decrease, so a span is one run of tokens.
            left, right = np.searchsorted(starts, [first, end])
            labels[left:right] = ids[left:right]
    return Tokens(ids, labels)
