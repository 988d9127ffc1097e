"""The JSON schema of a run file: what editors complete and check is what loading takes."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from firefly.cli import main
from firefly.config import legacy, load_config, own_fields
from firefly.config.json_schema import json_schema
from firefly.config.training_arguments import training_fields
from firefly.console import take_notices
from firefly.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "train_args").glob("*/*/*.json"))
LEAST = {"output_dir": "out", "model_name_or_path": "model", "train_file": "data.jsonl"}


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json_schema()


@pytest.fixture(scope="module")
def validator(schema: dict[str, Any]) -> Draft202012Validator:
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_every_configuration_of_ours_fits_the_schema(validator: Draft202012Validator) -> None:
    assert len(FILES) > 15
    for path in FILES:
        problems = [error.message for error in validator.iter_errors(json.loads(path.read_text(encoding="utf-8")))]
        assert problems == [], path


def test_the_tutorials_and_upstreams_values_fit_the_schema(validator: Draft202012Validator, shared: Path) -> None:
    upstream = json.loads((shared / "upstream_keys.json").read_text(encoding="utf-8"))
    for keys in upstream["key_sets"]:
        for name in keys["keys"]:
            for value in upstream["values"].get(name, ["text"]):
                problems = [error.message for error in validator.iter_errors(LEAST | {name: value})]
                assert problems == [], name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rat", 1e-4),
        ("lora_rank", 0),
        ("lora_rank", "many"),
        ("lora_dropout", 1),
        ("label_smoothing", 0.5),
        ("task_type", "chat"),
        ("train_mode", None),
        ("gradient_checkpointing", "always"),
        ("tokens_per_microbatch", 0),
        ("train_file", True),
        ("add_tokens", [""]),
        ("learning_rate", -1),
        ("seed", 2**32),
        ("lr_scheduler_type", "cosin"),
        ("logging_first_step", "maybe"),
    ],
)
def test_what_an_editor_marks_is_a_fault(validator: Draft202012Validator, key: str, value: Any) -> None:
    assert not validator.is_valid(LEAST | {key: value})
    if key != "lr_scheduler_type":  # transformers refuses it when its arguments are built
        with pytest.raises(UsageError, match=key):
            load_config(LEAST | {key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_prompt_length", None),
        ("gradient_checkpointing", True),
        ("gradient_checkpointing", "auto"),
        ("tokens_per_microbatch", 4096),
        ("resume_from_checkpoint", "out/checkpoint-5"),
        ("lora_target", ["q_proj"]),
        ("train_file", [{"path": "a.jsonl", "weight": 2}]),
        ("report_to", ["wandb"]),
        ("fsdp", True),
        ("optim", "adamw_hf"),
        ("warmup_ratio", 0.1),
        ("use_unsloth", False),
        ("adafactor", False),
        ("activation_checkpointing", "auto"),
    ],
)
def test_what_loads_fits_the_schema(validator: Draft202012Validator, key: str, value: Any) -> None:
    assert [error.message for error in validator.iter_errors(LEAST | {key: value})] == []
    load_config(LEAST | {key: value})


def test_every_key_has_a_title_a_default_and_a_description(schema: dict[str, Any]) -> None:
    properties = schema["properties"]
    older = {*legacy.RENAMED, *legacy.IGNORED, "adafactor"}
    assert properties.keys() == {"$schema", *own_fields(), *training_fields(), *older}
    assert schema["required"] == list(LEAST)
    assert "$ref" not in json.dumps(schema)  # one object: nothing to look up elsewhere
    for name, item in properties.items():
        assert item["title"], name
        assert item["description"], name
        assert ("default" in item) != (name in {"$schema", *LEAST, *older - set(training_fields())}), name
    assert properties["logging_steps"]["default"] == 10  # ours, not transformers'
    assert all(properties[name]["deprecated"] for name in older - set(training_fields()))


def test_descriptions_are_in_the_users_language_and_ours_in_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIREFLY_LANG", "en")
    english = json_schema()["properties"]
    monkeypatch.setenv("FIREFLY_LANG", "zh")
    chinese = json_schema()["properties"]
    for name in own_fields():
        both = english[name]["x-description"]
        assert both == chinese[name]["x-description"] == {
            "en": english[name]["description"], "zh": chinese[name]["description"]
        }  # fmt: skip
        assert both["en"] != both["zh"]
    assert english["beta"]["description"].startswith("`dpo`, `kto`: ")
    assert chinese["beta"]["description"].startswith("`dpo`、`kto`：")


def test_a_refused_key_and_one_without_effect_are_not_suggested(schema: dict[str, Any]) -> None:
    properties = schema["properties"]
    assert "upload output_dir after training" in properties["push_to_hub"]["description"]
    assert "has no effect" in properties["per_device_eval_batch_size"]["description"]
    assert properties["push_to_hub"]["doNotSuggest"]
    assert "doNotSuggest" not in properties["learning_rate"]


@pytest.mark.parametrize("place", ["https://example.org/firefly.schema.json", "../firefly.schema.json"])
def test_a_run_file_may_name_its_schema(place: str, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"$schema": place} | LEAST), encoding="utf-8")
    take_notices()
    config = load_config(file)
    assert take_notices() == []
    assert "$schema" not in config.flat()
    assert config.given["$schema"] == place


def test_the_command_prints_the_schema(capsys: pytest.CaptureFixture[str], schema: dict[str, Any]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == schema.keys()


def test_the_tables_of_keys_in_the_documentation_are_made_from_the_keys() -> None:
    spec = importlib.util.spec_from_file_location("key_tables", ROOT / "script" / "key_tables.py")
    assert spec
    assert spec.loader
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for page, language in tables.PAGES.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        assert "<!-- keys: " in text
        assert tables.written(text, language) == text, "python script/key_tables.py writes it anew"
        for link in re.findall(r"\]\(([\w/.-]+\.md)", text):
            assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"
