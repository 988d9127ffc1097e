"""Mistral's templates beside Mistral's own generator of prompts: the same text, tools and calls included."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest

from firefly.commands.templates import render_request
from firefly.data.families import find_family
from firefly.data.formats import parse_record
from firefly.data.schema import Conversation
from firefly.data.templates import ChatTemplate, read_template
from firefly.errors import UsageError

Generate = Callable[..., str]


@pytest.fixture(scope="module")
def generate(tmp_path_factory) -> Generate:
    """mistral-common's text of (version, messages, tools); its vocabulary here is the 256 bytes."""
    pytest.importorskip("mistral_common")
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy, SpecialTokens
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    special = [{"rank": i, "token_str": token.value, "is_control": True} for i, token in enumerate(SpecialTokens)]
    byte_tokens = [
        {"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None} for i in range(256)
    ]
    folder = tmp_path_factory.mktemp("tekken")

    def text(version: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        path = folder / f"tekken_{version}.json"
        if not path.exists():
            sizes = {"default_vocab_size": 256 + len(special), "default_num_special_tokens": len(special)}
            config = {"pattern": r".|\n", "num_vocab_tokens": 256, "version": version, **sizes}
            path.write_text(json.dumps({"config": config, "vocab": byte_tokens, "special_tokens": special}))
        tokenizer = MistralTokenizer.from_file(path)
        encoded = tokenizer.encode_chat_completion(ChatCompletionRequest.from_openai(messages, tools))
        return tokenizer.decode(encoded.tokens, special_token_policy=SpecialTokenPolicy.KEEP)

    return text


def bind(name: str) -> ChatTemplate:
    spec = find_family(name)
    assert spec is not None
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    return ChatTemplate(name, read_template(spec), spec.stop_tokens, (2,), variables, spec.stable)


TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks it up",
        "parameters": {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]},
    },
}
SYSTEM = {"role": "system", "content": "Be brief."}


def call(question: str, identifier: str | None = None, name: str = "look") -> dict[str, Any]:
    made = {"type": "function", "function": {"name": name, "arguments": json.dumps({"q": question})}}
    return made if identifier is None else {"id": identifier, **made}


def calling(*calls: dict[str, Any], content: str = "") -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


ASKED = {"role": "user", "content": "你好 {{ x }}"}
SMALL_CHATS = [
    [SYSTEM, ASKED],
    [SYSTEM, ASKED, {"role": "assistant", "content": "a  "}, {"role": "user", "content": "more"}],
    [SYSTEM, {**ASKED, "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}],
    [SYSTEM, ASKED, calling(call("x", "abcdefgh1")), {"role": "tool", "tool_call_id": "abcdefgh1", "content": "r"}],
    [
        SYSTEM,
        ASKED,
        calling(call("x", "abcdefgh1"), call("y", "abcdefgh2"), content="Let me look."),
        {"role": "tool", "tool_call_id": "abcdefgh2", "content": '{"n": 2}'},
        {"role": "tool", "tool_call_id": "abcdefgh1", "content": "1"},
        {"role": "assistant", "content": "Both."},
        {"role": "user", "content": "Thanks"},
    ],
]


@pytest.mark.parametrize("tools", [None, [TOOL]])
@pytest.mark.parametrize("chat", SMALL_CHATS)
def test_mistral_small_writes_what_its_generator_writes(generate, chat, tools):
    request = {"messages": json.loads(json.dumps(chat)), "tools": tools}
    assert render_request("mistral-small-3.2", request, True)["text"] == generate("v11", chat, tools)


def test_mistral_smalls_own_system_prompt_stands_where_there_is_no_other(generate, shared):
    lines = (shared / "templates" / "expected.jsonl").read_text(encoding="utf-8").splitlines()
    official = next(case["rendered"] for case in map(json.loads, lines) if case["family"] == "mistral-small-3.2")
    said = official.split("[SYSTEM_PROMPT]")[1].split("[/SYSTEM_PROMPT]")[0]
    for chat in SMALL_CHATS:
        request = {"messages": chat[1:], "tools": [TOOL], "template_date": "2024-07-26"}
        expected = generate("v11", [{"role": "system", "content": said}, *chat[1:]], [TOOL])
        assert render_request("mistral-small-3.2", request, True)["text"] == expected
    assert (
        "The current date is 2025-01-02."
        in render_request("mistral-small-3.2", {"messages": [ASKED], "template_date": "2025-01-02"}, True)["text"]
    )


def test_an_image_has_no_place_in_mistral_small():
    image = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    chat = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, image]}]
    with pytest.raises(UsageError, match="Only text is supported, not image_url"):
        render_request("mistral-small-3.2", {"messages": chat}, True)


VERSIONS = {
    "mistral-v3-tekken-common": "v3",
    "mistral-v7-tekken-common": "v7",
    "mistral-v11-common": "v11",
    "mistral-small-3.2": "v11",
    "mistral-v13-common": "v13",
}
ASK = {"role": "user", "content": "one"}
UNNAMED = {
    "one call": [ASK, calling(call("x")), {"role": "tool", "content": "3 hits"}],
    "in the middle": [
        ASK,
        calling(call("x")),
        {"role": "tool", "content": "3 hits"},
        {"role": "assistant", "content": "3 of them."},
        {"role": "user", "content": "two"},
        calling(call("y")),
        {"role": "tool", "content": '{"n": 2}'},
    ],
    "two at once, answered by name": [
        ASK,
        calling(call("x", name="look"), call("y", name="read")),
        {"role": "tool", "name": "read", "content": "2 lines"},
        {"role": "tool", "name": "look", "content": "3 hits"},
    ],
    "identifiers of another kind": [
        ASK,
        calling(call("x", "call_aBcDeFgHiJkLmNoPqRsTuVwX"), call("y", "1")),
        {"role": "tool", "tool_call_id": "1", "content": "2 lines"},
        {"role": "tool", "tool_call_id": "call_aBcDeFgHiJkLmNoPqRsTuVwX", "content": "3 hits"},
    ],
}


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("case", UNNAMED)
def test_calls_without_their_identifiers_are_written_as_the_generator_writes_them(generate, name, case):
    _, parsed = parse_record({"messages": [SYSTEM, *UNNAMED[case], {"role": "assistant", "content": "end"}]})
    assert isinstance(parsed, Conversation)
    chat = Conversation(parsed.messages[:-1])
    template = bind(name)
    request = template.adapt(chat).as_dicts()
    for item in request:
        for made in item.get("tool_calls", []):
            made["function"] = {**made["function"], "arguments": json.dumps(made["function"]["arguments"])}
    calls = {made["id"]: made for item in request for made in item.get("tool_calls", [])}
    for item in request:
        if item["role"] == "tool":
            asked = json.loads(calls[item["tool_call_id"]]["function"]["arguments"])["q"]
            assert asked == {"3 hits": "x", "2 lines": "y", '{"n": 2}': "y"}[item["content"]]
    assert template.render_prompt(chat) == generate(VERSIONS[name], request)
    assert template.render(parsed)[-1].text.startswith(generate(VERSIONS[name], request))
