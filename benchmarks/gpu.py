r"""The GPU cases on one GPU, without a network: Firefly beside TRL, TRL with Liger, Unsloth and plain transformers.

    sh benchmarks/gpu.sh                                              # on a machine with an NVIDIA GPU
    python benchmarks/gpu.py --shapes tiny --device cpu --minutes 30  # the same lines without one

Every run is a fresh process on made-up weights of real shapes. Peers that are not installed are skipped by name, and so
is what the time does not suffice for. Exit 3: a gate failed, or a run of Firefly.
"""

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from comparing import spread
from engines import ENGINES, reason_to_skip
from gpu_cases import GPU_CASES, HEADLINES, GpuCase, made_up_rows, write_model
from job import Job
from processes import Result, Side, SideFailed, SideStopped, Tuning
from reporting import new_report, parse_assignments, saver
from rounds import Clock, Comparison, Runs, describe_rate, make_side, print_summary, share_of_limit, summarise
from table import gpu_table
from token_dump import write_lines
from transformers import AutoConfig

HERE = Path(__file__).resolve().parent
ENOUGH_ROUNDS, ENOUGH_SECONDS = 1, 5.0
"""Limits of what may be quoted from a GPU, which is quieter than a shared CPU and costs more by the minute."""
TINY_ROWS = 4


def main() -> int:
    """Run the cases while there is time, each with an equal share of what is left."""
    arguments = parse_arguments()
    end = time.monotonic() + 60 * arguments.minutes
    passed = []
    reports = {}
    for number, name in enumerate(arguments.cases):
        share = (end - time.monotonic()) / (len(arguments.cases) - number)
        report = run_case(GPU_CASES[name], arguments, Clock(share, needed=arguments.seconds_per_run))
        reports[name] = report
        passed += [gate["passed"] for gate in report.get("gates", {}).values()] + ["failed" not in report]
    print("\n" + gpu_table(reports))
    return 0 if all(passed) else 3


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=GPU_CASES, default=list(HEADLINES))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="those of each case when not given")
    parser.add_argument("--python", nargs="+", default=[], metavar="ENGINE=PYTHON")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=9.5, help="time for everything")
    parser.add_argument("--seconds_per_run", type=float, default=40.0, help="time a run needs to be started at all")
    parser.add_argument("--shapes", choices=("real", "tiny"), default="real")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--threads", type=int, default=min(8, len(os.sched_getaffinity(0))))
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result files")
    arguments = parser.parse_args()
    arguments.python = parse_assignments(arguments.python)
    return arguments


