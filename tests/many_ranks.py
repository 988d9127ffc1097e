"""Several trainings, one after the other, on the ranks that torchrun started: processes are slow to start.

    torchrun --nproc_per_node=2 many_ranks.py CONFIGURATIONS.json

The file holds a list of configurations; a training that fails leaves error.txt in its output_dir.
"""

import json
import os
import sys
import traceback
from pathlib import Path

from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from firefly import ranks
from firefly.config import load_config
from firefly.training import train


def main() -> None:
    for settings in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        try:
            train(load_config(settings))
        except Exception:
            folder = Path(settings["output_dir"])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"error-{ranks.rank()}.txt").write_text(traceback.format_exc(), encoding="utf-8")
            traceback.print_exc()
        # The next training may have another engine.
        unset_hf_deepspeed_config()
        for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION"):
            os.environ.pop(name, None)


if __name__ == "__main__":
    main()
    ranks.leave()
    ranks.end(0)
