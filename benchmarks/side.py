"""What the peers' sides share; runs inside a peer's virtual environment, on the CPU or one CUDA GPU."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  (loaded before memory is read, as on every side)
import peft
import torch
import transformers
from job import Job, read_job
from measuring import current_rss, peak_rss
from random_weights import install_random_weights
from safetensors.torch import load_file

# The classes are lazy attributes: touching them finishes the imports before memory is read.
IMPORTED = (transformers.Trainer, transformers.AutoModelForCausalLM, transformers.AutoTokenizer, peft.LoraConfig)

# name → (type of the weights that are not trained, autocast to bfloat16?). Trained weights are float32 in each.
PRECISIONS = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "autocast": (torch.bfloat16, True),
    "float16": (torch.float16, False),
}


def memory_now(device: str) -> int:
    """Bytes that this process has taken: resident memory, or what is allocated on the GPU."""
    return torch.cuda.memory_allocated() if device == "cuda" else current_rss()


def peak_memory(device: str) -> int:
    """The largest that `memory_now` has been."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_rss()


def parse_side(description: str | None, layouts: Sequence[str] = ("padded",)) -> tuple[Job, argparse.Namespace]:
    """Read what is equal on all sides (--job) and a peer's tuning of it; get the process ready for it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--job", type=Path, required=True)
    tuning = parser.add_argument_group("tuning")
    tuning.add_argument("--precision", choices=PRECISIONS, default="float32")
    tuning.add_argument("--layout", choices=layouts, default=layouts[0])
    tuning.add_argument("--batch_size", type=int, default=1, help="examples, or packs, of one forward pass")
    tuning.add_argument("--gradient_checkpointing", action="store_true")
    tuning.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    tuning.add_argument("--liger", action="store_true")
    arguments = parser.parse_args()
    job = read_job(arguments.job)
    if arguments.layout != "packed" and job.examples_per_step % arguments.batch_size:
        raise SystemExit(f"--batch_size {arguments.batch_size} does not divide the {job.examples_per_step} of a step")
    torch.set_num_threads(job.threads)
    if job.random_weights:
        install_random_weights()
    return job, arguments


def trainer_arguments(job: Job, tuning: argparse.Namespace, output_dir: str) -> dict[str, Any]:
    """Arguments of any `TrainingArguments`: everything that could differ from ours written out."""
    return {
        "output_dir": output_dir,
        "per_device_train_batch_size": tuning.batch_size,
        "gradient_accumulation_steps": max(1, job.examples_per_step // tuning.batch_size),
        "num_train_epochs": 1,
        "bf16": PRECISIONS[tuning.precision][1],
        "gradient_checkpointing": tuning.gradient_checkpointing,
        "seed": job.seed,
        "use_cpu": job.device == "cpu",
        "dataloader_pin_memory": job.device != "cpu",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        **job.training,
    }


def sampling(tuning: argparse.Namespace) -> str:
    """The order of examples: that of the dump, unless the tuning brings an order of its own.

    Best-fit packing puts the longest first, so its packs are drawn at random (the Trainer's default); in their own
    order the steady steps would hold only short rows and flatter the rows per second.
    """
    return {"packed": "random", "grouped": "group_by_length"}.get(tuning.layout, "sequential")


def load_model(job: Job, tuning: argparse.Namespace) -> Any:
    """Load the base model in the precision asked for: float32 where it is trained itself, NF4 for qlora."""
    dtype, autocast = PRECISIONS[tuning.precision]
    options: dict[str, Any] = {
        "dtype": torch.float32 if job.mode == "full" else dtype,
        "attn_implementation": tuning.attention,
    }
    if job.mode == "qlora":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if autocast else dtype,
        )
    if job.mode == "qlora" or job.device == "cuda":
        options["device_map"] = {"": job.device}
    return transformers.AutoModelForCausalLM.from_pretrained(job.model, **options)


def adapter_config(job: Job) -> peft.LoraConfig | None:
    """peft's settings of the adapter; None for full fine-tuning."""
    if job.mode == "full":
        return None
    return peft.LoraConfig(
        r=job.rank,
        lora_alpha=job.alpha,
        lora_dropout=job.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def make_equal(model: Any, job: Job) -> None:
    """Give a peer's new adapter the start that all share, and float32 masters (TRL's QLoRA would train bf16 ones)."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if job.adapter is None:
        return
    saved = load_file(Path(job.adapter, "adapter_model.safetensors"))
    wanted = peft.get_peft_model_state_dict(model)
    if saved.keys() != wanted.keys():
        different = sorted(saved.keys() ^ wanted.keys())[:6]
        raise RuntimeError(f"{job.adapter}: the peer's adapter has other layers: {different}")
    peft.set_peft_model_state_dict(model, saved)


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
            self.losses.append(float(logs["loss"]))
            self.gradient_norms.append(float(logs["grad_norm"]))


def settings_of(job: Job, tuning: argparse.Namespace, trainer: Any, positions: int) -> dict[str, Any]:
    """What a reader of a peer's result needs to know of how it ran."""
    model = trainer.model
    frozen = sorted({str(p.dtype) for p in model.parameters() if not p.requires_grad})
    return {
        "precision": tuning.precision,
        "layout": tuning.layout,
        "frozen_weights": frozen,
        "trained_weights": sorted({str(p.dtype) for p in model.parameters() if p.requires_grad}),
        "per_device_train_batch_size": trainer.args.per_device_train_batch_size,
        "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
        "gradient_checkpointing": tuning.gradient_checkpointing,
        "attention": model.config._attn_implementation,
        "liger": tuning.liger,
        "optimizer": str(trainer.args.optim),
        "positions_computed": positions,
        "rows_of_a_step_are_consecutive": sampling(tuning) == "sequential",
    }
