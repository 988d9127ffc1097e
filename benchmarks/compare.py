r"""Firefly beside its peers on the CPU: cases × engines, in turns, each run a fresh process, on the same token ids.

    python benchmarks/compare.py sft_lora dpo_lora --python llamafactory=VENV/bin/python --rounds 3

README.md says what is equal, what differs and how to read the result. Exit 3: a gate failed, and no speed of that
comparison may be quoted; or a run broke off.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cases import ALPHA, CASES, COMMON_TRAINING, RANK, Case
from engines import CPU_ENGINES, ENGINES, known_good, reason_to_skip
from job import Job
from measuring import hardware
from pair_dump import write_adapter, write_pairs
from processes import Side, SideFailed, Tuning
from reporting import new_report, parse_assignments, saver
from rounds import Comparison, describe_rate, make_side, print_summary, share_of_limit, summarise
from sweeping import Sweep
from token_dump import write_blocks, write_rows
from transformers import AutoConfig

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "shared" / "data"


def main() -> int:
    """Run the cases one after the other; one whose run breaks off does not stop those behind it."""
    arguments = parse_arguments()
    passed = []
    for name in arguments.cases:
        try:
            passed.append(run_case(CASES[name], arguments))
        except SideFailed as failed:
            print(f"FAILED {name}: {failed}", flush=True)
            passed.append(False)
    return 0 if all(passed) else 3


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("cases", nargs="+", choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(CPU_ENGINES))
    parser.add_argument("--python", nargs="+", default=[], metavar="ENGINE=PYTHON", help="this Python where not given")
    parser.add_argument("--model", help="folder with safetensors and a tokenizer (Firefly's embedded model)")
    parser.add_argument("--data_dir", type=Path, default=DATA)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side; 3 or more to publish")
    parser.add_argument("--rows", type=int, help="fewer examples, for a trial")
    parser.add_argument("--sweep", action="store_true", help="try the peers' tunings and run against the fastest")
    parser.add_argument("--sweep_only", action="store_true", help="try them and stop")
    parser.add_argument("--sweep_rows", type=int, default=16, help="examples of a sweep's runs")
    parser.add_argument("--sweep_limit", type=int, help="at most so many tunings of each peer, for a trial")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--limit_seconds", type=float, default=8.0, help="time to measure the rate of matrix products")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result files")
    arguments = parser.parse_args()
    for name in arguments.cases:
        if arguments.rows and arguments.rows <= CASES[name].examples_per_step:
            parser.error(
                f"--rows {arguments.rows}: {name} has {CASES[name].examples_per_step} a step, and takes two steps"
            )
        if CASES[name].task == "pretrain" and (arguments.rows or 0) % CASES[name].examples_per_step:
            parser.error(  # Firefly cuts the blocks itself, and has a last one that is shorter
                f"--rows {arguments.rows}: {name} takes whole steps, of {CASES[name].examples_per_step} blocks each"
            )
    arguments.python = parse_assignments(arguments.python)
    if unknown := arguments.python.keys() - ENGINES.keys():
        parser.error(f"--python names {', '.join(sorted(unknown))}, which is no engine")
    if "firefly" not in arguments.engines:
        arguments.engines = ["firefly", *arguments.engines]
    if arguments.model is None:
        from firefly.models.loading import embedded_model

        arguments.model = str(embedded_model())
    return arguments


def run_case(case: Case, arguments: argparse.Namespace) -> bool:
    """Dump, tune, run in turns, sum up; return whether every gate passed."""
    case = replace(case, rows=arguments.rows or case.rows)
    report = new_report(case.name, arguments) | {"case": asdict(case), "skipped": {}}
    path = arguments.out / f"{case.name}.json"
    save = saver(path, report)
    print(f"\n== {case.name}", flush=True)
    pythons = {name: arguments.python.get(name, sys.executable) for name in arguments.engines}
    for name, python in pythons.items():
        if reason := reason_to_skip(name, case, python):
            report["skipped"][name] = reason
            print(f"skipped {name}: {reason}", flush=True)
    engines = [name for name in arguments.engines if name not in report["skipped"]]
    has_bf16 = hardware()["bf16_matrix_instructions"]
    with tempfile.TemporaryDirectory() as folder:
        job, report["dump"] = make_job(case, arguments, Path(folder), "job", arguments.rows)
        print(f"dump   {report['dump']}", flush=True)
        sides = {name: side_of(name, pythons, Path(folder, "job.json"), arguments.threads) for name in engines}
        tunings = {name: known_good(name, case, has_bf16) for name in engines}
        if arguments.sweep or arguments.sweep_only:
            make_job(case, arguments, Path(folder), "sweep", arguments.sweep_rows)
            for name in engines:
                if name != "firefly":
                    side = side_of(name, pythons, Path(folder, "sweep.json"), arguments.threads)
                    swept = sweep(name, case, side, has_bf16, arguments.sweep_limit, report, save)
                    tunings[name] = swept or tunings[name]
        if arguments.sweep_only:
            report["tunings"] = {name: asdict(tuning) for name, tuning in tunings.items()}
            save()
            return True
        comparison = Comparison(case=case, sides=sides, tunings=tunings, report=report, save=save)
        runs = comparison.run(arguments.rounds)
        report["matmul_rate"] = matmul_rate(
            Path(folder, "job.json"), arguments, runs["firefly"][0]["settings"]["precision"]
        )
        config = AutoConfig.from_pretrained(arguments.model)
        report["share_of_limit"] = share_of_limit(job, config, runs["firefly"], report["matmul_rate"])
    report["summary"] = summarise(comparison, runs)
    save()
    print_summary(report, path)
    return all(found["passed"] for found in report["gates"].values())


def side_of(name: str, pythons: dict[str, str], job_file: Path, threads: int) -> Side:
    """The program of an engine in its own Python."""
    return make_side(name, pythons[name], job_file, threads)


def make_job(
    case: Case, arguments: argparse.Namespace, folder: Path, name: str, rows: int | None
) -> tuple[Job, dict[str, Any]]:
    """Write dump, adapter and job file; return the job and what the report says of its data."""
    dump, documents, adapter = folder / f"{name}.dump.jsonl", folder / f"{name}.documents.jsonl", folder / "adapter"
    described = write_dump(case, arguments, dump, documents, rows)
    job = Job(
        task=case.task,
        mode=case.mode,
        model=arguments.model,
        dump=str(dump),
        documents=str(documents) if case.task == "pretrain" else None,
        isolated=case.isolated,
        adapter=None if case.mode == "full" else str(adapter),
        max_tokens=case.max_tokens,
        examples_per_step=case.examples_per_step,
        rank=RANK,
        alpha=ALPHA,
        threads=arguments.threads,
        training={**COMMON_TRAINING, **case.training},
        firefly=case.firefly,
    )
    if job.adapter and not adapter.exists():
        write_adapter(model=job.model, rank=RANK, alpha=ALPHA, seed=job.seed, folder=adapter)
    job.write(Path(folder, f"{name}.json"))
    return job, described


def write_dump(
    case: Case, arguments: argparse.Namespace, dump: Path, documents: Path, rows: int | None
) -> dict[str, Any]:
    """Write a case's examples as token ids; pairs may be fewer than `rows`, where the data have no more."""
    data, rows = [arguments.data_dir / name for name in case.data], rows or case.rows
    common = {"model": arguments.model, "data": data, "max_tokens": case.max_tokens, "path": dump}
    if case.task == "dpo":
        return write_pairs(
            **common,
            num_pairs=rows,
            pairs_per_step=case.examples_per_step,
            max_prompt_tokens=case.max_prompt_tokens,
            min_answer_tokens=case.min_answer_tokens,
        )
    if case.task == "pretrain":
        return write_blocks(**common, num_blocks=rows, isolated=case.isolated, documents=documents)
    return write_rows(**common, num_rows=rows)


