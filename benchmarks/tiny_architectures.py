"""A tiny random model of every causal architecture that transformers has, from the defaults of its configuration.

Every size that a configuration names is replaced by a small one (`SIZES`), in parts of its parts, too; layer patterns
are cut so that each kind of layer stays. What does not come out right by that has a line in `FAMILIES`. Widths differ
from each other where they may (a head's queries and values, one expert's and a dense layer's inner width), windows and
chunks are shorter than the rows that are computed, and vectors that start at 0 or 1 are moved away from it: a mistake
in any of them would not show otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = 264
FIRST_ID, LAST_ID = 3, 249
"""Rows are made of these ids: 0 to 2 pad, begin and end, and the last ones stand for images and sounds."""

SIZES: dict[str, Any] = {
    # The vocabulary and the residual stream.
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"), 264),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "embedding_size"), 32),
    **dict.fromkeys(("embed_dim", "word_embed_proj_dim", "input_embedding_size", "output_embedding_size"), 32),
    # Layers.
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"), 3),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers"), 3),
    # Heads.
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "swa_head_dim", "global_head_dim", "attention_head_size", "dim_head"), 8),
    **dict.fromkeys(("kv_channels", "d_head", "attention_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    "qk_head_dim": 16,
    # Feed-forward blocks.
    **dict.fromkeys(
        ("intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "d_ff", "dff", "dim_ff"), 48
    ),
    **dict.fromkeys(("ffn_hidden_size", "d_inner", "intermediate_size_mlp", "dense_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size"), 24),
    # Experts.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("num_experts_per_token",), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace"), 1),
    "num_expert_group": 1,
    "zero_expert_num": 2,
    # Positions, windows and chunks.
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 512),
    **dict.fromkeys(("max_target_positions", "max_source_positions"), 512),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "local_attention"), 8),
    **dict.fromkeys(("window_size", "attention_chunk_size", "chunk_size", "mamba_chunk_size", "block_size"), 8),
    "max_window_layers": 1,
    # Recurrent layers.
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "lru_width": 32,
    # Sparse attention's indexers.
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
    # Wider than the default, so that logits and their gradients are not all alike.
    **dict.fromkeys(("initializer_range", "init_std", "initializer_std"), 0.1),
    "query_pre_attn_scalar": 8,
}

RANDOM = ("dropout", "pdrop", "layerdrop", "jitter")
"""Parts of names of what makes two passes differ."""

GEMMA_4 = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "per_layer_config": {3: {"head_dim": 16}},
    "hidden_size_per_layer_input": 8,
}
GEMMA_3N = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 2,
    "intermediate_size": 48,
    "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
}
QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 8,
    "ngram_vocab_size_base": 512,
}

ENCODERS = {
    "bert": "is_decoder",
    "bert-generation": "is_decoder",
    "big_bird": "is_decoder",
    "camembert": "is_decoder",
    "data2vec-text": "is_decoder",
    "electra": "is_decoder",
    "ernie": "is_decoder",
    "megatron-bert": "is_decoder",
    "rembert": "is_decoder",
    "roberta": "is_decoder",
    "roberta-prelayernorm": "is_decoder",
    "roc_bert": "is_decoder",
    "roformer": "is_decoder",
    "xlm": "causal",
    "xlm-roberta": "is_decoder",
    "xlm-roberta-xl": "is_decoder",
    "xmod": "is_decoder",
}
"""Encoders whose configuration has a switch that makes decoders of them."""

FAMILIES: dict[str, dict[str, Any]] = {
    "blt": {
        "encoder_hash_byte_group_vocab": 264,
        "encoder_hash_byte_group_size": [3, 4],
        "patcher_config": {
            "num_hidden_layers": 1,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "intermediate_size": 48,
        },
        "encoder_config": {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
        | {"hidden_size_global": 32},
        "decoder_config": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
        | {"hidden_size_global": 32},
        "global_config": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48},
    },
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "dbrx": {
        "d_model": 32,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"num_local_experts": 4, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": GEMMA_3N,
    "gemma4_text": GEMMA_4,
    "gemma4_unified_text": GEMMA_4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "dots3_note_text": {"head_dim": 16, "per_layer_config": {"1": {"num_key_value_heads": 4}}},
    "dots3_note": {
        "text_config": {"head_dim": 16, "per_layer_config": {"1": {"num_key_value_heads": 4}}},
        "vision_config": {"per_layer_config": {}, "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_out_dim": 32, "adapter_input_size": 32},
    },
    "gemma4": {"text_config": GEMMA_4},
    "gemma4_unified": {"text_config": GEMMA_4},
    "qwen4_exp": {"text_config": QWEN4},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "roc_bert": {"pronunciation_vocab_size": 264, "shape_vocab_size": 264},
    "zamba": {"layer_types": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 4},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
"""What differs from the sizes above, or is not found by them."""


LEFT_OUT = {
    "gemma4_assistant": "drafts tokens for another model, whose states it reads: no language model by itself",
    "gemma4_unified_assistant": "drafts tokens for another model, whose states it reads: no language model by itself",
    "musicgen": "models codes of sound in several books at once; AutoModelForCausalLM does not build it",
    "musicgen_melody": "models codes of sound in several books at once; AutoModelForCausalLM does not build it",
}
"""What is no causal language model of text by itself."""


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The configuration of a tiny model of this type, of an encoder's with the switch that makes a decoder of it."""
    from transformers import CONFIG_MAPPING

    family = CONFIG_MAPPING[model_type]
    values = _merged(_small(family().to_dict()), FAMILIES.get(model_type, {}))
    if model_type in ENCODERS:
        values[ENCODERS[model_type]] = True
    return family(**(values | changes))


