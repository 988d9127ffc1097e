"""How an answer is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from firefly.errors import UsageError


@dataclass(frozen=True)
class GenerationSettings:
    """How an answer is drawn; the defaults are the tutorial's.

    Attributes:
        max_new_tokens: the longest answer, its stop token included.
        temperature: 0 takes the likeliest token each time.
        top_p: draw among the likeliest tokens that have this probability together (nucleus sampling, arXiv:1904.09751).
        top_k: draw among so many of the likeliest tokens; 0: among all.
        min_p: leave out tokens less likely than this part of the likeliest one (arXiv:2407.01082).
        repetition_penalty: divides the positive and multiplies the negative logits of tokens that stand in the prompt
            or the answer (arXiv:1909.05858).
        presence_penalty, frequency_penalty: what is taken off the logit of a token that the answer holds: once, and for
            each time that it stands there (OpenAI's).
        logit_bias: token → what is added to its logit.
        stop: texts that end the answer, and are no part of it.
        seed: the same seed, prompt and number of the answer give the same answer, whatever is generated beside it.
        logprobs: report the log-probability of each token of the answer, and of so many of the likeliest tokens in its
            place, all of them as the model gives them: before penalties, temperature and truncation. None: of none.
        ignore_stop_tokens: go on to `max_new_tokens` (for measurements of speed).
    """

    max_new_tokens: int = 500
    temperature: float = 0.35
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    ignore_stop_tokens: bool = False

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "≥ 1"),
            ("temperature", self.temperature >= 0, "≥ 0"),
            ("top_p", 0 < self.top_p <= 1, "0 < x ≤ 1"),
            ("top_k", self.top_k >= 0, "≥ 0"),
            ("min_p", 0 <= self.min_p <= 1, "0 ≤ x ≤ 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "> 0"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "≥ 0"),
            ("stop", all(self.stop), "texts that are not empty"),
        ):
            if not valid:
                raise UsageError(
                    "generation.bad_setting",
                    "--{option} = {value} is not valid: {expected}.",
                    option=name,
                    value=getattr(self, name),
                    expected=expected,
                )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0
