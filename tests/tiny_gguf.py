"""Tiny models as GGUF files, written tensor by tensor: no exporter is between the model and what reads the file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are tiny.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""With a default system prompt."""
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
MERGES = [("t", "h"), ("Ġ", "a"), ("i", "n"), ("ä", "½")]
"""A file without any is refused."""


@cache
def _byte_tokens() -> list[str]:
    from tokenizers import pre_tokenizers

    return [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]


def merging_tokenizer(template: str = CHATML) -> Any:
    """Bytes with a few merges, 264 tokens, and the special tokens of ChatML."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(_byte_tokens())}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|endoftext|>"],
    )
    found.chat_template = template
    return found


def permuted(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in the order in which llama.cpp rotates those of Llama."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def write_tiny_gguf(file: Path, model: Any, *, template: str = CHATML, eos: int = 2, halves: bool = False) -> Path:
    """
    Args:
        model: Llama, Qwen2, Qwen3 or Gemma 3.
        halves: write matrices in fp16.
    """
    import gguf

    config = model.config
    name = {"gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(file, name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base((rope if "rope_theta" in rope else rope["full_attention"])["rope_theta"])
    if name == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(_byte_tokens())
    writer.add_token_types([gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.NORMAL] * (len(_byte_tokens()) - 4))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_eos_token_id(eos)
    writer.add_add_bos_token(False)
    writer.add_chat_template(template)
    names = gguf.get_tensor_name_map(
        {kind: arch for arch, kind in gguf.MODEL_ARCH_NAMES.items()}[name], config.num_hidden_layers
    )
    for key, weight in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name == "llama" and key.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            weight = permuted(weight, heads)
        if name == "gemma3" and key.endswith("norm.weight"):
            weight = weight + 1
        own = names.get_name(key, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(own, weight.numpy().astype(np.float16 if halves and weight.dim() > 1 else np.float32))
    _close(writer)
    return file


def write_tiny_lora(file: Path, name: str, alpha: float, tensors: Mapping[str, tuple[Tensor, Tensor]]) -> Path:
    """An adapter as GGUF. `tensors`: llama.cpp's name of a weight → A (rank, in) and B (out, rank)."""
    import gguf

    writer = gguf.GGUFWriter(file, name)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for key, (a, b) in tensors.items():
        writer.add_tensor(f"{key}.lora_a", a.numpy())
        writer.add_tensor(f"{key}.lora_b", b.numpy())
    _close(writer)
    return file


def _close(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
