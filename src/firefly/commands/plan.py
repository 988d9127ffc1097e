"""`firefly plan`"""

from __future__ import annotations

from typing import Annotated

import typer

from firefly.commands.options import ANY_KEY, ConfigArgument, JsonOption, given_configuration, lasting_imports
from firefly.console import print_json, stdout_console
from firefly.errors import UsageError, VerificationError

app = typer.Typer(add_completion=False)


@app.command(context_settings=ANY_KEY)
def plan_command(
    context: typer.Context,
    config: ConfigArgument = "",
    memory: Annotated[str, typer.Option("--memory", help="Plan for a machine with so much, such as 24GB.")] = "",
    device: Annotated[str, typer.Option("--device", help="cpu or cuda; with --memory alone a card is meant.")] = "",
    tflops: Annotated[
        float | None, typer.Option("--tflops", help="Rate of matrix products of that machine, for the time.")
    ] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Train two steps on the longest rows, and compare.")] = False,
    as_json: JsonOption = False,
) -> None:
    source, overrides = given_configuration(context, config)
    if tflops is not None and not tflops > 0:
        raise UsageError("plan.bad_rate", "--tflops {value} is not valid; it must be above 0.", value=tflops)
    with lasting_imports():
        from firefly.reports import plan_view
        from firefly.reports.advice import advise
        from firefly.reports.plan import make_plan
        from firefly.reports.probe import probe as probe_plan
    plan, data = make_plan(source, overrides, memory, device, tflops)
    probed = probe_plan(plan, data) if probe else None
    advice = [] if plan.fits else advise(plan)
    if as_json:
        print_json(plan_view.as_json(plan, advice, probed))
    else:
        plan_view.show_plan(plan, advice, probed, stdout_console())
    if not plan.fits:
        total, available = plan_view.gib(plan.forecast.total), plan_view.gib(plan.forecast.available)
        raise VerificationError(
            "plan.failed",
            "the run needs {total} GiB and {available} GiB are available.",
            total=total,
            available=available,
        )
