"""Tiny random models, one tokenizer and a few rows: what the numeric tests train on, in milliseconds."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from firefly.config import AdapterConfig
from firefly.data.examples import INDEX, ExampleCounts, index_entry
from firefly.data.schema import IGNORE, Example, Source, TokenPair, Tokens
from firefly.models.adapters import ALL_LINEAR, attach_adapter, target_layers, target_parameters
from firefly.models.attention import choose_layout
from firefly.models.forwards import install_training_forwards
from firefly.models.kernels.dropout import draw, drop, dropped
from firefly.segments import Segment

VOCABULARY = 264
WINDOW = 8

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HALF_SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": WINDOW}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}

# Name → (configuration class, model class, what differs from SHAPE).
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral_window": ("Mistral", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2", {}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "gemma2": (
        "Gemma2",
        HALF_SLIDING
        | {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": ("Gemma3Text", HALF_SLIDING | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3", {"sliding_window": WINDOW}),
    "gpt_neox": ("GPTNeoX", {"num_key_value_heads": None}),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", {"logits_scaling": 4.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "minicpm3": (
        "MiniCPM3",
        {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
        | {"qk_nope_head_dim": 8, "v_head_dim": 8, "dim_model_base": 8, "scale_emb": 3.0, "scale_depth": 1.4},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2_moe": ("Qwen2Moe", EXPERTS | {"num_experts": 4}),
    "qwen2_moe_window": (
        "Qwen2Moe",
        EXPERTS | HALF_SLIDING | {"num_experts": 4, "use_sliding_window": True},
    ),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | {"num_experts": 4, "head_dim": 8, "decoder_sparse_step": 1}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "phimoe_window": ("Phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW}),
    "hunyuan_moe": ("HunYuanMoEV1", {"num_experts": 4, "moe_topk": 2, "head_dim": 8}),
    "deepseek_v3": (
        "DeepseekV3",
        {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4, "q_lora_rank": 16}
        | {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4, "q_lora_rank": 16}
        | {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12},
    ),
    "jetmoe": ("JetMoe", {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4": (
        "Llama4Text",
        {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "head_dim": 8}
        | {"attention_chunk_size": 16},
    ),
    "gpt2": ("GPT2", {"n_inner": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "bloom": ("Bloom", {}),
    "gptj": ("GPTJ", {"rotary_dim": 8, "n_inner": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "roberta": ("Roberta", {"is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "gpt_oss": ("GptOss", HALF_SLIDING | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
}


NO_ATTENTION = {"num_attention_heads": None, "num_key_value_heads": None, "intermediate_size": None}
MAMBA_LAYERS = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}

# As above, for tests of one behaviour: not every test of all architectures runs on these.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("Gemma", {"head_dim": 8}),
    "granite_hybrid": (
        "GraniteMoeHybrid",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48, "mamba_n_heads": 8}
        | {"mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "position_embedding_type": "rope"}
        | {"layer_types": ["attention"] * 3},
    ),
    "granite_dense": (
        "GraniteMoeHybrid",
        {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 48, "mamba_n_heads": 8}
        | {"mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "position_embedding_type": "rope"}
        | {"layer_types": ["attention"] * 3, "router_aux_loss_coef": 0.01},
    ),
    "jamba": (
        "Jamba",
        {"num_experts": 4, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1}
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "mamba_d_state": 8},
    ),
    "mamba": ("Mamba", NO_ATTENTION | {"state_size": 8}),
    "falcon_mamba": ("FalconMamba", NO_ATTENTION | {"state_size": 8}),
    "mamba2": ("Mamba2", NO_ATTENTION | {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}),
    "falcon_h1": ("FalconH1", MAMBA_LAYERS | {"mamba_d_ssm": 64}),
    "nemotron_h": (
        "NemotronH",
        {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "head_dim": 8}
        | {"layers_block_type": ["mamba", "attention", "mlp"]},
    ),
    "bamba": ("Bamba", MAMBA_LAYERS | {"attn_layer_indices": [1]}),
    "granite_mamba": (
        "GraniteMoeHybrid",
        MAMBA_LAYERS
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48}
        | {"layer_types": ["mamba", "attention", "mamba"]},
    ),
    "zamba2": (
        "Zamba2",
        {"mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 1, "hybrid_layer_ids": [1]}
        | {"layers_block_type": ["mamba", "hybrid", "mamba"]},
    ),
    "deepseek_v32": (
        "DeepseekV32",
        ARCHITECTURES["deepseek_v3"][1] | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8},
    ),
    "opt": (
        "OPT",
        {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "max_position_embeddings": 64}
        | {"intermediate_size": None, "num_key_value_heads": None, "initializer_range": None},
    ),
    "doge": ("Doge", {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2}),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_intermediate_size": 24},
    ),
}


def tiny_config(name: str, **changes: Any) -> Any:
    import transformers

    family, own = (ARCHITECTURES | OTHERS)[name]
    config = {"Gemma3Text": "Gemma3TextConfig"}.get(family, f"{family}Config")
    values = {key: value for key, value in (SHAPE | own | changes).items() if value is not None}
    if name == "mixtral":
        values["sliding_window"] = None
    return getattr(transformers, config)(**values)


def tiny_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """A random fp32 model of an architecture, in eval mode. Its weights are wide enough for logits that matter."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes))
    with torch.no_grad():  # norms and biases start at 1 and 0, where a mistake in them would not show
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.float().eval()


