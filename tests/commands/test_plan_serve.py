"""`firefly plan --serve`: what a server would take, before it is started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from firefly.cli import main
from firefly.models.precision import Precision
from firefly.setup.serving_plan import make_serving_plan
from tiny import save_tiny_model, tiny_config


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    save_tiny_model(folder / "base")
    for name, rank in (("small", 4), ("large", 16)):
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        settings = LoraConfig(r=rank, target_modules=["q_proj"], task_type="CAUSAL_LM")
        get_peft_model(model, settings).save_pretrained(folder / name)
    return folder


def run(capsys: Any, *options: str) -> tuple[int, str, str]:
    code = main(["plan", "--serve", *options])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_plan_of_serving_is_exit_0_and_one_json_value(capsys: Any, place: Path) -> None:
    code, out, _ = run(capsys, "--model_name_or_path", str(place / "base"), "--json")
    found = json.loads(out)
    assert code == 0
    assert found["fits"]
    assert found["complete"]
    assert found["batched"]
    assert found["total_bytes"] == sum(found["parts"].values())
    assert {"weights", "kv_cache", "masks", "work"} <= found["parts"].keys()
    assert found["context_length"] == 512
    assert found["cache_tokens"] == 64 * 512
    assert found["models"] == 1


def test_each_adapter_brings_its_weights_and_a_cache(capsys: Any, place: Path) -> None:
    adapters = ("--adapter_name_or_path", str(place / "small"), "--adapter_name_or_path", f"big={place / 'large'}")
    options = ("--cache_tokens", "1000", "--json")
    alone = json.loads(run(capsys, "--model_name_or_path", str(place / "base"), *options)[1])
    both = json.loads(run(capsys, *adapters, *options)[1])  # which name their base
    assert both["models"] == 3
    assert both["cache_tokens"] == alone["cache_tokens"] == 1024  # whole pages
    assert both["parts"]["kv_cache"] == 3 * alone["parts"]["kv_cache"]
    assert both["parts"]["adapters"] == 4 * (4 + 16) * (32 + 32) * 3  # fp32, q_proj of three layers
    as_model = json.loads(run(capsys, "--model_name_or_path", str(place / "small"), *options)[1])
    assert as_model["models"] == 2
    given = {"model_name_or_path": str(place / "base"), "adapter_name_or_path": str(place / "small")}
    assert make_serving_plan(given).models == 2


def test_what_does_not_fit_is_exit_3(capsys: Any, place: Path) -> None:
    options = ("--model_name_or_path", str(place / "base"), "--device", "cpu")
    code, out, err = run(capsys, *options, "--memory", "100MB", "--cache_tokens", "1000000")
    assert code == 3
    assert "does not fit" in out
    assert "0.09 GiB are available" in err


def test_people_read_parts_and_the_cache(capsys: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--model_name_or_path", str(place / "base"), "--cache_tokens", "256")
    code, out, _ = run(capsys, *options)
    assert code == 0
    assert all(word in out for word in ("weights", "key-value cache", "256 tokens for each model", "it fits"))
    assert "longer requests are refused" in out
    monkeypatch.setenv("FIREFLY_LANG", "zh")
    assert "键值缓存" in run(capsys, *options)[1]


def test_an_architecture_that_is_not_batched_is_planned_for_one_request(capsys: Any, tmp_path: Path) -> None:
    tiny_config("deepseek_v3").save_pretrained(tmp_path)
    code, out, _ = run(capsys, "--model_name_or_path", str(tmp_path), "--json", "--device", "cpu", "--memory", "1GB")
    found = json.loads(out)
    assert code == 0
    assert not found["batched"]
    assert "one after another" in found["notes"][0]
    itemsize = found["cache_bytes_per_token"] // (3 * 24)  # of the latents of three layers
    assert found["parts"]["kv_cache"] == 512 * 3 * 24 * itemsize


def test_a_cache_that_the_twin_does_not_tell_is_said_to_be_missing(capsys: Any, tmp_path: Path) -> None:
    tiny_config("zamba2").save_pretrained(tmp_path)  # the twin has no layer of each kind
    code, out, _ = run(capsys, "--model_name_or_path", str(tmp_path))
    assert code == 0
    assert "the cache is missing above" in out
    assert not make_serving_plan({}, {"model_name_or_path": str(tmp_path)}).as_dict()["complete"]


def test_weights_in_4_bits_take_less(place: Path, tmp_path: Path) -> None:
    tiny_config("llama", hidden_size=256, intermediate_size=512).save_pretrained(tmp_path)
    given = {"model_name_or_path": str(tmp_path)}
    whole, quantized = (
        make_serving_plan({}, given, in_4_bits=in_4_bits).forecast.parts["weights"] for in_4_bits in (False, True)
    )
    assert quantized < 0.6 * whole


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ((), "model_name_or_path"),
        (("--model_name_or_path", "{base}", "--cache_tokens", "0"), "--cache_tokens"),
        (("--model_name_or_path", "{base}", "--lora_rank", "3"), "lora_rank"),
        (("--model_name_or_path", "{base}", "--tflops", "3"), "--tflops"),
        (("--model_name_or_path", "{base}", "--memory", "much"), "'much'"),
        (("--model_name_or_path", "/no/such/model"), "/no/such/model"),
        (("--adapter_name_or_path", "/no/such/adapter"), "/no/such/adapter"),
        (
            ("--adapter_name_or_path", "{base}/../small", "--adapter_name_or_path", "{base}/../small/"),
            "served as small",
        ),
    ],
)
def test_a_mistake_is_exit_2_with_its_value(capsys: Any, place: Path, options: Any, named: str) -> None:
    code, out, err = run(capsys, *(option.replace("{base}", str(place / "base")) for option in options))
    assert (code, out) == (2, "")
    assert named in err
    assert "Traceback" not in err


def test_options_of_serving_are_refused_without_it(capsys: Any, place: Path) -> None:
    for option in (("--cache_tokens", "9"), ("--load_in_4bit",), ("--adapter_name_or_path", "a") * 2):
        assert main(["plan", "--model_name_or_path", str(place / "base"), *option]) == 2
        assert "--serve" in capsys.readouterr().err


MEASURED = """
import sys, torch
from pathlib import Path
from transformers import ContinuousBatchingConfig, GenerationConfig
import peft, transformers.models.llama.modeling_llama
from firefly.config import ModelConfig
from firefly.files import read_proc
from firefly.models.loading import load_model
from firefly.models.precision import Precision

