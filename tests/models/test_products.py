"""Which products a model's tokens pass through, and how fast this CPU computes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from firefly.models import probe_cache, products
from firefly.models.precision import Rates
from firefly.models.probe_cache import cached_rates
from firefly.models.products import Product, Products, measure_rates, products_of
from tiny import EXPERTS, tiny_model

ROWS = products.ROWS
SMALL = Products(1, {Product(8, 16, 32): 2}, Product(8, 64, 16))
RATES = {"frozen": Rates(2e9, 1e9), "trained": Rates(3e9, 1e9)}


def test_every_linear_layer_and_the_head_are_counted() -> None:
    found = products_of(tiny_model("llama_tied"))  # 3 layers, width 32, 2 of 4 heads have keys of their own
    expected = {(32, 32): 2, (16, 32): 2, (48, 32): 2, (32, 48): 1}
    assert found.body == {Product(ROWS, *shape): 3 * count for shape, count in expected.items()}
    assert found.head == Product(ROWS, 264, 32)
    assert found.weights_per_layer == 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32
    assert found.tiny


def test_matrices_that_are_no_linear_layers_are_counted() -> None:
    found = products_of(tiny_model("gpt2"))  # Conv1D: inputs first
    assert {(one.outputs, one.inputs) for one in found.body} == {(32, 96), (32, 32), (32, 48), (48, 32)}


def test_of_experts_those_count_that_a_token_passes_through() -> None:
    found = products_of(tiny_model("qwen3_moe"))  # 2 of 4, in stacks of three dimensions
    layers, inner = 3, EXPERTS["moe_intermediate_size"]
    rows = min(ROWS, products.ROWS_OF_EXPERTS * 2 // 4)
    assert found.body[Product(rows, 2 * inner, 32)] == layers * 2
    assert found.body[Product(rows, 32, inner)] == layers * 2


def test_rows_of_many_experts_are_few() -> None:
    model: Any = tiny_model("qwen3_moe", num_experts=32, num_experts_per_tok=2)
    assert min(one.rows for one in products_of(model).body) == products.ROWS_OF_EXPERTS * 2 // 32


def test_a_model_of_a_class_without_known_layers_is_counted_whole() -> None:
    model: Any = tiny_model("llama")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaDecoderLayer":
                module._modules[name] = nn.Sequential(*child.children())
    found = products_of(model)
    assert found.layers == 3
    assert found.body == products_of(tiny_model("llama")).body  # neither the embedding nor the head


def test_shares_are_of_the_whole_model_and_long_sides_are_cut() -> None:
    wide = Products(2, {Product(8, 10_000, 64): 2, Product(8, 64, 64): 4}, Product(8, 50_000, 64))
    shares = wide.shares()
    assert set(shares) == {Product(8, products.WIDEST, 64), Product(8, 64, 64)}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares[Product(8, 64, 64)] == pytest.approx(4 * 64 / (4 * 64 + 70_000))


def work(one: Products) -> float:
    return sum(product.timed_flops for product in one.shares())


def test_many_shapes_take_no_longer_than_few() -> None:
    largest = Product(ROWS, products.WIDEST, products.WIDEST)
    few = Products(1, {largest: 4, Product(ROWS, 1024, products.WIDEST): 2}, None)
    assert {product.rows for product in few.shares()} == {ROWS}  # a model of 8B
    several = Products(1, {Product(ROWS, products.WIDEST - 8 * n, products.WIDEST): 1 for n in range(7)}, largest)
    assert len(several.shares()) == 7
    assert {product.rows for product in several.shares()} == {128}
    many = Products(1, {Product(ROWS, products.WIDEST - 8 * n, products.WIDEST): 1 + n for n in range(50)}, None)
    assert set(many.shares()) == {Product(128, products.WIDEST - 8 * n, products.WIDEST) for n in range(41, 50)}
    for one in (few, several, many):
        assert work(one) <= products.ROUND_FLOPS
        assert sum(one.shares().values()) == pytest.approx(1)


def test_rows_of_experts_are_not_more_where_others_are_fewer() -> None:
    body = {Product(ROWS, products.WIDEST - 8 * n, products.WIDEST): 1 for n in range(4)}
    found = Products(1, body | {Product(64, 2048, 2048): 8}, None).shares()
    assert {product.rows for product in found} == {64, 256}


def test_the_smallest_model_to_be_timed_has_a_million_weights_a_layer() -> None:
    assert Products(2, {Product(8, 1024, 1023): 2}, Product(8, 10**6, 1024)).tiny
    assert not Products(2, {Product(8, 1024, 1024): 2}, None).tiny


def test_rates_count_each_product_by_its_part_of_the_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix of 16 × 32 twice at 1 and 4 s of the first product, the head at 8 and 16."""

    def timed(x: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor) -> tuple[float, float, float]:
        wide, head = x.dtype == torch.float32, weight.shape[0] == 64
        seconds = (8.0 if wide else 16.0) if head else (1.0 if wide else 4.0)
        return seconds, seconds, 10 * seconds

    monkeypatch.setattr(products, "_timed", timed)
    found = measure_rates(SMALL)
    small, head = 2 * 8 * 16 * 32, 2 * 8 * 64 * 16
    flops = 2 * small + head
    assert found["frozen"].float32 == pytest.approx(flops / (2 * 1 + 8))
    assert found["frozen"].bfloat16 == pytest.approx(flops / (2 * 4 + 16))
    assert found["trained"].float32 == pytest.approx(flops / (4 * (2 * 1 + 8)))


