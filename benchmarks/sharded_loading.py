r"""Host memory while ranks load a model whose weights they share out.

    python benchmarks/sharded_loading.py [--ranks 2 4] [--backends fsdp2 zero3] [--modes full lora] [--against COMMIT]

Gloo ranks of one thread each build a random Llama of about 1 GB in bf16, as `firefly train` does up to its first step.
Their proportional set sizes (smaps_rollup: a page that several share counts once), over what they are after the
imports, are added up all the while: the peak of the sum, what is left of it at the end, and the peak of the largest
rank. The peak must not exceed one and a half copies of the weights as they are stored, plus what is left (exit 3).
COMMIT, in a worktree of its own, takes turns with the working tree.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import versions
from processes import environment
from reporting import gigabytes, new_report, saver
from step_overhead import write_inputs

HERE = Path(__file__).resolve().parent
SHAPE = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 14, "num_attention_heads": 12}
VOCABULARY = 32000
ALLOWED_COPIES = 1.5
BACKENDS: dict[str, dict[str, Any]] = {
    "fsdp2": {"fsdp": "full_shard auto_wrap"},
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3}}},
}


def main() -> None:
    """Measure each combination and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--modes", nargs="+", default=["full", "lora"])
    parser.add_argument("--against", help="a commit that is measured, too")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "sharded_loading.json")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.build:
        build(arguments.build)
        return
    del arguments.build
    report = new_report("sharded_loading", arguments) | {"versions": versions(), "runs": []}
    save = saver(arguments.out, report)
    with tempfile.TemporaryDirectory() as scratch:
        weights = write_model(Path(scratch))
        report["weights_bytes"] = weights
        trees = {"new": HERE.parent}
        if arguments.against:
            trees["old"] = Path(scratch, "tree")
            subprocess.run(
                ["git", "worktree", "add", "--detach", trees["old"], arguments.against], cwd=HERE, check=True
            )
        try:
            for backend in arguments.backends:
                for mode in arguments.modes:
                    for ranks in arguments.ranks:
                        for side, tree in trees.items():
                            run = {"side": side, "backend": backend, "mode": mode, "ranks": ranks}
                            run |= measure(tree, Path(scratch), backend, mode, ranks)
                            run["within"] = run["peak_bytes"] <= ALLOWED_COPIES * weights + run["kept_bytes"]
                            report["runs"].append(run)
                            save()
                            print(describe(run, weights), flush=True)
        finally:
            if arguments.against:
                subprocess.run(["git", "worktree", "remove", "--force", trees["old"]], cwd=HERE, check=True)
    if not all(run["within"] for run in report["runs"] if run["side"] == "new"):
        raise SystemExit(3)


def write_model(folder: Path) -> int:
    """A random model in bf16 with a tokenizer of words, and rows to train on; the bytes of its weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_inputs(folder)
    config = LlamaConfig(**SHAPE, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, dtype="bfloat16")
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    return sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))


def measure(tree: Path, scratch: Path, backend: str, mode: str, ranks: int) -> dict[str, Any]:
    """One launch with a tree's code, watched until all ranks have built their model."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    config = {
        "model_name_or_path": str(scratch / "model"),
        "train_file": str(scratch / "train.jsonl"),
        "output_dir": str(folder / "out"),
        "template_name": "default",
        "train_mode": mode,
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "save_strategy": "no",
        "compare": False,
        "report_to": "none",
        "use_cpu": True,
    } | BACKENDS[backend]
    (folder / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    variables = environment(1) | {
        "PYTHONPATH": str(tree / "src"),
        "FIREFLY_CACHE": f"{folder}/cache",
        "DS_ACCELERATOR": "cpu",
    }
    started = 0.0
    peak, largest, last = 0, 0, [0] * ranks
    with (folder / "log.txt").open("w") as log:
        launched = subprocess.Popen([*command, __file__, "--build", folder], env=variables, stdout=log, stderr=log)
        try:
            while len(list(folder.glob("built-*"))) < ranks:
                if launched.poll() is not None:
                    raise SystemExit((folder / "log.txt").read_text()[-3000:])
                begun = sorted(folder.glob("imported-*"))
                if len(begun) < ranks:
                    time.sleep(0.05)
                    continue
                if not started:
                    before = {int(file.read_text()): proportional_set(int(file.read_text())) for file in begun}
                    (folder / "begin").touch()
                    started = time.time()
                last = [proportional_set(process) - size for process, size in before.items()]
                peak, largest = max(peak, sum(last)), max(largest, *last)
                time.sleep(0.01)
            seconds = time.time() - started
            time.sleep(1)
            kept = sum(proportional_set(process) - size for process, size in before.items())
        finally:
            (folder / "end").touch()
            launched.wait(120)
    return {"peak_bytes": peak, "kept_bytes": kept, "largest_rank_bytes": largest, "seconds": round(seconds, 1)}


def proportional_set(process: int) -> int:
    """Bytes in memory, each page shared among the processes that have it."""
    return 1024 * int(re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{process}/smaps_rollup").read_text(), re.M)[1])


def build(folder: Path) -> None:
    """One rank: import what a run imports, then build its model, and wait to be measured."""
    import gc
    import os

    import deepspeed  # noqa: F401

    import firefly.training  # noqa: F401
    from firefly import ranks
    from firefly.config import load_config
    from firefly.run import open_run
    from firefly.setup.build import build_model

    (folder / f"imported-{os.environ['RANK']}").write_text(str(os.getpid()))
    while not (folder / "begin").exists():
        time.sleep(0.01)
    with open_run(load_config(folder / "config.json")) as run:
        model, _ = build_model(run)
        gc.collect()
        (folder / f"built-{os.environ['RANK']}").touch()
        while not (folder / "end").exists():
            time.sleep(0.01)
        del model
    ranks.leave()
    ranks.end(0)


def describe(run: dict[str, Any], weights: int) -> str:
    """A line for the screen."""
    return (
        f"{run['side']} {run['backend']} {run['mode']} {run['ranks']} ranks: peak {gigabytes(run['peak_bytes'])} "
        f"({run['peak_bytes'] / weights:.2f} × the weights), kept {gigabytes(run['kept_bytes'])}, largest rank "
        f"{gigabytes(run['largest_rank_bytes'])}, {run['seconds']} s{'' if run['within'] else ': TOO MUCH'}"
    )


if __name__ == "__main__":
    main()
