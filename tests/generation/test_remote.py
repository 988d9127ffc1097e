"""An engine over another process: what is sent, what is made of what comes, and what goes wrong on the way."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest

from fake_vllm import FakeVllm
from firefly.errors import UsageError
from firefly.generation import remote
from firefly.generation.connecting import connect
from firefly.generation.engine import Delta, EngineFull, Request
from firefly.generation.remote import RemoteEngine, RemoteLimits, Server, ServerError, completion_body
from firefly.generation.settings import GenerationSettings
from tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id
GREEDY = GenerationSettings(max_new_tokens=40, temperature=0, top_p=1)


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def request(prompt: str = "hello", model: str = "base", **changes: Any) -> Request:
    return Request(tuple(encode(prompt)), replace(GREEDY, **changes), (END,), model)


class Answer:
    """Collects what is delivered."""

    def __init__(
        self, engine: RemoteEngine, asked: Request, then: Callable[[Delta], None] = lambda delta: None
    ) -> None:
        self.deltas: list[Delta] = []
        self.then = then
        self._over = threading.Event()
        self.ticket = engine.submit(asked, self.deliver)

    def deliver(self, delta: Delta) -> None:
        assert not self._over.is_set(), "nothing comes behind the last delta"
        self.deltas.append(delta)
        self.then(delta)
        if delta.is_last:
            self._over.set()

    def wait(self) -> Answer:
        assert self._over.wait(10)
        return self

    @property
    def last(self) -> Delta:
        return self.wait().deltas[-1]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.wait().deltas)

    @property
    def ids(self) -> list[int]:
        return [token.id for delta in self.wait().deltas for token in delta.tokens]


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


@pytest.fixture
def server() -> Iterator[FakeVllm]:
    with FakeVllm(encode, ["base", "tuned"]) as running:
        yield running


@pytest.fixture
def engine(server: FakeVllm) -> Iterator[RemoteEngine]:
    made = connect(Server(server.url), {"base": TOKENIZER, "tuned": TOKENIZER}, ["tuned"])
    server.bodies.clear()
    yield made
    made.close()


# ---- answers


def test_an_answer_comes_as_ids_and_is_told_in_whole_characters_up_to_its_stop_token(
    server: FakeVllm, engine: RemoteEngine
) -> None:
    said = [*encode("你好 <|im_start|>"), END, *encode("never seen")]
    server.script = lambda body: said
    answer = Answer(engine, request("hi", "tuned")).wait()
    assert answer.ids == said[: said.index(END) + 1]
    assert answer.text == "你好 <|im_start|>"
    assert all("\ufffd" not in delta.text for delta in answer.deltas)
    assert answer.last.finish_reason == "stop"
    assert server.bodies[0]["prompt"] == encode("hi")
    assert server.bodies[0]["model"] == "tuned"


def test_an_answer_ends_at_its_longest_length_and_at_that_of_the_context(
    server: FakeVllm, engine: RemoteEngine
) -> None:
    server.script = lambda body: encode("x" * 100)
    short = Answer(engine, request(max_new_tokens=3))
    assert (short.text, short.last.finish_reason) == ("xxx", "length")
    long = Answer(engine, request("y" * 124))  # 128 are taken in all
    assert (long.text, long.last.finish_reason) == ("xxxx", "length")


def test_a_stop_text_ends_the_answer_and_the_connection(server: FakeVllm, engine: RemoteEngine) -> None:
    server.script = lambda body: [*encode("one STOP"), *[0.02, 5] * 500]
    answer = Answer(engine, request(stop=("STOP",), max_new_tokens=40))
    assert (answer.text, answer.last.finish_reason) == ("one ", "stop")
    assert eventually(lambda: server.hung_up == {0})


def test_stop_tokens_can_be_ignored(server: FakeVllm, engine: RemoteEngine) -> None:
    server.script = lambda body: [5, END, 6, END, 7]
    answer = Answer(engine, request(ignore_stop_tokens=True, max_new_tokens=5))
    assert answer.ids == [5, END, 6, END, 7]
    assert server.bodies[0]["stop_token_ids"] == []


def test_log_probabilities_are_the_tokens_own_and_so_many_of_the_likeliest(
    server: FakeVllm, engine: RemoteEngine
) -> None:
    server.script = lambda body: [5, 7]
    tokens = [
        token for delta in Answer(engine, request(logprobs=2, max_new_tokens=2)).wait().deltas for token in delta.tokens
    ]
    assert [token.logprob for token in tokens] == [-2.0, -2.0]
    assert tokens[0].top == ((7, -0.25), (8, -1.5))
    alone = Answer(engine, request(logprobs=0, max_new_tokens=1)).wait().deltas[0].tokens[0]
    assert (alone.logprob, alone.top) == (-2.0, ())


def test_requests_at_once_are_not_mixed_up(server: FakeVllm, engine: RemoteEngine) -> None:
    server.script = lambda body: [entry for token in body["prompt"] for entry in (0.001, token)] + [END]
    answers = [Answer(engine, request(f"answer {number}" * (1 + number % 4))) for number in range(32)]
    assert [answer.text for answer in answers] == [f"answer {number}" * (1 + number % 4) for number in range(32)]
    assert eventually(lambda: engine.status().running == engine.status().waiting == 0)


# ---- what is sent


def test_every_setting_is_sent_by_its_name() -> None:
    settings = GenerationSettings(
        max_new_tokens=9,
        temperature=0.7,
        top_p=0.8,
        top_k=11,
        min_p=0.1,
        repetition_penalty=1.5,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        stop=("END",),
        logprobs=4,
    )
    assert completion_body(Request((1, 2), settings, (3, 4), "ours"), "theirs") == {
        "model": "theirs",
        "prompt": [1, 2],
        "max_tokens": 9,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 11,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.5,
        "logit_bias": {},
        "seed": None,
        "ignore_eos": True,
        "stop_token_ids": [3, 4],
        "logprobs": 4,
        "stream": True,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "skip_special_tokens": False,
    }
    biased = Request((1,), replace(GREEDY, logit_bias={17: -3.5}), (), "ours")
    assert completion_body(biased, "theirs")["logit_bias"] == {"17": -3.5}


def test_a_seed_is_of_the_seed_the_prompt_and_the_number_of_the_answer() -> None:
    def seed(prompt: str = "a", index: int = 0, given: int | None = 5) -> Any:
        return completion_body(replace(request(prompt, seed=given), index=index), "m")["seed"]

    assert seed() == seed()
    assert len({seed(), seed("b"), seed(index=1), seed(given=6)}) == 4
    assert 0 <= seed() < 2**63
    assert seed(given=None) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.001},
        {"presence_penalty": 2.5},
        {"frequency_penalty": -3.0},
        {"logit_bias": {5: 120.0}},
        {"repetition_penalty": 1.1, "logit_bias": {5: 1.0}},
    ],
)
def test_a_setting_that_vllm_would_change_in_silence_is_refused(engine: RemoteEngine, changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as error:
        Answer(engine, request(**changes))
    assert error.value.code == "remote.not_honoured"
    assert next(iter(changes)) in str(error.value)


# ---- what goes wrong


ERROR = {"error": {"message": "no room", "type": "BadRequestError", "code": 400}}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([5, None], ""),
        ([5], "finish_reason: None"),
        ([5, {"choices": [{"token_ids": [], "finish_reason": "abort"}]}], "abort"),
        ([5, ERROR], "no room"),
        ([{"error": "no room"}], "no room"),
        ([b"data: {no json\n\n"], ""),
        ([{"choices": [{"text": "without ids"}]}], "token ids"),
        ([{"choices": [{"token_ids": [5]}]}], "log-probabilities"),
    ],
)
def test_a_stream_that_breaks_ends_its_answer_with_an_error_and_no_other(
    server: FakeVllm, engine: RemoteEngine, said: list[Any], expected: str
) -> None:
    server.script = lambda body: said if body["prompt"] == encode("bad") else [6, END]
    bad, good = Answer(engine, request("bad", logprobs=0)), Answer(engine, request("good"))
    assert bad.last.finish_reason is None
    assert server.url in str(bad.last.error)
    assert expected in str(bad.last.error)
    assert good.last.finish_reason == "stop"
    assert engine.is_alive


def test_what_the_server_refuses_is_told_in_its_words(server: FakeVllm, engine: RemoteEngine) -> None:
    server.names.remove("tuned")
    assert "The model `tuned` does not exist." in str(Answer(engine, request(model="tuned")).last.error)
    with pytest.raises(RuntimeError, match="does not exist"):
        engine.score([[1, 2]], "tuned", 0)


def test_a_cancelled_request_ends_at_once_and_at_the_server(server: FakeVllm, engine: RemoteEngine) -> None:
    server.script = lambda body: [0.02, 5] * 500
    answer = Answer(engine, request())
    assert eventually(lambda: bool(answer.deltas))
    answer.ticket.cancel()
    assert answer.last.finish_reason == "cancelled"
    assert eventually(lambda: server.hung_up == {0})
    answer.ticket.cancel()  # which is nothing now


def test_a_request_is_cancelled_before_its_first_token(server: FakeVllm, engine: RemoteEngine) -> None:
    server.script = lambda body: [60.0]
    answer = Answer(engine, request())
    assert eventually(lambda: len(server.bodies) == 1)
    assert (engine.status().running, engine.status().waiting) == (0, 1)
    answer.ticket.cancel()
    assert answer.last.finish_reason == "cancelled"


def test_one_may_cancel_from_where_an_answer_is_delivered(server: FakeVllm, engine: RemoteEngine) -> None:
    server.script = lambda body: [0.02, 5] * 500
    ready = threading.Event()

    def cancel(delta: Delta) -> None:
        ready.wait(10)
        answer.ticket.cancel()

    answer = Answer(engine, request(), cancel)
    ready.set()
    assert answer.last.finish_reason == "cancelled"


def test_more_requests_than_may_wait_are_refused(server: FakeVllm) -> None:
    server.script = lambda body: [60.0]
    engine = RemoteEngine(Server(server.url), {"base": "base"}, {"base": TOKENIZER}, 64, limits=RemoteLimits(1, 1))
    answers = [Answer(engine, request()) for _ in range(2)]
    with pytest.raises(EngineFull):
        Answer(engine, request())
    engine.close()
    assert [answer.last.finish_reason for answer in answers] == ["cancelled"] * 2


def test_closing_waits_for_answers_if_it_drains_and_takes_on_no_more(server: FakeVllm) -> None:
    server.script = lambda body: [5, 0.2, 6, END]
    engine = RemoteEngine(Server(server.url), {"base": "base"}, {"base": TOKENIZER}, 64)
    answer = Answer(engine, request())
    engine.close(drain=True)
    assert answer.ids == [5, 6, END]
    assert not engine.is_alive
    with pytest.raises(RuntimeError):
        Answer(engine, request())
    with pytest.raises(RuntimeError):
        engine.score([[1]], "base", 0)


def test_a_server_that_is_no_longer_well_ends_the_engine_for_good(
    server: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "WATCHED_EVERY", 0.02)
    server.script = lambda body: [60.0]
    engine = RemoteEngine(Server(server.url), {"base": "base"}, {"base": TOKENIZER}, 64)
    waiting = Answer(engine, request())
    assert eventually(lambda: len(server.bodies) == 1)
    server.healthy = False
    assert "503" in str(waiting.last.error)
    assert not engine.is_alive
    server.healthy = True
    time.sleep(0.1)
    assert not engine.is_alive
    with pytest.raises(RuntimeError, match="503"):
        Answer(engine, request())
    engine.close(drain=True)


# ---- scores


def test_a_text_is_scored_by_the_log_probabilities_of_its_tokens(engine: RemoteEngine) -> None:
    long, short, empty = engine.score([[4, 5, 6], [7], []], "tuned", 1)
    assert [token.id for token in long] == [4, 5, 6]
    assert [token.logprob for token in long] == [None, -1.0, -1.0]
    assert [token.top for token in long] == [(), ((9, -0.5),), ((9, -0.5),)]
    assert [token.id for token in short] == [7]
    assert empty == []


# ---- which server it is


def test_a_base_may_have_another_name_at_the_server(server: FakeVllm) -> None:
    engine = connect(Server(server.url + "/v1/"), {"smollm2": TOKENIZER, "tuned": TOKENIZER}, ["tuned"])
    server.script = lambda body: [END]
    Answer(engine, request(model="smollm2")).wait()
    assert (engine.models, engine.context_length) == (("smollm2", "tuned"), 128)
    assert server.bodies[-1]["model"] == "base"
    engine.close()


def test_an_adapter_that_the_server_lacks_is_refused_with_what_it_has(server: FakeVllm) -> None:
    with pytest.raises(UsageError, match="does not serve other; it has base, tuned"):
        connect(Server(server.url), {"base": TOKENIZER, "other": TOKENIZER}, ["other"])
    with pytest.raises(UsageError, match="does not serve other; it has base, tuned"):  # not the base for it
        connect(Server(server.url), {"other": TOKENIZER}, ["other"])


def test_an_adapter_may_be_served_without_its_base(server: FakeVllm) -> None:
    engine = connect(Server(server.url), {"tuned": TOKENIZER}, ["tuned"])
    assert (engine.models, engine.context_length) == (("tuned",), 128)
    assert server.bodies[-1]["model"] == "tuned"
    engine.close()


def other_vocabulary(server: FakeVllm) -> None:
    server.encode = lambda text: [1, 2, 3]


def no_bias(server: FakeVllm) -> None:
    server.knows_bias, server.script = False, lambda body: [5, 6]


def no_ids(server: FakeVllm) -> None:
    server.gives_ids = False


def processed(server: FakeVllm) -> None:
    server.raw = False


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        (other_vocabulary, "remote.other_vocabulary", "vocabulary"),
        (no_bias, "remote.other_answers", "logit_bias"),
        (no_ids, "remote.other_answers", "token ids"),
        (processed, "remote.other_answers", "raw_logprobs"),
    ],
)
def test_a_server_that_is_not_what_it_is_taken_for_is_refused(
    server: FakeVllm, fault: Callable[[FakeVllm], None], code: str, says: str
) -> None:
    fault(server)
    with pytest.raises(UsageError, match=says) as error:
        connect(Server(server.url), {"base": TOKENIZER})
    assert error.value.code == code


def test_a_vocabulary_that_cannot_be_compared_is_said(server: FakeVllm, capsys: pytest.CaptureFixture[str]) -> None:
    server.tokenizes = False
    connect(Server(server.url), {"base": TOKENIZER}).close()
    assert "could not be checked: 404" in capsys.readouterr().err


def test_a_server_is_asked_with_its_key(server: FakeVllm) -> None:
    server.key = "secret"
    connect(Server(server.url, "secret"), {"base": TOKENIZER}).close()
    with pytest.raises(UsageError, match="401 Unauthorized"):
        connect(Server(server.url, "wrong"), {"base": TOKENIZER})


def test_an_address_where_nothing_listens_is_an_error_of_the_users(server: FakeVllm) -> None:
    server.server_close()
    with pytest.raises(UsageError) as error:
        connect(Server(server.url), {"base": TOKENIZER})
    assert error.value.code == "remote.no_server"


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "ftp://host", "http://", "http://host:port", "http://[::1", "http://host:99999"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UsageError) as error:
        Server(url)
    assert error.value.code == "remote.bad_url"


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("http://host:1", "/v1/models"),
        ("http://host:1/v1/", "/v1/models"),
        ("http://host:1/llm/v1", "/llm/v1/models"),
        ("http://host:1/llm", "/llm/v1/models"),
        ("http://host:1/api/paas/v4", "/api/paas/v4/models"),
        ("http://host:1/v1beta/openai/", "/v1beta/openai/models"),
    ],
)
def test_an_address_keeps_the_version_that_it_names(url: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    connection = Server(url).connect(1)
    monkeypatch.setattr(connection, "request", lambda method, path, **rest: sent.append(path))
    Server(url).send(connection, "/v1/models", None)
    Server(url.replace("/v1beta/openai/", "").replace("/api/paas/v4", "")).send(connection, "/health", None)
    assert sent == [path, path.partition("/v1")[0].partition("/api")[0] + "/health"]


@contextmanager
def listening(say: Callable[[socket.socket], None]) -> Iterator[Server]:
    """A server of one connection, on which `say` writes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with listener.accept()[0] as client:
                client.recv(1 << 16)
                with suppress(OSError):
                    say(client)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield Server(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join(10)


def test_a_server_that_keeps_a_connection_open_with_blanks_does_not_hold_us_for_ever() -> None:
    def trickle(client: socket.socket) -> None:
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(100):
            client.sendall(b"\n")
            time.sleep(0.05)

    with listening(trickle) as server, pytest.raises(TimeoutError, match="no whole answer"):
        server.ask("/v1/models", seconds=0.3)


def test_an_answer_that_breaks_off_is_none() -> None:
    short = b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"data": []}'
    with listening(lambda client: client.sendall(short)) as server, pytest.raises(http.client.IncompleteRead):
        server.ask("/v1/models")


def test_an_error_says_its_status_and_when_to_ask_again() -> None:
    busy = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n"
    with listening(lambda client: client.sendall(busy)) as server, pytest.raises(ServerError) as error:
        server.ask("/v1/models")
    assert (error.value.status, error.value.retry_after) == (429, 7.0)


def test_a_key_is_not_shown() -> None:
    assert "secret" not in repr(Server("http://host", "secret"))
