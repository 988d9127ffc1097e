"""The gate for saved adapters: what it takes under which names, what it refuses, and which base belongs to one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
)

from firefly import console
from firefly.cli import main
from firefly.config import load_config
from firefly.errors import UsageError
from firefly.models.adapter_loading import load_adapter
from firefly.models.base_weights import differing_weights, identify_weights
from firefly.models.saved_adapter import open_adapter
from firefly.training import train
from tiny import SHAPE, VOCABULARY, save_tiny_model, tiny_model, tiny_tokenizer, write_rows

IDS = torch.tensor([[5, 9, 20, 31, 7, 44]])
SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
CAUSAL: dict[str, Any] = SETTINGS | {"task_type": "CAUSAL_LM"}


def shaken(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def saved_adapter(folder: Path, model: Any = None, **settings: Any) -> Any:
    """A trained adapter in `folder`; returns the model as the other tool has it."""
    trained = shaken(get_peft_model(model or tiny_model("llama"), LoraConfig(**(CAUSAL | settings))))
    trained.save_pretrained(folder)
    return trained


def rewritten(folder: Path, rename: Callable[[str], str]) -> None:
    """The same tensors under other names."""
    file = folder / "adapter_model.safetensors"
    save_file({rename(name): value for name, value in load_file(file).items()}, file)


def with_settings(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---- names ----

PREFIX = "base_model.model."
RENAMES: dict[str, Callable[[str], str]] = {
    "of the bare backbone": lambda name: name.replace(f"{PREFIX}model.", PREFIX),
    "without any prefix": lambda name: name.removeprefix(PREFIX),
    "of a wrapper that holds the model": lambda name: name.replace(PREFIX, f"{PREFIX}llm."),
    "of DDP": lambda name: f"module.{name}",
    "of torch.compile": lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "of FSDP": lambda name: name.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "of activation checkpointing": lambda name: name.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    "of state_dict()": lambda name: re.sub(r"lora_([AB])\.", r"lora_\1.default.", name),
    "wrapped by peft twice": lambda name: PREFIX + name,
    "of another backbone": lambda name: name.replace(f"{PREFIX}model.", f"{PREFIX}language_model.decoder."),
}


@pytest.mark.parametrize("way", RENAMES)
def test_tensors_under_another_prefix_find_their_layers(way: str, tmp_path: Path) -> None:
    trained = saved_adapter(tmp_path / "adapter", alpha_pattern={"model.layers.1.self_attn.q_proj": 32})
    rewritten(tmp_path / "adapter", RENAMES[way])
    assert load_file(tmp_path / "adapter/adapter_model.safetensors").keys()
    if way in ("of another backbone", "of a wrapper that holds the model", "of the bare backbone"):
        renamed = RENAMES[way](f"{PREFIX}model.layers.1.self_attn.q_proj").removeprefix(PREFIX)
        with_settings(tmp_path / "adapter", alpha_pattern={renamed: 32})
    served = load_adapter(tiny_model("llama"), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(served), logits(trained))


def test_an_adapter_of_the_bare_backbone_is_merged_served_and_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_model(tmp_path / "base")
    backbone = AutoModel.from_pretrained(tmp_path / "base")
    trained = shaken(get_peft_model(backbone, LoraConfig(**SETTINGS)))
    trained.save_pretrained(tmp_path / "adapter")
    head = AutoModelForCausalLM.from_pretrained(tmp_path / "base").lm_head
    with torch.no_grad():
        expected = head(trained(input_ids=IDS).last_hidden_state)
    place = ["--adapter_name_or_path", str(tmp_path / "adapter"), "--model_name_or_path", str(tmp_path / "base")]
    assert main(["merge", *place, "--save_path", str(tmp_path / "merged")]) == 0
    assert "are the same layers with another prefix" in capsys.readouterr().err
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{n}.self_attn.{kind}_proj.weight" for n in range(3) for kind in "qv"}
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, atol=1e-5, rtol=1e-4
    )
    out = train(load_config(run_settings(tmp_path, adapter_name_or_path=str(tmp_path / "adapter"), learning_rate=0.0)))
    served = load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(out))
    torch.testing.assert_close(logits(served), expected, atol=1e-5, rtol=1e-4)
    names = set(load_file(out / "adapter_model.safetensors"))
    assert f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight" in names  # from here on, by the model's own names


def run_settings(folder: Path, **changes: Any) -> dict[str, Any]:
    write_rows(folder / "train.jsonl", 4)
    return {
        "model_name_or_path": str(folder / "base"),
        "train_file": str(folder / "train.jsonl"),
        "output_dir": str(folder / "run"),
        "template_name": "default",
        "train_mode": "lora",
        "lora_rank": 4,
        "lora_dropout": 0,
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "compare": False,
        "use_cpu": True,
        "bf16": False,
    } | changes


def tiny_gemma(kind: Any, seed: int = 0) -> Any:
    """Gemma 3 with its vision tower, or its language model alone."""
    text = {name: value for name, value in SHAPE.items() if name != "num_hidden_layers"} | {
        "num_hidden_layers": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text,
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=VOCABULARY - 1,
        boi_token_index=VOCABULARY - 2,
        eoi_token_index=VOCABULARY - 3,
    )
    torch.manual_seed(seed)
    return kind(config if kind is Gemma3ForConditionalGeneration else config.text_config).eval()


def test_an_adapter_of_a_language_model_fits_the_same_one_beside_a_vision_tower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, alone = tiny_gemma(Gemma3ForConditionalGeneration), tiny_gemma(Gemma3ForCausalLM, seed=1)
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    alone.lm_head.load_state_dict(whole.lm_head.state_dict())
    trained = saved_adapter(tmp_path / "adapter", alone)  # q_proj is a name that the tower has, too
    said: list[str] = []
    monkeypatch.setattr("firefly.models.adapter_placement.notice", lambda code, text, **values: said.append(code))
    served = load_adapter(whole, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(served), logits(trained), atol=1e-5, rtol=1e-4)
    assert said == ["adapter.renamed", "adapter.not_adapted"]
    assert not [name for name, _ in whole.named_parameters() if "vision" in name and "lora" in name]


def test_an_adapter_saved_under_the_names_of_earlier_vision_models_finds_its_layers(tmp_path: Path) -> None:
    trained = saved_adapter(
        tmp_path / "adapter", tiny_gemma(Gemma3ForConditionalGeneration), modules_to_save=["lm_head"]
    )
    rewritten(
        tmp_path / "adapter",
        lambda name: (
            name.replace(f"{PREFIX}model.language_model.", f"{PREFIX}language_model.model.")
            .replace(f"{PREFIX}model.vision_tower.", f"{PREFIX}vision_tower.")
            .replace(f"{PREFIX}lm_head.", f"{PREFIX}language_model.lm_head.")
        ),
    )
    served = load_adapter(tiny_gemma(Gemma3ForConditionalGeneration), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(served), logits(trained))
    tower = {name for name, _ in served.named_parameters() if "vision" in name and "lora_A" in name}
    assert len(tower) == 4  # what the other tool trained there has its place, too


@pytest.mark.parametrize(
    ("rename", "problem"),
    [
        (lambda name: name.replace("self_attn", "attention"), "has no layer"),
        (lambda name: name.replace(".v_proj.", ".o_proj.") if ".2." in name else name, "have no tensors, such as"),
        (lambda name: name.replace("model.layers.2.", "model.layers.7."), "has no layer model.layers.7."),
        (lambda name: name.replace("lora_A.weight", "lora_C.weight"), "has no"),
    ],
)
def test_a_tensor_without_a_place_or_a_place_without_its_tensor_is_refused(
    rename: Callable[[str], str], problem: str, tmp_path: Path
) -> None:
    saved_adapter(tmp_path / "adapter")
    rewritten(tmp_path / "adapter", rename)
    with pytest.raises(UsageError, match=problem):
        load_adapter(tiny_model("llama"), str(tmp_path / "adapter"))


def test_a_tensor_that_is_missing_from_the_file_is_refused(tmp_path: Path) -> None:
    saved_adapter(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(f"{PREFIX}model.layers.1.self_attn.v_proj.lora_B.weight")
    save_file(tensors, file)
    with pytest.raises(UsageError, match=r"no counterpart, such as model.layers.1.self_attn.v_proj.lora_B"):
        load_adapter(tiny_model("llama"), str(tmp_path / "adapter"))


def test_two_different_tensors_for_one_place_are_refused(tmp_path: Path) -> None:
    saved_adapter(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {f"module.{name}": value + 1 for name, value in tensors.items()}, file)
    with pytest.raises(UsageError, match="two different tensors"):
        load_adapter(tiny_model("llama"), str(tmp_path / "adapter"))


def test_a_prefix_that_fits_two_stacks_of_layers_is_in_doubt(tmp_path: Path) -> None:
    saved_adapter(tmp_path / "adapter")
    rewritten(tmp_path / "adapter", RENAMES["of the bare backbone"])
    model = tiny_model("llama")
    model.second = tiny_model("llama", seed=1).model
    with pytest.raises(UsageError, match=r"may be any of model.layers.0"):
        load_adapter(model, str(tmp_path / "adapter"))


# ---- methods and starts ----

OTHER_METHODS: dict[str, Any] = {
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"]),
    "VERA": lambda: peft.VeraConfig(target_modules=["q_proj"]),
    "LOHA": lambda: peft.LoHaConfig(target_modules=["q_proj"]),
    "LOKR": lambda: peft.LoKrConfig(target_modules=["q_proj"]),
    "ADALORA": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_r=4, target_r=2),
    "OFT": lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "P_TUNING": lambda: peft.PromptEncoderConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "LN_TUNING": lambda: peft.LNTuningConfig(target_modules=["norm"]),
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(token_indices=[5]),
}


@pytest.mark.parametrize("method", OTHER_METHODS)
def test_other_methods_are_refused_by_name_wherever_they_are_given(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(model, OTHER_METHODS[method]()).save_pretrained(tmp_path / "adapter")
    place = ["--adapter_name_or_path", str(tmp_path / "adapter"), "--model_name_or_path", str(tmp_path / "base")]
    for command in (["merge", "--save_path", str(tmp_path / "merged")], ["chat"]):
        assert main([*command, *place]) == 2
        assert f"is of the kind {method}" in capsys.readouterr().err
    with pytest.raises(UsageError, match=f"is of the kind {method}"):
        train(load_config(run_settings(tmp_path, adapter_name_or_path=str(tmp_path / "adapter"))))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("start", ["pissa_niter_16", "pissa_niter_4", "corda", "loftq", "lora_ga"])
def test_a_start_whose_base_cannot_be_had_again_is_refused(start: str, tmp_path: Path) -> None:
    saved_adapter(tmp_path / "adapter")
    with_settings(tmp_path / "adapter", init_lora_weights=start)
    with pytest.raises(UsageError, match=f"init_lora_weights = '{start}'.*Convert it"):
        open_adapter(str(tmp_path / "adapter"))


def test_a_start_that_nobody_knows_is_refused_and_a_number_is_none(tmp_path: Path) -> None:
    trained = saved_adapter(tmp_path / "adapter")
    with_settings(tmp_path / "adapter", init_lora_weights="something_new")
    with pytest.raises(UsageError, match="'something_new', which is not known here"):
        open_adapter(str(tmp_path / "adapter"))
    for plain in (1, "Gaussian", "EVA"):
        with_settings(tmp_path / "adapter", init_lora_weights=plain)
        served = load_adapter(tiny_model("llama"), str(tmp_path / "adapter"))
        torch.testing.assert_close(logits(served), logits(trained))


def test_an_exact_start_is_refused_on_4_bit_weights_and_says_what_to_do(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    saved_adapter(
        tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(tmp_path / "base"), init_lora_weights="pissa"
    )
    settings = run_settings(tmp_path, adapter_name_or_path=str(tmp_path / "adapter"), train_mode="qlora")
    with pytest.raises(UsageError, match="cannot be done in 4 bits"):
        train(load_config(settings))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alora_invocation_tokens", [5, 6]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("use_qalora", True),
        ("use_of_a_later_peft", True),
        ("arrow_config", {"top_k": 2}),
        ("megatron_config", {"tensor_model_parallel_size": 1}),
    ],
)
def test_variants_that_compute_otherwise_are_refused_by_name(key: str, value: Any, tmp_path: Path) -> None:
    saved_adapter(tmp_path / "adapter")
    with_settings(tmp_path / "adapter", **{key: value})
    with pytest.raises(UsageError, match=key):
        open_adapter(str(tmp_path / "adapter"))


# ---- folders and files ----


def test_a_folder_with_one_named_adapter_is_that_adapter_and_with_two_is_refused(tmp_path: Path) -> None:
    trained = saved_adapter(tmp_path / "run" / "persona")
    served = load_adapter(tiny_model("llama"), str(tmp_path / "run"))
    torch.testing.assert_close(logits(served), logits(trained))
    saved_adapter(tmp_path / "run" / "other")
    with pytest.raises(UsageError, match="other, persona"):
        open_adapter(str(tmp_path / "run"))
    with pytest.raises(UsageError, match=r"adapter_config\.json is missing"):
        open_adapter(str(tmp_path / "nowhere"))


def test_damaged_files_are_told_apart(tmp_path: Path) -> None:
    saved_adapter(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UsageError, match="cannot be read"):
        load_adapter(tiny_model("llama"), str(tmp_path / "adapter"))
    file.rename(tmp_path / "adapter/adapter_model.bin")
    with pytest.raises(UsageError, match=r"adapter_model\.bin cannot be read"):
        load_adapter(tiny_model("llama"), str(tmp_path / "adapter"))
    (tmp_path / "adapter/adapter_model.bin").unlink()
    with pytest.raises(UsageError, match="but no weights"):
        open_adapter(str(tmp_path / "adapter"))
    for text in ("{", "[]", '{"peft_type": "LORA", "target_modules": 3}'):
        (tmp_path / "adapter/adapter_config.json").write_text(text)
        with pytest.raises(UsageError):
            open_adapter(str(tmp_path / "adapter"))


@pytest.mark.parametrize(("change", "said"), [(lambda x: x * float("nan"), "not finite"), (None, "hold no tensor")])
def test_weights_that_are_no_numbers_or_not_there_are_told(
    change: Callable[[Tensor], Tensor] | None, said: str, tmp_path: Path
) -> None:
    saved_adapter(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: change(value) for name, value in tensors.items()} if change else {}, file)
    with pytest.raises(UsageError, match=said):
        load_adapter(tiny_model("llama"), str(tmp_path / "adapter"))


class Harm:
    """What a pickle can do when it is read without care."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harm.txt"),))


