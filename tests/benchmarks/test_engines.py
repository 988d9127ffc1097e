"""Cases, tunings and the order of runs."""

from __future__ import annotations

import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from measurements import result


def test_cases_are_frozen_and_hold_whole_steps() -> None:
    from cases import CASES

    for case in CASES.values():
        assert case.rows % case.examples_per_step == 0
        with pytest.raises(FrozenInstanceError):
            case.rows = 1  # type: ignore[misc]


def test_every_layout_fills_a_step_and_full_fine_tuning_is_not_packed() -> None:
    from cases import CASES
    from engines import CPU_ENGINES, ENGINES, layouts

    for case in CASES.values():
        for name in CPU_ENGINES[1:]:
            if case.task in ENGINES[name].programs:
                found = layouts(name, case)
                assert found
                assert all(case.examples_per_step % layout.batch_size == 0 for layout in found)
                assert case.mode != "full" or all(layout.kind != "packed" for layout in found)


FAST_BF16 = {"float32": 2e11, "bfloat16": 4.4e11, "float16": 2e10}
FAST_FP32 = {"float32": 3.3e11, "bfloat16": 1.85e11, "float16": 2.8e11}
FAST_FP16 = {"float32": 3.0e11, "bfloat16": 1.85e11, "float16": 2.85e11}
EMULATED = {"float32": 1.2e11, "bfloat16": 8e9, "float16": 6e9}


@pytest.mark.parametrize(
    ("rates", "lora", "full"),
    [
        (FAST_BF16, ("bfloat16", "autocast", "float32"), ("autocast", "float32")),
        (FAST_FP32, ("float32", "bfloat16", "autocast"), ("float32", "autocast")),
        (FAST_FP16, ("float32", "float16", "bfloat16", "autocast"), ("float32", "autocast")),
        (EMULATED, ("float32",), ("float32",)),
    ],
)
def test_precisions_worth_trying_follow_the_rates_of_products(
    rates: dict[str, float], lora: tuple[str, ...], full: tuple[str, ...]
) -> None:
    """Full fine-tuning keeps float32 masters on every side, so it has no bfloat16 of its own."""
    from cases import CASES
    from engines import precisions

    assert precisions(CASES["sft_lora"], rates) == lora
    assert precisions(CASES["sft_full"], rates) == full


def test_a_trial_begins_where_a_sweep_would() -> None:
    from cases import CASES
    from engines import KEEP_FREED_MEMORY, likely_tuning

    assert likely_tuning("firefly", CASES["sft_lora"], FAST_BF16).arguments == ""
    expected = {
        ("trl", "sft_lora"): "bfloat16 --layout packed",
        ("trl", "sft_full"): "autocast --layout padding_free",
        ("trl", "pretrain_lora"): "bfloat16 --layout padding_free",
        ("llamafactory", "sft_lora_long"): "bfloat16 --layout padded",
    }
    for (name, case), words in expected.items():
        found = likely_tuning(name, CASES[case], FAST_BF16)
        assert found.arguments.startswith(f"--precision {words} --batch_size ")
        assert found.environment == KEEP_FREED_MEMORY
    assert likely_tuning("trl", CASES["dpo_lora"], FAST_FP32).arguments.startswith("--precision float32")


def test_our_settings_by_hand_are_keys_of_a_configuration() -> None:
    import json
    import shlex

    from engines import own_tuning

    option, keys = shlex.split(own_tuning("float32", 512).arguments)
    assert option == "--overrides"
    assert json.loads(keys) == {"bf16": False, "tokens_per_microbatch": 512}


def test_engines_that_cannot_run_a_case_are_named() -> None:
    from cases import CASES
    from engines import reason_to_skip

    assert reason_to_skip("plain", CASES["dpo_lora"], sys.executable) == "it has no side for dpo"
    assert "not installed" in (reason_to_skip("unsloth", CASES["sft_lora"], sys.executable) or "")
    assert "does not run" in (reason_to_skip("trl", CASES["sft_lora"], "/nowhere/python") or "")
    assert reason_to_skip("plain", CASES["sft_lora"], sys.executable) is None


class FakeSide:
    """A side that answers at once, and notes the order of all runs."""

    def __init__(self, name: str, order: list[str], **changes: Any) -> None:
        self.name, self.order, self.changes = name, order, changes

    def run(self, tuning: Any, *, timeout_seconds: float | None = None) -> dict[str, Any]:
        from processes import SideFailed

        if tuning.name == "too large":
            raise SideFailed("torch.OutOfMemoryError: CUDA out of memory")
        self.order.append(self.name)
        return result(**self.changes)


