"""Chat templates: one Jinja text renders training, chat and server prompts, and is saved beside the weights.

Labels are born with the text: a template's `{% generation %}` marks (or, for a tokenizer's own template without
marks, the comparison of the text with and without each reply) give the character spans that carry loss.
"""

from __future__ import annotations

import datetime
import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from firefly.data.families import TEMPLATE_FOLDER, TEMPLATES, TemplateSpec, family_names, find_family
from firefly.data.render_check import Mark, is_plain, mark
from firefly.data.rendering import ReservedCharacter, render_chat
from firefly.data.schema import Conversation, Message, Rendered, TextPart
from firefly.data.tool_calls import CallStyle, find_call_style
from firefly.errors import UsageError
from firefly.translation import Phrase

__all__ = ["TEMPLATES", "ChatTemplate", "TemplateFailure", "TemplateSpec", "bind_template", "read_template"]

GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
END_OF_THOUGHT = "</think>"
OPENED_THOUGHTS = ("<think>\n", "<think>")
MOST_SHAPES = 4096
"""The most shapes of plain conversations that a template caches as proved."""

SystemRole = Literal["rendered", "refused", "dropped"]


class TemplateFailure(Exception):
    """The template cannot render this conversation; `phrase` says why."""

    def __init__(self, text: str, /, **values: object) -> None:
        self.phrase = Phrase(text, **values)
        super().__init__(self.phrase)


