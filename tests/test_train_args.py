"""The run configurations that come with Firefly, and those that people bring from upstream."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from firefly.config import RECORDS_OF_TASK, Config, load_config, read_config_file
from firefly.console import take_notices
from firefly.data.formats import parse_record
from firefly.data.readers import read_records
from firefly.data.sources import find_sources
from firefly.data.templates import TEMPLATES
from firefly.models.loading import EMBEDDED

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "train_args").glob("*/*/*.json"))
CELLS = [(task, mode) for task in ("pretrain", "sft", "dpo") for mode in ("full", "lora", "qlora")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_configuration_of_ours_loads_and_is_what_its_place_says(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    take_notices()
    config = load_config(path)
    assert take_notices() == []  # nothing old, nothing without effect
    task, mode = path.relative_to(ROOT / "train_args").parts[:2]
    assert (config.task_type, config.adapter.mode) == (task, mode)
    assert path.stem.endswith(f"-{task}-{mode}")
    assert Path(config.output_dir).name.endswith(path.stem)
    assert config.data.template_name in ("auto", *TEMPLATES)
    for source in find_sources(config.data.train_file, "train_file", "huggingface"):
        for file in source.files:
            assert file.suffix == ".jsonl"
            for record in read_records(file, "train_file", "line"):
                assert record.problem is None
                parse_record(record.value, RECORDS_OF_TASK[config.task_type], config.data.data_format)


@pytest.mark.parametrize(("task", "mode"), CELLS)
def test_every_cell_has_a_configuration_for_a_laptop_and_one_for_a_large_model(task: str, mode: str) -> None:
    names = {load_config(path).model.name_or_path for path in FILES if path.parent == ROOT / "train_args" / task / mode}
    assert EMBEDDED in names
    assert len(names) > 1


def test_two_configurations_never_write_to_one_place() -> None:
    outputs = [load_config(path).output_dir for path in FILES]
    assert len(outputs) == len(set(outputs)) >= 2 * len(CELLS)


@pytest.mark.parametrize("path", sorted((ROOT / "train_args").rglob("*-dpo-*.json")), ids=lambda path: path.stem)
def test_preference_configurations_have_a_small_learning_rate(path: Path) -> None:
    config = load_config(path)
    assert config.training["learning_rate"] <= (5e-7 if config.adapter.mode == "full" else 5e-6)
    assert config.preference.beta == 0.1
    assert config.adapter.dropout == 0 or config.adapter.mode == "full"  # it would be switched off


# ---- upstream's files ----


Write = Callable[[dict[str, Any]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(values: dict[str, Any]) -> Path:
        path = tmp_path / "upstream.json"
        path.write_text(json.dumps(values, indent=4), encoding="utf-8")
        return path

    return write_file


def upstream_file(shared: Path, number: int, choice: int) -> tuple[str, dict[str, Any]]:
    """A file with the keys of upstream's set `number`: each key's value of number `choice` there, and paths of ours."""
    upstream = json.loads((shared / "upstream_keys.json").read_text(encoding="utf-8"))
    keys = upstream["key_sets"][number]
    task, mode = keys["example"].split("/")[:2]
    paths = {
        "output_dir": f"output/firefly-upstream-{task}-{mode}",
        "model_name_or_path": EMBEDDED,
        "train_file": str(ROOT / "data" / {"pretrain": "pretrain", "dpo": "dpo.jsonl"}.get(task, "dummy_data.jsonl")),
        "template_name": "qwen",
        "task_type": task,
        "train_mode": mode,
    }
    values = {}
    for name in keys["keys"]:
        choices = upstream["values"].get(name)
        values[name] = paths[name] if name in paths else choices[choice % len(choices)]
    return keys["example"], values


def is_kept(config: Config, name: str, value: Any) -> bool:
    """Whether the resolved configuration has an upstream key's value, under today's name."""
    today = {"warmup_ratio": "warmup_steps"}.get(name, name)
    if name == "use_unsloth":
        return today not in config.flat()
    return config.flat()[today] == {"adamw_hf": "adamw_torch"}.get(value, value)


@pytest.mark.parametrize("choice", range(4))
@pytest.mark.parametrize("number", range(7))
def test_a_file_with_the_keys_and_values_of_upstream_loads(
    number: int, choice: int, shared: Path, write: Write
) -> None:
    example, values = upstream_file(shared, number, choice)
    config = load_config(write(values))
    task, mode = example.split("/")[:2]
    assert (config.task_type, config.adapter.mode) == (task, mode)
    assert [name for name, value in values.items() if not is_kept(config, name, value)] == []
    assert dict(config.given) == values


def test_upstream_has_seven_sets_of_keys(shared: Path) -> None:
    upstream = read_config_file(shared / "upstream_keys.json")
    assert len(upstream["key_sets"]) == 7
    assert max(map(len, upstream["values"].values())) <= 4  # so four files have every value of every key
