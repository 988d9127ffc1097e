"""vLLM behind the same door: how it is started and ended, what it is not given, and that it answers as we do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fake_vllm import FakeVllm
from firefly.config import ModelConfig
from firefly.errors import UsageError
from firefly.generation import vllm
from firefly.generation.engine import Delta, Request
from firefly.generation.remote import RemoteEngine, Server
from firefly.generation.settings import GenerationSettings
from firefly.generation.vllm import (
    EngineChoice,
    VllmProcess,
    free_port,
    open_vllm,
    refuse_unserved,
    start_vllm,
    vllm_command,
    vllm_environment,
)
from firefly.models.saved_adapter import open_adapter
from tiny import randomise_adapters, save_tiny_model, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def save_adapter(folder: Path, **changes: Any) -> Path:
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | changes
    wrapped = randomise_adapters(get_peft_model(tiny_model("llama"), LoraConfig(**settings)))
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder


def ask(engine: RemoteEngine, asked: Request) -> list[Delta]:
    deltas: list[Delta] = []
    over = threading.Event()

    def deliver(delta: Delta) -> None:
        deltas.append(delta)
        if delta.is_last:
            over.set()

    engine.submit(asked, deliver)
    assert over.wait(300)
    return deltas


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


def test_the_command_line_of_adapters_with_all_options() -> None:
    command = vllm_command(
        "python",
        "org/name",
        "name",
        {"a": Path("/runs/a"), "b=c": Path("/runs/b"), "d": Path("/runs/x,y")},
        port=1,
        dtype="bfloat16",
        max_rank=17,
        targets=["k_proj", "q_proj"],
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
        *("--lora-target-modules", "k_proj", "q_proj"),
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
    process = start("print('loading'); raise ValueError('no such model')")
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
    assert [token.id for delta in ask(engine, asked) for token in delta.tokens] == [5, 6]
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

    def other(text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [9, 9]}

    with pytest.raises(UsageError, match="another vocabulary"):
        open_vllm(choice, ModelConfig(name_or_path=str(model)), {}, {"base": other})
    assert started[0].failure() is not None


def test_one_that_runs_already_is_used_and_left_running() -> None:
    def encode(text: str) -> list[int]:
        return TOKENIZER(text, add_special_tokens=False)["input_ids"]

    with FakeVllm(encode) as server:
        open_vllm(EngineChoice("vllm", url=server.url), ModelConfig(), {}, {"mine": TOKENIZER}).close()
        assert Server(server.url).ask("/v1/models")["data"][0]["id"] == "base"


def test_a_port_that_is_free_can_be_had() -> None:
    assert 1024 < free_port() < 65536
