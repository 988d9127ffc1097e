"""The configuration: one flat file, checked whole before anything heavy starts."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firefly.config import (
    PREFERENCE_LOSS_NAMES,
    UNUSED,
    Config,
    legacy,
    load_config,
    names_in,
    own_fields,
    parse_overrides,
    read_config_file,
)
from firefly.config.checking import run_file
from firefly.config.training_arguments import training_fields
from firefly.console import take_notices
from firefly.errors import UsageError

LEAST = {"output_dir": "out", "model_name_or_path": "model", "train_file": "data.jsonl"}


def configured(**values: Any) -> Config:
    return load_config(LEAST | values)


def refused(**values: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        configured(**values)
    return caught.value


def notices(**values: Any) -> list[str]:
    take_notices()
    configured(**values)
    return [item["message"] for item in take_notices()]


@pytest.fixture
def write(tmp_path: Path):
    def write_file(text: str | bytes, name: str = "config.json") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write_file


# ---- the tutorial and upstream's files ----


@pytest.fixture(scope="session")
def tutorial_json(shared: Path) -> str:
    blocks = re.findall(r"~~~json\n(.*?)~~~", (shared / "tutorial.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    return blocks[0]


def test_every_key_of_the_tutorial_lands_where_it_is_used(tutorial_json, write):
    config = load_config(write(tutorial_json))
    assert config.task_type == "sft"
    assert config.output_dir == "output/firefly-qwen1.5-14b-sft-qlora"
    assert config.model.name_or_path == "/your/model/path/to//Qwen/Qwen1.5-14B"
    assert config.data.train_file == "./data/moss-003-sft-data.jsonl"
    assert (config.data.template_name, config.data.max_seq_length) == ("qwen", 1024)
    assert (config.adapter.mode, config.adapter.rank, config.adapter.alpha, config.adapter.dropout) == (
        "qlora", 64, 16, 0.05,
    )  # fmt: skip
    assert (config.step.per_device_examples, config.step.accumulation, config.step.examples_per_rank) == (1, 2, 2)
    assert config.step.gradient_checkpointing is True
    assert (config.precision.fp16, config.precision.bf16) == (True, None)
    assert dict(config.training) == {
        "num_train_epochs": 1.0,
        "learning_rate": 1e-4,
        "logging_steps": 300.0,
        "save_steps": 500.0,
        "save_total_limit": 1,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 3000.0,
        "disable_tqdm": False,
        "optim": "paged_adamw_32bit",
        "seed": 42,
        "report_to": "tensorboard",
        "dataloader_num_workers": 5,
        "save_strategy": "steps",
        "weight_decay": 0.0,
        "max_grad_norm": 0.3,
        "remove_unused_columns": False,
    }
    assert dict(config.given) == json.loads(tutorial_json)


def test_the_tutorial_gives_no_notice(tutorial_json):
    assert notices(**json.loads(tutorial_json)) == []


def test_the_tutorials_arguments_are_valid_for_transformers(tutorial_json, tmp_path):
    from transformers import TrainingArguments

    config = load_config(json.loads(tutorial_json))
    values = dict(config.training) | {"output_dir": str(tmp_path), "optim": "adamw_torch"}
    assert TrainingArguments(**values).warmup_steps == 3000


def upstream_files(shared: Path):
    """Every SFT key set of upstream with every value that a key takes there, one after another."""
    upstream = json.loads((shared / "upstream_keys.json").read_text(encoding="utf-8"))
    for keys in upstream["key_sets"]:
        if "task_type" in keys["keys"]:
            continue
        values = {name: upstream["values"].get(name, ["text"]) for name in keys["keys"]}
        for number in range(max(map(len, values.values()))):
            yield keys["example"], {name: choices[number % len(choices)] for name, choices in values.items()}


def test_upstreams_sft_files_load_unchanged(shared):
    count = 0
    for example, values in upstream_files(shared):
        config = load_config(values)
        assert config.adapter.mode == values.get("train_mode", "qlora"), example
        assert set(values) - set(config.flat()) <= {"use_unsloth"}, example
        count += 1
    assert count >= 8


def test_what_upstreams_files_ask_for_in_vain_is_said():
    assert notices(optim="adamw_hf") == ["optim adamw_hf is read as adamw_torch."]
    assert notices(use_unsloth=True) == ["use_unsloth has no effect any more and is ignored."]
    assert notices(use_unsloth=False) == []
    assert notices(warmup_ratio=0.01) == ["warmup_ratio is read as warmup_steps, its name today."]
    assert notices(max_prompt_length=300) == ["max_prompt_length has no effect with task_type sft."]
    assert notices(document_attention="joined") == ["document_attention has no effect with task_type sft."]
    assert notices(task_type="pretrain", thinking="keep") == ["thinking has no effect with task_type pretrain."]
    assert notices(task_type="dpo", train_on="all") == ["train_on has no effect with task_type dpo."]
    assert notices(task_type="dpo", label_smoothing=0.1) == [
        "label_smoothing has no effect with preference_loss sigmoid; robust, simpo and cpo use it."
    ]
    assert notices(train_mode="full", lora_rank=8) == ["lora_rank has no effect with train_mode full."]


def test_the_names_of_preference_losses_are_those_of_their_table():
    from firefly.tasks.preference_losses import PREFERENCE_LOSSES

    assert tuple(PREFERENCE_LOSSES) == PREFERENCE_LOSS_NAMES


def test_a_preference_loss_without_a_signal_is_refused():
    assert "beta = 0" in str(refused(task_type="dpo", beta=0))
    assert "at least 0 and less than 0.5" in str(
        refused(task_type="dpo", preference_loss="robust", label_smoothing=0.5)
    )


def test_null_switches_the_prompt_limit_off():
    assert configured(max_prompt_length=None).data.max_prompt_length is None


def test_held_out_data_comes_from_one_place_and_early_stopping_needs_it():
    assert "eval_file and eval_ratio" in str(refused(eval_file="a.jsonl", eval_ratio=0.1))
    assert "early_stopping_patience = 2 needs held-out data" in str(refused(early_stopping_patience=2))
    assert "load_best_model_at_end = true needs held-out data" in str(refused(load_best_model_at_end=True))
    training = configured(eval_ratio=0.1, early_stopping_patience=2, eval_steps=5, eval_strategy="steps").training
    assert training["load_best_model_at_end"]
    assert (training["save_strategy"], training["save_steps"]) == ("steps", 5)


def test_early_stopping_saves_at_each_evaluation_and_knows_a_metric():
    common: dict[str, Any] = {"eval_ratio": 0.1, "early_stopping_patience": 2}
    training = configured(**common, eval_strategy="steps").training
    assert training["save_steps"] == training["logging_steps"]  # what transformers takes eval_steps to be
    assert configured(**common, load_best_model_at_end=False).training["metric_for_best_model"] == "loss"
    assert "eval_strategy" in str(refused(**common, eval_strategy="no"))
    assert "save_strategy" in str(refused(**common, save_strategy="no"))
    assert configured(**common, save_strategy="no", load_best_model_at_end=False).training["save_strategy"] == "no"
    (said,) = notices(**common, save_steps=100)
    assert "save_steps has no effect" in said


@pytest.mark.parametrize(
    "values",
    [
        {"torch_empty_cache_steps": 4},
        {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"eval_accumulation_steps": 2},
        {"early_stopping_threshold": 0.1},
        {"train_mode": "lora", "nf4_cache": True},
    ],
    ids=str,
)
def test_a_key_without_effect_is_said(values):
    (said,) = notices(**values)
    assert list(values)[-1] in said


# ---- unknown keys and wrong values ----


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("learning_rat", "learning_rate"),
        ("lora_r", "lora_rank"),
        ("gradient_accumulation", "gradient_accumulation_steps"),
        ("max_seq_len", "max_seq_length"),
        ("template", "template_name"),
        ("train_files", "train_file"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(wrong, near):
    error = refused(**{wrong: 1})
    assert (error.code, error.values["near"]) == ("config.unknown_key", near)
    assert repr(wrong) in str(error)
    assert near in str(error)


def test_an_unknown_key_like_no_other_still_gets_a_message():
    assert refused(**{"§§§": 1}).code == "config.unknown_key"


@pytest.mark.parametrize("missing", LEAST)
def test_a_required_key_that_is_missing_or_empty_is_named(missing):
    for values in ({name: LEAST[name] for name in LEAST if name != missing}, LEAST | {missing: ""}):
        with pytest.raises(UsageError, match=missing):
            load_config(values)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_seq_length", "many"),
        ("max_seq_length", 1.5),
        ("max_seq_length", True),
        ("max_seq_length", None),
        ("max_seq_length", [1024]),
        ("max_seq_length", 1),
        ("lora_rank", 0),
        ("lora_dropout", 1),
        ("lora_dropout", -0.1),
        ("lora_alpha", float("nan")),
        ("max_lost_share", "half"),
        ("max_malformed_rows", -1),
        ("train_mode", "lor"),
        ("train_mode", None),
        ("task_type", "chat"),
        ("train_on", "first"),
        ("hub", "hf"),
        ("fp16", "yes"),
        ("fp16", 1),
        ("trust_remote_code", "maybe"),
        ("train_file", {"path": "a.jsonl"}),
        ("train_file", True),
        ("tokens_per_microbatch", "lots"),
        ("tokens_per_microbatch", 0),
        ("gradient_checkpointing", "always"),
        ("gradient_checkpointing", 1),
        ("gradient_checkpointing", None),
        ("per_device_train_batch_size", 0),
        ("gradient_accumulation_steps", "2.5"),
        ("resume_from_checkpoint", 500),
        ("learning_rate", "fast"),
        ("learning_rate", None),
        ("learning_rate", -1e-4),
        ("learning_rate", float("nan")),
        ("learning_rate", 10**400),
        ("num_train_epochs", {}),
        ("num_train_epochs", -1),
        ("seed", "x"),
        ("seed", -1),
        ("seed", None),
        ("logging_first_step", "maybe"),
        ("dataloader_num_workers", -1),
        ("optim", None),
        ("eval_strategy", "steps"),
        ("eval_on_start", True),
        ("use_dora", "maybe"),
        ("lora_target", []),
        ("lora_target", ""),
        ("lora_target", [1]),
        ("modules_to_save", [["lm_head"]]),
        ("add_tokens", "<x>"),
        ("add_tokens", [""]),
    ],
)
def test_a_wrong_type_or_value_is_refused_with_its_key(key, value):
    assert key in str(refused(**{key: value}))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("max_seq_length", "512", 512),
        ("max_seq_length", 512.0, 512),
        ("max_seq_length", "1e3", 1000),
        ("lora_alpha", 32, 32.0),
        ("learning_rate", "1e-4", 1e-4),
        ("learning_rate", 1, 1.0),
        ("seed", "7", 7),
        ("fp16", "false", False),
        ("gradient_checkpointing", "True", True),
        ("gradient_checkpointing", "auto", "auto"),
        ("tokens_per_microbatch", "4096", 4096),
        ("tokens_per_microbatch", "auto", "auto"),
        ("resume_from_checkpoint", "true", True),
        ("resume_from_checkpoint", "out/checkpoint-5", "out/checkpoint-5"),
        ("output_dir", 2024, "2024"),
        ("output_dir", Path("out/x"), "out/x"),
        ("run_name", 7, "7"),
        ("template_name", "", "auto"),
        ("eval_file", "", None),
        ("fp16", None, None),
        ("eval_strategy", False, "no"),
        ("save_strategy", False, "no"),
        ("report_to", None, "none"),
        ("report_to", [], "none"),
        ("save_total_limit", None, None),
        ("max_steps", -1, -1),
    ],
)
def test_a_value_is_read_as_what_it_plainly_is(key, value, expected):
    value = configured(**{key: value}).flat()[key]
    assert (value, type(value)) == (expected, type(expected))


def test_both_precisions_at_once_are_refused():
    assert "fp16" in str(refused(fp16=True, bf16=True))
    assert configured(fp16=True, bf16=False).precision.fp16


def test_an_evaluation_file_is_used_even_without_a_strategy():
    assert configured(eval_file="e.jsonl").training["eval_strategy"] == "epoch"
    assert configured(eval_file="e.jsonl", eval_steps=5).training["eval_strategy"] == "steps"
    assert configured(eval_file="e.jsonl", eval_strategy="no").training["eval_strategy"] == "no"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_liger_kernel", True),
        ("auto_find_batch_size", True),
        ("label_smoothing_factor", 0.1),
        ("train_sampling_strategy", "group_by_length"),
        ("push_to_hub", True),
        ("neftune_noise_alpha", 5),
    ],
)
def test_what_this_version_does_not_do_is_refused_and_not_ignored(key, value):
    assert key in str(refused(**{key: value}))


@pytest.mark.parametrize(
    ("key", "value"), [("deepspeed", None), ("deepspeed", ""), ("fsdp", ""), ("push_to_hub", False)]
)
def test_a_key_that_asks_for_nothing_is_accepted(key, value):
    assert configured(**{key: value}).flat()[key] == value


# ---- what a Config is ----


def test_a_config_cannot_be_changed():
    config = configured()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.data.max_seq_length = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.training["seed"] = 5  # type: ignore[index]


def test_the_flat_view_is_json_and_loads_again():
    first = configured(train_mode="lora", learning_rate=1e-4, seed=3, fp16=True)
    flat = json.loads(json.dumps(first.flat()))
    again = load_config({name: value for name, value in flat.items() if value is not None})
    assert again.flat() == first.flat()


def test_a_config_can_be_pickled():
    config = configured(lora_target=["q_proj"], seed=3)
    again = pickle.loads(pickle.dumps(config))
    assert again == config
    assert (again.training["seed"], again.given["lora_target"]) == (3, ["q_proj"])


def test_a_key_belongs_to_one_field():
    config = configured()
    sections = [config, *(getattr(config, spec.name) for spec in dataclasses.fields(config))]
    names = [
        spec.metadata["key"] or spec.name
        for section in sections
        if dataclasses.is_dataclass(section)
        for spec in dataclasses.fields(section)
        if "key" in spec.metadata
    ]
    assert len(names) == len(set(names)) == len(own_fields()) > 50


def test_a_key_is_without_effect_under_settings_that_do_not_read_it():
    unused = {(setting, value): names for setting, value, names in UNUSED}
    assert set(unused["task_type", "sft"]) >= {"beta", "max_prompt_length", "document_attention"}
    assert not set(unused["task_type", "dpo"]) & {"beta", "max_prompt_length", "template_name"}
    assert unused["train_mode", "lora"] == ("nf4_cache",)
    assert unused["train_mode", "qlora"] == ()
    assert "output_dir" not in {name for names in unused.values() for name in names}


# ---- files ----


def test_yaml_reads_like_json(write):
    text = "output_dir: out\nmodel_name_or_path: m\ntrain_file: d.jsonl\n"
    text += "learning_rate: 1e-4\nmax_seq_length: 1e3\nfp16: true\n"
    config = load_config(write(text, "config.yaml"))
    assert config.training["learning_rate"] == 1e-4
    assert config.data.max_seq_length == 1000
    assert config.precision.fp16 is True


@pytest.mark.parametrize("name", ["config.json", "config.yml"])
def test_a_byte_order_mark_is_no_part_of_the_file(write, name):
    assert read_config_file(write(b'\xef\xbb\xbf{"seed": 1}', name)) == {"seed": 1}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('{"seed": 1,\n "fp16": true,\n "seed": 2}', "c.json"),
        ("seed: 1\nfp16: true\nseed: 2\n", "c.yaml"),
        ('{"a": 1, "fsdp_config":\n\n{"seed": 1, "seed": 2}}', "c.json"),
    ],
)
def test_a_duplicate_key_is_named_with_its_line(write, text, name):
    path = write(text, name)
    with pytest.raises(UsageError, match="duplicate key") as caught:
        read_config_file(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "'seed'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "name", "line"),
    [('{\n "seed": 1,\n}', "c.json", 3), ('{"seed": 1\n', "c.json", 2), ("a: 1\nb: [1\nc: 2\n", "c.yaml", 3)],
)
def test_broken_syntax_is_named_with_file_and_line(write, text, name, line):
    path = write(text, name)
    with pytest.raises(UsageError) as caught:
        read_config_file(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("[1, 2]", "c.json"),
        ('"text"', "c.json"),
        ("", "c.json"),
        ("", "c.yaml"),
        ("- a\n", "c.yaml"),
        ("1: 2\n", "c.yaml"),
        ("? [a]\n: 1\n", "c.yaml"),
        ('{"seed": ' + "1" * 5000 + "}", "c.json"),
        ("seed: " + "1" * 5000, "c.yaml"),
        ("[" * 100_000, "c.json"),
        ("[" * 100_000, "c.yaml"),
        (b"\xff\xfe{\x00}\x00", "c.json"),
        (b"\x00\x01\x02", "c.yaml"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_by_name(write, text, name):
    path = write(text, name)
    with pytest.raises(UsageError, match=re.escape(str(path))):
        read_config_file(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        load_config(tmp_path / "none.json")
    with pytest.raises(UsageError, match="cannot read"):
        load_config(tmp_path)


@given(st.binary(max_size=200), st.sampled_from(["c.json", "c.yaml"]))
def test_reading_any_bytes_gives_an_object_or_a_usage_error(tmp_path_factory, content, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    try:
        result = read_config_file(path)
    except UsageError as error:
        result = str(error)
    assert isinstance(result, dict) or str(path) in result


# ---- overrides ----


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--seed", "7"], {"seed": 7}),
        (["--seed=7"], {"seed": 7}),
        (["--max_steps", "-1"], {"max_steps": -1}),
        (["--fp16"], {"fp16": True}),
        (["--fp16", "--seed", "7"], {"fp16": True, "seed": 7}),
        (["--fp16", "False"], {"fp16": False}),
        (["--bf16", "false"], {"bf16": False}),
        (["--eval_file", "None"], {"eval_file": None}),
        (["--save_total_limit=null"], {"save_total_limit": None}),
        (["--label_names", '["a", "b"]'], {"label_names": ["a", "b"]}),
        (["--lr_scheduler_kwargs={\"x\": 1}"], {"lr_scheduler_kwargs": {"x": 1}}),
        (["--train_file", "a b=c.jsonl"], {"train_file": "a b=c.jsonl"}),
        (["--train_file=a=b"], {"train_file": "a=b"}),
        (["--eval_file="], {"eval_file": ""}),
        (["--max-seq-length", "9"], {"max_seq_length": 9}),
        (["--learning_rate", "0.5"], {"learning_rate": 0.5}),
        (["--output_dir", "[draft"], {"output_dir": "[draft"}),
        (["--seed", "1", "--seed", "2"], {"seed": 2}),
        ([], {}),
    ],
)  # fmt: skip
def test_overrides_are_read_as_written(arguments, expected):
    assert parse_overrides(arguments) == expected


@pytest.mark.parametrize("text", ["1.10", "1e3", "007", "1_000", "12e45", "+5", "1.0", "Infinity", "[" * 100_000])
def test_a_name_that_looks_like_a_number_stays_as_typed(text):
    config = load_config(LEAST, parse_overrides(["--model_revision", text]))
    assert config.model.revision == text


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("2E-5", 2e-5), ("1", 1.0), (".5", 0.5)])
def test_a_number_on_the_command_line_may_be_spelled_freely(text, value):
    assert load_config(LEAST, parse_overrides(["--learning_rate", text])).training["learning_rate"] == value


def test_yaml_s_numbers_and_dates_are_read_as_they_were_meant(write):
    text = """
