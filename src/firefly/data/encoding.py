"""Conversations to token ids: one tokenization of the rendered text, labels by character span.

One exception: a token that holds both the end of a prompt and the beginning of its trained reply is none that a served
model could write. The reply is then encoded behind its prompt, as generation would continue it.

Text that a person typed stays text: a typed `</s>` never becomes the end-of-sequence token. Rows in which no
special-looking text was typed (nearly all) take the tokenizer as it is; the others take a copy of it whose special
tokens are spelled with private-use characters, so that only the template's own are recognized.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from firefly.data.rendering import BREAK
from firefly.data.schema import IGNORE, Conversation, Message, Rendered, Tokens
from firefly.data.slow_tokenizers import SlowTokenizer
from firefly.data.templates import ChatTemplate, TemplateFailure
from firefly.errors import UsageError

# Another private-use character: it starts the second spelling of a special token.
ALIAS = "\U000f5a20"


@dataclass(frozen=True, slots=True)
class EncodedText:
    """What a rendered text becomes.

    Attributes:
        examples: one; or one for each trained reply, where the reply of an earlier one is encoded behind its prompt.
        joined: trained replies that one tokenization would have joined to their prompts.
    """

    examples: tuple[Tokens, ...]
    joined: int = 0


@dataclass(frozen=True)
class Encoder:
    """The one way from messages to ids, shared by training, chat and server."""

    tokenizer: Any
    template: ChatTemplate
    allow_special_in_content: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.tokenizer, SlowTokenizer):
            return
        if not getattr(self.tokenizer, "is_fast", False):
            raise UsageError(
                "tokenizer.not_fast",
                "the tokenizer {name} has no fast implementation, which this version needs for exact labels.",
                name=type(self.tokenizer).__name__,
            )
        # Some tokenizer.json files carry a truncation or padding that would silently apply to every text.
        self.tokenizer.backend_tokenizer.no_truncation()
        self.tokenizer.backend_tokenizer.no_padding()

    @cached_property
    def tokenizer_hash(self) -> str:
        """Hash of all that decides about ids."""
        if isinstance(self.tokenizer, SlowTokenizer):
            return self.tokenizer.fingerprint()
        return hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()

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
        reserved = [BREAK, ALIAS]
        return re.compile("|".join([*reserved, *map(re.escape, self.special_tokens)]))

    @cached_property
    def _initials(self) -> tuple[str, ...]:
        """The characters that typed special text can begin with: a text without them needs no search."""
        return tuple({BREAK, ALIAS, *(token[0] for token in self.special_tokens)})

    def render(self, conversation: Conversation) -> list[Rendered]:
        """Render one conversation: one text, or one for each reply if the template rewrites earlier turns.

        Typed special-looking text is broken by BREAK characters until it is encoded.

        Raises:
            TemplateFailure: the template refuses the conversation, or a text holds one of our private characters.
        """
        rendered = self.template.render(self._protect(conversation))
        return self.tokenizer.serve(rendered) if isinstance(self.tokenizer, SlowTokenizer) else rendered

    def encode_rendered(self, rendered: Sequence[Rendered]) -> list[Tokens]:
        """Tokenize texts in one call: the examples of all of them, in order."""
        return [tokens for text in self.label(rendered, self.tokenize(rendered)) for tokens in text.examples]

    def tokenize(self, rendered: Sequence[Rendered]) -> list[Any]:
        """The encodings of texts in which nothing special was typed, made in one call beside which other threads run;
        None for the other texts."""
        if isinstance(self.tokenizer, SlowTokenizer):
            return [self.tokenizer.encode_rendered(item) for item in rendered]
        plain = [i for i, item in enumerate(rendered) if BREAK not in item.text]
        result: list[Any] = [None] * len(rendered)
        encodings = self._plain_tokenizer.encode_batch([rendered[i].text for i in plain], add_special_tokens=False)
        for i, encoding in zip(plain, encodings, strict=True):
            result[i] = encoding
        return result

    def label(self, rendered: Sequence[Rendered], encodings: Sequence[Any]) -> list[EncodedText]:
        """Ids and labels of tokenized texts. A token is a target if its first character lies in a trained span."""
        if isinstance(self.tokenizer, SlowTokenizer):  # which cuts before every reply
            return [EncodedText((tokens,)) for tokens in encodings]
        return [self._label(encoding, item) for item, encoding in zip(rendered, encodings, strict=True)]

    @cached_property
    def _continuing_tokenizer(self) -> Any:
        return _without_prefix(self._plain_tokenizer)

    @cached_property
    def _continuing_aliased_tokenizer(self) -> Any:
        return _without_prefix(self._aliased_tokenizer)

    def _label(self, encoding: Any, rendered: Rendered) -> EncodedText:
        """Labels for a text and its encoding; None: something special was typed in it, and it is tokenized here."""
        is_plain = encoding is not None
        whole = self._plain_tokenizer if is_plain else self._aliased_tokenizer
        if not is_plain:
            rendered = self._alias(rendered)
            encoding = whole.encode(rendered.text, add_special_tokens=False)
        tokens, joined = _label(encoding, rendered)
        if not joined:
            return EncodedText((tokens,))
        continuing = self._continuing_tokenizer if is_plain else self._continuing_aliased_tokenizer
        text, spans = rendered.text, rendered.spans
        if joined == [len(spans) - 1]:
            return EncodedText((_encode_behind(rendered, spans[-1][0], whole, continuing),), 1)
        examples = []
        for number, (start, end) in enumerate(spans):
            reply = Rendered(text[:end], ((start, end),))
            if number in joined:
                examples.append(_encode_behind(reply, start, whole, continuing))
            else:
                examples.append(_label(whole.encode(reply.text, add_special_tokens=False), reply)[0])
        return EncodedText(tuple(examples), len(joined))

    def encode_prompt(self, messages: Iterable[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Ids of the messages up to and with the generation prompt: what chat and server feed the model."""
        return self.encode_protected(self.render_prompt(messages, tools))

    def render_prompt(self, messages: Iterable[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The text of that prompt, typed special-looking text broken, for `encode_protected`."""
        return self.template.render_prompt(self._protect(Conversation(tuple(messages), tuple(tools))))

    def encode_protected(self, text: str) -> list[int]:
        """Ids of a text whose special tokens are the template's own; nothing is added at its borders."""
        return self.encode_rendered([Rendered(text, ())])[0].input_ids.tolist()

    def encode_documents(self, texts: Sequence[str]) -> list[Tokens]:
        """Ids of protected plain texts, special tokens at their borders as the tokenizer adds them, and EOS at the end.

        Every token is a target; an empty text has none.
        """
        return [self._end_document(ids) for ids in self._encode_texts(texts)]

    def encode_text(self, text: str) -> list[int]:
        """Ids of a plain text that is to go on: as those of a document, without its end.

        Raises:
            TemplateFailure: it holds one of our private characters.
        """
        ids = list(self._encode_texts([self._protect_text(text)])[0])
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def protect_document(self, text: str) -> str:
        """A document's text with special-looking text broken, for `encode_documents`.

        Raises:
            TemplateFailure: it holds one of our private characters.
        """
        return self._protect_text(text)

    def _end_document(self, ids: Sequence[int]) -> Tokens:
        end = self.tokenizer.eos_token_id
        if len(ids) and ids[-1] != end:
            ids = [*ids, end]
        array = np.asarray(ids, dtype=np.int32)
        return Tokens(array, array)

    def _encode_texts(self, protected: Sequence[str]) -> list[Sequence[int]]:
        if isinstance(self.tokenizer, SlowTokenizer):
            return [self.tokenizer.encode(text) if text else [] for text in protected]
        backend = self.tokenizer.backend_tokenizer
        plain = [i for i, text in enumerate(protected) if BREAK not in text]
        ids: dict[int, Sequence[int]] = {}
        for i, encoding in zip(plain, backend.encode_batch([protected[i] for i in plain]), strict=True):
            ids[i] = encoding.ids
        for i, text in enumerate(protected):
            if not text:
                ids[i] = []
            elif i not in ids:
                aliased = self._alias(Rendered(text, ()))
                body = self._aliased_tokenizer.encode(aliased.text, add_special_tokens=False)
                ids[i] = (body if backend.post_processor is None else backend.post_processor.process(body)).ids
        return [ids[i] for i in range(len(protected))]

    def _protect(self, conversation: Conversation) -> Conversation:
        """Break special-looking text in contents, so that the rendered text holds only the template's own tokens."""
        messages = tuple(self._protect_message(item) for item in conversation.messages)
        tools = tuple(self._protect_value(tool) for tool in conversation.tools)
        return Conversation(messages, tools)

    def _protect_message(self, item: Message) -> Message:
        # All of it at once: what looks like a special token may stand across two parts.
        item = item.with_text(self._protect_text(item.text))
        if item.reasoning is None and not item.tool_calls and item.name is None and item.tool_call_id is None:
            return item
        optional = (item.reasoning, item.name, item.tool_call_id)
        reasoning, name, call = (None if text is None else self._protect_text(text) for text in optional)
        calls = tuple(self._protect_value(call) for call in item.tool_calls)
        return replace(item, reasoning=reasoning, tool_calls=calls, name=name, tool_call_id=call)

    def _protect_value(self, value: Any) -> Any:
        """Protect every text inside a JSON value."""
        if isinstance(value, str):
            return self._protect_text(value)
        if isinstance(value, Mapping):
            return {self._protect_text(key): self._protect_value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._protect_value(item) for item in value]
        return value

    def _protect_text(self, text: str) -> str:
        for initial in self._initials:
            if initial in text:
                break
        else:
            return text
        if BREAK in text or ALIAS in text:
            raise TemplateFailure(
                "the text holds a character reserved for internal use (U+FDD0, U+FDD1, U+F5A1F or U+F5A20)"
            )
        return text if self.allow_special_in_content else self._special.sub(_broken, text)

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


def _broken(match: re.Match[str]) -> str:
    """Broken after every character: a special token may hold a shorter one."""
    return BREAK.join(match.group())


def _respell(token: str) -> str:
    """The second spelling of a special token; nothing for a BREAK, which only kept typed text apart."""
    return "" if token == BREAK else ALIAS + token + ALIAS


def _label(encoding: Any, rendered: Rendered) -> tuple[Tokens, list[int]]:
    """Ids and labels, and the numbers of the spans before which a token ends behind the span's beginning."""
    ids = np.array(encoding.ids, dtype=np.int32)
    labels = np.full(len(ids), IGNORE, dtype=np.int32)
    joined = []
    for number, (start, end) in enumerate(rendered.spans):
        # Offsets never decrease, so a span is one run of tokens.
        left, crossed = _first_token_from(encoding, rendered.text, start, len(ids))
        right = len(ids) if end == len(rendered.text) else _first_token_from(encoding, rendered.text, end, len(ids))[0]
        labels[left:right] = ids[left:right]
        if crossed:
            joined.append(number)
    return Tokens(ids, labels), joined


def _first_token_from(encoding: Any, text: str, position: int, count: int) -> tuple[int, bool]:
    """The first token that starts at or after a character, and whether one before it ends behind that character.

    Asking the encoding for one place is much cheaper than having it list the offsets of every token.
    """
    token = encoding.char_to_token(position)
    if token is None:  # no token holds the character: the end of the text, or one that the normalizer dropped
        starts = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)[:, 0]
        return int(np.searchsorted(starts, position)), _composes(text[position - 1 : position + 1])
    first = token
    while token < count and encoding.token_to_chars(token)[0] < position:
        token += 1
    return token, token > first


def _composes(pair: str) -> bool:
    """Whether a normalizer would make one character of two."""
    return len(unicodedata.normalize("NFC", pair)) < len(pair)


def _encode_behind(rendered: Rendered, cut: int, whole: Any, continuing: Any) -> Tokens:
    """Ids and labels of a text whose parts before and behind `cut` are tokenized apart."""
    text = rendered.text
    # From its first added token on, a reply is tokenized as it would be in one text: a prefix may follow such a token.
    border = cut + _first_added_token(text[cut:], whole)
    parts = []
    for start, end, tokenizer in ((0, cut, whole), (cut, border, continuing), (border, len(text), whole)):
        spans = ((max(a, start) - start, min(b, end) - start) for a, b in rendered.spans if a < end and b > start)
        part = Rendered(text[start:end], tuple(spans))
        parts.append(_label(tokenizer.encode(part.text, add_special_tokens=False), part)[0])
    ids, labels = (np.concatenate([getattr(part, name) for part in parts]) for name in ("input_ids", "labels"))
    return Tokens(ids, labels)


def _first_added_token(text: str, tokenizer: Any) -> int:
    """Where the first token stands that is not part of the tokenizer's model; the end, if there is none."""
    added = tokenizer.get_added_tokens_decoder()
    encoding = tokenizer.encode(text, add_special_tokens=False)
    places = (place for number, (place, _) in zip(encoding.ids, encoding.offsets, strict=True) if number in added)
    return next(places, len(text))


def _without_prefix(tokenizer: Any) -> Any:
    """The tokenizer for a text that continues another one: it writes no space in front of it, and drops none."""
    from tokenizers import Tokenizer

    steps = {name: getattr(tokenizer, name) for name in ("normalizer", "pre_tokenizer")}
    given = {name: None if step is None else json.loads(step.__getstate__()) for name, step in steps.items()}
    continued = {name: _continued(step) for name, step in given.items()}
    return (
        tokenizer if continued == given else Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | continued))
    )


def _continued(step: Any) -> Any:
    """A normalizer or pre-tokenizer, less what it does at the beginning of a text; None if nothing is left."""
    if not isinstance(step, dict) or step["type"] == "Prepend":
        return None
    changed = {"prepend_scheme": "never", "add_prefix_space": False, "strip_left": False}
    step = {**step, **{key: value for key, value in changed.items() if key in step}}
    for steps in ("normalizers", "pretokenizers"):
        if steps in step:
            step[steps] = [inner for inner in map(_continued, step[steps]) if inner is not None]
    return step
