"""The template certificate: proof that what is trained is what chat and servers will ask with.

For some probe conversations, ids equal `apply_chat_template`'s, each prompt is a prefix of the trained text, and every
reply ends with a trained stop token. The hash of their ids is saved with the weights; chat and merge compute it again.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from firefly.console import notice
from firefly.data.encoding import Encoder
from firefly.data.schema import Conversation, Message
from firefly.data.slow_tokenizers import SlowTokenizer
from firefly.data.templates import TemplateFailure
from firefly.errors import UsageError

FILE_NAME = "template_certificate.json"
IDS, PREFIX, STOPS = "ids_equal_apply_chat_template", "prompt_is_prefix_of_training", "stop_trained_in_every_reply"

_CONTENTS = (
    "Hello, who are you?",
    "I am a language model.\n\n1. One\n2. Two",
    "  leading and trailing white space \n",
    "中文回答，带有“引号”和 emoji 🙂。",
    "{{ braces }} and {% tags %} stay text",
    "```python\nprint('</b>')\n```",
)


def probe_conversations() -> list[Conversation]:
    """Conversations of one to three turns, with and without a system prompt."""
    conversations = []
    for turns in (1, 2, 3):
        for system in (None, "You answer in one sentence."):
            messages = [] if system is None else [Message.of("system", system)]
            for number in range(turns):
                messages.append(Message.of("user", _CONTENTS[2 * number]))
                messages.append(Message.of("assistant", _CONTENTS[2 * number + 1]))
            conversations.append(Conversation(tuple(messages)))
    return conversations


@dataclass(frozen=True)
class Check:
    """One property; `detail` says what was compared, or where it failed."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Certificate:
    """What was proved of one template on one tokenizer."""

    template: str
    template_sha256: str
    stop_token: str
    stop_id: int
    on_system: str
    thinking: str
    date: str | None
    hash: str
    checks: tuple[Check, ...]
    allow_special_in_content: bool = False

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def certify(encoder: Encoder, stop_ids: Sequence[int] | None = None) -> Certificate:
    """Put the template to the proof.

    Args:
        stop_ids: the `eos_token_id` of the model's generation_config, if it is known.
    """
    template = encoder.template
    stop, stop_id = template.stop_tokens[0], template.stop_ids[0]
    checks = [*_check_conversations(encoder), Check("stop_is_one_token", True, f"{stop} = {stop_id}")]
    if stop_ids is not None:
        checks.append(Check("stop_in_generation_config", stop_id in stop_ids, f"{stop_id} in {list(stop_ids)}"))
    return Certificate(
        template=template.name,
        template_sha256=template.hash,
        stop_token=stop,
        stop_id=stop_id,
        on_system=template.on_system,
        thinking=template.thinking,
        date=None if template.date is None else template.date.isoformat(),
        hash=probe_hash(encoder),
        checks=tuple(checks),
        allow_special_in_content=encoder.allow_special_in_content,
    )


