"""How far `firefly plan` is from the peaks that Firefly's runs on a GPU took (`results/gpu_*.json`); needs no GPU.

The same configurations on the same made-up rows are planned for the GPU's memory, from the shape's config.json.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from firefly_side import run_configuration
from gpu import make_job
from gpu_cases import GPU_CASES
from measuring import read_dump, versions
from reporting import new_report, saver

from firefly.setup.plan import make_plan

HERE = Path(__file__).resolve().parent
CONTEXT = 1 << 30
"""Bytes of a GPU that its driver and the CUDA context take, about."""


def main() -> None:
    """Plan each recorded case and write what was predicted beside what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    report = new_report("plan_on_gpu", arguments) | {"versions": versions(), "cases": []}
    save = saver(arguments.out / "plan_on_gpu.json", report)
    for path in sorted((HERE / "results").glob("gpu_*.json")):
        report["cases"].append(planned(path.stem, json.loads(path.read_text(encoding="utf-8"))))
        save()
        print(json.dumps(report["cases"][-1]), flush=True)


def planned(name: str, recorded: dict[str, Any]) -> dict[str, Any]:
    """One case. An allocator counts what is allocated, and the context is not among it."""
    gpu = recorded["matmul_rate"]
    shapes = argparse.Namespace(shapes="real", device="cuda", threads=recorded["arguments"]["threads"])
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(GPU_CASES[name], GPU_CASES[name].case, shapes, Path(folder))
        configuration = run_configuration(job, len(read_dump(job.dump)), Path(folder, "run"))
        path = Path(folder, "run.json")
        path.write_text(json.dumps(configuration), encoding="utf-8")
        memory = f"{(gpu['device']['memory_bytes'] - CONTEXT) // 10**6}MB"
        plan = make_plan(str(path), {}, memory, "cuda", gpu["flops_per_second"] / 1e12)
    predicted = plan.forecast.total - plan.forecast.parts.get("libraries", 0)
    measured = max(run["peak_memory_bytes"] for run in recorded["runs"] if run["framework"] == "firefly")
    return {
        "case": name,
        "gpu": gpu["device"]["name"],
        "predicted": predicted,
        "measured": measured,
        "error": predicted / measured - 1,
        "parts": plan.forecast.parts,
        "predicted_step_seconds": plan.duration.step_seconds,
    }


if __name__ == "__main__":
    main()
