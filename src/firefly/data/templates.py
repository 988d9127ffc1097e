"""Chat templates: one Jinja text renders training, chat and server prompts, and is saved beside the weights.

Labels are born with the text: a template's `{% generation %}` marks (or, for a tokenizer's own template without
marks, the comparison of the text with and without each reply) give the character spans that carry loss.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from firefly.data.schema import Conversation, Rendered
from firefly.errors import UsageError
from firefly.messages import render as message

TEMPLATE_FOLDER = Path(__file__).parent / "chat_templates"
GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class TemplateFailure(Exception):
    """The template cannot render this conversation; the text says why."""


@dataclass(frozen=True)
class TemplateSpec:
    """A named template: its file, and the tokens that end a reply. No stop tokens: the tokenizer's EOS."""

    file: str
    stop_tokens: tuple[str, ...] = ()


# A name means its family's official wording, default system prompt included.
TEMPLATES: dict[str, TemplateSpec] = {
    "default": TemplateSpec("default.jinja"),
    "qwen": TemplateSpec("qwen2.jinja", ("<|im_end|>", "<|endoftext|>")),
    "qwen1.5": TemplateSpec("qwen1.5.jinja", ("<|im_end|>", "<|endoftext|>")),
    "qwen2.5": TemplateSpec("qwen2.5.jinja", ("<|im_end|>", "<|endoftext|>")),
    "smollm2": TemplateSpec("smollm2.jinja", ("<|im_end|>",)),
}


