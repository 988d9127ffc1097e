"""Which engine a configuration and a launcher ask for, with which settings, and what is refused by name."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from firefly.config import load_config
from firefly.console import take_notices
from firefly.distributed.backends import (
    BACKENDS,
    Backend,
    refuse_uneven_passes,
    resolve_backend,
    settle_rank_variables,
    take_launcher_settings,
)
from firefly.errors import UsageError
from firefly.models.memory import Forecast
from firefly.models.precision import Precision

ROOT = Path(__file__).resolve().parents[2]
FP32, FP16 = Precision(torch.float32), Precision(torch.float16, scaled=True)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that is given back as it was, and a stand-in for the package."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    if "deepspeed" not in sys.modules:
        monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))


def resolve(ranks: int = 2, **changes: Any) -> tuple[Backend, list[str]]:
    """The engine, and the keys that notices name."""
    if ranks > 1:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks))
    settings = {"model_name_or_path": "m", "train_file": "f", "output_dir": "o", "train_mode": "lora", **changes}
    config = load_config(settings)
    take_notices()
    engine = resolve_backend(config, take_launcher_settings())
    settle_rank_variables(engine)
    return engine, [item["message"] for item in take_notices()]


def deepspeed(settings: dict[str, Any], precision: Precision = FP32, **changes: Any) -> tuple[dict[str, Any], str]:
    engine, notices = resolve(deepspeed=settings, **changes)
    return engine.arguments(precision)["deepspeed"], "\n".join(notices)


def test_one_process_is_a_run_without_a_group() -> None:
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    assert resolve(ranks=1)[0] == BACKENDS["single"]
    assert "RANK" not in os.environ
    assert "WORLD_SIZE" not in os.environ


def test_several_processes_without_a_word_are_ddp() -> None:
    engine, notices = resolve()
    assert engine == BACKENDS["ddp"]
    assert engine.arguments(FP32) == {"deepspeed": None, "fsdp": None, "fsdp_config": None}
    assert notices == []


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_is_told_what_firefly_decides(stage: int) -> None:
    given = {
        "zero_optimization": {"stage": stage, "overlap_comm": True},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 4,
        "bf16": {"enabled": True},
        "fp16": {"enabled": "auto", "loss_scale_window": 7},
        "steps_per_print": 10,
    }
    settings, notices = deepspeed(given)
    for name in ("scheduler", "optimizer", "train_batch_size", "gradient_accumulation_steps", "bf16"):
        assert f"{name} is ignored" in notices
    for name in ("train_micro_batch_size_per_gpu", "fp16"):
        assert name not in notices
    assert "scheduler" not in settings
    assert "optimizer" not in settings
    assert settings["zero_optimization"]["overlap_comm"] is True
    assert settings["gradient_accumulation_steps"] == settings["train_batch_size"] == "auto"
    assert settings["steps_per_print"] == 10
    assert settings["bf16"] == {"enabled": False}
    assert settings["fp16"] == {"enabled": False, "loss_scale_window": 7}
    assert resolve(deepspeed=given)[0].arguments(FP16)["deepspeed"]["fp16"]["enabled"] is True
    assert given["optimizer"]  # what the user gave stays as it is


def test_deepspeed_alone_gets_a_group_of_its_own() -> None:
    engine, _ = resolve(ranks=1, deepspeed={"zero_optimization": {"stage": 2}})
    assert engine.name == "zero2"
    assert os.environ["WORLD_SIZE"] == "1"
    assert int(os.environ["MASTER_PORT"]) > 0


@pytest.mark.parametrize("name", ["ds_z2_config", "ds_z3_config", "ds_z3_offload_config"])
def test_our_deepspeed_files_say_nothing_that_is_ignored(name: str) -> None:
    engine, notices = resolve(deepspeed=str(ROOT / "train_args" / f"{name}.json"))
    assert engine.name == {"2": "zero2", "3": "zero3"}[name[4]]
    assert notices == []


@pytest.mark.parametrize(
    ("fsdp", "config", "expected"),
    [
        (True, None, {}),
        ("full_shard auto_wrap", None, {"reshard_after_forward": True}),
        ("shard_grad_op", None, {"reshard_after_forward": False}),
        (["full_shard", "offload"], None, {"reshard_after_forward": True, "cpu_offload": True}),
        (True, {"fsdp_reshard_after_forward": False}, {"reshard_after_forward": False}),
        (True, str(ROOT / "train_args/fsdp_config.json"), {"reshard_after_forward": True, "cpu_offload": False}),
    ],
)
def test_older_words_for_fsdp_mean_fsdp2(fsdp: Any, config: Any, expected: dict[str, Any]) -> None:
    engine, notices = resolve(fsdp=fsdp, fsdp_config=config)
    found = engine.arguments(FP32)
    assert found["fsdp"] is True
    assert found["fsdp_config"] == {"version": 2, "state_dict_type": "FULL_STATE_DICT", **expected}
    assert notices == []


def test_what_fsdp_settings_lose_is_said() -> None:
    config = {
        "version": 1,
        "state_dict_type": "SHARDED_STATE_DICT",
        "activation_checkpointing": True,
    }
    _, notices = resolve(fsdp=True, fsdp_config=config)
    for word in ("FSDP2", "state_dict_type", "activation_checkpointing"):
        assert any(word in notice for notice in notices), word


def test_fsdp_with_one_process_is_a_plain_run_and_said() -> None:
    engine, notices = resolve(ranks=1, fsdp=True)
    assert engine == BACKENDS["single"]
    assert "one process" in notices[0]


def test_accelerates_settings_are_taken_over() -> None:
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_RESHARD_AFTER_FORWARD="false", FSDP_OFFLOAD_PARAMS="true")
    os.environ.update(ACCELERATE_MIXED_PRECISION="fp16", ACCELERATE_DYNAMO_BACKEND="no")
    engine, notices = resolve()
    assert engine.name == "fsdp2"
    assert engine.settings["fsdp_config"]["reshard_after_forward"] is False
    assert engine.settings["fsdp_config"]["cpu_offload"] is True
    assert len(notices) == 1
    assert "ACCELERATE_MIXED_PRECISION" in notices[0]
    assert not any(name.startswith("ACCELERATE_USE") or name.endswith("PRECISION") for name in os.environ)


def test_accelerates_deepspeed_is_taken_over(tmp_path: Path) -> None:
    os.environ.update(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE="3")
    os.environ["ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"] = "cpu"
    engine, _ = resolve()
    assert engine.name == "zero3"
    assert engine.settings["deepspeed"]["zero_optimization"]["offload_param"] == {"device": "cpu"}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    os.environ.update(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_CONFIG_FILE=str(file))
    assert resolve()[0].name == "zero1"


BEST_OF_MODELS = {
    "eval_ratio": 0.1,
    "eval_strategy": "steps",
    "save_only_model": True,
    "load_best_model_at_end": True,
    "save_strategy": "steps",
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fsdp": True, "deepspeed": {"zero_optimization": {"stage": 2}}}, "keep one"),
        ({"fsdp": True, "train_mode": "qlora"}, "qlora cannot run with fsdp2"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}, "train_mode": "qlora"}, "qlora cannot run with zero3"),
        ({"deepspeed": {"zero_optimization": {"stage": 4}}}, "zero_optimization.stage = 4"),
        ({"deepspeed": "nowhere.json"}, "nowhere.json does not exist"),
        ({"fsdp": "hybrid_shard"}, "hybrid_shard"),
        ({"fsdp": True, "torch_compile": True}, "torch_compile cannot run with fsdp2"),
        ({"fsdp": True, "use_dora": True}, "use_dora cannot run with fsdp2"),
        ({"fsdp": True, **BEST_OF_MODELS}, "load_best_model_at_end .* fsdp2"),
        ({"deepspeed": {"zero_optimization": {"stage": 1}}, **BEST_OF_MODELS}, "load_best_model_at_end .* zero1"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        resolve(**changes)


@pytest.mark.parametrize("fsdp", ["full_shard", ""])
@pytest.mark.parametrize("attention", ["isolated", "joined"])
@pytest.mark.parametrize("layout", ["segments", "solo"])
def test_documents_apart_are_refused_where_weights_are_divided(fsdp: str, attention: str, layout: str) -> None:
    """Ranks would call the model as often as their blocks hold documents, and wait for each other."""
    engine, _ = resolve(**({"fsdp": fsdp} if fsdp else {}))
    values = {"model_name_or_path": "m", "train_file": "f", "output_dir": "o", "task_type": "pretrain"}
    config = load_config(values | {"document_attention": attention})
    if fsdp and attention == "isolated" and layout == "solo":
        with pytest.raises(UsageError, match="document_attention"):
            refuse_uneven_passes(config, layout, engine)
    else:
        refuse_uneven_passes(config, layout, engine)


def test_without_the_package_deepspeed_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UsageError, match="pip install"):
        resolve(deepspeed={"zero_optimization": {"stage": 2}})


def test_a_rank_needs_its_share_of_what_is_divided() -> None:
    parts = {"weights": 80, "adapter": 40, "gradients": 40, "optimizer": 80, "activations": 7}
    os.environ["WORLD_SIZE"] = "4"
    shares = {name: engine.share(Forecast(parts, 80, 1000)).parts for name, engine in BACKENDS.items()}
    assert shares["ddp"] == parts
    assert shares["zero1"] == parts | {"optimizer": 20}
    assert shares["zero2"] == parts | {"optimizer": 20, "gradients": 10}
    assert shares["zero3"] == shares["fsdp2"] == {name: size // (1 if size == 7 else 4) for name, size in parts.items()}
