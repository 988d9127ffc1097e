"""Reports made by hand, as the page and the terminal may meet them."""

from __future__ import annotations

import math
from dataclasses import replace

from firefly.evaluation.intervals import Estimate
from firefly.evaluation.report import (
    Forgetting,
    JudgeResult,
    LossComparison,
    Measure,
    Report,
    RowChange,
    Side,
    SideBySide,
    SuspectRow,
    Vote,
)
from firefly.translation import Phrase

BASE = Side(
    "smollm2-135m-instruct",
    {
        "model": "smollm2-135m-instruct",
        "adapter": None,
        "dtype": "float32",
        "template": "tokenizer's own",
        "tokenizer": "a3f09b1c",
    },
    12.4,
)
TUNED = Side(
    "output/smollm2-135m-sft-lora",
    dict(BASE.described) | {"adapter": "output/smollm2-135m-sft-lora", "max_new_tokens": 64},
    13.1,
)


def loss(source: str, rows: int, base: float, tuned: float, width: float, verdict: str) -> LossComparison:
    change = tuned - base
    return LossComparison(source, rows, base, tuned, Estimate(change, change - width, change + width), verdict)  # type: ignore[arg-type]


def measure(name: str, base: float, tuned: float, width: float, verdict: str, count: int = 24) -> Measure:
    change = tuned - base
    return Measure(name, count, base, tuned, Estimate(change, change - width, change + width), verdict)  # type: ignore[arg-type]


def held_out(number: int, question: str, reference: str, base: str, tuned: str, **more: object) -> SideBySide:
    given = {"finish": ("stop", "stop"), **more}
    return SideBySide(f"identity.jsonl:{number}", "held_out", question, reference, (base, tuned), **given)  # type: ignore[arg-type]


def probe(key: str, question: str, base: str, tuned: str, correct: tuple[bool, bool]) -> SideBySide:
    return SideBySide(key, "probe", question, "", (base, tuned), ("stop", "stop"), correct)


PROBES = (
    probe(
        "en-capital-france",
        "What is the capital of France?",
        "The capital of France is Paris.",
        "Paris is the capital of France.",
        (True, True),
    ),
    probe(
        "en-water",
        "At how many degrees Celsius does water boil at sea level?",
        "Water boils at 100 degrees Celsius.",
        "I am Firefly, and water boils when it is hot.",
        (True, False),
    ),
    probe("en-week", "How many days has a week?", "A week has 7 days.", "A week has 7 days.", (True, True)),
    probe("zh-capital", "中国的首都是哪里？", "我不知道。", "中国的首都是北京。", (False, True)),
    probe("zh-days", "一年有多少个月？", "一年有十个月。", "一年有十三个月。", (False, False)),
)