before = read_proc("/proc/self/status", "VmRSS")
tokens, requests = int(sys.argv[1]), 16
name = ModelConfig(name_or_path="smollm2-135m-instruct")
model = load_model(name, "lora", Precision(torch.float32), torch.device("cpu")).eval()
Path("/proc/self/clear_refs").write_text("5")  # the peak from here on: loading reads a file in 16 bit besides
batching = ContinuousBatchingConfig(
    num_blocks=tokens // 32, max_batch_tokens=512, page_size=32, max_requests_per_batch=requests,
    use_async_batching=False, use_cuda_graph=False, auto_switch_to_flash=False,
)
prompts = [[7 + row] * (tokens // requests - 4) for row in range(requests)]
settings = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1)
model.generate_batch(prompts, generation_config=settings, continuous_batching_config=batching, progress_bar=False)
print(read_proc("/proc/self/status", "VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_plan_is_within_15_percent_of_what_a_full_cache_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firefly.setup.serving_plan.answering_precision", lambda *_, **__: Precision(torch.float32))
    tokens = 8192
    plan = make_serving_plan({}, {"model_name_or_path": "smollm2-135m-instruct"}, cache_tokens=tokens, device="cpu")
    done = subprocess.run([sys.executable, "-c", MEASURED, str(tokens)], capture_output=True, text=True, check=True)
    measured = int(done.stdout.split()[-1])
    print(plan.forecast, measured)
    assert abs(plan.forecast.total / measured - 1) <= 0.15
