"""What a request may say. A field that this server does not know, or does not honour, is an error and never ignored,
but for values that ask for nothing: those clients send by themselves."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from firefly.generation import GenerationSettings
from firefly.server.errors import ApiError
from firefly.translation import translate

MOST_ANSWERS = 128
"""Answers to one request: prompts × n."""
MOST_LOGPROBS = 20
MOST_MESSAGES = 4096
MOST_TOOLS = 256
GREEDY_BELOW = 1e-5
"""A temperature that only the likeliest token survives, whatever the rounding."""

LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
"""Fields that say something about a request to OpenAI's own accounts and caches, and nothing about its answer."""

Penalty = Annotated[float, Field(ge=-2, le=2)]
Stop = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0)]


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object that a body holds.

    Raises:
        ApiError: it holds none.
    """
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, "invalid_json", translate("the body is no JSON: {problem}.", problem=problem)) from None
    if not isinstance(value, dict):
        raise ApiError(400, "invalid_json", translate("the body must be a JSON object."))
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


class Body(BaseModel):
    """Fields of a request. `neutral` are those that are not done, with the values that ask for nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Self:
        """Check a request.

        Raises:
            ApiError: a field is unknown, not supported or not valid.
        """
        values = {name: value for name, value in given.items() if value is not None and name not in LABELS}
        for name, accepted in cls.neutral.items():
            if name in values and values.pop(name) not in accepted:
                raise ApiError(
                    400,
                    "unsupported_parameter",
                    translate("{field} is not supported by this server; leave it out.", field=name),
                    name,
                )
        for name in values:
            if name not in cls.model_fields:
                near = difflib.get_close_matches(name, cls.model_fields, n=1, cutoff=0.8)
                raise ApiError(
                    400,
                    "unknown_parameter",
                    translate("{field} is unknown; did you mean {near}?", field=name, near=near[0])
                    if near
                    else translate("{field} is unknown to this server.", field=name),
                    name,
                )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=False, include_input=False)
            name, *within = found[0]["loc"]
            place = f"{name}[{within[0]}]" if within and isinstance(within[0], int) else str(name)
            # A field that takes several forms has an error for each of them.
            problem = "; or: ".join(dict.fromkeys(each["msg"] for each in found if each["loc"][0] == name))
            raise ApiError(
                400,
                "invalid_value",
                translate("{field} is not valid: {problem}.", field=place, problem=problem),
                str(name),
            ) from None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Sampling(Body):
    """What chat and text completions have in common."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=64)] = []
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] = []
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    ignore_eos: bool = False

    def settings(self, defaults: GenerationSettings, max_new_tokens: int, logprobs: int | None) -> GenerationSettings:
        """How the answers are drawn; `defaults` has what the request leaves open."""
        temperature = defaults.temperature if self.temperature is None else self.temperature
        return GenerationSettings(
            max_new_tokens=max_new_tokens,
            temperature=temperature if temperature > GREEDY_BELOW else 0.0,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.biases(),
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            seed=self.seed,
            logprobs=logprobs,
            ignore_stop_tokens=self.ignore_eos,
        )

    def biases(self) -> dict[int, float]:
        if not all(name.isascii() and name.isdecimal() and len(name) < 10 for name in self.logit_bias):
            raise ApiError(
                400,
                "invalid_value",
                translate("{field} is not valid: {problem}.", field="logit_bias", problem="its keys are token ids"),
                "logit_bias",
            )
        return {int(name): bias for name, bias in self.logit_bias.items()}

    def named_tokens(self) -> list[int]:
        """Every token that the request names by its id."""
        return [*self.biases(), *self.stop_token_ids]


NOT_DONE = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "length_penalty": (1,),
    "include_stop_str_in_output": (False,),
    "prompt_logprobs": (),
    "add_special_tokens": (),
    "skip_special_tokens": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}


class ChatBody(Sampling):
    """A request to /v1/chat/completions."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = NOT_DONE | {
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": (),
        "verbosity": (),
        "web_search_options": (),
        "functions": ([],),
        "function_call": ("none",),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "echo": (False,),
        "best_of": (1,),
        "suffix": (),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "documents": (),
    }

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=MOST_TOOLS)] = []
    tool_choice: Any = None
    parallel_tool_calls: bool = True

    @property
    def asked_tokens(self) -> int | None:
        """The longest answer that is asked for.

        Raises:
            ApiError: two fields name two of them.
        """
        both = {each for each in (self.max_tokens, self.max_completion_tokens) if each is not None}
        if len(both) > 1:
            raise ApiError(
                400,
                "invalid_value",
                translate("max_tokens and max_completion_tokens differ; give one of them."),
                "max_tokens",
            )
        return next(iter(both), None)

    @property
    def asked_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "invalid_value", translate("top_logprobs needs logprobs: true."), "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools that the model may call: what cannot be forced on it is refused.

        Raises:
            ApiError: a choice of tools that this server cannot enforce.
        """
        if self.tool_choice not in (None, "none", "auto"):
            raise ApiError(
                400,
                "unsupported_parameter",
                translate(
                    "tool_choice = {value} cannot be forced on a model by this server; it takes none and auto.",
                    value=json.dumps(self.tool_choice),
                ),
                "tool_choice",
            )
        if self.tool_choice == "none":
            return []
        if self.tool_choice == "auto" and not self.tools:
            raise ApiError(400, "invalid_value", translate("tool_choice needs tools."), "tool_choice")
        if self.tools and not self.parallel_tool_calls:
            raise ApiError(
                400,
                "unsupported_parameter",
                translate("parallel_tool_calls = false cannot be forced on a model by this server; leave it out."),
                "parallel_tool_calls",
            )
        return self.tools


class CompletionBody(Sampling):
    """A request to /v1/completions."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = NOT_DONE | {
        "suffix": ("",),
        "response_format": ({"type": "text"},),
    }

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    max_tokens: Annotated[int, Field(ge=0)] = 16
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """Each prompt, as text or ids.

        Raises:
            ApiError: more answers than one request may have, or fields that contradict each other.
        """
        if isinstance(self.prompt, str):
            found: Any = [self.prompt]
        else:
            found = [self.prompt] if isinstance(self.prompt[0], int) else self.prompt
        if len(found) * self.n > MOST_ANSWERS:
            raise ApiError(
                400,
                "too_many_answers",
                translate(
                    "{count} answers (prompts × n) are asked for; one request may have {most}.",
                    count=len(found) * self.n,
                    most=MOST_ANSWERS,
                ),
                "n" if self.n > 1 else "prompt",
            )
        if self.best_of not in (None, self.n):
            raise ApiError(
                400,
                "unsupported_parameter",
                translate("{field} is not supported by this server; leave it out.", field="best_of"),
                "best_of",
            )
        if self.max_tokens == 0 and not (self.echo and self.n == 1):
            raise ApiError(400, "invalid_value", translate("max_tokens = 0 needs echo, and n = 1."), "max_tokens")
        return found


class TutorialBody(Body):
    """A request to /firefly: the question and the arguments of `generate` beside it."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"num_beams": (1,), "num_return_sequences": (1,)}

    inputs: str
    model: str | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    do_sample: bool = True
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] = 0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None

    def settings(self, defaults: GenerationSettings, max_new_tokens: int) -> GenerationSettings:
        temperature = defaults.temperature if self.temperature is None else self.temperature
        return GenerationSettings(
            max_new_tokens=max_new_tokens,
            temperature=temperature if self.do_sample and temperature > GREEDY_BELOW else 0.0,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )


def json_number(value: float) -> float | None:
    """A log-probability as JSON has numbers: it has no infinity."""
    return value if math.isfinite(value) else -9999.0