def _check_conversations(encoder: Encoder) -> list[Check]:
    """Three properties of every conversation that the template takes."""
    template, compared, faults = encoder.template, Counter[str](), dict[str, str]()
    by_piece = isinstance(encoder.tokenizer, SlowTokenizer)  # cuts before a reply, where one text has no cut
    is_dated = template.date not in (None, datetime.date.today()) and "strftime_now" in template.text

    def see(check: str, holds: bool, place: str) -> None:
        compared[check] += 1
        if not holds:
            faults.setdefault(check, place)

    usable = [item for item in probe_conversations() if _accepts(encoder, item)]
    for number, conversation in enumerate(usable):
        rendered = encoder.render(conversation)
        encoded = encoder.label(rendered, encoder.tokenize(rendered))
        adapted = template.adapt(conversation)
        replies = [index for index, item in enumerate(adapted.messages) if item.role == "assistant"]
        # Ids of every prompt, and of a whole text but for replies that one tokenization would join to their prompts.
        for index in () if is_dated else replies:
            prompt = adapted.messages[:index]
            same = _official(encoder, Conversation(prompt), prompt=True) == encoder.encode_prompt(prompt)
            see(IDS, same, f"prompt {index} of conversation {number}")
        if len(encoded) == 1 and not encoded[0].joined and not by_piece and not is_dated:
            ids, official = encoded[0].examples[0].input_ids.tolist(), _official(encoder, adapted, prompt=False)
            # What follows the last trained reply is left out, and a stop that the official text lacks is added.
            same = ids in (official[: len(ids)], [*official, template.stop_ids[0]])
            see(IDS, same, f"conversation {number}")
        # What is asked with is what the trained reply follows, and each reply ends with a stop token.
        runs = [(tokens.input_ids, *run) for text in encoded for tokens in text.examples for run in tokens.runs]
        replies = [index for index, item in enumerate(conversation.messages) if item.role == "assistant"]
        for (ids, start, _), index in zip(runs, replies, strict=False):
            prompt = encoder.encode_prompt(conversation.messages[:index])
            see(PREFIX, ids[:start].tolist() == prompt, f"reply {index} of conversation {number}")
        stopped = all(int(ids[end - 1]) in template.stop_ids for ids, _, end in runs)
        place = f"conversation {number}: {len(runs)} trained runs for {len(replies)} replies"
        see(STOPS, stopped and len(runs) == len(replies), place)
    how = ": prompts, both tokenized by our adapter; the model's own chat code was not compared" if by_piece else ""
    texts = {
        IDS: f"{compared[IDS]} texts{how}",
        PREFIX: f"{compared[PREFIX]} replies",
        STOPS: f"{compared[PREFIX]} replies",
    }
    checks = [
        Check(name, bool(compared[name]) and name not in faults, faults.get(name, text)) for name, text in texts.items()
    ]
    if is_dated:
        checks[0] = Check(IDS, True, "not compared: apply_chat_template prints today's date")
    return checks


def probe_hash(encoder: Encoder) -> str:
    """Hash of the stop token and of every prompt of the probe conversations, as ids."""
    digest = hashlib.sha256(str(encoder.template.stop_ids[0]).encode())
    for conversation in probe_conversations():
        for index, item in enumerate(conversation.messages):
            if item.role == "assistant":
                try:
                    ids = encoder.encode_prompt(conversation.messages[:index])
                except TemplateFailure:
                    ids = []
                digest.update(json.dumps(ids).encode())
    return digest.hexdigest()


def recheck(folder: Path, encoder: Encoder, force: bool = False) -> None:
    """Compare with the certificate that was stored beside an adapter or model; nothing to do where there is none.

    Raises:
        UsageError: the prompts or the stop token are not those it was trained with, and `force` is false.
    """
    stored = read_certificate(folder)
    if stored is None or stored.get("hash") == probe_hash(encoder):
        return
    values = {"path": folder / FILE_NAME, "name": encoder.template.name, "trained": stored.get("template")}
    if not force:
        raise UsageError(
            "certificate.mismatch",
            "{path}: this model was trained with the template {trained}; with {name} its prompts would be other ids "
            "than those it learnt. Use the template and tokenizer saved with it (--template_name auto), or --force.",
            **values,
        )
    notice(
        "certificate.forced",
        "{path}: trained with the template {trained}, used with {name}: the prompts differ from those it learnt.",
        **values,
    )


def read_certificate(folder: Path) -> dict[str, Any] | None:
    """The stored certificate of a folder, or of the run folder it lies in (a checkpoint); None if there is none."""
    for place in (folder, folder.parent):
        path = place / FILE_NAME
        if path.is_file():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                return None
            return stored if isinstance(stored, dict) else None
    return None


def trained_template_options(folder: Path) -> dict[str, Any]:
    """The arguments of `bind_template` that a run was trained with."""
    stored = read_certificate(folder) or {}
    return {name: stored[name] for name in ("on_system", "thinking", "date") if stored.get(name) is not None}


def allows_special(folder: Path) -> bool:
    """Whether a run was trained with `allow_special_in_content`: what users type is then encoded as it was there."""
    return bool((read_certificate(folder) or {}).get("allow_special_in_content"))


def _accepts(encoder: Encoder, conversation: Conversation) -> bool:
    try:
        encoder.render(conversation)
    except TemplateFailure:
        return False
    return True


def _official(encoder: Encoder, conversation: Conversation, prompt: bool) -> list[int]:
    template, extra = encoder.template, {}
    if template.date is not None:
        extra["date_string"] = template.date.strftime("%d %b %Y")
    ids = encoder.tokenizer.apply_chat_template(
        conversation.as_dicts(),
        chat_template=template.text,
        add_generation_prompt=prompt,
        tokenize=True,
        return_dict=False,
        **extra,
    )
    return list(ids)
