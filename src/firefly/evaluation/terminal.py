"""A comparison in a handful of lines, for who does not open the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from firefly.evaluation import wording
from firefly.evaluation.report import Forgetting, LossComparison, Measure, Report, RowChange, SuspectRow
from firefly.translation import translate

SHOWN_SOURCES = 8
SHOWN_ROWS = 3
SHOWN_KEYS = 6
LEAST_CELLS = 20
"""Of a question behind a place that leaves no room for it."""
STYLES: dict[wording.Sign, str] = {"good": "green", "bad": "red", "same": "dim", "unknown": "yellow"}


def show_report(report: Report, console: Console) -> None:
    """Print what a reader should take away, then the figures that this rests on.

    Figures of answers are left out where they did not change; the page has all of them.
    """
    for number, sentence in enumerate(report.verdicts):
        _say(console, Text(wording.visible(str(sentence)), style="bold" if number == 0 else ""))
    if report.losses:
        _show_losses(report, console)
    if report.answers:
        _show_measures(report.answers, console)
    if report.forgetting is not None:
        _show_forgetting(report.forgetting, {row.key: row.question for row in report.side_by_side}, console)
    worst, suspects = report.worst[:SHOWN_ROWS], report.suspects[:SHOWN_ROWS]
    places = wording.short_places(row.key for row in (*worst, *suspects))
    _show_rows(translate("rows that became worse (loss before and after)"), worst, places, console)
    _show_rows(translate("suspect rows of the training data (loss before and after)"), suspects, places, console)
    for note in report.notes:
        _say(console, Text(f"{translate('note:')} {wording.visible(str(note))}", style="dim"))


def _say(console: Console, line: Text) -> None:
    """Print one line whole: a terminal wraps it, and in a file a command or a place can be copied out of it."""
    console.print(line, soft_wrap=True)


def _show_losses(report: Report, console: Console) -> None:
    table = _table(translate("source"))
    for title in (translate("rows"), translate("base"), translate("tuned"), translate("95 % interval")):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column(translate("verdict"), no_wrap=True)
    for row in report.losses[: SHOWN_SOURCES + 1]:
        table.add_row(*_loss_cells(row))
    console.print()
    _say(console, Text(translate("loss on held-out rows, {unit}", unit=wording.UNITS[report.unit]), style="bold"))
    console.print(table)
    if (left := len(report.losses) - 1 - SHOWN_SOURCES) > 0:
        _say(console, Text(translate("and {count} more", count=left), style="dim"))
    won, lost, tied = (wording.number(count, 0) for count in (report.won, report.lost, report.tied))
    _say(console, Text(translate("rows: {won} won, {lost} lost, {tied} tied", won=won, lost=lost, tied=tied)))


def _loss_cells(row: LossComparison) -> list[RenderableType]:
    return [
        Text(wording.visible(row.source) or translate("all")),
        Text(wording.number(row.rows, 0)),
        Text(wording.number(row.base)),
        Text(wording.number(row.tuned)),
        Text(wording.interval(row.difference)),
        _signed(wording.VERDICTS[row.verdict]),
    ]


def _show_measures(measures: Sequence[Measure], console: Console) -> None:
    changed = [measure for measure in measures if measure.difference.low > 0 or measure.difference.high < 0]
    console.print()
    if not changed:
        _say(console, Text(translate("figures of the answers: none of them surely changed")))
        return
    _say(console, Text(translate("figures of the answers that changed"), style="bold"))
    table = _table(translate("figure"))
    for title in (translate("answers"), translate("base"), translate("tuned"), translate("95 % interval")):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column(translate("verdict"), no_wrap=True)
    for measure in changed:
        found = wording.measure_verdict(measure.name, measure.verdict)
        table.add_row(
            Text(str(wording.MEASURES[measure.name][0])),
            Text(wording.number(measure.count, 0)),
            Text(wording.measured(measure.name, measure.base)),
            Text(wording.measured(measure.name, measure.tuned)),
            Text(wording.measured_change(measure.name, measure.difference)[1]),
            _signed(found) if found else Text("–"),
        )
    console.print(table)


def _show_forgetting(found: Forgetting, asked: Mapping[str, str], console: Console) -> None:
    """The verdict, and the questions that one of the models alone answers, by their texts where these are known."""
    console.print()
    _say(console, Text.assemble(translate("forgetting:"), " ", _signed(wording.RETENTIONS[found.verdict])))
    flips: tuple[tuple[wording.Sign, str, tuple[str, ...]], ...] = (
        ("bad", translate("right before, wrong now:"), found.lost),
        ("good", translate("wrong before, right now:"), found.gained),
    )
    for sign, title, keys in flips:
        if not keys:
            continue
        _say(console, Text.assemble("  ", (f"{wording.SIGNS[sign]} {title}", STYLES[sign])))
        for key in keys[:SHOWN_KEYS]:
            console.print(Text(f"    {_line(asked.get(key) or key)}"), no_wrap=True, overflow="ellipsis")
        if len(keys) > SHOWN_KEYS:
            _say(console, Text(f"    {translate('and {count} more', count=len(keys) - SHOWN_KEYS)}", style="dim"))


def _show_rows(
    title: str, rows: Sequence[RowChange] | Sequence[SuspectRow], short: Mapping[str, str], console: Console
) -> None:
    """One line for each row: its place, its losses, and why it is named, all of it, or as much of its question as fits.

    A reason holds places of other rows, which are to be found: they are not cut.
    """
    if not rows:
        return
    console.print()
    _say(console, Text(title, style="bold"))
    places = [wording.visible(short[row.key]) for row in rows]
    width = min(max(map(cell_len, places)), console.width // 2)
    for place, row in zip(places, rows, strict=True):
        place += " " * (width - cell_len(place))
        begun = f"{place}  {wording.number(row.base)} → {wording.number(row.tuned)}  "
        if isinstance(row, SuspectRow) and row.reasons:
            said = Text(_line(str(row.reasons[0])))
        else:
            said = Text(_line(row.question))
            said.truncate(max(console.width - cell_len(begun), LEAST_CELLS), overflow="ellipsis")
        _say(console, Text(f"{begun}{said}".rstrip()))


def _line(text: str) -> str:
    return " ".join(wording.visible(text).split())


def _table(first: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first, overflow="fold", min_width=8)
    return table


def _signed(found: tuple[wording.Sign, object]) -> Text:
    sign, word = found
    return Text(f"{wording.SIGNS[sign]} {word}", style=STYLES[sign])
