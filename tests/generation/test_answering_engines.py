"""Engines: the same answers alone and together, for every architecture; and what becomes of requests that end early."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from firefly.generation.batched import BatchedEngine, BatchLimits, Unbatchable
from firefly.generation.engine import Delta, EngineFull, Request, Token
from firefly.generation.plain import PlainEngine
from firefly.generation.settings import GenerationSettings
from tiny import VOCABULARY, tiny_model, tiny_tokenizer

SMALL = BatchLimits(cache_tokens=2048, batch_tokens=64, max_requests=16, max_waiting=40, page_size=16)
GREEDY = GenerationSettings(max_new_tokens=10, temperature=0, ignore_stop_tokens=True)
PROMPTS = [
    [(place * 37 + number * 11) % 250 + 3 for place in range(size)] for number, size in enumerate((3, 17, 90, 9))
]

Build = Callable[..., Any]


def batched(model: Any, limits: BatchLimits = SMALL, select: Callable[[str], None] = lambda name: None) -> Any:
    return BatchedEngine(model, {"m": tiny_tokenizer(), "n": tiny_tokenizer()}, select, 512, limits)


def plain(model: Any, limits: BatchLimits = SMALL, select: Callable[[str], None] = lambda name: None) -> Any:
    return PlainEngine(model, {"m": tiny_tokenizer(), "n": tiny_tokenizer()}, select, 512, limits.max_waiting)


@pytest.fixture(params=[batched, plain], ids=["batched", "plain"])
def build(request: pytest.FixtureRequest) -> Iterator[Build]:
    engines = []

    def make(*given: Any, **named: Any) -> Any:
        engines.append(request.param(*given, **named))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


class Heard:
    """What an engine told of one request."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.first, self.last = threading.Event(), threading.Event()

    def __call__(self, delta: Delta) -> None:
        self.deltas.append(delta)
        self.first.set()
        if delta.is_last:
            self.last.set()

    @property
    def ids(self) -> list[int]:
        return [token.id for delta in self.deltas for token in delta.tokens]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    def wait(self) -> Heard:
        assert self.last.wait(60)
        return self


