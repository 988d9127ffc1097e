"""A model of weights that have not been read is the one that would have been loaded, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from firefly.config import AdapterConfig, ModelConfig
from firefly.console import take_notices
from firefly.errors import UsageError
from firefly.models import probes
from firefly.models.adapters import attach_adapter, transformers_model
from firefly.models.attention import choose_layout
from firefly.models.dry_run import measure_activations
from firefly.models.forwards import install_training_forwards
from firefly.models.loading import load_model
from firefly.models.precision import Precision
from firefly.models.probes import load_for_training
from firefly.models.tokens import fit_embeddings
from firefly.models.unread import Unread, read_here, unread_of
from tiny import save_tiny_model, tiny_model, tiny_tokenizer

CPU, FP32, BF16 = torch.device("cpu"), Precision(torch.float32), Precision(torch.bfloat16)
# Plain, tied, cut apart and put together by transformers (Phi's and JetMoE's blocks), experts stacked or as they are
# stored, Conv1D, types that some weights keep.
NAMES = ["llama", "llama_tied", "phi3", "mixtral", "jetmoe", "gpt_oss", "gpt2"]


def both(folder: Path, mode: str = "lora", precision: Precision = FP32) -> tuple[Any, Any]:
    """A model loaded whole, and unread."""
    source = ModelConfig(name_or_path=str(folder))
    torch.manual_seed(7)
    whole = load_model(source, mode, precision, CPU)
    torch.manual_seed(7)
    return whole, load_model(source, mode, precision, CPU, unread=True)


def values(model: nn.Module) -> dict[str, Tensor]:
    read_here(model.parameters())
    return {name: x.detach() for name, x in (*model.named_parameters(), *model.named_buffers())}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_unread_weights_are_those_that_a_model_is_loaded_with(name: str, precision: Precision, tmp_path: Path) -> None:
    tiny_model(name).to(torch.bfloat16).save_pretrained(tmp_path)
    whole, unread = both(tmp_path, precision=precision)
    waiting = unread_of(unread)
    assert waiting.keys() == dict(unread.named_parameters()).keys()
    for number in (2, 3, 5):  # ranks; some get fewer rows, or none
        for path, weight in waiting.items():
            size = weight.shape[0]
            each = -(-size // number)
            parts = [weight.rows(first, min(first + each, size)) for first in range(0, size, each)]
            assert torch.equal(torch.cat(parts), whole.get_parameter(path)), path
    assert (unread.name_or_path, unread.generation_config) == (whole.name_or_path, whole.generation_config)
    assert unread.config.to_dict() == whole.config.to_dict()
    assert_equal(values(unread), values(whole))


def test_a_stand_in_takes_no_memory_and_shows_whoever_computes_with_it(tmp_path: Path) -> None:
    model = load_model(
        ModelConfig(name_or_path=str(save_tiny_model(tmp_path, "llama_tied"))), "lora", FP32, CPU, unread=True
    )
    assert sum(p.untyped_storage().nbytes() for p in model.parameters()) == 4 * len(list(model.parameters()))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(input_ids=torch.arange(5)[None]).logits.isnan().all()
    with pytest.raises(RuntimeError, match="single memory location"), torch.no_grad():
        model.lm_head.weight[0] = 1.0


def test_a_weight_that_no_file_has_begins_with_one_processs_numbers(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    kept = {name: x for name, x in load_file(tmp_path / "model.safetensors").items() if name != "lm_head.weight"}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    whole, unread = both(tmp_path)
    assert "lm_head.weight" not in unread_of(unread)
    assert_equal(values(unread), values(whole))


@pytest.mark.parametrize("name", ["llama_tied", "mixtral"])
@pytest.mark.parametrize(
    "adapter",
    [{}, {"modules_to_save": ("lm_head", "norm")}, {"target": ("q_proj", "embed_tokens")}],
    ids=["all-linear", "saved", "embedding"],
)
def test_an_adapter_begins_with_one_processs_numbers(name: str, adapter: dict[str, Any], tmp_path: Path) -> None:
    save_tiny_model(tmp_path, name)
    found = []
    for model in both(tmp_path, precision=BF16):
        torch.manual_seed(3)
        found.append(values(attach_adapter(model, AdapterConfig(mode="lora", rank=4, **adapter))))
    assert_equal(found[1], found[0])


def test_new_tokens_get_the_rows_that_one_process_gives_them(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    found = []
    for model in both(tmp_path):
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["<new>", "<newer>"])
        torch.manual_seed(3)
        new = fit_embeddings(model, tokenizer)
        found.append(values(attach_adapter(model, AdapterConfig(mode="lora", rank=4), new)))
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("start", [True, "pissa"])
@pytest.mark.parametrize("saved", [None, ["lm_head"]], ids=["plain", "with the head"])
def test_a_saved_adapter_is_trained_on(start: Any, saved: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    save_tiny_model(tmp_path / "base", "llama")
    settings = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        modules_to_save=saved,
        init_lora_weights=start,
        task_type="CAUSAL_LM",
        bias="all" if start is True else "none",
    )
    base = load_model(ModelConfig(name_or_path=str(tmp_path / "base")), "lora", FP32, CPU)
    get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    take_notices()
    found = []
    for model in both(tmp_path / "base"):
        adapter = AdapterConfig(mode="lora", name_or_path=str(tmp_path / "adapter"))
        found.append(values(attach_adapter(model, adapter)))
    assert_equal(found[1], found[0])
    assert ("engine.loads_whole" in [each["code"] for each in take_notices()]) == (start == "pissa")


# ---- what is tried before ----


@pytest.mark.parametrize(
    ("name", "mode"),
    [("llama_tied", "full"), ("llama_tied", "lora"), ("gemma2", "lora"), ("mixtral", "lora"), ("bloom", "lora")],
)
def test_trials_on_the_twin_find_what_those_on_the_model_do(name: str, mode: str, tmp_path: Path) -> None:
    source = ModelConfig(name_or_path=str(save_tiny_model(tmp_path, name)))
    adapter = AdapterConfig(mode=mode, rank=4)  # type: ignore[arg-type]
    plain = load_model(source, mode, FP32, CPU)
    layout = choose_layout(plain)
    plain = attach_adapter(plain, adapter)
    head = install_training_forwards(plain)
    state = torch.get_rng_state()
    tried = load_for_training(source, mode, FP32, CPU, sharded=True)
    assert tried.layout() == layout
    assert torch.equal(torch.get_rng_state(), state)  # the adapter is drawn next
    model = attach_adapter(tried.model, adapter, unreached=tried.unreached())
    assert tried.install_forwards(model, adapter) == head
    trained = [(each, p.shape, p.dtype, p.requires_grad) for each, p in model.named_parameters()]
    assert trained == [(each, p.shape, p.dtype, p.requires_grad) for each, p in plain.named_parameters()]
    own = [{path for path, module in each.named_modules() if "forward" in vars(module)} for each in (model, plain)]
    assert own[0] == own[1]
    found = tried.activations(adapter, layout[0], None, 40)
    expected = measure_activations(transformers_model(plain), layout[0], None, 40)
    assert (found.layers, found.entering) == (expected.layers, expected.entering)
    assert found.kept == pytest.approx(expected.kept, rel=0.02 if name != "mixtral" else 0.2)
    assert found.outside == pytest.approx(expected.outside, rel=0.02)


def test_what_cannot_be_loaded_unread_is_loaded_whole_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(cls: Any, function: Any, *_: Any) -> Any:
        raise NotImplementedError("an odd operation")

    source = ModelConfig(name_or_path=str(save_tiny_model(tmp_path, "mixtral")))
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(Unread, "__torch_dispatch__", classmethod(odd))
        take_notices()
        found = load_for_training(source, "lora", FP32, CPU, sharded=True)
    assert found.twin is None
    assert not unread_of(found.model)
    [said] = take_notices()
    assert said["code"] == "engine.loads_whole"
    assert "every process loads the whole model: " in said["message"]


def test_a_damaged_file_is_the_users_fault(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_for_training(ModelConfig(name_or_path=str(tmp_path)), "lora", FP32, CPU, sharded=True)


def test_without_sharding_nothing_is_left_unread(tmp_path: Path) -> None:
    source = ModelConfig(name_or_path=str(save_tiny_model(tmp_path, "llama")))
    found = probes.load_for_training(source, "lora", FP32, CPU, sharded=False)
    assert found.twin is None
    assert not unread_of(found.model)
