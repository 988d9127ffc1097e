r"""Firefly beside its peers on the CPU: cases × engines, in turns, each run a fresh process, on the same token ids.

    python benchmarks/compare.py [CASE …] --python llamafactory=VENV/bin/python

Without a case: all that the project asks something of. README.md says what is equal, what differs and how to read the
result. Exit 3: a gate failed, and no speed of that comparison may be quoted; or a run broke off.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from cases import ALPHA, CASES, COMMON_TRAINING, HEADLINES, RANK, Case
from engines import ENGINES, HEADLINE_ENGINES, LONG, default_tuning, likely_tuning, reason_to_skip
from job import Job
from machines import KnownMachine, measure_machine
from measuring import git_commit
from pair_dump import write_adapter, write_pairs
from processes import Result, Side, SideFailed, Tuning
from reporting import new_report, parse_assignments, saver
from rounds import Comparison, against, describe_rate, make_side, print_summary, share_of_limit, summarise
from sweeping import NOT_TRIED, Sweep
from token_dump import write_blocks, write_rows
from transformers import AutoConfig

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "shared" / "data"


OWN_STEPS = 4
"""Steps of whole size for our own settings: they differ by less than the noise of a few short ones."""


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
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(HEADLINE_ENGINES))
    parser.add_argument("--python", nargs="+", default=[], metavar="ENGINE=PYTHON", help="this Python where not given")
    parser.add_argument("--model", help="folder with safetensors and a tokenizer (Firefly's embedded model)")
    parser.add_argument("--data_dir", type=Path, default=DATA)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side; 3 or more to publish")
    parser.add_argument("--seconds", type=float, default=72.0, help="steady state of the fastest side, where no --rows")
    parser.add_argument("--rows", type=int, help="examples of a run; few for a trial")
    parser.add_argument("--sweep", action="store_true", help="try the peers' tunings anew")
    parser.add_argument("--no_sweep", action="store_true", help="guess where none is recorded on this kind of machine")
    parser.add_argument("--sweep_only", action="store_true", help="try them and stop")
    parser.add_argument("--own_sweep", action="store_true", help="try Firefly's own settings, too, beside its defaults")
    parser.add_argument("--sweep_rows", type=int, help="examples of a sweep's runs (two or three small steps)")
    parser.add_argument("--sweep_seconds", type=float, default=180.0, help="no new tuning of an engine is begun after")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--limit_seconds", type=float, default=4.0, help="to measure the rate of matrix products")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result files")
    arguments = parser.parse_args()
    arguments.cases = arguments.cases or list(HEADLINES)
    if unknown := set(arguments.cases) - CASES.keys():
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    for name in arguments.cases:
        for option in ("rows", "sweep_rows"):
            given, a_step = getattr(arguments, option), CASES[name].examples_per_step
            if given and given <= a_step:
                parser.error(f"--{option} {given}: {name} has {a_step} a step, and takes two steps")
            if given and CASES[name].task == "pretrain" and given % a_step:
                # Firefly cuts the blocks itself, and has a last one that is shorter.
                parser.error(f"--{option} {given}: {name} takes whole steps, of {a_step} blocks each")
    arguments.python = parse_assignments(arguments.python)
    if unknown := arguments.python.keys() - ENGINES.keys():
        parser.error(f"--python names {', '.join(sorted(unknown))}, which is no engine")
    if "firefly" not in arguments.engines:
        arguments.engines = ["firefly", *arguments.engines]
    if arguments.model is None:
        from firefly.models.loading import embedded_model

        arguments.model = str(embedded_model())
    return arguments


@dataclass(frozen=True, kw_only=True)
class Session:
    """A case on this machine: its folder of jobs, the sides' programs, what is known of the machine's kind."""

    case: Case
    arguments: argparse.Namespace
    folder: Path
    known: KnownMachine

    def side(self, name: str, job_name: str) -> Side:
        """The program of an engine in its own Python, for one of the jobs."""
        python = self.arguments.python.get(name, sys.executable)
        return make_side(name, python, self.folder / f"{job_name}.json", self.arguments.threads)


def run_case(case: Case, arguments: argparse.Namespace) -> bool:
    """Dump, tune, run in turns, sum up; return whether every gate passed."""
    print(f"\n== {case.name}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        small = in_small_steps(case)
        make_job(small, arguments, folder, "sweep", arguments.sweep_rows or small.rows)
        make_job(case, arguments, folder, "own", case.examples_per_step * OWN_STEPS)
        rates = rate_side(folder / "sweep.json", arguments)
        known = KnownMachine(measure_machine(rates), arguments.out / "machines")
        machine = asdict(known.machine)
        products = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in machine["rates"].items())
        print(f"machine {machine['name']}: products at {products} GFLOP/s", flush=True)
        report = new_report(case.name, arguments) | {"machine": machine, "skipped": {}}
        session = Session(case=case, arguments=arguments, folder=folder, known=known)
        tunings = find_tunings(session, report)
        if arguments.sweep_only:
            return True
        rows = arguments.rows or rows_for(session)
        case = replace(case, rows=rows)
        path = arguments.out / f"{case.name}@{machine['name']}.json"
        save = saver(path, report)
        job, report["dump"] = make_job(case, arguments, folder, "job", rows)
        report["case"] = asdict(case)
        print(f"dump   {report['dump']}", flush=True)
        comparison = Comparison(
            case=case,
            sides={name: session.side(name, "job") for name in tunings},
            tunings=tunings,
            report=report,
            save=save,
            rate_beside=lambda dtype: rates.run(Tuning(name="matrix products", arguments=f"--dtype {dtype}")),
        )
        runs = comparison.run(arguments.rounds)
        beside = [run["matmul_rate"] for run in runs["firefly"]]
        limit = {
            "dtype": beside[0]["dtype"],
            "flops_per_second": statistics.median(found["flops_per_second"] for found in beside),
        }
        report["matmul_rate"] = limit
        config = AutoConfig.from_pretrained(arguments.model)
        report["share_of_limit"] = share = share_of_limit(job, config, runs["firefly"], limit)
        if case.asked_share is not None:
            share["asked"] = against(case.asked_share, share["share_of_limit"]["median"])
    report["summary"] = summarise(comparison, runs)
    save()
    print_summary(report, path)
    return all(found["passed"] for found in report["gates"].values())


def in_small_steps(case: Case) -> Case:
    """A case for sweeps: steps of half its size, three of them, or two where rows are long."""
    examples = max(1, case.examples_per_step // 2)
    return replace(case, examples_per_step=examples, rows=examples * (3 if case.max_tokens <= LONG else 2))


def find_tunings(session: Session, report: dict[str, Any]) -> dict[str, Tuning]:
    """Each engine's tuning: the best one recorded for this kind of machine, or of a sweep made now.

    Firefly runs with its default settings, whatever was found better. Engines that do not run are left out, by name.
    """
    arguments, case, rates = session.arguments, session.case, session.known.machine.rates
    sweeping = set(arguments.engines) if arguments.sweep else set()
    tunings: dict[str, Tuning] = {}
    report["swept"] = {}
    for name in arguments.engines:
        reason = reason_to_skip(name, case, arguments.python.get(name, sys.executable))
        if reason is None:
            wanted = arguments.own_sweep if name == "firefly" else not arguments.no_sweep
            recorded = session.known.sweep(case.name, name, arguments.model)
            ours_changed = name == "firefly" and recorded and recorded["git_commit"] != git_commit(HERE.parent)
            if name in sweeping or (wanted and ours_changed):
                recorded = None
            if wanted and not (recorded and recorded["complete"]):
                recorded = sweep(session, name, recorded)
            tunings[name] = likely_tuning(name, case, rates)
            if name != "firefly":
                report["swept"][name] = None
                if recorded and "best" in recorded:
                    report["swept"][name] = {key: recorded[key] for key in ("date", "git_commit", "complete")}
                    tunings[name] = Tuning(**recorded["best"])
                elif recorded and recorded["complete"]:
                    reason = recorded["failed"]
        if reason is not None:
            report["skipped"][name] = reason
            tunings.pop(name, None)
            print(f"skipped {name}: {reason.splitlines()[0]}", flush=True)
    return tunings


def sweep(session: Session, name: str, interrupted: dict[str, Any] | None) -> dict[str, Any]:
    """Find an engine's fastest tuning, going on where an earlier sweep stopped; return what the machine's file holds.

    The best so far is written after every attempt.
    """
    known, case = session.known, in_small_steps(session.case)
    begun = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "git_commit": git_commit(HERE.parent),
        "model": Path(session.arguments.model).name,
        "rates": known.machine.rates,
    }
    made = interrupted or known.begin_sweep(case.name, name, begun)
    before = [attempt for attempt in made["attempts"] if attempt["outcome"] != NOT_TRIED]
    made["attempts"] = list(before)

    def note() -> None:
        if found.tunings:
            default = found.rate_of(default_tuning(name, case, known.machine.rates))
            made["best"], made["best_tokens_per_second"] = asdict(found.best), found.best_rate
            made["default_over_best"] = default / found.best_rate
        known.save()

    def record(attempt: dict[str, Any]) -> None:
        made["attempts"].append(attempt)
        note()
        outcome = describe_rate(attempt["result"]) if "result" in attempt else attempt["outcome"]
        print(f"sweep  {name:13} {attempt['name']:60} {outcome}", flush=True)

    seconds = session.arguments.sweep_seconds
    side = session.side(name, "own" if name == "firefly" else "sweep")
    found = Sweep(side, record, seconds=seconds, known=before)
    try:
        found.run(name, case, known.machine.rates)
    except SideFailed as failed:
        log = next((attempt["log"] for attempt in made["attempts"] if "log" in attempt), "")
        made["failed"] = f"{failed}\n{log}"
    made["complete"] = found.complete
    note()
    return made


def rows_for(session: Session) -> int:
    """Examples for --seconds of steady state of the fastest side, in whole steps: Firefly, timed once.

    In steps of the case's own size: in a sweep's half ones it is up to a third slower.
    """
    trial: Result = session.side("firefly", "own").run(Tuning(name="trial"))
    print(f"trial  firefly       {describe_rate(trial)}", flush=True)
    peers = (
        session.known.sweep(session.case.name, name, session.arguments.model) for name in session.arguments.engines
    )
    # A sweep counts tokens; its rows are about as long as the trial's.
    fastest = max([trial["tokens_per_second"], *(found.get("best_tokens_per_second", 0.0) for found in peers if found)])
    tokens_a_row = trial["tokens"] / trial["rows"]
    a_step = session.case.examples_per_step
    steps = 1 + math.ceil(session.arguments.seconds * fastest / (tokens_a_row * a_step))
    return max(2, steps) * a_step


def make_job(
    case: Case, arguments: argparse.Namespace, folder: Path, name: str, rows: int
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


def write_dump(case: Case, arguments: argparse.Namespace, dump: Path, documents: Path, rows: int) -> dict[str, Any]:
    """Write a case's examples as token ids; pairs may be fewer than `rows`, where the data have no more."""
    data = [arguments.data_dir / name for name in case.data]
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


def rate_side(job_file: Path, arguments: argparse.Namespace) -> Side:
    """The program that measures matrix products of the model's shapes, in a process of its own."""
    return Side(
        name="matrix products",
        python=sys.executable,
        program=HERE / "matmul_rate.py",
        arguments=["--job", str(job_file), "--seconds", str(arguments.limit_seconds)],
        threads=arguments.threads,
    )


if __name__ == "__main__":
    sys.exit(main())
