r"""How long until `firefly train` trains: seconds from the start of its process to the end of the first step.

    python benchmarks/startup.py --model MODEL_DIR

Beside a process that only imports torch, transformers' Trainer and peft, which every such tool has to do: in turns, the
median of several. The run is the smallest there is (one short chat a step), its caches empty, so that preparing data is
part of the time and computing hardly is.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import versions
from processes import environment
from reporting import new_report, saver

HERE = Path(__file__).resolve().parent
IMPORTS = "import time, torch, peft; from transformers import Trainer; from peft import LoraConfig; print(time.time())"
COMMAND = "from firefly.cli import run; run()"  # what the console script `firefly` does
CHAT = {"instruction": "Say hello.", "output": "Hello."}


def main() -> None:
    """Run both in turns and write the result."""
    arguments = parse_arguments()
    report = new_report("startup", arguments) | {"versions": versions(), "rounds": []}
    save = saver(arguments.out / "startup.json", report)
    for number in range(arguments.rounds):
        timed = (("firefly", until_first_step), ("imports", until_imported))
        found = {}
        for name, measure in timed if number % 2 == 0 else reversed(timed):
            found[name] = measure(arguments)
        report["rounds"].append(found)
        save()
        print(json.dumps(found), flush=True)
    report["median"] = {
        name: statistics.median(each[name] for each in report["rounds"]) for name in ("firefly", "imports")
    }
    report["ratio"] = statistics.median(each["firefly"] / each["imports"] for each in report["rounds"])
    save()
    print(f"{report['median']}, ratio {report['ratio']:.2f}")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", help="folder with safetensors and a tokenizer (Firefly's embedded model)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    if arguments.model is None:
        from firefly.models.loading import embedded_model

        arguments.model = str(embedded_model())
    return arguments


def until_first_step(arguments: argparse.Namespace) -> float:
    """Seconds to the end of the first step of `firefly train`, by the moment that it wrote that step's metrics."""
    with tempfile.TemporaryDirectory() as folder:
        data, output = Path(folder, "chats.jsonl"), Path(folder, "run")
        data.write_text(json.dumps(CHAT) + "\n" + json.dumps(CHAT | {"output": "Hello there."}) + "\n")
        configuration = {
            "output_dir": str(output),
            "model_name_or_path": arguments.model,
            "train_file": str(data),
            "train_mode": "lora",
            "per_device_train_batch_size": 1,
            "max_steps": 1,
            "logging_steps": 1,
            "save_strategy": "no",
            "compare": False,
        }
        Path(folder, "run.json").write_text(json.dumps(configuration), encoding="utf-8")
        started = time.time()
        run(["-c", COMMAND, "train", str(Path(folder, "run.json"))], arguments, {"FIREFLY_CACHE": folder})
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return next(entry["time"] for entry in map(json.loads, lines) if "loss" in entry) - started


def until_imported(arguments: argparse.Namespace) -> float:
    """Seconds until a process has imported what every such tool imports."""
    started = time.time()
    return float(run(["-c", IMPORTS], arguments, {}).split()[-1]) - started


def run(command: list[str], arguments: argparse.Namespace, more: dict[str, str]) -> str:
    """Run this Python in the environment of every benchmark; return what it printed."""
    settings: dict[str, Any] = {"capture_output": True, "text": True, "check": False}
    done = subprocess.run([sys.executable, *command], env=environment(arguments.threads) | more, **settings)
    if done.returncode:
        raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
