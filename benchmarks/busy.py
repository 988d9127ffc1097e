r"""How a run gets on beside another busy process, and what it pays for that on an idle machine.

    python benchmarks/busy.py [--works sft_lora demo] [--rounds 2] [--spinning_busy]

`firefly train` in fresh processes, one step a line of its metrics.jsonl: on an idle machine, beside one process that
never rests (`while true`), and on an idle machine with threads that spin as GNU's OpenMP library lets them by itself
(GOMP_SPINCOUNT=300000, at which Firefly leaves them alone). Every second round is turned round (A-B-B-A). The seconds
of the same steps make the ratios: beside a busy process a run is to keep 45 % of its idle rate, and on an idle machine
to reach 97 % of that of spinning threads (exit 3). `sft_lora` is that of `compare.py`, `demo` the training of `make
demo`. Rounds of the same commit and CPU are added to those that the result file has.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measuring import versions
from processes import environment
from reporting import new_report, saver

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
COMMAND = "from firefly.cli import run; run()"  # what the console script `firefly` does
SPINNING = {"GOMP_SPINCOUNT": "300000"}
ASKED = {"busy_of_idle": 0.45, "idle_of_spinning": 0.97}
SMOLLM2 = ROOT / "train_args" / "sft" / "lora" / "smollm2-135m-sft-lora.json"


def main() -> None:
    """Measure each work in turns, write the result and say whether it is what was asked."""
    arguments = parse_arguments()
    report = new_report("busy", arguments) | {"versions": versions(), "asked": ASKED, "works": {}}
    earlier = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.is_file() else {}
    if same_machine_and_code(earlier, report):
        report["works"] = earlier["works"]
    save = saver(arguments.out, report)
    for name in arguments.works:
        rounds = report["works"].setdefault(name, {"rounds": []})["rounds"]
        for _ in range(arguments.rounds):
            rounds.append(one_round(name, arguments, turned=len(rounds) % 2 == 1))
            save()
            print(json.dumps({name: rounds[-1]}), flush=True)
    for work in report["works"].values():  # an earlier one may have been interrupted
        work["ratios"] = ratios(work["rounds"])
    save()
    missed = []
    for name, work in report["works"].items():
        for ratio, asked in ASKED.items():
            found = work["ratios"][ratio]
            print(f"{name}: {ratio} {found['median']:.3f} ({found['min']:.3f}–{found['max']:.3f}), asked {asked}")
            missed += [name] if found["median"] < asked else []
    if missed:
        raise SystemExit(3)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--works", nargs="+", default=["sft_lora", "demo"], choices=["sft_lora", "demo"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="of a process; the first one is not timed")
    parser.add_argument("--spinning_busy", action="store_true", help="spinning threads beside a busy process, too")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--data_dir", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "busy.json")
    return parser.parse_args()


def same_machine_and_code(earlier: dict[str, Any], report: dict[str, Any]) -> bool:
    """Whether rounds of an earlier result file are rounds of this one."""
    settings = ("steps", "threads")
    return (
        bool(earlier)
        and all(earlier[name] == report[name] for name in ("git_commit", "versions"))
        and earlier["hardware"]["cpu"] == report["hardware"]["cpu"]
        and all(earlier["arguments"][name] == report["arguments"][name] for name in settings)
    )


def one_round(work: str, arguments: argparse.Namespace, turned: bool) -> dict[str, float]:
    """Seconds of the timed steps under each condition, in this order or the reverse of it."""
    conditions = [("spinning", SPINNING, False), ("idle", {}, False), ("busy", {}, True)]
    if arguments.spinning_busy:
        conditions.append(("spinning_busy", SPINNING, True))
    found = {}
    for name, variables, beside in reversed(conditions) if turned else conditions:
        with busy_process(beside):
            found[name] = round(timed_run(work, arguments, variables), 3)
    return found


@contextmanager
def busy_process(wanted: bool) -> Iterator[None]:
    """Within the block, one process that never rests."""
    if not wanted:
        yield
        return
    process = subprocess.Popen(["sh", "-c", "while true; do :; done"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def timed_run(work: str, arguments: argparse.Namespace, variables: dict[str, str]) -> float:
    """Seconds from the end of the first step to that of the last one of `firefly train`, by its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        config, output = Path(folder, "config.json"), Path(folder, "run")
        config.write_text(json.dumps(configuration(work, arguments, folder) | {"output_dir": str(output)}))
        own = environment(arguments.threads)
        for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
            own.pop(name, None)
        command = [sys.executable, "-c", COMMAND, "train", str(config)]
        done = subprocess.run(command, env=own | variables, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        lines = map(json.loads, (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        times = [line["time"] for line in lines if "loss" in line]
    return times[-1] - times[0]


def configuration(work: str, arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """A short run of a work, which logs each step."""
    short = {
        "max_steps": arguments.steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "compare": False,
        "report_to": "none",
    }
    if work == "demo":
        rows = Path(folder, "rows.jsonl")
        files = (ROOT / "data" / "identity.jsonl", ROOT / "data" / "general.jsonl")
        rows.write_text("".join(file.read_text("utf-8") for file in files), "utf-8")
        return json.loads(SMOLLM2.read_text(encoding="utf-8")) | {"train_file": str(rows), "eval_ratio": 0.15} | short
    return {
        "task_type": "sft",
        "train_mode": "lora",
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "model_name_or_path": "smollm2-135m-instruct",
        "train_file": str(arguments.data_dir / "alpaca_en_demo.json"),
        "per_device_train_batch_size": 8,
        "max_seq_length": 512,
        "shuffle": False,
    } | short


def ratios(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Of rates, so of seconds the other way round: median, least and greatest of the rounds."""
    pairs = {"busy_of_idle": ("idle", "busy"), "idle_of_spinning": ("spinning", "idle")}
    pairs["spinning_busy_of_idle"] = ("spinning", "spinning_busy")
    found = {}
    for name, (above, below) in pairs.items():
        if each := [one[above] / one[below] for one in rounds if below in one]:
            least, most = min(each), max(each)
            found[name] = {"median": round(statistics.median(each), 4), "min": round(least, 4), "max": round(most, 4)}
    return found


if __name__ == "__main__":
    main()