def run_case(gpu_case: GpuCase, arguments: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Write model, dump and job; run the engines in turns; return the report."""
    case = gpu_case.case
    tiny = arguments.shapes == "tiny"
    if tiny:
        case = replace(case, rows=TINY_ROWS * 2, examples_per_step=min(case.examples_per_step, TINY_ROWS))
        gpu_case = replace(gpu_case, lengths=(20, 40))
    report = new_report(case.name, arguments) | {"case": asdict(replace(gpu_case, case=case)), "skipped": {}}
    save = saver(arguments.out / f"{case.name}.json", report)
    print(f"\n== {case.name}", flush=True)
    engines = ["firefly"]
    for name in arguments.engines or gpu_case.peers:
        reason = None
        if name != "firefly" and (reason := reason_to_skip(name, case, arguments.python.get(name, sys.executable))):
            report["skipped"][name] = reason
            print(f"skipped {ENGINES[name].label}: {reason}", flush=True)
        elif name != "firefly":
            engines.append(name)
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(gpu_case, case, arguments, Path(folder))
        job_file = job.write(Path(folder, "job.json"))
        report["matmul_rate"] = limit = matmul_rate(job_file, arguments, tiny)
        report["hardware"]["device"] = limit["device"]
        tunings = peer_tunings(gpu_case, engines, case.examples_per_step, arguments.device)
        comparison = Comparison(
            case=case,
            sides={
                name: make_side(name, arguments.python.get(name, sys.executable), job_file, arguments.threads)
                for name in engines
            },
            tunings={name: found[0] for name, found in tunings.items()},
            fallbacks={name: found[1:] for name, found in tunings.items()},
            report=report,
            save=save,
            same_start=False,
            ours_first=True,
            clock=clock,
            publishable={"least_pairs": ENOUGH_ROUNDS, "least_seconds": ENOUGH_SECONDS},
        )
        runs = run_or_record(comparison, arguments.rounds)
        try_further(comparison, runs, further_tunings(gpu_case, engines, case.examples_per_step, arguments.device))
        if runs["firefly"]:
            config = AutoConfig.from_pretrained(job.model)
            report["share_of_limit"] = share_of_limit(job, config, runs["firefly"], limit)
    report["results"] = {name: describe(results) for name, results in runs.items() if results}
    report["summary"] = summarise(comparison, runs) if runs["firefly"] else {}
    save()
    print_summary(report, arguments.out / f"{case.name}.json")
    return report


def run_or_record(comparison: Comparison, rounds: int) -> Runs:
    """Run; when our own side fails, say so and leave the time to the other cases."""
    try:
        return comparison.run(rounds)
    except (SideFailed, SideStopped) as failed:
        comparison.report["failed"] = str(failed)
        print(f"FAILED: {failed}", flush=True)
        return {name: [] for name in comparison.sides}


def make_job(gpu_case: GpuCase, case: Any, arguments: argparse.Namespace, folder: Path) -> Job:
    """Write the model's folder and the dump; return the job."""
    write_model(gpu_case.shape, folder / "model", arguments.shapes == "tiny")
    write_lines(folder / "dump.jsonl", made_up_rows(case, gpu_case.lengths))
    training, firefly = dict(case.training), dict(gpu_case.firefly)
    if arguments.device == "cpu":  # paged optimizers are for GPUs alone
        training["optim"] = "adamw_torch"
        firefly.pop("optim", None)
    return Job(
        task=case.task,
        mode=case.mode,
        model=str(folder / "model"),
        dump=str(folder / "dump.jsonl"),
        max_tokens=case.max_tokens,
        examples_per_step=case.examples_per_step,
        rank=gpu_case.rank,
        alpha=gpu_case.alpha,
        dropout=gpu_case.dropout,
        checkpointing=gpu_case.checkpointing,
        threads=arguments.threads,
        device=arguments.device,
        random_weights=True,
        training=training,
        firefly=firefly,
    )


def peer_tunings(
    gpu_case: GpuCase, engines: list[str], examples_per_step: int, device: str
) -> Mapping[str, list[Tuning]]:
    """Each engine's tunings, the one to begin with first; the rest are for GPUs with less memory."""
    peers = [name for name in engines if name != "firefly"]
    made = tunings_of(gpu_case.tunings, examples_per_step, device)
    return {"firefly": [Tuning(name="firefly")]} | dict.fromkeys(peers, made)


def further_tunings(
    gpu_case: GpuCase, engines: list[str], examples_per_step: int, device: str
) -> list[tuple[str, Tuning]]:
    """What else to try, the most promising of every peer first. Layouts are words of TRL's sides alone."""
    return [
        (name, tuning)
        for tuning in tunings_of(gpu_case.further, examples_per_step, device)
        for name in engines
        if name != "firefly" and ("--layout" not in tuning.arguments or name.startswith("trl"))
    ]


def tunings_of(texts: Sequence[str], examples_per_step: int, device: str) -> list[Tuning]:
    """Command lines that a step of so many examples can be made of; on a CPU in float32."""
    found = [text.replace("autocast", "float32") if device == "cpu" else text for text in texts]
    whole = [text for text in found if not examples_per_step % int(text.split("--batch_size ")[1].split()[0])]
    return [Tuning(name=text.replace("--", ""), arguments=text) for text in whole]


def try_further(comparison: Comparison, runs: Runs, further: Sequence[tuple[str, Tuning]]) -> None:
    """Spend what is left of a case's time on further tunings; a faster one that passes the gate stands for its peer.

    One that takes longer than the peer's best, start-up included, is stopped.
    """
    report = comparison.report
    attempts: list[dict[str, Any]] = report.setdefault("sweep", [])
    for name, tuning in further:
        if not runs["firefly"] or not runs[name] or not report["gates"][name]["passed"]:
            continue
        attempt: dict[str, Any] = {"engine": name, **asdict(tuning)}
        attempts.append(attempt)
        if not comparison.clock.enough():
            attempt["outcome"] = "not tried: the time was used up"
            continue
        best = max(runs[name], key=lambda result: result["tokens_per_second"])
        patience = min(comparison.clock.left() or math.inf, best["process_seconds"] + 5)
        try:
            result = comparison.sides[name].run(tuning, timeout_seconds=patience)
        except (SideFailed, SideStopped) as failed:
            attempt["outcome"] = f"failed: {failed}"
            continue
        attempt |= {"outcome": "measured", "result": describe([result])}
        faster = result["tokens_per_second"] > best["tokens_per_second"]
        if faster and (gate := comparison.gate_of(name, runs["firefly"][0], result))["passed"]:
            runs[name] = [result]
            report["gates"][name] = gate
            report["tunings"][name] = asdict(tuning)
            report["runs"].append(result)
        print(f"sweep  {name:13} {tuning.name:45} {describe_rate(result)}", flush=True)
        comparison.save()


def matmul_rate(job_file: Path, arguments: argparse.Namespace, tiny: bool) -> Result:
    """The GPU's own rate of bf16 matrix products of the model's shapes."""
    dtype, rows, seconds = ("float32", "64", "0.2") if tiny else ("bfloat16", "16384", "2")
    side = Side(
        name="matrix products",
        python=sys.executable,
        program=HERE / "matmul_rate.py",
        arguments=["--job", str(job_file), "--dtype", dtype, "--rows", rows, "--seconds", seconds],
        threads=arguments.threads,
    )
    return side.run(Tuning(name="matrix products"))


def describe(results: list[Result]) -> dict[str, Any]:
    """What the table shows of one engine."""
    return {
        "tokens_per_second": spread([result["tokens_per_second"] for result in results]),
        "peak_memory_bytes": max(result["peak_memory_bytes"] for result in results),
        "steady_seconds": min(result["steady_seconds"] for result in results),
    }


if __name__ == "__main__":
    sys.exit(main())
