"""Tiny random models for text with images or sound: towers beside a decoder that text never reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tiny import SHAPE, VOCABULARY, tiny_tokenizer

TEXT: dict[str, Any] = SHAPE | {"num_hidden_layers": 2}
GEMMA = {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
BLOCKS: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 14,
}
SOUND: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "num_mel_bins": 8,
}
IMAGE = VOCABULARY - 1

# Name → (family, what its configuration is made of, what text never reaches).
MULTIMODAL: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "gemma3": (
        "Gemma3",
        {
            "text_config": TEXT | GEMMA | {"query_pre_attn_scalar": 8},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
            "boi_token_index": IMAGE - 1,
            "eoi_token_index": IMAGE - 2,
        },
        ["model.multi_modal_projector", "model.vision_tower"],
    ),
    "llava": (
        "Llava",
        {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 16},
            "image_token_index": IMAGE,
        },
        ["model.multi_modal_projector", "model.vision_tower"],
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {
            "text_config": TEXT | MROPE,
            "vision_config": BLOCKS | {"fullatt_block_indexes": [1]},
            "image_token_id": IMAGE,
            "video_token_id": IMAGE - 1,
            "vision_start_token_id": IMAGE - 2,
        },
        ["model.visual"],
    ),
    "mistral3": (
        "Mistral3",
        {
            "text_config": TEXT | {"model_type": "mistral", "head_dim": 8},
            "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8},
            "image_token_index": IMAGE,
        },
        ["model.multi_modal_projector", "model.vision_tower"],
    ),
    "mllama": (  # whose text part has layers that attend to images
        "Mllama",
        {
            "text_config": TEXT | {"cross_attention_layers": [1]},
            "vision_config": VISION
            | {"attention_heads": 2, "num_global_layers": 1, "intermediate_layers_indices": [0]}
            | {"vision_output_dim": 32, "max_num_tiles": 2, "supported_aspect_ratios": [[1, 1]]},
            "image_token_index": IMAGE,
        },
        ["model.layers.1"],
    ),
    "phi4_multimodal": (
        "Phi4Multimodal",
        TEXT
        | {
            "vision_config": VISION | {"crop_size": 28, "image_token_id": IMAGE},
            "audio_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_blocks": 1,
                "num_attention_heads": 2,
                "input_size": 8,
                "nemo_conv_channels": 8,
                "audio_token_id": IMAGE - 1,
            },
        },
        ["model.embed_tokens_extend"],
    ),
    "qwen2_audio": (
        "Qwen2Audio",
        {
            "text_config": TEXT | {"model_type": "qwen2"},
            "audio_config": SOUND | {"model_type": "qwen2_audio_encoder"},
            "audio_token_index": IMAGE,
        },
        ["model.audio_tower", "model.multi_modal_projector"],
    ),
}


def multimodal_config(name: str) -> Any:
    family, parts, _ = MULTIMODAL[name]
    return getattr(transformers, f"{family}Config")(**parts)


def multimodal_model(name: str) -> Any:
    """A random fp32 model in eval mode, of the class that a run loads."""
    from firefly.models.loading import model_class

    torch.manual_seed(0)
    config = multimodal_config(name)
    return model_class(config).from_config(config).float().eval()


def save_multimodal_model(folder: Path, name: str) -> Path:
    """Save one with the tiny tokenizer, towers and all."""
    torch.manual_seed(0)
    family = MULTIMODAL[name][0]
    kinds = [getattr(transformers, f"{family}For{end}", None) for end in ("ConditionalGeneration", "CausalLM")]
    kind = next(kind for kind in kinds if kind is not None)
    kind(multimodal_config(name)).float().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