def _merged(values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """`others` over `values`, parts with a model type of their own piece by piece."""
    parts = {name for name, value in values.items() if isinstance(value, dict) and "model_type" in value}
    return values | {name: _merged(values[name], value) if name in parts else value for name, value in others.items()}


def _small(given: dict[str, Any]) -> dict[str, Any]:
    """The values of a configuration that tiny ones take the place of."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if value is None or isinstance(value, bool):
            continue
        if isinstance(value, float | int) and any(word in name for word in RANDOM):
            found[name] = 0.0
            continue
        if isinstance(value, dict):
            if value.get("model_type"):  # a part with a configuration of its own
                found[name] = _small(value) | {"model_type": value["model_type"]}
        elif name in SIZES:
            found[name] = SIZES[name]
        elif name in ("layer_types", "layers_block_type", "block_types") and isinstance(value, list):
            found[name] = _each_kind(value)
        elif isinstance(value, int) and name.endswith(("_token_id", "_token_index", "_index", "_id")) and value > 2:
            found[name] = VOCABULARY - 1 - len(found) % 8
    if "layer_types" in found:
        found["num_hidden_layers"] = len(found["layer_types"])
    heads = given.get("num_attention_heads")
    for name in ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"):
        if given.get(name) is not None:
            found[name] = 4 if given[name] == heads or "kv_lora_rank" in given else 2
    return found


def _each_kind(layers: list[str]) -> list[str]:
    """A short pattern with every kind of layer in it, the first kind twice."""
    kinds = list(dict.fromkeys(layers))
    return [*kinds, *kinds[:1]] if len(kinds) > 1 else kinds * 3


def save_tiny_model(model_type: str, folder: Path) -> Any:
    """Save a tiny model as its publishers do; return it.

    Where the causal class is the text part of a larger model, config.json is the larger model's.
    """
    model = tiny_model(model_type)
    model.save_pretrained(folder)
    if model.config.model_type != model_type:
        tiny_config(model_type).save_pretrained(folder)
    return model


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A random fp32 model in eval mode."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or (parameter.numel() and (parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
