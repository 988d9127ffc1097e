"""What `train_mode lora` attaches: plain peft's numbers, the layers asked for, and what a saved adapter gives back."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from firefly.config import AdapterConfig
from firefly.data.batching import pack
from firefly.errors import UsageError
from firefly.models.adapter_loading import load_adapter
from firefly.models.adapters import ALL_LINEAR, attach_adapter, saved_modules, target_layers
from firefly.models.attention import choose_layout
from firefly.models.heads import install_target_head
from firefly.models.tokens import add_tokens, fit_embeddings
from tiny import VOCABULARY, assert_same, gradients, padded_loss, random_examples, tiny_model, tiny_tokenizer

LORA = AdapterConfig(mode="lora", rank=4, alpha=8, dropout=0.0)
PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
EXAMPLES = random_examples(20, 33)
NEW = [VOCABULARY, VOCABULARY + 1]


def shaken(wrapped: Any) -> Any:
    """All that is trained moved a little, the same at every call: B and new rows start where mistakes do not show."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for _, parameter in sorted(wrapped.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def loss_and_gradients(model: Any, examples: Any = EXAMPLES) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = padded_loss(model, examples)
    loss.backward()
    return {"loss": loss.detach()} | gradients(model)


def by_target_head(model: Any) -> dict[str, torch.Tensor]:
    """The same loss as training takes it: packed rows, the head at target positions."""
    layout = choose_layout(model.get_base_model())
    assert layout[0] != "solo"
    way = install_target_head(model.get_base_model())
    batch = pack(EXAMPLES)
    model.zero_grad()
    loss = model(**batch.model_inputs())["loss"] / len(batch.targets)
    loss.backward()
    return {"loss": loss.detach(), "way": way} | gradients(model)  # type: ignore[dict-item]


def examples_with_new_tokens() -> Any:
    examples = copy.deepcopy(EXAMPLES)
    for example in examples:
        example.input_ids[[3, 7]] = example.labels[[3, 7]] = NEW
    return examples


def grown(name: str, **changes: Any) -> Any:
    """A tiny model that has got two tokens more."""
    model = tiny_model(name, **changes)
    assert fit_embeddings(model, range(VOCABULARY + 2)) == NEW
    return model


# ---- the numbers of plain peft ----


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2"])
@pytest.mark.parametrize(
    "changes",
    [{"use_rslora": True}, {"use_dora": True}, {"use_rslora": True, "use_dora": True}],
    ids=["rslora", "dora", "both"],
)
def test_loss_and_gradients_are_those_of_plain_peft(name: str, changes: dict[str, Any]) -> None:
    ours = shaken(attach_adapter(tiny_model(name), replace(LORA, **changes)))
    model = tiny_model(name)
    theirs = shaken(
        get_peft_model(model, LoraConfig(**PLAIN, **changes, target_modules=target_layers(model, ALL_LINEAR)))
    )
    assert_same(loss_and_gradients(ours), loss_and_gradients(theirs), 1e-4)
    assert_same(loss_and_gradients(ours), loss_and_gradients(theirs), 1e-4)  # and again: nothing was used up


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_modules_trained_whole_have_the_gradients_of_plain_peft(name: str) -> None:
    ours = shaken(attach_adapter(tiny_model(name), replace(LORA, modules_to_save=("lm_head", "norm"))))
    model = tiny_model(name)
    plain = LoraConfig(
        **PLAIN,
        target_modules=target_layers(model, ALL_LINEAR),
        modules_to_save=["lm_head", "model.norm"],
        ensure_weight_tying=name == "llama_tied",
    )
    found, expected = loss_and_gradients(ours), loss_and_gradients(shaken(get_peft_model(model, plain)))
    assert_same(found, expected, 1e-4)
    assert any("norm.modules_to_save" in key for key in found)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma3"])
def test_new_rows_have_the_gradients_of_plain_peft(name: str) -> None:
    ours = shaken(attach_adapter(grown(name), LORA, NEW))
    model = grown(name)
    ends = ["model.embed_tokens", *(["lm_head"] if name == "llama" else [])]
    plain = LoraConfig(
        **PLAIN,
        target_modules=target_layers(model, ALL_LINEAR),
        trainable_token_indices={end: list(NEW) for end in ends},
    )
    theirs = shaken(get_peft_model(model, plain))
    examples = examples_with_new_tokens()
    found = loss_and_gradients(ours, examples)
    assert_same(found, loss_and_gradients(theirs, examples), 1e-4)
    rows = [value for key, value in found.items() if "trainable_tokens_delta" in key]
    assert len(rows) == len(ends)
    assert all((row.abs().sum(-1) > 0).all() for row in rows)


