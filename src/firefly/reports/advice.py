"""What would make a run fit: changes named by their configuration keys, each planned again, cheapest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from firefly.config import Config
from firefly.reports.plan import Plan, local_cards, plan_with
from firefly.reports.work import Work
from firefly.tasks import TASKS
from firefly.translation import Phrase, translate

SHORTEST = 256
"""Tokens below which shorter rows are not advised."""


@dataclass(frozen=True)
class Advice:
    """One change.

    Attributes:
        key, value: of the configuration; key "" where it is no key but another way to run.
        cost: what is given up for it, in a sentence.
        spared: bytes; None where they were not computed.
        fits: whether it suffices alone.
    """

    key: str
    value: Any
    cost: str
    spared: int | None
    fits: bool


def advise(plan: Plan) -> list[Advice]:
    """Changes that spare memory, from those that cost nothing to those that change what is trained."""
    found = []
    for key, value, cost, config, work in _changes(plan):
        changed = plan_with(plan, config, work)
        spared = plan.forecast.total - changed.forecast.total
        if spared > 0:
            found.append(Advice(key, value, str(cost), spared, changed.fits))
    if (cards := local_cards()) > 1:
        found.append(
            Advice(
                "",
                "FSDP, ZeRO",
                translate("{count} GPUs: shard optimizer, gradients and weights (docs/scale.md)", count=cards),
                None,
                False,
            )
        )
    elif plan.machine.kind == "cuda":
        found.append(
            Advice(
                "",
                "FSDP, ZeRO",
                translate("several GPUs: shard optimizer, gradients and weights (docs/scale.md)"),
                None,
                False,
            )
        )
    return found


def _changes(plan: Plan) -> Iterator[tuple[str, Any, Phrase, Config, Work]]:
    """(key, value, what it costs, changed configuration, its examples)"""
    config, work = plan.config, plan.work
    step, adapter, full = config.step, config.adapter, config.adapter.mode == "full"
    if step.nf4_cache is True:
        yield (
            "nf4_cache",
            False,
            Phrase("same result, slower"),
            replace(config, step=replace(step, nf4_cache=False)),
            work,
        )
    budget = plan.choices.tokens_per_microbatch if plan.choices else work.longest
    if budget > work.longest:
        smaller = replace(step, tokens_per_microbatch=work.longest)
        yield (
            "tokens_per_microbatch",
            work.longest,
            Phrase("same result, smaller microbatches"),
            replace(config, step=smaller),
            work,
        )
    if step.gradient_checkpointing is not True:
        again = replace(step, gradient_checkpointing=True)
        yield (
            "gradient_checkpointing",
            True,
            Phrase("same result, up to 1.46 times the computing"),
            replace(config, step=again),
            work,
        )
    before = replace(config.preference, precompute_reference=True)
    asks = TASKS[config.task_type].asks_reference
    if full and asks(config) and not asks(replace(config, preference=before)):
        yield (
            "precompute_reference",
            True,
            Phrase("same result, the reference is asked once beforehand"),
            replace(config, preference=before),
            work,
        )
    optim = str(config.training.get("optim", ""))
    if optim.startswith("adamw") and "8bit" not in optim:
        eight = {**config.training, "optim": "adamw_8bit"}
        yield (
            "optim",
            "adamw_8bit",
            Phrase("moments in 8 bit (needs bitsandbytes): nearly the same result"),
            replace(config, training=eight),
            work,
        )
    if not full and adapter.rank > 8:
        rank = adapter.rank // 2
        yield "lora_rank", rank, Phrase("a smaller adapter"), replace(config, adapter=replace(adapter, rank=rank)), work
    if work.longest >= 2 * SHORTEST:
        limit = config.data.max_seq_length
        shorter = max(SHORTEST, min(limit, work.longest) // 2)
        data = replace(config.data, max_seq_length=shorter)
        yield "max_seq_length", shorter, Phrase("longer rows are cut"), replace(config, data=data), work.cut(shorter)
    if adapter.mode == "lora":
        four = replace(adapter, mode="qlora")
        yield "train_mode", "qlora", Phrase("frozen weights in 4 bit"), replace(config, adapter=four), work
    if full:
        yield (
            "train_mode",
            "lora",
            Phrase("an adapter is trained, not all weights"),
            replace(config, adapter=replace(adapter, mode="lora")),
            work,
        )
        yield (
            "train_mode",
            "qlora",
            Phrase("frozen weights in 4 bit"),
            replace(config, adapter=replace(adapter, mode="qlora")),
            work,
        )
