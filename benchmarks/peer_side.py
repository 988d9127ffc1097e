"""What the peers' sides share; runs inside a peer's virtual environment."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from measuring import common_parser, measure, print_measurement
from pair_batches import CountingPairs
from safetensors.torch import load_file

# name → (type of the frozen weights, autocast to bfloat16?). PEFT keeps the adapters in float32 in each.
PRECISIONS = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "autocast": (torch.bfloat16, True),
}


class LogTimes(transformers.TrainerCallback):
    """Remember each step's loss, gradient norm and moment of logging, as our side reads them from its metrics file."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.losses: list[float] = []
        self.gradient_norms: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """Note a training step; the summary at the end has no `loss`."""
        if logs and "loss" in logs:
            self.times.append(time.time())
            self.losses.append(logs["loss"])
            self.gradient_norms.append(float(logs["grad_norm"]))


def load_adapter(model: Any, folder: Path) -> None:
    """Give a new adapter the weights saved in `folder`; every one must be there and find its place."""
    saved = load_file(folder / "adapter_model.safetensors")
    wanted = peft.get_peft_model_state_dict(model)
    if saved.keys() != wanted.keys():
        raise RuntimeError(f"{folder}: the peer's adapter has other layers: {sorted(saved.keys() ^ wanted.keys())[:6]}")
    peft.set_peft_model_state_dict(model, saved)


def preference_arguments(description: str | None, precisions: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of a peer's DPO side: what is equal on all sides first, then its tuning."""
    parser = common_parser(description, torch.get_num_threads())
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--adapter", type=Path, required=True, help="folder of the untrained adapter to start from")
    tuning = parser.add_argument_group("tuning")
    tuning.add_argument("--precision", choices=precisions, default="float32")
    tuning.add_argument("--batch_size", type=int, default=1, help="pairs of one forward pass")
    tuning.add_argument("--gradient_checkpointing", action="store_true")
    tuning.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    arguments = parser.parse_args()
    if arguments.examples_per_step % arguments.batch_size:
        raise SystemExit(f"--batch_size {arguments.batch_size} does not divide --examples_per_step")
    return arguments


def print_preference_measurement(
    *,
    framework: str,
    arguments: argparse.Namespace,
    trainer: Any,
    pairs: Sequence[dict[str, list[int]]],
    collator: CountingPairs,
    log: LogTimes,
    rss_after_imports: int,
    peak_rss: int,
) -> None:
    """Check what a peer's DPO run trained on and print its measurement."""
    collator.check(pairs)
    accumulation = trainer.args.gradient_accumulation_steps
    types = {str(parameter.dtype) for parameter in trainer.model.parameters() if parameter.requires_grad}
    print_measurement(
        measure(
            framework=framework,
            work=collator.work_by_step(accumulation),
            log_times=log.times,
            losses=log.losses,
            rss_after_imports=rss_after_imports,
            peak_rss=peak_rss,
            threads=torch.get_num_threads(),
            settings={
                "precision": arguments.precision,
                "weights": str(next(p.dtype for p in trainer.model.parameters() if not p.requires_grad)),
                "adapters": sorted(types),
                "per_device_train_batch_size": trainer.args.per_device_train_batch_size,
                "gradient_accumulation_steps": accumulation,
                "gradient_checkpointing": arguments.gradient_checkpointing,
                "attention": trainer.model.config._attn_implementation,
                "optimizer": str(trainer.args.optim),
                "positions_computed": collator.positions,
            },
            checks={"gradient_norms": log.gradient_norms},
        )
    )
