"""Whether two models are the same: their logits on fixed prompts, beside what rounding alone does to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firefly.data.encoding import Encoder
from firefly.data.schema import Message
from firefly.data.templates import TemplateFailure, bind_template
from firefly.models.adapters import transformers_model
from firefly.models.probing import agree
from firefly.models.scores import scores, scores_of
from firefly.models.streaming import change_weight, held, read_whole
from firefly.models.unread import UNREAD
from firefly.translation import Phrase

# Limits of a merge (docs/adapters.md).
LARGEST_GAP_FP32 = 1e-4
ROUNDINGS = 8
"""In fp32, the gap may be so many times that between two ways to compute attention in the model that is judged: sums of
thousands of products in another order differ by that much, and a merged weight is another order."""
UPDATE_ERROR = 2e-3
"""How far the share of the update that a merge wrote may be from 1, beside what rounding explains."""
DEVIATIONS = 6
SAMPLES = 1 << 16
"""Values of each adapted tensor that are looked at."""
OTHER_FUNCTION, LEAST_EFFECT = 1e-3, 1e-4
"""Shares of the largest logit: rounding in fp32 does less than the first, and no adapter that does less than the second
is said to change nothing for it."""
LARGEST_KL = 1e-3
LEAST_AGREEMENT = 0.99

LOGITS_AT_ONCE, WIDENED_AT_ONCE = 1 << 26, 1 << 25
"""At most so many logits come of one batch of prompts, and so many numbers of a large weight are turned into fp32."""

PROMPTS = (
    "Who are you, and who made you?",
    "What is the capital of France?",
    "Write a short poem about fireflies.",
    "Explain in two sentences why the sky is blue.",
    "用一句话介绍你自己。",
    "请把“知识就是力量”翻译成英文。",
    "def fibonacci(n):",
    "List three prime numbers greater than 10 and add them up: 11 + 13 + 17 =",
)


@dataclass(frozen=True)
class Comparison:
    """How a model differs from the expected one on the fixed prompts.

    Attributes:
        gap: largest difference of a logit.
        kl: mean KL divergence of a position, in nats.
        agreement: share of positions with the same first choice, ties left out.
        ties: positions with another first choice that the expected model holds within `rounding` of its own.
        rounding: largest difference of a logit of the expected model, computed in its type, between eager attention and
            sdpa.
        positions: how many were compared.
    """

    gap: float
    kl: float
    agreement: float
    ties: int
    rounding: float
    positions: int
    scores: bool = False

    @property
    def figures(self) -> Phrase:
        if self.scores:
            return Phrase(
                "largest score gap {gap} (rounding alone: {rounding})",
                gap=f"{self.gap:.2e}",
                rounding=f"{self.rounding:.2e}",
            )
        return Phrase(
            "largest logit gap {gap} (rounding alone: {rounding}), mean KL {kl}, top-1 agreement {agreement}, ties "
            "left out: {ties}",
            gap=f"{self.gap:.2e}",
            rounding=f"{self.rounding:.2e}",
            kl=f"{self.kl:.2e}",
            agreement=f"{self.agreement:.2%}",
            ties=self.ties,
        )

    def report(self) -> dict[str, Any]:
        """What merge_report.json says; one number has no distribution."""
        without = {"kl": None, "agreement": None} if self.scores else {}
        return vars(self) | without

    def passes(self, dtype: torch.dtype) -> bool:
        """Whether this is rounding, for a model whose weights are of that type. A score has no distribution."""
        if dtype == torch.float32 or self.scores:
            roundings = 1 if self.scores and dtype != torch.float32 else ROUNDINGS
            return self.gap <= max(LARGEST_GAP_FP32, roundings * self.rounding)
        return self.kl <= LARGEST_KL and self.agreement >= LEAST_AGREEMENT


@dataclass(frozen=True)
class Expected:
    """What the unmerged model does, and the merged one has to do.

    Attributes:
        prompts: token ids.
        logits: of each prompt, (tokens, vocabulary).
        rounding: the largest logit gap that rounding alone makes in it.
        updates: a look at what the adapter adds to each weight.
    """

    prompts: list[list[int]]
    logits: list[Tensor]
    rounding: float
    updates: list[SampledUpdate]

    def compare(self, merged: Any) -> Comparison:
        return compare(self.logits, all_logits(merged, self.prompts), self.prompts, self.rounding)


def encode_prompts(tokenizer: Any) -> list[list[int]]:
    """The fixed prompts as ids, in the model's own chat format where it has one."""
    if not tokenizer.chat_template:
        return [tokenizer.encode(prompt) for prompt in PROMPTS]
    encoder = Encoder(tokenizer, bind_template("auto", tokenizer))
    try:
        return [encoder.encode_prompt([Message.of("user", prompt)]) for prompt in PROMPTS]
    except TemplateFailure:
        return [tokenizer.encode(prompt) for prompt in PROMPTS]


