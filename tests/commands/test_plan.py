"""`firefly plan` as people and programs call it, and what its parts promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from firefly.cli import main
from firefly.config import load_config
from firefly.data.schema import IGNORE, TokenPair
from firefly.setup.plan import Machine, Work, describe_machine, make_plan, parse_memory, plan_run
from firefly.training import train
from tiny import ListedExamples, random_examples, random_pairs, run_settings, save_tiny_model, tiny_config, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl", 20)
    return folder


@pytest.fixture
def settings(place: Path, tmp_path: Path) -> dict[str, Any]:
    return run_settings(
        place / "model",
        place / "rows.jsonl",
        tmp_path / "out",
        train_mode="lora",
        lora_rank=16,
        lora_dropout=0,
        max_seq_length=512,
        per_device_train_batch_size=4,
    )


def run(capsys: Any, tmp_path: Path, settings: dict[str, Any], *options: str) -> tuple[int, str, str]:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    code = main(["plan", str(path), *options])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def work_of(examples: list[Any]) -> Work:
    return Work(ListedExamples(examples).counts, known=True)


def planned(settings: dict[str, Any], **options: Any) -> Any:
    return make_plan("", settings, **options)


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
    assert [each["key"] for each in found["advice"]] == ["gradient_checkpointing", "train_mode", ""]
    assert all(each["cost"] for each in found["advice"])
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


def test_memory_alone_means_a_gpu_and_says_so():
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


def test_the_heaviest_microbatch_has_the_longest_example_and_what_fits_beside_it():
    work = work_of(random_examples(50, 30, 90, 45, 10))
    assert [int(work.counts.lengths[row]) for row in work.heaviest(4, 150)] == [90, 50, 10]
    assert [int(work.counts.lengths[row]) for row in work.heaviest(2, 150)] == [90, 50]
    assert [int(work.counts.lengths[row]) for row in work.heaviest(4, 60)] == [90]
    assert sum(batch.input_ids.numel() for batch in work.rows([2, 0], solo=False)) == 140
    assert [batch.input_ids.numel() for batch in work.rows([2, 0], solo=True)] == [90, 50]


def test_pairs_keep_their_shape():
    work = work_of(random_pairs((30, 20, 11), (5, 40, 9)))
    assert work.counts.lengths.tolist() == [61, 54]
    assert work.counts.prompt.tolist() == [30, 5]
    assert work.counts.chosen.tolist() == [20, 40]
    row = work.rows([0], solo=False)[0]
    assert [tuple(segment) for segment in row.segments] == [(0, 50, 0, 0), (50, 61, 0, 30)]
    assert len(row.targets) == 31


def test_of_an_answer_that_is_trained_in_part_the_targets_alone_are_counted():
    """Its length is that of all its tokens."""
    labels = np.full(61, IGNORE, np.int32)
    labels[45:50] = labels[50:61] = 0
    work = work_of([TokenPair(np.zeros(61, np.int32), labels, 30, 20)])
    assert (work.counts.chosen.tolist(), work.counts.chosen_targets.tolist()) == ([20], [5])
    row = work.rows([0], solo=False)[0]
    assert [tuple(segment) for segment in row.segments] == [(0, 50, 0, 0), (50, 61, 0, 30)]
    assert len(row.targets) == 5 + 11


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
    results, manifest = (json.loads((folder / name).read_text()) for name in ("train_results.json", "run.json"))
    assert results["forecast_memory_bytes"] == sum(manifest["memory"]["forecast_parts"].values())
    assert manifest["memory"]["run_memory_bytes"] == results["run_memory_bytes"] > 0
    err = capsys.readouterr().err
    assert "memory forecast: " in err
    assert "GiB at the peak above what imports took, forecast " in err


def test_a_machine_without_its_speed_has_no_time(settings):
    config = load_config(settings)
    machine = Machine("cpu", 10**10, here=False)
    work = work_of(random_examples(50, 30))
    assert plan_run(config, machine, work).duration.seconds is None
    told = plan_run(config, machine, work, rate=1e12).duration
    assert told.step_seconds == pytest.approx(told.flops / (1e12 * told.efficiency))


def test_a_plan_leaves_accelerates_state_of_the_process_alone(settings, monkeypatch):
    """A run beside it would go on with the device of the plan."""
    from accelerate.state import PartialState

    monkeypatch.setattr(PartialState, "_shared_state", {})
    planned(settings, memory="24GB")
    assert PartialState._shared_state == {}


@pytest.mark.gpu
def test_a_plan_is_within_15_percent_on_a_gpu(settings):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    settings |= {"model_name_or_path": "smollm2-135m-instruct", "use_cpu": False, "bf16": True, "max_steps": 2}
    plan = planned(settings | {"template_name": "auto"})
    folder = train(load_config(settings | {"template_name": "auto", "save_strategy": "no"}))
    measured = json.loads((folder / "train_results.json").read_text())["run_memory_bytes"]
    predicted = plan.forecast.beside(measured, "cuda")["forecast_memory_bytes"]
    assert abs(predicted / measured - 1) <= 0.15
