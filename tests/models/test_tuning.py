"""Which layers are recomputed, how large a microbatch is and what is cached, by the memory at hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from firefly.config import StepConfig
from firefly.models import probe_cache
from firefly.models.checkpointing import Checkpointing
from firefly.models.memory import FRAGMENTATION, Activations, Forecast
from firefly.models.tuning import LEAST, USABLE, USEFUL, Choices, Lengths, choose, restore_tuning
from tiny import tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TEN_LAYERS = Activations(10, kept=1000, entering=100, outside=0)  # 10,000 bytes a token, 2,000 with all checkpointed


def chosen(
    room: int,
    device: torch.device = GPU,
    longest: int = 1000,
    step: int = 100_000,
    cache: tuple[int, ...] = (),
    **settings: Any,
) -> Choices:
    """The choice on a device with `room` usable bytes for activations and caches."""

    def forecast(checkpointing: Checkpointing, tokens: int, cached: int) -> Forecast:
        needed = int(TEN_LAYERS.per_token(checkpointing) * tokens)
        free = int(room * (1 + FRAGMENTATION[device.type]) / USABLE) + 1
        return Forecast({"weights": 5000, "activations": needed, "cache": cached}, 5000, free)

    return choose(StepConfig(**settings), TEN_LAYERS, forecast, Lengths(longest, step), device, list(cache))


def test_with_room_for_all_nothing_is_computed_again() -> None:
    found = chosen(room=10_000 * USEFUL["cuda"])
    assert found.checkpointing == Checkpointing(0)
    assert found.tokens_per_microbatch == USEFUL["cuda"]


def test_products_in_16_bit_get_more_tokens_on_a_cpu() -> None:
    def budget(device: str, compute: torch.dtype) -> int:
        room, lengths = Forecast({}, 0, 10**12), Lengths(100, 10**6)
        settings = StepConfig(), TEN_LAYERS, lambda *_: room, lengths, torch.device(device), []
        return choose(*settings, compute=compute).tokens_per_microbatch

    assert budget("cpu", torch.float32) == USEFUL["cpu"]
    assert budget("cpu", torch.bfloat16) == 4 * USEFUL["cpu"]
    assert budget("cuda", torch.bfloat16) == USEFUL["cuda"]


def test_smaller_microbatches_come_before_computing_layers_again() -> None:
    found = chosen(room=10_000 * 5000)
    assert found.checkpointing == Checkpointing(0)
    assert found.tokens_per_microbatch == 5000


def test_as_few_layers_as_make_room_for_a_worthwhile_microbatch() -> None:
    found = chosen(room=8_300 * LEAST["cuda"])
    # Two layers: 8 · 1,000 + 2 · 100 bytes a token.
    assert found.checkpointing == Checkpointing(2)
    assert LEAST["cuda"] <= found.tokens_per_microbatch < 1.1 * LEAST["cuda"]


def test_the_longest_example_must_fit_even_if_no_worthwhile_microbatch_does() -> None:
    found = chosen(room=2_000 * 1500, longest=1500)
    assert found.checkpointed_layers in (9, 10)
    assert found.tokens_per_microbatch >= 1500


def test_inputs_go_to_the_cpu_only_when_all_layers_computed_again_are_not_enough() -> None:
    assert chosen(room=2_000 * 1500, longest=1500).offload is False
    assert chosen(room=1_500 * 1500, longest=1500).checkpointing == Checkpointing(10, offload=True)
    assert chosen(room=1_500 * 1500, longest=1500, device=CPU) == Choices(1500, 10, offload=False)


def test_a_step_smaller_than_a_worthwhile_microbatch_asks_for_no_more_than_itself() -> None:
    found = chosen(room=10_000 * 600, longest=300, step=600)
    assert found == Choices(600, 0)


@pytest.mark.parametrize(("asked", "layers"), [(True, 10), (False, 0)])
def test_true_means_always_and_false_never(asked: bool, layers: int) -> None:
    for room in (100, 10**12):
        assert chosen(room=room, gradient_checkpointing=asked).checkpointed_layers == layers


def test_a_budget_that_is_asked_for_is_kept_and_layers_make_room_for_it() -> None:
    found = chosen(room=5_600 * 4000, tokens_per_microbatch=4000)
    assert found.tokens_per_microbatch == 4000
    assert found.checkpointed_layers == 5


@pytest.mark.parametrize(
    ("setting", "device", "expected"),
    [("auto", GPU, 2), (True, GPU, 4), (False, GPU, 0), ("auto", CPU, 0), (True, CPU, 4)],
)
def test_copies_of_4_bit_weights_fill_what_nothing_else_needs(
    setting: bool | str, device: torch.device, expected: int
) -> None:
    room = 10_000 * 1000 + 2500
    found = chosen(room, device, longest=1000, step=1000, cache=(1000, 1000, 1000, 1000), nf4_cache=setting)
    assert found.cached_weights == expected
    assert found.checkpointed_layers == 0


def test_a_resumed_run_keeps_stored_choices_but_for_what_is_named_outright() -> None:
    stored, today = Choices(100, 3, True, 7, 128), Choices(900, 0, False, 9, 512)
    assert restore_tuning(StepConfig(), stored, today) == stored
    named = StepConfig(tokens_per_microbatch=900)
    assert restore_tuning(named, stored, today) == dataclasses.replace(stored, tokens_per_microbatch=900)
    named = StepConfig(gradient_checkpointing=False)
    assert restore_tuning(named, stored, today) == dataclasses.replace(stored, checkpointed_layers=0, offload=False)
    less_room = dataclasses.replace(today, cached_weights=2)
    assert restore_tuning(StepConfig(), stored, less_room).cached_weights == 2
    named = StepConfig(nf4_cache=True)
    assert restore_tuning(named, stored, today) == dataclasses.replace(stored, cached_weights=9)


def test_memory_that_no_microbatch_needs_goes_to_copies_of_4_bit_weights() -> None:
    """A step of 16,000 tokens under a budget of 15,000 makes two microbatches, as it does under 8,800."""
    room, copies = 10_000 * 15_000, (1_000_000,) * 80
    found = chosen(room, step=16_000, cache=copies)
    assert found.tokens_per_microbatch == 8_800
    assert found.cached_weights == (15_000 - 8_800) * 10_000 // 1_000_000
    asked = chosen(room, step=16_000, cache=copies, tokens_per_microbatch=15_000)
    assert asked.tokens_per_microbatch == 15_000
    assert asked.cached_weights == 0


def test_attention_is_measured_once_for_heads_of_a_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A plan and its run would disagree else, where other programs are busy during one of them."""
    measured: list[tuple[Any, ...]] = []
    monkeypatch.setenv("FIREFLY_CACHE", str(tmp_path))
    monkeypatch.setattr(probe_cache, "measure_crossover", lambda *shape: measured.append(shape) or 256 * len(measured))
    model, cpu = tiny_model("llama"), torch.device("cpu")
    assert [probe_cache.cached_crossover(model, cpu, torch.bfloat16) for _ in range(3)] == [256, 256, 256]
    assert probe_cache.cached_crossover(tiny_model("qwen3"), cpu, torch.bfloat16) in (256, 512)
    assert probe_cache.cached_crossover(model, cpu, torch.float32) == 256 * len(measured)
    assert probe_cache.cached_crossover(model, cpu, torch.float16) == 0
    count = len(measured)
    monkeypatch.setattr(probe_cache, "_processor", lambda: ["model name: another"])
    probe_cache.cached_crossover(model, cpu, torch.float32)
    assert len(measured) == count + 1
    heads = model.config.num_attention_heads, model.config.num_key_value_heads
    assert (measured[0], measured[-1]) == ((*heads, 8, 8, torch.bfloat16), (*heads, 8, 8, torch.float32))


@pytest.mark.parametrize(("name", "widths"), [("minicpm3", (16, 8)), ("deepseek_v3", (16, 8)), ("qwen3", (8, 8))])
def test_attention_is_measured_with_the_widths_that_the_model_has(
    name: str, widths: tuple[int, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Latent attention writes the width of its rotary part as `head_dim`."""
    measured: list[tuple[Any, ...]] = []
    monkeypatch.setenv("FIREFLY_CACHE", str(tmp_path))
    monkeypatch.setattr(probe_cache, "measure_crossover", lambda *shape: measured.append(shape) or 256)
    probe_cache.cached_crossover(tiny_model(name), torch.device("cpu"), torch.bfloat16)
    assert measured[0][2:4] == widths
