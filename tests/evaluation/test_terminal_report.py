"""A comparison on the terminal: a handful of lines that fit, in both languages, with and without colours."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from made_reports import ALL, EMPTY, ENDPOINTS, HOSTILE, LONG, NASTY, PROBES, RICH, WORSE, measure
from rich.cells import cell_len
from rich.console import Console

from firefly.evaluation import wording
from firefly.evaluation.report import Report, RowChange, SuspectRow
from firefly.evaluation.terminal import show_report
from firefly.translation import Phrase


def shown(report: Report, width: int = 80, **options: object) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, highlight=False, markup=False, **options)  # type: ignore[arg-type]
    show_report(report, console)
    return stream.getvalue()


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIREFLY_LANG", "en")


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("name", ALL)
def test_what_is_no_sentence_and_no_place_fits_in_both_languages(
    name: str, lang: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIREFLY_LANG", lang)
    report = replace(ALL[name], verdicts=(), notes=(), worst=(), suspects=())
    lines = shown(report, width).splitlines()
    assert [line for line in lines if cell_len(line) > width] == []
    lines = shown(ALL[name], width).splitlines()
    if name not in ("long", "hostile") and width >= 80:
        assert len(lines) < 50


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_numbers_and_verdicts_are_never_cut_at_eighty_columns(lang: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIREFLY_LANG", lang)
    text = shown(RICH)
    for row in RICH.losses:
        (line,) = (line for line in text.splitlines() if wording.interval(row.difference) in line)
        assert line.rstrip().endswith(str(wording.VERDICTS[row.verdict][1]))
        assert {wording.number(row.base), wording.number(row.tuned), str(row.rows)} <= set(line.split())


def test_the_verdicts_come_first_and_then_what_they_rest_on() -> None:
    text = shown(RICH)
    parts = (
        "It helped",
        "What it knew is kept",
        "loss on held-out rows",
        "rows: 71 won, 19 lost, 6 tied",
        "figures of the answers that changed",
        "forgetting: ✓ kept",
        "right before, wrong now:",
        "wrong before, right now:",
        "rows that became worse",
        "suspect rows",
        "note:",
    )
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert shown(EMPTY) == ""


def test_only_figures_that_surely_changed_are_named() -> None:
    text = shown(RICH)
    assert "Repetition" in text
    assert "Tokens per answer" in text
    assert "Right language" not in text
    assert "NaN" not in shown(WORSE).partition("figures of the answers")[2]
    unchanged = replace(RICH, answers=(measure("chrf", 10.0, 11.0, 5.0, "no_difference"),))
    assert "none of them surely changed" in shown(unchanged)


def test_each_figure_says_over_how_many_answers_it_was_taken() -> None:
    lines = shown(replace(RICH, answers=(measure("bleu", 3.1, 44.0, 12.0, "better", 1234),))).splitlines()
    heading = lines[lines.index("figures of the answers that changed") + 1]
    (line,) = (line for line in lines if "better" in line and "+28.9 … +52.9" in line)
    assert heading.split() == ["figure", "answers", "base", "tuned", "95", "%", "interval", "verdict"]
    assert line.split()[-8:] == ["1,234", "3.1", "44.0", "+28.9", "…", "+52.9", "✓", "better"]


def test_at_most_eight_sources_and_three_rows_are_listed() -> None:
    lines = shown(LONG, 120).splitlines()
    assert len([line for line in lines if line.startswith("source-number-")]) == 8
    assert "and 5 more" in lines
    assert sum(line.startswith("noise.jsonl:") for line in shown(WORSE).splitlines()) == 3
    text = shown(ENDPOINTS)
    assert "loss on held-out rows," not in text
    assert "rows that became worse" not in text
    forgotten = replace(RICH.forgetting, lost=tuple(f"question-{number}" for number in range(9)))
    lines = [line.strip() for line in shown(replace(RICH, forgetting=forgotten)).splitlines()]
    assert lines[lines.index("question-5") + 1] == "and 3 more"
    assert "question-6" not in lines


def test_questions_that_were_lost_and_gained_are_named_by_their_texts() -> None:
    lost = replace(PROBES[1], question="At how many degrees\nCelsius does " + "water " * 40 + "boil?")
    report = replace(RICH, side_by_side=(lost, *PROBES[3:]))
    lines = [line.strip() for line in shown(report).splitlines()]
    named = lines[lines.index("✗ right before, wrong now:") + 1]
    assert named.startswith("At how many degrees Celsius does water")
    assert named.endswith("…")
    assert lines[lines.index("✓ wrong before, right now:") + 1] == "中国的首都是哪里？"


def test_what_texts_hold_steers_no_terminal_and_is_no_markup() -> None:
    row = RowChange("a.jsonl:1", "a.jsonl", 1.0, 2.0, NASTY[80:], "")
    for report in (HOSTILE, replace(RICH, worst=(row,))):
        text = shown(report, 300)
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "[U+001B][31m" in text
        assert "[bold]red[/bold]" in text
    (line,) = (line for line in shown(replace(RICH, worst=(row,))).splitlines() if line.startswith("a.jsonl:1 "))
    assert line.endswith("…")


def test_the_places_of_rows_and_of_what_contradicts_them_are_never_cut() -> None:
    folder = "/home/somebody/" + "a-long-folder/" * 6
    reason = Phrase("the same question has another answer in {places}", places=f"{folder}train_zh.jsonl:12")
    rows = tuple(
        SuspectRow(f"{folder}{name}/train.jsonl:8", "", 3.8, 5.1, "Who made you, " * 20, "Nobody.", (reason,) * found)
        for name, found in (("a", 1), ("b" * 90, 0))
    )
    lines = shown(replace(RICH, suspects=rows, notes=())).splitlines()[-2:]
    assert lines[0].startswith("a/train.jsonl:8 ")
    assert lines[0].endswith(f"  3.800 → 5.100  {reason}")
    assert lines[1] == f"{'b' * 90}/train.jsonl:8  3.800 → 5.100  Who made you, Who m…"


def test_colours_are_an_addition() -> None:
    coloured = shown(RICH, force_terminal=True, color_system="standard")
    assert "\x1b[32m✓ better" in coloured
    assert "✓ better" in shown(RICH)
    assert "\x1b" not in shown(RICH)


def test_a_command_in_a_note_or_a_sentence_is_one_line_that_can_be_pasted() -> None:
    command = "firefly compare --base smollm2-135m-instruct --tuned /home/somebody/output --eval_file /data/held.jsonl"
    said = Phrase("no questions were asked, since the weights are sharded over processes: {command}", command=command)
    lines = shown(replace(RICH, verdicts=(said,), notes=(said,)), 60).splitlines()
    assert lines[0] == str(said)
    assert lines[-1] == f"note: {said}"
