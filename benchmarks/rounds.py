"""Run the sides of a case in turns, gate first, and sum up what they measured."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cases import Asked, Case
from comparing import gate, mean_of_last, memory, ratios, spread, version_differences
from engines import ENGINES, HERE, in_order
from flops import Tokens, necessary_flops, shape_of, tokens_of
from job import Job, read_job
from measuring import read_dump
from processes import Result, Side, SideFailed, SideStopped, Tuning
from reporting import too_short_to_publish

Runs = dict[str, list[Result]]


class Clock:
    """The time that a comparison may take; without `seconds`, as long as it likes."""

    def __init__(self, seconds: float | None = None, needed: float = 45.0) -> None:
        """`needed` is what a run has to have left to be started at all."""
        self.end = None if seconds is None else time.monotonic() + seconds
        self.needed = needed

    def left(self) -> float | None:
        """Seconds left; None: no end."""
        return None if self.end is None else self.end - time.monotonic()

    def enough(self) -> bool:
        """Whether a run may be started."""
        return self.end is None or self.end - time.monotonic() >= self.needed


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A case about to run: its sides, how each is tuned, and the report that grows."""

    case: Case
    sides: Mapping[str, Side]
    tunings: Mapping[str, Tuning]
    report: dict[str, Any]
    save: Callable[[], None]
    same_start: bool = True
    """All begin with the same adapter, or with none."""
    ours_first: bool = False
    """Run Firefly before its peers in the first round: for runs that may be cut short."""
    fallbacks: Mapping[str, Sequence[Tuning]] = field(default_factory=dict)
    """What a peer is tried with when it runs out of memory."""
    clock: Clock = field(default_factory=Clock)
    publishable: Mapping[str, float] = field(default_factory=dict)
    """Other limits than `too_short_to_publish` has."""
    rate_beside: Callable[[str], Result] | None = None
    """Measures the rate of matrix products in a type; called after each of our runs, so that both see one machine."""

    @property
    def peers(self) -> list[str]:
        """All but us."""
        return [name for name in self.sides if name != "firefly"]

    def run(self, rounds: int) -> Runs:
        """Run every side once a round, every second round turned round: A-B-B-A with each peer.

        The first round is the gate: a peer that did not train the same thing is not timed any further.
        """
        tunings = dict(self.tunings)
        self.report.update(runs=[], gates={})
        runs: Runs = {name: [] for name in self.sides}
        half = 0 if self.ours_first else len(self.peers) // 2
        order = [*self.peers[:half], "firefly", *self.peers[half:]]
        for number in range(rounds):
            for name in order if number % 2 == 0 else reversed(order):
                if not self.clock.enough():
                    self._leave_out(name, number)
                elif (result := self._run_once(name, tunings, first=number == 0)) is not None:
                    runs[name].append(result)
            if not runs["firefly"]:
                break
            if number == 0:
                self._gate(runs)
                order = [name for name in order if self._goes_on(name)]
                if order == ["firefly"] and self.peers:
                    break
        return runs

    def _leave_out(self, name: str, number: int) -> None:
        if number == 0:
            self.report["skipped"][name] = "the time was used up"
        else:
            self.report["rounds_left_out"] = True
        self.save()

    def _run_once(self, name: str, tunings: dict[str, Tuning], *, first: bool) -> Result | None:
        """One run; a peer that runs out of memory falls back, and one that fails at first is skipped by name."""
        try:
            result = self._run_with_fallbacks(name, tunings)
        except (SideFailed, SideStopped) as failed:
            if name == "firefly" or not first:
                raise
            self.report["skipped"][name] = f"its run failed: {failed}"
            self.save()
            print(f"run    {name:13} failed; the log is in the result file", flush=True)
            return None
        if name == "firefly" and self.rate_beside is not None:
            result["matmul_rate"] = self.rate_beside(result["settings"]["precision"])
        self.report["tunings"] = {**self.report.get("tunings", {}), name: asdict(tunings[name])}
        self.report["runs"].append(result)
        self.save()
        print(f"run    {name:13} {describe_rate(result)}", flush=True)
        return result

    def _run_with_fallbacks(self, name: str, tunings: dict[str, Tuning]) -> Result:
        left = iter(self.fallbacks.get(name, ()))
        while True:
            try:
                return self.sides[name].run(tunings[name], timeout_seconds=self.clock.left())
            except SideFailed as failed:
                following = next(left, None) if "out of memory" in str(failed).lower() else None
                if following is None or not self.clock.enough():
                    raise
                self.report.setdefault("out_of_memory", {}).setdefault(name, []).append(asdict(tunings[name]))
                tunings[name] = following

    def _goes_on(self, name: str) -> bool:
        return name == "firefly" or self.report["gates"].get(name, {}).get("passed", False)

    def _gate(self, runs: Runs) -> None:
        ours = runs["firefly"][0]
        for name in self.peers:
            if not runs[name]:
                continue
            theirs = runs[name][0]
            found = self.report["gates"][name] = self.gate_of(name, ours, theirs)
            self.save()
            failed = [check for check, value in found.items() if check != "passed" and not value["passed"]]
            print(f"gate   {name:13} {'passed' if found['passed'] else 'FAILED: ' + ', '.join(failed)}", flush=True)

    def gate_of(self, name: str, ours: Result, theirs: Result) -> dict[str, Any]:
        """Whether a run of a peer trained what ours did."""
        try:
            same_steps = self._same_steps(name, ours, theirs)
        except SideFailed as failed:
            return {"passed": False, "run_with_our_rows": {"passed": False, "log": str(failed)}}
        options = {"task": self.case.task, "thresholds": self.case.thresholds, "same_start": self.same_start}
        return gate(ours, theirs, same_steps, **options)

    def _same_steps(self, name: str, ours: Result, theirs: Result) -> Result:
        """A run of the peer with our rows in each of its steps, in our precision; only the losses are used."""
        precision = ours["settings"]["precision"]
        like_ours = {precision, "autocast"} if precision == "bfloat16" else {precision}
        if theirs["settings"]["rows_of_a_step_are_consecutive"] and theirs["settings"]["precision"] in like_ours:
            return theirs
        result = self.sides[name].run(in_order(self.tunings[name], precision, self.case, name))
        self.report.setdefault("gate_runs", {})[name] = result
        return result


