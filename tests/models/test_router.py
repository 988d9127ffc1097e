"""The load-balancing loss is transformers' own over the whole step, however it is cut up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from firefly.models.probing import decoder
from firefly.models.router import (
    RouterSettings,
    count_choices,
    disable_router_noise,
    recorded_logits,
    router_loss,
    router_settings,
)
from tiny import assert_same, gradients, tiny_model, with_our_lora

BALANCED = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe_window", "gpt_oss"]
COEF = 0.37
ROWS = (torch.arange(8 * 24) * 7919 % 261 + 3).view(8, 24)


def model_of(name: str) -> Any:
    return tiny_model(name, router_aux_loss_coef=COEF).requires_grad_(True)


def settings_of(model: Any) -> RouterSettings:
    settings = router_settings(model)
    assert settings is not None
    return settings


def logits_of(model: Any, ids: Tensor) -> tuple[Tensor, ...]:
    output = decoder(model)(input_ids=ids, use_cache=False, output_router_logits=True)
    return recorded_logits(output, settings_of(model))


def step_loss(model: Any, microbatches: list[Tensor], weights: list[Tensor] | None = None) -> Tensor:
    """Loss of a step, its gradients accumulated one microbatch after the other."""
    settings = settings_of(model)
    each = weights or [torch.ones(ids.numel()) for ids in microbatches]
    with torch.no_grad():
        choices = sum(
            count_choices(logits_of(model, ids), settings, w) for ids, w in zip(microbatches, each, strict=True)
        )
    tokens = sum(w.sum().item() for w in each)
    total = torch.zeros(())
    for number, ids in enumerate(microbatches):
        given = None if weights is None else weights[number]
        loss = router_loss(logits_of(model, ids), settings, given, choices, tokens)  # type: ignore[arg-type]
        loss.backward()
        total += loss.detach()
    return total


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", BALANCED)
def test_the_loss_and_its_gradients_are_those_of_transformers(name: str) -> None:
    model = model_of(name)
    output = model(ROWS, labels=ROWS, output_router_logits=True)
    plain = model(ROWS, labels=ROWS, output_router_logits=False)
    (output.loss - plain.loss).backward()
    expected = {path: gradient for path, gradient in gradients(model).items() if gradient.abs().max() > 1e-6}
    torch.testing.assert_close(output.loss - plain.loss, COEF * output.aux_loss, rtol=1e-4, atol=0)

    model.zero_grad()
    logits, settings = logits_of(model, ROWS), settings_of(model)
    loss = router_loss(logits, settings, None, count_choices(logits, settings), ROWS.numel())
    loss.backward()
    close(loss.detach(), COEF * output.aux_loss)
    found = gradients(model)
    assert any("gate" in path or "router" in path for path in expected)
    assert_same({path: found[path] for path in expected}, expected, 2e-3)  # a difference of two losses of size 6

    model.zero_grad()
    (COEF * model(ROWS, output_router_logits=True).aux_loss).backward()
    assert_same(found, gradients(model), 1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_eight_microbatches_are_one(name: str) -> None:
    model = model_of(name)
    loss = step_loss(model, [ROWS])
    expected = gradients(model)
    model.zero_grad()
    close(step_loss(model, list(ROWS.split(1))), loss)
    assert_same(gradients(model), expected, 1e-5)
    model.zero_grad()
    close(step_loss(model, [ROWS[:3], ROWS[3:]]), loss)
    assert_same(gradients(model), expected, 1e-5)


def test_the_mean_of_the_microbatches_losses_is_another_number() -> None:
    model = model_of("mixtral")
    whole = step_loss(model, [ROWS])
    apart = torch.stack([step_loss(model, [row]) for row in ROWS.split(1)]).mean()
    assert (whole - apart).abs() > 1e-4 * whole


def test_a_token_of_weight_two_counts_twice() -> None:
    model = model_of("qwen2_moe")
    twice = step_loss(model, [ROWS[:2], ROWS[:1]])
    expected = gradients(model)
    model.zero_grad()
    weights = torch.ones(2, 24)
    weights[0] = 2
    close(step_loss(model, [ROWS[:2]], [weights.view(-1)]), twice)
    assert_same(gradients(model), expected, 1e-5)


def test_checkpointing_and_adapters_leave_the_loss_as_it_is() -> None:
    model = with_our_lora(model_of("qwen2_moe")).get_base_model().train()
    loss = step_loss(model, [ROWS])
    expected = gradients(model)
    assert expected
    model.zero_grad()
    model.gradient_checkpointing_enable()
    close(step_loss(model, list(ROWS.split(2))), loss)
    assert_same(gradients(model), expected, 1e-5)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "llama4", "hunyuan_moe"])
def test_a_model_without_the_loss_has_no_settings(name: str) -> None:
    assert router_settings(tiny_model(name)) is None


def test_a_coefficient_of_zero_is_no_loss() -> None:
    assert router_settings(tiny_model("mixtral", router_aux_loss_coef=0.0)) is None
    assert router_settings(tiny_model("mixtral", router_aux_loss_coef=0.5)) == RouterSettings(4, 2, 0.5)


DENSE: dict[str, dict[str, Any]] = {
    # The dense members of families with experts, whose configurations keep a coefficient and a number of experts.
    "granite_hybrid": {"num_local_experts": 0, "num_experts_per_tok": 0},
    "jamba": {"num_experts": 1, "num_experts_per_tok": 1},
    "doge": {"is_moe": False},
    "qwen2_moe": {"decoder_sparse_step": 9},
    "qwen3_moe": {"mlp_only_layers": [0, 1, 2]},
    "ernie4_5_moe": {"moe_layer_start_index": 9},
    "deepseek_v3": {"first_k_dense_replace": 9},
    "llama4": {"moe_layers": []},
}


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_member_of_a_family_with_experts_has_no_settings(name: str) -> None:
    sparse = tiny_model(name, router_aux_loss_coef=COEF)
    assert (router_settings(sparse) is None) == (name in ("deepseek_v3", "llama4"))  # which have no such loss
    dense = tiny_model(name, router_aux_loss_coef=COEF, **DENSE[name])
    assert router_settings(dense) is None
    assert not decoder(dense)(input_ids=ROWS, use_cache=False, output_router_logits=True).router_logits


@pytest.mark.parametrize(
    ("name", "changes", "sparse"),
    [
        ("qwen3_moe", {"mlp_only_layers": [0, 2]}, 1),
        ("qwen3_moe", {"decoder_sparse_step": 2}, 1),
        ("ernie4_5_moe", {}, 2),
        ("jamba", {}, 1),
        ("granite_hybrid", {}, 3),
        ("doge", {}, 3),
    ],
)
def test_where_some_layers_are_dense_the_loss_is_that_of_the_others(
    name: str, changes: dict[str, Any], sparse: int
) -> None:
    model = tiny_model(name, router_aux_loss_coef=COEF, **changes).requires_grad_(True)
    settings, logits = settings_of(model), logits_of(model, ROWS)
    assert len(logits) == sparse
    loss = router_loss(logits, settings, None, count_choices(logits, settings), ROWS.numel())
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    expected = COEF * model(ROWS, output_router_logits=True).aux_loss
    close(loss.detach(), expected)
    expected.backward()
    assert_same(found, gradients(model), 1e-5)


def test_a_decoder_that_recorded_nothing_is_an_error() -> None:
    model = model_of("mixtral")
    with pytest.raises(RuntimeError, match="recorded no router logits"):
        recorded_logits(decoder(model)(input_ids=ROWS, use_cache=False), settings_of(model))


@pytest.mark.parametrize(
    ("name", "noise"),
    [("mixtral", {"router_jitter_noise": 0.3}), ("phimoe_window", {}), ("phimoe_window", {"input_jitter_noise": 0.3})],
)
def test_quiet_routers_route_the_same_tokens_the_same_way(name: str, noise: dict[str, Any]) -> None:
    model = tiny_model(name, **noise)

    def difference() -> float:
        model.train()
        with torch.no_grad():
            return (model(ROWS).logits - model(ROWS).logits).abs().max().item()

    assert difference() > 0
    assert len(disable_router_noise(model)) >= 3
    assert difference() == 0


def test_most_routers_are_quiet_already() -> None:
    assert disable_router_noise(tiny_model("mixtral")) == disable_router_noise(tiny_model("qwen3_moe")) == []
