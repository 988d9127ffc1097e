"""Build the models of some configurations on the ranks that torchrun started, and save what they hold between them.

torchrun --nproc_per_node=2 built_models.py CONFIGURATIONS.json
"""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from firefly import ranks
from firefly.config import load_config
from firefly.distributed.backends import gathered
from firefly.run import open_run
from firefly.setup.build import build_model


def built(settings: dict[str, Any]) -> dict[str, Tensor]:
    """Parameters and buffers of the model as it is before its first step, whole."""
    with open_run(load_config(settings)) as run:
        model, _ = build_model(run)
        named = {**dict(model.module.named_parameters()), **dict(model.module.named_buffers())}
        with gathered(run.backend, list(model.module.parameters())):
            return {
                name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()
                for name, tensor in named.items()
            }


@contextmanager
def watching_memory() -> Iterator[list[int]]:
    """Bytes that this process holds beyond what it held before: at the peak, and at the end."""

    def held() -> int:
        return 1024 * int(re.search(r"^Pss:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text(), re.M)[1])

    found, before, done = [0, 0], held(), threading.Event()

    def watch() -> None:
        while not done.is_set():
            found[0] = max(found[0], held() - before)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found[1] = held() - before


def main() -> None:
    for settings in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        folder = Path(settings["output_dir"])
        if folder.name.startswith("memory-"):
            with watching_memory() as memory, open_run(load_config(settings)) as run:
                model, _ = build_model(run)
            (folder / f"memory-{ranks.rank()}.json").write_text(json.dumps(memory), encoding="utf-8")
            del model
        else:
            found = built(settings)
            if ranks.is_first():
                torch.save(found, folder / "built.pt")
        unset_hf_deepspeed_config()
        for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION"):
            os.environ.pop(name, None)


if __name__ == "__main__":
    main()
    ranks.leave()
    ranks.end(0)
