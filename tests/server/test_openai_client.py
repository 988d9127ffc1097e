"""The openai package against a server with a tiny random model: answers, log-probabilities, errors."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from serving import Running, until

from firefly.data.schema import Message
from firefly.generation import GenerationSettings

ASKED: Any = [{"role": "user", "content": "two blue red"}]
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def client(served: Running) -> openai.OpenAI:
    return served.client()


def test_a_chat_answer_is_the_generators_own(served: Running, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(messages=ASKED, **GREEDY)
    generator = served.service.generator
    ids = generator.encode([Message.of("user", "two blue red")])
    ((own,),) = generator.generate([ids], GenerationSettings(max_new_tokens=12, temperature=0))
    assert answer.choices[0].message.content == own.text
    assert answer.choices[0].finish_reason == own.finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 12)
    assert answer.usage.total_tokens == len(ids) + 12
    assert answer.model == "tiny"


def test_a_stream_adds_up_to_the_whole_answer(client: openai.OpenAI) -> None:
    asked = GREEDY | {"messages": ASKED, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **asked))
    assert chunks[0].choices[0].delta.role == "assistant"
    *rest, last = chunks
    assert last.choices == []
    assert last.usage == whole.usage
    assert all(chunk.usage is None for chunk in rest)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in rest) == whole.choices[0].message.content
    assert rest[-1].choices[0].finish_reason == "length"
    found = [each for chunk in rest if chunk.choices[0].logprobs for each in chunk.choices[0].logprobs.content or []]
    assert whole.choices[0].logprobs is not None
    assert found == whole.choices[0].logprobs.content
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_answers_with_a_seed_are_the_same_streamed_and_alone(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": ASKED, "temperature": 2.0, "top_p": 1, "seed": 5}
    asked["max_tokens"] = 10
    whole = [choice.message.content for choice in client.chat.completions.create(n=3, **asked).choices]
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(n=3, stream=True, **asked):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == whole
    assert len(set(texts)) == 3
    assert client.chat.completions.create(**asked).choices[0].message.content == texts[0]


def test_tokens_come_with_their_bytes_and_log_probabilities(client: openai.OpenAI) -> None:
    """The tiny vocabulary is of single bytes, so parts of characters are common."""
    asked: dict[str, Any] = {"model": "tiny", "messages": ASKED, "temperature": 5.0, "top_p": 1, "seed": 2}
    answer = client.chat.completions.create(**asked, max_tokens=40, logprobs=True, top_logprobs=20).choices[0]
    assert answer.logprobs is not None
    content = answer.logprobs.content or []
    spelled = b"".join(bytes(each.bytes or []) for each in content)
    assert spelled.decode("utf-8", "replace") == answer.message.content
    assert any(each.token.startswith("\\x") for each in content)
    for each in content:
        assert len(each.top_logprobs) == 20
        likely = [other.logprob for other in each.top_logprobs]
        assert likely == sorted(likely, reverse=True)
        assert sum(map(math.exp, likely)) < 1
        assert each.logprob <= likely[0]


def test_text_and_ids_of_one_prompt_have_one_completion(client: openai.OpenAI) -> None:
    by_text = client.completions.create(prompt=["abc", "de"], logprobs=2, **GREEDY)
    ids = [[ord(letter) - ord("!") + 4 for letter in text] for text in ("abc", "de")]
    by_ids = client.completions.create(prompt=ids, logprobs=2, **GREEDY)
    assert [choice.text for choice in by_text.choices] == [choice.text for choice in by_ids.choices]
    alone = client.completions.create(prompt="de", logprobs=2, **GREEDY)
    assert alone.choices[0].text == by_text.choices[1].text
    assert by_text.usage is not None
    assert by_text.usage.prompt_tokens == 5
    streamed = ["", ""]
    for chunk in client.completions.create(prompt=["abc", "de"], stream=True, **GREEDY):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in by_text.choices]


def test_echo_has_the_log_probabilities_of_the_prompt(served: Running, client: openai.OpenAI) -> None:
    echoed = client.completions.create(prompt="abcd", echo=True, logprobs=1, **(GREEDY | {"max_tokens": 3})).choices[0]
    assert echoed.text.startswith("abcd")
    found = echoed.logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.tokens[:4] == list("abcd")
    assert len(found.tokens) == 7
    assert found.text_offset is not None
    assert found.text_offset[:5] == [0, 1, 2, 3, 4]
    assert found.token_logprobs is not None
    assert found.token_logprobs[0] is None
    (scored,) = served.service.generator.engine.score([[68, 69, 70, 71]], "tiny", 1)
    assert found.token_logprobs[1:4] == pytest.approx([token.logprob for token in scored[1:]], abs=1e-5)
    # The generated tokens are the likeliest ones.
    assert found.top_logprobs is not None
    assert all(
        own == max(top.values()) for own, top in zip(found.token_logprobs[4:], found.top_logprobs[4:], strict=True)
    )
    only = client.completions.create(prompt="abcd", echo=True, logprobs=1, **(GREEDY | {"max_tokens": 0})).choices[0]
    assert only.text == "abcd"
    assert only.logprobs is not None
    assert only.logprobs.token_logprobs == found.token_logprobs[:4]


def test_one_greedy_token_behind_an_echo_is_read_off_the_scores(client: openai.OpenAI) -> None:
    """With a text to stop at it is generated."""
    asked = GREEDY | {
        "max_tokens": 1,
        "prompt": ["abcd", "x", "hello there", "0 1 2", "天", "a\nb"],
        "echo": True,
        "logprobs": 1,
    }
    scored = client.completions.create(**asked)
    drawn = client.completions.create(**asked, stop=["never said"])
    for one, other in zip(scored.choices, drawn.choices, strict=True):
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
        assert one.logprobs is not None
        assert other.logprobs is not None
        assert one.logprobs.tokens == other.logprobs.tokens
        assert one.logprobs.token_logprobs == pytest.approx(other.logprobs.token_logprobs, abs=1e-4)
    assert scored.usage == drawn.usage


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(client: openai.OpenAI) -> None:
    whole = client.completions.create(prompt="abc", **(GREEDY | {"temperature": 3, "seed": 1, "max_tokens": 30}))
    text = whole.choices[0].text
    middle = next(text[at] for at in range(8, len(text)) if text[at] not in text[:at] and text[at] != "\ufffd")
    cut = client.completions.create(
        prompt="abc", stop=[middle], **(GREEDY | {"temperature": 3, "seed": 1, "max_tokens": 30})
    ).choices[0]
    assert cut.text == text.partition(middle)[0]
    assert cut.finish_reason == "stop"


def test_a_named_stop_token_ends_an_answer(client: openai.OpenAI) -> None:
    whole = client.completions.create(prompt="abc", logprobs=0, **GREEDY).choices[0]
    assert whole.logprobs is not None
    biased = client.completions.create(
        prompt="abc", logit_bias={"70": 100}, extra_body={"stop_token_ids": [70]}, **GREEDY
    )
    assert biased.choices[0].finish_reason == "stop"
    assert biased.choices[0].text == ""
    assert biased.usage is not None
    assert biased.usage.completion_tokens == 1


def test_a_stop_token_is_counted_and_is_no_part_of_the_text(client: openai.OpenAI) -> None:
    stop = client.chat.completions.create(messages=ASKED, **GREEDY, logit_bias={"2": 100}, logprobs=True)
    (choice,) = stop.choices
    assert (choice.message.content, choice.finish_reason) == ("", "stop")
    assert choice.logprobs is not None
    assert choice.logprobs.content == []
    assert stop.usage is not None
    assert stop.usage.completion_tokens == 1
    on = client.chat.completions.create(
        messages=ASKED, **GREEDY, logit_bias={"2": 100}, extra_body={"ignore_eos": True}
    ).choices[0]
    assert on.finish_reason == "length"


def test_many_streams_at_a_time_are_the_single_answers(client: openai.OpenAI) -> None:
    prompts = ["x" * (1 + number * 3) + str(number) for number in range(16)]

    def ask(prompt: str) -> str:
        chunks = client.completions.create(prompt=prompt, stream=True, **(GREEDY | {"max_tokens": 16}))
        return "".join(chunk.choices[0].text for chunk in chunks)

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, prompts)) == alone


def test_models_are_listed_by_the_last_part_of_their_paths(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


ONE = {"model": "tiny", "messages": ASKED}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "invalid_value", "messages"),
    ({"messages": [{"content": "x"}]}, "invalid_value", "messages"),
    ({"messages": [{"role": "boss", "content": "x"}]}, "invalid_value", "messages"),
    ({"messages": [{"role": "user", "content": "x", "name": "bob"}]}, "unknown_parameter", "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "unsupported_content", "messages"),
    ({"messages": [{"role": "user", "content": 3}]}, "invalid_value", "messages"),
    ({"temperature": -1}, "invalid_value", "temperature"),
    ({"temperature": "hot"}, "invalid_value", "temperature"),
    ({"top_p": 0}, "invalid_value", "top_p"),
    ({"n": 0}, "invalid_value", "n"),
    ({"n": 1000}, "invalid_value", "n"),
    ({"n": True}, "invalid_value", "n"),
    ({"stop": [""]}, "invalid_value", "stop"),
    ({"max_tokens": 0}, "invalid_value", "max_tokens"),
    ({"max_tokens": 100_000}, "context_length_exceeded", "max_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "invalid_value", "max_tokens"),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, "context_length_exceeded", "messages"),
    ({"top_logprobs": 3}, "invalid_value", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
    ({"logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "invalid_value", "logit_bias"),
    ({"stop_token_ids": [99999]}, "invalid_value", "stop_token_ids"),
    ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
    ({"tools": [TOOL], "tool_choice": "required"}, "unsupported_parameter", "tool_choice"),
    ({"tools": [TOOL], "parallel_tool_calls": False}, "unsupported_parameter", "parallel_tool_calls"),
    ({"tools": [{"type": "function"}]}, "invalid_value", "messages"),
    ({"tools": [TOOL | {"function": TOOL["function"] | {"strict": True}}]}, "unsupported_parameter", "tools"),
    ({"tool_choice": "auto"}, "invalid_value", "tool_choice"),
    ({"functions": [{"name": "f"}]}, "unsupported_parameter", "functions"),
    ({"reasoning_effort": "high"}, "unsupported_parameter", "reasoning_effort"),
    ({"temprature": 1}, "unknown_parameter", "temprature"),
    ({"best_of": 2}, "unsupported_parameter", "best_of"),
]


@pytest.mark.parametrize(("change", "code", "param"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_not_honoured_is_an_error_that_names_it(
    client: openai.OpenAI, change: dict[str, Any], code: str, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ONE, extra_body=change)
    assert (caught.value.code, caught.value.param) == (code, param)
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [260]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 3}, "best_of"),
        ({"prompt": ["x"] * 100, "n": 2}, "n"),
        ({"prompt": "x" * 4096, "max_tokens": 1}, "prompt"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_completion_that_cannot_be_had_is_an_error(client: openai.OpenAI, change: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x", extra_body=change)
    assert caught.value.param == param


def test_fields_that_ask_for_nothing_are_taken(client: openai.OpenAI) -> None:
    nothing = {
        "n": 1,
        "stop": None,
        "logit_bias": None,
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "response_format": {"type": "text"},
        "service_tier": "auto",
        "presence_penalty": 0,
        "logprobs": False,
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "tools": [],
        "tool_choice": None,
        "seed": None,
        "stream_options": {"include_usage": True},
        "reasoning_effort": None,
        "function_call": None,
    }
    plain = client.chat.completions.create(messages=ASKED, **GREEDY)
    asked = client.chat.completions.create(messages=ASKED, **GREEDY, extra_body=nothing)
    assert asked.choices == plain.choices


def test_a_reply_goes_back_as_the_client_has_it(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(messages=ASKED, **GREEDY).choices[0].message
    history = [{"role": "system", "content": "s"}, *ASKED, answer.model_dump(), {"role": "user", "content": "more"}]
    assert client.chat.completions.create(messages=history, **GREEDY).choices[0].finish_reason == "length"


def test_any_order_of_roles_that_the_template_allows_is_answered(client: openai.OpenAI) -> None:
    roles = ["user", "user", "assistant", "assistant", "system", "assistant"]
    messages: Any = [{"role": role, "content": f"text {number}"} for number, role in enumerate(roles)]
    assert client.chat.completions.create(messages=messages, **GREEDY).choices[0].finish_reason == "length"


def test_parts_of_text_are_one_text(served: Running, client: openai.OpenAI) -> None:
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "two "}, {"type": "text", "text": "blue red"}]}]
    assert (
        client.chat.completions.create(messages=parts, **GREEDY).choices
        == client.chat.completions.create(messages=ASKED, **GREEDY).choices
    )


def test_the_tutorials_service_call_is_answered(served: Running, client: openai.OpenAI) -> None:
    import httpx2

    asked = {"inputs": " two blue red\n", "max_new_tokens": 12, "do_sample": False, "top_p": 0.85, "temperature": 0.35}
    found = httpx2.post(f"{served.address}/firefly", json=asked | {"repetition_penalty": 1.0}, timeout=60)
    expected = client.chat.completions.create(messages=ASKED, **GREEDY).choices[0].message.content or ""
    assert found.json() == {"input": "two blue red", "output": expected.strip()}
    refused = httpx2.post(f"{served.address}/firefly", json=asked | {"num_beams": 4}, timeout=60)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "num_beams"


def test_metrics_count_requests_and_tokens(served: Running, client: openai.OpenAI) -> None:
    import httpx2

    def read() -> dict[str, float]:
        lines = httpx2.get(f"{served.address}/metrics", timeout=60).text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    before = read()
    answer = client.chat.completions.create(messages=ASKED, **GREEDY)
    after = read()
    assert answer.usage is not None
    prompt = 'firefly_prompt_tokens_total{model="tiny"}'
    assert after[prompt] - before.get(prompt, 0) == answer.usage.prompt_tokens
    path = 'firefly_requests_total{path="/v1/chat/completions",status="200"}'
    assert after[path] - before.get(path, 0) == 1
    assert after["firefly_engine_up"] == 1
    assert after["firefly_cache_tokens"] == 4096
    assert after["firefly_request_seconds_count"] - before["firefly_request_seconds_count"] == 1


def test_the_log_has_a_line_for_each_request_and_nothing_that_was_said(served: Running, client: openai.OpenAI) -> None:
    asked = GREEDY | {"max_tokens": 7}
    client.chat.completions.create(messages=[{"role": "user", "content": "a secret"}], **asked)
    assert until(lambda: any(line.endswith("model=tiny in=105 out=7") for line in served.log)), served.log[-1]
    assert any("POST /v1/chat/completions 200" in line for line in served.log)
    assert "secret" not in json.dumps(served.log)
