"""One interface over tokenizers that exist in Python only: ChatGLM2/3, QWenTokenizer (Qwen 1), Baichuan 1/2.

Their special tokens are reached by id (`get_command`, `im_start_id`, 195 and 196), not by text, and they tell no
offsets. So a rendered text is cut at the tokens its template wrote: each of these becomes its id, every other piece is
tokenized by the model's own code, and labels are given by piece. Where their chat code cuts, this cuts: behind the role
and its line break. Tested with stand-ins that are written after the published Python code; no real weights were tried.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from firefly.data.rendering import BREAK
from firefly.data.schema import IGNORE, Rendered, Tokens

CHATGLM_COMMANDS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
CHATGLM_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
BAICHUAN_ROLE_IDS = [195, 196]
"""user_token_id and assistant_token_id of every Baichuan chat model's generation_config."""
RESERVED = re.compile(r"<reserved_\d+>")


def adapt_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer itself, or an adapter if it is one of those that are known here. Others `Encoder` refuses."""
    if getattr(tokenizer, "is_fast", False):
        return tokenizer
    for describe in (_chatglm, _qwen, _baichuan):
        if family := describe(tokenizer):
            return SlowTokenizer(tokenizer, family)
    return tokenizer


@dataclass(frozen=True)
class Family:
    """What the Python code of a model family says beyond the common interface.

    Attributes:
        markers: what a template can write as one token, and its id.
        encode_text: ids of a text as it stands, nothing added.
        named: `eos_token` and its like.
        role_markers: those behind which a line with the role or a tool's name stands, tokenized apart.
        implied_space: the tokenizer itself writes the space that the template has behind that line.
    """

    markers: Mapping[str, int]
    encode_text: Callable[[str], list[int]]
    named: Mapping[str, str]
    role_markers: frozenset[str] = field(default_factory=frozenset)
    implied_space: bool = False


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a text: where it starts, what of it is tokenized, and its id if it is a marker."""

    start: int
    text: str
    marker: int | None


class SlowTokenizer:
    """A slow tokenizer with the interface that Encoder, templates, chat and saving use; the rest is its own.

    What is set on it (`chat_template`, `pad_token`) is set on the tokenizer, so that it is saved.
    """

    is_fast = False

    def __init__(self, inner: Any, family: Family) -> None:
        words = sorted(family.markers, key=len, reverse=True)
        # `sop` is no marker inside another word.
        patterns = (rf"(?a:\b{word}\b)" if word.isalpha() else re.escape(word) for word in words)
        vars(self).update(inner=inner, family=family, _pattern=re.compile("|".join(patterns)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":  # asked for by copy and pickle before there is an `inner`
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inner, name, value)

    def __len__(self) -> int:
        # ChatGLM's get_vocab knows one name for several ids, and its length is too small.
        return max(len(self.inner), self.inner.vocab_size, 1 + max(self.family.markers.values()))

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        return {**self.family.named, **self.inner.special_tokens_map}

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys((*self.family.markers, *self.inner.all_special_tokens)))

    @property
    def all_special_ids(self) -> list[int]:
        return sorted({*self.family.markers.values(), *self.inner.all_special_ids})

    @property
    def eos_token(self) -> str:
        return self.family.named["eos_token"]

    @property
    def eos_token_id(self) -> int:
        return self.family.markers[self.eos_token]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text in which every marker is special, with what the tokenizer itself puts around it or without."""
        ids = self.encode_rendered(Rendered(text, ())).input_ids.tolist()
        return self.inner.build_inputs_with_special_tokens(ids) if add_special_tokens else ids

    def encode_rendered(self, rendered: Rendered) -> Tokens:
        """Ids and labels of a rendered text. A piece is trained if it starts in a span; spans cut pieces."""
        ids: list[int] = []
        labels: list[int] = []
        for piece in self._split(rendered.text, itertools.chain.from_iterable(rendered.spans)):
            new = self._encode_typed(piece.text.split(BREAK)) if piece.marker is None else [piece.marker]
            trained = any(start <= piece.start < end for start, end in rendered.spans)
            ids += new
            labels += new if trained else [IGNORE] * len(new)
        return Tokens(np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32))

    def serve(self, rendered: list[Rendered]) -> list[Rendered]:
        """One text for each reply, if a reply begins inside a piece.

        The prompt of a later turn has that piece whole: it does not begin like the text in which the reply is cut off.
        """
        if len(rendered) != 1 or len(rendered[0].spans) < 2:
            return rendered
        text, spans = rendered[0].text, rendered[0].spans
        if {start for start, _ in spans} <= {piece.start for piece in self._split(text)}:
            return rendered
        return [Rendered(text[:end], ((start, end),)) for start, end in spans]

    def decode(self, ids: Any, skip_special_tokens: bool = False, **options: Any) -> str:
        """The text of ids, markers spelled out or left out."""
        spelled = {number: text for text, number in self.family.markers.items()}
        # A model has more rows than its tokenizer has ids, and these tokenizers fail at such an id.
        known = (int(number) for number in np.asarray(ids).reshape(-1) if number < len(self))
        parts: list[str] = []
        for is_marker, run in itertools.groupby(known, key=spelled.__contains__):
            if not is_marker:
                parts.append(self.inner.decode(list(run), skip_special_tokens=skip_special_tokens, **options))
            elif not skip_special_tokens:
                parts += (spelled[number] for number in run)
        return "".join(parts)

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool = True, return_dict: bool = False, **options: Any
    ) -> Any:
        """transformers' rendering, tokenized here: they would spell out the markers that are known by id."""
        text = self.inner.apply_chat_template(conversation, tokenize=False, **{**self.special_tokens_map, **options})
        if not tokenize:
            return text
        ids = self.encode(text, add_special_tokens=False)
        return {"input_ids": ids} if return_dict else ids

    def fingerprint(self) -> str:
        """Hash of all that decides about ids: the vocabulary's files, the model's Python code, the markers."""
        digest = hashlib.sha256(repr(sorted(self.family.markers.items())).encode())
        digest.update(Path(inspect.getfile(type(self.inner))).read_bytes())
        with tempfile.TemporaryDirectory() as folder:
            for path in sorted(self.inner.save_vocabulary(folder)):
                digest.update(Path(path).read_bytes())
        return digest.hexdigest()

    def _split(self, text: str, cuts: Iterable[int] = ()) -> list[_Piece]:
        """Pieces between markers, role lines and cuts."""
        matches = list(self._pattern.finditer(text))
        ids = {match.start(): self.family.markers[match.group()] for match in matches}
        contents = self._content_starts(text, matches)
        borders = {0, len(text), *cuts, *contents, *(border for match in matches for border in match.span())}
        pieces = []
        for start, end in itertools.pairwise(sorted(borders)):
            part = text[start:end]
            if start in contents and self.family.implied_space:
                part = part.removeprefix(" ")
            pieces.append(_Piece(start, part, ids.get(start)))
        return pieces

    def _content_starts(self, text: str, matches: Sequence[re.Match[str]]) -> set[int]:
        """The places behind role lines."""
        starts = set()
        following = [*(match.start() for match in matches[1:]), len(text)]
        for match, end in zip(matches, following, strict=False):
            if match.group() in self.family.role_markers:
                starts.add(text.find("\n", match.end(), end) + 1)
        return starts - {0}

    def _encode_typed(self, parts: Sequence[str]) -> list[int]:
        """Ids of text, tokenized at once if its tokenizer takes nothing typed for a marker, else cut inside of that.

        Args:
            parts: the text, cut wherever a marker's look-alike was broken.
        """
        ids = self.family.encode_text("".join(parts))
        if len(parts) == 1 or not set(self.family.markers.values()).intersection(ids):
            return ids
        middle = len(parts) // 2
        return self._encode_typed(parts[:middle]) + self._encode_typed(parts[middle:])


