r"""Where the time of one step goes on a CPU: matrix products by what they compute, and everything else by operation.

    python benchmarks/step_profile.py [--modes lora full qlora] [--data_dir ../shared/data]

The fourth step of a run of SmolLM2-135M on alpaca_en_demo (512 tokens, 8 examples a step, adapters of rank 16, computed
as one microbatch) is profiled with the shapes of its operands. A profiler adds its own time to each of some ten
thousand calls, so that shares of small operations come out too large. So the same step is computed without it as well,
some times, and the share of products in that time is told, too.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from measuring import versions
from reporting import new_report, saver
from torch.profiler import ProfilerActivity, profile

from firefly.config import load_config
from firefly.models.kernels.token_nll import WORDS_AT_A_TIME
from firefly.tasks.base import Task
from firefly.training import train

HERE = Path(__file__).resolve().parent
RANK, VOCABULARY, PROFILED, REPEATED = 16, 49_152, 4, 5
FACTORS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1}
"""Matrix products, and the number of the operand that is the first factor."""


def main() -> None:
    """Profile a step of each mode, print the largest parts and write them all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modes", nargs="+", default=["lora", "full", "qlora"])
    parser.add_argument("--data_dir", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "step_profile.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = new_report("step_profile", arguments) | {"versions": versions(), "modes": {}}
    save = saver(arguments.out, report)
    for mode in arguments.modes:
        found = report["modes"][mode] = profile_step(mode, arguments.data_dir / "alpaca_en_demo.json")
        save()
        print(json.dumps({mode: found | {"parts": found["parts"][:12]}}, indent=1), flush=True)


def profile_step(mode: str, data: Path) -> dict[str, Any]:
    """Tokens of the profiled step, its microbatches, and its parts, the largest first."""
    seen: list[Any] = []
    seconds: list[float] = []
    profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)

    own = Task.backward

    def backward(self: Task, model: Any, step: Any) -> Any:
        seen.append(step)
        if len(seen) < PROFILED:
            return own(self, model, step)
        for _ in range(REPEATED):
            started = time.perf_counter()
            own(self, model, step)
            seconds.append(time.perf_counter() - started)
            model.zero_gradients()
        with profiler:
            return own(self, model, step)

    with tempfile.TemporaryDirectory() as folder, patch.object(Task, "backward", backward):
        train(load_config(configuration(mode, data, Path(folder, "run"))))
    step = seen[PROFILED - 1]
    parts = parts_of(profiler.key_averages(group_by_input_shape=True))
    milliseconds = 1e3 * statistics.median(seconds)
    products = sum(part["milliseconds"] for part in parts if part["part"].startswith("products"))
    return {
        "tokens": step.totals.input_tokens,
        "targets": step.totals.targets,
        "microbatches": len(step.microbatches),
        "milliseconds_unprofiled": round(milliseconds, 1),
        "products_of_that": round(products / milliseconds, 4),
        "parts": parts,
    }


def configuration(mode: str, data: Path, output_dir: Path) -> dict[str, Any]:
    """That of the benchmark's cases, as long as the profile needs it."""
    adapters = {} if mode == "full" else {"lora_rank": RANK, "lora_alpha": 32, "lora_dropout": 0.0}
    return adapters | {
        "task_type": "sft",
        "train_mode": mode,
        "model_name_or_path": "smollm2-135m-instruct",
        "train_file": str(data),
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 8,
        "max_seq_length": 512,
        "max_steps": PROFILED,
        "shuffle": False,
        "nf4_cache": False,
        "save_strategy": "no",
        "compare": False,
        "report_to": "none",
    }


def parts_of(averages: Sequence[Any]) -> list[dict[str, Any]]:
    """Milliseconds, share, calls and, of products, GFLOP/s, by part."""
    milliseconds, flops, calls = defaultdict(float), defaultdict(int), defaultdict(int)
    for one in averages:
        factors = factors_of(one.key, one.input_shapes)
        part = name_of(factors) if factors else one.key
        milliseconds[part] += one.self_cpu_time_total / 1e3
        calls[part] += one.count
        if factors:
            left, right = factors
            flops[part] += 2 * torch.Size(left).numel() * right[-1] * one.count
    total = sum(milliseconds.values())
    return [
        {"part": part, "milliseconds": round(spent, 1), "share": round(spent / total, 4), "calls": calls[part]}
        | ({"gflops_per_second": round(flops[part] / spent / 1e6)} if flops[part] else {})
        for part, spent in sorted(milliseconds.items(), key=lambda item: -item[1])
    ]


def factors_of(operation: str, shapes: Sequence[Sequence[int]]) -> tuple[Sequence[int], Sequence[int]] | None:
    """The shapes of the two factors; None if it is no matrix product."""
    first = FACTORS.get(operation)
    return None if first is None else (shapes[first], shapes[first + 1])


def name_of(factors: tuple[Sequence[int], Sequence[int]]) -> str:
    """What a product computes, told by its shapes."""
    sizes = {*factors[0], *factors[1]}
    if len(factors[0]) == 3:
        return "products of attention"
    if sizes & {VOCABULARY, WORDS_AT_A_TIME}:
        return "products of the head"
    return "products of adapters" if RANK in sizes else "products of the layers"


if __name__ == "__main__":
    main()
