"""Models of train_args/ are planned for without a hub, from shapes that came along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from firefly import hub
from firefly.cli import main
from firefly.config import load_config
from firefly.models.known_shapes import KNOWN, known_shape
from firefly.setup.plan import with_known_shape
from tiny import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
# What their makers publish, in billions: all parameters, and those outside the embeddings (head included there).
PUBLISHED = {
    "Qwen/Qwen1.5-14B": (14.17, 12.61),
    "Qwen/Qwen3-1.7B": (1.72, 1.41),
    "Qwen/Qwen3-1.7B-Base": (1.72, 1.41),
    "Qwen/Qwen3-8B": (8.19, 6.95),
    "Qwen/Qwen3-8B-Base": (8.19, 6.95),
    "smollm2-135m-instruct": (0.1345, 0.1062),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_has_the_published_number_of_parameters(name: str) -> None:
    config = AutoConfig.from_pretrained(known_shape(name))
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    total = sum(p.numel() for p in model.parameters())
    tables = {id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    whole, body = PUBLISHED[name]
    assert total / 1e9 == pytest.approx(whole, abs=0.0051 if whole > 1 else 0.0001)
    assert (total - sum(tables.values())) / 1e9 == pytest.approx(body, abs=0.0051 if whole > 1 else 0.0001)


def test_every_model_of_train_args_came_along() -> None:
    named = {json.loads(file.read_text()).get("model_name_or_path") for file in ROOT.glob("train_args/*/*/*.json")}
    assert {name for name in named if known_shape(name) is None} == set()
    assert {folder.name for folder in known_shape("Qwen/Qwen3-8B").parent.iterdir()} == set(KNOWN.values())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("/your/model/path/to//Qwen/Qwen1.5-14B", "qwen1.5-14b"),
        ("qwen/qwen3-8b", "qwen3-8b"),
        ("D:\\models\\Qwen\\Qwen3-8B-Base", "qwen3-8b-base"),
        ("SmolLM2-135M-Instruct", "smollm2-135m-instruct"),
        ("/models/qwen1.5-14b-mine", None),
        ("mine/Qwen3-8B", None),
        ("org/smollm2-135m-instruct", None),
    ],
)
def test_a_shape_is_found_by_the_end_of_a_name(name: str, folder: str | None) -> None:
    found = known_shape(name)
    assert (found and found.name) == folder


@pytest.fixture
def unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_answer(_: Any) -> None:
        raise hub.NoAnswer("no answer")

    monkeypatch.setattr(hub, "_patiently", no_answer)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub._find_model.cache_clear()


def test_a_plan_without_a_hub_says_whose_shapes_it_counts(
    unreachable: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model = save_tiny_model(tmp_path / "shapes" / "tiny")
    for file in model.iterdir():
        if file.name != "config.json":
            file.unlink()
    monkeypatch.setattr("firefly.models.known_shapes.FOLDER", tmp_path / "shapes")
    monkeypatch.setitem(KNOWN, "org/name", "tiny")
    capsys.readouterr()
    arguments = ["plan", "--train_mode", "lora", "--max_seq_length", "64", "--tflops", "1", "--json"]
    assert main([*arguments, "--model_name_or_path", "Org/Name"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert main([*arguments, "--model_name_or_path", str(model)]) == 0
    local = json.loads(capsys.readouterr().out)
    assert told["parameters"] == local["parameters"]
    assert told["parts"] == local["parts"]
    (note,) = set(told["notes"]) - set(local["notes"])
    assert "Org/Name" in note
    assert "that Firefly brings along" in note


def test_a_path_that_is_not_there_yet_is_planned_for_by_its_end() -> None:
    path, notes = "/your/model/path/to//Qwen/Qwen1.5-14B", []
    config = with_known_shape(load_config({}, {"model_name_or_path": path}, required=()), notes)
    assert config.model.name_or_path == str(known_shape("Qwen/Qwen1.5-14B"))
    assert path in notes[0]


def test_another_model_without_a_hub_is_refused(unreachable: None, capsys: Any) -> None:
    assert main(["plan", "--model_name_or_path", "org/other"]) == 2
    assert "HF_ENDPOINT" in capsys.readouterr().err


@pytest.mark.slow
def test_the_tutorials_configuration_is_planned_without_a_hub(unreachable: None, capsys: Any) -> None:
    config = str(ROOT / "train_args/sft/qlora/qwen1.5-14b-sft-qlora.json")
    assert main(["plan", config, "--memory", "80GB", "--tflops", "400", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"] - told["trained_parameters"] == pytest.approx(14.17e9, rel=1e-3)
    assert told["fits"]
