"""Print the recorded results as Markdown tables: `python benchmarks/table.py [--results FOLDER]`.

Reads result files alone; docs/performance.md holds what it printed. A table for each machine: `CASE@MACHINE.json` with
what `machines/MACHINE.json` holds of it, and `CASE.json` from before machines were told apart by their rates. Files
from before `compare.py` are read as well: they name their ratio by what they counted.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import CASES, HEADLINES
from engines import ENGINES

HERE = Path(__file__).resolve().parent
GIGABYTE = 1e9
HEAD = (
    "| case | peer | speed over it: median (min–max) | pairs | types: ours, its | memory above imports: ours : its "
    "| of the limit | gate | recorded |",
    "|---|---|---|---|---|---|---|---|---|",
)
TUNINGS_HEAD = ("| case | engine | fastest in the sweep | tokens/s | swept |", "|---|---|---|---|---|")
OWN_HEAD = (
    "| case | Firefly's fastest settings by hand | tokens/s | default settings over them | swept |",
    "|---|---|---|---|---|",
)
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "autocast": "bf16 autocast"}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One peer of one case."""

    case: str
    peer: str
    ratio: Mapping[str, Any]
    precisions: tuple[str, str]
    ours_bytes: int
    its_bytes: int
    limit: str
    gate_passed: bool
    publishable: bool
    recorded: str

    def text(self) -> str:
        """The row of the table; what may not be quoted says so."""
        ratio = f"{self.ratio['median']:.2f} ({self.ratio['min']:.2f}–{self.ratio['max']:.2f})"
        if not self.gate_passed:
            ratio = "not to be quoted"
        elif not self.publishable:
            ratio += ", a trial"
        cells = (
            self.case,
            ENGINES[self.peer].label,
            ratio,
            str(len(self.ratio["per_pair"])),
            ", ".join(SHORT.get(name, name) for name in self.precisions),
            f"{self.ours_bytes / GIGABYTE:.2f} : {self.its_bytes / GIGABYTE:.2f} GB",
            self.limit,
            "passed" if self.gate_passed else "FAILED",
            self.recorded,
        )
        return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the tables of a folder of results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    print(render(arguments.results))


def render(folder: Path) -> str:
    """The Markdown of all results in a folder, and the names of the cases that have none."""
    parts = []
    for path in sorted((folder / "machines").glob("*.json")):
        reports = {name: read(found) for name in CASES if (found := folder / f"{name}@{path.stem}.json").is_file()}
        parts += of_machine(read(path), reports)
    before = {name: read(folder / f"{name}.json") for name in CASES if (folder / f"{name}.json").is_file()}
    for where in dict.fromkeys(described_by_flags(report) for report in before.values()):
        there = {name: report for name, report in before.items() if described_by_flags(report) == where}
        parts += [f"### {where}", *results(there)]
    if (startup := folder / "startup.json").is_file():
        parts.append(start(read(startup)))
    if on_gpu := {path.stem: read(path) for path in sorted(folder.glob("gpu_*.json"))}:
        parts += [gpu_table(on_gpu), *(gpu_line(name, report) for name, report in on_gpu.items())]
    return "\n\n".join(parts)


def read(path: Path) -> dict[str, Any]:
    """Read one result file."""
    return json.loads(path.read_text(encoding="utf-8"))