@dataclass(frozen=True)
class ChatTemplate:
    """A template bound to one tokenizer: text, the variables it may use, its stop tokens (first: the one trained)."""

    name: str
    text: str
    stop_tokens: tuple[str, ...]
    stop_ids: tuple[int, ...]
    variables: dict[str, Any] = field(default_factory=dict)

    @property
    def is_marked(self) -> bool:
        return GENERATION_MARK.search(self.text) is not None

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def render_prompt(self, messages: list[dict[str, str]]) -> str:
        """The text up to and including the generation prompt."""
        return self._render(messages, add_generation_prompt=True)[0]

    def render(self, conversation: Conversation) -> list[Rendered]:
        """Render for training: one text with all its trained spans.

        A template that rewrites earlier turns once more follow (it is not prefix-stable) gives one text for each
        reply, rendered as it would be served, with that reply alone as target.

        Raises:
            TemplateFailure: the template refuses the conversation, or its trained spans cannot be found.
        """
        replies = [i for i, item in enumerate(conversation.messages) if item.role == "assistant"]
        if self.is_marked:
            return self._render_marked(conversation, replies)
        text = self._render(conversation.as_dicts(), add_generation_prompt=False)[0]
        parts = [self._reply(conversation, index) for index in replies]
        if not parts:
            return [Rendered(text, ())]
        if all(text.startswith(part.upto_stop) for part in parts[:-1]) and text.startswith(parts[-1].official):
            # Only the last reply can lack its stop token: text that follows would have brought one.
            whole = parts[-1].closed if text == parts[-1].official else text
            return [_select(Rendered(whole, tuple(part.span for part in parts)), conversation, replies)]
        return [
            Rendered(part.closed, (part.span,))
            for part, index in zip(parts, replies, strict=True)
            if conversation.messages[index].trained
        ]

    def _render_marked(self, conversation: Conversation, replies: list[int]) -> list[Rendered]:
        whole = self._render_spans(conversation.as_dicts(), len(replies))
        if self.name in TEMPLATES:  # ours are prefix-stable, and their marks exact
            return [_select(whole, conversation, replies)]
        parts = []
        for number, index in enumerate(replies, start=1):
            prompt = self.render_prompt(conversation.as_dicts(index))
            part = self._render_spans(conversation.as_dicts(index + 1), number)
            if not part.text.startswith(prompt):
                raise TemplateFailure(message("template.no_prefix"))
            start, end = part.spans[-1]
            parts.append(Rendered(part.text, ((max(start, len(prompt)), end),)))
        spans = tuple(part.spans[0] for part in parts)
        if all(whole.text.startswith(part.text[:end]) for part, (_, end) in zip(parts, spans, strict=True)):
            return [_select(Rendered(whole.text, spans), conversation, replies)]
        return [part for part, i in zip(parts, replies, strict=True) if conversation.messages[i].trained]

    def _render_spans(self, messages: list[dict[str, str]], replies: int) -> Rendered:
        text, marked = self._render(messages, add_generation_prompt=False)
        if len(marked) != replies:
            raise TemplateFailure(message("template.span_count", spans=len(marked), replies=replies))
        spans = [self._end_at_stop(text, span) for span in marked]
        if messages[-1]["role"] == "assistant":
            start, end = spans[-1]
            if not text[start:end].endswith(self.stop_tokens) and not text[end:].strip():
                # The official text leaves the last reply open (Qwen1.5, GLM-4, …).
                text = text[:end] + self.stop_tokens[0]
                spans[-1] = (start, len(text))
        return Rendered(text, tuple(spans))

    def _end_at_stop(self, text: str, span: tuple[int, int]) -> tuple[int, int]:
        """Let a marked span end with the reply's stop token, where the marks leave it out or go on after it."""
        start, end = span
        upto = start + len(text[start:end].rstrip())
        if text[start:upto].endswith(self.stop_tokens):
            return start, upto
        following = text[end:].lstrip()
        stop = next((stop for stop in self.stop_tokens if following.startswith(stop)), None)
        return (start, end) if stop is None else (start, len(text) - len(following) + len(stop))

    def _reply(self, conversation: Conversation, index: int) -> _Reply:
        """Find reply `index`: it starts where the generation prompt ends, and ends with its stop token."""
        prompt = self.render_prompt(conversation.as_dicts(index))
        official = self._render(conversation.as_dicts(index + 1), add_generation_prompt=False)[0]
        if not official.startswith(prompt):
            raise TemplateFailure(message("template.no_prefix"))
        content = conversation.messages[index].content
        place = official.find(content, len(prompt))
        if place < 0:
            content = content.strip()
            place = official.find(content, len(prompt))
        if place < 0:
            raise TemplateFailure(message("template.content_changed"))
        after = place + len(content)
        ends = [place + len(stop) for stop in self.stop_tokens if (place := official.find(stop, after)) >= 0]
        if ends:
            return _Reply(official, official, (len(prompt), min(ends)))
        # The last place: a short content may also stand in what the template writes before it.
        closed = official[: official.rfind(content) + len(content)] + self.stop_tokens[0]
        return _Reply(official, closed, (len(prompt), len(closed)))

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                conversations=[messages],
                chat_template=self.text,
                add_generation_prompt=add_generation_prompt,
                # Prompts are asked for from many threads of a server, and the marks' tracker belongs to one at a time.
                return_assistant_tokens_mask=self.is_marked and not add_generation_prompt,
                **self.variables,
            )
        except Exception as error:  # a template is a program from outside: whatever it raises is its refusal
            raise TemplateFailure(message("template.refused", name=self.name, problem=error)) from error
        texts, spans = rendered
        return texts[0], list(spans[0]) if spans else []


@dataclass(frozen=True)
class _Reply:
    """One reply found in an unmarked template's text, which may lack a stop token that `closed` then has."""

    official: str
    closed: str
    span: tuple[int, int]

    @property
    def upto_stop(self) -> str:
        return self.closed[: self.span[1]]


def _select(rendered: Rendered, conversation: Conversation, replies: list[int]) -> Rendered:
    """Keep the spans of replies that are to be trained."""
    kept = (span for span, i in zip(rendered.spans, replies, strict=True) if conversation.messages[i].trained)
    return Rendered(rendered.text, tuple(kept))


