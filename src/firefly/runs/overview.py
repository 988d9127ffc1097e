"""What is shown before training: one example with its trained tokens coloured, the step, parameters, memory."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from firefly.data.blocks import Blocks
from firefly.data.examples import Examples
from firefly.data.schema import IGNORE, Example, Tokens
from firefly.models.kernels.elementwise import implementation, is_card
from firefly.models.memory import PARTS, Forecast
from firefly.models.precision import Precision
from firefly.translation import translate


def show_example(console: Console, example: Example, tokenizer: Any) -> None:
    """Print an example as the model sees it; tokens with a loss are green and underlined ([ ] without colours)."""
    if isinstance(example, Tokens):
        _show_tokens(console, example, tokenizer, translate("first example: trained tokens are green"))
        return
    for name, side in zip(("chosen", "rejected"), example.sides, strict=True):
        _show_tokens(console, side, tokenizer, f"{translate('first example: trained tokens are green')}: {name}")


def _show_tokens(console: Console, tokens: Tokens, tokenizer: Any, title: str, most: int = 400) -> None:
    text = Text()
    ids, labels = tokens.input_ids[:most].tolist(), tokens.labels[:most].copy()
    labels[[start for start in tokens.starts if start < len(labels)]] = IGNORE  # predicted by nothing
    for trained, run in token_runs(ids, labels):
        shown = tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if trained and not console.color_system:
            shown = f"[{shown}]"
        text.append(shown, style="bold green underline" if trained else "dim")
    if len(tokens.input_ids) > most:
        text.append(" …", style="dim")
    console.print(Panel(text, title=title, title_align="left", border_style="dim"))


def token_runs(ids: list[int], labels: Any) -> list[tuple[bool, list[int]]]:
    runs: list[tuple[bool, list[int]]] = []
    for token, label in zip(ids, labels, strict=True):
        trained = bool(label != IGNORE)
        if not runs or runs[-1][0] != trained:
            runs.append((trained, []))
        runs[-1][1].append(token)
    return runs


def show_run(
    console: Console,
    examples: Examples | Blocks,
    steps: str,
    parameters: tuple[int, int],
    layout: tuple[str, str],
    head: str,
    precision: Precision,
    forecast: Forecast,
    device: torch.device,
) -> None:
    """Print the lines that say what will run."""
    trainable, total = parameters
    console.print(examples.ledger.summary(), soft_wrap=True)
    console.print(steps, soft_wrap=True)
    share = f"{trainable / total:.2%}"
    console.print(
        translate(
            "parameters: {trainable} trained of {total} ({share})",
            trainable=f"{trainable:,}",
            total=f"{total:,}",
            share=share,
        ),
        soft_wrap=True,
    )
    name, reason = layout
    how = translate(
        "compute: {device}, {precision}, layout {layout}, head {head}",
        device=device,
        precision=precision.name,
        layout=name,
        head=head,
    )
    console.print(how, soft_wrap=True)
    if is_card(device):
        console.print(
            translate("norms, rotary positions and gates: {name}", name=implementation(device)), soft_wrap=True
        )
    if reason:
        console.print(
            translate("layout solo: {reason}; one example per microbatch, same loss, slower", reason=reason),
            soft_wrap=True,
            style="yellow",
        )
    parts = ", ".join(f"{PARTS[part]} {size / 2**30:.2f}" for part, size in forecast.parts.items())
    available = f"{forecast.available / 2**30:.1f}"
    console.print(
        translate(
            "memory forecast: {total} GiB ({parts}); {available} GiB available",
            total=f"{forecast.total / 2**30:.2f}",
            parts=parts,
            available=available,
        ),
        soft_wrap=True,
    )


def show_peak(console: Console, found: dict[str, int]) -> None:
    """Print what memory the run took at its peak (see `Forecast.beside`), beside the forecast."""
    expected, measured = found["forecast_memory_bytes"], found["run_memory_bytes"]
    told = {"measured": f"{measured / 2**30:.2f}", "forecast": f"{expected / 2**30:.2f}"}
    error = f"{expected / max(measured, 1) - 1:+.0%}"
    console.print(
        translate(
            "memory: {measured} GiB at the peak above what imports took, forecast {forecast} GiB ({error})",
            **told,
            error=error,
        ),
        soft_wrap=True,
    )