def sweep(
    name: str,
    case: Case,
    side: Side,
    has_bf16: bool,
    limit: int | None,
    report: dict[str, Any],
    save: Callable[[], None],
) -> Tuning | None:
    """Find a peer's fastest tuning, recording every attempt; None when it did not run at all."""
    attempts = report.setdefault("sweep", {}).setdefault(name, [])

    def record(attempt: dict[str, Any]) -> None:
        attempts.append(attempt)
        save()
        outcome = describe_rate(attempt["result"]) if "result" in attempt else attempt["outcome"]
        print(f"sweep  {name:13} {attempt['name']:55} {outcome}", flush=True)

    try:
        return Sweep(side, record, limit).run(name, case, has_bf16)
    except SideFailed as failed:
        print(f"sweep  {name:13} {failed}", flush=True)
        return None


def matmul_rate(job_file: Path, arguments: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """The rate of matrix products in the type we ran in, in a process of its own."""
    side = Side(
        name="matrix products",
        python=sys.executable,
        program=HERE / "matmul_rate.py",
        arguments=["--job", str(job_file), "--dtype", dtype, "--seconds", str(arguments.limit_seconds)],
        threads=arguments.threads,
    )
    return side.run(Tuning(name="matrix products"))


if __name__ == "__main__":
    sys.exit(main())
