"""The merged model is the trained one, and a merge that is not says so."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from firefly.cli import main
from firefly.config import ModelConfig, load_config
from firefly.errors import UsageError, VerificationError
from firefly.export import merge as merging
from firefly.export.layers import round_unbiased, with_magnitude
from firefly.export.merge import merge
from firefly.export.verification import all_logits, compare, has_effect, largest_gap, rounding_gap
from firefly.models.adapter_loading import load_adapter
from firefly.training import train
from tiny import save_tiny_model, tiny_model, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA and a QLoRA run on a tiny model."""
    folder = tmp_path_factory.mktemp("merge")
    save_tiny_model(folder / "model", "llama")
    write_rows(folder / "train.jsonl", 12)
    for mode in ("lora", "qlora"):
        settings: dict[str, Any] = {
            "model_name_or_path": str(folder / "model"),
            "train_file": str(folder / "train.jsonl"),
            "output_dir": str(folder / mode),
            "template_name": "default",
            "train_mode": mode,
            "lora_rank": 4,
            "lora_dropout": 0,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.02,
            "max_steps": 4,
            "save_strategy": "no",
            "report_to": "none",
            "compare": False,
            "use_cpu": True,
            "bf16": False,
        }
        train(load_config(settings))
    return folder


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits


def test_a_merged_model_has_the_logits_of_the_unmerged_adapter(place: Path, tmp_path: Path) -> None:
    merged = merge(ModelConfig(), str(place / "lora"), str(tmp_path / "merged"))
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    ids = [5, 9, 20, 31, 7, 44]
    untrained = logits(base, ids)
    expected = logits(load_adapter(base, str(place / "lora")), ids)
    found = logits(AutoModelForCausalLM.from_pretrained(merged), ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (untrained - expected).abs().max() > 1e-2  # the adapter does something


def test_a_merged_model_carries_stop_tokens_tokenizer_and_template(place: Path, tmp_path: Path) -> None:
    merged = merge(ModelConfig(), str(place / "lora"), str(tmp_path / "merged"))
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert "Assistant:" in tokenizer.chat_template
    stops = json.loads((merged / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.eos_token_id in stops
    assert json.loads((merged / "merge_report.json").read_text())["passed"] is True


def test_a_qlora_adapter_merges_onto_the_original_and_onto_the_dequantized_weights(place: Path, tmp_path: Path) -> None:
    original = merge(ModelConfig(), str(place / "qlora"), str(tmp_path / "original"))
    assert json.loads((original / "merge_report.json").read_text())["distance_to_4bit"]["kl"] > 0
    dequantized = merge(ModelConfig(), str(place / "qlora"), str(tmp_path / "dequantized"), onto="dequantized")
    ids = [5, 9, 20, 31, 7, 44]
    one, other = (logits(AutoModelForCausalLM.from_pretrained(path), ids) for path in (original, dequantized))
    assert (one - other).abs().max() > 1e-4


def test_a_merge_that_changed_the_model_is_refused_with_exit_code_3(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(merging, "merge_layers", lambda model: None)  # forgets the adapter
    arguments = ["--adapter_name_or_path", str(place / "lora"), "--save_path", str(tmp_path / "merged")]
    assert main(["merge", *arguments]) == VerificationError.exit_code == 3
    assert "are not what the adapter makes of them" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["merge_report.failed.json"]
    report = json.loads((tmp_path / "merged" / "merge_report.failed.json").read_text())
    assert report["passed"] is False
    assert set(report["wrong_updates"].values()) == {0}  # no weight got any of its update


def wrongly(change: Any) -> Any:
    """`merge_layers` of adapters that were changed after the unmerged model had answered."""
    right = merging.merge_layers

    def merge_layers(model: Any) -> None:
        change(model)
        right(model)

    return merge_layers


def without_one_tensor(model: Any) -> None:
    torch.nn.init.zeros_(model.get_base_model().model.layers[1].self_attn.o_proj.lora_B["default"].weight)


def with_another_scale(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "lora_B"):  # attention has a `scaling`, too
            module.scaling["default"] *= 1.01


def with_another_adapter(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "lora_B"):
            module.lora_B["default"].weight.data = module.lora_B["default"].weight.flip(0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("change", [without_one_tensor, with_another_scale, with_another_adapter])
def test_a_wrong_merge_fails_and_leaves_what_was_there(
    change: Any, dtype: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = merge(ModelConfig(), str(place / "lora"), str(tmp_path / "merged"), dtype=dtype)
    (merged / "mine.gguf").write_text("keep")
    before = {path.name: path.read_bytes() for path in merged.iterdir()}
    monkeypatch.setattr(merging, "merge_layers", wrongly(change))
    with pytest.raises(VerificationError):
        merge(ModelConfig(), str(place / "lora"), str(merged), dtype=dtype)
    after = {path.name: path.read_bytes() for path in merged.iterdir()}
    after.pop("merge_report.failed.json")
    assert after == before


@pytest.mark.parametrize("change", [without_one_tensor, with_another_scale, with_another_adapter])
def test_the_logits_alone_tell_a_wrong_merge_in_fp32(
    change: Any, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "merge_layers", wrongly(change))
    monkeypatch.setattr(merging, "wrong_updates", lambda *_: {})
    with pytest.raises(VerificationError, match="differs from the trained one"):
        merge(ModelConfig(), str(place / "lora"), str(tmp_path / "merged"))


def test_a_new_merge_replaces_the_earlier_one_and_no_file_of_others(place: Path, tmp_path: Path) -> None:
    merged = merge(ModelConfig(), str(place / "lora"), str(tmp_path / "merged"))
    (merged / "mine.gguf").write_text("keep")
    (merged / "merge_report.failed.json").write_text("{}")  # of a merge between the two
    report = json.loads((merged / "merge_report.json").read_text())
    (merged / "of_the_first.json").touch()
    (merged / "merge_report.json").write_text(json.dumps(report | {"files": [*report["files"], "of_the_first.json"]}))
    merge(ModelConfig(), str(place / "lora"), str(merged))
    found = {path.name for path in merged.iterdir()}
    assert found == {*report["files"], "mine.gguf"}


def test_an_adapter_that_changes_nothing_is_told(place: Path, tmp_path: Path) -> None:
    untrained = get_peft_model(AutoModelForCausalLM.from_pretrained(place / "model"), LoraConfig(task_type="CAUSAL_LM"))
    untrained.save_pretrained(tmp_path / "adapter")
    with pytest.raises(VerificationError, match="changes nothing"):
        merge(ModelConfig(name_or_path=str(place / "model")), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert not list((tmp_path / "merged").iterdir())


def test_a_folder_with_other_files_is_not_overwritten(place: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    (tmp_path / "result.partial").mkdir()  # as a training run has one, too
    with pytest.raises(UsageError, match="not empty"):
        merge(ModelConfig(), str(place / "lora"), str(tmp_path))
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_an_earlier_merge_stays_until_a_new_one_is_whole(place: Path, tmp_path: Path) -> None:
    merged = merge(ModelConfig(), str(place / "lora"), str(tmp_path / "merged"))
    first = (merged / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(UsageError, match="no name that a hub could know"):
        merge(ModelConfig(name_or_path="no such model"), str(place / "lora"), str(merged))
    assert (merged / "model.safetensors").stat().st_mtime_ns == first
    (merged / "result.partial").mkdir()  # of a merge that was killed
    (merged / "result.partial" / "model.safetensors").touch()
    merge(ModelConfig(), str(place / "lora"), str(merged))
    assert (merged / "model.safetensors").stat().st_mtime_ns > first
    assert "result.partial" not in {path.name for path in merged.iterdir()}


def test_the_working_folder_can_be_merged_into(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    merge(ModelConfig(), str(place / "lora"), ".")
    assert (tmp_path / "merge_report.json").is_file()


def test_a_full_disk_is_told_without_a_traceback(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging, "save_merged", fail)
    with pytest.raises(UsageError, match=r"result\.partial could not be written.*No space left"):
        merge(ModelConfig(), str(place / "lora"), str(tmp_path / "merged"))


def test_a_base_that_is_itself_a_merge_is_never_overwritten(place: Path, tmp_path: Path) -> None:
    base = merge(ModelConfig(), str(place / "lora"), str(tmp_path / "base"))
    with pytest.raises(UsageError, match="holds the base"):
        merge(ModelConfig(name_or_path=str(base)), str(place / "lora"), str(base))
    assert (base / "model.safetensors").is_file()


def test_an_adapter_that_is_none_or_of_another_model_is_named(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"adapter_config\.json is missing"):
        merge(ModelConfig(), str(tmp_path), str(tmp_path / "merged"))
    other = save_tiny_model(tmp_path / "other", "llama", hidden_size=64)
    with pytest.raises(UsageError, match="trained on other weights"):
        merge(ModelConfig(name_or_path=str(other)), str(place / "lora"), str(tmp_path / "merged"))
    with pytest.raises(UsageError, match="does not fit"):
        merge(ModelConfig(name_or_path=str(other)), str(place / "lora"), str(tmp_path / "merged"), force=True)


def test_only_a_qlora_adapter_merges_onto_dequantized_weights(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="QLoRA"):
        merge(ModelConfig(), str(place / "lora"), str(tmp_path / "merged"), onto="dequantized")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unbiased_rounding_keeps_updates_that_rounding_to_nearest_would_lose(dtype: torch.dtype) -> None:
    weight = torch.full((400_000,), 1.0)
    update = torch.finfo(dtype).eps / 10
    rounded = round_unbiased(weight + update, dtype, torch.Generator().manual_seed(0)).float()
    assert torch.equal((weight + update).to(dtype).float(), weight)  # to nearest: nothing is left of it
    assert (rounded - weight).mean().item() == pytest.approx(update, rel=0.02)
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + torch.finfo(dtype).eps}


def test_unbiased_rounding_leaves_numbers_of_the_type_alone() -> None:
    numbers = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(round_unbiased(numbers.float(), torch.bfloat16, torch.Generator().manual_seed(1)), numbers)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA and a QLoRA run on a tiny mixture of experts."""
    folder = tmp_path_factory.mktemp("mixture")
    save_tiny_model(folder / "model", "deepseek_v3")
    write_rows(folder / "train.jsonl", 8)
    for mode in ("lora", "qlora"):
        settings: dict[str, Any] = {
            "model_name_or_path": str(folder / "model"),
            "train_file": str(folder / "train.jsonl"),
            "output_dir": str(folder / mode),
            "template_name": "default",
            "train_mode": mode,
            "lora_rank": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.02,
            "max_steps": 3,
            "save_strategy": "no",
            "report_to": "none",
            "compare": False,
            "use_cpu": True,
            "bf16": False,
        }
        train(load_config(settings))
    return folder


@pytest.mark.parametrize(("mode", "onto"), [("lora", "original"), ("qlora", "original"), ("qlora", "dequantized")])
def test_a_mixture_of_experts_merges_with_all_its_adapters(mixture: Path, tmp_path: Path, mode: str, onto: str) -> None:
    merged = merge(ModelConfig(), str(mixture / mode), str(tmp_path / "merged"), onto=onto)
    before = AutoModelForCausalLM.from_pretrained(mixture / "model").state_dict()
    after = AutoModelForCausalLM.from_pretrained(merged).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.2.mlp.experts.down_proj"} <= changed
    assert {"model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.shared_experts.down_proj.weight"} <= changed
    assert not [name for name in changed if "norm" in name or ".gate." in name or "embed" in name or "lm_head" in name]


def test_a_merge_of_bf16_experts_rounds_once_and_without_bias() -> None:
    torch.manual_seed(1)  # not the merge's own seed, whose draws would depend on these weights
    weight = torch.nn.Parameter((0.1 * torch.randn(4, 64, 32)).bfloat16(), requires_grad=False)
    experts = torch.nn.Module()
    experts.register_parameter("down_proj", weight)
    before = weight.float()
    model = get_peft_model(
        torch.nn.ModuleDict({"experts": experts}), LoraConfig(target_parameters=["experts.down_proj"])
    )
    layer: Any
    (layer,) = [module for module in model.modules() if hasattr(module, "lora_A")]
    for factor in (layer.lora_A, layer.lora_B):
        factor["default"].to(torch.float32)
        torch.nn.init.normal_(factor["default"].weight, std=0.003)
    delta = layer.scaling["default"] * torch.einsum(
        "ore,eri->eoi",
        layer.lora_B["default"].weight.view(64, -1, 4),
        layer.lora_A["default"].weight.view(4, -1, 32),
    )
    merging.merge_layers(model)
    found = weight.float() - before
    assert (found == 0).float().mean() > 0.5  # most updates are far below the last digit
    assert ((found * delta).sum() / delta.square().sum()).item() == pytest.approx(1, abs=0.15)


# ---- what an adapter may be besides plain LoRA ----

KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "use_rslora": True},
    "saved": {"modules_to_save": ["lm_head", "norm"]},
    "head": {"lora_target": "q_proj,lm_head"},
    "embedding": {"lora_target": ["q_proj", "embed_tokens"]},
    "dora head": {"lora_target": "q_proj,lm_head", "use_dora": True},
    "tokens": {"add_tokens": ["<|tool|>", "<|call|>"]},
    "whole tokens": {"add_tokens": ["<|tool|>", "<|call|>"], "modules_to_save": "embed_tokens,lm_head"},
}
TOOL_ROWS = 6


def tool_rows(path: Path) -> Path:
    """Conversations that write the added tokens."""
    rows = [{"conversation": [{"human": f"<|tool|> {n}", "assistant": f"<|call|> {n}"}]} for n in range(TOOL_ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trained(folder: Path, kind: str, name: str, **changes: Any) -> Path:
    """A short run of this kind; the weights of the base and of the run are in `folder`."""
    save_tiny_model(folder / "model", name)
    settings: dict[str, Any] = {
        "model_name_or_path": str(folder / "model"),
        "train_file": str(tool_rows(folder / "train.jsonl")),
        "output_dir": str(folder / "run"),
        "template_name": "default",
        "train_mode": "lora",
        "allow_special_in_content": True,
        "lora_rank": 4,
        "lora_dropout": 0,
        "per_device_train_batch_size": 6,
        "learning_rate": 0.02,
        "max_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "compare": False,
        "use_cpu": True,
        "bf16": False,
    }
    return train(load_config(settings | KINDS[kind] | changes))


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in KINDS for name in ("llama", "llama_tied") if (kind, name) != ("dora head", "llama_tied")],
)
def test_every_kind_of_adapter_is_served_and_merged_as_it_was_trained(kind: str, name: str, tmp_path: Path) -> None:
    run = trained(tmp_path, kind, name)
    tokenizer = AutoTokenizer.from_pretrained(run)
    ids = tokenizer.encode("a <|tool|> b <|call|> c")
    assert ("tokens" in kind) == (max(ids) >= len(AutoTokenizer.from_pretrained(tmp_path / "model")))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    untrained = logits(base, [5, 9, 20])
    served = load_adapter(base, str(run)).eval()
    assert (logits(served, [5, 9, 20])[..., : untrained.shape[-1]] - untrained).abs().max() > 1e-2
    merged = merge(ModelConfig(), str(run), str(tmp_path / "merged"))
    found = AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(logits(found, ids), logits(served, ids), atol=1e-4, rtol=0)
    shared = found.get_input_embeddings().weight is found.get_output_embeddings().weight
    assert shared == (name == "llama_tied" and kind not in ("head", "embedding"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_merges_in_16_bits(kind: str, tmp_path: Path) -> None:
    merged = merge(ModelConfig(), str(trained(tmp_path, kind, "llama")), str(tmp_path / "merged"), dtype="bfloat16")
    assert json.loads((merged / "merge_report.json").read_text())["passed"]
    assert AutoModelForCausalLM.from_pretrained(merged).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["dora", "tokens", "saved"])
@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_every_kind_of_adapter_merges_after_4_bit_training(kind: str, onto: str, tmp_path: Path) -> None:
    run = trained(tmp_path, kind, "llama", train_mode="qlora")
    merged = merge(ModelConfig(), str(run), str(tmp_path / "merged"), onto=onto)
    assert json.loads((merged / "merge_report.json").read_text())["passed"]


def test_added_tokens_are_trained_and_only_they(tmp_path: Path) -> None:
    run = trained(tmp_path, "tokens", "llama")
    merged = AutoModelForCausalLM.from_pretrained(merge(ModelConfig(), str(run), str(tmp_path / "merged")))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    rows = [tokenizer.convert_tokens_to_ids(token) for token in KINDS["tokens"]["add_tokens"]]
    for one, other in (
        (base.get_input_embeddings().weight, merged.get_input_embeddings().weight),
        (base.get_output_embeddings().weight, merged.get_output_embeddings().weight),
    ):
        old = [row for row in range(len(one)) if row not in rows]
        torch.testing.assert_close(other[old], one[old], rtol=0, atol=0)
        mean = one[: len(AutoTokenizer.from_pretrained(tmp_path / "model"))].mean(0)
        assert (other[rows] - mean).abs().amax(-1).min() > 1e-3
    assert (other[rows[0]] - other[rows[1]]).abs().max() > 1e-3


def test_a_merged_dora_layer_has_the_trained_lengths() -> None:
    direction, magnitude = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)), torch.linspace(0.1, 2, 64)
    merged = with_magnitude(direction, magnitude, transposed=False)
    torch.testing.assert_close(merged.norm(dim=1), magnitude)
    torch.testing.assert_close(torch.cosine_similarity(merged, direction), torch.ones(64))
    torch.testing.assert_close(with_magnitude(direction.T, magnitude, transposed=True), merged.T)


def test_a_logit_that_is_no_number_is_a_difference() -> None:
    one, other = torch.zeros(2, 4), torch.zeros(2, 4)
    other[0, 0] = float("nan")
    found = compare([other, one], [one, one], [[1, 2], [3, 4]], rounding=1.0)
    assert not found.passes(torch.float32)


def test_a_first_choice_within_rounding_of_another_is_a_tie_and_counted_apart() -> None:
    expected = torch.tensor([[0.0, 1.0, 0.9], [2.0, 0.0, 1.0], [0.0, 3.0, 0.0]])
    found = torch.tensor([[0.0, 1.0, 1.1], [0.0, 0.0, 1.0], [0.0, 3.0, 0.0]])
    compared = compare([expected], [found], [[1, 2, 3]], rounding=0.2)
    assert (compared.ties, compared.positions, compared.agreement) == (1, 3, 0.5)
    assert compare([expected], [found], [[1, 2, 3]], rounding=0.05).agreement == pytest.approx(1 / 3)
    p, q = torch.softmax(expected.double(), -1), torch.softmax(found.double(), -1)
    assert compared.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item())


@pytest.mark.parametrize(("gap", "rounding", "passes"), [(9e-5, 0, True), (2e-4, 0, False), (2e-4, 3e-5, True)])
def test_the_gap_allowed_in_fp32_follows_the_models_rounding(gap: float, rounding: float, passes: bool) -> None:
    one = torch.zeros(2, 4)
    assert compare([one], [one + gap], [[1, 2]], rounding).passes(torch.float32) is passes


def test_rounding_is_measured_where_attention_has_one_way_only() -> None:
    model = tiny_model("gpt2")
    prompts = [[5, 9, 20, 31, 7, 44], [3, 8]]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exact = all_logits(copy.deepcopy(model).double(), prompts)
    error = largest_gap(all_logits(model, prompts), exact)
    model.set_attn_implementation = lambda name: (_ for _ in ()).throw(ValueError(name)) if name == "eager" else None
    assert error / 8 < rounding_gap(model, prompts) < 100 * error
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_rounding_is_not_taken_from_two_kinds_of_attention_that_mean_different_things() -> None:
    model = tiny_model("llama")
    prompts = [[5, 9, 20, 31, 7, 44], [3, 8]]
    right = rounding_gap(model, prompts)
    forward = type(model).forward

    def other_where_eager(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if self.config._attn_implementation == "eager":
            output.logits = output.logits + 1
        return output

    model.forward = MethodType(other_where_eager, model)
    assert rounding_gap(model, prompts) < 100 * right


def test_an_adapter_has_an_effect_beside_any_rounding_of_routers() -> None:
    before = [torch.tensor([[3.0, -1.0]])]
    assert not has_effect(before, before, rounding=0.0)
    assert not has_effect(before, [before[0] + 1e-5], rounding=2e-5)
    assert has_effect(before, [before[0] + 1e-2], rounding=0.5)  # routers turned over make rounding look like this


@pytest.mark.parametrize("name", ["gpt_neox", "bloom", "llama", "gpt2"])
def test_16_bit_weights_are_multiplied_in_fp32(name: str) -> None:
    model = tiny_model(name).bfloat16()
    exact = all_logits(copy.deepcopy(model).double(), [[5, 9, 20, 31]])
    assert (
        largest_gap(all_logits(model, [[5, 9, 20, 31]]), exact)
        < 1e-4
        < largest_gap(all_logits(model, [[5, 9, 20, 31]], as_served=True), exact)
    )
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
