"""What a reader should take from a comparison, in words."""

from __future__ import annotations

from collections.abc import Sequence

from firefly.evaluation.measurement import Unit
from firefly.evaluation.report import Forgetting, JudgeResult, Measure, Report
from firefly.evaluation.wording import end_of_interval, number, percent
from firefly.translation import Phrase


def sentences(report: Report) -> list[Phrase]:
    """What a reader should take away, in the order of its weight."""
    found: list[Phrase] = []
    prefers = next((measure for measure in report.answers if measure.name == "prefers"), None)
    if report.broken[1] > report.broken[0]:
        found.append(
            Phrase(
                "It did harm: its loss on {count} held-out row(s) is infinite or not a number.", count=report.broken[1]
            )
        )
    elif prefers is not None and tells_preferences(report.unit, report.answers):
        found.append(say_preferences(prefers))
    elif report.losses:
        found.append(say_loss(report))
    elif report.learnt is not None:
        found.append(
            {
                "better": Phrase("It helped: its answers to held-out questions are better than the base's."),
                "worse": Phrase("It did harm: its answers to held-out questions are worse than the base's."),
                "no_difference": Phrase(
                    "Its answers to held-out questions are no better and no worse than the base's."
                ),
                "too_few": Phrase("Whether it helped cannot be told: too few questions were asked."),
            }[report.learnt]
        )
    if report.forgetting is not None:
        found.append(say_forgetting(report.forgetting))
    told = ("prefers",) if tells_preferences(report.unit, report.answers) else ()
    changed = [measure for measure in report.answers if measure.verdict in ("better", "worse")]
    found += [say_measure(measure) for measure in changed if measure.name not in told]
    if report.judge is not None:
        found.append(say_judge(report.judge))
    return found


def tells_preferences(unit: Unit, answers: Sequence[Measure]) -> bool:
    """Whether held-out rows are pairs of which each side's log-probabilities are known, and no loss of pairs."""
    return unit != "example" and any(measure.name == "prefers" for measure in answers)


def say_preferences(prefers: Measure) -> Phrase:
    said = {"base": percent(prefers.base, 0), "tuned": percent(prefers.tuned, 0), "count": prefers.count}
    return {
        "better": Phrase(
            "It helped: it finds the better answer likelier in {tuned} of {count} held-out pairs, {base} before.",
            **said,
        ),
        "worse": Phrase(
            "It did harm: it finds the better answer likelier in {tuned} of {count} held-out pairs, {base} before.",
            **said,
        ),
        "no_difference": Phrase(
            "No difference can be told: it finds the better answer likelier in {tuned} of {count} held-out pairs, "
            "{base} before.",
            **said,
        ),
        "too_few": Phrase(
            "Whether it helped cannot be told: {count} held-out pairs are too few (the better answer is likelier in "
            "{tuned} of them, {base} before).",
            **said,
        ),
    }[prefers.verdict]


def say_loss(report: Report) -> Phrase:
    overall = report.losses[0]
    change = overall.difference
    unit = {
        "token": Phrase("nats per token"),
        "byte": Phrase("nats per byte"),
        "example": Phrase("per example"),
    }[report.unit]
    said = {
        "base": number(overall.base),
        "tuned": number(overall.tuned),
        "unit": unit,
        "change": number(change.value, signed=True),
        "low": end_of_interval(change.low, 3),
        "high": end_of_interval(change.high, 3),
        "rows": overall.rows,
    }
    if report.learnt == "better":
        return Phrase(
            "It helped: the loss on {rows} held-out rows fell from {base} to {tuned} {unit} ({change}, 95 % interval "
            "{low} to {high}).",
            **said,
        )
    if report.learnt == "worse":
        return Phrase(
            "It did harm: the loss on {rows} held-out rows went from {base} to {tuned} {unit} ({change}, 95 % interval "
            "{low} to {high}).",
            **said,
        )
    if report.learnt == "no_difference":
        return Phrase(
            "No difference can be told: the loss on {rows} held-out rows went from {base} to {tuned} {unit} ({change}, "
            "95 % interval {low} to {high}, which holds 0).",
            **said,
        )
    return Phrase(
        "Whether it helped cannot be told: {rows} held-out rows are too few (loss {base} before, {tuned} after, "
        "{unit}). Hold out more with eval_ratio or eval_file.",
        **said,
    )


def say_forgetting(found: Forgetting) -> Phrase:
    parts: list[object] = []
    if found.change is not None:
        change = found.change
        parts.append(
            Phrase(
                "the loss on general texts changed by {change} (95 % interval {low} to {high}, limit {limit})",
                change=percent(change.value, signed=True),
                low=percent(change.low, signed=True),
                high=percent(change.high, signed=True),
                limit=percent(found.threshold, 0, signed=True),
            )
        )
    if found.correct is not None:
        count = found.correct.count
        parts.append(
            Phrase(
                "{tuned} of {count} general questions are answered rightly, {base} before",
                tuned=round(found.correct.tuned * count),
                base=round(found.correct.base * count),
                count=count,
            )
        )
    why = parts[0] if len(parts) == 1 else Phrase("{first}; {second}", first=parts[0], second=parts[1])
    if found.verdict == "kept":
        return Phrase("What it knew is kept: {why}.", why=why)
    if found.verdict == "forgot":
        return Phrase("It has forgotten: {why}.", why=why)
    return Phrase("Whether it has forgotten is not clear: {why}.", why=why)


def say_measure(measure: Measure) -> Phrase:
    share = {"base": percent(measure.base, 0), "tuned": percent(measure.tuned, 0)}
    points = {"base": number(measure.base, 1), "tuned": number(measure.tuned, 1)}
    match measure.name:
        case "stop_rate":
            return Phrase("It ends {tuned} of its answers itself, {base} before.", **share)
        case "repetition":
            return Phrase("{tuned} of its text repeats itself, {base} before.", **share)
        case "language":
            return Phrase("{tuned} of its answers are in the language that is asked for, {base} before.", **share)
        case "exact_match":
            return Phrase("{tuned} of its answers are exactly the reference, {base} before.", **share)
        case "prefers":
            return Phrase("It finds the better answer likelier in {tuned} of the pairs, {base} before.", **share)
        case "chrf":
            return Phrase("chrF of its answers against the references: {tuned}, {base} before.", **points)
        case "bleu":
            return Phrase("BLEU of its answers against the references: {tuned}, {base} before.", **points)
        case "rouge_l":
            return Phrase("ROUGE-L of its answers against the references: {tuned}, {base} before.", **points)
        case "tokens" | "correct":  # the first is neither better nor worse, the second has a sentence of its own
            raise ValueError(measure.name)


def say_judge(judge: JudgeResult) -> Phrase:
    winners = [vote.winner for vote in judge.votes]
    counted = {
        "model": judge.model,
        "wins": winners.count("tuned"),
        "losses": winners.count("base"),
        "others": len(winners) - winners.count("tuned") - winners.count("base"),
    }
    if judge.verdict == "better":
        return Phrase("{model} as judge prefers it: {wins} won, {losses} lost, {others} undecided.", **counted)
    if judge.verdict == "worse":
        return Phrase("{model} as judge prefers the base: {wins} won, {losses} lost, {others} undecided.", **counted)
    return Phrase("{model} as judge sees no sure difference: {wins} won, {losses} lost, {others} undecided.", **counted)
