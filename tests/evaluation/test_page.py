"""report.html: one file that any browser shows, whatever the texts of rows and answers hold."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import tomllib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import made_reports
import pytest
from made_reports import ALL, EMPTY, HOSTILE, LONG, NASTY, RICH, WORSE, held_out

import firefly
from firefly.evaluation import wording
from firefly.evaluation.intervals import Estimate
from firefly.evaluation.page import Axis, excerpt, write_page
from firefly.evaluation.report import Report, RowChange, SuspectRow

SECTIONS = ("loss", "rows", "figures", "forgetting", "answers", "judge", "suspects", "notes", "compared")
VOID = {"meta", "input", "br", "hr", "img", "link", "source", "embed"}


class Page(HTMLParser):
    """A page as a browser reads it; what is not closed in the order in which it was opened fails."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, "only drawings close their elements themselves"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self) -> str:
        return "".join(text for tag, text in self.texts if tag not in ("style", "script"))

    @property
    def ids(self) -> list[str | None]:
        return [attributes["id"] for _, attributes in self.tags if "id" in attributes]

    def within(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def page_of(report: Report, folder: Path) -> Page:
    write_page(report, folder / "report.html")
    return Page((folder / "report.html").read_bytes().decode("utf-8"))


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIREFLY_LANG", "en")


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("name", ALL)
def test_every_report_is_one_whole_page_that_loads_nothing(
    name: str, lang: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIREFLY_LANG", lang)
    page = page_of(ALL[name], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert page.source.startswith("<!doctype html>")
    assert page.tags[0] == ("html", {"lang": "zh-Hans" if lang == "zh" else "en"})
    assert len(set(page.ids)) == len(page.ids)
    loading = {"src", "srcset", "data", "poster", "action", "background", "xlink:href", "style"}
    for tag, attributes in page.tags:
        assert tag not in ("img", "link", "iframe", "object", "embed", "base", "image", "use"), tag
        assert not {key for key in attributes if key.startswith("on")}
        assert not loading & attributes.keys()
        if "href" in attributes:
            assert attributes["href"].removeprefix("#") in page.ids
    (style,) = page.within("style")
    assert set(re.findall(r"url\(|@import|https?:", style)) == set()
    assert re.findall(r"url\([^)]*\)", page.source.replace(style, "")) in ([], ["url(#hatch)"])


def test_only_the_script_of_the_page_may_run_and_nothing_may_be_fetched(tmp_path: Path) -> None:
    page = page_of(HOSTILE, tmp_path)
    (policy,) = (found["content"] for tag, found in page.tags if "http-equiv" in found)
    (script,) = page.within("script")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.split("; ")[:3] == [
        "default-src 'none'", "style-src 'unsafe-inline'", f"script-src 'sha256-{digest}'"
    ]  # fmt: skip


def test_what_texts_hold_stays_text(tmp_path: Path) -> None:
    page = page_of(HOSTILE, tmp_path)
    harmless = page_of(RICH, tmp_path)
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in harmless.tags}
    assert page.text.count(wording.visible(NASTY)) > 20
    assert "{{ 7 * 7 }}" in page.text
    assert re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202d\u202e\ufffe\uffff]", page.source) == []
    assert "[U+001B][31m" in page.text
    assert "[U+202E]gnitfil" in page.text
    isolated = [attributes for _, attributes in page.tags if attributes.get("class") == "text"]
    assert isolated
    assert all(attributes["dir"] == "auto" for attributes in isolated)


WITHOUT = {
    "loss": {"losses": ()},
    "rows": {"won": 0, "lost": 0, "tied": 0, "worst": (), "best": ()},
    "figures": {"answers": ()},
    "forgetting": {"forgetting": None},
    "answers": {"side_by_side": ()},
    "judge": {"judge": None},
    "suspects": {"suspects": ()},
    "notes": {"notes": ()},
}


def test_every_part_is_there_in_its_order(tmp_path: Path) -> None:
    page = page_of(RICH, tmp_path)
    assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)
    assert [attributes["href"][1:] for tag, attributes in page.tags if tag == "a"][: len(SECTIONS)] == list(SECTIONS)
    assert [name for name in page_of(EMPTY, tmp_path).ids if name in SECTIONS] == ["compared"]


@pytest.mark.parametrize("name", WITHOUT)
def test_a_part_that_the_report_lacks_is_left_out_of_the_page_and_its_contents(name: str, tmp_path: Path) -> None:
    page = page_of(replace(RICH, **WITHOUT[name]), tmp_path)
    assert [found for found in page.ids if found in SECTIONS] == [found for found in SECTIONS if found != name]
    assert f"#{name}" not in [attributes.get("href") for _, attributes in page.tags]


