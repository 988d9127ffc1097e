"""How `firefly plan` shows what it found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from firefly.messages import render
from firefly.models.memory import Forecast
from firefly.reports.advice import Advice
from firefly.reports.plan import Duration, Plan
from firefly.reports.probe import Probe

PARTS = {
    "weights": "part.weights",
    "adapter": "part.adapter",
    "optimizer": "part.optimizer",
    "gradients": "part.gradients",
    "activations": "part.activations",
    "head": "part.head",
    "cache": "part.cache",
    "reference": "part.reference",
    "libraries": "part.libraries",
    "kernels": "part.kernels",
    "allocator": "part.allocator",
}
"""What each part of a forecast is called, as codes of the catalogue."""


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
        "plan.title",
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
            "plan.choices",
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
        say(console, "plan.close" if close else "plan.fits_part" if plan.unknown else "plan.fits", **numbers)
    else:
        say(console, "plan.too_large", style="red", **numbers)
        show_advice(console, advice)


def show_parts(console: Console, forecast: Forecast) -> None:
    """One line for each part, its size and its share."""
    for name, size in forecast.parts.items():
        console.print(f"  {gib(size):>9} GiB  {size / forecast.total:4.0%}  {render(PARTS[name])}", soft_wrap=True)


def show_advice(console: Console, advice: Sequence[Advice]) -> None:
    if not advice:
        say(console, "advice.none")
        return
    say(console, "advice.title")
    for each in advice:
        change = f"{each.key} = {json.dumps(each.value)}" if each.key else str(each.value)
        spared = "" if each.spared is None else f"−{gib(each.spared)} GiB"
        enough = f"  {render('advice.enough')}" if each.fits else ""
        console.print(f"  {change:<34} {spared:>11}  {each.cost}{enough}", soft_wrap=True)


def _show_time(console: Console, duration: Duration) -> None:
    if duration.rate is None or duration.step_seconds is None:
        say(console, "plan.no_time")
        return
    numbers = {
        "flops": f"{duration.flops / 1e9:,.0f}",
        "rate": f"{duration.rate / 1e9:,.0f}",
        "source": render("plan.rate_measured" if duration.measured else "plan.rate_told"),
        "efficiency": f"{duration.efficiency:.0%}",
        "step": _span(duration.step_seconds),
    }
    if duration.seconds is None:
        say(console, "plan.step_time", **numbers)
    else:
        say(console, "plan.time", steps=duration.steps, whole=_span(duration.seconds), **numbers)


def _show_probe(console: Console, probe: Probe) -> None:
    say(
        console,
        "plan.probe",
        steps=probe.steps,
        examples=probe.examples,
        predicted=gib(probe.predicted),
        measured=gib(probe.measured),
        error=f"{probe.error:+.1%}",
    )
    if probe.step_seconds is not None and probe.predicted_seconds is not None:
        seconds = {"predicted": _span(probe.predicted_seconds), "measured": _span(probe.step_seconds)}
        say(console, "plan.probe_time", **seconds)


def say(console: Console, code: str, style: str | None = None, **values: object) -> None:
    console.print(render(code, **values), soft_wrap=True, style=style)


def gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _span(seconds: float) -> str:
    """0.8 s, 95 s, 12 min, 3.4 h, 2.1 d."""
    for limit, unit, divisor in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / divisor:.3g} {unit}"
    return f"{seconds / 86400:.3g} d"