def random_example(length: int, seed: int, trained: float = 0.6) -> Tokens:
    """Random ids, of which a random share is trained (the last one always)."""
    generator = np.random.default_rng((seed, length))
    ids = generator.integers(3, VOCABULARY, length).astype(np.int32)
    chosen = generator.random(length) < trained
    chosen[-1] = True
    return Tokens(ids, np.where(chosen, ids, IGNORE).astype(np.int32))


def random_examples(*lengths: int, seed: int = 0) -> list[Tokens]:
    return [random_example(length, seed + number) for number, length in enumerate(lengths)]


def apart(*borders: int) -> tuple[Segment, ...]:
    """Segments between borders that do not see each other."""
    return tuple(Segment(start, end) for start, end in pairwise(borders))


def random_pair(prompt: int, chosen: int, rejected: int, seed: int) -> TokenPair:
    """A random prompt and two answers of these lengths that differ from their first token on."""
    generator = np.random.default_rng((seed, prompt, chosen, rejected))
    ids = generator.integers(3, VOCABULARY, prompt + chosen + rejected).astype(np.int32)
    if prompt + chosen < len(ids) and ids[prompt] == ids[prompt + chosen]:
        ids[prompt] = 3 + (ids[prompt] - 2) % (VOCABULARY - 3)
    labels = np.where(np.arange(len(ids)) < prompt, IGNORE, ids).astype(np.int32)
    return TokenPair(ids, labels, prompt, chosen)


def random_pairs(*shapes: tuple[int, int, int], seed: int = 0) -> list[TokenPair]:
    return [random_pair(*shape, seed + number) for number, shape in enumerate(shapes)]


class ListedExamples:
    """Examples in a list, where the product's lie in a memory-mapped file."""

    def __init__(self, examples: Sequence[Example], sources: Sequence[int] = ()) -> None:
        self.examples = list(examples)
        index = np.array([index_entry(example, 0, row) for row, example in enumerate(examples)], dtype=INDEX)
        self.names: list[str] = []
        self.counts = ExampleCounts.of(index, np.array(sources or [0] * len(self.examples)))

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def place(self, index: int) -> Source:
        return Source("listed", index + 1)


def padded_batch(examples: Sequence[Tokens]) -> dict[str, Tensor]:
    """What any other trainer would feed: rows padded on the right, with mask and labels."""
    longest = max(len(example.input_ids) for example in examples)
    batch = {
        "input_ids": torch.zeros(len(examples), longest, dtype=torch.long),
        "labels": torch.full((len(examples), longest), IGNORE),
        "attention_mask": torch.zeros(len(examples), longest, dtype=torch.long),
    }
    for row, example in enumerate(examples):
        size = len(example.input_ids)
        batch["input_ids"][row, :size] = torch.from_numpy(example.input_ids)
        batch["labels"][row, :size] = torch.from_numpy(example.labels)
        batch["attention_mask"][row, :size] = 1
    return batch


