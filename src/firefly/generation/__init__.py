"""A model that answers: loaded once, prompted with the template it was trained with, streamed token by token.

Nothing here touches the state of the process: each request draws its tokens from a random generator of its own, so
several may run beside each other or beside a training run.
"""

from __future__ import annotations

import os
import threading
from collections import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TopPLogitsWarper,
)

from firefly.config import ModelConfig, PrecisionConfig
from firefly.data.certificate import allows_special, recheck, trained_template_options
from firefly.data.encoding import Encoder
from firefly.data.schema import Message
from firefly.data.templates import bind_template
from firefly.errors import UsageError
from firefly.models.adapter_loading import load_adapter
from firefly.models.loading import eos_ids, load_model, load_tokenizer, resolve_model
from firefly.models.precision import pick_device, resolve_precision
from firefly.models.saved_adapter import (
    base_of_adapter,
    check_base,
    is_adapter,
    open_adapter,
    tokenizer_source,
)
from firefly.models.scores import ADAPTER_TASK, as_classifier, refuse_scores


@dataclass(frozen=True)
class GenerationSettings:
    """How an answer is drawn; the defaults are the tutorial's. Temperature 0 takes the likeliest token each time."""

    max_new_tokens: int = 500
    top_p: float = 0.9
    temperature: float = 0.35
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "≥ 1"),
            ("top_p", 0 < self.top_p <= 1, "0 < x ≤ 1"),
            ("temperature", self.temperature >= 0, "≥ 0"),
            ("repetition_penalty", self.repetition_penalty > 0, "> 0"),
        ):
            if not valid:
                raise UsageError(
                    "chat.bad_setting",
                    "--{option} = {value} is not valid: {expected}.",
                    option=name,
                    value=getattr(self, name),
                    expected=expected,
                )


class TokenSampler(LogitsProcessor):
    """Draws each token itself, from a random generator of its own, and leaves `generate` one finite logit to take.

    transformers' own sampling draws from the random state of the process, which other requests and a training run
    share: with that, a seed repeats an answer only if nothing else draws meanwhile, and setting it disturbs the others.
    """

    def __init__(self, settings: GenerationSettings, device: torch.device) -> None:
        self.generator = torch.Generator(device)
        if settings.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(settings.seed)
        self.shape = LogitsProcessorList([TemperatureLogitsWarper(float(settings.temperature))])
        if settings.top_p < 1:
            self.shape.append(TopPLogitsWarper(settings.top_p))

    def __call__(self, input_ids: Any, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        probabilities = torch.softmax(self.shape(input_ids, scores), dim=-1)
        chosen = torch.multinomial(probabilities, 1, generator=self.generator)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


@dataclass(frozen=True)
class Generator:
    """A model, its tokenizer and template, ready to answer."""

    model: Any
    encoder: Encoder
    name: str

    @classmethod
    def load(
        cls,
        model: ModelConfig,
        adapter: str | os.PathLike[str] | None = None,
        template_name: str = "auto",
        load_in_4bit: bool = False,
        force: bool = False,
    ) -> Generator:
        """Load a model, or an unmerged adapter on its base (which the adapter names if `model` does not).

        Args:
            force: go on although the prompts are not those that the certificate beside the weights was made of, or the
                base is not the one that the adapter was trained on.

        Raises:
            UsageError: nothing found there, adapter and base do not fit, no usable template, or another one than the
                model was trained with.
        """
        adapter = None if adapter is None else os.fspath(adapter)
        if adapter is None and not model.name_or_path:
            raise UsageError(
                "chat.no_model",
                "no model given. Name one with --model_name_or_path (a folder, a hub id or smollm2-135m-instruct), or "
                "a trained adapter with --adapter_name_or_path.",
            )
        if adapter is None and is_adapter(model.name_or_path):
            adapter, model = model.name_or_path, replace(model, name_or_path="")
        saved = open_adapter(adapter) if adapter else None
        model = base_of_adapter(adapter, model) if adapter else model
        device = pick_device()
        precision = resolve_precision(PrecisionConfig(), device)
        loaded = load_model(model, "qlora" if load_in_4bit else "lora", precision, device)
        if saved and saved.settings.task_type == ADAPTER_TASK:
            loaded = as_classifier(loaded)
        refuse_scores(loaded, adapter or model.name_or_path)
        if adapter and saved:
            check_base(adapter, model, force)
            loaded = load_adapter(loaded, saved)
        loaded.eval()
        loaded.config.use_cache = True
        tokenizer = load_tokenizer(model, tokenizer_source(model, adapter))
        stops = eos_ids(loaded.generation_config)
        trained = saved.folder if saved else Path(resolve_model(model))
        template = bind_template(template_name, tokenizer, eos_ids=stops, **trained_template_options(trained))
        encoder = Encoder(tokenizer, template, allows_special(trained))
        recheck(trained, encoder, force)
        return cls(loaded, encoder, adapter or model.name_or_path)

    def stream(
        self, messages: Sequence[Message], settings: GenerationSettings, stop: threading.Event | None = None
    ) -> abc.Generator[str, None, None]:
        """Yield the answer's text as it is generated. Setting `stop` ends it after the current token.

        Raises:
            TemplateFailure: the template refuses these messages.
        """
        ids = torch.tensor([self.encoder.encode_prompt(messages)], device=self.model.device)
        samplers = [TokenSampler(settings, self.model.device)] if settings.temperature > 0 else []
        streamer = TextIteratorStreamer(self.encoder.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop = stop or threading.Event()
        failure: list[BaseException] = []

        def generate() -> None:
            try:
                with torch.inference_mode():
                    self.model.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        eos_token_id=list(self.encoder.template.stop_ids),
                        pad_token_id=self.encoder.template.stop_ids[0],
                        max_new_tokens=settings.max_new_tokens,
                        repetition_penalty=settings.repetition_penalty,
                        do_sample=False,  # the sampler has drawn
                        temperature=None,
                        top_p=None,
                        top_k=None,
                        logits_processor=LogitsProcessorList(samplers),
                        stopping_criteria=StoppingCriteriaList([StopWhenSet(stop)]),
                        streamer=streamer,
                    )
            except BaseException as error:  # handed to the reader, who waits on the streamer
                failure.append(error)
                # Not streamer.end(): it decodes what is left, which may be what failed.
                streamer.text_queue.put(streamer.stop_signal)

        worker = threading.Thread(target=generate, daemon=True)
        worker.start()
        try:
            yield from streamer
        finally:
            stop.set()
            worker.join()
        if failure:
            raise failure[0]

    def answer(self, messages: Sequence[Message], settings: GenerationSettings) -> str:
        """The whole answer, without surrounding white space."""
        return "".join(self.stream(messages, settings)).strip()


class StopWhenSet(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)