def of_machine(known: Mapping[str, Any], reports: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What was measured on one kind of machine: its rates, results, the peers' tunings, our settings by hand."""
    machine = known["machine"]
    measured = [machine, *(report["machine"] for report in reports.values())]
    rates = ", ".join(
        f"{SHORT[name]} {spread_of([one['rates'][name] for one in measured])}" for name in machine["rates"]
    )
    yield f"### {machine['cpu']}, {machine['threads']} threads: products of the model's shapes at {rates} GFLOP/s"
    yield from results(reports)
    if missing := [name for name in HEADLINES if name not in reports]:
        yield f"Not measured here yet: {', '.join(missing)}."
    found = [(case, name, x) for case in CASES for name, x in known["sweeps"].get(case, {}).items()]
    if peers := [
        tuning_line(case, name, x) for case, name, x in found if name != "firefly" and {"best", "failed"} & x.keys()
    ]:
        yield "\n".join([*TUNINGS_HEAD, *peers])
    if own := [own_line(case, x) for case, name, x in found if name == "firefly" and "best" in x]:
        yield "\n".join([*OWN_HEAD, *own])


def spread_of(rates: list[float]) -> str:
    """Least and largest of some rates, in GFLOP/s."""
    least, most = f"{min(rates) / 1e9:.0f}", f"{max(rates) / 1e9:.0f}"
    return least if least == most else f"{least}–{most}"


def tuning_line(case: str, engine: str, swept: Mapping[str, Any]) -> str:
    """The tuning that a peer runs with on a kind of machine, or why with none."""
    best = swept.get("best")
    cells = (
        case,
        ENGINES[engine].label,
        best["name"] if best else f"none ran: {swept['failed'].splitlines()[0]}",
        f"{swept['best_tokens_per_second']:.0f}" if best else "",
        f"{swept['date'][:10]}, {swept['git_commit'][:7]}{'' if swept['complete'] else ', not to its end'}",
    )
    return f"| {' | '.join(cells)} |"


def own_line(case: str, swept: Mapping[str, Any]) -> str:
    """How near our default settings come to the best that were found by hand."""
    name = swept["best"]["name"]
    rate, share = f"{swept['best_tokens_per_second']:.0f}", f"{swept['default_over_best']:.0%}"
    return f"| {case} | {name} | {rate} | {share} | {swept['date'][:10]}, {swept['git_commit'][:7]} |"


def results(reports: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The table of some cases, and what they were not compared with."""
    if reports:
        yield "\n".join([*HEAD, *(line.text() for name, report in reports.items() for line in lines(name, report))])
    yield from (skipped(name, report) for name, report in reports.items() if report.get("skipped"))


def lines(case: str, report: Mapping[str, Any]) -> Iterator[Line]:
    """The table's rows of one case."""
    for peer, summary in by_peer(report):
        gate = summary.get("gate_passed", summary.get("gate", {}).get("passed", False))
        precision = summary.get("precision", {})
        yield Line(
            case=case,
            peer=peer,
            ratio=next(value for name, value in summary.items() if name.startswith("ratio_")),
            precisions=(precision.get("firefly", "?"), precision.get(peer, "?")),
            ours_bytes=summary["memory"]["firefly"]["peak_less_imports_bytes"],
            its_bytes=summary["memory"][peer]["peak_less_imports_bytes"],
            limit=limit(report),
            gate_passed=gate,
            publishable=not any(text.startswith("not publishable") for text in summary["caveats"]),
            recorded=f"{report['date'][:10]}, {report['git_commit'][:7]}",
        )


def by_peer(report: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Peer → its summary; the first SFT program had one peer and no name for it."""
    summary = report.get("summary", {})
    if "gate" in summary:
        yield "trl", summary
    else:
        yield from summary.items()


def skipped(case: str, report: Mapping[str, Any]) -> str:
    """Name what a case was not compared with."""
    reasons = "; ".join(f"{ENGINES[name].label}: {why.splitlines()[0]}" for name, why in report["skipped"].items())
    return f"{case}, not compared with {reasons}."


def limit(report: Mapping[str, Any]) -> str:
    """How much of the machine's own rate of matrix products, in the type we computed in, a case needed."""
    share = report.get("share_of_limit")
    if not share:
        return ""
    return f"{share['share_of_limit']['median']:.0%} of {share['limit_flops_per_second'] / 1e9:.0f} GFLOP/s"


def described_by_flags(report: Mapping[str, Any]) -> str:
    """Where a case was measured before machines were told apart by their rates."""
    hardware = report["hardware"]
    bf16 = "with" if hardware["bf16_matrix_instructions"] else "without"
    return (
        f"{hardware['cpu']}, {hardware['cores']} cores, {bf16} bf16 matrix instructions; the rates of the other types "
        "were not recorded"
    )


def start(report: Mapping[str, Any]) -> str:
    """Start-up in a sentence."""
    median = report["median"]
    return (
        f"Start-up: first step after {median['firefly']:.1f} s, importing torch, Trainer and peft alone "
        f"{median['imports']:.1f} s: {report['ratio']:.2f} ×, the median of {len(report['rounds'])} rounds."
    )


def gpu_table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The cases on a GPU: one line for each case and engine."""
    lines = [
        "| case | engine | tokens/s | peak memory | of the limit | Firefly's speed over it |",
        "|---|---|---|---|---|---|",
    ]
    for case, report in reports.items():
        for name, found in report["results"].items():
            share = f"{report['share_of_limit']['share_of_limit']['median']:.0%}" if name == "firefly" else ""
            summary = report["summary"].get(name)
            ratio = ""
            if summary:
                ratio = f"{summary['ratio_examples_per_second']['median']:.2f}"
                ratio += "" if summary["gate_passed"] else " (gate failed: not to be quoted)"
            rate, peak = found["tokens_per_second"]["median"], found["peak_memory_bytes"] / GIGABYTE
            lines.append(f"| {case} | {ENGINES[name].label} | {rate:,.0f} | {peak:.2f} GB | {share} | {ratio} |")
        for name, reason in report["skipped"].items():
            lines.append(f"| {case} | {ENGINES[name].label} | skipped: {reason.splitlines()[0]} | | | |")
    return "\n".join(lines)


def gpu_line(case: str, report: Mapping[str, Any]) -> str:
    """Which GPU, how fast it multiplies, with which torch, when."""
    device, versions = report["matmul_rate"]["device"], report["runs"][0]["versions"]
    return (
        f"{case}: {device['name']}, {report['matmul_rate']['flops_per_second'] / 1e12:.0f} TFLOP/s in products of the "
        f"model's shapes, torch {versions['torch']}, {report['date'][:10]}, {report['git_commit'][:7]}."
    )


if __name__ == "__main__":
    main()
