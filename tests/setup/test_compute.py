"""The type that a run computes in: measured once, the plan's, kept by its checkpoints, and within memory."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from firefly import ranks
from firefly.config import ModelConfig, load_config
from firefly.data.examples import ExampleCounts
from firefly.distributed.backends import BACKENDS
from firefly.errors import UsageError
from firefly.models import compute_type, precision, probe_cache, products
from firefly.models.checkpointing import decoder_layers
from firefly.models.loading import read_config
from firefly.models.meta_model import empty_model
from firefly.models.precision import Precision, Rates
from firefly.setup import compute
from firefly.setup.compute import bytes_needed, settle_precision
from firefly.setup.plan import make_plan
from firefly.training import train
from multimodal import multimodal_model
from tiny import run_settings, save_tiny_model, write_rows

CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
RULED = Precision(BF16)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl", 8)
    return folder


@pytest.fixture
def settings(place: Path, tmp_path: Path) -> dict[str, Any]:
    return run_settings(
        place / "model",
        place / "rows.jsonl",
        tmp_path / "out",
        bf16=None,
        train_mode="lora",
        lora_rank=4,
        per_device_train_batch_size=2,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        tokens_per_microbatch=200,
    )


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give the rates of this CPU, which has bf16 instructions, for a model that is large enough to be timed."""
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    monkeypatch.setattr(products, "NOTHING_TO_TIME", 0)
    measured = []

    def give(float32: float, bfloat16: float) -> list[Any]:
        found = {name: Rates(float32, bfloat16) for name in ("frozen", "trained")}
        monkeypatch.setattr(compute_type, "cached_rates", lambda products: (measured.append(products), found)[1])
        return measured

    return give


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def codes(folder: Path) -> list[str]:
    return [item["code"] for item in manifest(folder)["notices"]]


def counts(longest: int = 100) -> ExampleCounts:
    ones = np.ones(4, np.int64)
    return ExampleCounts(ones * longest, ones, ones * longest, *[ones * 0] * 3, ones, ones * 0)


def settled(keys: dict[str, Any], **options: Any) -> Precision:
    return settle_precision(load_config(keys), RULED, CPU, counts(), **options)


