"""What ranks read, each its part or the first for all, is between them the model that one process loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from built_models import built

from multimodal import save_multimodal_model
from tiny import save_tiny_model, tiny_model, tiny_tokenizer, write_rows

HERE = Path(__file__).resolve().parent
ENGINES: dict[str, dict[str, Any]] = {
    "fsdp2": {"fsdp": "full_shard auto_wrap"},
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}},
}
CASES: dict[str, dict[str, Any]] = {
    "bf16-full": {"model": "tied_bf16", "train_mode": "full"},
    "bf16-lora": {"model": "tied_bf16"},
    "experts": {"model": "mixtral"},
    "tokens": {"model": "llama", "add_tokens": ["<new>", "<newer>"], "modules_to_save": ["norm"]},
    "towers": {"model": "gemma3", "train_mode": "full"},
    "adapter": {"model": "llama", "adapter_name_or_path": "adapter"},
}
LARGE = {"hidden_size": 1024, "intermediate_size": 4096}
"""190 MB of weights in fp32, three times what else a process takes meanwhile."""


def settings_of(place: Path, output: Path, changes: dict[str, Any], engine: dict[str, Any] | None) -> dict[str, Any]:
    changes = changes | {"model_name_or_path": str(place / changes["model"])}
    if "adapter_name_or_path" in changes:
        changes["adapter_name_or_path"] = str(place / changes["adapter_name_or_path"])
    del changes["model"]
    common = {
        "train_file": str(place / "train.jsonl"),
        "output_dir": str(output),
        "template_name": "default",
        "train_mode": "lora",
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "compare": False,
        "use_cpu": True,
        "bf16": False,
        "seed": 3,
    }
    return common | changes | (engine or {})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write_rows(folder / "train.jsonl", 8)
    for name in ("llama", "mixtral"):
        save_tiny_model(folder / name, name)
    for name, changes in (("tied_bf16", {}), ("large", LARGE)):
        tiny_model("llama_tied", **changes).to(torch.bfloat16).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    save_multimodal_model(folder / "gemma3", "gemma3")
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    get_peft_model(tiny_model("llama"), adapter).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def two_ranks(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two ranks built."""
    folder = tmp_path_factory.mktemp("two")
    configurations = [
        settings_of(place, folder / f"{name}-{engine}", changes, settings)
        for engine, settings in ENGINES.items()
        for name, changes in {**CASES, "memory": {"model": "large"}}.items()
    ]
    (folder / "configurations.json").write_text(json.dumps(configurations), encoding="utf-8")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"),
            *(str(HERE / "built_models.py"), str(folder / "configurations.json")),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "FIREFLY_LANG": "en"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "loads the whole model" not in done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_shards_are_the_whole_models_weights_bit_for_bit(
    name: str, place: Path, two_ranks: Path, tmp_path: Path
) -> None:
    expected = built(settings_of(place, tmp_path / "one", CASES[name], None))
    for engine in ENGINES:
        found = torch.load(two_ranks / f"{name}-{engine}" / "built.pt")
        assert found.keys() == expected.keys()
        for path, tensor in expected.items():
            assert found[path].dtype == tensor.dtype, (engine, path)
            assert torch.equal(found[path], tensor), (engine, path)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_no_rank_holds_the_model_while_it_is_loaded(engine: str, place: Path, two_ranks: Path) -> None:
    weights = 2 * (place / "large" / "model.safetensors").stat().st_size  # in fp32, as they are computed with
    for rank in range(2):
        peak, kept = json.loads((two_ranks / f"memory-{engine}" / f"memory-{rank}.json").read_text())
        assert peak < kept + weights / 4
        assert peak < weights