def _chatglm(tokenizer: Any) -> Family | None:
    """ChatGLM2 and ChatGLM3: `get_command` knows the ids; inside lies a tokenizer that takes no text for a command."""
    inside: Any = getattr(tokenizer, "tokenizer", None)
    if not (
        hasattr(tokenizer, "get_command") and hasattr(tokenizer, "get_prefix_tokens") and hasattr(inside, "encode")
    ):
        return None
    markers = {}
    for name in (*CHATGLM_COMMANDS, *CHATGLM_ROLES):
        try:
            markers[name] = tokenizer.get_command(name)
        except (AssertionError, KeyError):  # ChatGLM2 has no roles
            continue
    named = {"eos_token": tokenizer.eos_token}
    markers[named["eos_token"]] = tokenizer.get_command("<eos>")
    # Their `build_single_message` encodes role line and content apart, without going through transformers.
    return Family(markers, inside.encode, named, frozenset(CHATGLM_ROLES), implied_space=True)


def _qwen(tokenizer: Any) -> Family | None:
    """QWenTokenizer, which would take special tokens from any text (`allowed_special` is "all" there)."""
    names = {"<|endoftext|>": "eod_id", "<|im_start|>": "im_start_id", "<|im_end|>": "im_end_id"}
    if not all(hasattr(tokenizer, name) for name in names.values()):
        return None
    markers = {text: getattr(tokenizer, name) for text, name in names.items()}

    def encode(text: str) -> list[int]:
        tokens = tokenizer.tokenize(text, allowed_special=set(), disallowed_special=())
        return tokenizer.convert_tokens_to_ids(tokens)

    extra = getattr(tokenizer, "special_tokens", {})
    return Family({**extra, **markers}, encode, {"eos_token": "<|endoftext|>"}, frozenset({"<|im_start|>"}))


def _baichuan(tokenizer: Any) -> Family | None:
    """Baichuan 1 and 2: plain SentencePiece whose reserved pieces 195 and 196 are the roles."""
    if not hasattr(tokenizer, "sp_model") or tokenizer.vocab_size <= max(BAICHUAN_ROLE_IDS):
        return None
    if not all(RESERVED.fullmatch(token) for token in tokenizer.convert_ids_to_tokens(BAICHUAN_ROLE_IDS)):
        return None
    reserved = {token: number for token, number in tokenizer.get_vocab().items() if RESERVED.fullmatch(token)}
    named = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token")}
    markers = {text: tokenizer.convert_tokens_to_ids(text) for text in named.values()}

    def encode(text: str) -> list[int]:
        return tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text, split_special_tokens=True))

    return Family({**reserved, **markers}, encode, named)
