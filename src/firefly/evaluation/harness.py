"""A model of ours as lm-eval sees one: loaded, prompted and computed as chat, generate and serve do it.

Imports lm-eval: `guest.require_harness` comes first.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from dataclasses import replace
from functools import cached_property
from typing import Any, TextIO

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from firefly.console import notice
from firefly.data.schema import Conversation, Message
from firefly.data.templates import TemplateFailure
from firefly.errors import UsageError
from firefly.evaluation.continuations import score_continuations
from firefly.generation.batched import BatchLimits
from firefly.generation.generator import Answer, Generator, make_engine
from firefly.generation.loading import Loaded
from firefly.generation.replies import ReplyFormat
from firefly.generation.settings import GenerationSettings
from firefly.models.serving_memory import context_of
from firefly.translation import translate

UNKNOWN_LENGTH, UNKNOWN_ANSWER = 2048, 256
"""Tokens of a context and of an answer where nothing names them: lm-eval's own."""
UNBOUNDED = 10**9
"""A tokenizer's `model_max_length` from here on says nothing."""
SEED = 1234
DRAWN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Of a task's generation settings, those that an engine of ours knows under the same name."""
NEUTRAL: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "do_sample": False}
"""Settings that mean nothing else at these values."""

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""What is counted, and how many there are → what is called with each number of them that are done."""


def _unseen(label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda done: None)


class HarnessModel(TemplateLM):
    """One of the models of a `Loaded`.

    Prompts that lm-eval renders with the chat template come from the template that the model was trained with, and are
    encoded as in training: a token that is typed in a question stays text, and nothing is added in front. All others
    are encoded as lm-eval's own `hf` does it.

    Args:
        name: which of them.
        with_template: whether it has prompts rendered; only a model with a template may.
        errors: where its notices go, while lm-eval's own words go nowhere.
    """

    def __init__(
        self,
        loaded: Loaded,
        name: str,
        with_template: bool = True,
        progress: Progress = _unseen,
        errors: TextIO | None = None,
    ) -> None:
        super().__init__()
        self.loaded, self.name = loaded, name
        self.served = loaded.served[name]
        self.tokenizer = self.served.tokenizer
        self.encoder = self.served.encoder if with_template else None
        self.progress = progress
        self._errors = errors or sys.stderr
        self._rendered: set[str] = set()
        self._truncated = 0

    # ---- what lm-eval asks of the tokenizer

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @cached_property
    def max_length(self) -> int:
        """Tokens that the model's context holds."""
        stated = getattr(self.tokenizer, "model_max_length", None) or UNBOUNDED
        return context_of(self.loaded.model.config) or (stated if stated < UNBOUNDED else UNKNOWN_LENGTH)

    @property
    def tokenizer_name(self) -> str:
        return self.name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.encoder.template.text if self.encoder and chat_template else None

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if string in self._rendered:
            assert self.encoder is not None
            return self.encoder.encode_protected(string)
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(
        self,
        chat_history: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The prompt of a conversation, or of one whose last reply has been begun (without `add_generation_prompt`).

        Raises:
            UsageError: the template refuses the conversation.
        """
        assert self.encoder is not None
        messages = [_message(each) for each in chat_history]
        try:
            if add_generation_prompt:
                text = self.encoder.render_prompt(messages, tools)
            else:
                begun = self.encoder.protect_document(messages[-1].text)
                text = self.encoder.render_prompt(messages[:-1], tools) + self._gap + begun
        except TemplateFailure as error:
            raise UsageError(
                "eval.template_refuses",
                "the chat template of {name} refuses a question of the task: {problem}. --no_chat_template asks "
                "without a template.",
                name=self.name,
                problem=error.phrase,
            ) from error
        self._rendered.add(text)
        return text

    @cached_property
    def _gap(self) -> str:
        """What the template writes between the prompt and a reply, such as a space or an empty thought."""
        assert self.encoder is not None
        template, reply = self.encoder.template, "firefly-reply"
        asked = Message.of("user", "?")
        try:
            prompt = template.render_prompt(Conversation((asked,)))
            text = template.render(Conversation((asked, Message.of("assistant", reply))))[-1].text
        except TemplateFailure:
            return ""
        between, found, _ = text.removeprefix(prompt).partition(reply)
        return between if found and text.startswith(prompt) else ""

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As TemplateLM has it; behind a rendered prompt, as a reply of the training data would stand there."""
        if context not in self._rendered:
            return super()._encode_pair(context, continuation)
        assert self.encoder is not None
        if self._gap and not context.endswith(self._gap) and not continuation.startswith(self._gap):
            continuation = self._gap + continuation
        stripped = context.rstrip()
        whole = self.encoder.encode_protected(context + continuation)
        before = self.encoder.encode_protected(stripped)
        return before, whole[len(before) :]

    # ---- what it computes

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._fitting(context, continuation) for _, context, continuation in requests]
        self.loaded.select(self.name)
        with redirect_stderr(self._errors), self.progress(translate("likelihoods"), len(pairs)) as tick:
            self._note_truncated(len(pairs))
            scores = score_continuations(self.loaded.model, pairs, tick=tick)
        return [(float(one.logps.sum()), bool(one.likeliest.all())) for one in scores]

    def _fitting(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        """What of both the model's context holds: their end. The last token is predicted only."""
        over = len(context) + len(continuation) - (self.max_length + 1)
        if over <= 0:
            return context, continuation
        self._truncated += 1
        return context[min(over, len(context) - 1) :], continuation[-self.max_length :]

    def _note_truncated(self, total: int) -> None:
        count, self._truncated = self._truncated, 0
        if count:
            notice(
                "eval.truncated",
                "{count} of {total} prompts are longer than the {limit} tokens that {name} has room for: their "
                "beginning was cut off.",
                count=count,
                total=total,
                limit=self.max_length,
                name=self.name,
            )

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            parts = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, parts):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (logp, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += logp
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers. One that is asked for several times is drawn as often, but where the likeliest is taken."""
        asked: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for number, request in enumerate(requests):
            arguments: tuple[Any, ...] = request.args
            context, settings = arguments[:2]
            asked[json.dumps(settings, sort_keys=True, default=str)][context].append(number)
        texts: dict[int, str] = {}
        only = replace(self.loaded, served={self.name: self.served}, unserved={})
        with (
            redirect_stderr(self._errors),
            self.progress(translate("answers"), len(requests)) as tick,
            Generator(make_engine(only, BatchLimits()), only.served) as generator,
        ):
            for contexts in asked.values():
                first: tuple[Any, ...] = requests[next(iter(contexts.values()))[0]].args
                for numbers, answers in self._answered(generator, contexts, first[1]):
                    texts.update(zip(numbers, answers, strict=True))
                    tick(len(numbers))
        return [texts[number] for number in range(len(requests))]

    def _answered(
        self, generator: Generator, contexts: Mapping[str, list[int]], given: Mapping[str, Any]
    ) -> Iterator[tuple[list[int], list[str]]]:
        settings, until = self._drawing(given, generator.engine.context_length)
        room = min(self.max_length, generator.engine.context_length) - settings.max_new_tokens
        by_count: dict[int, list[str]] = defaultdict(list)
        for context, numbers in contexts.items():
            by_count[1 if settings.is_greedy else len(numbers)].append(context)
        for count, asked in by_count.items():
            prompts = [self.tok_encode(context) or [self.prefix_token_id] for context in asked]
            self._truncated += sum(len(prompt) > room for prompt in prompts)
            found = generator.generate((prompt[-room:] for prompt in prompts), settings, count, self.name)
            for context, prompt, answers in zip(asked, prompts, found, strict=True):
                numbers = contexts[context]
                texts = [self._text(answer, prompt, until, context in self._rendered) for answer in answers]
                yield numbers, texts if len(texts) == len(numbers) else texts * len(numbers)
        self._note_truncated(sum(map(len, contexts.values())))

    def _drawing(self, given: Mapping[str, Any], most: int) -> tuple[GenerationSettings, list[str]]:
        """How answers are drawn, and the texts that end them.

        Raises:
            UsageError: the task asks for what no engine of ours does.
        """
        named: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), UNKNOWN_ANSWER))
        eos = self.tokenizer.decode([self.eot_token_id])
        until = [text for text in handle_stop_sequences(named.pop("until", None), eos) if text]
        longest = int(named.pop("max_gen_toks"))
        draws = bool(named.pop("do_sample", False))
        drawn = {key: named.pop(key) for key in DRAWN if key in named}
        for key, value in named.items():
            if value is not None and NEUTRAL.get(key) != value:
                raise UsageError(
                    "eval.generation_key",
                    "a task wants answers with {key} = {value}, which firefly does not compute. Leave the task out, or "
                    "copy its .yaml without the key and name the copy.",
                    key=key,
                    value=value,
                )
        if longest > (half := max(1, min(most, self.max_length) // 2)):
            notice(
                "eval.short_answers",
                "a task wants answers of up to {asked} tokens, and {name} has a context of {most}: they end after "
                "{half}.",
                asked=longest,
                name=self.name,
                most=min(most, self.max_length),
                half=half,
            )
        settings = GenerationSettings(
            max_new_tokens=min(longest, half),
            temperature=float(drawn.get("temperature") or 0.0) if draws else 0.0,
            top_p=float(drawn.get("top_p") or 1.0),
            top_k=int(drawn.get("top_k") or 0),
            min_p=float(drawn.get("min_p") or 0.0),
            repetition_penalty=float(drawn.get("repetition_penalty") or 1.0),
            stop=tuple(text for text in until if text != eos or self.eot_token_id not in self.served.stop_ids),
            seed=SEED,
        )
        return settings, until

    @cached_property
    def _replies(self) -> ReplyFormat:
        assert self.encoder is not None
        return ReplyFormat.of(self.encoder.template)

    def _text(self, answer: Answer, prompt: Sequence[int], until: list[str], is_reply: bool) -> str:
        """The answer without what ends it, without special tokens, and of a reply without its thought."""
        ids = answer.token_ids
        if ids and ids[-1] in self.served.stop_ids:
            ids = ids[:-1]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        if is_reply:
            tail = self.tokenizer.decode(list(prompt[-32:]), skip_special_tokens=False)
            reply = self._replies.parse(answer.text, None, tail)
            text = text if reply.reasoning is None else reply.content.lstrip()
        return postprocess_generated_text(text, until, None)


def _message(given: Mapping[str, Any]) -> Message:
    """A message as lm-eval has them, or as `Message.as_dict` gives it."""
    optional = {
        "reasoning": given.get("reasoning_content"),
        "tool_calls": tuple(given.get("tool_calls") or ()),
        "name": given.get("name"),
        "tool_call_id": given.get("tool_call_id"),
    }
    return Message.of(given["role"], given["content"] or "", **optional)