def test_a_head_with_a_bias_keeps_it_where_rows_are_new() -> None:
    model = grown("gptj")
    ids = torch.tensor([[5, 9, *NEW, 8]])
    assert model.lm_head.bias.abs().min() > 0
    with torch.no_grad():
        before = model(ids).logits
        torch.testing.assert_close(attach_adapter(model, LORA, NEW)(ids).logits, before)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 16), (True, 8 / math.sqrt(16))])
def test_the_scale_of_rslora_goes_with_the_root_of_the_rank(rslora: bool, scale: float) -> None:
    wrapped = attach_adapter(tiny_model("llama"), replace(LORA, rank=16, use_rslora=rslora))
    layer = wrapped.get_base_model().model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(0))
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
        update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        expected = layer.base_layer(x) + scale * (x @ update.T)
        assert "forward" in vars(layer)  # ours
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_dora": True}, {"modules_to_save": ("embed_tokens", "lm_head", "norm", "input_layernorm")}],
    ids=["tokens", "dora", "saved"],
)
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_a_16_bit_base_computes_in_16_bits_under_fp32_masters(name: str, changes: dict[str, Any]) -> None:
    config = replace(LORA, **changes)
    exact = shaken(attach_adapter(grown(name), config, NEW))
    model = grown(name).bfloat16()
    wrapped = attach_adapter(model, config, NEW)
    wrapped.load_state_dict({key: value.clone() for key, value in exact.state_dict().items()})
    trained = {key: p.dtype for key, p in wrapped.named_parameters() if p.requires_grad}
    assert set(trained.values()) == {torch.float32}
    types = []
    for layer in wrapped.get_base_model().model.layers:
        layer.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    examples = examples_with_new_tokens()
    found = loss_and_gradients(wrapped, examples)
    assert set(types) == {torch.bfloat16}
    assert found.keys() == {"loss", *trained}
    expected = loss_and_gradients(exact, examples)
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=0.03, atol=0)
    for key in trained:
        assert torch.cosine_similarity(found[key].flatten(), expected[key].flatten(), dim=0) > 0.97, key


def test_dora_trains_on_a_4_bit_layer() -> None:
    import bitsandbytes

    def quantized() -> Any:
        model = tiny_model("llama", hidden_size=64, intermediate_size=64)
        for block in model.model.layers:
            plain = block.mlp.up_proj
            layer = bitsandbytes.nn.Linear4bit(
                64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True
            )
            layer.load_state_dict(plain.state_dict())
            block.mlp.up_proj = layer.to("cpu")
        return model.bfloat16()

    wrapped = shaken(attach_adapter(quantized(), replace(LORA, use_dora=True, target="up_proj")))
    found = loss_and_gradients(wrapped)
    magnitudes = [value for key, value in found.items() if "lora_magnitude_vector" in key]
    assert len(magnitudes) == 3
    assert all(value.dtype == torch.float32 and value.abs().sum() > 0 for value in magnitudes)


def test_a_fresh_dora_adapter_changes_nothing() -> None:
    model = tiny_model("llama")
    ids = torch.from_numpy(EXAMPLES[0].input_ids).long()[None]
    with torch.no_grad():
        before = model(ids).logits
        found = attach_adapter(model, replace(LORA, use_dora=True))(ids).logits
    torch.testing.assert_close(found, before, rtol=1e-5, atol=1e-5)


def test_dora_on_rows_of_zeros_is_refused_before_it_divides_by_them() -> None:
    model = tiny_model("llama_tied")
    with torch.no_grad():
        model.lm_head.weight[0] = 0  # as a padding token has it
    with pytest.raises(UsageError, match="lm_head has rows of zeros"):
        attach_adapter(model, replace(LORA, target=("q_proj", "lm_head"), use_dora=True))
    attach_adapter(tiny_model("llama_tied"), replace(LORA, use_dora=True))


