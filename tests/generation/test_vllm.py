"""vLLM behind the same door: how it is started and ended, what it is not given, and that it answers as we do."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fake_vllm import FakeVllm
from firefly.config import ModelConfig, load_config
from firefly.errors import UsageError
from firefly.generation import vllm
from firefly.generation.engine import Delta, Request, Token
from firefly.generation.remote import RemoteEngine, Server
from firefly.generation.settings import GenerationSettings
from firefly.generation.vllm import (
    EngineChoice,
    VllmProcess,
    free_port,
    lora_room,
    open_vllm,
    refuse_unserved,
    start_vllm,
    vllm_command,
    vllm_environment,
)
from firefly.models.loading import EMBEDDED, load_tokenizer, resolve_model
from firefly.models.saved_adapter import open_adapter
from firefly.training import train
from tiny import randomise_adapters, save_tiny_model, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def save_adapter(folder: Path, **changes: Any) -> Path:
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | changes
    wrapped = randomise_adapters(get_peft_model(tiny_model("llama"), LoraConfig(**settings)))
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder


class Collected:
    """An answer, delta by delta."""

    def __init__(self, engine: RemoteEngine, asked: Request) -> None:
        self.deltas: list[Delta] = []
        self._over = threading.Event()
        self.ticket = engine.submit(asked, self.deliver)

    def deliver(self, delta: Delta) -> None:
        self.deltas.append(delta)
        if delta.is_last:
            self._over.set()

    def wait(self) -> Collected:
        assert self._over.wait(300)
        assert self.deltas[-1].error is None
        return self

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def tokens(self) -> list[Token]:
        return [token for delta in self.deltas for token in delta.tokens]


def has_ended(pid: int, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state == "Z":  # ended, and nobody has asked how
            return True
        time.sleep(0.02)
    return False


# ---- the command line


def test_the_command_line_of_a_base_alone() -> None:
    assert vllm_command("/env/bin/python", "/models/qwen", "qwen", {}, port=8123, dtype="float32") == [
        "/env/bin/python",
        *("-m", "vllm.entrypoints.openai.api_server"),
        *("--host", "127.0.0.1", "--port", "8123"),
        *("--model", "/models/qwen", "--served-model-name", "qwen", "--dtype", "float32"),
        *("--generation-config", "vllm", "--logprobs-mode", "raw_logprobs", "--max-logprobs", "20"),
        "--disable-uvicorn-access-log",
    ]


def test_the_command_line_of_adapters_with_all_options(tmp_path: Path) -> None:
    first = open_adapter(str(save_adapter(tmp_path / "first", r=17)))
    second = open_adapter(str(save_adapter(tmp_path / "second", r=4, target_modules=["k_proj"])))
    command = vllm_command(
        "python",
        "org/name",
        "name",
        {"a": Path("/runs/a"), "b=c": Path("/runs/b"), "d": Path("/runs/x,y")},
        port=1,
        dtype="bfloat16",
        room=lora_room([first, second, second]),
        context_length=4096,
        revision="main",
        trust_remote_code=True,
        more=["--dtype", "auto"],
    )
    plain = vllm_command("python", "org/name", "name", {}, port=1, dtype="bfloat16")
    assert command[: len(plain)] == plain
    assert command[len(plain) :] == [
        *("--max-model-len", "4096", "--revision", "main", "--trust-remote-code"),
        *("--enable-lora", "--max-lora-rank", "32", "--max-loras", "4"),
        *("--lora-target-modules", "k_proj", "q_proj", "v_proj"),
        *("--lora-modules", "a=/runs/a", '{"name": "b=c", "path": "/runs/b"}', '{"name": "d", "path": "/runs/x,y"}'),
        *("--dtype", "auto"),
    ]


def test_another_interpreter_gets_no_packages_of_ours_and_its_key_by_the_environment() -> None:
    given = {"PATH": "/bin", "PYTHONPATH": "/ours", "VIRTUAL_ENV": "/ours", "VLLM_CPU_KVCACHE_SPACE": "1"}
    assert vllm_environment(given, "secret", offline=True) == {
        "PATH": "/bin",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_API_KEY": "secret",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    assert "HF_HUB_OFFLINE" not in vllm_environment(given, "secret", offline=False)


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"engine": "sglang"}, "engine.unknown"),
        ({"python": "python"}, "engine.not_vllm"),
        ({"url": "http://host"}, "engine.not_vllm"),
        ({"engine": "vllm", "url": "http://host", "python": "python"}, "engine.two_places"),
        ({"engine": "vllm", "url": "http://host", "arguments": "--x"}, "engine.two_places"),
        ({"engine": "vllm", "api_key": "k"}, "engine.key_without_url"),
        ({"engine": "vllm", "arguments": "--x 'y"}, "engine.bad_arguments"),
    ],
)
def test_options_that_contradict_each_other_are_refused(given: dict[str, str], code: str) -> None:
    with pytest.raises(UsageError) as error:
        EngineChoice(**given)
    assert error.value.code == code


def test_vllm_needs_an_interpreter_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FIREFLY_VLLM_PYTHON", raising=False)
    with pytest.raises(UsageError) as error:
        EngineChoice("vllm").find_python()
    assert error.value.code == "engine.no_python"
    monkeypatch.setenv("FIREFLY_VLLM_PYTHON", "/nowhere/python")
    with pytest.raises(UsageError) as error:
        EngineChoice("vllm").find_python()
    assert error.value.code == "engine.bad_python"
    assert EngineChoice("vllm", sys.executable).find_python() == sys.executable


# ---- what it is not given


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [5, 6]}, "trainable_token_indices"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"r": 513}, "its r"),
    ],
)
def test_an_adapter_that_vllm_serves_otherwise_or_not_at_all_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    saved = open_adapter(str(save_adapter(tmp_path, **changes)))
    with pytest.raises(UsageError, match=reason) as error:
        refuse_unserved(saved)
    assert error.value.code == "vllm.adapter_not_served"


def test_an_adapter_with_a_whole_matrix_in_its_file_is_refused_and_a_plain_one_is_not(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_adapter(tmp_path, target_modules=["q_proj", "embed_tokens"])
    refuse_unserved(open_adapter(str(folder)))
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] = tiny_model("llama").model.embed_tokens.weight
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="embed_tokens"):
        refuse_unserved(open_adapter(str(folder)))


def test_four_bit_weights_are_refused() -> None:
    with pytest.raises(UsageError) as error:
        open_vllm(EngineChoice("vllm"), ModelConfig(), {}, {"base": TOKENIZER}, load_in_4bit=True)
    assert error.value.code == "vllm.in_4_bits"


# ---- its process


def start(code: str, *arguments: str) -> VllmProcess:
    return start_vllm([sys.executable, "-c", code, *arguments], dict(os.environ))


def test_one_that_does_not_start_is_told_with_its_first_error_and_its_log(capsys: pytest.CaptureFixture[str]) -> None:
    process = start(
        "print('loading\\n(worker) ValueError: no such model', flush=True); raise RuntimeError('see above')"
    )
    with pytest.raises(UsageError, match=r"code 1: ValueError: no such model Its log: ") as error:
        process.wait_until_healthy(Server("http://127.0.0.1:9"))
    process.stop()
    assert str(process.log) in str(error.value)
    assert "loading" in process.log.read_text()
    assert "-c 'print('\"'\"'loading" in capsys.readouterr().err  # how it was started


def test_one_that_never_answers_is_given_up() -> None:
    process = start("import time; time.sleep(60)")
    with pytest.raises(UsageError, match="did not answer within 0 seconds"):
        process.wait_until_healthy(Server("http://127.0.0.1:9"), seconds=0.3)
    process.stop()
    assert process.failure() is not None


CHILDREN = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def child_of(process: VllmProcess) -> int:
    deadline = time.monotonic() + 10
    while not (text := process.log.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return int(text)


def test_stopping_ends_the_processes_that_it_has_started_too() -> None:
    process = start(CHILDREN)
    child = child_of(process)
    process.stop()
    assert has_ended(child)


def test_one_that_takes_no_notice_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "STOPS_WITHIN", 0.3)
    process = start(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(0, flush=True); time.sleep(60)"
    )
    child_of(process)
    process.stop()
    assert process.failure() is not None


KILLED = """
import os, signal, sys
from pathlib import Path
from firefly.generation.vllm import VllmProcess
process = VllmProcess([sys.executable, "-c", sys.argv[2]], os.environ, Path(sys.argv[1]))
while not Path(sys.argv[1]).read_text().strip():
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_it_does_not_outlive_us_even_where_we_are_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(log), CHILDREN], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert has_ended(int(log.read_text()))


