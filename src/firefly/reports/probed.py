"""The process that a probe trains in: `python -m firefly.reports.probed CONFIG` prints a JSON line of what it took."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from firefly.config import load_config
from firefly.models.precision import pick_device
from firefly.runs.memory import memory_in_use, peak_memory
from firefly.runs.records import read_metrics
from firefly.train import train


def main(config_file: str) -> dict[str, Any]:
    """Train as configured; {"memory_bytes": the peak over what the imports had taken, "step_seconds", …}.

    A card's memory is that of its allocator; what a CPU's process takes is its resident set.
    """
    config = load_config(config_file)
    device = pick_device(bool(config.training.get("use_cpu")))
    before = memory_in_use(device)
    folder = train(config)
    times = [line["time"] for line in read_metrics(Path(folder) / "metrics.jsonl") if "loss" in line]
    seconds = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
    return {"memory_bytes": peak_memory(device) - before, "step_seconds": seconds, "device": device.type}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])), flush=True)
