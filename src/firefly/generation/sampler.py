"""The next token of each answer, from the logits of a batch: by the settings and random numbers of its own request.

An answer with a seed is the same alone and in a batch: it has one generator, which gives one number a token, and that
number is looked up in the cumulated probabilities of the tokens in the order of their ids. So a rounding of the logits,
which differs with the size of the batch, moves a border between two tokens by as little, and reorders nothing.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from firefly.generation.engine import Request, Token

LIKELY = 1024
"""So many of the likeliest tokens are searched for a nucleus first; sorting a whole vocabulary takes ten times as
long."""


class Sampler:
    """Draws the tokens of one request."""

    def __init__(self, request: Request) -> None:
        self.settings = request.settings
        self.in_answer: Counter[int] = Counter()
        self._in_prompt = torch.tensor(sorted(set(request.prompt_ids))) if self._repeats else None
        seed = seed_of(request)
        self._random = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)

    @property
    def _repeats(self) -> bool:
        return self.settings.repetition_penalty != 1

    @property
    def changes_logits(self) -> bool:
        settings = self.settings
        return bool(self._repeats or settings.presence_penalty or settings.frequency_penalty or settings.logit_bias)

    def change_logits(self, row: Tensor) -> None:
        """Apply penalties and biases to the logits of the next token, in place; float32 (vocabulary)."""
        settings = self.settings
        present = torch.tensor(list(self.in_answer), device=row.device, dtype=torch.long)
        if self._in_prompt is not None:
            seen = torch.cat([self._in_prompt.to(row.device), present]).unique()
            values = row[seen]
            factor = settings.repetition_penalty
            row[seen] = torch.where(values < 0, values * factor, values / factor)
        if (settings.presence_penalty or settings.frequency_penalty) and len(present):
            counts = torch.tensor(list(self.in_answer.values()), device=row.device, dtype=row.dtype)
            row[present] -= settings.presence_penalty + settings.frequency_penalty * counts
        for token, bias in settings.logit_bias.items():
            row[token] += bias

    def next_number(self) -> float:
        """Uniform in [0, 1)."""
        return float(torch.rand((), dtype=torch.float64, generator=self._random))


def seed_of(request: Request) -> int | None:
    """What its random numbers begin with: of its seed, its prompt and its number, so that no two prompts of one seed
    share their luck. None where it has no seed."""
    if request.settings.seed is None:
        return None
    text = f"{request.settings.seed} {request.index} {' '.join(map(str, request.prompt_ids))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def choose_tokens(logits: Tensor, samplers: Sequence[Sampler]) -> list[Token]:
    """The next token of each request.

    Args:
        logits: float32 (requests, vocabulary), as the model gives them; not changed.
    """
    changed = logits
    rows = [row for row, sampler in enumerate(samplers) if sampler.changes_logits]
    if rows:
        changed = logits.clone()
        for row in rows:
            samplers[row].change_logits(changed[row])
    ids: list[int] = changed.argmax(dim=-1).tolist()
    drawn = [row for row, sampler in enumerate(samplers) if not sampler.settings.is_greedy]
    if drawn:
        chosen = _draw(changed[drawn] if len(drawn) < len(samplers) else changed, [samplers[row] for row in drawn])
        for row, token in zip(drawn, chosen, strict=True):
            ids[row] = token
    for sampler, token in zip(samplers, ids, strict=True):
        sampler.in_answer[token] += 1
    tokens = [Token(token) for token in ids]
    reported = [row for row, sampler in enumerate(samplers) if sampler.settings.logprobs is not None]
    if reported:
        asked = [samplers[row].settings.logprobs or 0 for row in reported]
        described = describe_tokens(logits[reported], [ids[row] for row in reported], asked)
        for row, token in zip(reported, described, strict=True):
            tokens[row] = token
    return tokens


def describe_tokens(logits: Tensor, ids: Sequence[int], top: Sequence[int]) -> list[Token]:
    """Tokens with their log-probabilities and those of the likeliest in their places.

    Args:
        logits: float32 (tokens, vocabulary).
        top: of how many of the likeliest, for each token.
    """
    norms = torch.logsumexp(logits, dim=-1)
    chosen = torch.tensor(ids, device=logits.device)[:, None]
    own = (logits.gather(1, chosen)[:, 0] - norms).tolist()
    most = min(max(top, default=0), logits.shape[-1])
    if not most:
        return [Token(token, logprob) for token, logprob in zip(ids, own, strict=True)]
    values, places = logits.topk(most, dim=-1)
    values = (values - norms[:, None]).tolist()
    return [
        Token(token, logprob, tuple(zip(near[:count], likely[:count], strict=True)))
        for token, logprob, near, likely, count in zip(ids, own, places.tolist(), values, top, strict=True)
    ]


def _draw(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """One token for each row of float32 (requests, vocabulary)."""
    settings = [sampler.settings for sampler in samplers]
    temperatures = torch.tensor([each.temperature for each in settings], device=logits.device)
    scaled = logits / temperatures[:, None]
    vocabulary = scaled.shape[-1]
    asked = max(min(each.top_k or LIKELY, vocabulary) for each in settings)
    values, places = scaled.topk(min(max(asked, LIKELY), vocabulary), dim=-1)
    norms = torch.logsumexp(scaled, dim=-1)
    chosen = []
    for row, (sampler, each) in enumerate(zip(samplers, settings, strict=True)):
        ids, weights = places[row], (values[row] - norms[row]).double().exp()
        # A nucleus that is not among the likeliest tokens is looked for among all; so is what nothing cuts off.
        if not each.top_k and (each.top_p == 1 or weights.sum() < each.top_p) and len(ids) < vocabulary:
            weights, ids = (scaled[row] - norms[row]).double().exp().sort(descending=True)
        kept = _kept(weights, each.top_k, each.top_p, each.min_p)
        ids, order = ids[:kept].sort()
        sums = weights[:kept][order].cumsum(0)
        place = int(torch.searchsorted(sums, sums[-1:] * sampler.next_number(), right=True))
        chosen.append(int(ids[min(place, kept - 1)]))
    return chosen


def _kept(weights: Tensor, top_k: int, top_p: float, min_p: float) -> int:
    """How many of the likeliest tokens may be drawn, of probabilities in falling order: cut by number first, the
    nucleus taken of what is left, as transformers and vLLM do it."""
    count = min(top_k, len(weights)) if top_k else len(weights)
    if top_p < 1:
        sums = weights[:count].cumsum(0)
        whole = float(sums[-1]) if top_k else 1.0
        count = max(1, int((sums - weights[:count] < top_p * whole).sum()))
    if min_p:
        count = min(count, max(1, int((weights >= min_p * weights[0]).sum())))
    return count
