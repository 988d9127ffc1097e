"""The CPU cases: what is trained, on which data, and how alike the sides have to be before a speed is quoted."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Largest relative differences that the correctness gate lets pass."""

    first_loss: float = 1e-3
    last_losses: float = 1e-2
    gradient_norm: float = 1e-3
    first_loss_16_bit: float = 3e-3
    gradient_norm_16_bit: float = 3e-2
    """The same where a side computes in 16 bit: rounding alone makes this much."""
    pair_loss_noise_16_bit: float = 0.1
    """Standard deviation, in nats, by which rounding alone sets the DPO losses of one pair on two sides apart.

    In bf16 the margin of a pair of answers of 160 tokens is off by about 1 nat in transformers and 0.8 with us
    (`logp_noise.json`), which beta = 0.1 and the loss's slope of a half make 0.05 and 0.04; the case's answers are
    longer.
    """


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the results table."""

    name: str
    task: str
    mode: str
    data: str
    """File below --data_dir."""
    max_tokens: int
    examples_per_step: int
    rows: int
    """Examples of a run, the first step's among them. For pairs: records of which those that fit are taken."""
    isolated: bool = True
    thresholds: Thresholds = field(default_factory=Thresholds)
    asked_ratio: float | None = None
    """Speed over the best-tuned peer that the project asks of this case; None where none is stated."""
    asked_memory: float | None = None
    """Memory above imports over that peer's, at most."""
    training: Mapping[str, Any] = field(default_factory=dict)
    firefly: Mapping[str, Any] = field(default_factory=dict)


# TrainingArguments of every side in every CPU case.
COMMON_TRAINING: Mapping[str, Any] = {
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch_fused",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
}
# Keeps the frozen layers as NF4, as the peers do.
NF4_KEPT: Mapping[str, Any] = {"nf4_cache": False}

RANK = 16
ALPHA = 32

_CASES = (
    Case(
        name="sft_lora",
        task="sft",
        mode="lora",
        data="alpaca_en_demo.json",
        max_tokens=512,
        examples_per_step=8,
        rows=64,
        asked_ratio=2.3,
        asked_memory=0.7,
    ),
    Case(
        name="sft_lora_long",
        task="sft",
        mode="lora",
        data="firefly_sft.jsonl",
        max_tokens=1024,
        examples_per_step=4,
        rows=24,
        asked_ratio=2.0,
        asked_memory=0.7,
    ),
    Case(
        name="sft_full",
        task="sft",
        mode="full",
        data="alpaca_en_demo.json",
        max_tokens=512,
        examples_per_step=8,
        rows=64,
        training={"learning_rate": 1e-5},
        asked_ratio=1.6,
        asked_memory=0.8,
    ),
    Case(
        name="sft_qlora",
        task="sft",
        mode="qlora",
        data="alpaca_en_demo.json",
        max_tokens=512,
        examples_per_step=8,
        rows=64,
        firefly=NF4_KEPT,
        asked_ratio=2.0,
        asked_memory=0.7,
    ),
    Case(
        name="dpo_lora",
        task="dpo",
        mode="lora",
        data="dpo_en_demo.json",
        max_tokens=1024,
        examples_per_step=4,
        rows=64,
        asked_ratio=3.0,
        asked_memory=0.6,
    ),
    Case(
        name="pretrain_lora",
        task="pretrain",
        mode="lora",
        data="c4_demo.jsonl",
        max_tokens=1024,
        examples_per_step=4,
        rows=24,
        asked_ratio=1.6,
        asked_memory=0.8,
    ),
    Case(
        name="pretrain_lora_joined",
        task="pretrain",
        mode="lora",
        data="c4_demo.jsonl",
        max_tokens=1024,
        examples_per_step=4,
        rows=24,
        isolated=False,
    ),
)
CASES: Mapping[str, Case] = {case.name: case for case in _CASES}


def case_names(folder: Path) -> list[str]:
    """Cases that have a recorded result in `folder`, in the table's order."""
    return [name for name in CASES if (folder / f"{name}.json").is_file()]