def padded_loss(model: Any, examples: Sequence[Tokens]) -> Tensor:
    """Mean NLL per target of a padded batch, by the textbook."""
    batch = padded_batch(examples)
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)


def randomise_adapters(wrapped: Any) -> Any:
    """Adapters that do something, the same at every call: a fresh one's B is zero and hides gradients."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def with_our_lora(model: Any, dropout: float = 0.0) -> Any:
    return randomise_adapters(attach_adapter(model, AdapterConfig(mode="lora", rank=4, alpha=8, dropout=dropout)))


def with_plain_lora(model: Any, dropout: float = 0.0) -> Any:
    """The same adapters under peft's own forward."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=dropout,
        target_modules=target_layers(model, ALL_LINEAR),
        target_parameters=target_parameters(model, ALL_LINEAR) or None,
        task_type="CAUSAL_LM",
    )
    return randomise_adapters(get_peft_model(model, settings))


class OurDropout(torch.nn.Dropout):
    """For a model's own forward: drops what our kernels would drop, once they have drawn the same random number."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input
        shape = (input.numel() // input.shape[-1], input.shape[-1])
        away = dropped(draw(shape, self.p, input), shape, self.p)
        return input * drop(torch.ones(shape), away, self.p).view(input.shape).to(input.dtype)


def drop_as_we_do(model: Any) -> None:
    """Let peft's layers drop what our kernels would."""
    for module in model.modules():
        for name, dropout in getattr(module, "lora_dropout", {}).items():
            if isinstance(dropout, torch.nn.Dropout):
                module.lora_dropout[name] = OurDropout(dropout.p).train(dropout.training)


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    """Each tensor within `tolerance` of the expected one's largest number."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        size = value.abs().max().clamp_min(1e-3).item()
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * size, msg=lambda m, n=name: f"{n}: {m}")


@cache
def _tokenizer_json() -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer.to_str()


def tiny_tokenizer() -> Any:
    """One token a byte, with the special tokens of ChatML."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()),
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|endoftext|>"],
    )


def save_tiny_model(folder: Path, name: str = "llama", **changes: Any) -> Path:
    """Save a tiny model with the tiny tokenizer, as a user would have it on disk."""
    tiny_model(name, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def run_settings(model: Path, rows: Path | str, output: Path, **own: Any) -> dict[str, Any]:
    """A run in fp32 on the CPU that logs every step, saves nothing but its result, and has no trackers and no
    comparison."""
    chat = {} if own.get("task_type") == "pretrain" else {"template_name": "default"}
    return {
        "model_name_or_path": str(model),
        "train_file": str(rows),
        "output_dir": str(output),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "compare": False,  # it would take the longest of a tiny run
        **chat,
        **own,
    }


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    """`count` conversations in the tutorial's shape, of 1–3 turns and uneven length."""
    generator = np.random.default_rng(seed)
    words = ["red", "green", "blue", "one", "two", "three", "天", "地"]

    def text() -> str:
        return " ".join(generator.choice(words, generator.integers(1, 6)))

    rows = [
        {"conversation": [{"human": text(), "assistant": text()} for _ in range(generator.integers(1, 4))]}
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def by_hand(file: Path) -> list[Tokens]:
    """Rows in the default template, a token a byte, written down without the product."""
    tokenizer = tiny_tokenizer()
    examples = []
    for line in file.read_text(encoding="utf-8").splitlines():
        ids, labels = [], []
        for turn in json.loads(line)["conversation"]:
            question = tokenizer.encode(f"User: {turn['human']}\nAssistant:")
            answer = [*tokenizer.encode(f" {turn['assistant']} "), tokenizer.eos_token_id]
            ids += question + answer
            labels += [IGNORE] * len(question) + answer
        examples.append(Tokens(np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32)))
    return examples


def prepared(name: str, mode: str) -> tuple[Any, str, Any]:
    """(a model as `train` prepares it, its layout, the plain transformers and peft model)."""
    model = tiny_model(name)
    own = copy.deepcopy(model)
    layout, _ = choose_layout(model)
    if mode == "lora":
        model, own = with_our_lora(model), with_plain_lora(own)
    else:
        model.requires_grad_(True)
    install_training_forwards(model)
    return model, layout, own
