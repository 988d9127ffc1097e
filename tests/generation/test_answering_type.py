"""`dtype: auto`: what a model was trained in, else what training would take on this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from firefly.config import ModelConfig
from firefly.errors import UsageError
from firefly.export.merge import merge
from firefly.generation import answering_type
from firefly.generation.answering_type import answering_precision, bytes_to_answer, trained_type
from firefly.generation.loading import load_for_generation
from firefly.models import compute_type, precision, products
from firefly.models.precision import Precision, Rates
from firefly.models.serving_memory import TOKENS_OF_A_REQUEST
from firefly.setup.serving_plan import make_serving_plan
from tiny import save_tiny_model, tiny_model, with_plain_lora

CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def source(tmp_path: Path) -> ModelConfig:
    return ModelConfig(name_or_path=str(save_tiny_model(tmp_path / "model")))


@pytest.fixture
def adapter(source: ModelConfig, tmp_path: Path) -> str:
    model = with_plain_lora(tiny_model("llama"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.peft_config["default"].base_model_name_or_path = source.name_or_path
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    monkeypatch.setattr(products, "NOTHING_TO_TIME", 0)

    def give(float32: float, bfloat16: float) -> None:
        found = {"frozen": Rates(float32, bfloat16)}
        monkeypatch.setattr(compute_type, "cached_rates", lambda products: found)

    return give


def trained_in(folder: str | Path, name: str) -> None:
    (Path(folder) / "run.json").write_text(json.dumps({"resolved": {"precision": name}}))


def test_what_nobody_trained_answers_in_the_faster_type(rates: Any, source: ModelConfig, adapter: str) -> None:
    for float32, expected in ((310e9, FP32), (100e9, BF16)):
        rates(float32, 185e9)
        assert answering_precision("auto", source, [], device=CPU).compute == expected
        assert answering_precision("auto", source, [adapter], device=CPU).compute == expected


def test_a_type_that_is_named_stands(rates: Any, source: ModelConfig) -> None:
    rates(310e9, 185e9)
    assert answering_precision("bfloat16", source, [], device=CPU) == Precision(BF16)
    with pytest.raises(UsageError, match="dtype = 'int8'"):
        answering_precision("int8", source, [], device=CPU)


def test_an_adapter_answers_in_the_type_that_it_was_trained_in(
    rates: Any, source: ModelConfig, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates(310e9, 185e9)
    trained_in(adapter, "bfloat16")
    assert answering_precision("auto", source, [adapter], device=CPU).compute == BF16
    assert load_for_generation(source, {"a": adapter}).model.dtype == BF16
    rates(100e9, 185e9)
    trained_in(adapter, "float32")
    assert load_for_generation(source, {"a": adapter}).model.dtype == FP32
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    trained_in(adapter, "bfloat16")
    assert answering_precision("auto", source, [adapter], device=CPU).compute == FP32


def test_adapters_of_two_types_go_by_the_measurement(
    rates: Any, source: ModelConfig, adapter: str, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    trained_in(adapter, "float32")
    trained_in(other, "bfloat16")
    for float32, expected in ((310e9, FP32), (100e9, BF16)):
        rates(float32, 185e9)
        assert answering_precision("auto", source, [adapter, str(other)], device=CPU).compute == expected


def test_a_model_trained_in_float32_that_does_not_fit_answers_in_bf16_and_says_so(
    rates: Any, source: ModelConfig, adapter: str
) -> None:
    rates(100e9, 185e9)
    trained_in(adapter, "float32")
    said: list[str] = []
    options: dict[str, Any] = {"device": CPU, "notify": lambda code, *_, **__: said.append(code)}
    assert answering_precision("auto", source, [adapter], available=1, **options).compute == BF16
    assert said == ["precision.no_room_to_answer"]


@pytest.mark.parametrize("trained", [False, True], ids=["measured", "as trained"])
def test_float32_is_only_taken_where_its_cache_holds_a_request(trained: bool, rates: Any, source: ModelConfig) -> None:
    rates(310e9, 185e9)
    if trained:
        trained_in(source.name_or_path, "float32")
    needed = bytes_to_answer(source, FP32)
    for memory, expected in ((needed + 1000, "float32"), (needed - 1000, "bfloat16")):
        asked = {"model_name_or_path": source.name_or_path}
        plan = make_serving_plan(asked, memory=f"{memory / 1e6:.6f}MB", device="cpu")
        assert plan.precision == expected
        assert plan.cache_tokens >= TOKENS_OF_A_REQUEST or expected == "bfloat16"


def test_a_checkpoint_says_its_type_itself(adapter: str) -> None:
    (Path(adapter) / "plan.json").write_text('{"training": {"precision": "bfloat16"}}')
    assert trained_type(Path(adapter)) == BF16
    (Path(adapter) / "plan.json").write_text("[")
    assert trained_type(Path(adapter)) is None


def test_a_record_that_lies_above_a_model_says_nothing_of_it(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_in(tmp_path, "bfloat16")
    assert trained_type(Path(adapter)) is None
    checkpoint = Path(shutil.copytree(adapter, tmp_path / "checkpoint-3"))
    assert trained_type(checkpoint) == BF16
    monkeypatch.chdir(checkpoint)
    assert trained_type(Path()) == BF16
    monkeypatch.chdir(tmp_path)
    assert trained_type(Path("someone/model")) is None
    trained_in(tmp_path / "adapter", "float32")
    assert trained_type(Path(adapter)) == FP32


def test_a_merged_model_answers_in_the_type_that_its_adapter_was_trained_in(
    rates: Any, source: ModelConfig, adapter: str, tmp_path: Path
) -> None:
    rates(100e9, 185e9)
    trained_in(adapter, "float32")
    merged = merge(source, adapter, tmp_path / "merged")
    assert json.loads((merged / answering_type.MERGED).read_text())["trained_in"] == "float32"
    assert answering_precision("auto", ModelConfig(name_or_path=str(merged)), [], device=CPU).compute == FP32