# ---- the loss, where the head is not a plain layer any more ----


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"modules_to_save": ("lm_head",)}, []),
        ({"target": ("q_proj", "lm_head")}, []),
        ({"target": ("q_proj", "lm_head"), "use_dora": True}, []),
        ({}, NEW),
    ],
    ids=["saved", "lora", "dora", "tokens"],
)
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_a_trained_head_takes_the_path_of_full_logits_with_the_same_loss(
    name: str, changes: dict[str, Any], tokens: list[int]
) -> None:
    def attached() -> Any:
        model = grown(name)
        with torch.no_grad():  # the padding token's row is zero, which DoRA would refuse
            model.get_input_embeddings().weight[0] = 0.1
        return shaken(attach_adapter(model, replace(LORA, **changes), tokens))

    expected = loss_and_gradients(attached())
    found: dict[str, Any] = by_target_head(attached())
    assert found.pop("way") == "logits"
    assert_same(found, expected, 1e-4)


def test_a_head_without_an_adapter_stays_fused() -> None:
    config = replace(LORA, use_dora=True, modules_to_save="norm")
    found: dict[str, Any] = by_target_head(shaken(attach_adapter(tiny_model("llama"), config)))
    assert found.pop("way") == "fused"
    assert_same(found, loss_and_gradients(shaken(attach_adapter(tiny_model("llama"), config))), 1e-4)


# ---- which layers ----


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (("q_proj", "v_proj"), ["q_proj", "v_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        ("q_proj", ["q_proj"]),
        ("layers.1.mlp.up_proj", ["model.layers.1.mlp.up_proj"]),
        (r".*\.[02]\.mlp\.(up|gate)_proj", [f"model.layers.{n}.mlp.{x}_proj" for n in (0, 2) for x in ("gate", "up")]),
        (r".*_proj", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ("q_proj,lm_head", ["lm_head", "q_proj"]),
        ("all-linear", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
    ],
    ids=str,
)
def test_layers_are_taken_by_list_by_commas_and_by_expression(request_: Any, expected: list[str]) -> None:
    model = tiny_model("llama")
    assert target_layers(model, request_) == expected
    adapted = {name for name, layer in model.named_modules() if any(name.endswith(end) for end in expected)}
    wrapped = attach_adapter(model, replace(LORA, target=request_))
    assert {name for name, layer in wrapped.get_base_model().named_modules() if hasattr(layer, "lora_A")} == adapted


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"target": ("q_proj", "v_porj")}, ["lora_target", "'v_porj'", "v_proj"]),
        ({"target": "mlp"}, ["'mlp'", "up_proj"]),  # a block has no weight of its own
        ({"target": r".*\.q_prj"}, ["q_prj", "q_proj"]),
        ({"target": "(q_proj"}, ["regular expression"]),
        ({"modules_to_save": "ln_head"}, ["modules_to_save", "lm_head"]),
        ({"modules_to_save": ("layers",)}, ["modules_to_save"]),  # a list of blocks is none itself
        ({"target": "lm_head", "modules_to_save": "lm_head"}, ["leaves no layer"]),
    ],
    ids=str,
)
def test_a_name_that_matches_no_layer_is_refused_with_the_nearest(changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(UsageError) as refusal:
        attach_adapter(tiny_model("llama"), replace(LORA, **changes))
    assert refusal.value.exit_code == 2
    assert all(text in str(refusal.value) for text in named)


def test_a_saved_module_is_matched_by_whole_names() -> None:
    model = tiny_model("llama")
    assert saved_modules(model, "norm") == ["model.norm"]  # and not input_layernorm, whose end it is
    assert saved_modules(model, "input_layernorm, lm_head") == ["input_layernorm", "lm_head"]


def test_what_is_trained_whole_gets_no_low_rank_adapter_besides() -> None:
    wrapped = attach_adapter(tiny_model("llama"), replace(LORA, modules_to_save=("mlp",)))
    names = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert any("mlp.modules_to_save.default.up_proj.weight" in name for name in names)
    assert not any("mlp" in name and "lora_" in name for name in names)


# ---- saving, loading, going on ----


def saved(wrapped: Any, folder: Path) -> Path:
    wrapped.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ("lm_head", "norm")}],
    ids=["lora", "rslora", "dora", "saved"],
)
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_a_run_that_starts_from_an_adapter_starts_at_its_loss(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    first = shaken(attach_adapter(tiny_model(name), replace(LORA, **changes)))
    folder = saved(first, tmp_path / "adapter")
    again = attach_adapter(tiny_model(name), replace(LORA, name_or_path=str(folder)))
    assert list(again.peft_config) == ["default"]
    assert_same(loss_and_gradients(again), loss_and_gradients(first), 0)
    with torch.no_grad():
        for parameter in again.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    file = load_file(saved(again, tmp_path / "second") / "adapter_model.safetensors")
    before = load_file(folder / "adapter_model.safetensors")
    assert file.keys() == before.keys()
    for key, value in file.items():
        torch.testing.assert_close(value, before[key] + 0.01)


def test_masters_on_a_16_bit_base_keep_every_bit_they_were_saved_with(tmp_path: Path) -> None:
    config = replace(LORA, modules_to_save="norm", use_dora=True)
    first = shaken(attach_adapter(grown("llama").bfloat16(), config, NEW))
    folder = saved(first, tmp_path / "adapter")
    again = attach_adapter(
        grown("llama").bfloat16(), AdapterConfig(mode="lora", dropout=0.0, name_or_path=str(folder)), NEW
    )
    trained = {name: p.detach() for name, p in again.named_parameters() if p.requires_grad}
    assert_same(trained, {name: p.detach() for name, p in first.named_parameters() if p.requires_grad}, 0)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert any((p != p.bfloat16().float()).any() for name, p in trained.items() if "tokens" in name)
    assert_same(loss_and_gradients(again), loss_and_gradients(first), 0)


def test_the_adapters_own_settings_hold_and_what_differs_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "firefly.models.adapters.notice", lambda code, text, **values: said.append({"code": code} | values)
    )
    folder = saved(attach_adapter(tiny_model("llama"), replace(LORA, target=("q_proj",))), tmp_path / "adapter")
    attach_adapter(tiny_model("llama"), AdapterConfig(mode="lora", name_or_path=str(folder)))
    assert said == []
    attach_adapter(tiny_model("llama"), AdapterConfig(mode="lora", name_or_path=str(folder)), given=["lora_rank"])
    assert [(notice["key"], notice["value"], notice["found"]) for notice in said] == [("lora_rank", 64, 4)]
    said.clear()
    asked = AdapterConfig(mode="lora", rank=8, target="v_proj", use_dora=True, dropout=0.3, name_or_path=str(folder))
    wrapped = attach_adapter(tiny_model("llama"), asked)
    assert [notice["key"] for notice in said] == ["lora_rank", "use_dora", "lora_target"]
    layer = wrapped.get_base_model().model.layers[0].self_attn
    assert layer.q_proj.r == {"default": 4}
    assert layer.q_proj.lora_dropout["default"].p == 0.3  # how to train on is the run's own matter
    assert type(layer.v_proj) is nn.Linear