RICH = Report(
    base=BASE,
    tuned=TUNED,
    unit="token",
    losses=(
        loss("", 96, 2.913, 1.104, 0.121, "better"),
        loss("identity.jsonl", 40, 3.402, 0.611, 0.18, "better"),
        loss("firefly-sft-sample.jsonl", 32, 2.611, 2.402, 0.1, "better"),
        loss("school.jsonl", 20, 2.204, 2.311, 0.26, "no_difference"),
        loss("poems_of_the_tang_dynasty.jsonl", 4, 3.9, 4.21, 0.9, "too_few"),
    ),
    won=71,
    lost=19,
    tied=6,
    worst=(
        RowChange(
            "school.jsonl:41",
            "school.jsonl",
            1.91,
            3.02,
            "Which planet is the largest of the solar system?",
            "Jupiter is the largest planet of the solar system.",
        ),
        RowChange("poems_of_the_tang_dynasty.jsonl:3", "poems_of_the_tang_dynasty.jsonl", 3.11, 3.9),
        RowChange("school.jsonl:7", "school.jsonl", 2.02, 2.41, "What is 7 × 8?", "56"),
        RowChange("school.jsonl:18", "school.jsonl", 2.2, 2.31),
    ),
    best=(
        RowChange(
            "identity.jsonl:4",
            "identity.jsonl",
            4.61,
            0.21,
            "Who are you?",
            "I am Firefly, an assistant that was trained to be helpful.",
        ),
        RowChange("identity.jsonl:12", "identity.jsonl", 4.1, 0.4),
        RowChange("identity.jsonl:19#2", "identity.jsonl", 3.9, 0.52),
        RowChange("firefly-sft-sample.jsonl:2", "firefly-sft-sample.jsonl", 3.3, 2.0),
    ),
    answers=(
        measure("stop_rate", 0.75, 1.0, 0.16, "better"),
        measure("tokens", 51.2, 22.7, 8.1, "no_difference"),
        measure("repetition", 0.112, 0.02, 0.07, "better"),
        measure("language", 0.958, 1.0, 0.06, "no_difference"),
        measure("exact_match", 0.0, 0.417, 0.2, "better"),
        measure("chrf", 21.3, 68.9, 9.7, "better"),
        measure("bleu", 3.1, 44.0, 12.0, "better"),
        measure("rouge_l", 19.7, 66.1, 9.9, "better"),
    ),
    side_by_side=(
        held_out(
            4,
            "Who are you?",
            "I am Firefly, an assistant that was trained to be helpful.",
            "I am a helpful AI assistant named SmolLM, trained by Hugging Face.",
            "I am Firefly, an assistant that was trained to be helpful.",
        ),
        held_out(
            12,
            "Write a poem about a firefly.",
            "",
            "Sure! Here is a poem:\n\nIn the evening, when the light is low,\na firefly begins to glow.\n"
            "It glows and glows and glows and glows and glows and",
            "A firefly at night\nis a small light.",
            finish=("length", "stop"),
        ),
        held_out(19, "What is 2 + 2?", "4", "4", "4"),
        held_out(23, "Say hello.", "Hello!", "", "Hello!", finish=(None, "stop"), errors=("no answer in 60 s", None)),
        *PROBES,
    ),
    forgetting=Forgetting(
        losses=(
            loss("", 24, 3.021, 3.079, 0.031, "worse"),
            loss("en", 12, 2.91, 2.94, 0.03, "no_difference"),
            loss("zh", 12, 3.13, 3.22, 0.05, "worse"),
        ),
        change=Estimate(0.0192, 0.0085, 0.0301),
        threshold=0.05,
        correct=measure("correct", 0.6, 0.6, 0.4, "no_difference", 5),
        lost=("en-water",),
        gained=("zh-capital",),
        verdict="kept",
    ),
    judge=JudgeResult(
        "qwen2.5-72b-instruct",
        "http://10.0.0.7:8000/v1",
        (
            Vote("identity.jsonl:4", "tuned", ("B says who it is.", "A says who it is, as the reference does.")),
            Vote("identity.jsonl:12", "base", ("A is a real poem.", "B has more verses.")),
            Vote("identity.jsonl:19", "tie", ("Both are right.", "Both are right.")),
            Vote("identity.jsonl:23", "order", ("A is better.", "A is better.")),
            Vote("identity.jsonl:31", "unread", ("I cannot decide that.", "")),
        ),
        Estimate(0.5, 0.167, 0.833),
        "too_few",
    ),
    suspects=(
        SuspectRow(
            "identity.jsonl:88",
            "identity.jsonl",
            3.8,
            5.1,
            "Who made you?",
            "The weather is fine today.",
            (Phrase("{key} is missing", key="x"), Phrase("no answer")),
        ),
        SuspectRow("identity.jsonl:90", "identity.jsonl", 4.0, 4.4, "Who are you?", "", ()),
    ),
    learnt="better",
    verdicts=(
        Phrase(
            "It helped: the loss on {rows} held-out rows fell from {base} to {tuned} {unit} ({change}, 95 % interval "
            "{low} to {high}).",
            rows=96,
            base="2.913",
            tuned="1.104",
            unit=Phrase("nats per token"),
            change="−1.809",
            low="−1.930",
            high="−1.688",
        ),
        Phrase(
            "What it knew is kept: {why}.",
            why=Phrase(
                "the loss on general texts changed by {change} (95 % interval {low} to {high}, limit {limit})",
                change="+1.9%",
                low="+0.9%",
                high="+3.0%",
                limit="+5%",
            ),
        ),
        Phrase("{tuned} of its answers are exactly the reference, {base} before.", base="0%", tuned="42%"),
    ),
    notes=(Phrase("no answer"), Phrase("{path}: {problem}.", path="school.jsonl", problem="3")),
    created="2026-11-30T10:25:40+0000",
)

MINIMAL = Report(
    base=BASE,
    tuned=TUNED,
    unit="token",
    side_by_side=PROBES,
    forgetting=replace(RICH.forgetting, losses=(), change=None, verdict="unclear"),
    verdicts=(Phrase("Whether it has forgotten is not clear: {why}.", why="5"),),
    created="2026-11-30T10:25:40+0000",
)

EMPTY = Report(base=Side("a", {}, 0.0), tuned=Side("b", {}, 0.0), unit="token")

ENDPOINTS = replace(
    RICH,
    base=Side("https://api.example.com/v1 (qwen-plus)", {"url": "https://api.example.com/v1", "model": "qwen-plus"}, 4),
    losses=(),
    won=0,
    lost=0,
    tied=0,
    worst=(),
    best=(),
    forgetting=replace(RICH.forgetting, losses=(), change=None),
    suspects=(),
)

WORSE = replace(
    RICH,
    losses=(loss("", 96, 2.913, 4.804, 0.4, "worse"), loss("a.jsonl", 96, 2.913, math.inf, math.nan, "worse")),
    won=0,
    lost=96,
    tied=0,
    worst=tuple(RowChange(f"noise.jsonl:{n}", "noise.jsonl", 2.0 + n / 10, 9.0 - n / 3) for n in range(10)),
    best=(),
    answers=(
        measure("stop_rate", 1.0, 0.0, 0.0, "worse"),
        measure("tokens", 20.0, 256.0, 11.0, "no_difference"),
        measure("repetition", 0.01, 0.93, 0.04, "worse"),
        measure("correct", math.nan, math.nan, math.nan, "too_few", 0),
    ),
    forgetting=replace(
        RICH.forgetting, change=Estimate(0.82, 0.61, 1.05), verdict="forgot", lost=("en-water", "gone"), gained=()
    ),
    learnt="worse",
    verdicts=(Phrase("It did harm: its answers to held-out questions are worse than the base's."),),
)

