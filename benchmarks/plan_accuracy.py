r"""How far `firefly plan` is from what a run takes, on SmolLM2-135M, case by case.

    python benchmarks/plan_accuracy.py [--cases sft_full sft_lora sft_qlora dpo_lora] [--steps 6] [--fp32]

Each case is planned for its longest rows and trained on them for some steps in a fresh process; memory is the peak of
the resident set over what the process had after its imports. Two steps of one size leave few holes in the heap; six,
each a little larger than the one before it, leave as many as a long run. Needs no idle machine: nothing is timed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import versions
from reporting import new_report, saver

from firefly.config import RECORDS_OF_TASK, load_config
from firefly.data.dataset import load_split
from firefly.data.schema import TokenPair
from firefly.models.loading import load_tokenizer
from firefly.setup.checks import bind_encoder
from firefly.setup.plan import make_plan

HERE = Path(__file__).resolve().parent
SHARED = {
    "per_device_train_batch_size": 8,
    "max_seq_length": 512,
    "lora_rank": 16,
    "lora_alpha": 32,
    "lora_dropout": 0,
    "max_lost_share": 1.0,
    "output_dir": "unused",
}
CASES: dict[str, dict[str, Any]] = {
    "sft_full": SHARED | {"train_mode": "full"},
    "sft_lora": SHARED | {"train_mode": "lora"},
    "sft_qlora": SHARED | {"train_mode": "qlora"},
    "dpo_lora": SHARED
    | {"train_mode": "lora", "task_type": "dpo", "per_device_train_batch_size": 4, "max_seq_length": 1024},
}
LIMIT = 0.15
"""What the error may be."""


def main() -> None:
    """Measure every case and write the result; exit 3 if one is off by more than LIMIT."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    report = new_report("plan", arguments) | {"versions": versions(), "cases": []}
    save = saver(arguments.out / ("plan_fp32.json" if arguments.fp32 else "plan.json"), report)
    for name in arguments.cases:
        for steps in arguments.steps:
            found = measure(name, steps, arguments)
            report["cases"].append(found)
            save()
            print(json.dumps(found), flush=True)
    if any(abs(found["error"]) > LIMIT for found in report["cases"]):
        raise SystemExit(3)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", nargs="+", type=int, default=[6])
    parser.add_argument("--fp32", action="store_true", help="compute in fp32 also where the CPU has bf16")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data_dir", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    return parser.parse_args()


def measure(name: str, steps: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One case, planned and trained."""
    file = "dpo_en_demo.json" if name.startswith("dpo") else "alpaca_en_demo.json"
    own = {"model_name_or_path": arguments.model, "train_file": str(arguments.data_dir / file)}
    with tempfile.TemporaryDirectory(prefix="firefly-plan-") as place:
        keys = on_longest_rows(CASES[name] | own | ({"bf16": False} if arguments.fp32 else {}), steps, Path(place))
        plan = make_plan("", keys)
        measured = trained_memory(keys, Path(place))
    predicted = plan.forecast.total
    return {
        "case": name,
        "precision": plan.precision.name,
        "steps": steps,
        "longest": plan.work.longest,
        "parts": plan.forecast.parts,
        "predicted": predicted,
        "measured": measured,
        "error": predicted / measured - 1,
    }


def on_longest_rows(keys: dict[str, Any], steps: int, place: Path) -> dict[str, Any]:
    """The configuration of a run of so many steps on its longest rows alone, in files under `place`."""
    config = load_config(keys)
    kind = RECORDS_OF_TASK[config.task_type]
    encoder = bind_encoder(config, load_tokenizer(config.model, None), kind != "document")
    examples = load_split(config.data, encoder, kind, config.model.hub).train
    # The longest last: it then finds a heap with the holes that others left, as in a run.
    rows = np.argsort(examples.counts.lengths, kind="stable")[-steps * config.step.examples_per_rank :]
    with (place / "rows.jsonl").open("w", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json.dumps(record(examples[int(row)])) + "\n")
    return keys | {
        "train_file": str(place / "rows.jsonl"),
        "output_dir": str(place / "run"),
        "max_steps": steps,
        "save_strategy": "no",
        "compare": False,
        "report_to": "none",
        "shuffle": False,
    }


def record(example: Any) -> dict[str, Any]:
    """An example in the record shapes for what is tokenized already."""
    if not isinstance(example, TokenPair):
        return {"input_ids": example.input_ids.tolist(), "labels": example.labels.tolist()}
    prompt, middle = example.prompt, example.prompt + example.chosen
    parts = {"prompt_ids": slice(prompt), "chosen_ids": slice(prompt, middle), "rejected_ids": slice(middle, None)}
    return {name: example.input_ids[part].tolist() for name, part in parts.items()}


def trained_memory(keys: dict[str, Any], place: Path) -> int:
    """Bytes at the peak of a run in a process of its own, over what its imports had taken."""
    (place / "run.json").write_text(json.dumps(keys), encoding="utf-8")
    program = "import sys; from firefly.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "train", str(place / "run.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads((place / "run" / "train_results.json").read_text(encoding="utf-8"))["run_memory_bytes"]


if __name__ == "__main__":
    main()
