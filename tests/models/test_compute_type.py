"""The type that a CPU computes in, by rates that are given here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from firefly.config import ModelConfig, PrecisionConfig
from firefly.models import compute_type, precision, products
from firefly.models.compute_type import Room, measured_precision
from firefly.models.precision import Precision, Rates, resolve_precision
from tiny import save_tiny_model

CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
AUTO = PrecisionConfig()
ROOM = Room(lambda model, dtype: 0, 1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig(name_or_path=str(save_tiny_model(tmp_path_factory.mktemp("model"))))


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A CPU with bf16 instructions and these rates, of a model that is large enough to be timed."""
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    monkeypatch.setattr(products, "NOTHING_TO_TIME", 0)

    def give(float32: float, bfloat16: float, trained: Rates | None = None) -> None:
        frozen = Rates(float32, bfloat16)
        found = {"frozen": frozen, "trained": trained or frozen}
        monkeypatch.setattr(compute_type, "cached_rates", lambda products: found)

    return give


def chosen(source: ModelConfig, request: PrecisionConfig = AUTO, room: Room = ROOM, **options: Any) -> Any:
    """(the type, codes of what was said, what was said)."""
    said: list[tuple[str, str]] = []
    found = measured_precision(
        request,
        resolve_precision(request, CPU),
        CPU,
        source,
        room,
        notify=lambda code, text, **values: said.append((code, text.format(**values))),
        **options,
    )
    return found, [code for code, _ in said], " ".join(text for _, text in said)


@pytest.mark.parametrize(
    ("float32", "bfloat16", "expected"),
    [(310e9, 185e9, FP32), (170e9, 404e9, BF16), (104e9, 100e9, BF16), (106e9, 100e9, FP32)],
    ids=["fp32 faster", "bf16 faster", "fp32 hardly faster", "fp32 just faster"],
)
def test_the_faster_type_is_taken(
    float32: float, bfloat16: float, expected: torch.dtype, rates: Any, source: ModelConfig
) -> None:
    rates(float32, bfloat16)
    found, codes, _ = chosen(source)
    assert found == Precision(expected, rates=Rates(float32, bfloat16))
    assert codes == []


def test_rates_are_shown_beside_the_type() -> None:
    assert str(Precision(FP32, rates=Rates(310e9, 185e9))) == "float32 (products at 310 GFLOP/s, bfloat16 185)"
    assert str(Precision(BF16, rates=Rates(170e9, 404e9))) == "bfloat16 (products at 404 GFLOP/s, float32 170)"
    assert str(Precision(FP32)) == "float32"


def test_full_training_goes_by_its_own_products(rates: Any, source: ModelConfig) -> None:
    rates(310e9, 185e9, trained=Rates(100e9, 200e9))
    assert chosen(source)[0].compute == FP32
    assert chosen(source, trained=True)[0].compute == BF16


def test_a_tiny_model_computes_in_float32_whatever_is_faster(
    rates: Any, source: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates(100e9, 400e9)
    monkeypatch.setattr(products, "NOTHING_TO_TIME", 1 << 20)
    monkeypatch.setattr(compute_type, "cached_rates", lambda products: pytest.fail("measured"))
    assert chosen(source)[0] == Precision(FP32)
    assert chosen(source, PrecisionConfig(fp16=False))[0] == Precision(FP32)
    assert chosen(source, PrecisionConfig(bf16=True))[0] == Precision(BF16)
    assert chosen(source, PrecisionConfig(bf16=False))[0] == Precision(FP32)


def test_nothing_is_measured_where_bf16_is_emulated(
    rates: Any, source: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates(100e9, 400e9)
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    monkeypatch.setattr(compute_type, "cached_rates", lambda products: pytest.fail("measured"))
    assert chosen(source) == (Precision(FP32), [], "")


def test_a_gpu_is_not_measured(rates: Any, source: ModelConfig) -> None:
    rates(310e9, 185e9)
    ruled = Precision(BF16)
    assert measured_precision(AUTO, ruled, torch.device("cuda"), source, ROOM) is ruled


def test_what_is_asked_for_stands_and_the_faster_type_is_named(rates: Any, source: ModelConfig) -> None:
    rates(310e9, 185e9)
    found, codes, said = chosen(source, PrecisionConfig(bf16=True))
    assert (found.compute, codes) == (BF16, ["precision.slower"])
    assert said.startswith(
        "bf16 was asked for; on this machine products of the model's shapes in float32 are 1.7 times"
    )
    assert chosen(source, PrecisionConfig(bf16=False))[1] == []
    assert chosen(source, PrecisionConfig(fp16=True))[2].startswith("fp16 was asked for")
    rates(170e9, 404e9)
    found, codes, said = chosen(source, PrecisionConfig(bf16=False))
    assert (found.compute, codes) == (FP32, ["precision.slower"])
    assert said.startswith("fp32 was asked for; on this machine products of the model's shapes in bfloat16 are 2.4 ")
    rates(109e9, 100e9)
    assert chosen(source, PrecisionConfig(bf16=True))[1] == []


def test_float32_that_does_not_fit_gives_way_and_both_sizes_are_said(rates: Any, source: ModelConfig) -> None:
    rates(310e9, 185e9)
    room = Room(lambda model, dtype: dtype.itemsize << 30, 3 << 30)
    found, codes, said = chosen(source, room=room)
    assert (found.compute, codes) == (BF16, ["precision.no_room"])
    assert "takes about 4.0 GiB of the 3.0 GiB available" in said
    assert "about 2.0 GiB" in said
    assert said.startswith("products in float32 are 1.7 times as fast as in bfloat16 here")
    assert chosen(source, room=Room(room.need, 4 << 30))[0].compute == FP32


@pytest.mark.parametrize("broken", ["empty_model", "cached_rates", "read_config"])
def test_what_cannot_be_measured_is_said_and_goes_by_the_hardware(
    broken: str, rates: Any, source: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates(310e9, 185e9)

    def fail(*_: Any) -> None:
        raise RuntimeError("its code wants numbers")

    monkeypatch.setattr(compute_type, broken, fail)
    found, codes, said = chosen(source)
    assert (found, codes) == (Precision(BF16), ["precision.unmeasured"])
    assert "RuntimeError: its code wants numbers" in said


def test_where_the_room_cannot_be_told_rates_are_kept_and_the_type_that_takes_less(
    rates: Any, source: ModelConfig
) -> None:
    rates(310e9, 185e9)

    def need(*_: Any) -> int:
        raise RuntimeError("no lengths")

    found, codes, said = chosen(source, room=Room(need, 1))
    assert found == Precision(BF16, rates=Rates(310e9, 185e9))
    assert codes == ["precision.room_unknown"]
    assert "RuntimeError: no lengths" in said


def test_a_base_in_4_bits_is_measured_by_the_shapes_that_it_stands_for(
    rates: Any, source: ModelConfig, tmp_path: Path
) -> None:
    import json
    import shutil

    folder = tmp_path / "quantised"
    shutil.copytree(source.name_or_path, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    rates(310e9, 185e9)
    assert chosen(ModelConfig(name_or_path=str(folder)))[:2] == (Precision(FP32, rates=Rates(310e9, 185e9)), [])