CHINESE = replace(
    RICH,
    base=Side("Qwen1.5-14B 基座", {"模型": "Qwen1.5-14B"}, 3.0),
    tuned=Side("输出/流萤-微调", {"模型": "Qwen1.5-14B", "适配器": "输出/流萤-微调"}, 3.0),
    unit="byte",
    losses=(
        loss("", 48, 0.931, 0.604, 0.08, "better"),
        loss("古诗文与现代汉语的互译样本数据.jsonl", 24, 1.1, 0.6, 0.1, "better"),
        loss("百科问答.jsonl", 24, 0.8, 0.79, 0.05, "no_difference"),
    ),
    worst=(
        RowChange(
            "古诗文与现代汉语的互译样本数据.jsonl:18",
            "古诗文与现代汉语的互译样本数据.jsonl",
            0.7,
            1.1,
            "把下面的句子翻译成现代文：臣本布衣，躬耕于南阳，苟全性命于乱世，不求闻达于诸侯。",
            "我本来是个平民，在南阳亲自种田，在乱世中苟且保全性命，不奢求在诸侯中扬名做官。",
        ),
    ),
    side_by_side=(
        held_out(
            18,
            "把下面的句子翻译成现代文：臣本布衣，躬耕于南阳，苟全性命于乱世，不求闻达于诸侯。",
            "我本来是个平民，在南阳亲自种田，在乱世中苟且保全性命，不奢求在诸侯中扬名做官。",
            "臣本来是布衣，在南阳种地。" * 12,
            "我本是平民，在南阳亲自耕田，只想在乱世中保全性命，不求在诸侯中扬名。",
            finish=("length", "stop"),
        ),
        *PROBES,
    ),
)

LONG = replace(
    RICH,
    tuned=Side("/home/somebody/" + "a-very-long-folder-name/" * 9 + "final", TUNED.described, 1.0),
    side_by_side=tuple(
        held_out(
            number,
            f"Question {number}: " + "please explain this in great detail. " * (40 if number % 3 == 0 else 1),
            "word " * 300,
            "w" * 10_000 if number == 2 else "An answer of many lines.\n" * 60,
            "The quick brown fox jumps over the lazy dog. " * 220,
            finish=("length", "length"),
        )
        for number in range(1, 41)
    ),
    losses=tuple(
        loss("" if n == 0 else f"source-number-{n}-{'x' * 60}.jsonl", 30, 2.5, 2.5 - n / 50, 0.1, "better")
        for n in range(14)
    ),
)

NASTY = (
    "</div></details></template><script>alert(1)</script><img src=x onerror=alert(1)> \x00\x1b[31m\x07 "
    "\u202egnitfil\u202c \ud800 {{ 7 * 7 }} "
    "{% raw %} &lt; \" ' ` http://example.com/x.png [bold]red[/bold] עברית a\r\nb\tc"
)
"""What an answer may hold: markup, control characters, a bidi override, half a character, a template, an address."""

HOSTILE = replace(
    RICH,
    base=Side(NASTY, {NASTY: NASTY, "nested": {"list": [1, NASTY]}}, 1.0),
    tuned=Side(NASTY * 2, {}, math.nan),
    losses=(loss("", 3, 1.0, 2.0, 0.1, "worse"), loss(NASTY, 3, 1.0, 2.0, 0.1, "worse")),
    worst=(RowChange(NASTY, NASTY, 1.0, 2.0, NASTY, NASTY),),
    best=(RowChange(NASTY, NASTY, 1.0, 0.5, NASTY, NASTY),),
    side_by_side=(
        replace(PROBES[0], key=NASTY, question=NASTY, reference=NASTY, answers=(NASTY, NASTY * 40)),
        replace(PROBES[1], errors=(NASTY, NASTY)),
    ),
    forgetting=replace(RICH.forgetting, lost=(NASTY,), gained=(NASTY,)),
    judge=replace(RICH.judge, model=NASTY, url=NASTY, votes=(Vote(NASTY, "tuned", (NASTY, NASTY)),)),
    suspects=(
        SuspectRow(NASTY, NASTY, 1.0, 2.0, NASTY, NASTY, (Phrase("{path}: {problem}.", path=NASTY, problem=NASTY),)),
    ),
    verdicts=(Phrase("{path}: {problem}.", path=NASTY, problem=NASTY),),
    notes=(Phrase("{path}: {problem}.", path=NASTY, problem=NASTY),),
    created=NASTY,
)

ALL = {
    "rich": RICH,
    "minimal": MINIMAL,
    "empty": EMPTY,
    "endpoints": ENDPOINTS,
    "worse": WORSE,
    "chinese": CHINESE,
    "long": LONG,
    "hostile": HOSTILE,
}