def test_a_busy_moment_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def timed(*_: torch.Tensor) -> tuple[float, float, float]:
        nonlocal calls
        calls += 1
        return (9.0, 9.0, 9.0) if calls in (5, 8, 9) else (1.0, 1.0, 1.0)

    monkeypatch.setattr(products, "_timed", timed)
    found = measure_rates(SMALL)
    assert found["frozen"].float32 == found["frozen"].bfloat16


def test_really_measured_rates_are_those_of_a_cpu() -> None:
    state = torch.get_rng_state()
    found = measure_rates(Products(1, {Product(64, 256, 256): 1}, None))
    for rates in found.values():
        assert 1e8 < rates.float32 < 1e14
        assert 1e8 < rates.bfloat16 < 1e14
    assert torch.equal(torch.get_rng_state(), state)


# ---- the cache ----


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> list[Products]:
    """What was measured, in a cache of its own."""
    seen: list[Products] = []
    monkeypatch.setenv("FIREFLY_CACHE", str(tmp_path))
    monkeypatch.setattr(probe_cache, "measure_rates", lambda one: (seen.append(one), RATES)[1])
    return seen


def test_what_was_measured_once_is_not_measured_again(measured: list[Products]) -> None:
    assert cached_rates(SMALL) == RATES
    assert cached_rates(Products(1, dict(SMALL.body), SMALL.head)) == RATES
    assert len(measured) == 1


def test_what_cannot_be_kept_counts_all_the_same_and_that_is_said(
    measured: list[Products], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(probe_cache, "_write", fail)
    assert cached_rates(SMALL) == RATES
    assert "No space left on device" in capfd.readouterr().err
    assert len(measured) == 1


def test_other_shapes_threads_and_processors_are_measured_anew(
    measured: list[Products], monkeypatch: pytest.MonkeyPatch
) -> None:
    cached_rates(SMALL)
    cached_rates(Products(1, {Product(8, 16, 33): 2}, SMALL.head))
    assert len(measured) == 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    cached_rates(SMALL)
    assert len(measured) == 3
    monkeypatch.setattr(probe_cache, "_processor", lambda: ["model name: another"])
    cached_rates(SMALL)
    assert len(measured) == 4