def test_an_adapter_that_is_none_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    def refused(folder: Path, model: Any) -> str:
        with pytest.raises(UsageError) as refusal:
            attach_adapter(model, replace(LORA, name_or_path=str(folder)))
        assert refusal.value.exit_code == 2
        return str(refusal.value)

    assert "adapter_config.json is missing" in refused(tmp_path / "nothing", tiny_model("llama"))
    folder = saved(attach_adapter(tiny_model("llama"), LORA), tmp_path / "adapter")
    assert "does not fit" in refused(folder, tiny_model("llama", hidden_size=64))
    assert "does not fit" in refused(folder, tiny_model("gpt2"))
    assert "has no layer model.layers.2." in refused(folder, tiny_model("llama", num_hidden_layers=2))
    assert "have no tensors, such as model.layers.3." in refused(folder, tiny_model("llama", num_hidden_layers=4))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    assert "IA3" in refused(folder, tiny_model("llama"))
    (folder / "adapter_config.json").write_text("{")
    assert "cannot be read" in refused(folder, tiny_model("llama"))


# ---- tokens ----


def test_tokens_are_added_once_and_stay_one_token() -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    assert add_tokens(tokenizer, ["<|tool|>", "<|im_end|>", "<|tool|>", "<x>"]) == [size, size + 1]
    assert add_tokens(tokenizer, ["<|tool|>"]) == []
    assert tokenizer.encode("a<|tool|>b")[1] == size
    assert tokenizer.decode([size], skip_special_tokens=True) == ""


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gptj"])
def test_new_rows_start_at_the_mean_and_the_others_stay(name: str) -> None:
    before = tiny_model(name)
    model = grown(name)
    for old, new in zip(
        (before.get_input_embeddings(), before.get_output_embeddings()),
        (model.get_input_embeddings(), model.get_output_embeddings()),
        strict=True,
    ):
        assert new.weight.shape[0] == VOCABULARY + 2 == model.config.vocab_size
        torch.testing.assert_close(new.weight[:VOCABULARY], old.weight, rtol=0, atol=0)
        torch.testing.assert_close(new.weight[VOCABULARY:], old.weight.mean(0).expand(2, -1))
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == (name == "llama_tied")