def comparison(order: list[str], changes: Any = None, **options: Any) -> Any:
    from cases import CASES
    from processes import Tuning
    from rounds import Comparison

    names = ("firefly", "trl", "plain")
    return Comparison(
        case=CASES["sft_lora"],
        sides={name: FakeSide(name, order, **(changes or {}).get(name, {})) for name in names},
        tunings={name: Tuning(name="given") for name in names} | options.pop("tunings", {}),
        report={"skipped": {}},
        save=lambda: None,
        **options,
    )


def test_every_peer_and_firefly_alternate() -> None:
    order: list[str] = []
    comparison(order).run(2)
    assert order == ["trl", "firefly", "plain", "plain", "firefly", "trl"]


def test_a_peer_that_fails_the_gate_is_not_timed_any_further() -> None:
    order: list[str] = []
    compared = comparison(order, {"plain": {"losses": [3.0, 3.0]}})
    compared.run(2)
    assert order == ["trl", "firefly", "plain", "firefly", "trl"]
    assert not compared.report["gates"]["plain"]["passed"]


def test_a_peer_that_packs_is_gated_by_a_run_with_our_rows() -> None:
    order: list[str] = []
    settings = {"precision": "float32", "rows_of_a_step_are_consecutive": False}
    compared = comparison(order, {"trl": {"settings": settings}})
    compared.run(1)
    assert order == ["trl", "firefly", "plain", "trl"]
    assert "trl" in compared.report["gate_runs"]


def test_out_of_memory_falls_back_to_the_next_tuning() -> None:
    from processes import Tuning

    compared = comparison(
        [], tunings={"trl": Tuning(name="too large")}, fallbacks={"trl": [Tuning(name="small")]}, ours_first=True
    )
    compared.run(1)
    assert compared.report["tunings"]["trl"]["name"] == "small"
    assert [tuning["name"] for tuning in compared.report["out_of_memory"]["trl"]] == ["too large"]


def test_a_run_that_fails_is_skipped_by_name() -> None:
    from processes import Tuning

    compared = comparison([], tunings={"trl": Tuning(name="too large")})
    runs = compared.run(1)
    assert runs["trl"] == []
    assert "out of memory" in compared.report["skipped"]["trl"]


def test_the_rate_of_products_is_measured_beside_each_of_our_runs() -> None:
    from types import SimpleNamespace

    compared = comparison([], rate_beside=lambda dtype: {"dtype": dtype, "flops_per_second": 4.0})
    runs = compared.run(2)
    assert [run["matmul_rate"]["dtype"] for run in runs["firefly"]] == ["float32"] * 2
    assert "matmul_rate" not in runs["trl"][0]
    assert SimpleNamespace(**compared.report["runs"][1]).matmul_rate["flops_per_second"] == 4.0


def test_a_peer_whose_tunings_were_not_tried_here_is_no_fair_opponent() -> None:
    from rounds import summarise

    compared = comparison([])
    compared.report["swept"] = {"trl": {"complete": True}, "plain": None}
    found = summarise(compared, compared.run(3))
    assert found["trl"]["caveats"] == []
    assert "were not tried" in found["plain"]["caveats"][0]
    assert found["trl"]["asked_ratio"] == {"floor": 1.5, "aim": 1.8, "reached": None}


@pytest.mark.parametrize(("measured", "reached"), [(1.4, None), (1.5, "floor"), (1.79, "floor"), (1.8, "aim")])
def test_a_floor_and_an_aim_are_told_apart(measured: float, reached: str | None) -> None:
    from cases import Asked
    from rounds import against

    assert against(Asked(floor=1.5, aim=1.8), measured)["reached"] == reached


def test_what_the_time_does_not_suffice_for_is_left_out_by_name() -> None:
    from rounds import Clock

    compared = comparison([], clock=Clock(seconds=1.0, needed=2.0))
    assert compared.run(1)["firefly"] == []
    assert compared.report["skipped"] == dict.fromkeys(("firefly", "trl", "plain"), "the time was used up")


def test_gpu_cases_take_the_tutorial_as_given() -> None:
    from gpu_cases import GPU_CASES, made_up_rows

    tutorial = GPU_CASES["gpu_14b_tutorial"]
    assert (tutorial.rank, tutorial.alpha, tutorial.dropout, tutorial.checkpointing) == (64, 16, 0.05, True)
    assert tutorial.case.training["optim"] == "paged_adamw_32bit"
    assert {len(row["input_ids"]) for row in made_up_rows(tutorial.case, tutorial.lengths)} == {1024}
    for gpu_case in GPU_CASES.values():
        assert gpu_case.case.rows >= 2 * gpu_case.case.examples_per_step


