"""Models that are asked by the network: what is sent, what is made of an answer, and what goes wrong on the way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fake_openai import FakeOpenAI, Hangup, Refusal, asked
from firefly.console import take_notices
from firefly.data.schema import Message
from firefly.errors import UsageError
from firefly.evaluation import endpoints
from firefly.evaluation.endpoints import Endpoint, without_thoughts
from firefly.evaluation.measurement import GivenAnswer, Question

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI(lambda body: f"You said: {asked(body)}") as running:
        yield running


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "PAUSES", (0.01, 0.01))
    monkeypatch.setattr(endpoints, "LONGEST_PAUSE", 0.05)


def ask(*texts: str) -> list[Question]:
    return [Question(f"q{number}", "held_out", (Message.of("user", text),)) for number, text in enumerate(texts)]


def once(failure: Exception) -> Callable[[dict[str, Any]], str]:
    """A script that fails on the first request."""
    failures = [failure]

    def script(body: dict[str, Any]) -> str:
        if failures:
            raise failures.pop()
        return "well"

    return script


# ---- what is sent


def test_answers_come_in_the_order_of_the_questions_with_tokens_and_reason(server: FakeOpenAI) -> None:
    ticks: list[int] = []
    answers = Endpoint(server.url).answer(ask("one", "two", "三"), 9, lambda: ticks.append(1))
    assert answers == tuple(
        GivenAnswer(f"q{number}", f"You said: {text}", 7, "stop") for number, text in enumerate(("one", "two", "三"))
    )
    assert len(ticks) == 3
    body = next(body for body in server.bodies if asked(body) == "三")
    assert body == {
        "path": "/v1/chat/completions",
        "model": "judge",
        "messages": [{"role": "user", "content": "三"}],
        "max_tokens": 9,
        "temperature": 0,
    }
    assert set(server.keys) == {None}


def test_no_question_asks_nobody() -> None:
    assert Endpoint("http://127.0.0.1:1").answer([], 9) == ()


def test_a_plain_text_is_gone_on_with_and_its_key_sent(server: FakeOpenAI) -> None:
    server.script = lambda body: " and on"
    (answer,) = Endpoint(server.url.removesuffix("/v1"), "judge", "secret").answer(
        [Question("t", "held_out", text="Once")], 5
    )
    assert answer == GivenAnswer("t", " and on", 7, "stop")
    assert server.bodies == [
        {"path": "/v1/completions", "model": "judge", "prompt": "Once", "max_tokens": 5, "temperature": 0}
    ]
    assert server.keys == ["Bearer secret"]


def test_tools_and_calls_are_sent_with_identifiers_and_without_thoughts(server: FakeOpenAI) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}
    messages = (
        Message.of("user", "weather?"),
        Message.of("assistant", "", reasoning="hm", tool_calls=(call,)),
        Message.of("tool", "sunny", name="weather"),
    )
    Endpoint(server.url).answer([Question("q", "held_out", messages, tools=(WEATHER,))], 5)
    (body,) = server.bodies
    assert body["tools"] == [WEATHER]
    _, called, answered = body["messages"]
    assert called["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "北京"}'}
    assert called["tool_calls"][0]["id"] == answered["tool_call_id"] != ""
    assert "reasoning_content" not in called


def test_questions_are_put_at_a_time_as_many_as_are_allowed(server: FakeOpenAI) -> None:
    together = threading.Barrier(3, timeout=5)
    server.script = lambda body: f"{together.wait()} of three"
    answers = Endpoint(server.url, concurrency=3).answer(ask(*"abcdef"), 5)
    assert [answer.error for answer in answers] == [None] * 6
    assert server.most_at_once == 3
    server.most_at_once, server.script = 0, lambda body: "x"
    Endpoint(server.url, concurrency=1).answer(ask(*"abcdef"), 5)
    assert server.most_at_once == 1


# ---- what is made of an answer


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "plain"}, "plain"),
        ({"content": "<think>\nhm\n</think>\n\nsaid"}, "said"),
        ({"content": "hm, the prompt opened it\n</think>\n\nsaid"}, "said"),
        ({"content": "<think>\nhm, it never"}, ""),
        ({"content": "said", "reasoning_content": "hm"}, "said"),
        ({"content": None, "reasoning": "hm"}, ""),
        ({"content": [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]}, "two parts"),
        (
            {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"city": "北京"}'}}]},
            '{"name": "f", "arguments": {"city": "北京"}}',
        ),
        (
            {"content": "I look.", "tool_calls": [{"function": {"name": "f", "arguments": "{broken"}}]},
            'I look.\n{"name": "f", "arguments": "{broken"}',
        ),
    ],
)
def test_a_reply_is_what_was_said(server: FakeOpenAI, message: dict[str, Any], text: str) -> None:
    server.script = lambda body: {"role": "assistant", "finish_reason": "tool_calls", **message}
    (answer,) = Endpoint(server.url).answer(ask("?"), 5)
    assert (answer.text, answer.finish_reason, answer.error) == (text, "stop", None)


def test_a_mark_that_is_talked_about_is_no_thought() -> None:
    said = "Write <think> in front and </think> behind."
    assert without_thoughts(said) == said


def test_an_answer_that_was_cut_says_so(server: FakeOpenAI) -> None:
    server.script = lambda body: {"content": "long", "finish_reason": "length"}
    assert Endpoint(server.url).answer(ask("?"), 5)[0].finish_reason == "length"


# ---- which model


def test_of_several_models_one_has_to_be_named(server: FakeOpenAI) -> None:
    server.models = ("one", "two")
    with pytest.raises(UsageError, match="one, two") as error:
        Endpoint(server.url).answer(ask("?"), 5)
    assert error.value.code == "endpoint.which_model"
    assert Endpoint(server.url, "two").answer(ask("?"), 5)[0].text


def test_a_model_that_is_not_served_is_told_with_those_that_are(server: FakeOpenAI) -> None:
    def script(body: dict[str, Any]) -> str:
        raise Refusal(404, "The model `jugde` does not exist.")

    server.script = script
    with pytest.raises(UsageError, match=r"does not serve jugde; it has judge.*does not exist") as error:
        Endpoint(server.url, "jugde").answer(ask("a", "b"), 5)
    assert error.value.code == "endpoint.no_model"


# ---- settings that it refuses


def test_the_longest_answer_is_named_as_the_endpoint_likes_it_and_so_it_stays(server: FakeOpenAI) -> None:
    def script(body: dict[str, Any]) -> str:
        if "max_tokens" in body:
            raise Refusal(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        return "fine"

    server.script = script
    answers = Endpoint(server.url, concurrency=1).answer(ask("a", "b", "c"), 5)
    assert [answer.text for answer in answers] == ["fine"] * 3
    assert [body.get("max_completion_tokens") for body in server.bodies] == [None, 5, 5, 5]


def test_a_context_that_is_too_short_is_told_in_the_first_words_of_the_endpoint(server: FakeOpenAI) -> None:
    def script(body: dict[str, Any]) -> str:
        if "max_completion_tokens" in body:
            raise Refusal(422, "unknown field max_completion_tokens")
        if asked(body) == "long":
            raise Refusal(400, "the context has 10 tokens, but max_tokens = 5")
        return "fine"

    server.script = script
    answers = Endpoint(server.url, concurrency=1).answer(ask("long", "short"), 5)
    assert answers[0].error == "400 Bad Request: the context has 10 tokens, but max_tokens = 5"
    assert answers[1].text == "fine"


def test_a_temperature_that_is_refused_is_left_out_and_said(
    server: FakeOpenAI, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(body: dict[str, Any]) -> str:
        if "max_tokens" in body:
            raise Refusal(400, "'max_tokens' is not supported with this model.")
        if "temperature" in body:
            raise Refusal(400, "'temperature' does not support 0 with this model.")
        return "fine"

    take_notices()
    server.script = script
    assert [answer.text for answer in Endpoint(server.url).answer(ask("a", "b"), 5)] == ["fine", "fine"]
    assert [each["code"] for each in take_notices()] == ["endpoint.no_temperature"]
    assert "refuses temperature 0" in capsys.readouterr().err


# ---- what goes wrong


@pytest.mark.parametrize("failure", [Refusal(429), Refusal(503, Retry_After="9"), Refusal(500), Hangup()])
def test_a_busy_endpoint_is_asked_again(server: FakeOpenAI, failure: Exception) -> None:
    server.script = once(failure)
    (answer,) = Endpoint(server.url).answer(ask("?"), 5)
    assert (answer.text, answer.error, len(server.bodies)) == ("well", None, 2)


def test_an_endpoint_says_itself_when_to_ask_again_but_not_for_ever(
    server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "LONGEST_PAUSE", 1.5)
    for asked_for, least, most in (("1", 1.0, 1.45), ("100", 1.5, 3)):
        server.script = once(Refusal(429, Retry_After=asked_for))
        started = time.monotonic()
        assert Endpoint(server.url, "judge").answer(ask("?"), 5)[0].text == "well"
        assert least <= time.monotonic() - started < most


def test_a_question_that_fails_has_an_error_and_the_others_their_answers(server: FakeOpenAI) -> None:
    def script(body: dict[str, Any]) -> str:
        if asked(body) == "bad":
            raise Refusal(400, "not this one")
        return "fine"

    server.script = script
    good, bad = Endpoint(server.url).answer(ask("good", "bad"), 5)
    assert (good.text, good.error) == ("fine", None)
    assert (bad.text, bad.error, bad.key) == ("", "400 Bad Request: not this one", "q1")


def test_an_answer_of_another_kind_is_an_error(server: FakeOpenAI) -> None:
    kinds = {"list": b"[]", "empty": b'{"choices": []}', "page": b"<html>", "null": b"null", "good": b""}
    server.script = lambda body: kinds[asked(body)] or "fine"
    answers = Endpoint(server.url).answer(ask(*kinds), 5)
    assert [bool(answer.error) for answer in answers] == [True, True, True, True, False]


def test_a_wrong_key_ends_it_at_once(server: FakeOpenAI) -> None:
    def script(body: dict[str, Any]) -> str:
        raise Refusal(401, "Incorrect API key")

    server.script = script
    with pytest.raises(UsageError, match=r"401 Unauthorized: Incorrect API key.*API key right") as error:
        Endpoint(server.url, "judge", "wrong", concurrency=2).answer(ask(*"abcdefgh"), 5)
    assert error.value.code == "endpoint.no_answers"
    assert len(server.bodies) <= 3
    assert "wrong" not in str(error.value)


def test_nobody_there_ends_it_soon(server: FakeOpenAI) -> None:
    server.shutdown()
    server.server_close()
    started = time.monotonic()
    with pytest.raises(UsageError, match="Is it running") as error:
        Endpoint(server.url, "judge").answer(ask(*map(str, range(500))), 5)
    assert error.value.code == "endpoint.no_answers"
    with pytest.raises(UsageError, match="Is it running") as error:
        Endpoint(server.url).answer(ask("a"), 5)
    assert error.value.code == "endpoint.no_list"
    assert time.monotonic() - started < 5


def test_a_server_that_dies_on_the_way_leaves_what_was_answered(server: FakeOpenAI) -> None:
    def script(body: dict[str, Any]) -> str:
        if asked(body) != "first":
            raise Hangup
        return "fine"

    server.script = script
    answers = Endpoint(server.url, concurrency=1).answer(ask("first", *map(str, range(50))), 5)
    assert answers[0].text == "fine"
    assert all(answer.error for answer in answers[1:])
    assert len(server.bodies) == 1 + endpoints.FAILURES * 3


def test_a_silent_endpoint_is_not_waited_for_again(server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "LONGEST", 0.2)
    release = threading.Event()
    server.script = lambda body: "slow" if asked(body) == "a" and release.wait(5) else "fast"
    slow, fast = Endpoint(server.url).answer(ask("a", "b"), 5)
    release.set()
    assert slow.error
    assert fast.text == "fast"
    assert len(server.bodies) == 2


@pytest.mark.parametrize("url", ["", "host:1", "ftp://host", "http://"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UsageError) as error:
        Endpoint(url)
    assert error.value.code == "endpoint.bad_url"


def test_at_least_one_question_is_put_at_a_time() -> None:
    with pytest.raises(UsageError) as error:
        Endpoint("http://host", concurrency=0)
    assert error.value.code == "endpoint.bad_concurrency"


def test_what_is_shown_of_an_endpoint_holds_no_secret() -> None:
    endpoint = Endpoint("https://me:password@host:8/v1?key=token", "judge", "secret")
    assert endpoint.shown_url == "https://host:8/v1"
    assert "secret" not in repr(endpoint)
