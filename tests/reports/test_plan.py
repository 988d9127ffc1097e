"""`firefly plan` as people and programs call it, and what its parts promise."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch

from firefly.cli import main
from firefly.config import load_config
from firefly.models.memory import HOLES_MOST, Peak, assemble
from firefly.reports.advice import advise
from firefly.reports.machine import Machine, describe_machine, parse_memory
from firefly.reports.plan import forecast, make_plan
from firefly.reports.probe import probe
from firefly.reports.work import Work, assumed_work, work_of
from firefly.train import train
from tiny import ListedExamples, prepared, random_examples, random_pairs, save_tiny_model, tiny_config, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl", 20)
    return folder


@pytest.fixture
def settings(place: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(place / "model"),
        "train_file": str(place / "rows.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "template_name": "default",
        "train_mode": "lora",
        "lora_rank": 16,
        "lora_dropout": 0,
        "max_seq_length": 512,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }


def run(capsys: Any, tmp_path: Path, settings: dict[str, Any], *options: str) -> tuple[int, str, str]:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    code = main(["plan", str(path), *options])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def planned(settings: dict[str, Any], **options: Any) -> Any:
    return make_plan("", settings, **options)[0]


def test_what_fits_is_exit_0_and_one_json_value(capsys, tmp_path, settings):
    code, out, _ = run(capsys, tmp_path, settings, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["fits"]
    assert found["complete"]
    assert found["total_bytes"] == sum(found["parts"].values()) > 0
    assert {"weights", "adapter", "optimizer", "gradients", "activations", "head"} <= found["parts"].keys()
    assert found["steps"] == 15  # 20 rows by four, three times
    assert found["seconds"] > 0
    assert found["lengths_known"]
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_exit_3_with_advice_under_configuration_keys(capsys, tmp_path, settings):
    settings |= {"gradient_checkpointing": False}
    code, out, err = run(capsys, tmp_path, settings, "--memory", "1MB", "--device", "cpu", "--json")
    found = json.loads(out)
    assert code == 3
    assert not found["fits"]
    keys = [each["key"] for each in found["advice"] if each["key"]]
    assert keys.index("gradient_checkpointing") < keys.index("optim") < keys.index("train_mode")
    assert all(each["spared"] > 0 for each in found["advice"] if each["key"])
    assert "0.00 GiB are available" in err


def test_people_read_parts_time_and_verdict(capsys, tmp_path, settings, monkeypatch):
    code, out, _ = run(capsys, tmp_path, settings)
    assert code == 0
    assert all(word in out for word in ("weights", "optimizer state", "activations", "time: about", "it fits"))
    monkeypatch.setenv("FIREFLY_LANG", "zh")
    assert "放得下" in run(capsys, tmp_path, settings)[1]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--memory", "much"), "'much'"),
        (("--memory", "24"), "24GB"),
        (("--memory", "0GB"), "0GB"),
        (("--memory", "24GB", "--device", "tpu"), "'tpu'"),
        (("--tflops", "-1"), "--tflops"),
        (("--memory", "24GB", "--device", "cuda", "--probe"), "--probe"),
        (("--lora_ranc", "3"), "lora_rank"),
        (("--train_file", "/no/such.jsonl"), "/no/such.jsonl"),
    ],
)
def test_a_users_mistake_is_exit_2_with_its_value(capsys, tmp_path, settings, options, named):
    code, out, err = run(capsys, tmp_path, settings, *options)
    assert code == 2
    assert named in err
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "expected"), [("24GB", 24 * 10**9), ("80 GiB", 80 << 30), ("1.5gb", 15 * 10**8), ("512MiB", 512 << 20)]
)
def test_memory_has_units(text, expected):
    assert parse_memory(text) == expected


def test_memory_alone_means_a_card_and_says_so():
    machine = describe_machine("24GB", "", use_cpu=False)
    assert (machine.kind, machine.memory) == ("cuda", 24 * 10**9)
    assert "--device cpu" in machine.assumed
    assert describe_machine("24GB", "cpu", use_cpu=False).kind == "cpu"
    assert describe_machine("24GB", "", use_cpu=True).kind == "cpu"


@pytest.mark.parametrize("name", ["llama", "qwen2"])  # of Qwen2 transformers makes an empty tokenizer
def test_a_folder_with_config_json_alone_is_planned_with_the_greatest_lengths(tmp_path, settings, name):
    tiny_config(name).save_pretrained(tmp_path / "bare")
    plan = planned(settings | {"model_name_or_path": str(tmp_path / "bare")})
    assert not plan.work.known
    assert plan.work.longest == 512
    assert "512" in plan.notes[0]
    assert plan.duration.steps is None
    assert plan.forecast.parts["activations"] > 0


def test_a_mixture_of_experts_is_named_and_the_rest_is_counted(tmp_path, settings):
    tiny_config("qwen2_moe").save_pretrained(tmp_path / "experts")
    plan = planned(settings | {"model_name_or_path": str(tmp_path / "experts"), "train_mode": "full"})
    assert "Qwen2MoeForCausalLM" in plan.unknown
    assert plan.forecast.parts["weights"] > 0
    assert "activations" not in plan.forecast.parts


def test_a_preference_run_counts_pairs_and_the_reference_of_a_full_one(tmp_path, settings):
    tiny_config("llama").save_pretrained(tmp_path / "bare")
    pairs = settings | {"model_name_or_path": str(tmp_path / "bare"), "task_type": "dpo"}
    adapted, full = planned(pairs), planned(pairs | {"train_mode": "full"})
    assert adapted.work.longest == 256 + 2 * 256
    assert "reference" not in adapted.forecast.parts
    assert full.forecast.parts["reference"] == full.forecast.parts["weights"]
    before = planned(pairs | {"train_mode": "full", "precompute_reference": True})
    assert "reference" not in before.forecast.parts


def test_parts_follow_the_model():
    model, _, _ = prepared("llama", "lora")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    peak = Peak(activations=10**6, head=10**5, gradients=4 * trained)
    parts = assemble(model, "cpu", peak, optimizer_bytes=8, microbatches=1000, available=0).parts
    assert parts["adapter"] == parts["gradients"] == 4 * trained
    assert parts["optimizer"] == 8 * trained
    assert parts["allocator"] == int(HOLES_MOST * peak.total)
    assert "allocator" not in assemble(model, "cuda", peak, optimizer_bytes=8, available=0).parts


def test_when_weights_change_gradients_may_take_more_than_activations():
    model, _, _ = prepared("llama", "full")
    trained = sum(4 * p.numel() for p in model.parameters())
    parts = assemble(model, "cuda", Peak(10, 10, 10), optimizer_bytes=8, available=0).parts
    assert parts["gradients"] == trained
    assert "activations" not in parts


def test_the_heaviest_microbatch_has_the_longest_example_and_what_fits_beside_it():
    work = work_of(ListedExamples(random_examples(50, 30, 90, 45, 10)))
    assert [int(work.lengths[row]) for row in work.heaviest(4, 150)] == [90, 50, 10]
    assert [int(work.lengths[row]) for row in work.heaviest(2, 150)] == [90, 50]
    assert [int(work.lengths[row]) for row in work.heaviest(4, 60)] == [90]
    assert sum(batch.input_ids.numel() for batch in work.rows([2, 0], solo=False)) == 140
    assert [batch.input_ids.numel() for batch in work.rows([2, 0], solo=True)] == [90, 50]


def test_pairs_keep_their_shape():
    work = work_of(ListedExamples(random_pairs((30, 20, 11), (5, 40, 9))))
    assert work.lengths.tolist() == [61, 54]
    assert work.prompt.tolist() == [30, 5]
    assert work.chosen.tolist() == [20, 40]
    row = work.rows([0], solo=False)[0]
    assert [tuple(segment) for segment in row.segments] == [(0, 50, 0, 0), (50, 61, 0, 30)]


def test_rows_cut_shorter_are_as_long_as_asked():
    config = load_config({"model_name_or_path": "m", "output_dir": "o", "train_file": "t", "max_seq_length": 100})
    assert assumed_work(config).cut(50).longest == 50
    same = np.array([40])
    assert Work(same, same - 1, 0 * same, 0 * same, known=True).cut(50).longest == 40


def test_each_advice_spares_what_it_says(settings):
    plan = planned(settings, memory="1MB", device="cpu")
    for advice in advise(plan):
        if advice.key in ("lora_rank", "train_mode", "optim", "gradient_checkpointing"):
            changed = planned(settings | {advice.key: advice.value}, memory="1MB", device="cpu")
            assert plan.forecast.total - changed.forecast.total == pytest.approx(advice.spared, abs=4096)


def test_a_run_on_a_cpu_is_planned_as_it_chooses(settings):
    plan = planned(settings)
    folder = train(load_config(settings | {"max_steps": 1, "save_strategy": "no"}))
    resolved = json.loads((folder / "run.json").read_text())["resolved"]
    assert plan.choices is not None
    assert plan.choices.tokens_per_microbatch == resolved["tokens_per_microbatch"]
    assert plan.choices.checkpointed_layers == resolved["checkpointed_layers"]
    assert plan.layout == resolved["layout"]


def test_a_run_prints_its_forecast_and_its_peak_and_keeps_both(capsys, settings):
    folder = train(load_config(settings | {"max_steps": 1, "save_strategy": "no"}))
    results, passport = (json.loads((folder / name).read_text()) for name in ("train_results.json", "run.json"))
    assert results["forecast_memory_bytes"] == sum(passport["memory"]["forecast_parts"].values())
    assert passport["memory"]["run_memory_bytes"] == results["run_memory_bytes"] > 0
    err = capsys.readouterr().err
    assert "memory forecast: " in err
    assert "GiB at the peak above what imports took, forecast " in err


def test_a_machine_without_its_speed_has_no_time(settings):
    config = load_config(settings)
    machine = Machine("cpu", 10**10, here=False)
    work = work_of(ListedExamples(random_examples(50, 30)))
    assert forecast(config, machine, work).duration.seconds is None
    told = forecast(config, machine, work, rate=1e12).duration
    assert told.step_seconds == pytest.approx(told.flops / (1e12 * told.efficiency))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_a_plan_is_within_15_percent_of_what_two_steps_take(shared, task, mode):
    if task == "dpo" and mode != "lora":
        pytest.skip("the promise is for DPO with LoRA")
    changes = {
        "model_name_or_path": "smollm2-135m-instruct",
        "train_file": str(shared / "data" / ("dpo_en_demo.json" if task == "dpo" else "alpaca_en_demo.json")),
        "task_type": task,
        "train_mode": mode,
        "lora_rank": 16,
        "lora_dropout": 0,
        "max_lost_share": 1.0,
        "max_seq_length": 1024 if task == "dpo" else 512,
        "per_device_train_batch_size": 4 if task == "dpo" else 8,
        "output_dir": "unused",
    }
    plan, data = make_plan("", changes)
    found = [probe(plan, data)]
    if abs(found[0].error) > 0.15:  # where blocks come to lie is chance: one run's peak is a tenth off another's
        found += [probe(plan, data), probe(plan, data)]
    assert abs(median(each.error for each in found)) <= 0.15, found


@pytest.mark.gpu
def test_a_plan_is_within_15_percent_on_a_card(settings):
    if not torch.cuda.is_available():
        pytest.skip("no card")
    settings = settings | {"model_name_or_path": "smollm2-135m-instruct", "use_cpu": False, "bf16": True}
    plan, data = make_plan("", settings | {"template_name": "auto"})
    assert abs(probe(plan, data).error) <= 0.15
