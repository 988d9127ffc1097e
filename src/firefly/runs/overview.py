"""What is shown of a run's ends: one example with its trained tokens coloured, and the memory that it took."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from firefly.data.schema import IGNORE, Example, Tokens
from firefly.translation import translate


def show_example(console: Console, example: Example, tokenizer: Any) -> None:
    """Print an example as the model sees it; tokens with a loss are green and underlined ([ ] without colours)."""
    if isinstance(example, Tokens):
        title = translate("first example: trained tokens are green")
        if example.desirable is not None:
            title += ": " + (translate("a good answer") if example.desirable else translate("a bad answer"))
        _show_tokens(console, example, tokenizer, title)
        return
    for name, side in zip(("chosen", "rejected"), example.sides, strict=True):
        _show_tokens(console, side, tokenizer, f"{translate('first example: trained tokens are green')}: {name}")


def _show_tokens(console: Console, tokens: Tokens, tokenizer: Any, title: str, most: int = 400) -> None:
    text = Text()
    for trained, shown in text_runs(tokens, tokenizer, most):
        if trained and not console.color_system:
            shown = f"[{shown}]"
        text.append(shown, style="bold green underline" if trained else "dim")
    if len(tokens.input_ids) > most:
        text.append(" …", style="dim")
    console.print(Panel(text, title=title, title_align="left", border_style="dim"))


def text_runs(tokens: Tokens, tokenizer: Any, most: int | None = None) -> list[tuple[bool, str]]:
    """The text of an example's first tokens (None: all) in parts: whether one is trained, and what it says."""
    ids, labels = tokens.input_ids[:most].tolist(), tokens.labels[:most].copy()
    labels[[start for start in tokens.starts if start < len(labels)]] = IGNORE  # predicted by nothing
    return [
        (trained, tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for trained, run in token_runs(ids, labels)
    ]


def token_runs(ids: list[int], labels: Any) -> list[tuple[bool, list[int]]]:
    runs: list[tuple[bool, list[int]]] = []
    for token, label in zip(ids, labels, strict=True):
        trained = bool(label != IGNORE)
        if not runs or runs[-1][0] != trained:
            runs.append((trained, []))
        runs[-1][1].append(token)
    return runs


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