def test_no_heading_of_the_chinese_page_is_english(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIREFLY_LANG", "zh")
    page = page_of(RICH, tmp_path)
    words = [text for tag in ("h2", "h3", "strong", "figcaption", "label") for text in page.within(tag)]
    words += page.within("a")[: len(SECTIONS)]
    assert len(words) > 25
    assert [text for text in words if re.search(r"[a-zA-Z]", text) and not re.search(r"[\u4e00-\u9fff]", text)] == []


def test_the_verdicts_stand_first_with_a_sign_and_a_word_for_what_is_coloured(tmp_path: Path) -> None:
    page = page_of(WORSE, tmp_path)
    assert page.text.index("It did harm") < page.text.index("Loss on held-out rows")
    coloured = page.source.count('class="verdict ')
    assert coloured > 8
    sign = r'<svg class="mark (\w+)"(?:(?!</svg>).)*</svg>'
    found = re.findall(rf'class="verdict (\w+)">{sign}([^<]+)<', page.source, re.DOTALL)
    assert len(found) == coloured
    assert all(colour == shape and word.strip() for colour, shape, word in found)
    shapes = {
        name: re.search(rf'<svg class="mark {name}".*?</svg>', page_of(RICH, tmp_path).source, re.DOTALL)[0]
        for name in wording.SIGNS
    }
    assert len({shape.partition(">")[2] for shape in shapes.values()}) == 4


def test_the_table_of_losses_says_what_the_report_holds(tmp_path: Path) -> None:
    text = re.sub(r"\s+", " ", page_of(RICH, tmp_path).text)
    assert "96 2.913 1.104 18.41 → 3.02−1.809−1.930 … −1.688 better" in text
    assert "-0" not in text.partition("Answers side by side")[2].partition("What was compared")[0]
    assert "60.0 %3 / 5" in text  # right answers to general questions, counted
    by_bytes = page_of(replace(RICH, unit="byte"), tmp_path).text
    assert "nats per byte" in by_bytes
    assert "erplexity" not in by_bytes


@pytest.mark.parametrize(
    ("lang", "named"), [("en", {"named as", "hash of the template", "time taken, in seconds"}), ("zh", {"指定为"})]
)
def test_what_was_compared_is_said_in_words_with_hashes_shortened(
    lang: str, named: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIREFLY_LANG", lang)
    digest = hashlib.sha256(b"").hexdigest()
    described = dict.fromkeys(wording.PROPERTIES) | {"template_hash": digest, "something_new": "deadbeef"}
    page = page_of(replace(RICH, tuned=replace(RICH.tuned, described=described)), tmp_path)
    (at,) = (number for number, (_, attributes) in enumerate(page.tags) if attributes.get("id") == "compared")
    hashes = [attributes["title"] for _, attributes in page.tags[at:] if "title" in attributes]
    assert hashes == [digest]
    compared = page.source.partition('id="compared"')[2]
    assert re.findall(rf">({digest[:8]}\w*…?)<", compared) == [f"{digest[:12]}…"]
    rows = set(re.findall(r'<th scope="row">(?:<bdi>)?([^<]+)<', compared))
    assert named <= rows
    assert not rows & (wording.PROPERTIES.keys() - {"model", "adapter"} | {"seconds"})
    assert "something_new" in rows
    assert "deadbeef" in compared


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_every_percentage_of_the_page_is_written_alike(
    lang: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIREFLY_LANG", lang)
    page = page_of(replace(RICH, verdicts=(), notes=()), tmp_path)
    spoken = [attributes["aria-label"] or "" for _, attributes in page.tags if "aria-label" in attributes]
    found = re.findall(r".{2}%", " ".join([page.text, *spoken]))
    assert len(found) > 30
    assert [text for text in found if text[1] != "\N{NO-BREAK SPACE}" or not text[0].isdigit()] == []


def test_what_is_no_number_is_said_and_not_drawn(tmp_path: Path) -> None:
    page = page_of(WORSE, tmp_path)
    assert "cannot be drawn: ∞" in page.text
    assert "NaN" in page.text
    places = [
        value for _, attributes in page.tags for key, value in attributes.items() if key in ("x", "x1", "x2", "cx")
    ]
    assert len(places) > 50
    assert [value for value in places if not 0 <= float(value.rstrip("%")) <= 100] == []
    nothing = Estimate(math.nan, math.nan, math.nan)
    page_of(replace(RICH, forgetting=replace(RICH.forgetting, change=nothing)), tmp_path)


def test_long_texts_are_folded_and_whole(tmp_path: Path) -> None:
    page = page_of(LONG, tmp_path)
    answer = LONG.side_by_side[1].answers[0]
    assert len(answer) == 10_000
    assert answer in page.text
    assert page.source.count('<details class="long">') > 100
    assert ".text { white-space: pre-wrap;" in page.source
    assert "An answer of many lines.\n" * 60 in page.text
    assert excerpt("a" * 700) is None
    assert excerpt("a\n" * 20) == "\n".join("a" * 6) + " …"
    assert len(excerpt("a" * 701)) < 400


def test_an_answer_says_whether_it_is_right_cut_off_or_failed(tmp_path: Path) -> None:
    text = page_of(RICH, tmp_path).text
    assert "cut off at 64 tokens" in text
    assert "no answer: no answer in 60 s" in text
    assert text.count("same answer") == 2
    unlimited = replace(RICH, tuned=RICH.base)
    assert "cut off at the limit of tokens" in page_of(unlimited, tmp_path).text
    opened = re.findall(r'<details class="card pair" id="(q\d+)"[^>]* open>', page_of(RICH, tmp_path).source)
    assert opened == ["q1", "q2", "q4", "q6", "q8"]  # that differ; of general questions, those lost or gained


def test_the_page_is_printed_light_and_unfolded(tmp_path: Path) -> None:
    (style,) = page_of(RICH, tmp_path).within("style")
    printed = style.partition("@media print")[2]
    for rule in (
        "details::details-content { content-visibility: visible",
        "break-inside: avoid",
        "display: table-header-group",
        "nav, #filter",
    ):
        assert rule in printed
    assert "@media screen and (prefers-color-scheme: dark)" in style  # paper is never dark
    assert "(max-width" not in re.sub(r"@media screen and \(max-width", "", style)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_colour_of_text_can_be_read_on_light_and_dark_ground(tmp_path: Path) -> None:
    (style,) = page_of(RICH, tmp_path).within("style")
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in style.split("@media")[:2])
    assert light.keys() == dark.keys()
    for colours in (light, dark):
        for text in ("ink", "muted", "accent", "good", "bad", "same", "unknown"):
            for ground in ("paper", "panel", "zone") if text == "bad" else ("paper", "panel"):
                bright, deep = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
                assert (bright + 0.05) / (deep + 0.05) >= 4.5, (text, ground, colours)


def test_the_templates_are_part_of_the_package() -> None:
    source = Path(firefly.__file__).parent
    project = tomllib.loads((source.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["firefly"]
    packaged = {path for pattern in patterns for path in source.glob(pattern)}
    templates = set((source / "evaluation").glob("*.jinja"))
    assert len(templates) == 2
    assert templates <= packaged


@pytest.mark.parametrize(
    ("value", "digits", "signed", "text"),
    [
        (1.5, 3, False, "1.500"),
        (-1.5, 2, False, "−1.50"),
        (1.5, 1, True, "+1.5"),
        (-0.0004, 3, True, "0.000"),
        (0.0004, 3, True, "0.000"),
        (-0.0, 1, False, "0.0"),
        (-0.0006, 3, False, "−0.001"),
        (12345.678, 1, False, "12,345.7"),
        (math.nan, 3, True, "NaN"),
        (math.inf, 3, False, "∞"),
        (math.inf, 3, True, "+∞"),
        (-math.inf, 3, False, "−∞"),
        (123456789.0, 3, False, "1.2 × 10^8"),
        (-3e300, 3, True, "−3.0 × 10^300"),
    ],
)
def test_numbers_are_written_as_people_read_them(value: float, digits: int, signed: bool, text: str) -> None:
    assert wording.number(value, digits, signed) == text


def test_shares_perplexities_and_intervals_are_written_so_too() -> None:
    assert wording.percent(0.0192, 1, True) == "+1.9\N{NO-BREAK SPACE}%"
    assert [wording.perplexity(loss) for loss in (0.0, 5.0, 9.0, 1e4, math.inf, math.nan)] == [
        "1.00", "148.4", "8,103", "∞", "∞", "NaN"
    ]  # fmt: skip
    change = Estimate(-0.25, -0.5, 0.0)
    assert wording.measured_change("stop_rate", change) == ("−25.0", "−50.0 … 0.0")
    assert wording.measured_change("chrf", change) == ("−0.2", "−0.5 … 0.0")
    assert wording.measured("exact_match", 1.0) == "100.0\N{NO-BREAK SPACE}%"
    assert wording.measured("tokens", 12.34) == "12.3"


def test_an_interval_that_ends_near_zero_shows_on_which_side() -> None:
    assert wording.measured_change("bleu", Estimate(4.2, 0.00495, 8.4))[1] == "+0.005 … +8.4"
    assert wording.measured_change("chrf", Estimate(5.4, -0.02, 10.9))[1] == "−0.02 … +10.9"
    assert wording.measured_change("stop_rate", Estimate(-0.2, -0.4, -0.0001))[1] == "−40.0 … −0.01"
    assert wording.interval(Estimate(-0.1, -0.2, -0.0004)) == "−0.200 … −0.0004"
    assert wording.interval(Estimate(-0.1, -0.2, 0.0)) == "−0.200 … 0.000"
    assert wording.interval(Estimate(0.1, 1e-12, 0.2)) == "0.000 … +0.200"


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.003, 0.0001), (-1e9, 5.0), (7.0, 7.0), (-0.02, 0.08)])
def test_an_axis_holds_its_values_and_round_numbers_between(low: float, high: float) -> None:
    axis = Axis.over(low, high, math.nan, math.inf)
    assert axis is not None
    places = [float(axis.at(value).rstrip("%")) for value in (axis.low, low, high, axis.high)]
    assert places == sorted(places)
    assert (places[0], places[-1]) == (0, 100)
    assert 2 <= len(axis.ticks) <= 9
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    labels = [wording.number(tick, axis.digits) for tick in axis.ticks]
    assert len(set(labels)) == len(labels)
    assert Axis.over(1.0, math.nan) is None


def test_places_have_the_folders_that_tell_files_apart() -> None:
    def short(*places: str) -> list[str]:
        return list(wording.short_places(places).values())

    assert short("/data/a/x.jsonl:1", "/data/b/y.jsonl:2") == ["x.jsonl:1", "y.jsonl:2"]
    assert short("/data/a/x.jsonl:1", "/data/b/x.jsonl:2") == ["a/x.jsonl:1", "b/x.jsonl:2"]
    assert short("/data/x.jsonl:12#2", "/data/x.jsonl:1", "x.jsonl:1") == [
        "data/x.jsonl:12#2",
        "data/x.jsonl:1",
        "x.jsonl:1",
    ]
    assert short("/x.jsonl:1", "x.jsonl:1", "b/x.jsonl:1") == ["/x.jsonl:1", "x.jsonl:1", "b/x.jsonl:1"]
    assert short("probe/en/formula-of-water", "http://a/b:8000/v1", "") == [
        "probe/en/formula-of-water",
        "http://a/b:8000/v1",
        "",
    ]
    assert short() == []


def test_a_row_has_one_short_place_wherever_it_stands_and_the_whole_one_as_title(tmp_path: Path) -> None:
    ours, theirs = "/home/somebody/project/held.jsonl", "/home/somebody/project/train.jsonl"
    report = replace(
        RICH,
        worst=(RowChange(f"{ours}:3", ours, 1.0, 2.0, "Why?", "So."),),
        best=(),
        suspects=(SuspectRow(f"{theirs}:8", theirs, 3.0, 4.0, "Who?", "I.", ()),),
        side_by_side=(held_out(3, "Why?", "So.", "Yes.", "No."),),
        forgetting=None,
        judge=None,
    )
    report = replace(report, side_by_side=(replace(report.side_by_side[0], key=f"{ours}:3"),))
    page = page_of(report, tmp_path)
    assert "/home" not in page.text
    titles = [attributes["title"] for tag, attributes in page.tags if tag == "bdi" and "title" in attributes]
    assert titles == [f"{ours}:3"] * 3 + [f"{theirs}:8"]
    assert [text for text in page.within("bdi") if "jsonl:" in text] == ["held.jsonl:3"] * 3 + ["train.jsonl:8"]


def test_every_figure_has_a_name_and_an_explanation() -> None:
    from typing import get_args

    from firefly.evaluation.intervals import Verdict
    from firefly.evaluation.measurement import Unit
    from firefly.evaluation.report import MeasureName, Retention

    assert set(wording.MEASURES) == set(get_args(MeasureName))
    assert set(wording.VERDICTS) == set(get_args(Verdict))
    assert set(wording.RETENTIONS) == set(get_args(Retention))
    assert set(wording.UNITS) == set(get_args(Unit))


def test_the_made_reports_hold_every_verdict() -> None:
    verdicts = {row.verdict for report in made_reports.ALL.values() for row in report.losses}
    assert verdicts == set(wording.VERDICTS)
