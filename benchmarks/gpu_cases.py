"""The GPU cases: models of real shapes with made-up weights, rows of the lengths that such runs have.

`--shapes tiny` shrinks every model and row, to exercise each line without a GPU.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cases import Case, Thresholds
from measuring import IGNORE_INDEX

HERE = Path(__file__).resolve().parent
TUTORIAL = HERE.parent / "train_args" / "sft" / "qlora" / "qwen1.5-14b-sft-qlora.json"
TUTORIAL_DPO = HERE.parent / "train_args" / "dpo" / "qlora" / "qwen1.5-14b-dpo-qlora.json"

# What transformers' configuration classes call these shapes; all of them as published.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "qwen1.5-14b": {
        "model_type": "qwen2",
        "hidden_size": 5120,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
}
TINY: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
}
# Keys of the tutorial's JSON that all sides take; the paths, what is logged and what is saved are the benchmark's.
SHARED_KEYS = ("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm")
NOT_TAKEN = (
    *("output_dir", "model_name_or_path", "train_file", "logging_steps", "report_to", "disable_tqdm", "seed"),
    *("save_steps", "save_total_limit", "save_strategy", "lora_rank", "lora_alpha", "lora_dropout"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"),
)
# Random starts differ, and every side computes in bf16.
LOOSE = Thresholds(first_loss=5e-3, gradient_norm=5e-2, gradient_norm_16_bit=5e-2)


@dataclass(frozen=True, kw_only=True)
class GpuCase:
    """A case on one GPU, and what the peers are run with: the first tuning that fits into its memory."""

    case: Case
    shape: str
    rank: int
    alpha: int
    dropout: float = 0.0
    checkpointing: bool | str = "auto"
    peers: tuple[str, ...]
    tunings: tuple[str, ...]
    further: tuple[str, ...] = ()
    """What else may be faster, tried in this order as far as the time goes."""
    lengths: tuple[int, int]
    """Shortest and longest row, or prompt and answer of a pair: drawn evenly between."""
    firefly: Mapping[str, Any] = field(default_factory=dict)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _tutorial(name: str, *, examples: int, steps: int, **changes: Any) -> GpuCase:
    """The tutorial's run, its JSON as given but for `changes`."""
    given = _json(TUTORIAL)
    values = {
        "shape": "qwen1.5-14b",
        "rank": given["lora_rank"],
        "alpha": given["lora_alpha"],
        "dropout": given["lora_dropout"],
        "peers": ("trl_liger", "unsloth", "trl", "plain"),
        "lengths": (given["max_seq_length"], given["max_seq_length"]),
        "firefly": {key: value for key, value in given.items() if key not in NOT_TAKEN},
    }
    case = Case(
        name=name,
        task="sft",
        mode="qlora",
        data=("made up",),
        max_tokens=given["max_seq_length"],
        examples_per_step=examples,
        rows=examples * steps,
        thresholds=LOOSE,
        training={key: given[key] for key in SHARED_KEYS},
    )
    return GpuCase(case=case, **values | changes)


_PLAIN_BF16 = "--precision autocast"
_KEPT = f"{_PLAIN_BF16} --batch_size 2"
_PACKED = f"{_PLAIN_BF16} --layout packed --batch_size"
_FALLBACKS = (f"{_PLAIN_BF16} --batch_size 1", f"{_PLAIN_BF16} --batch_size 2 --gradient_checkpointing")


def _dpo() -> GpuCase:
    """The tutorial's DPO run, with memory used where there is some (`auto`)."""
    given = _json(TUTORIAL_DPO)
    examples = given["per_device_train_batch_size"] * given["gradient_accumulation_steps"]
    case = Case(
        name="gpu_14b_dpo",
        task="dpo",
        mode="qlora",
        data=("made up",),
        max_tokens=given["max_seq_length"],
        examples_per_step=examples,
        rows=examples * 4,
        thresholds=LOOSE,
        training={
            **{key: given[key] for key in SHARED_KEYS if key in given},
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
        },
    )
    return GpuCase(
        case=case,
        shape="qwen1.5-14b",
        rank=given["lora_rank"],
        alpha=given["lora_alpha"],
        peers=("trl_liger", "trl"),
        tunings=(f"{_PLAIN_BF16} --batch_size 1", f"{_PLAIN_BF16} --batch_size 1 --gradient_checkpointing"),
        further=(_KEPT, f"{_PLAIN_BF16} --batch_size 4"),
        lengths=(128, 512),
        firefly={"template_name": given["template_name"]},
    )


_LLAMA = GpuCase(
    case=Case(
        name="gpu_8b_lora",
        task="sft",
        mode="lora",
        data=("made up",),
        max_tokens=1024,
        examples_per_step=16,
        rows=16 * 10,
        thresholds=LOOSE,
        training={
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch_fused",
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
        },
    ),
    shape="llama-3-8b",
    rank=64,
    alpha=128,
    peers=("trl_liger", "unsloth", "trl", "plain"),
    tunings=(f"{_PLAIN_BF16} --batch_size 4", *_FALLBACKS),
    further=(f"{_PLAIN_BF16} --batch_size 8", f"{_PACKED} 4", f"{_PLAIN_BF16} --batch_size 16", f"{_PACKED} 8"),
    lengths=(128, 1024),
)

_CASES = (
    # As given: one example at a time, accumulated, with activation checkpointing, on every side.
    _tutorial(
        "gpu_14b_tutorial",
        examples=2,
        steps=25,
        checkpointing=True,
        tunings=(f"{_PLAIN_BF16} --batch_size 1 --gradient_checkpointing",),
        further=(f"{_KEPT} --gradient_checkpointing",),
    ),
    _tutorial(
        "gpu_14b_auto_16",
        examples=16,
        steps=5,
        tunings=(_KEPT, *_FALLBACKS),
        further=(f"{_PLAIN_BF16} --batch_size 8", f"{_PLAIN_BF16} --batch_size 4", f"{_PLAIN_BF16} --batch_size 16"),
    ),
    _LLAMA,
    _dpo(),
    _tutorial("gpu_14b_auto_2", examples=2, steps=25, tunings=(_KEPT, *_FALLBACKS)),
)
GPU_CASES: Mapping[str, GpuCase] = {case.case.name: case for case in _CASES}
HEADLINES = ("gpu_14b_tutorial", "gpu_14b_auto_16", "gpu_8b_lora", "gpu_14b_dpo")
"""What runs when no case is named: four share the time better than five."""


def write_model(shape: str, folder: Path, tiny: bool) -> None:
    """Write a configuration and a small tokenizer with ChatML's tokens: all that a run without weights has to read."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:],
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    values = {**SHAPES[shape], **(TINY if tiny else {}), "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    AutoConfig.for_model(**values).save_pretrained(folder)


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FIRST_ID, LAST_ID = 3, 258
"""Ids that the small tokenizer has and that mean nothing special."""
PROMPT_SHARE = 0.4


def made_up_rows(case: Case, lengths: tuple[int, int], seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows, or pairs, of random ids; a row's first 40 % is its prompt."""
    drawn = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [drawn.randint(FIRST_ID, LAST_ID) for _ in range(length)]

    def length() -> int:
        return drawn.randint(*lengths)

    if case.task == "dpo":
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        return [{name: ids(length()) for name in names} for _ in range(case.rows)]
    rows = []
    for _ in range(case.rows):
        row = ids(length())
        prompt = int(PROMPT_SHARE * len(row))
        rows.append({"input_ids": row, "labels": [IGNORE_INDEX] * prompt + row[prompt:]})
    return rows
