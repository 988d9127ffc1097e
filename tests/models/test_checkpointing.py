"""Checkpointed layers are computed twice, the others once, and the gradients are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from firefly.data.batching import pack
from firefly.errors import UsageError
from firefly.models.adapters import transformers_model
from firefly.models.attention import choose_layout
from firefly.models.checkpointing import Checkpointing, decoder_layers, install_checkpointing, plain_layers
from firefly.models.forwards import install_training_forwards
from firefly.models.kernels.gated_mlp import fused_blocks
from tiny import SHAPE, assert_same, gradients, prepared, random_examples, tiny_model, with_our_lora

BATCH = pack(random_examples(9, 30, 21))


def gradients_of(model: Any, layout: str) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    torch.manual_seed(0)
    model(**BATCH.model_inputs(layout == "solo"))["loss"].backward()
    return gradients(model)


@pytest.mark.parametrize(
    "chosen", [Checkpointing(1), Checkpointing(2), Checkpointing(3), Checkpointing(3, offload=True)]
)
@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "gpt_neox", "olmo2", "qwen2_moe", "granite"])
def test_gradients_are_those_without_checkpointing(name: str, chosen: Checkpointing) -> None:
    model, layout, _ = prepared(name, "lora")
    expected = gradients_of(model, layout)
    install_checkpointing(transformers_model(model), chosen)
    assert_same(gradients_of(model, layout), expected, 1e-6)


@pytest.mark.parametrize("chosen", [0, 1, 2, 3])
def test_exactly_the_first_layers_are_computed_again(chosen: int) -> None:
    model, layout, _ = prepared("llama", "lora")
    inner = transformers_model(model)
    install_checkpointing(inner, Checkpointing(chosen))
    computed = [0, 0, 0]

    def count_of(number: int) -> Any:
        def count(*_: Any) -> None:
            computed[number] += 1

        return count

    for number, layer in enumerate(decoder_layers(inner)):
        layer.self_attn.register_forward_hook(count_of(number))
    gradients_of(model, layout)
    assert computed == [2 if number < chosen else 1 for number in range(3)]


def test_what_was_installed_before_is_taken_back() -> None:
    model, _, _ = prepared("llama", "lora")
    inner = transformers_model(model)
    install_checkpointing(inner, Checkpointing(3, offload=True))
    install_checkpointing(inner, Checkpointing(0))
    assert not any(layer.gradient_checkpointing for layer in decoder_layers(inner))


def test_offloaded_inputs_pass_through_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from firefly.models import checkpointing

    model, layout, _ = prepared("llama", "lora")
    install_checkpointing(transformers_model(model), Checkpointing(3, offload=True))
    moved: list[torch.Size] = []

    class Recording(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool) -> None:
            def pack(tensor: torch.Tensor) -> torch.Tensor:
                moved.append(tensor.shape)
                return tensor

            super().__init__(pack, lambda tensor: tensor)

    monkeypatch.setattr(checkpointing, "save_on_cpu", Recording)
    gradients_of(model, layout)
    tokens, width = BATCH.input_ids.shape[1], 32
    assert moved.count(torch.Size([1, tokens, width])) == 3  # the input of each layer, and nothing from inside one
    assert all(shape.numel() <= tokens * width for shape in moved)


def test_an_architecture_without_such_layers_is_refused() -> None:
    with pytest.raises(UsageError, match="gradient_checkpointing"):
        install_checkpointing(torch.nn.Linear(2, 2), Checkpointing(1))
    install_checkpointing(torch.nn.Linear(2, 2), Checkpointing(0))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("llama", True), ("qwen3", True), ("granite", True), ("gemma2", False), ("olmo2", False), ("qwen2_moe", False)],
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_second_pass_leaves_out_the_product_that_nothing_reads(name: str, expected: bool, dropout: float) -> None:
    """Where the output of the feed-forward block is only added to the residual stream."""
    inner = tiny_model(name)
    layout, _ = choose_layout(inner)
    model = with_our_lora(inner, dropout=dropout)
    install_training_forwards(model)
    whole = gradients_of(model, layout)
    install_checkpointing(transformers_model(model), Checkpointing(3))
    blocks = [block for layer in decoder_layers(inner) for block in fused_blocks(layer).values()]
    assert blocks
    layers = decoder_layers(inner)
    assert list(plain_layers(inner, layers)) == (layers if expected else [])
    assert_same(gradients_of(model, layout), whole, 1e-6)


def test_layers_with_experts_and_dense_ones_of_one_class_are_told_apart() -> None:
    inner = tiny_model("qwen2_moe", decoder_sparse_step=2)
    layout, _ = choose_layout(inner)
    model = with_our_lora(inner)
    install_training_forwards(model)
    whole = gradients_of(model, layout)
    install_checkpointing(transformers_model(model), Checkpointing(3))
    first, _, last = decoder_layers(inner)
    assert list(plain_layers(inner, decoder_layers(inner))) == [first, last]
    assert_same(gradients_of(model, layout), whole, 1e-6)


def test_a_router_s_loss_has_its_gradient_through_checkpointed_layers() -> None:
    """Ernie adds its one shared expert's output to the residual stream, as dense layers do their block's."""
    config = transformers.Ernie4_5_MoeConfig(
        **SHAPE | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": 24},
        moe_layer_start_index=0,
        moe_layer_interval=1,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    choose_layout(model)
    install_training_forwards(model)

    def router_gradients() -> dict[str, torch.Tensor]:
        model.train()
        model.zero_grad()
        out = model(**BATCH.model_inputs(), output_router_logits=True)
        sum(logits.float().square().sum() for logits in out["router_logits"]).backward()
        return {name: grad for name, grad in gradients(model).items() if "gate.weight" in name}

    expected = router_gradients()
    assert expected
    install_checkpointing(model, Checkpointing(3))
    assert_same(router_gradients(), expected, 1e-6)