def bind_template(name: str, tokenizer: Any, eos_ids: tuple[int, ...] = ()) -> ChatTemplate:
    """Return the template `name` (a table name, `auto`, or a path to a .jinja file) bound to `tokenizer`.

    Args:
        eos_ids: further stop ids that the model's generation_config names (kept, so that serving stops there too).

    Raises:
        UsageError: unknown name, no template in the tokenizer, or a stop that is not one token of it.
    """
    text, stops = _find_template(name, tokenizer)
    if not stops:
        if tokenizer.eos_token is None:
            raise UsageError("template.no_stop", name=name)
        stops = (tokenizer.eos_token,)
    ids: dict[str, int] = {}
    for stop in stops:
        encoded = tokenizer.encode(stop, add_special_tokens=False)
        if len(encoded) == 1 and (encoded[0] != tokenizer.unk_token_id or stop == tokenizer.unk_token):
            ids[stop] = encoded[0]
        elif stop == stops[0]:
            raise UsageError("template.stop_not_one_token", name=name, stop=stop)
    return ChatTemplate(
        name=name,
        text=text,
        stop_tokens=tuple(ids),
        stop_ids=tuple(dict.fromkeys((*ids.values(), *eos_ids))),
        variables=_variables(tokenizer),
    )


def _variables(tokenizer: Any) -> dict[str, Any]:
    """`bos_token`, `eos_token` and their like, as `apply_chat_template` gives them to a template."""
    return {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}


def _find_template(name: str, tokenizer: Any) -> tuple[str, tuple[str, ...]]:
    if name in TEMPLATES:
        spec = TEMPLATES[name]
        return (TEMPLATE_FOLDER / spec.file).read_text(encoding="utf-8").removesuffix("\n"), spec.stop_tokens
    if name == "auto":
        text = tokenizer.chat_template
        if isinstance(text, dict):
            text = text.get("default")
        if not text:
            raise UsageError("template.tokenizer_has_none", known=", ".join(TEMPLATES))
        return text, _own_stops(name, text, tokenizer)
    if name.endswith(".jinja"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UsageError("template.no_file", path=path)
        try:
            text = path.read_text(encoding="utf-8").removesuffix("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError("template.unusable", name=name, problem=error) from None
        return text, _own_stops(name, text, tokenizer)
    near = difflib.get_close_matches(name, [*TEMPLATES, "auto"], n=1, cutoff=0.0)
    raise UsageError("template.unknown", name=name, near=near[0], known=", ".join([*TEMPLATES, "auto"]))


def _own_stops(name: str, text: str, tokenizer: Any) -> tuple[str, ...]:
    """What a template without an entry here writes after a reply: the special token that first follows a known answer.

    Base models often carry a chat template whose turn end (`<|im_end|>`) is not their EOS (`<|endoftext|>`).
    """
    answer = "firefly-reply"
    question = {"role": "user", "content": "?"}
    turns = [question, {"role": "assistant", "content": answer}, question]
    probe = ChatTemplate(name, text, ("",), (), _variables(tokenizer))
    try:
        # The last turn may be left open, so an earlier one is asked first; a template may drop that one's text.
        shown = probe._render(turns, add_generation_prompt=False)[0]
        if answer not in shown:
            shown = probe._render(turns[:2], add_generation_prompt=False)[0]
    except TemplateFailure as error:
        raise UsageError("template.unusable", name=name, problem=error) from None
    if answer not in shown:
        raise UsageError("template.unusable", name=name, problem=message("template.content_changed"))
    tail = shown.split(answer)[-1]
    specials = [token for token in tokenizer.all_special_tokens if token]
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    places = [(tail.find(token), -len(token), token) for token in {*specials, *added} if tail.find(token) >= 0]
    eos = (tokenizer.eos_token,) if tokenizer.eos_token else ()
    first = (min(places)[2],) if places and not tail[: min(places)[0]].strip() else ()
    # A turn that is followed by the next turn's opening token, not by an end of its own, ends with EOS.
    opening = shown.lstrip().startswith(first) if first else False
    return tuple(dict.fromkeys((*(() if opening else first), *eos)))
