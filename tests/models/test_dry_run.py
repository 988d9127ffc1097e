"""A step on arrays without numbers takes what a real one takes, and leaves nothing behind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from firefly.data.batching import pack
from firefly.data.pair_batching import pack_pairs
from firefly.models.adapters import transformers_model
from firefly.models.attention import choose_layout, segmented, use_crossover
from firefly.models.checkpointing import Checkpointing, install_checkpointing
from firefly.models.dry_run import LiveBytes, NoDryRun, counted_activations, dry_run, measure_activations
from firefly.models.forwards import install_training_forwards
from firefly.models.kernels import token_nll
from tiny import prepared, random_examples, random_pairs, tiny_model, with_our_lora


def real_peak(model: Any, rows: list[Any], per_token: bool = False, solo: bool = False) -> int:
    """Bytes that live at the peak of a real step, by the same account."""
    live = LiveBytes()
    for tensor in (*model.parameters(), *model.buffers()):
        live.ignore(tensor)
    if (used := segmented(model)) is not None:
        used.masks.clear()
    model.train()
    with live:
        found = [model(**row.model_inputs(solo), per_token=per_token) for row in rows]
        torch.stack([one["logps" if per_token else "loss"].sum() for one in found]).sum().backward()
    model.zero_grad(set_to_none=True)
    return live.most


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name", ["llama_tied", "qwen3", "gemma2", "gpt_neox", "minicpm3"])
def test_what_is_counted_without_computing_is_what_computing_takes(name: str, mode: str) -> None:
    model, layout, _ = prepared(name, mode)
    inner = transformers_model(model)
    rows = [pack(random_examples(70, 41))]
    counted = dry_run(inner, rows, solo=layout == "solo")
    assert counted.total == pytest.approx(real_peak(inner, rows, solo=layout == "solo"), rel=0.02)


def test_values_narrower_than_queries_are_counted_as_wide_as_they_are() -> None:
    """In bf16, where attention keeps its probabilities, with a segment of one block and one of several."""
    model = tiny_model("minicpm3").bfloat16()
    layout, _ = choose_layout(model)
    model = with_our_lora(model)
    install_training_forwards(model)
    inner = transformers_model(model)
    rows = [pack(random_examples(70, 300))]
    counted = dry_run(inner, rows, solo=layout == "solo")
    assert layout == "segments"
    assert counted.total == pytest.approx(real_peak(inner, rows), rel=0.02)


def test_pairs_and_their_log_probabilities_are_counted_too() -> None:
    model, _, _ = prepared("llama", "lora")
    inner = transformers_model(model)
    rows = list(pack_pairs(random_pairs((30, 20, 11), (5, 40, 9))).rows)
    counted = dry_run(inner, rows, per_token=True)
    assert counted.total == pytest.approx(real_peak(inner, rows, per_token=True), rel=0.02)


def test_gradients_that_are_there_already_count() -> None:
    model, _, _ = prepared("llama", "full")
    rows = [pack(random_examples(20))]
    trained = sum(4 * p.numel() for p in model.parameters())
    assert dry_run(model, rows, accumulated=True).gradients == trained
    assert dry_run(model, rows).gradients < trained


def test_checkpointed_layers_take_less() -> None:
    model, _, _ = prepared("llama", "lora")
    inner = transformers_model(model)
    rows = [pack(random_examples(200))]
    before = dry_run(inner, rows).activations
    install_checkpointing(inner, Checkpointing(3))
    assert dry_run(inner, rows).activations < 0.7 * before


def test_a_gpu_computes_in_larger_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = prepared("llama", "lora")
    monkeypatch.setitem(token_nll.BYTES_PER_CHUNK, "cpu", 32 * 4 * 264)
    rows = [pack(random_examples(300))]
    inner = transformers_model(model)
    use_crossover(inner, 0)  # what attention keeps would be the peak
    assert dry_run(inner, rows, device="cuda").head > 2 * dry_run(inner, rows).head


def test_a_run_computes_the_same_while_a_plan_for_a_gpu_is_made_in_another_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In chunks of a GPU, and without the fp32 that a CPU adds up in, its numbers would be others."""
    monkeypatch.setitem(token_nll.BYTES_PER_CHUNK, "cpu", 32 * 4 * 264)
    (planned, _, _), (trained, _, _) = prepared("llama", "lora"), prepared("llama", "full")
    inner, row = transformers_model(planned), pack(random_examples(300))
    peaks: list[int] = []
    found: list[list[torch.Tensor]] = []

    def step() -> list[torch.Tensor]:
        trained.zero_grad()
        with LiveBytes() as live:
            loss = trained(**row.model_inputs())["loss"]
            loss.backward()
        peaks.append(live.most)
        return [loss.detach(), *(p.grad for p in trained.parameters())]

    expected = step()  # makes the masks of attention, too
    assert all(torch.equal(one, other) for one, other in zip(expected, step(), strict=True))
    with ThreadPoolExecutor(1) as run, ThreadPoolExecutor(1) as plan:
        hook = inner.register_forward_hook(lambda *_: found.append(run.submit(step).result()))
        plan.submit(dry_run, inner, [row], device="cuda").result()
        hook.remove()
    assert len(found) == 1
    assert all(torch.equal(one, other) for one, other in zip(expected, found[0], strict=True))
    assert peaks[1] == peaks[2]


def test_a_dry_run_leaves_the_model_as_it_was() -> None:
    model, _, _ = prepared("llama", "lora")
    inner = transformers_model(model).eval()
    parameters = dict(inner.named_parameters())
    used = segmented(inner)
    assert used is not None
    used.masks.clear()
    rows = list(pack_pairs(random_pairs((30, 20, 11))).rows)  # an answer behind a prompt has a mask
    dry_run(inner, rows, per_token=True)
    assert all(parameters[name] is parameter for name, parameter in inner.named_parameters())
    assert all(parameter.grad is None for parameter in parameters.values())
    assert not used.masks
    assert not inner.training
    assert not any(hooks for module in inner.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks))
    assert real_peak(inner, rows, per_token=True)
    assert used.masks


def test_activations_per_token_are_counted_as_they_are_measured() -> None:
    model, layout, _ = prepared("llama", "lora")
    inner = transformers_model(model)
    assert counted_activations(inner, layout, None, 50) == measure_activations(inner, layout, None, 50)


def test_a_mixture_of_experts_says_that_it_cannot() -> None:
    model, layout, _ = prepared("qwen2_moe", "full")
    with pytest.raises(NoDryRun):
        dry_run(model, [pack(random_examples(20))], solo=layout == "solo")