def test_a_matrix_with_room_keeps_its_length_and_its_unused_rows_are_new() -> None:
    model = tiny_model("llama")
    assert fit_embeddings(model, range(100)) == []
    assert fit_embeddings(model, range(100), added=[98, 99]) == [98, 99]
    weight = model.get_input_embeddings().weight
    assert weight.shape[0] == VOCABULARY
    torch.testing.assert_close(weight[99], weight[:98].mean(0))  # of rows in use, which the rest is not


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
@pytest.mark.parametrize("whole", [False, True], ids=["rows", "whole"])
def test_new_rows_are_saved_alone_and_come_back(name: str, whole: bool, tmp_path: Path) -> None:
    config = replace(LORA, modules_to_save=("embed_tokens", "lm_head") if whole else None)
    wrapped = shaken(attach_adapter(grown(name), config, NEW))
    folder = saved(wrapped, tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    rows = {key: tuple(value.shape) for key, value in weights.items() if "lora_" not in key}
    assert set(rows.values()) == {(VOCABULARY + 2 if whole else 2, 32)}
    assert len(rows) == (1 if name == "llama_tied" and not whole else 2)
    again = load_adapter(tiny_model(name), str(folder))
    ids = torch.tensor([[5, 9, *NEW, 8]])
    with torch.no_grad():
        expected = wrapped(ids).logits
        torch.testing.assert_close(again(ids).logits, expected)
        other = load_adapter(tiny_model(name, seed=0), str(folder))
        torch.testing.assert_close(other.eval()(ids).logits, expected)
    assert (expected[..., NEW] - expected[..., [VOCABULARY - 1]]).abs().min() > 1e-3


def test_an_adapter_gets_no_rows_that_it_was_not_saved_with(tmp_path: Path) -> None:
    folder = saved(attach_adapter(tiny_model("llama"), LORA), tmp_path / "adapter")
    with pytest.raises(UsageError, match="2 tokens are new to the adapter"):
        attach_adapter(grown("llama"), replace(LORA, name_or_path=str(folder)), NEW)


def test_an_adapter_on_embeddings_and_new_rows_in_them_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="lm_head"):
        attach_adapter(grown("llama"), replace(LORA, target=("q_proj", "lm_head")), NEW)


def test_full_training_trains_the_new_rows_with_all_others() -> None:
    model = attach_adapter(grown("llama"), replace(LORA, mode="full"), NEW)
    found = loss_and_gradients(model, examples_with_new_tokens())
    assert (found["model.embed_tokens.weight"][NEW].abs().sum(-1) > 0).all()
    assert not isinstance(model, PeftModel)


def test_an_adapter_file_of_another_tool_with_whole_embeddings_loads(tmp_path: Path) -> None:
    wrapped = shaken(attach_adapter(grown("llama"), replace(LORA, modules_to_save=("embed_tokens", "lm_head")), NEW))
    folder = saved(wrapped, tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({key: value.bfloat16() for key, value in weights.items()}, folder / "adapter_model.safetensors")
    assert load_adapter(tiny_model("llama"), str(folder)).config.vocab_size == VOCABULARY + 2


class Grouped(nn.Linear):
    """As DeepSeek-V4 projects each group of heads by a matrix of its own."""

    def forward(self, x: Tensor) -> Tensor:
        groups = self.out_features // 16
        parts = x.unflatten(-1, (groups, self.in_features)).unsqueeze(-2) @ self.weight.view(groups, 16, -1).mT
        return parts.flatten(-3)


class Spelled(nn.Linear):
    """As Falcon writes a linear layer out."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


@pytest.mark.parametrize(("kind", "adapted"), [(Grouped, False), (Spelled, True)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_layer_gets_an_adapter_if_rows_in_give_rows_out(kind: Any, adapted: bool, device: str) -> None:
    model = tiny_model("llama").to(device)
    attention = model.model.layers[0].self_attn
    attention.o_proj = kind(16 if kind is Grouped else 32, 32, bias=False, device=device)
    found = [name for name in target_layers(model, ALL_LINEAR) if name.endswith("o_proj")]
    assert found == (["o_proj"] if adapted else [f"model.layers.{number}.self_attn.o_proj" for number in (1, 2)])
