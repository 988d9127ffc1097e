"""What text never reaches has no adapter and no gradient, whatever it is called; all else is trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from firefly.config import AdapterConfig, load_config
from firefly.errors import UsageError
from firefly.models.adapters import attach_adapter
from firefly.models.attention import choose_layout
from firefly.models.loading import load_model
from firefly.models.meta_model import build_meta_model
from firefly.models.precision import Precision
from firefly.models.reach import Unreached, find_unreached
from firefly.training import train
from multimodal import MULTIMODAL, multimodal_model, save_multimodal_model
from tiny import save_tiny_model, tiny_model, write_rows

IDS = torch.arange(40)[None] * 7919 % 250
LORA = AdapterConfig(mode="lora", rank=4, dropout=0.0)
CPU = torch.device("cpu")


def without_gradient(model: Any) -> set[str]:
    """Names of the parameters to which a plain pass over text, in training mode, brings no gradient."""
    own = copy.deepcopy(model).train().requires_grad_(True)
    own(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name for name, parameter in own.named_parameters() if parameter.grad is None}


def backward(model: Any) -> None:
    model.train()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()


@pytest.mark.parametrize("name", MULTIMODAL)
def test_what_has_no_gradient_in_a_plain_pass_over_text_is_unreached(name: str) -> None:
    model = multimodal_model(name)
    expected = without_gradient(model)
    assert expected
    assert find_unreached(model).parameters == expected
    assert find_unreached(model).roots(model) == MULTIMODAL[name][2]
    choose_layout(model)
    assert find_unreached(model).parameters == expected


@pytest.mark.parametrize(
    "name", ["llama_tied", "gpt2", "bloom", "mixtral", "deepseek_v3", "qwen3_moe", "mamba", "jamba"]
)
def test_text_reaches_every_parameter_of_most_models(name: str) -> None:
    model = tiny_model(name)
    assert not without_gradient(model)
    assert not find_unreached(model).parameters


def test_a_probe_leaves_the_model_as_it_was() -> None:
    model = multimodal_model("gemma3").requires_grad_(False).eval()
    before, state = torch.get_rng_state(), {n: p.clone() for n, p in model.named_parameters()}
    logits = model(IDS).logits
    find_unreached(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(model(IDS).logits, logits)
    assert all(torch.equal(state[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize("target", ["all-linear", "q_proj,v_proj", r".*\.(q|k|v)_proj"])
@pytest.mark.parametrize("name", ["gemma3", "llava", "mistral3"])
def test_towers_get_no_adapter_however_layers_are_named(name: str, target: str, capsys: Any) -> None:
    wrapped = attach_adapter(multimodal_model(name), AdapterConfig(mode="lora", rank=4, dropout=0.0, target=target))
    assert not [key for key in get_peft_model_state_dict(wrapped) if "language_model" not in key]
    backward(wrapped)
    trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    assert trained
    assert all(p.grad is not None for p in trained.values())
    said = capsys.readouterr().err
    assert "text never reaches model.multi_modal_projector, model.vision_tower" in said


@pytest.mark.parametrize("name", MULTIMODAL)
def test_full_training_trains_exactly_what_has_a_gradient(name: str) -> None:
    model = multimodal_model(name)
    expected = without_gradient(model)
    model = attach_adapter(model, AdapterConfig(mode="full"))
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == expected


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"target": "fc1"}, "lora_target"),
        ({"target": "q_proj,vision_tower.encoder.layers.0.self_attn.q_proj"}, "lora_target"),
        ({"target": r".*vision_tower.*fc1"}, "lora_target"),
        ({"modules_to_save": ("multi_modal_projector",)}, "modules_to_save"),
        ({"modules_to_save": ("vision_tower",)}, "modules_to_save"),
    ],
)
def test_what_is_named_in_a_tower_alone_is_refused_by_name(changes: dict[str, Any], key: str) -> None:
    model = multimodal_model("gemma3")
    with pytest.raises(UsageError, match=rf"^{key}: .*never reaches"):
        attach_adapter(model, AdapterConfig(mode="lora", rank=4, dropout=0.0, **changes))


def test_a_module_to_save_is_that_of_the_decoder_alone() -> None:
    config = AdapterConfig(mode="lora", rank=4, dropout=0.0, modules_to_save=("k_proj",), target="q_proj")
    wrapped = attach_adapter(multimodal_model("gemma3"), config)
    whole = [n for n, p in wrapped.named_parameters() if p.requires_grad and "modules_to_save" in n]
    assert len(whole) == 2
    assert all("language_model" in name for name in whole)


def test_an_adapter_of_another_tool_is_continued_where_text_comes(tmp_path: Path) -> None:
    settings = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(multimodal_model("gemma3"), settings).save_pretrained(tmp_path)
    before = load_file(tmp_path / "adapter_model.safetensors")
    assert any("vision_tower" in key for key in before)
    config = AdapterConfig(mode="lora", rank=4, dropout=0.0, name_or_path=str(tmp_path))
    wrapped = attach_adapter(multimodal_model("gemma3"), config)
    trained = {n for n, p in wrapped.named_parameters() if p.requires_grad}
    assert trained
    assert not [name for name in trained if "language_model" not in name]
    after = get_peft_model_state_dict(wrapped)
    assert all(torch.equal(value, after[key]) for key, value in before.items())


# ---- what else is never reached ----


class Choosing(nn.Module):
    """Experts in a list, as older code has them, of which a row's tokens choose the first alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.experts[0](hidden)