def test_what_else_to_try_on_a_gpu_fits_a_step_and_the_engine() -> None:
    from gpu import further_tunings
    from gpu_cases import GPU_CASES, HEADLINES

    assert set(HEADLINES) <= GPU_CASES.keys()
    gpu_case = GPU_CASES["gpu_8b_lora"]
    found = further_tunings(gpu_case, ["firefly", "trl_liger", "unsloth"], 16, "cuda")
    assert [name for name, _ in found[:2]] == ["trl_liger", "unsloth"]
    assert {name for name, tuning in found if "packed" in tuning.arguments} == {"trl_liger"}
    fitting = further_tunings(gpu_case, ["firefly", "unsloth"], 8, "cpu")
    assert [tuning.arguments for _, tuning in fitting] == ["--precision float32 --batch_size 8"]


def test_a_faster_tuning_stands_for_its_peer_if_it_passes_the_gate() -> None:
    from gpu import try_further
    from processes import Tuning

    compared = comparison([], ours_first=True)
    runs = compared.run(1)
    for name in runs:
        runs[name][0]["process_seconds"] = 10.0
    outcomes = {"faster": {"tokens_per_second": 30.0}, "other": {"tokens_per_second": 40.0, "losses": [9.0, 9.0]}}

    def run(tuning: Any, *, timeout_seconds: float | None = None) -> dict[str, Any]:
        assert timeout_seconds == 15.0
        return result(**outcomes[tuning.name])

    compared.sides["trl"].run = run  # type: ignore[method-assign]
    compared.sides["plain"].run = run  # type: ignore[method-assign]
    try_further(compared, runs, [("trl", Tuning(name="faster")), ("plain", Tuning(name="other"))])
    assert runs["trl"][0]["tokens_per_second"] == 30.0
    assert compared.report["tunings"]["trl"]["name"] == "faster"
    assert runs["plain"][0]["tokens_per_second"] == 25.0, "what trains something else is no opponent"
    assert [attempt["outcome"] for attempt in compared.report["sweep"]] == ["measured"] * 2


def test_made_up_weights_have_the_shapes_of_the_model(tmp_path: Path) -> None:
    import torch
    import transformers
    from gpu_cases import write_model
    from random_weights import made_up

    write_model("qwen1.5-14b", tmp_path, tiny=True)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        shape = transformers.AutoModelForCausalLM.from_config(config)
    state = made_up(shape, seed=0)
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        name: tuple(parameter.shape) for name, parameter in shape.named_parameters()
    }
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path)) == 259


@pytest.mark.slow
def test_compare_runs_firefly_against_plain_transformers(tmp_path: Path, chatml_tokenizer: Any) -> None:
    """The whole program on a few rows of a tiny model: rates, a sweep that is cut short, gate, report, table."""
    import copy
    import json
    import subprocess

    from gpu_cases import CHATML
    from table import render

    from tiny import tiny_model

    tokenizer = copy.deepcopy(chatml_tokenizer)
    tokenizer.chat_template, tokenizer.eos_token = CHATML, "<|im_end|>"
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model("llama_tied", vocab_size=512, eos_token_id=2).save_pretrained(tmp_path / "model")
    questions = [{"instruction": f"What is {n}?", "input": "", "output": f"A number, {n}."} for n in range(16)]
    (tmp_path / "alpaca_en_demo.json").write_text(json.dumps(questions))
    program = Path(__file__).resolve().parents[2] / "benchmarks" / "compare.py"
    options = ["--engines", "firefly", "plain", "--rounds", "1", "--rows", "16", "--threads", "1"]
    paths = ["--model", str(tmp_path / "model"), "--data_dir", str(tmp_path), "--out", str(tmp_path)]
    command = [sys.executable, str(program), "sft_lora", *options, *paths, "--limit_seconds", "0.1"]
    done = subprocess.run([*command, "--sweep_seconds", "0.1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("sft_lora@*.json")
    report = json.loads(path.read_text())
    assert report["summary"]["plain"]["gate_passed"]
    assert report["share_of_limit"]["share_of_limit"]["median"] > 0
    assert report["share_of_limit"]["asked"]["aim"] == 0.7
    (machine,) = (tmp_path / "machines").iterdir()
    assert path.name == f"sft_lora@{machine.name}"
    swept = json.loads(machine.read_text())["sweeps"]["sft_lora"]["plain"]
    assert [attempt["outcome"].partition(":")[0] for attempt in swept["attempts"]][:2] == ["measured", "not tried"]
    assert report["tunings"]["plain"] == swept["best"]
    assert "not all of the peer's tunings were tried" in " ".join(report["summary"]["plain"]["caveats"])
    assert "| sft_lora | transformers + peft |" in render(tmp_path)