def describe_rate(result: Result) -> str:
    """A run in a few words."""
    return f"{result['rows_per_second']:.3f} examples/s, {result['tokens_per_second']:.1f} tokens/s"


def make_side(name: str, python: str, job_file: Path, threads: int) -> Side:
    """The program of an engine for a job."""
    engine = ENGINES[name]
    return Side(
        name=engine.label,
        python=python,
        program=HERE / engine.programs[read_job(job_file).task],
        arguments=["--job", str(job_file), *engine.arguments.split()],
        threads=threads,
    )


def summarise(comparison: Comparison, runs: Runs) -> dict[str, Any]:
    """Everything a table may quote about each peer, and what a reader must know beside it."""
    found = {}
    for name in comparison.peers:
        pairs = list(zip(runs["firefly"], runs[name], strict=False))
        if not pairs:
            continue
        found[name] = {
            "gate_passed": comparison.report["gates"][name]["passed"],
            "ratio_examples_per_second": ratios(pairs, "rows_per_second"),
            "ratio_tokens_per_second": ratios(pairs, "tokens_per_second"),
            "memory": {"firefly": memory(runs["firefly"]), name: memory(runs[name])},
            "memory_ratio": memory_ratio(runs["firefly"], runs[name]),
            "losses": {side: describe_losses(runs[side][0]) for side in ("firefly", name)},
            "precision": {side: runs[side][0]["settings"]["precision"] for side in ("firefly", name)},
            "versions_that_differ": version_differences(*pairs[0]),
            "caveats": caveats(pairs)
            + unswept(comparison.report, name)
            + too_short_to_publish(pairs, **comparison.publishable),
        }
        case = comparison.case
        if case.asked_ratio is not None:
            found[name]["asked_ratio"] = against(case.asked_ratio, found[name]["ratio_examples_per_second"]["median"])
        if case.asked_memory is not None:
            reached = found[name]["memory_ratio"] <= case.asked_memory
            found[name]["asked_memory"] = {"asked": case.asked_memory, "reached": reached}
    return found


def against(asked: Asked, measured: float) -> dict[str, Any]:
    """Say of a floor and an aim which are reached."""
    reached = "aim" if measured >= asked.aim else "floor" if measured >= asked.floor else None
    return asdict(asked) | {"reached": reached}


def memory_ratio(ours: Sequence[Result], theirs: Sequence[Result]) -> float:
    """Our peak over theirs, less the imports of each."""
    return memory(ours)["peak_less_imports_bytes"] / memory(theirs)["peak_less_imports_bytes"]


