"""The CPU cases: what is trained, on which data, and how alike the sides have to be before a speed is quoted."""

from collections.abc import Mapping
from dataclasses import dataclass, field
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
class Asked:
    """What the project asks of a case: at least the floor, and the aim until what remains of it is explained."""

    floor: float
    aim: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the results table."""

    name: str
    task: str
    mode: str
    data: tuple[str, ...]
    """Files below --data_dir; records are taken from them in turns."""
    max_tokens: int
    examples_per_step: int
    rows: int
    """Examples of a run, the first step's among them, where neither --rows nor --seconds says otherwise."""
    max_prompt_tokens: int | None = None
    """Pairs: those with a longer prompt are left out."""
    min_answer_tokens: int = 1
    """Pairs: those with a shorter answer, chosen or rejected, are left out."""
    isolated: bool = True
    thresholds: Thresholds = field(default_factory=Thresholds)
    asked_ratio: Asked | None = None
    """Speed over the best-tuned peer; None where nothing is asked."""
    asked_memory: float | None = None
    """Memory above imports over that peer's, at most."""
    asked_share: Asked | None = None
    """Share of the rate of matrix products of the model's shapes."""
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
        data=("alpaca_en_demo.json",),
        max_tokens=512,
        examples_per_step=8,
        rows=64,
        asked_ratio=Asked(floor=1.5, aim=1.8),
        asked_memory=0.7,
        asked_share=Asked(floor=0.60, aim=0.70),
    ),
    Case(
        name="sft_lora_long",
        task="sft",
        mode="lora",
        data=("firefly_sft.jsonl",),
        max_tokens=1024,
        examples_per_step=4,
        rows=24,
        asked_ratio=Asked(floor=1.5, aim=1.8),
        asked_memory=0.5,
        asked_share=Asked(floor=0.55, aim=0.65),
    ),
    Case(
        name="sft_full",
        task="sft",
        mode="full",
        data=("alpaca_en_demo.json",),
        max_tokens=512,
        examples_per_step=8,
        rows=64,
        training={"learning_rate": 1e-5},
        asked_ratio=Asked(floor=1.5, aim=1.7),
        asked_memory=0.7,
        asked_share=Asked(floor=0.55, aim=0.65),
    ),
    Case(
        name="sft_qlora",
        task="sft",
        mode="qlora",
        data=("alpaca_en_demo.json",),
        max_tokens=512,
        examples_per_step=8,
        rows=64,
        firefly=NF4_KEPT,
        asked_ratio=Asked(floor=1.7, aim=2.0),
        asked_memory=0.6,
        asked_share=Asked(floor=0.55, aim=0.65),
    ),
    Case(
        name="dpo_lora",
        task="dpo",
        mode="lora",
        data=("dpo_en_demo.json",),
        max_tokens=1024,
        examples_per_step=4,
        rows=48,
        asked_ratio=Asked(floor=2.0, aim=2.4),
        asked_memory=0.5,
        asked_share=Asked(floor=0.55, aim=0.65),
    ),
    Case(
        # Little to share: where one prompt for two answers helps least. English and Chinese pairs by turns.
        name="dpo_lora_long_answers",
        task="dpo",
        mode="lora",
        data=("dpo_en_demo.json", "dpo_zh_demo.json"),
        max_tokens=1024,
        examples_per_step=4,
        rows=32,
        max_prompt_tokens=128,
        min_answer_tokens=256,
        asked_ratio=Asked(floor=1.6, aim=2.0),
        asked_memory=0.5,
        asked_share=Asked(floor=0.55, aim=0.65),
    ),
    Case(
        name="pretrain_lora",
        task="pretrain",
        mode="lora",
        data=("c4_demo.jsonl",),
        max_tokens=1024,
        examples_per_step=4,
        rows=24,
        asked_ratio=Asked(floor=1.5, aim=1.8),
        asked_memory=0.6,
        asked_share=Asked(floor=0.60, aim=0.70),
    ),
    Case(
        name="pretrain_lora_joined",
        task="pretrain",
        mode="lora",
        data=("c4_demo.jsonl",),
        max_tokens=1024,
        examples_per_step=4,
        rows=24,
        isolated=False,
    ),
)
CASES: Mapping[str, Case] = {case.name: case for case in _CASES}

HEADLINES = tuple(name for name, case in CASES.items() if case.asked_ratio)
"""What `compare.py` runs when no case is named."""
