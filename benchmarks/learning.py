r"""Whether training learns: short runs of `firefly train` on real data, judged by what they write.

    python benchmarks/learning.py --model MODEL_DIR --data_dir FOLDER [--only dpo sft pretrain masters]

FOLDER holds dpo_en_demo.json, alpaca_en_demo.json and c4_demo.jsonl. Each run is one command and one configuration
file; held-out records are never trained. Exit 3 when a run did not learn.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import versions
from processes import environment
from reporting import new_report, saver
from safetensors import safe_open

HERE = Path(__file__).resolve().parent
LEAST_ACCURACY = 0.6
Record = dict[str, Any]


def main() -> int:
    """Run what is asked for, save each result at once, and say what did not learn."""
    arguments = parse_arguments()
    report = new_report("learning", arguments) | {"versions": versions(), "runs": {}}
    if arguments.out.is_file():  # runs asked for one by one end up in one file, each with its own commit
        report["runs"] = json.loads(arguments.out.read_text(encoding="utf-8"))["runs"]
    save = saver(arguments.out, report)
    for name in arguments.only:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
            result = RUNS[name](arguments, Path(folder))
        report["runs"][name] = {"git_commit": report["git_commit"], "date": report["date"]} | result
        save()
        print(f"{name}: {'passed' if result['passed'] else 'FAILED'} {result['found']}", flush=True)
    return 0 if all(report["runs"][name]["passed"] for name in arguments.only) else 3


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--firefly", default=str(Path(sys.executable).with_name("firefly")), help="the command")
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints: 5 GB for `masters`")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--train_pairs", type=int, default=120)
    parser.add_argument("--held_out_pairs", type=int, default=48)
    parser.add_argument("--dpo_learning_rate", type=float, default=2e-4)
    parser.add_argument("--dpo_epochs", type=float, default=1)
    parser.add_argument("--train_rows", type=int, default=128, help="of sft and pretrain")
    parser.add_argument("--held_out_rows", type=int, default=32, help="of sft and pretrain")
    parser.add_argument("--learning_rate", type=float, default=2e-4, help="of sft and pretrain")
    parser.add_argument("--masters_steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "learning.json")
    return parser.parse_args()


def prefer(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """DPO with LoRA: of held-out pairs, more than `LEAST_ACCURACY` must have the chosen answer rewarded more.

    The shortest pairs are taken, for the minutes; which of them are held out is drawn.
    """
    records = json.loads((arguments.data_dir / "dpo_en_demo.json").read_text(encoding="utf-8"))
    records = sorted(records, key=lambda record: len(json.dumps(record, ensure_ascii=False)))
    files = split(arguments, records, arguments.train_pairs, arguments.held_out_pairs, folder)
    pairs_per_step = 4
    steps = int(arguments.train_pairs * arguments.dpo_epochs) // pairs_per_step
    keys = {
        "task_type": "dpo",
        "preference_loss": "sigmoid",
        "beta": 0.1,
        "max_seq_length": 1024,
        "max_prompt_length": None,
        "per_device_train_batch_size": pairs_per_step,
        "num_train_epochs": arguments.dpo_epochs,
        "learning_rate": arguments.dpo_learning_rate,
        "eval_steps": max(1, steps // 2),
    }
    run = firefly_train(arguments, folder, files | lora() | keys)
    evaluations = evaluations_of(run, "eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
    accuracy = evaluations[-1]["eval_rewards/accuracies"]
    return run | {
        "passed": accuracy > LEAST_ACCURACY,
        "found": {"eval_rewards/accuracies": accuracy, "held_out_pairs": arguments.held_out_pairs},
        "evaluations": evaluations,
    }


def fine_tune(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """SFT with LoRA: the loss on held-out rows must fall."""
    records = json.loads((arguments.data_dir / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    return lower_loss(arguments, folder, records, {"task_type": "sft"})


def pretrain(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Pretraining with LoRA: the loss on held-out documents must fall. Very long documents are left out."""
    lines = (arguments.data_dir / "c4_demo.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if len(record["text"]) < 2000]
    return lower_loss(arguments, folder, records, {"task_type": "pretrain"})


def lower_loss(
    arguments: argparse.Namespace, folder: Path, records: Sequence[Record], task: dict[str, Any]
) -> dict[str, Any]:
    """One epoch, evaluated before and after."""
    count = arguments.train_rows + arguments.held_out_rows
    files = split(arguments, records[:count], arguments.train_rows, arguments.held_out_rows, folder)
    keys = {
        "max_seq_length": 512,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "learning_rate": arguments.learning_rate,
        "eval_on_start": True,
        "eval_strategy": "epoch",
    }
    run = firefly_train(arguments, folder, files | lora() | keys | task)
    evaluations = evaluations_of(run, "eval_loss")
    before, after = (evaluations[position]["eval_loss"] for position in (0, -1))
    return run | {
        "passed": len(evaluations) > 1 and after < before,
        "found": {"eval_loss_before": before, "eval_loss_after": after},
        "evaluations": evaluations,
    }


def masters(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Full fine-tuning at 1e-5: what its updates change in fp32 masters, and what in weights that are bf16 alone.

    The weights are saved after every step. The difference of two savings is the update of a step; applied to the
    model's own bf16 weights, one after the other and rounded each time, the updates show what a trainer without
    masters keeps of them.
    """
    records = json.loads((arguments.data_dir / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    rows_per_step = 8
    files = split(arguments, records[: arguments.masters_steps * rows_per_step], None, 0, folder)
    keys = {
        "task_type": "sft",
        "train_mode": "full",
        "max_seq_length": 512,
        "per_device_train_batch_size": rows_per_step,
        "num_train_epochs": 1,
        "learning_rate": 1e-5,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": arguments.masters_steps,
        "save_only_model": True,
    }
    run = firefly_train(arguments, folder, files | keys)
    checkpoints = [folder / "run" / f"checkpoint-{step}" for step in range(1, arguments.masters_steps + 1)]
    found = follow_updates(Path(arguments.model), checkpoints)
    return run | {"passed": found["changed_with_masters"] > found["changed_in_bf16_alone"], "found": found}


RUNS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "dpo": prefer,
    "sft": fine_tune,
    "pretrain": pretrain,
    "masters": masters,
}


def split(
    arguments: argparse.Namespace, records: Sequence[Record], train: int | None, held_out: int, folder: Path
) -> dict[str, Any]:
    """Draw training and held-out records and write them; without a count all of them train."""
    train = len(records) if train is None else train
    if len(records) < train + held_out:
        raise SystemExit(f"{train} + {held_out} records asked for, {len(records)} usable")
    drawn = random.Random(arguments.seed).sample(list(records[: train + held_out]), train + held_out)
    files = {"train_file": drawn[:train]} | ({"eval_file": drawn[train:]} if held_out else {})
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        Path(folder, f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in files}


def lora() -> dict[str, Any]:
    """The adapter of the LoRA runs."""
    return {"train_mode": "lora", "lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.0}


def firefly_train(arguments: argparse.Namespace, folder: Path, keys: dict[str, Any]) -> dict[str, Any]:
    """Run `firefly train` on a configuration file; return what it was and what it wrote.

    The precision is left to Firefly: bf16 where the machine has instructions for it.
    """
    configuration = {
        "model_name_or_path": arguments.model,
        "output_dir": str(folder / "run"),
        "gradient_accumulation_steps": 1,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "max_lost_share": 1.0,  # long records are cut or dropped, on purpose
        "seed": arguments.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "compare": False,
        "report_to": "none",
    } | keys
    path = folder / "train_args.json"
    path.write_text(json.dumps(configuration), encoding="utf-8")
    started = time.monotonic()
    command = [arguments.firefly, "train", str(path)]
    done = subprocess.run(command, env=environment(arguments.threads), stdout=sys.stderr, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    return {
        "configuration": configuration,
        "seconds": time.monotonic() - started,
        "train_results": json.loads((folder / "run" / "train_results.json").read_text(encoding="utf-8")),
        "losses": [line["loss"] for line in metrics if "loss" in line],
        "metrics": [line for line in metrics if "eval_loss" in line],
    }


def evaluations_of(run: dict[str, Any], *names: str) -> list[dict[str, float]]:
    """Take the evaluations out of a run, with the metrics named; each must have them all."""
    evaluations = [{name: line[name] for name in ("step", *names)} for line in run.pop("metrics")]
    if not evaluations:
        raise SystemExit("metrics.jsonl has no evaluation")
    return evaluations


@torch.no_grad()
def follow_updates(start: Path, checkpoints: Sequence[Path]) -> dict[str, Any]:
    """Compare the weights after the last step with the start: as saved, rounded to bf16, and kept in bf16 alone.

    `update_kept` is how far the bf16 weights went along the masters' way, 1 being all of it.
    """
    weights = masters_changed = rounded_changed = alone_changed = 0
    along = length = 0.0
    for begun, saved in tensors(start, checkpoints):
        if any(tensor.dtype != torch.float32 for tensor in saved):
            raise SystemExit("the checkpoints are not float32, so they do not hold the masters")
        first = begun.to(torch.bfloat16).float()
        previous, alone = first, first.to(torch.bfloat16)
        for current in saved:
            alone = (alone.float() + (current - previous)).to(torch.bfloat16)
            previous = current
        weights += first.numel()
        masters_changed += int((previous != first).sum())
        rounded_changed += int((previous.to(torch.bfloat16).float() != first).sum())
        alone_changed += int((alone.float() != first).sum())
        way = (previous - first).double()
        along += float(((alone.float() - first).double() * way).sum())
        length += float(way.square().sum())
    return {
        "weights": weights,
        "steps": len(checkpoints),
        "changed_with_masters": masters_changed / weights,
        "changed_with_masters_saved_as_bf16": rounded_changed / weights,
        "changed_in_bf16_alone": alone_changed / weights,
        "update_kept_in_bf16_alone": along / length,
    }


def tensors(start: Path, checkpoints: Sequence[Path]) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Yield each weight at the start and after every step, one weight at a time."""
    files = [safe_open(folder / "model.safetensors", framework="pt") for folder in (start, *checkpoints)]
    names = set(files[0].keys())
    if any(set(file.keys()) != names for file in files):
        raise SystemExit("the checkpoints do not hold the weights of the model they began with")
    for name in sorted(names):
        begun, *saved = (file.get_tensor(name) for file in files)
        yield begun, saved


if __name__ == "__main__":
    sys.exit(main())