def ask(
    engine: Any,
    prompt: Sequence[int],
    settings: GenerationSettings = GREEDY,
    model: str = "m",
    index: int = 0,
    stop_ids: tuple[int, ...] = (),
) -> Heard:
    heard = Heard()
    heard.ticket = engine.submit(Request(tuple(prompt), settings, stop_ids, model, index), heard)  # type: ignore[attr-defined]
    return heard


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """By whole passes, without a cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    ("name", "is_batched"),
    [
        ("llama", True),
        ("mistral_window", True),
        ("gemma3", True),
        ("gpt_neox", True),
        ("qwen3_moe", True),
        ("gemma2", True),
        ("deepseek_v3", False),  # keys and values of unlike widths
        ("mamba", False),
    ],
)
def test_prompts_of_unlike_lengths_are_continued_together_as_each_alone(name: str, is_batched: bool) -> None:
    model = tiny_model(name).eval()
    if not is_batched:
        with pytest.raises(Unbatchable):
            batched(model)
    engine = (batched if is_batched else plain)(model)
    heard = [ask(engine, prompt) for prompt in PROMPTS]
    found = [each.wait().ids for each in heard]
    engine.close()
    assert found == [greedy(model, prompt, GREEDY.max_new_tokens) for prompt in PROMPTS]
    assert all(each.deltas[-1].finish_reason == "length" for each in heard)


def test_a_model_that_was_refused_computes_as_before() -> None:
    model = tiny_model("deepseek_v3").eval()
    expected = greedy(model, PROMPTS[0], 3)
    with pytest.raises(Unbatchable):
        batched(model)
    assert greedy(model, PROMPTS[0], 3) == expected


def test_a_sampled_answer_with_a_seed_is_the_same_alone_and_in_a_batch(build: Build) -> None:
    engine = build(tiny_model("llama").eval())
    settings = GenerationSettings(max_new_tokens=12, temperature=1.2, top_p=0.9, seed=5, ignore_stop_tokens=True)
    alone = ask(engine, PROMPTS[1], settings).wait().ids
    together = [ask(engine, prompt, settings, index=index) for prompt in PROMPTS for index in (0, 1)]
    found = [each.wait().ids for each in together]
    assert found[2] == alone
    assert found[3] != alone


def test_a_stop_token_ends_an_answer_and_is_not_in_its_text(build: Build) -> None:
    model = tiny_model("llama").eval()
    expected = greedy(model, PROMPTS[0], 10)
    stop = expected[4]
    settings = GenerationSettings(max_new_tokens=10, temperature=0)
    heard = ask(build(model), PROMPTS[0], settings, stop_ids=(stop, 1)).wait()
    assert heard.ids == expected[: expected.index(stop) + 1]
    assert heard.deltas[-1].finish_reason == "stop"
    assert heard.text == tiny_tokenizer().decode(heard.ids[:-1], skip_special_tokens=False)


def test_a_stop_text_ends_an_answer_with_the_token_that_completes_it(build: Build) -> None:
    model = tiny_model("llama").eval()
    engine = build(model)
    whole = ask(engine, PROMPTS[0], GenerationSettings(max_new_tokens=20, temperature=0)).wait().text
    stop = whole[5:9]
    settings = GenerationSettings(max_new_tokens=20, temperature=0, stop=(stop,))
    heard = ask(engine, PROMPTS[0], settings).wait()
    assert heard.text == whole[: whole.find(stop)]
    assert heard.deltas[-1].finish_reason == "stop"
    assert stop in tiny_tokenizer().decode(heard.ids)
    assert stop not in tiny_tokenizer().decode(heard.ids[:-1])


def test_a_cancelled_request_ends_and_leaves_the_others(build: Build) -> None:
    model = tiny_model("llama").eval()
    engine = build(model)
    long = GenerationSettings(max_new_tokens=400, temperature=0, ignore_stop_tokens=True)
    ended, kept = ask(engine, PROMPTS[0], long), ask(engine, PROMPTS[1])
    assert ended.first.wait(60)
    ended.ticket.cancel()  # type: ignore[attr-defined]
    assert ended.wait().deltas[-1].finish_reason == "cancelled"
    assert len(ended.ids) < 400
    assert kept.wait().ids == greedy(model, PROMPTS[1], 10)


def test_log_probabilities_are_those_of_the_whole_text(build: Build) -> None:
    model = tiny_model("llama").eval()
    engine = build(model)
    settings = GenerationSettings(max_new_tokens=6, temperature=0, logprobs=2, ignore_stop_tokens=True)
    heard = ask(engine, PROMPTS[1], settings).wait()
    text = [*PROMPTS[1], *heard.ids]
    long = [number % 250 + 3 for number in range(150)]
    scored = engine.score([text, PROMPTS[0], long], "m", 2)
    assert [[token.id for token in tokens] for tokens in scored] == [text, PROMPTS[0], long]
    with torch.no_grad():
        for ids, tokens in zip((text, PROMPTS[0], long), scored, strict=True):
            expected = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
            assert tokens[0] == Token(ids[0])
            for place, token in enumerate(tokens[1:]):
                assert token.logprob == pytest.approx(float(expected[place, token.id]), abs=1e-4)
                assert token.top[0][1] == pytest.approx(float(expected[place].max()), abs=1e-4)
    generated = [token for delta in heard.deltas for token in delta.tokens]
    assert [token.logprob for token in generated] == pytest.approx(
        [token.logprob for token in scored[0][len(PROMPTS[1]) :]], abs=1e-4
    )


def test_two_models_of_one_engine_take_turns_and_keep_their_caches_apart(build: Build) -> None:
    model = tiny_model("llama").eval()
    other = tiny_model("llama", seed=1).eval()
    own = {name: value.clone() for name, value in model.state_dict().items()}
    weights = {"m": own, "n": other.state_dict()}
    engine = build(model, select=lambda name: model.load_state_dict(weights[name]))
    heard = [(name, prompt, ask(engine, prompt, model=name)) for prompt in PROMPTS for name in ("n", "m")]
    found = [each.wait().ids for _, _, each in heard]
    engine.close()
    model.load_state_dict(own)
    assert found == [greedy({"m": model, "n": other}[name], prompt, 10) for name, prompt, _ in heard]


def test_more_requests_than_places_wait_and_are_refused_at_the_limit(build: Build) -> None:
    model = tiny_model("llama").eval()
    engine = build(model, BatchLimits(cache_tokens=512, batch_tokens=32, max_requests=2, max_waiting=6, page_size=16))
    heard, refused = [], 0
    for _ in range(40):
        try:
            heard.append(ask(engine, PROMPTS[0]))
        except EngineFull:
            refused += 1
    assert refused
    assert len(heard) >= 6
    found = [each.wait().ids for each in heard]
    assert found == [greedy(model, PROMPTS[0], 10)] * len(heard)


def test_a_cache_too_small_for_all_at_once_answers_all_of_them() -> None:
    model = tiny_model("llama").eval()
    engine = batched(model, BatchLimits(cache_tokens=160, batch_tokens=64, max_requests=16, page_size=16))
    settings = GenerationSettings(max_new_tokens=40, temperature=0, ignore_stop_tokens=True)
    heard = [ask(engine, prompt, settings) for prompt in PROMPTS for _ in range(2)]
    found = [each.wait().ids for each in heard]
    engine.close()
    assert found == [greedy(model, prompt, 40) for prompt in PROMPTS for _ in range(2)]


def test_a_second_turn_computes_only_what_is_new() -> None:
    model = tiny_model("llama").eval()
    engine = batched(model)
    prompt = [number % 250 + 3 for number in range(120)]
    first = ask(engine, prompt).wait().ids
    lengths = []
    watch = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    again = ask(engine, [*prompt, *first, 5, 6, 7]).wait()
    watch.remove()
    engine.close()
    assert again.ids == greedy(model, [*prompt, *first, 5, 6, 7], 10)
    assert lengths[0] <= 3 + 2 * SMALL.page_size


def test_a_failing_step_is_told_and_the_next_request_answered(build: Build) -> None:
    model = tiny_model("llama").eval()
    engine = build(model)

    def fail(*given: Any, **named: Any) -> None:
        raise RuntimeError("no such luck")

    watch = model.model.register_forward_pre_hook(fail)
    heard = ask(engine, PROMPTS[0]).wait()
    assert "no such luck" in (heard.deltas[-1].error or "")
    watch.remove()
    assert engine.is_alive
    assert ask(engine, PROMPTS[0]).wait().ids == greedy(model, PROMPTS[0], 10)


def test_a_model_whose_cache_does_not_fit_is_told_so_and_the_other_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").eval()
    engine = batched(model)

    def full(*given: Any) -> None:
        raise MemoryError("all of it is used")

    monkeypatch.setattr("firefly.generation.batched._Lane", full)
    assert "--cache_tokens" in (ask(engine, PROMPTS[0], model="n").wait().deltas[-1].error or "")
    assert ask(engine, PROMPTS[0]).wait().ids == greedy(model, PROMPTS[0], 10)
    engine.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_fails_again_and_again_is_dead_and_says_so() -> None:
    model = tiny_model("llama").eval()
    engine = batched(model)

    def fail(*given: Any, **named: Any) -> None:
        raise RuntimeError("no such luck")

    watch = model.model.register_forward_pre_hook(fail)
    for _ in range(3):
        assert ask(engine, PROMPTS[0]).wait().deltas[-1].error
    engine._thread.join(10)
    watch.remove()
    assert not engine.is_alive
    with pytest.raises(RuntimeError):
        ask(engine, PROMPTS[0])


def test_closing_ends_what_runs_or_waits_for_it(build: Build) -> None:
    model = tiny_model("llama").eval()
    engine = build(model)
    heard = [ask(engine, prompt) for prompt in PROMPTS]
    engine.close(drain=True)
    assert [each.wait().ids for each in heard] == [greedy(model, prompt, 10) for prompt in PROMPTS]
    engine = build(model)
    long = GenerationSettings(max_new_tokens=400, temperature=0, ignore_stop_tokens=True)
    heard = [ask(engine, prompt, long) for prompt in PROMPTS]
    engine.close()
    assert {each.wait().deltas[-1].finish_reason for each in heard} == {"cancelled"}
    with pytest.raises(RuntimeError):
        ask(engine, PROMPTS[0])


def test_who_asked_and_is_gone_disturbs_nobody(build: Build) -> None:
    model = tiny_model("llama").eval()
    engine = build(model)

    def gone(delta: Delta) -> None:
        raise RuntimeError("the event loop is closed")

    engine.submit(Request(tuple(PROMPTS[0]), GREEDY, (), "m"), gone)
    assert ask(engine, PROMPTS[1]).wait().ids == greedy(model, PROMPTS[1], 10)


def test_the_model_is_left_as_it_was(build: Build) -> None:
    model = tiny_model("llama")
    model.train()
    state, numbers = torch.get_rng_state(), queue.SimpleQueue[Delta]()
    engine = build(model)
    engine.submit(Request(tuple(PROMPTS[0]), GREEDY, (), "m"), numbers.put)
    engine.close(drain=True)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(torch.get_rng_state(), state)
    assert max(token.id for token in numbers.get().tokens) < VOCABULARY