def test_experts_that_no_token_of_the_probe_chooses_are_reached_and_a_spare_layer_is_not() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = Choosing(32)
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))  # as layers that predict further tokens lie there
    unreached = find_unreached(model)
    assert unreached.roots(model) == ["model.layers.3"]
    assert unreached.has("model.layers.3.mlp.experts.0")
    assert not unreached.has("model.layers.0.mlp.experts.2")


def test_layers_that_choose_tokens_without_a_gradient_get_no_adapter() -> None:
    model = tiny_model("deepseek_v32")
    assert find_unreached(model).roots(model) == ["model.layers.*.self_attn.indexer"]
    wrapped = attach_adapter(model, LORA)
    assert not [key for key in get_peft_model_state_dict(wrapped) if "indexer" in key]


def test_a_layer_that_is_left_out_at_random_is_reached() -> None:
    model = tiny_model("opt", layerdrop=0.9)
    assert find_unreached(model) == Unreached()
    assert model.model.decoder.layerdrop == 0.9


# ---- Mamba: layers that peft refuses, and layers whose weights are used without a call ----

MAMBAS = ["mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h", "jamba", "bamba", "granite_mamba", "zamba2"]
REFUSED = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")  # by peft 0.21, of which out_proj
PASSED_BY = ("mamba", "falcon_mamba", "jamba")  # their dt_proj


@pytest.mark.parametrize("name", MAMBAS)
def test_all_linear_is_what_peft_allows_and_what_has_an_effect(name: str, capsys: Any) -> None:
    wrapped = attach_adapter(tiny_model(name), LORA)
    backward(wrapped)
    adapted = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in adapted.values())
    assert any("in_proj" in n for n in adapted)
    assert any("out_proj" in n for n in adapted) == (name not in REFUSED)
    assert not any("dt_proj" in n for n in adapted)
    said = capsys.readouterr().err
    assert ("lora_target: out_proj" in said and "peft refuses" in said) == (name in REFUSED)
    assert ("dt_proj" in said and "without calling" in said) == (name in PASSED_BY)


@pytest.mark.parametrize("target", ["out_proj", "in_proj,out_proj", r".*_proj"])
def test_a_name_that_peft_refuses_is_refused_with_its_key(target: str) -> None:
    with pytest.raises(UsageError, match=r"lora_target = .*: peft refuses out_proj"):
        attach_adapter(tiny_model("mamba"), AdapterConfig(mode="lora", rank=4, dropout=0.0, target=target))