def fake_python(folder: Path) -> Path:
    """An interpreter that takes vLLM's module for the fake one."""
    folder.mkdir(exist_ok=True)
    fake = Path(__file__).parents[1] / "fake_vllm.py"
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" "{fake}" "$@"\n')
    python.chmod(0o755)
    return python


def test_it_is_started_answers_and_is_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_model(tmp_path / "model")
    adapter = save_adapter(tmp_path / "adapter")
    (adapter / "run.json").write_text(json.dumps({"config": {"train_mode": "qlora"}}))
    engine = open_vllm(
        EngineChoice("vllm", str(fake_python(tmp_path / "env"))),
        ModelConfig(name_or_path=str(model)),
        {"tuned": str(adapter)},
        {"base": TOKENIZER, "tuned": TOKENIZER},
    )
    said = capsys.readouterr().err
    assert f"--lora-modules tuned={adapter}" in said
    assert "trained on 4-bit weights" in said
    asked = Request((5, 6), GenerationSettings(max_new_tokens=2, temperature=0), (TOKENIZER.eos_token_id,), "tuned")
    assert [token.id for token in Collected(engine, asked).wait().tokens] == [5, 6]
    process = engine._process
    assert isinstance(process, VllmProcess)
    engine.close()
    assert process.failure() is not None


