r"""How far `firefly plan` is from what a run takes: `--probe` on SmolLM2-135M, case by case.

    python benchmarks/plan_accuracy.py [--cases sft_full sft_lora sft_qlora dpo_lora] [--steps 2 8] [--fp32]

Each case is planned for its longest rows and trained on them for some steps in a fresh process; memory is the peak of
the resident set over what the process had after its imports. Needs no idle machine, since nothing is timed that counts.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from measuring import versions
from reporting import new_report, saver

from firefly.reports.plan import make_plan
from firefly.reports.probe import probe

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
    """Probe every case and write the result; exit 3 if one is off by more than LIMIT."""
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
    parser.add_argument("--steps", nargs="+", type=int, default=[2, 8])
    parser.add_argument("--fp32", action="store_true", help="compute in fp32 also where the CPU has bf16")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data_dir", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    return parser.parse_args()


def measure(name: str, steps: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One case, planned and probed."""
    file = "dpo_en_demo.json" if name.startswith("dpo") else "alpaca_en_demo.json"
    own = {"model_name_or_path": arguments.model, "train_file": str(arguments.data_dir / file)}
    plan, data = make_plan("", CASES[name] | own | ({"bf16": False} if arguments.fp32 else {}))
    found = probe(plan, data, steps).as_dict()
    return {"case": name, "precision": plan.precision.name, "parts_of_the_run": plan.forecast.parts, **found}


if __name__ == "__main__":
    main()
