"""How fast this machine multiplies matrices of the model's own shapes, in a process of its own; prints one JSON line.

Each linear layer of one decoder layer and the head, forward, with as many rows as a microbatch holds tokens. The rate
is that of the fastest of several passes: the limit that a training run is held against. Several types are timed in
turns, size by size, so that a slow moment of the machine hits all.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from flops import shape_of
from job import read_job
from transformers import AutoConfig


def main() -> None:
    """Measure for --seconds and print the rate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), required=True)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each type")
    arguments = parser.parse_args()
    job = read_job(arguments.job)
    torch.set_num_threads(job.threads)
    shape = shape_of(AutoConfig.from_pretrained(job.model))
    sizes = [(size, shape.layers) for size in shape.linears] + [(shape.head, 1)]
    rates = measure(sizes, arguments.rows, arguments.dtype, job.device, arguments.seconds)
    first = arguments.dtype[0]
    found = {"dtype": first, "flops_per_second": rates[first], "rates": rates}
    found |= {"rows": arguments.rows, "threads": job.threads, "device": device_of(job.device)}
    print(json.dumps(found), flush=True)


def device_of(device: str) -> dict[str, Any]:
    """What a reader needs to know of the GPU; a CPU is described elsewhere."""
    if device != "cuda":
        return {"name": device}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


def measure(
    sizes: list[tuple[tuple[int, int], int]], rows: int, dtypes: Sequence[str], device: str, seconds: float
) -> dict[str, float]:
    """Time the products of each size, weighted by how often the model has it; return FLOPs per second in each type."""
    flops, taken = 0.0, dict.fromkeys(dtypes, 0.0)
    for (inputs, outputs), count in sizes:
        flops += count * 2 * rows * inputs * outputs
        for name in dtypes:
            left = torch.randn(rows, inputs, device=device).to(getattr(torch, name))
            right = torch.randn(outputs, inputs, device=device).to(getattr(torch, name))
            taken[name] += count * fastest(lambda left=left, right=right: left @ right.T, device, seconds / len(sizes))
    return {name: flops / seconds_taken for name, seconds_taken in taken.items()}


def fastest(work: Any, device: str, seconds: float) -> float:
    """Seconds of the fastest of some calls; on a GPU each timing holds several, as launches overlap."""
    calls = 10 if device == "cuda" else 1
    best, end = float("inf"), time.perf_counter() + seconds
    work()
    while best == float("inf") or time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def synchronize(device: str) -> None:
    """Wait for the GPU, if there is one."""
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