def all_logits(model: Any, prompts: Sequence[Sequence[int]], as_served: bool = False) -> list[Tensor]:
    """Logits of every position of each prompt, (tokens, vocabulary), on the CPU; of a reward model the scores of texts
    that would end there, (tokens, 1).

    Weights of 16 bits are multiplied in fp32, as the rounding of activations would drown what is compared here, but for
    `as_served`, and in models that do not run so: some read the weights of a module without calling it (Mamba).
    Prompts are computed together, padded on the right, since weights that are streamed are read once a forward: the
    positions of a causal model do not see what follows them. An architecture that does not take that gets them one by
    one.
    """
    failure: Exception = ValueError("no prompts")
    for widened in (False,) if as_served or not has_narrow_layers(model) else (True, False):
        for values in (LOGITS_AT_ONCE, 0):
            try:
                with fp32_products(model) if widened else nullcontext(), torch.inference_mode():
                    found = _all_logits(model, prompts, values)
                if any(one.isnan().any() for one in found) and read_whole(model):
                    return all_logits(model, prompts, as_served)
                return found
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError) as error:
                failure = error
    raise failure


def _all_logits(model: Any, prompts: Sequence[Sequence[int]], values: int) -> list[Tensor]:
    """`all_logits` in the types that the model has now, with batches that give at most so many logits.

    Raises:
        ValueError: in this model a prompt's logits depend on its padding or on the other rows.
    """
    inner: Any = transformers_model(model)
    width = 1 if scores(inner) else inner.config.get_text_config().vocab_size
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    shortest, longest = prompts[by_length[0]], prompts[by_length[-1]]
    # The shortest one is there twice, with nothing after it and with other tokens.
    rows = [*prompts, [*shortest, *longest[len(shortest) :]]]
    if values and len(prompts) > 1:
        by_length.append(len(prompts))
    found: dict[int, Tensor] = {}
    while by_length:
        tokens = len(rows[by_length[-1]])
        count = max(1, values // (tokens * width))
        chosen, by_length = by_length[-count:], by_length[:-count]
        batch = torch.zeros(len(chosen), tokens, dtype=torch.long)
        for row, number in enumerate(chosen):
            batch[row, : len(rows[number])] = torch.tensor(rows[number])
        batch = batch.to(model.device)
        answers = scores_of(inner, input_ids=batch) if scores(inner) else model(input_ids=batch, use_cache=False).logits
        for row, number in enumerate(chosen):  # copies: a view would keep the padding
            found[number] = answers[row, : len(rows[number])].to("cpu", torch.float32, copy=True)
        del answers
    again = found.pop(len(prompts), None)
    if again is not None and not agree(again[: len(shortest)], found[prompts.index(shortest)], model.dtype):
        raise ValueError("rows of a batch are not independent of each other")
    return [found[number] for number in range(len(prompts))]


def rounding_gap(
    model: Any, prompts: Sequence[Sequence[int]], as_served: bool = False, known: Sequence[Tensor] | None = None
) -> float:
    """What rounding does to `all_logits` of the model: the largest gap between eager attention and sdpa.

    For an architecture without two ways to compute attention, or with two that do not mean the same (they differ by
    more than rounding in fp32 can): between the weights that it has and their neighbours.

    Args:
        known: `all_logits` of the model as it is.
    """
    inner: Any = transformers_model(model)
    before = inner.config._attn_implementation
    found = []
    try:
        for name in ("eager", "sdpa"):
            inner.set_attn_implementation(name)
            same = known is not None and name == before
            found.append(known if same else all_logits(model, prompts, as_served))
    except (ValueError, ImportError):  # transformers' word for one that the architecture does not have
        found = []
    finally:
        inner.set_attn_implementation(before)
    gap = largest_gap(*found) if found else 0.0
    other = model.dtype == torch.float32 and found and gap > OTHER_FUNCTION * largest_logit(found[0])
    if gap == 0 or other:
        del found
        weights = known or all_logits(model, prompts, as_served)
        with neighbouring_weights(inner):
            gap = largest_gap(weights, all_logits(model, prompts, as_served))
    return gap


def has_effect(untrained: Sequence[Tensor], trained: Sequence[Tensor], rounding: float) -> bool:
    """Whether logits differ by more than rounding, which is never taken for more than a small part of a logit: where it
    turns over a router's choice of experts, `rounding` is as large as what an adapter does."""
    return largest_gap(untrained, trained) > min(rounding, LEAST_EFFECT * largest_logit(untrained))


def largest_logit(logits: Sequence[Tensor]) -> float:
    return max(one.abs().max().item() for one in logits)


@contextmanager
def neighbouring_weights(model: nn.Module) -> Iterator[None]:
    """Move every weight to the next number of its type, up or down at random: what another rounding would give."""
    moved, streamed = list[tuple[nn.Parameter, Tensor]](), list[tuple[nn.Parameter, Any]]()
    try:
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                if parameter.dim() < 2 or not parameter.is_floating_point():
                    continue
                if (unread := getattr(parameter, UNREAD, None)) is not None:
                    streamed.append((parameter, unread))
                    change_weight(parameter, lambda x, _, seed=number: torch.nextafter(x, _up_or_down(x, seed)))
                    continue
                bound = _up_or_down(parameter, number)
                parameter.copy_(torch.nextafter(parameter, bound))
                moved.append((parameter, bound))
        yield
    finally:
        with torch.no_grad():
            for parameter, bound in moved:
                parameter.copy_(torch.nextafter(parameter, -bound))
        for parameter, unread in streamed:
            setattr(parameter, UNREAD, unread)


def _up_or_down(x: Tensor, seed: int) -> Tensor:
    """Infinity with a random sign for each number of `x`."""
    up = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device) < 0.5
    return torch.where(up, torch.inf, -torch.inf).to(x.dtype)


