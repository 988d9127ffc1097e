"""What is compared of two models is what they compute, however much memory the comparison may take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from firefly.config import ModelConfig
from firefly.export import verification
from firefly.export.verification import all_logits, largest_gap, largest_logit, rounding_gap
from firefly.models.loading import load_model
from firefly.models.precision import Precision
from firefly.models.scores import as_classifier
from firefly.models.streaming import load_streamed
from tiny import ARCHITECTURES, OTHERS, save_tiny_model, tiny_model

PROMPTS = [[5, 9, 20, 31, 7, 44, 6], [3], [8, 60, 2, 33], [100, 7, 3, 9, 20, 31, 7, 44, 6, 12, 90, 41, 8]]


def alone(model: Any, prompt: list[int]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS])
def test_prompts_that_are_padded_together_have_the_logits_that_they_have_alone(name: str) -> None:
    model = tiny_model(name)
    found = all_logits(model, PROMPTS)
    for prompt, logits in zip(PROMPTS, found, strict=True):
        expected = alone(model, prompt)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_batch_has_no_more_logits_than_it_may_and_the_order_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    together = all_logits(model, PROMPTS)
    assert shapes == [(5, 13)]  # one of them twice, to see that rows are independent
    monkeypatch.setattr(verification, "LOGITS_AT_ONCE", 2 * 7 * model.config.vocab_size)
    found = all_logits(model, PROMPTS)
    assert shapes[1:] == [(1, 13), (1, 13), (2, 7), (1, 1)]
    assert largest_gap(found, together) < 1e-5 * largest_logit(together)


def test_prompts_go_one_by_one_through_a_model_that_takes_no_batch() -> None:
    model = tiny_model("llama")
    forward = type(model).forward

    def one_row(input_ids: Tensor, **kwargs: Any) -> Any:
        if len(input_ids) > 1:
            raise ValueError("one row, please")
        return forward(model, input_ids=input_ids, **kwargs)

    expected = all_logits(model, PROMPTS)
    model.forward = one_row
    assert largest_gap(all_logits(model, PROMPTS), expected) < 1e-5 * largest_logit(expected)


def test_scores_of_texts_that_are_padded_together_are_those_that_they_have_alone() -> None:
    model = as_classifier(tiny_model("llama"))
    together = all_logits(model, PROMPTS)
    assert [tuple(one.shape) for one in together] == [(len(prompt), 1) for prompt in PROMPTS]
    assert largest_gap(together, [all_logits(model, [prompt])[0] for prompt in PROMPTS]) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt2", "opt", "phi3"])
def test_a_large_head_or_embedding_is_widened_piece_by_piece(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(name).bfloat16()
    expected = all_logits(model, PROMPTS)
    largest = 0
    widened = Tensor.float

    def watched(self: Tensor) -> Tensor:
        nonlocal largest
        if self.dtype == torch.bfloat16:
            largest = max(largest, self.numel())
        return widened(self)

    monkeypatch.setattr(verification, "WIDENED_AT_ONCE", 2000)
    monkeypatch.setattr(Tensor, "float", watched)
    found = all_logits(model, PROMPTS)
    assert largest_gap(found, expected) < 1e-5 * largest_logit(expected)
    assert largest < model.get_input_embeddings().weight.numel() / 2
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def only_sdpa(name: str) -> None:
    if name != "sdpa":
        raise ValueError(name)


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_the_rounding_of_a_streamed_model_is_that_of_one_in_memory(name: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, name)
    whole, streamed = tiny_model(name), load_streamed(ModelConfig(name_or_path=str(tmp_path)), torch.float32)
    for model in (whole, streamed):
        if name == "llama":  # one way to compute attention: the weights' neighbours stand for rounding
            model.set_attn_implementation = only_sdpa
    before = all_logits(streamed, PROMPTS)
    expected = rounding_gap(whole, PROMPTS)
    assert 0 < expected < 1e-2 * largest_logit(before)
    assert rounding_gap(streamed, PROMPTS) == pytest.approx(expected, rel=0.2)
    assert rounding_gap(streamed, PROMPTS, known=before) == rounding_gap(streamed, PROMPTS)
    assert largest_gap(all_logits(streamed, PROMPTS), before) == 0


def test_16_bit_weights_are_multiplied_in_fp32_in_a_streamed_model_too(tmp_path: Path) -> None:
    tiny_model("llama").bfloat16().save_pretrained(tmp_path)
    source = ModelConfig(name_or_path=str(tmp_path))
    whole = load_model(source, "lora", Precision(torch.bfloat16), torch.device("cpu"))
    streamed = load_streamed(source, torch.bfloat16)
    assert largest_gap(all_logits(streamed, PROMPTS), all_logits(whole, PROMPTS)) == 0
    assert largest_gap(all_logits(streamed, PROMPTS, as_served=True), all_logits(whole, PROMPTS)) > 1e-3