def test_when_its_process_ends_the_engine_has_failed_and_says_why(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    choice = EngineChoice("vllm", str(fake_python(tmp_path / "env")))
    engine = open_vllm(choice, ModelConfig(name_or_path=str(model)), {}, {"base": TOKENIZER})
    process = engine._process
    assert isinstance(process, VllmProcess)
    os.killpg(process._process.pid, signal.SIGKILL)
    process._process.wait(10)
    assert not engine.is_alive
    with pytest.raises(RuntimeError, match=r"the engine has ended|vLLM has ended"):
        engine.submit(Request((5,), GenerationSettings(), (), "base"), lambda delta: None)
    engine.close()


def test_one_that_is_refused_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[VllmProcess] = []

    def remember(*given: Any) -> VllmProcess:
        started.append(start_vllm(*given))
        return started[0]

    monkeypatch.setattr(vllm, "start_vllm", remember)
    model = save_tiny_model(tmp_path / "model")
    choice = EngineChoice("vllm", str(fake_python(tmp_path / "env")))

    def encode(text: str, **options: Any) -> dict[str, list[int]]:
        raise ValueError("no such tokenizer")

    with pytest.raises(ValueError, match="no such tokenizer"):
        open_vllm(choice, ModelConfig(name_or_path=str(model)), {}, {"base": encode})
    assert started[0].failure() is not None


def test_one_that_runs_already_is_used_and_left_running() -> None:
    def encode(text: str) -> list[int]:
        return TOKENIZER(text, add_special_tokens=False)["input_ids"]

    with FakeVllm(encode) as server:
        open_vllm(EngineChoice("vllm", url=server.url), ModelConfig(), {}, {"mine": TOKENIZER}).close()
        assert Server(server.url).ask("/v1/models")["data"][0]["id"] == "base"


def test_a_port_that_is_free_can_be_had() -> None:
    assert 1024 < free_port() < 65536


def test_the_page_has_the_same_commands_in_both_languages_with_options_that_go_together() -> None:
    pages = Path(__file__).resolve().parents[2] / "docs"

    def commands(page: str) -> list[list[str]]:
        blocks = "".join(re.findall(r"```bash\n(.*?)```", (pages / page).read_text("utf-8"), re.DOTALL))
        return [shlex.split(line) for line in blocks.replace("\\\n", " ").splitlines()]

    assert commands("vllm.md") == commands("zh/vllm.md")
    for _, *words in (command for command in commands("vllm.md") if command[0] == "firefly"):
        given = {
            word.removeprefix("--engine_"): words[place + 1] for place, word in enumerate(words) if "--engine" in word
        }
        engine = given.pop("--engine")
        assert EngineChoice(engine, **given).is_vllm
        assert given


# ---- the real one


QUESTIONS = ["Who are you?", "What is the capital of France?", "你好", "Write one sentence about a fox.", "1 + 1 ="]


@dataclass(frozen=True)
class Real:
    """vLLM with the small model and an adapter that we trained, and the same two in transformers, all in fp32."""

    engine: RemoteEngine
    models: dict[str, Any]
    tokenizer: Any

    def prompt(self, question: str) -> tuple[int, ...]:
        messages = [{"role": "user", "content": question}]
        return tuple(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    def request(self, question: str, model: str, **changes: Any) -> Request:
        settings = replace(GenerationSettings(max_new_tokens=24, temperature=0, top_p=1), **changes)
        return Request(self.prompt(question), settings, (self.tokenizer.eos_token_id,), model)

    def logprobs(self, model: str, ids: Sequence[int]) -> torch.Tensor:
        """Of the token behind each of these: (tokens, vocabulary)."""
        with torch.no_grad():
            return self.models[model](input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    python = os.environ.get("FIREFLY_VLLM_PYTHON")
    if not python:
        pytest.skip("FIREFLY_VLLM_PYTHON names no interpreter that has vLLM (script/vllm_env.sh makes one)")
    root = Path(__file__).resolve().parents[2]
    changes = {
        "train_file": str(root / "data" / "identity.jsonl"),
        "output_dir": str(tmp_path_factory.mktemp("run") / "tuned"),
        "max_steps": 8,
        "learning_rate": 1e-3,
        "bf16": False,
        "compare": False,
    }
    run = train(load_config(root / "train_args/sft/lora/smollm2-135m-sft-lora.json", changes))
    config = ModelConfig(name_or_path=EMBEDDED)
    tokenizer = load_tokenizer(config, str(run))
    loaded = AutoModelForCausalLM.from_pretrained(resolve_model(config), dtype=torch.float32).eval()
    tuned = PeftModel.from_pretrained(copy.deepcopy(loaded), str(run)).eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        choice = EngineChoice("vllm", python, arguments="--dtype float32")
        adapters = {"tuned": str(run)}
        engine = open_vllm(choice, config, adapters, dict.fromkeys(["base", "tuned"], tokenizer), context_length=512)
    process = engine._process
    assert isinstance(process, VllmProcess)
    yield Real(engine, {"base": loaded, "tuned": tuned}, tokenizer)
    engine.close()
    assert process.failure() is not None


@pytest.mark.slow
def test_greedy_answers_of_base_and_adapter_are_those_of_transformers_in_a_batch_too(real: Real) -> None:
    asked = [real.request(QUESTIONS[number % 5], ("base", "tuned")[number % 2], logprobs=2) for number in range(16)]
    answers = [Collected(real.engine, one) for one in asked]
    texts: dict[str, set[str]] = {"base": set(), "tuned": set()}
    for one, answer in zip(asked, answers, strict=True):
        tokens = answer.wait().tokens
        ids = [*one.prompt_ids, *(token.id for token in tokens)]
        ours = real.logprobs(one.model, ids)[len(one.prompt_ids) - 1 : -1]
        for token, place in zip(tokens, ours, strict=True):
            assert place.max() - place[token.id] < 1e-3  # the likeliest, or tied with it
            assert token.logprob == pytest.approx(place[token.id].item(), abs=1e-3)
            assert [value for _, value in token.top] == pytest.approx(place.topk(2).values.tolist(), abs=1e-3)
        assert (tokens[-1].id == real.tokenizer.eos_token_id) == (answer.deltas[-1].finish_reason == "stop")
        assert answer.text == real.tokenizer.decode([token.id for token in tokens]).removesuffix("<|im_end|>")
        texts[one.model].add(answer.text)
    assert any("Firefly" in text for text in texts["tuned"])
    assert not any("Firefly" in text for text in texts["base"])


@pytest.mark.slow
def test_a_seed_gives_the_same_answer_alone_and_in_a_batch(real: Real) -> None:
    asked = [
        replace(
            real.request(QUESTIONS[number % 5], ("base", "tuned")[number % 2], temperature=1.0, seed=7), index=number
        )
        for number in range(16)
    ]
    together = [answer.wait().text for answer in [Collected(real.engine, one) for one in asked]]
    assert [Collected(real.engine, one).wait().text for one in asked] == together
    assert len(set(together)) > 10


@pytest.mark.slow
def test_stop_texts_cancelling_and_scores(real: Real) -> None:
    plain = Collected(real.engine, real.request("Write one sentence about a fox.", "base")).wait().text
    middle = plain[len(plain) // 2 :][:3]
    stopped = Collected(real.engine, real.request("Write one sentence about a fox.", "base", stop=(middle,))).wait()
    assert (stopped.text, stopped.deltas[-1].finish_reason) == (plain[: plain.index(middle)], "stop")

    endless = Collected(real.engine, real.request("你好", "base", max_new_tokens=400, ignore_stop_tokens=True))
    while not endless.deltas:
        time.sleep(0.01)
    endless.ticket.cancel()
    assert endless.wait().deltas[-1].finish_reason == "cancelled"
    assert len(endless.tokens) < 200

    text = real.tokenizer("The capital of France is Paris.")["input_ids"]
    for model in ("base", "tuned"):
        ours = real.logprobs(model, text)
        scored = real.engine.score([text, text[:3]], model, 2)
        assert [token.id for token in scored[0]] == text
        assert scored[0][0].logprob is None
        for place, token in zip(ours, scored[0][1:], strict=False):
            assert token.logprob == pytest.approx(place[token.id].item(), abs=1e-3)
            assert [value for _, value in token.top] == pytest.approx(place.topk(2).values.tolist(), abs=1e-3)
        assert [token.logprob for token in scored[1][1:]] == pytest.approx(
            [token.logprob for token in scored[0][1:3]], abs=1e-3
        )