def test_a_pickle_with_more_than_tensors_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved_adapter(tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    torch.save({"x": Harm()}, tmp_path / "adapter/adapter_model.bin")
    with pytest.raises(UsageError, match="cannot be read"):
        load_adapter(tiny_model("llama"), str(tmp_path / "adapter"))
    assert not (tmp_path / "harm.txt").exists()


# ---- vocabularies ----


def test_rows_that_no_file_has_are_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(VOCABULARY + 6, mean_resizing=False)
    trained = shaken(get_peft_model(model, LoraConfig(**(CAUSAL | {"target_modules": ["q_proj", "lm_head"]}))))
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(UsageError, match=f"{VOCABULARY + 6} rows.*6 new rows are in no file"):
        load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter"))


def test_new_tokens_of_a_run_are_refused_where_the_adapter_cannot_learn_them(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(VOCABULARY + 6, mean_resizing=False)
    shaken(get_peft_model(model, LoraConfig(**CAUSAL))).save_pretrained(tmp_path / "adapter")
    settings = run_settings(tmp_path, adapter_name_or_path=str(tmp_path / "adapter"))
    train(load_config(settings))
    with pytest.raises(UsageError, match="1 tokens are new to the adapter"):
        train(load_config(settings | {"add_tokens": ["<|tool|>"]}))


# ---- the base ----


def identities(folder: Path, model: Any, **saving: Any) -> dict[str, Any]:
    model.save_pretrained(folder, **saving)
    return identify_weights(str(folder))


def test_the_same_weights_are_one_base_in_whatever_files(tmp_path: Path) -> None:
    found = identities(tmp_path / "one", tiny_model("llama_tied"))
    sharded = identities(tmp_path / "shards", tiny_model("llama_tied"), max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert sharded == found
    sixteen = identities(tmp_path / "sixteen", tiny_model("llama_tied").bfloat16())
    widened = identities(tmp_path / "widened", tiny_model("llama_tied").bfloat16().float())
    assert sixteen == widened != found
    assert differing_weights(found, sixteen)
    file = tmp_path / "one" / "model.safetensors"
    tensors = load_file(file)
    renamed = {name.replace("model.", "model.language_model."): value for name, value in tensors.items()}
    save_file(renamed | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    file.rename(file.with_name("weights.safetensors"))
    assert differing_weights(found, identify_weights(str(tmp_path / "one"))) == []


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_other_values_are_another_base(name: str, tmp_path: Path) -> None:
    model = tiny_model("llama_tied")
    found = identities(tmp_path / "one", model)
    model.get_parameter(name).data.view(-1)[-1] += 1
    differing = differing_weights(found, identities(tmp_path / "other", model))
    assert differing == [name if "layers" not in name else "model.layers.1"]


def test_large_tensors_are_sampled_over_their_whole_length(tmp_path: Path) -> None:
    weight = torch.randn(1 << 20)
    save_file({"w": weight}, tmp_path / "model.safetensors")
    found = identify_weights(str(tmp_path))
    for place in (0, -1, 1 << 19):
        changed = weight.clone()
        changed[place - 600 if place == 1 << 19 else place] += 1
        changed[place : place + 20000 or None] += 1
        save_file({"w": changed}, tmp_path / "model.safetensors")
        assert differing_weights(found, identify_weights(str(tmp_path))) == ["w"]


def test_an_adapter_on_another_base_is_refused_everywhere_unless_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(tmp_path / "base")
    out = train(load_config(run_settings(tmp_path, learning_rate=0.02)))
    assert "groups" in json.loads((out / "run.json").read_text())["hashes"]["base_weights"]
    other = tiny_model("llama")
    other.model.layers[1].mlp.up_proj.weight.data += 0.01
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    same = tiny_model("llama")
    same.save_pretrained(tmp_path / "same", max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path / "same")
    adapter = ["--adapter_name_or_path", str(out), "--model_name_or_path"]
    merge = ["merge", *adapter, str(tmp_path / "other"), "--save_path", str(tmp_path / "merged")]
    assert main(merge) == 2
    assert "1 of 6 layers and tensors differ, model.layers.1 first" in capsys.readouterr().err
    assert main(["chat", *adapter, str(tmp_path / "other")]) == 2
    assert "trained on other weights" in capsys.readouterr().err
    going_on = run_settings(
        tmp_path,
        adapter_name_or_path=str(out),
        model_name_or_path=str(tmp_path / "other"),
        output_dir=str(tmp_path / "second"),
    )
    with pytest.raises(UsageError, match="adapter_on_other_base"):
        train(load_config(going_on))
    train(load_config(going_on | {"adapter_on_other_base": True}))
    assert main([*merge, "--force"]) == 0
    assert "is used all the same" in capsys.readouterr().err
    assert main(["merge", *adapter, str(tmp_path / "same"), "--save_path", str(tmp_path / "again")]) == 0


def test_a_run_json_of_another_tool_is_no_matter(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    saved_adapter(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    for text in ('{"run": 1}', "[]", "{", '{"config": {"lr": 1}, "hashes": 3}'):
        (tmp_path / "adapter" / "run.json").write_text(text)
        console.take_notices()
        assert main(["merge", "--adapter_name_or_path", str(tmp_path / "adapter"), "--save_path", f"{tmp_path}/m"]) == 0
