"""What the frozen runs train: tiny random models, rows in real record shapes, and a configuration for each cell.

Nothing here imports firefly: two versions of it are compared on these inputs, and neither may have a part in them.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
SHAPE: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1, "sliding_window": None},
    ),
    "bloom": ("Bloom", {"n_layer": 2}),  # its attention cannot isolate examples: one a microbatch
}
"""Name → (transformers' family, what differs from SHAPE)."""

ROWS = 22  # four examples a step: five full steps and a last one of two in each epoch
STOPPED_AT = 8  # the second step of the second epoch of six
WORDS = "red green blue one two three tea ice moon beetle lamp night 天 地 茶 月亮 萤火虫".split()


@dataclass(frozen=True)
class Cell:
    """One thing that is trained; `changes` are to the settings that all share, and to those of its task and mode."""

    task: str
    mode: str
    variant: str = ""
    model: str = "llama"
    changes: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        return f"{self.task}{'-' * bool(self.variant)}{self.variant}/{self.mode}"

    def settings(self, inputs: Path, output_dir: str, ranks: int = 1) -> dict[str, Any]:
        """The configuration of a run; ranks share out the four examples of a step."""
        own = BY_TASK[self.task] | BY_MODE[self.mode] | BY_CELL.get(self.name, {}) | self.changes
        files = {
            "model_name_or_path": str(inputs / self.model),
            "train_file": str(inputs / f"{self.task}.jsonl"),
            "eval_file": str(inputs / f"{self.task}-eval.jsonl"),
            "output_dir": output_dir,
        }
        step = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2 // ranks}
        return {"task_type": self.task, "train_mode": self.mode} | SETTINGS | files | step | own


SETTINGS: dict[str, Any] = {
    "tokens_per_microbatch": 160,  # several microbatches a step
    "gradient_checkpointing": False,
    "num_train_epochs": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "weight_decay": 0.01,
    "max_grad_norm": 0.5,  # below most steps' norm
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_strategy": "steps",
    "save_steps": 4,
    "tokenize_num_workers": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "seed": 7,
    "ddp_timeout": 300,
}
BY_TASK: dict[str, dict[str, Any]] = {
    "pretrain": {"max_seq_length": 64, "logging_steps": 3},  # a log's mean crosses the checkpoint of step 8
    "sft": {"template_name": "qwen", "max_seq_length": 256},
    "dpo": {"template_name": "default", "max_seq_length": 256, "max_prompt_length": None, "beta": 0.2},
    "kto": {"template_name": "default", "max_seq_length": 256, "beta": 0.2, "undesirable_weight": 1.5},
    "reward": {"template_name": "default", "max_seq_length": 256, "center_rewards_coefficient": 0.01},
}
ADAPTER = {"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.1, "learning_rate": 5e-3}
BY_MODE: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 1e-3},
    "lora": ADAPTER,
    "qlora": ADAPTER | {"gradient_checkpointing": True},
}
BY_CELL: dict[str, dict[str, Any]] = {
    "sft/lora": {"load_best_model_at_end": True, "save_total_limit": 2},
    "dpo/full": {"load_best_model_at_end": True, "metric_for_best_model": "eval_rewards/margins"},
}

CELLS = [Cell(task, mode) for task in BY_TASK for mode in ("full", "lora", "qlora")]
MORE_CELLS = [
    Cell("sft", "full", "experts", "mixtral"),
    Cell("sft", "lora", "solo", "bloom"),
    Cell("dpo", "full", "precomputed", changes={"precompute_reference": True}),
]


def write_inputs(folder: Path) -> Path:
    """Write every model and every file of rows; the same bytes on each call."""
    for name in MODELS:
        save_model(folder / name, name)
    for task, rows in ROWS_OF.items():
        write_lines(folder / f"{task}.jsonl", rows(random.Random(1), ROWS if task != "pretrain" else 2 * ROWS))
        write_lines(folder / f"{task}-eval.jsonl", rows(random.Random(2), 5))
    return folder


def write_stand_in(folder: Path) -> Path:
    """A folder for PYTHONPATH with a matplotlib that cannot be imported: a picture takes longer than the training."""
    (folder / "matplotlib").mkdir(parents=True, exist_ok=True)
    (folder / "matplotlib" / "__init__.py").write_text("raise ImportError('no pictures here')\n", encoding="utf-8")
    return folder


def save_model(folder: Path, name: str) -> None:
    """A random fp32 model with a tokenizer of one token a byte."""
    import torch
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    family, own = MODELS[name]
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**SHAPE | own)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # norms and biases start at 1 and 0, where a mistake in them would not show
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.float().save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate([*SPECIAL, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|endoftext|>"],
    ).save_pretrained(folder)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def text(chance: random.Random, longest: int = 8) -> str:
    return " ".join(chance.choices(WORDS, k=chance.randint(1, longest)))


def documents(chance: random.Random, count: int) -> list[dict[str, Any]]:
    return [{"text": text(chance, 12)} for _ in range(count)]


def conversations(chance: random.Random, count: int) -> list[dict[str, Any]]:
    """Firefly's own shape of one to three turns, ShareGPT's, messages and Alpaca's in turns."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        turns = [(text(chance), text(chance)) for _ in range(chance.randint(1, 3))]
        if number % 4 == 0:
            both = [[("human", asked), ("gpt", answered)] for asked, answered in turns]
            rows.append({"conversations": [{"from": who, "value": said} for turn in both for who, said in turn]})
        elif number % 4 == 1:
            both = [[("user", asked), ("assistant", answered)] for asked, answered in turns]
            said = [{"role": role, "content": content} for turn in both for role, content in turn]
            rows.append({"messages": [{"role": "system", "content": text(chance)}, *said]})
        elif number % 4 == 2:
            rows.append({"instruction": turns[0][0], "input": "", "output": turns[0][1]})
        else:
            said = [{"human": asked, "assistant": answered} for asked, answered in turns]
            rows.append({"conversation_id": number, "category": "Brainstorming", "conversation": said})
    return rows


def pairs(chance: random.Random, count: int) -> list[dict[str, Any]]:
    """A prompt's text with two answers as texts, or as messages that repeat it."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        prompt, chosen, rejected = text(chance, 12), text(chance, 12), text(chance, 4) + "?"
        if number % 2:
            asked = {"role": "user", "content": prompt}
            sides = [[asked, {"role": "assistant", "content": answer}] for answer in (chosen, rejected)]
            rows.append({"prompt": prompt, "chosen": sides[0], "rejected": sides[1]})
        else:
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def labelled(chance: random.Random, count: int) -> list[dict[str, Any]]:
    """A prompt with one answer and the verdict on it, as texts or as messages."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        prompt, answer, label = text(chance, 12), text(chance, 12), chance.random() < 0.6
        if number % 2:
            rows.append({"prompt": prompt, "completion": answer, "label": label})
        else:
            asked, said = {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}
            rows.append({"prompt": [asked], "completion": [said], "label": label})
    return rows


def rated(chance: random.Random, count: int) -> list[dict[str, Any]]:
    """Pairs, of which every third says by how much one answer is the better one."""
    return [row | ({"margin": 0.5} if number % 3 == 0 else {}) for number, row in enumerate(pairs(chance, count))]


ROWS_OF = {"pretrain": documents, "sft": conversations, "dpo": pairs, "kto": labelled, "reward": rated}
