"""Two models in one process: what is done to one changes nothing of the other, nor of the libraries they share."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from firefly.data.batching import pack
from firefly.models.attention import choose_layout, segmented, use_crossover
from firefly.models.checkpointing import Checkpointing, install_checkpointing
from firefly.models.dry_run import counted_activations, dry_run
from firefly.models.forwards import install_training_forwards
from firefly.models.kernels.matmul import casts_kept
from firefly.models.sampling import sampling
from tiny import gradients, random_examples, tiny_model, with_our_lora

ROWS = [pack(random_examples(9, 30, 21))]


def train(inner: Any, steps: int, begun: Event | None = None) -> list[Tensor]:
    """Prepare a model and train it, one layer recomputed: losses and last gradients."""
    layout, _ = choose_layout(inner)
    model = with_our_lora(inner)
    install_training_forwards(model)
    install_checkpointing(inner, Checkpointing(1))
    model.train()
    losses = []
    for _ in range(steps):
        model.zero_grad()
        with casts_kept(p for p in model.parameters() if p.requires_grad):
            loss = model(**ROWS[0].model_inputs(layout == "solo"))["loss"]
            loss.backward()
        losses.append(loss.detach())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-3 * parameter.grad
        if begun is not None:
            begun.set()
    return [*losses, *gradients(model).values()]


def measure(inner: Any) -> list[Any]:
    """What `plan` asks of a model: its layout, whether our forwards fit, what tokens keep, the peak of a step."""
    model = with_our_lora(inner)
    found: list[Any] = [choose_layout(inner), install_training_forwards(model)]
    for crossover in (256, 0):
        use_crossover(inner, crossover)
        found.append(counted_activations(inner, "segments", None, 64))
        found.append(dry_run(inner, ROWS))
    return found


def test_a_plan_in_a_thread_beside_a_run_changes_neither() -> None:
    planned, trained = tiny_model("llama"), tiny_model("llama", seed=1)
    expected_plan, expected_run = measure(copy.deepcopy(planned)), train(copy.deepcopy(trained), 12)
    begun = Event()
    plans = [copy.deepcopy(planned) for _ in range(3)]
    with ThreadPoolExecutor(2) as threads:
        run = threads.submit(train, trained, 12, begun)
        begun.wait(60)
        found = [threads.submit(measure, plan) for plan in plans]
        assert all(torch.equal(*pair) for pair in zip(run.result(), expected_run, strict=True))
        assert [each.result() for each in found] == [expected_plan] * 3


def test_preparing_training_and_sampling_leave_the_library_and_another_model_as_they_were() -> None:
    first, other = tiny_model("llama"), tiny_model("llama")
    ids = torch.arange(20)[None] + 3
    code, functions = dict(vars(modeling_llama)), dict(ALL_ATTENTION_FUNCTIONS)
    settings, expected = copy.deepcopy(other.config.to_dict()), other(ids).logits
    train(first, 2)
    with sampling(first) as sampled:
        sampled.generate(ids, max_new_tokens=2)
    assert dict(vars(modeling_llama)) == code
    assert dict(ALL_ATTENTION_FUNCTIONS) == functions
    assert torch.equal(other(ids).logits, expected)
    assert other.config.to_dict() == settings
    assert not any("forward" in vars(module) for module in other.modules())


def test_each_model_has_its_own_crossover() -> None:
    first, second = tiny_model("llama"), tiny_model("llama")
    for model, tokens in ((first, 128), (second, 512)):
        choose_layout(model)
        use_crossover(model, tokens)
    found = [used.crossover for model in (first, second) if (used := segmented(model)) is not None]
    assert found == [128, 512]
