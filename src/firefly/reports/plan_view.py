"""How `firefly plan` shows what it found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from firefly.models.memory import PARTS, Forecast
from firefly.reports.advice import Advice
from firefly.reports.plan import Duration, Plan
from firefly.reports.probe import Probe
from firefly.translation import translate


def as_json(plan: Plan, advice: Sequence[Advice], probe: Probe | None) -> str:
    """The one value that `--json` prints."""
    told: dict[str, Any] = plan.as_dict() | {"advice": [vars(each) for each in advice]}
    if probe is not None:
        told["probe"] = probe.as_dict()
    return json.dumps(told, ensure_ascii=False)


def show_plan(plan: Plan, advice: Sequence[Advice], probe: Probe | None, console: Console) -> None:
    """Print memory by part, time, the verdict, what was assumed, what a probe measured, and advice."""
    trained, total = plan.parameters
    say(
        console,
        "plan: {architecture}, {trained} of {total} parameters trained; {device}, {precision}, layout {layout}",
        architecture=plan.architecture,
        total=f"{total:,}",
        trained=f"{trained:,}",
        device=plan.machine.kind,
        precision=plan.precision.name,
        layout=plan.layout,
    )
    for note in plan.notes:
        console.print(f"  {note}", style="yellow", soft_wrap=True)
    show_parts(console, plan.forecast)
    if plan.unknown:
        console.print(plan.unknown, style="yellow", soft_wrap=True)
    if plan.choices is not None:
        say(
            console,
            "microbatches of at most {budget} tokens (longest example: {longest}); {again} layers recomputed in "
            "backward; {cached} 4-bit weights cached",
            budget=plan.choices.tokens_per_microbatch,
            longest=plan.work.longest,
            again=plan.choices.checkpointed_layers,
            cached=plan.choices.cached_weights,
        )
    _show_time(console, plan.duration)
    if probe is not None:
        _show_probe(console, probe)
    numbers = {"total": gib(plan.forecast.total), "available": gib(plan.forecast.available)}
    if plan.fits:
        close = plan.forecast.total > 0.85 * plan.forecast.available
        say(
            console,
            "it fits, but closely: {total} GiB of {available} GiB, and a forecast may be off by 15 %."
            if close
            else "what is known fits: {total} GiB of {available} GiB; activations come on top."
            if plan.unknown
            else "it fits: {total} GiB of {available} GiB.",
            **numbers,
        )
    else:
        say(console, "it does not fit: {total} GiB are needed, {available} GiB available.", style="red", **numbers)
        show_advice(console, advice)


def show_parts(console: Console, forecast: Forecast) -> None:
    """One line for each part, its size and its share."""
    for name, size in forecast.parts.items():
        console.print(f"  {gib(size):>9} GiB  {size / forecast.total:4.0%}  {PARTS[name]}", soft_wrap=True)


def show_advice(console: Console, advice: Sequence[Advice]) -> None:
    if not advice:
        say(
            console,
            "nothing that could be changed in the configuration spares memory: take a smaller model or a larger "
            "machine.",
        )
        return
    say(console, "what would spare memory, cheapest first (each by itself):")
    for each in advice:
        change = f"{each.key} = {json.dumps(each.value)}" if each.key else str(each.value)
        spared = "" if each.spared is None else f"−{gib(each.spared)} GiB"
        enough = f"  {translate('(suffices)')}" if each.fits else ""
        console.print(f"  {change:<34} {spared:>11}  {each.cost}{enough}", soft_wrap=True)


def _show_time(console: Console, duration: Duration) -> None:
    if duration.rate is None or duration.step_seconds is None:
        say(console, "time: not estimated for another machine; --tflops N gives the rate of its matrix products.")
        return
    numbers = {
        "flops": f"{duration.flops / 1e9:,.0f}",
        "rate": f"{duration.rate / 1e9:,.0f}",
        "source": translate("measured here" if duration.measured else "as given by --tflops"),
        "efficiency": f"{duration.efficiency:.0%}",
        "step": _span(duration.step_seconds),
    }
    if duration.seconds is None:
        say(
            console,
            "time: about {step} for a step: {flops} GFLOP, at {efficiency} of {rate} GFLOP/s ({source}).",
            **numbers,
        )
    else:
        say(
            console,
            "time: about {whole} for {steps} steps, {step} each: {flops} GFLOP a step, at {efficiency} of {rate} "
            "GFLOP/s ({source}). Evaluation and checkpoints come on top.",
            steps=duration.steps,
            whole=_span(duration.seconds),
            **numbers,
        )


def _show_probe(console: Console, probe: Probe) -> None:
    say(
        console,
        "probe: {steps} steps on the {examples} longest examples took {measured} GiB; predicted {predicted} GiB "
        "({error})",
        steps=probe.steps,
        examples=probe.examples,
        predicted=gib(probe.predicted),
        measured=gib(probe.measured),
        error=f"{probe.error:+.1%}",
    )
    if probe.step_seconds is not None and probe.predicted_seconds is not None:
        seconds = {"predicted": _span(probe.predicted_seconds), "measured": _span(probe.step_seconds)}
        say(console, "probe: a step took {measured}; predicted {predicted}", **seconds)


def say(console: Console, text: str, /, style: str | None = None, **values: object) -> None:
    console.print(translate(text, **values), soft_wrap=True, style=style)


def gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _span(seconds: float) -> str:
    """0.8 s, 95 s, 12 min, 3.4 h, 2.1 d."""
    for limit, unit, divisor in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / divisor:.3g} {unit}"
    return f"{seconds / 86400:.3g} d"
