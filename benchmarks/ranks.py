r"""Two ranks of one thread each beside one rank of two threads, on the same work: examples per second, in turns.

    python benchmarks/ranks.py --data_dir FOLDER

On a machine of two cores both have the same cores; what two ranks lose is what they wait for each other and exchange
gradients for.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import versions
from processes import environment
from reporting import new_report, saver

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "shared" / "data"
EXAMPLES_PER_STEP = 8
ALONE = ["-c", "from firefly.cli import run; run()", "train"]
TOGETHER = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(HERE.parent / "train.py")]


def main() -> None:
    """Run both in turns and write the result."""
    arguments = parse_arguments()
    report = new_report("ranks", arguments) | {"versions": versions(), "rounds": []}
    save = saver(arguments.out / "ranks.json", report)
    for number in range(arguments.rounds):
        order = (1, 2) if number % 2 == 0 else (2, 1)
        found = {f"{ranks} ranks": examples_per_second(arguments, ranks) for ranks in order}
        report["rounds"].append(found)
        save()
        print(json.dumps(found), flush=True)
    ratios = [each["2 ranks"] / each["1 ranks"] for each in report["rounds"]]
    report["ratio"] = {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)}
    save()
    print(f"2 ranks × 1 thread reach {report['ratio']['median']:.2f} of 1 rank × 2 threads")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data_dir", type=Path, default=DATA)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    return parser.parse_args()


def examples_per_second(arguments: argparse.Namespace, ranks: int) -> float:
    """Of all steps but the first, by the moments at which they were logged."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "run")
        configuration: dict[str, Any] = {
            "output_dir": str(output),
            "model_name_or_path": arguments.model,
            "train_file": str(arguments.data_dir / "alpaca_en_demo.json"),
            "max_seq_length": 512,
            "train_mode": "lora",
            "lora_rank": 16,
            "per_device_train_batch_size": EXAMPLES_PER_STEP // ranks,
            "max_steps": arguments.steps,
            "logging_steps": 1,
            "save_strategy": "no",
            "compare": False,
            "report_to": "none",
            "use_cpu": True,
        }
        file = Path(folder, "run.json")
        file.write_text(json.dumps(configuration), encoding="utf-8")
        command = [*ALONE, str(file)] if ranks == 1 else [*TOGETHER, "--train_args_file", str(file)]
        settings: dict[str, Any] = {"capture_output": True, "text": True, "check": False}
        done = subprocess.run([sys.executable, *command], env=environment(2 // ranks), **settings)
        if done.returncode:
            raise SystemExit(f"{ranks} ranks ended with {done.returncode}:\n{done.stderr[-2000:]}")
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        times = [line["time"] for line in map(json.loads, lines) if "loss" in line]
        return (len(times) - 1) * EXAMPLES_PER_STEP / (times[-1] - times[0])


if __name__ == "__main__":
    main()