@pytest.mark.parametrize(("float32", "bfloat16"), [(310e9, 185e9), (170e9, 404e9)])
def test_a_run_and_its_plan_take_the_faster_type_and_record_the_rates(
    float32: float, bfloat16: float, settings: dict[str, Any], rates: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    rates(float32, bfloat16)
    expected = "float32" if float32 > bfloat16 else "bfloat16"
    plan = make_plan("", settings)
    assert plan.precision.name == expected
    assert plan.as_dict()["product_rates"] == {"float32": float32, "bfloat16": bfloat16}
    out = train(load_config(settings))
    assert manifest(out)["resolved"]["precision"] == expected
    assert manifest(out)["resolved"]["product_rates"] == {"float32": float32, "bfloat16": bfloat16}
    said = " ".join(capfd.readouterr().err.split())
    assert f"compute: cpu, {expected} (products at {max(float32, bfloat16) / 1e9:.0f} GFLOP/s" in said


def test_a_resumed_run_takes_its_checkpoints_type_without_measuring(
    settings: dict[str, Any], rates: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates(310e9, 185e9)
    train(load_config(settings | {"max_steps": 1}))
    measured = rates(100e9, 400e9)
    measured.clear()
    again = settings | {"resume_from_checkpoint": True}
    assert make_plan("", again).precision == Precision(FP32)
    out = train(load_config(again))
    assert manifest(out)["resolved"]["precision"] == "float32"
    assert measured == []
    with pytest.raises(UsageError, match="precision: float32 → bfloat16"):
        train(load_config(again | {"bf16": True, "max_steps": 3}))
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    assert settled(again, checkpoint=out / "checkpoint-1") == Precision(FP32)


def test_a_resumed_run_shows_the_rates_that_were_measured_here(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FIREFLY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    monkeypatch.setattr(products, "NOTHING_TO_TIME", 0)
    found, measured = {"frozen": Rates(310e9, 185e9), "trained": Rates(1e9, 9e9)}, []
    monkeypatch.setattr(probe_cache, "measure_rates", lambda one: (measured.append(one), found)[1])
    train(load_config(settings | {"max_steps": 1}))
    again = settings | {"resume_from_checkpoint": True}
    assert make_plan("", again).precision == Precision(FP32, rates=found["frozen"])
    out = train(load_config(again))
    assert manifest(out)["resolved"]["product_rates"] == {"float32": 310e9, "bfloat16": 185e9}
    assert len(measured) == 1
    monkeypatch.setenv("FIREFLY_CACHE", str(tmp_path / "another"))
    assert settled(again, checkpoint=out / "checkpoint-1") == Precision(FP32)
    assert len(measured) == 1


def test_a_bf16_checkpoint_goes_on_in_bf16_where_it_is_emulated_and_that_is_said(
    settings: dict[str, Any], rates: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates(100e9, 400e9)
    train(load_config(settings | {"max_steps": 1}))
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    out = train(load_config(settings | {"resume_from_checkpoint": True}))
    assert manifest(out)["resolved"]["precision"] == "bfloat16"
    assert "precision.emulated" in codes(out)


def test_an_asked_type_that_is_slower_is_said_once_by_run_and_plan(settings: dict[str, Any], rates: Any) -> None:
    rates(310e9, 185e9)
    asked = settings | {"bf16": True}
    assert [note for note in make_plan("", asked).notes if "1.7 times as fast" in note] != []
    out = train(load_config(asked))
    assert manifest(out)["resolved"]["precision"] == "bfloat16"
    assert codes(out).count("precision.slower") == 1


def test_a_plan_for_less_memory_than_float32_takes_is_in_bf16(settings: dict[str, Any], rates: Any) -> None:
    rates(310e9, 185e9)
    config = load_config(settings)
    model = empty_model(read_config(config.model), config.model, FP32)
    work = make_plan("", settings).work
    wide, narrow = (bytes_needed(config, model, dtype, work.counts, BACKENDS["single"]) for dtype in (FP32, BF16))
    assert narrow != wide
    plan = make_plan("", settings, memory=f"{(wide - 1) / 1e6:.6f}MB", device="cpu")
    assert plan.precision.compute == BF16
    assert any("products in float32 are 1.7 times as fast as in bfloat16 here" in note for note in plan.notes)
    assert make_plan("", settings, memory=f"{(wide + 1) / 1e6:.6f}MB", device="cpu").precision.compute == FP32


def test_a_tiny_run_computes_in_float32_on_any_cpu(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    monkeypatch.setattr(compute_type, "cached_rates", lambda products: pytest.fail("measured"))
    assert make_plan("", settings).precision == Precision(FP32)
    assert settled(settings) == Precision(FP32)


def test_only_the_first_rank_measures_and_the_others_take_its_type(
    settings: dict[str, Any], rates: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, asked = rates(310e9, 185e9), []
    monkeypatch.setattr(ranks, "from_first", lambda value: (asked.append(value), Precision(FP32))[1])
    monkeypatch.setattr(ranks, "is_first", lambda: False)
    assert settled(settings) == Precision(FP32)
    assert measured == []
    monkeypatch.setattr(ranks, "is_first", lambda: True)
    assert settled(settings).compute == FP32
    assert len(measured) == 1
    assert len(asked) == 2


def test_a_rank_that_has_not_got_the_checkpoint_takes_the_firsts_type(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "is_first", lambda: False)
    monkeypatch.setattr(ranks, "from_first", lambda value: Precision(FP32))
    assert settled(settings, checkpoint=tmp_path / "checkpoint-1") == Precision(FP32)


def test_a_gpu_and_its_checkpoints_are_left_to_the_hardware(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"training": {"precision": "float32"}}')
    found = settle_precision(load_config(settings), RULED, torch.device("cuda"), counts(), tmp_path)
    assert found is RULED


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_of_a_tower_for_images_only_its_weights_are_needed(name: str, settings: dict[str, Any]) -> None:
    model = multimodal_model(name)
    config = load_config(settings)
    found = bytes_needed(config, model, FP32, counts(), BACKENDS["single"])
    bare = copy.deepcopy(model)
    tower = bare.model.visual if name == "qwen2_5_vl" else bare.model.vision_tower
    weights = 4 * sum(parameter.numel() for parameter in tower.parameters())
    for layer in decoder_layers(tower):
        for child, _ in list(layer.named_children()):
            delattr(layer, child)
    left = 4 * sum(parameter.numel() for parameter in tower.parameters())
    assert found - (weights - left) == bytes_needed(config, bare, FP32, counts(), BACKENDS["single"])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "qlora", "full"])
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "qwen3-1.7b"])
def test_the_bytes_needed_are_near_a_plans_forecast_where_nothing_is_recomputed(mode: str, name: str) -> None:
    folder = Path(compute.__file__).parents[1] / "models" / "shapes" / name
    keys = {
        "model_name_or_path": str(folder),
        "train_mode": mode,
        "max_seq_length": 512,
        "gradient_checkpointing": False,
    }
    keys |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    model = ModelConfig(name_or_path=str(folder))
    for bf16, dtype in ((False, FP32), (True, BF16)):
        plan = make_plan("", keys | {"bf16": bf16}, memory="4TB", device="cpu", teraflops=1)
        meta = empty_model(read_config(model), model, FP32)
        found = bytes_needed(plan.config, meta, dtype, plan.work.counts, BACKENDS["single"])
        assert found == pytest.approx(plan.forecast.total, rel=0.2)