@dataclass(frozen=True)
class ChatTemplate:
    """A template bound to one tokenizer: text, the variables it may use, its stop tokens (first: the one trained).

    Attributes:
        stable: whether a longer conversation's text continues a shorter one's; None: unknown, checked each time.
        on_system: what becomes of a system prompt that the template refuses or drops: it is put in front of the first
            user turn (`merge`), or it is an error.
        thinking: `strip` leaves out the reasoning of every reply.
        date: the day that a template which prints one shows; None: today.
    """

    name: str
    text: str
    stop_tokens: tuple[str, ...]
    stop_ids: tuple[int, ...]
    variables: dict[str, Any] = field(default_factory=dict)
    stable: bool | None = None
    on_system: str = "merge"
    thinking: str = "keep"
    date: datetime.date | None = None

    @cached_property
    def is_marked(self) -> bool:
        return GENERATION_MARK.search(self.text) is not None

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def system_role(self) -> SystemRole:
        """What the template does with a system prompt, probed by rendering one."""
        probe = "firefly-system"
        turns = (Message.of("system", probe), Message.of("user", "?"))
        try:
            return "rendered" if probe in self.render_text(Conversation(turns), prompt=True)[0] else "dropped"
        except TemplateFailure:
            return "refused"

    @cached_property
    def call_style(self) -> CallStyle | None:
        """The form in which the template takes tool calls, probed by rendering; None if it does not render them."""

        def attempt(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str | None:
            try:
                return self._render(messages, {"tools": tools} if tools else {}, prompt=False)[0]
            except TemplateFailure:
                return None

        return find_call_style(attempt)

    @cached_property
    def _proved(self) -> set[Any]:
        """Shapes of conversations of which the template is known to write everything."""
        return set()

    @cached_property
    def folds_reasoning(self) -> bool:
        """Whether reasoning that a record keeps apart has to stand in the content: the template knows thoughts, but not
        the field (DeepSeek-R1)."""
        probe = Message.of("assistant", "?", reasoning="firefly-thought")
        try:
            text = self.render_text(Conversation((Message.of("user", "?"), probe)), prompt=False)[0]
        except TemplateFailure:
            return False
        return "firefly-thought" not in text and END_OF_THOUGHT in self.text

    # ---- what training, chat and server ask for

    def adapt(self, conversation: Conversation) -> Conversation:
        """The conversation as this template can take it: system prompt merged, reasoning left out, as configured; tool
        calls and results with the identifiers and names that it needs.

        Raises:
            TemplateFailure: the template has no place for a system prompt and `on_system` is error, or there is no user
                turn to put it into.
        """
        return self._completed(self._worded(conversation))

    def _worded(self, conversation: Conversation) -> Conversation:
        if self.thinking == "strip":
            conversation = replace(conversation, messages=tuple(map(_without_reasoning, conversation.messages)))
        if any(item.reasoning for item in conversation.messages) and self.folds_reasoning:
            conversation = replace(conversation, messages=tuple(map(_with_thought, conversation.messages)))
        first, *rest = conversation.messages
        if first.role != "system" or self.system_role == "rendered":
            return conversation
        if self.on_system == "error" or not rest or rest[0].role != "user":
            raise TemplateFailure(
                "the chat template {name} has no place for a system prompt (on_system: merge puts it into the first "
                "user turn)",
                name=self.name,
            )
        merged = replace(rest[0], content=(*first.content, TextPart("\n\n"), *rest[0].content))
        return replace(conversation, messages=(merged, *rest[1:]))

    def _completed(self, conversation: Conversation) -> Conversation:
        if not any(item.tool_calls for item in conversation.messages) or self.call_style is None:
            return conversation
        return replace(conversation, messages=self.call_style.complete(conversation.messages))

    def count_replaced_identifiers(self, conversation: Conversation) -> int:
        """How many of its calls' identifiers the template does not take as they are."""
        given = [call.get("id") for item in conversation.messages for call in item.tool_calls]
        if not any(given) or self.call_style is None:
            return 0
        completed = self.call_style.complete(conversation.messages)
        written = [call.get("id") for item in completed for call in item.tool_calls]
        return sum(bool(old) and old != new for old, new in zip(given, written, strict=True))

    def render_prompt(self, conversation: Conversation) -> str:
        """The text up to and including the generation prompt, as `adapt` has it."""
        worded = self._worded(conversation)
        (shown,) = self._prompt(worded)
        self._check_contents(worded, shown)
        self._prove(worded, self._prompt)
        return shown.rendered.text

    def render(self, conversation: Conversation) -> list[Rendered]:
        """Render for training: one text with all its trained spans.

        A template that rewrites earlier turns once more follow (it is not prefix-stable) gives one text for each
        trained reply, rendered as it would be served, with that reply alone as target.

        Raises:
            TemplateFailure: the template refuses the conversation, drops a part of it, or its trained spans cannot be
                found.
        """
        worded = self._worded(conversation)
        texts = self._training(worded)
        for shown in texts:
            self._check_contents(worded, shown)
        self._prove(worded, self._training)
        return [shown.rendered for shown in texts]

    def _prompt(self, worded: Conversation) -> list[_Shown]:
        completed = self._completed(worded)
        text = self.render_text(completed, prompt=True)[0]
        return [_Shown(Rendered(text, ()), len(completed.messages), "prompt")]

    def _training(self, worded: Conversation) -> list[_Shown]:
        conversation = self._completed(worded)
        replies = [i for i, item in enumerate(conversation.messages) if item.role == "assistant"]
        whole = self._stable_whole(conversation, replies)
        if whole is None:
            parts = self._parts(conversation, replies)
            whole = None if self.stable else self._joined(conversation, [shown.rendered for shown in parts])
            if whole is None:
                return parts
        return [_Shown(whole, len(conversation.messages), "whole")]

    def render_text(
        self, conversation: Conversation, *, prompt: bool, upto: int | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The official text of the first `upto` messages and the spans its marks enclose."""
        messages = conversation.as_dicts(upto)
        variables = {"tools": [dict(tool) for tool in conversation.tools]} if conversation.tools else {}
        if any("tool_calls" in item for item in messages):
            if self.call_style is None:
                raise TemplateFailure("the chat template {name} does not write tool calls", name=self.name)
            messages = self.call_style.apply(messages)
        return self._render(messages, variables, prompt=prompt)

    def render_messages(
        self, messages: Sequence[Mapping[str, Any]], *, prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """The official text of messages that are given as the template takes them, and the spans that carry loss."""
        text, spans = self._render(messages, {}, prompt=prompt)
        return text, [self._end_at_stop(text, span) for span in spans]

    # ---- replies and their spans

    def _stable_whole(self, conversation: Conversation, replies: list[int]) -> Rendered | None:
        """The one text of a template whose marks say where replies are; None if it does not serve for all of them."""
        if not any(conversation.messages[index].trained for index in replies):
            return Rendered(self.render_text(conversation, prompt=False)[0], ())
        if not (self.is_marked and self.stable):
            return None
        whole = self._whole(conversation, len(replies))
        # Where earlier replies have no stop token (ChatGLM2, Baichuan), each is closed in a text of its own.
        # So is one whose thinking the official text drops, although the model wrote it (DeepSeek-R1).
        for index, (start, end) in zip(replies, whole.spans, strict=True):
            shown = whole.text[start:end]
            if not shown.endswith(self.stop_tokens) or _lost_thought(conversation.messages[index], shown):
                return None
        return _select(whole, conversation, replies)

    def _parts(self, conversation: Conversation, replies: list[int]) -> list[_Shown]:
        """Each trained reply as it would be served: after its own prompt."""
        served = self._served_marked if self.is_marked else self._served_unmarked
        return [
            _Shown(served(conversation, index, number), index + 1, "reply")
            for number, index in enumerate(replies, start=1)
            if conversation.messages[index].trained
        ]

    def _joined(self, conversation: Conversation, parts: list[Rendered]) -> Rendered | None:
        """One text for all trained replies, if the whole conversation's text holds each just as it would be served."""
        if conversation.messages[-1].role == "assistant" and conversation.messages[-1].trained:
            text = parts[-1].text
        else:
            text = self.render_text(conversation, prompt=False)[0]
        ends = [part.spans[0][1] for part in parts]
        if all(text.startswith(part.text[:end]) for part, end in zip(parts, ends, strict=True)):
            return Rendered(text, tuple(part.spans[0] for part in parts))
        return None

    def _whole(self, conversation: Conversation, replies: int) -> Rendered:
        text, marked = self._marked(conversation, replies)
        spans = [self._end_at_stop(text, span) for span in marked]
        if conversation.messages[-1].role == "assistant":
            text, spans[-1] = self._closed(text, spans[-1])
        return Rendered(text, tuple(spans))

    def _marked(
        self, conversation: Conversation, replies: int, upto: int | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The official text and its marked spans, one for each of its replies."""
        text, marked = self.render_text(conversation, prompt=False, upto=upto)
        if len(marked) != replies:
            raise TemplateFailure(
                "the chat template marks {spans} trained spans for {replies} replies",
                spans=len(marked),
                replies=replies,
            )
        return text, marked

    def _served_marked(self, conversation: Conversation, index: int, number: int) -> Rendered:
        """Reply `index` behind the prompt it would be asked for with."""
        prompt = self.render_text(conversation, prompt=True, upto=index)[0]
        text, marked = self._marked(conversation, number, upto=index + 1)
        text, (start, end) = self._closed(text, self._end_at_stop(text, marked[-1]))
        reply = conversation.messages[index]
        if _lost_thought(reply, text[start:end]):
            return _behind(prompt, reply.text + self.stop_tokens[0])
        if text.startswith(prompt):
            return Rendered(text, ((max(start, len(prompt)), end),))
        if prompt.rstrip().endswith(END_OF_THOUGHT) and END_OF_THOUGHT in text[start:end]:
            raise TemplateFailure(
                "the chat template ends the thought in its generation prompt, and this reply thinks (thinking: strip "
                "leaves the reasoning out)"
            )
        return _behind(prompt, text[start:end])

    def _served_unmarked(self, conversation: Conversation, index: int, number: int) -> Rendered:
        """Reply `index` in an unmarked template: it starts where the generation prompt ends."""
        prompt = self.render_text(conversation, prompt=True, upto=index)[0]
        official = self.render_text(conversation, prompt=False, upto=index + 1)[0]
        reply = conversation.messages[index]
        if reply.tool_calls and official.startswith(prompt):
            text, span = self._closed(official, self._end_at_stop(official, (len(prompt), len(official.rstrip()))))
            return Rendered(text, (span,))
        content = reply.text
        common = len(os.path.commonprefix([prompt, official]))  # noqa: RUF071  (of characters)
        if END_OF_THOUGHT in content and _lost_thought(reply, official[common:]):
            return _behind(prompt, content + self.stop_tokens[0])
        if not official.startswith(prompt):
            raise TemplateFailure("the chat template writes a reply that does not continue its own generation prompt")
        # A prompt may have opened the thought that the content opens again.
        opened = next((x for x in OPENED_THOUGHTS if prompt.endswith(x) and content.startswith(x)), "")
        place = official.find(content, len(prompt) - len(opened))
        if place < 0:
            content = content.strip()
            place = official.find(content, len(prompt) - len(opened))
        if place < 0:
            raise TemplateFailure("the chat template changes the text of a reply")
        after = place + len(content)
        ends = [place + len(stop) for stop in self.stop_tokens if (place := official.find(stop, after)) >= 0]
        if ends:
            return Rendered(official, ((len(prompt), min(ends)),))
        # The last place: a short content may also stand in what the template writes before it.
        closed = official[: official.rfind(content) + len(content)] + self.stop_tokens[0]
        return Rendered(closed, ((len(prompt), len(closed)),))

    def _end_at_stop(self, text: str, span: tuple[int, int]) -> tuple[int, int]:
        """Let a marked span end with the reply's stop token, where the marks leave it out or go on after it."""
        start, end = span
        upto = start + len(text[start:end].rstrip())
        if text[start:upto].endswith(self.stop_tokens):
            return start, upto
        following = text[end:].lstrip()
        stop = next((stop for stop in self.stop_tokens if following.startswith(stop)), None)
        return (start, end) if stop is None else (start, len(text) - len(following) + len(stop))

    def _closed(self, text: str, span: tuple[int, int]) -> tuple[str, tuple[int, int]]:
        """Append the stop token where the official text leaves the last reply open (Qwen1.5, GLM-4, …)."""
        start, end = span
        if text[start:end].endswith(self.stop_tokens) or text[end:].strip():
            return text, span
        text = text[:end] + self.stop_tokens[0]
        return text, (start, len(text))

    # ---- guards: a template may drop what it has no place for; that would be trained, or asked, in silence

    def _check_contents(self, conversation: Conversation, shown: _Shown) -> None:
        """Message parts that a template drops or changes because of their text."""
        text = shown.rendered.text
        for number, item in enumerate(conversation.messages[: shown.messages]):
            content = item.text.strip()
            stands = content in text or (item.role in ("tool", "assistant") and _in_json(content, text))
            lost = []
            if not stands and (item.role != "assistant" or item.tool_calls):
                lost.append(Mark(content, "content", number))
            if item.reasoning and item.reasoning.strip() not in text:
                lost.append(Mark(item.reasoning, "reasoning", number))
            for part in lost:
                if self._is_due(part, conversation, shown):
                    raise self._dropped(part, conversation)

    def _prove(self, conversation: Conversation, texts: Callable[[Conversation], list[_Shown]]) -> None:
        """Message parts that a template drops because of a conversation's shape: renders a copy with every part marked.

        Plain conversations of one shape are proved once.
        """
        shape = None
        if is_plain(conversation):
            turns = (
                (
                    item.role,
                    item.trained,
                    not item.text.strip(),
                    bool(item.reasoning),
                    END_OF_THOUGHT in item.text,
                )
                for item in conversation.messages
            )
            shape = (texts.__name__, *turns)
            if shape in self._proved:
                return
        marked, marks = mark(conversation)
        for shown in texts(marked):
            text = shown.rendered.text.casefold()
            for item in marks:
                if item.text not in text and self._is_due(item, conversation, shown):
                    raise self._dropped(item, conversation)
        if shape is not None and len(self._proved) < MOST_SHAPES:
            self._proved.add(shape)

    def _is_due(self, item: Mark, conversation: Conversation, shown: _Shown) -> bool:
        """Whether a text has to show a part of its conversation.

        Of replies that stand in the prompt of another, official texts drop thoughts and what is said beside calls; of
        those that are not trained, too.
        """
        if item.index is None:
            return True
        if item.index >= shown.messages:
            return False
        reply = conversation.messages[item.index]
        if item.part == "call" or reply.role != "assistant":
            return True
        in_full = reply.trained and (shown.kind != "reply" or item.index == shown.messages - 1)
        if item.part == "reasoning":
            return in_full and (shown.kind != "prompt" or bool(self.stable))
        return in_full and bool(reply.tool_calls)

    def _dropped(self, item: Mark, conversation: Conversation) -> TemplateFailure:
        if item.index is None:
            return TemplateFailure("the chat template {name} does not show the functions in tools", name=self.name)
        dropped = conversation.messages[item.index]
        if item.part == "reasoning":
            return TemplateFailure(
                "the chat template {name} does not write the reasoning of a reply (thinking: strip leaves it out)",
                name=self.name,
            )
        if item.part == "call":
            functions = ", ".join(call["function"]["name"] for call in dropped.tool_calls)
            values = {"name": self.name, "functions": functions, "number": item.index}
            return TemplateFailure(
                "the chat template {name} does not write the calls of message {number} ({functions})", **values
            )
        if dropped.role == "assistant":
            return TemplateFailure(
                "the chat template {name} does not write the text of a reply that calls a function: {text!r}",
                name=self.name,
                text=dropped.text[:40],
            )
        return TemplateFailure(
            "the chat template {name} drops message {number} ({role})",
            name=self.name,
            role=dropped.role,
            number=item.index,
        )

    def _render(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], *, prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        values = self.variables | dict(variables)
        if self.date is not None:
            values = {"date_string": self.date.strftime("%d %b %Y"), "strftime_now": self.date.strftime} | values
        try:
            return render_chat(self.text, messages, values, prompt=prompt)
        except ReservedCharacter:
            raise TemplateFailure(
                "the text holds a character reserved for internal use (U+FDD0, U+FDD1, U+F5A1F or U+F5A20)"
            ) from None
        except RecursionError as error:
            raise TemplateFailure("nested too deeply") from error
        except Exception as error:  # a template is a program from outside: whatever it raises is its refusal
            raise TemplateFailure(
                "the chat template {name} refuses this conversation: {problem}", name=self.name, problem=error
            ) from error


@dataclass(frozen=True, slots=True)
class _Shown:
    """A rendered text and how many of its conversation's messages it holds: all of them, those up to one reply that
    is trained as it would be served, or a prompt."""

    rendered: Rendered
    messages: int
    kind: Literal["whole", "reply", "prompt"]


def _lost_thought(reply: Message, shown: str) -> bool:
    """Whether a reply's thinking stands in its content, but not in the text that shows it."""
    return END_OF_THOUGHT in reply.text and END_OF_THOUGHT not in shown


def _with_thought(item: Message) -> Message:
    if not item.reasoning:
        return item
    thought = f"<think>\n{item.reasoning.strip()}\n{END_OF_THOUGHT}\n\n"
    return replace(item, content=(TextPart(thought), *item.content), reasoning=None)


def _behind(prompt: str, reply: str) -> Rendered:
    """A reply as the model would write it: behind the prompt, without the thought that the prompt has opened.

    Raises:
        TemplateFailure: the prompt has opened a thought, and the reply has none to close it.
    """
    if prompt.endswith(OPENED_THOUGHTS) and END_OF_THOUGHT not in reply:
        raise TemplateFailure("the chat template writes a reply that does not continue its own generation prompt")
    for opened in OPENED_THOUGHTS:
        if prompt.endswith(opened) and reply.startswith(opened):
            reply = reply[len(opened) :]
            break
    return Rendered(prompt + reply, ((len(prompt), len(prompt) + len(reply)),))


def _in_json(content: str, text: str) -> bool:
    return any(json.dumps(content, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True))


def _without_reasoning(item: Message) -> Message:
    if item.role != "assistant":
        return item
    text = item.text
    if END_OF_THOUGHT in text and text.lstrip().startswith("<think>"):
        item = item.with_text(text.split(END_OF_THOUGHT, 1)[1].lstrip())
    return item if item.reasoning is None else replace(item, reasoning=None)


def _select(rendered: Rendered, conversation: Conversation, replies: list[int]) -> Rendered:
    """Keep the spans of replies that are to be trained."""
    kept = (span for span, i in zip(rendered.spans, replies, strict=True) if conversation.messages[i].trained)
    return Rendered(rendered.text, tuple(kept))


# ---- from a name to a template


def bind_template(
    name: str,
    tokenizer: Any,
    eos_ids: tuple[int, ...] = (),
    *,
    on_system: str = "merge",
    thinking: str = "keep",
    date: str | None = None,
) -> ChatTemplate:
    """Return the template `name` (a table name, `auto`, or a path to a .jinja file) bound to `tokenizer`.

    Args:
        eos_ids: further stop ids that the model's generation_config names (kept, so that serving stops there too).
        date: YYYY-MM-DD, for templates that print one; without it they print what they print by themselves.

    Raises:
        UsageError: unknown name, no template in the tokenizer, no date, or a stop that is not one token of it.
    """
    text, stops, stable = _find_template(name, tokenizer)
    if not stops:
        if tokenizer.eos_token is None:
            raise UsageError(
                "template.no_stop",
                "template_name = {name} ends a reply with the tokenizer's EOS token, and this tokenizer has none.",
                name=name,
            )
        stops = (tokenizer.eos_token,)
    ids: dict[str, int] = {}
    for stop in stops:
        encoded = tokenizer.encode(stop, add_special_tokens=False)
        if len(encoded) == 1 and (encoded[0] != tokenizer.unk_token_id or stop == tokenizer.unk_token):
            ids[stop] = encoded[0]
        elif stop == stops[0]:
            raise UsageError(
                "template.stop_not_one_token",
                "template_name = {name} ends a reply with {stop!r}, which is not one token of this tokenizer: the "
                "model could not stop on it. Use the template of this model's family, or auto.",
                name=name,
                stop=stop,
            )
    template = ChatTemplate(
        name=name,
        text=text,
        stop_tokens=tuple(ids),
        stop_ids=tuple(dict.fromkeys((*ids.values(), *eos_ids))),
        variables=_variables(tokenizer),
        stable=stable,
        on_system=on_system,
        thinking=thinking,
        date=None if date is None else parse_date(date),
    )
    if template.date is None and "strftime_now" in text:
        # A run that goes on past midnight still trains one text.
        template = replace(template, date=datetime.date.today())
    return template


def parse_date(date: str) -> datetime.date:
    """Read YYYY-MM-DD.

    Raises:
        UsageError: it is no such date.
    """
    try:
        return datetime.date.fromisoformat(date)
    except ValueError:
        raise UsageError(
            "template.bad_date", "template_date = {value!r} is no date; write YYYY-MM-DD.", value=date
        ) from None


def _variables(tokenizer: Any) -> dict[str, Any]:
    """`bos_token`, `eos_token` and their like, as `apply_chat_template` gives them to a template."""
    return {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}


def read_template(spec: TemplateSpec) -> str:
    """The text of a named template."""
    return spec.preset + (TEMPLATE_FOLDER / spec.file).read_text(encoding="utf-8").removesuffix("\n")


def _find_template(name: str, tokenizer: Any) -> tuple[str, tuple[str, ...], bool | None]:
    """Text, stop tokens, and whether it is prefix-stable."""
    if spec := find_family(name):
        return read_template(spec), spec.stop_tokens, spec.stable
    if name == "auto":
        text = tokenizer.chat_template
        if isinstance(text, dict):
            text = text.get("default")
        if not text:
            raise UsageError(
                "template.tokenizer_has_none",
                "template_name = auto uses the tokenizer's own chat template, and this tokenizer has none. Name one: "
                "{known}, or a path to a .jinja file.",
                known=", ".join(family_names()),
            )
        return text, _own_stops(name, text, tokenizer), None
    if name.endswith(".jinja"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UsageError("template.no_file", "template_name = {path} does not exist.", path=path)
        try:
            text = path.read_text(encoding="utf-8").removesuffix("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise _unusable(name, error) from None
        return text, _own_stops(name, text, tokenizer), None
    raise unknown_template(name, extra=("auto",))


def _unusable(name: str, problem: object) -> UsageError:
    return UsageError(
        "template.unusable",
        "template_name = {name} cannot be used: {problem}. Correct the template, or name another.",
        name=name,
        problem=problem,
    )


def unknown_template(name: str, extra: tuple[str, ...] = ()) -> UsageError:
    """The error that names the nearest known template."""
    known = [*family_names(), *extra]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return UsageError(
        "template.unknown",
        "template_name = {name!r} is unknown; did you mean {near!r}? Known: {known}, or a path to a .jinja file.",
        name=name,
        near=near[0],
        known=", ".join(known),
    )


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
        shown = probe._render(turns, {}, prompt=False)[0]
        if answer not in shown:
            shown = probe._render(turns[:2], {}, prompt=False)[0]
    except TemplateFailure as error:
        raise _unusable(name, error) from None
    if answer not in shown:
        raise _unusable(name, Phrase("the chat template changes the text of a reply"))
    tail = shown.split(answer)[-1]
    specials = [token for token in tokenizer.all_special_tokens if token]
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    places = [(tail.find(token), -len(token), token) for token in {*specials, *added} if tail.find(token) >= 0]
    eos = (tokenizer.eos_token,) if tokenizer.eos_token else ()
    first = (min(places)[2],) if places and not tail[: min(places)[0]].strip() else ()
    # A turn that is followed by the next turn's opening token, not by an end of its own, ends with EOS.
    opening = shown.lstrip().startswith(first) if first else False
    return tuple(dict.fromkeys((*(() if opening else first), *eos)))


def plain_template() -> ChatTemplate:
    """The template of a task that renders no conversation."""
    return ChatTemplate("default", "", ("",), ())