def largest_gap(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Between logits of the same prompts, in the tokens that both vocabularies have; a NaN stays one."""
    gaps = []
    for a, b in zip(one, other, strict=True):
        columns = min(a.shape[-1], b.shape[-1])
        gaps.append((a[:, :columns] - b[:, :columns]).abs().max())
    return torch.stack(gaps).max().item()


def has_narrow_layers(model: nn.Module) -> bool:
    """Whether `fp32_products` changes anything. Left as they are: models with 4-bit layers, which convert for
    themselves, and with stacks of experts."""
    has_stacks = any(parameter.dim() == 3 for parameter in model.parameters())
    if has_stacks or any(type(module).__name__ == "Linear4bit" for module in model.modules()):
        return False
    return any(_narrow(module) for module in model.modules())


@contextmanager
def fp32_products(model: nn.Module) -> Iterator[None]:
    """Compute `model` in fp32 from the weights it holds, converting those of one module at a time."""
    patched = [module for module in model.modules() if _narrow(module) and "forward" not in vars(module)]
    for module in patched:
        module.forward = MethodType(_forward_in_fp32, module)
    try:
        yield
    finally:
        for module in patched:
            del module.forward


def _forward_in_fp32(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward with its own weights widened; modules inside it see to theirs.

    A copy of a large head or embedding in fp32 would be the largest thing in memory: of a head some rows are widened at
    a time, of an embedding the rows that are looked up.
    """
    narrow = _narrow(self)
    weight: Any = narrow.get("weight")
    if weight is not None and weight.numel() > WIDENED_AT_ONCE and len(args) == 1 and not kwargs:
        (x,) = args
        if type(self) is nn.Linear:
            out = x.new_empty(*x.shape[:-1], len(weight), dtype=torch.float32)
            step = max(1, WIDENED_AT_ONCE // weight.shape[1])
            for first in range(0, len(weight), step):
                out[..., first : first + step] = F.linear(x.float(), weight[first : first + step].float())
            return out if self.bias is None else out.add_(self.bias.float())
        if isinstance(self, nn.Embedding) and not x.is_floating_point():
            ids, places = torch.unique(x, return_inverse=True)
            padding, self.padding_idx = self.padding_idx, None  # it concerns gradients alone
            self._parameters["weight"] = nn.Parameter(weight[ids].float(), requires_grad=False)
            try:
                return type(self).forward(self, places)
            finally:
                self.padding_idx = padding
                self._parameters.update(narrow)
    for name, parameter in narrow.items():
        self._parameters[name] = nn.Parameter(parameter.float(), requires_grad=False)
    try:
        return type(self).forward(self, *args, **kwargs)
    finally:
        self._parameters.update(narrow)


def _narrow(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own parameters of less than 32 bits."""
    own = module.named_parameters(recurse=False)
    return {name: p for name, p in own if p.is_floating_point() and p.dtype.itemsize < 4}


def compare(
    expected: Sequence[Tensor], found: Sequence[Tensor], prompts: Sequence[Sequence[int]], rounding: float
) -> Comparison:
    """Compare logits position by position; a beginning that prompts share counts once."""
    gaps, kl, same, ties, positions = list[Tensor](), 0.0, 0, 0, 0
    for number, (one, other) in enumerate(zip(expected, found, strict=True)):
        start = max((_common_prefix(prompts[number], earlier) for earlier in prompts[:number]), default=0)
        one, other = one[start:], other[start:]
        if not len(one):
            continue
        gaps.append((one - other).abs().max())
        p, q = torch.log_softmax(one.double(), -1), torch.log_softmax(other.double(), -1)
        kl += (p.exp() * (p - q)).sum().item()
        chosen = other.argmax(-1)
        behind = one.max(-1).values - one.gather(1, chosen[:, None])[:, 0]
        agree = one.argmax(-1) == chosen
        same += int(agree.sum())
        ties += int((~agree & (behind <= rounding)).sum())
        positions += len(one)
    counted = positions - ties
    agreement = same / counted if counted else 1.0
    gap, scored = torch.stack(gaps).max().item(), expected[0].shape[1] == 1
    return Comparison(gap, kl / positions, agreement, ties, rounding, positions, scored)


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


# ---- the weights themselves ----


@dataclass(frozen=True)
class SampledUpdate:
    """Some values of one adapted tensor before the merge, and what the adapter adds to them.

    Logits of a 16-bit model cannot tell an update that is one per cent too large from rounding; its weights can.

    Attributes:
        name: the parameter's path in the model.
        before: (n,) values of the base.
        update: (n,) what the trained model has beside them, in fp32.
    """

    name: str
    before: Tensor
    update: Tensor


def sampled(tensor: Tensor) -> Tensor:
    """Evenly spaced values of a tensor, on the CPU in fp32; of tensors of one shape those in the same places."""
    count = tensor.numel()
    places = torch.linspace(0, count - 1, min(count, SAMPLES), dtype=torch.float64).round().long().unique()
    return tensor.detach().reshape(-1)[places.to(tensor.device)].float().cpu()


def wrong_updates(merged: nn.Module, updates: Sequence[SampledUpdate]) -> dict[str, float]:
    """Tensors that did not get their update, with the share of it that they got; all of them together are "all".

    Rounding to one of the two nearest numbers of the type changes a value by less than their distance, and the sum
    over many values tells how much of the update was written: its expectation is exactly 1.
    """
    parameters, wrong = dict(merged.named_parameters(remove_duplicate=False)), {}
    products = squares = variance = 0.0
    for expected in updates:
        weight = parameters[expected.name]
        with held(weight):
            after = sampled(weight).double()
        before, update = expected.before.double(), expected.update.double()
        spacing = _spacing(before + update, weight.dtype)
        own = update.square().sum().item()
        if own == 0:
            continue
        product = ((after - before) * update).sum().item()
        noise = ((spacing / 2).square() * update.square()).sum().item()
        share = product / own
        if abs(share - 1) > UPDATE_ERROR + DEVIATIONS * noise**0.5 / own:
            wrong[expected.name] = share
        products, squares, variance = products + product, squares + own, variance + noise
    if squares and abs(products / squares - 1) > UPDATE_ERROR + DEVIATIONS * variance**0.5 / squares:
        wrong["all"] = products / squares
    return wrong


def _spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of a type at `values`, fp64."""
    info = torch.finfo(dtype)
    return torch.exp2(values.abs().clamp_min(info.tiny).log2().floor()) * info.eps