output_dir: out
model_name_or_path: m
train_file: d.jsonl
template_date: 2026-03-01
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr: 1e-6, num_cycles: 0.5, warmup_type: cosine}
"""
    config = load_config(write(text, "config.yaml"))
    assert config.data.template_date == "2026-03-01"
    assert config.training["lr_scheduler_kwargs"] == {"min_lr": 1e-6, "num_cycles": 0.5, "warmup_type": "cosine"}


def test_a_seed_that_numpy_does_not_take_is_refused():
    assert load_config(LEAST | {"seed": 2**32 - 1}).training["seed"] == 2**32 - 1
    with pytest.raises(UsageError, match="seed = 4294967296"):
        load_config(LEAST | {"seed": 2**32})


@pytest.mark.parametrize(
    ("name", "value", "loss"),
    [("simpo_gamma", 0.3, "sigmoid"), ("cpo_alpha", 0.3, "simpo"), ("precompute_reference", True, "orpo")],
)
def test_a_key_of_another_preference_loss_is_said_to_do_nothing(name, value, loss):
    said = notices(task_type="dpo", preference_loss=loss, **{name: value})
    assert [text for text in said if name in text and loss in text]
    own = {"simpo_gamma": "simpo", "cpo_alpha": "cpo", "precompute_reference": "ipo"}[name]
    assert not [text for text in notices(task_type="dpo", preference_loss=own, **{name: value}) if name in text]


@pytest.mark.parametrize("arguments", [["stray"], ["--seed", "1", "2"], ["-s", "1"], ["--"]])
def test_an_argument_that_is_no_override_is_refused(arguments):
    with pytest.raises(UsageError, match="unexpected argument"):
        parse_overrides(arguments)


def test_an_override_wins_over_the_file_under_whichever_name():
    config = load_config(LEAST | {"warmup_steps": 3000, "seed": 1}, {"warmup_ratio": 0.1, "seed": 2})
    assert (config.training["warmup_steps"], config.training["seed"]) == (0.1, 2)
    later = load_config(LEAST | {"eval_strategy": "no"}, {"evaluation_strategy": "epoch", "eval_file": "e.jsonl"})
    assert later.training["eval_strategy"] == "epoch"
    assert config.given == {**LEAST, "warmup_ratio": 0.1, "seed": 2}  # as train_args.json it gives the same run again
    zero = load_config(LEAST | {"warmup_ratio": 0.1}, {"warmup_steps": 0})
    assert load_config(zero.given).training["warmup_steps"] == zero.training["warmup_steps"] == 0


# ---- legacy spellings ----

# The fields of TrainingArguments in transformers 4.40, the last version that upstream names.
FIELDS_OF_TRANSFORMERS_4 = """
overwrite_output_dir do_train do_eval do_predict evaluation_strategy prediction_loss_only per_gpu_train_batch_size
per_gpu_eval_batch_size eval_accumulation_steps eval_delay adam_beta1 adam_beta2 adam_epsilon max_steps warmup_ratio
log_level log_on_each_node logging_dir logging_strategy logging_nan_inf_filter save_safetensors save_on_each_node
save_only_model no_cuda use_cpu use_mps_device data_seed jit_mode_eval use_ipex fp16_opt_level half_precision_backend
bf16_full_eval fp16_full_eval tf32 local_rank ddp_backend tpu_num_cores tpu_metrics_debug debug dataloader_drop_last
eval_steps dataloader_prefetch_factor past_index run_name label_names load_best_model_at_end metric_for_best_model
greater_is_better ignore_data_skip fsdp fsdp_min_num_params fsdp_config fsdp_transformer_layer_cls_to_wrap
accelerator_config label_smoothing_factor optim_args adafactor group_by_length length_column_name
ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers dataloader_pin_memory dataloader_persistent_workers
skip_memory_metrics use_legacy_prediction_loop hub_model_id hub_strategy hub_token hub_private_repo hub_always_push
gradient_checkpointing_kwargs include_inputs_for_metrics eval_do_concat_batches fp16_backend push_to_hub_model_id
push_to_hub_organization push_to_hub_token mp_parameters full_determinism torchdynamo ray_scope ddp_timeout
torch_compile_backend torch_compile_mode dispatch_batches split_batches include_tokens_per_second
include_num_input_tokens_seen neftune_noise_alpha optim_target_modules
""".split()


@pytest.mark.parametrize("key", FIELDS_OF_TRANSFORMERS_4)
def test_every_key_of_transformers_4_is_known_renamed_or_named_as_ignored(key):
    known = run_file().model_fields
    assert key in known or key in (*legacy.RENAMED, *legacy.IGNORED, *legacy.LAUNCHER_KEYS, "adafactor")
    assert legacy.RENAMED.get(key, "seed") in known


@pytest.mark.parametrize(
    ("old", "values", "new"),
    [
        ("evaluation_strategy", {"evaluation_strategy": "epoch", "eval_file": "e"}, {"eval_strategy": "epoch"}),
        ("no_cuda", {"no_cuda": True}, {"use_cpu": True}),
        ("per_gpu_train_batch_size", {"per_gpu_train_batch_size": 3}, {"per_device_train_batch_size": 3}),
        ("warmup_ratio", {"warmup_ratio": 0.03}, {"warmup_steps": 0.03}),
        ("warmup_ratio", {"warmup_ratio": 0.03, "warmup_steps": 0}, {"warmup_steps": 0.03}),
        ("warmup_ratio", {"warmup_ratio": 0.03, "warmup_steps": 7}, {"warmup_steps": 7}),
        ("adafactor", {"adafactor": True}, {"optim": "adafactor"}),
        ("paged_adamw", {"optim": "paged_adamw"}, {"optim": "paged_adamw_32bit"}),
        ("group_by_length", {"group_by_length": True}, {}),
        ("overwrite_output_dir", {"overwrite_output_dir": True}, {}),
        (
            "activation_checkpointing",
            {"activation_checkpointing": True, "gradient_checkpointing": False},
            {"gradient_checkpointing": False},
        ),
    ],
)
def test_an_old_spelling_is_read_as_todays_with_one_notice(old, values, new):
    said = notices(**values)
    assert len(said) == 1
    assert old in said[0]
    flat = configured(**values).flat()
    assert {name: flat[name] for name in new} == new
    assert old in training_fields() or old not in flat


def test_old_keys_that_ask_for_nothing_are_dropped_without_a_word():
    assert notices(local_rank=0, past_index=-1, save_safetensors=False, adafactor=False, tpu_num_cores=None) == []


@pytest.mark.parametrize("key", ["optim", "report_to", "lr_scheduler_type"])
def test_a_list_where_text_belongs_is_no_crash(key):
    assert configured(**{key: ["x"]}).flat()[key] == ["x"]  # transformers refuses it when its arguments are built


def test_names_come_as_a_list_or_separated_by_commas():
    adapter = configured(lora_target=["q_proj", "v_proj"], modules_to_save="lm_head, norm").adapter
    assert names_in(adapter.target) == ["q_proj", "v_proj"]
    assert names_in(adapter.modules_to_save) == ["lm_head", "norm"]
    assert configured(add_tokens=["<a>", "<b>"]).model.add_tokens == ("<a>", "<b>")
    plain = configured(modules_to_save=None, add_tokens=None)
    assert (plain.adapter.target, plain.adapter.modules_to_save, plain.model.add_tokens) == ("all-linear", None, None)


def test_an_adapter_to_start_from_is_refused_in_full_training():
    assert "adapter_name_or_path" in str(refused(train_mode="full", adapter_name_or_path="somewhere"))
    assert configured(train_mode="lora", adapter_name_or_path="somewhere").adapter.name_or_path == "somewhere"


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_rslora", True), ("use_dora", True), ("lora_target", "q_proj"), ("modules_to_save", "lm_head")],
)
def test_an_adapters_key_in_full_training_is_said_to_do_nothing(key, value):
    assert any(key in text for text in notices(train_mode="full", **{key: value}))
    assert not any(key in text for text in notices(train_mode="lora", **{key: value}))