def test_a_layer_that_is_never_called_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"^lora_target: 'dt_proj' means only .*mixer\.dt_proj.* without calling"):
        attach_adapter(tiny_model("mamba"), AdapterConfig(mode="lora", rank=4, dropout=0.0, target="dt_proj"))


def test_other_refusals_of_peft_are_the_users_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("Target module X is not\nsupported")

    monkeypatch.setattr("peft.get_peft_model", refuse)
    with pytest.raises(UsageError, match=r"lora_target = all-linear\): Target module X is not supported"):
        attach_adapter(tiny_model("llama"), LORA)


# ---- in a run, and in a plan ----


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
@pytest.mark.parametrize("name", ["gemma3", "llava", "mllama"])
def test_a_meta_model_leaves_out_what_a_run_leaves_out(name: str, mode: str, tmp_path: Path) -> None:
    save_multimodal_model(tmp_path / "model", name)
    given = {"model_name_or_path": str(tmp_path / "model"), "train_mode": mode, "lora_rank": 4}
    config = load_config({"output_dir": "x", "train_file": "x", **given})
    meta = build_meta_model(config, Precision(torch.float32))
    model = attach_adapter(load_model(config.model, mode, Precision(torch.float32), CPU), config.adapter)
    assert [(n, p.shape, p.dtype, p.requires_grad) for n, p in meta.model.named_parameters()] == [
        (n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()
    ]
    assert any("never reaches" in note for note in meta.notes)


def test_the_tiny_twin_tells_where_a_meta_model_cannot_be_run(tmp_path: Path) -> None:
    """In fp32, experts cannot be computed without numbers."""
    save_tiny_model(tmp_path / "model", "deepseek_v32")
    config = load_config({"output_dir": "x", "train_file": "x", "model_name_or_path": str(tmp_path / "model")})
    meta = build_meta_model(config, Precision(torch.float32))
    model = attach_adapter(load_model(config.model, "lora", Precision(torch.float32), CPU), config.adapter)
    assert [n for n, _ in meta.model.named_parameters()] == [n for n, _ in model.named_parameters()]


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_a_full_run_writes_the_whole_model_with_its_towers_untouched(name: str, tmp_path: Path) -> None:
    save_multimodal_model(tmp_path / "model", name)
    write_rows(tmp_path / "rows.jsonl", 6)
    out = train(
        load_config(
            {
                "model_name_or_path": str(tmp_path / "model"),
                "train_file": str(tmp_path / "rows.jsonl"),
                "output_dir": str(tmp_path / "out"),
                "template_name": "default",
                "train_mode": "full",
                "max_steps": 2,
                "per_device_train_batch_size": 2,
                "learning_rate": 0.01,
                "save_strategy": "no",
                "report_to": "none",
                "compare": False,
                "use_cpu": True,
            }
        )
    )
    before, after = load_file(tmp_path / "model" / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {key for key in before if not torch.equal(before[key].float(), after[key].float())}
    towers = {key for key in before if any(part in key for part in ("vision_tower", "multi_modal", "visual"))}
    assert towers
    assert not moved & towers
    assert moved == before.keys() - towers


def test_a_model_that_takes_no_text_alone_is_refused_by_name(tmp_path: Path) -> None:
    import transformers

    text = {"model_type": "opt", "vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 1, "ffn_dim": 48}
    config = transformers.Blip2Config(
        text_config=text | {"num_attention_heads": 4, "word_embed_proj_dim": 32},
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"image_size": 28, "patch_size": 14},
        qformer_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        | {"encoder_hidden_size": 16, "vocab_size": 20},
    )
    transformers.Blip2ForConditionalGeneration(config).save_pretrained(tmp_path)
    given = load_config({"output_dir": "x", "train_file": "x", "model_name_or_path": str(tmp_path)})
    with pytest.raises(UsageError, match="Blip2ForConditionalGeneration cannot be trained on text alone"):
        load_model(given.model, "lora", Precision(torch.float32), CPU)
    with pytest.raises(UsageError, match="Blip2ForConditionalGeneration cannot be trained on text alone"):
        build_meta_model(given, Precision(torch.float32))
