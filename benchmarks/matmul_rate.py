"""How fast this machine multiplies matrices of the model's own shapes, in a process of its own; prints one JSON line.

Each linear layer of one decoder layer and the head, forward, with as many rows as a microbatch holds tokens. The rate
is that of the fastest of several passes: the limit that a training run is held against.
"""

import argparse
import json
import time
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
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), required=True)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    job = read_job(arguments.job)
    torch.set_num_threads(job.threads)
    shape = shape_of(AutoConfig.from_pretrained(job.model))
    sizes = [(size, shape.layers) for size in shape.linears] + [(shape.head, 1)]
    found = measure(sizes, arguments.rows, getattr(torch, arguments.dtype), job.device, arguments.seconds)
    found |= {"dtype": arguments.dtype, "rows": arguments.rows, "threads": job.threads, "device": device_of(job.device)}
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
    sizes: list[tuple[tuple[int, int], int]], rows: int, dtype: torch.dtype, device: str, seconds: float
) -> dict[str, Any]:
    """Time the products of each size, weighted by how often the model has it; return FLOPs per second."""
    flops = taken = 0.0
    for (inputs, outputs), count in sizes:
        left = torch.randn(rows, inputs, device=device, dtype=dtype)
        right = torch.randn(outputs, inputs, device=device, dtype=dtype)
        taken += count * fastest(lambda left=left, right=right: left @ right.T, device, seconds / len(sizes))
        flops += count * 2 * rows * inputs * outputs
    return {"flops_per_second": flops / taken}


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
