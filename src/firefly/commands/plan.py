"""`firefly plan`: memory by part and time of a run, and what would spare memory where it does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firefly.commands.options import ANY_KEY, ConfigArgument, JsonOption, given_configuration, imports_without_gc
from firefly.console import print_json, stdout_console
from firefly.errors import UsageError, VerificationError
from firefly.translation import Phrase, translate

if TYPE_CHECKING:
    from rich.console import Console

    from firefly.models.memory import Forecast
    from firefly.setup.plan import Duration, Plan
    from firefly.setup.serving_plan import ServingPlan

app = typer.Typer(add_completion=False)


@app.command(context_settings=ANY_KEY)
def plan_command(
    context: typer.Context,
    config: ConfigArgument = "",
    memory: Annotated[str, typer.Option("--memory", help="Plan for a machine with so much, such as 24GB.")] = "",
    device: Annotated[str, typer.Option("--device", help="cpu or cuda; with --memory alone a GPU is meant.")] = "",
    tflops: Annotated[
        float | None, typer.Option("--tflops", help="Matmul rate of that machine, for the time estimate.")
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Plan serving the model instead of training it.")] = False,
    adapter_name_or_path: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter_name_or_path",
            metavar="PATH",
            help="An adapter; with --serve several, each a folder or name=folder.",
        ),
    ] = None,
    cache_tokens: Annotated[
        int | None, typer.Option("--cache_tokens", help="Serving: tokens that the cache of each model holds.")
    ] = None,
    load_in_4bit: Annotated[bool, typer.Option("--load_in_4bit", help="Serving: hold the weights in NF4.")] = False,
    as_json: JsonOption = False,
) -> None:
    source, overrides = given_configuration(context, config)
    if serve:
        if tflops is not None:
            raise UsageError("plan.no_time_of_serving", "--tflops says nothing of serving; leave it out with --serve.")
        plan_serving(source, overrides, adapter_name_or_path or [], cache_tokens, load_in_4bit, memory, device, as_json)
        return
    if cache_tokens is not None or load_in_4bit or len(adapter_name_or_path or ()) > 1:
        raise UsageError(
            "plan.only_serving", "--cache_tokens, --load_in_4bit and several adapters are of serving: add --serve."
        )
    if adapter_name_or_path:
        overrides["adapter_name_or_path"] = adapter_name_or_path[0]
    if tflops is not None and not tflops > 0:
        raise UsageError("plan.bad_rate", "--tflops {value} is not valid; it must be above 0.", value=tflops)
    with imports_without_gc():
        from firefly.setup.plan import make_plan
    plan = make_plan(source, overrides, memory, device, tflops)
    if as_json:
        print_json(plan_as_json(plan))
    else:
        show_plan(plan, stdout_console())
    if not plan.fits:
        raise VerificationError(
            "plan.failed",
            "the run needs {total} GiB and {available} GiB are available.",
            total=gib(plan.forecast.total),
            available=gib(plan.forecast.available),
        )


def plan_serving(
    source: str,
    overrides: dict[str, Any],
    adapters: list[str],
    cache_tokens: int | None,
    in_4_bits: bool,
    memory: str,
    device: str,
    as_json: bool,
) -> None:
    with imports_without_gc():
        from firefly.setup.serving_plan import make_serving_plan
    plan = make_serving_plan(source, overrides, adapters, cache_tokens, in_4_bits, memory, device)
    if as_json:
        print_json(json.dumps(plan.as_dict(), ensure_ascii=False))
    else:
        show_serving_plan(plan, stdout_console())
    if not plan.fits:
        raise VerificationError(
            "plan.serving_failed",
            "serving needs {total} GiB and {available} GiB are available.",
            total=gib(plan.forecast.total),
            available=gib(plan.forecast.available),
        )


def show_serving_plan(plan: ServingPlan, console: Console) -> None:
    """Print memory by part, the verdict and what was assumed, and what spares memory where it does not fit."""
    from firefly.models.memory import PARTS

    show = partial(console.print, soft_wrap=True)
    show(
        translate(
            "plan of serving: {architecture}, the base and {adapters} adapters; {device}, {precision}",
            architecture=plan.architecture,
            adapters=plan.models - 1,
            device=plan.machine.kind,
            precision=plan.precision,
        )
    )
    for note in plan.notes:
        show(f"  {note}", style="yellow")
    show_parts(plan.forecast, PARTS, show)
    if plan.unknown:
        show(plan.unknown, style="yellow")
    elif plan.batched:
        show(
            translate(
                "a cache of {tokens} tokens for each model, {size} KiB a token; requests are batched as they arrive",
                tokens=f"{plan.cache_tokens:,}",
                size=f"{plan.bytes_per_token / 2**10:.1f}",
            )
        )
    numbers = {"total": gib(plan.forecast.total), "available": gib(plan.forecast.available)}
    if plan.fits:
        show(translate("it fits: {total} GiB of {available} GiB.", **numbers))
        return
    show(translate("it does not fit: {total} GiB are needed, {available} GiB available.", **numbers), style="red")
    show(translate("what would spare memory: --cache_tokens, --load_in_4bit, fewer adapters."))


def show_parts(forecast: Forecast, names: Mapping[str, Phrase], show: Callable[..., None]) -> None:
    for name, size in forecast.parts.items():
        show(f"  {gib(size):>9} GiB  {size / forecast.total:4.0%}  {names[name]}")


@dataclass(frozen=True)
class Hint:
    """A change that spares memory.

    Attributes:
        key, value: of the configuration; key "" where it is no key but another way to run.
        cost: what is given up for it.
    """

    key: str
    value: Any
    cost: Phrase


HINTS = (
    Hint("gradient_checkpointing", True, Phrase("same result, up to 1.46 times the computing")),
    Hint("train_mode", "qlora", Phrase("an adapter is trained, on frozen weights in 4 bit")),
    Hint("", "FSDP, ZeRO", Phrase("several GPUs: shard optimizer, gradients and weights (docs/scale.md)")),
)
"""From the one that costs least; microbatches are as small already as memory asks for."""


def hints(plan: Plan) -> list[Hint]:
    """What would spare memory in a plan that does not fit."""
    set_already: dict[str, Any] = {"train_mode": plan.config.adapter.mode}
    if plan.choices is not None and plan.choices.checkpointed_layers:
        set_already["gradient_checkpointing"] = True
    return [hint for hint in HINTS if set_already.get(hint.key) != hint.value]


def plan_as_json(plan: Plan) -> str:
    """The one value that `--json` prints."""
    advice = [{"key": hint.key, "value": hint.value, "cost": str(hint.cost)} for hint in hints(plan)]
    return json.dumps(plan.as_dict() | {"advice": [] if plan.fits else advice}, ensure_ascii=False)


def show_plan(plan: Plan, console: Console) -> None:
    """Print memory by part, time, the verdict, what was assumed, and hints where it does not fit."""
    from firefly.models.memory import PARTS

    show = partial(console.print, soft_wrap=True)
    trained, total = plan.parameters
    show(
        translate(
            "plan: {architecture}, {trained} of {total} parameters trained; {device}, {precision}, layout {layout}",
            architecture=plan.architecture,
            total=f"{total:,}",
            trained=f"{trained:,}",
            device=plan.machine.kind,
            precision=plan.precision,
            layout=plan.layout,
        )
    )
    for note in plan.notes:
        show(f"  {note}", style="yellow")
    show_parts(plan.forecast, PARTS, show)
    if plan.unknown:
        show(plan.unknown, style="yellow")
    if plan.choices is not None:
        show(
            translate(
                "microbatches of at most {budget} tokens (longest example: {longest}); {again} layers recomputed in "
                "backward; {cached} 4-bit weights cached",
                budget=plan.choices.tokens_per_microbatch,
                longest=plan.work.longest,
                again=plan.choices.checkpointed_layers,
                cached=plan.choices.cached_weights,
            )
        )
    show(_time(plan.duration))
    numbers = {"total": gib(plan.forecast.total), "available": gib(plan.forecast.available)}
    if not plan.fits:
        show(translate("it does not fit: {total} GiB are needed, {available} GiB available.", **numbers), style="red")
        show(translate("what would spare memory, cheapest first:"))
        for hint in hints(plan):
            change = f"{hint.key} = {json.dumps(hint.value)}" if hint.key else str(hint.value)
            show(f"  {change:<34} {hint.cost}")
    elif plan.unknown:
        show(translate("what is known fits: {total} GiB of {available} GiB; activations come on top.", **numbers))
    elif plan.forecast.total > 0.85 * plan.forecast.available:
        show(
            translate(
                "it fits, but closely: {total} GiB of {available} GiB, and a forecast may be off by 15 %.", **numbers
            )
        )
    else:
        show(translate("it fits: {total} GiB of {available} GiB.", **numbers))


def _time(duration: Duration) -> str:
    if duration.rate is None or duration.step_seconds is None:
        return translate("time: not estimated for another machine; --tflops N gives its matmul rate.")
    numbers = {
        "flops": f"{duration.flops / 1e9:,.0f}",
        "rate": f"{duration.rate / 1e9:,.0f}",
        "source": translate("measured here" if duration.measured else "as given by --tflops"),
        "efficiency": f"{duration.efficiency:.0%}",
        "step": _span(duration.step_seconds),
    }
    if duration.seconds is None:
        return translate(
            "time: about {step} for a step: {flops} GFLOP, at {efficiency} of {rate} GFLOP/s ({source}).", **numbers
        )
    return translate(
        "time: about {whole} for {steps} steps, {step} each: {flops} GFLOP a step, at {efficiency} of {rate} "
        "GFLOP/s ({source}). Evaluation and checkpoints come on top.",
        steps=duration.steps,
        whole=_span(duration.seconds),
        **numbers,
    )


def gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _span(seconds: float) -> str:
    """0.8 s, 95 s, 12 min, 3.4 h, 2.1 d."""
    for limit, unit, divisor in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / divisor:.3g} {unit}"
    return f"{seconds / 86400:.3g} d"