def describe_losses(result: Result) -> dict[str, float]:
    """The losses that the gate looks at."""
    return {"first": result["losses"][0], "mean_of_last": mean_of_last(result["losses"])}


def caveats(pairs: Sequence[tuple[Result, Result]]) -> list[str]:
    """Say in words what is not equal."""
    ours, theirs = pairs[0]
    found = []
    if not theirs["settings"]["rows_of_a_step_are_consecutive"]:
        found.append(
            "the peer's optimizer steps hold other rows than ours (it packs or sorts); losses are compared through a "
            "run of the peer with our rows in every step"
        )
    if ours["settings"]["precision"] != theirs["settings"]["precision"]:
        found.append("the two sides ran in different precisions; say so beside the ratio")
    if different := version_differences(ours, theirs):
        found.append(f"versions differ (ours, theirs): {different}")
    return found


def unswept(report: Mapping[str, Any], name: str) -> list[str]:
    """Say so when a peer ran with a guess: it is no fair opponent."""
    if "swept" not in report:
        return []
    if not (swept := report["swept"].get(name)):
        return ["not publishable: the peer's tunings were not tried on this kind of machine"]
    return [] if swept["complete"] else ["not all of the peer's tunings were tried: the time was used up"]


def share_of_limit(job: Job, config: Any, results: Sequence[Result], limit: dict[str, Any]) -> dict[str, Any]:
    """Necessary FLOPs per second of our runs, and their share of the rate of matrix products: a run's, or `limit`'s.

    The steady steps are all but the first, so their tokens are those of the dump's rows behind the first step.
    """
    steady = read_dump(job.dump)[job.examples_per_step :]
    tokens = tokens_of(job.task, steady, job.examples_per_step)
    checkpointing = job.checkpointing is True
    flops = flops_of(job, config, tokens, checkpointing)
    rates = [flops / result["steady_seconds"] for result in results]
    beside = [result.get("matmul_rate", limit)["flops_per_second"] for result in results]
    return {
        "necessary_flops": flops,
        "computed_tokens": tokens.computed,
        "target_tokens": tokens.targets,
        "checkpointing_counted": checkpointing,
        "flops_per_second": spread(rates),
        "limit_flops_per_second": limit["flops_per_second"],
        "limit_dtype": limit["dtype"],
        "share_of_limit": spread([rate / most for rate, most in zip(rates, beside, strict=True)]),
    }


def flops_of(job: Job, config: Any, tokens: Tokens, checkpointing: bool) -> int:
    """Necessary FLOPs of some tokens of a job."""
    return necessary_flops(
        shape_of(config), tokens, task=job.task, mode=job.mode, rank=job.rank, checkpointing=checkpointing
    )


def print_summary(report: dict[str, Any], path: Path) -> None:
    """Print a case's result for people."""
    for name, summary in report["summary"].items():
        tuning, ratio = report["tunings"][name], summary["ratio_examples_per_second"]
        peaks = {side: value["peak_less_imports_bytes"] / 1e9 for side, value in summary["memory"].items()}
        print(f"\n{report['benchmark']} against {ENGINES[name].label}, {tuning['name']}")
        print(
            f"  speed {ratio['median']:.2f} × ({ratio['min']:.2f}–{ratio['max']:.2f}), memory above imports "
            f"{peaks['firefly']:.2f} GB : {peaks[name]:.2f} GB, "
            f"gate {'passed' if summary['gate_passed'] else 'FAILED: quote no speed'}"
        )
        if asked := summary.get("asked_ratio"):
            memory_asked = summary["asked_memory"]
            print(
                f"  asked: {asked['floor']} (aim {asked['aim']}) ×, reached: {asked['reached'] or 'neither'}; at most "
                f"{memory_asked['asked']} of its memory: {summary['memory_ratio']:.2f}"
            )
        for caveat in summary["caveats"]:
            print(f"  note: {caveat}")
    for name, reason in report["skipped"].items():
        print(f"skipped {ENGINES[name].label}: {reason.splitlines()[0]}")
    if share := report.get("share_of_limit"):
        print(
            f"Firefly: {share['flops_per_second']['median'] / 1e9:.1f} necessary GFLOP/s of "
            f"{share['limit_flops_per_second'] / 1e9:.1f} measured in {share['limit_dtype']}: "
            f"{share['share_of_limit']['median']:.0%}"
            + (f" (asked: {asked['floor']:.0%}, aim {asked['aim']:.0%})" if (asked := share.get("asked")) else "")
        )
    print(f"details in {path}", flush=True)
