"""Segments through whole models: packed = alone, and a model that cannot is found out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from firefly.data.batching import pack
from firefly.data.schema import IGNORE, Tokens
from firefly.errors import UsageError
from firefly.models import attention
from firefly.models.adapters import transformers_model
from firefly.models.attention import choose_layout, segmented
from firefly.models.checkpointing import Checkpointing, install_checkpointing
from firefly.models.heads import install_target_head
from firefly.models.kernels.segment_attention import attend
from tiny import (
    ARCHITECTURES,
    SHAPE,
    WINDOW,
    apart,
    assert_same,
    gradients,
    random_examples,
    tiny_model,
    with_our_lora,
    with_plain_lora,
)

SOLO = {  # and the words by which each is refused
    "bloom": "no attention interface",
    "gptj": "no attention interface",
    "gpt_oss": "s_aux",
    "llama4": "chunked_attention",
    "phimoe_window": "differs",
    "roberta": "differs",  # positions begin behind the padding's
}
WINDOWED = ("mistral_window", "qwen2_window", "gemma2", "gemma3", "phi3", "qwen2_moe_window")
PACKABLE = [name for name in ARCHITECTURES if name not in SOLO]
LENGTHS = (3, 40, WINDOW + 1, 1, 70)


def alone_loss(model: Any, example: Tokens) -> Tensor:
    """Σ NLL of one example from the logits of an untouched transformers model."""
    ids = torch.from_numpy(example.input_ids).long()
    labels = torch.from_numpy(example.labels).long()
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return F.cross_entropy(logits[:-1].float(), labels[1:], ignore_index=IGNORE, reduction="sum")


def packed_inputs(examples: list[Tokens]) -> dict[str, Any]:
    return pack(examples).model_inputs()


@pytest.mark.parametrize("name", PACKABLE)
def test_packed_hidden_states_and_logits_are_those_of_each_example_alone(name: str) -> None:
    model = tiny_model(name)
    own = copy.deepcopy(model)
    assert choose_layout(model) == ("segments", "")
    inputs = packed_inputs(random_examples(*LENGTHS))
    shared = {key: inputs[key] for key in ("input_ids", "position_ids", "segments")}
    with torch.no_grad():
        states = model.base_model(**shared, use_cache=False).last_hidden_state[0]
        logits = model(**shared, use_cache=False).logits[0]
        for start, end, *_ in inputs["segments"]:
            ids = inputs["input_ids"][:, start:end]
            alone = {
                "states": own.base_model(ids, use_cache=False).last_hidden_state[0],
                "logits": own(ids, use_cache=False).logits[0],
            }
            assert_same({"states": states[start:end], "logits": logits[start:end]}, alone, 1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_under_autocast_attention_computes_in_its_type(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary positions of fp32 weights are fp32 and make that of queries and keys; no 16-bit kernel takes those."""
    model, met = tiny_model(name), []

    def noting(*inputs: Any) -> Tensor:
        met.extend(each.dtype for each in inputs[:3])
        return attend(*inputs)

    choose_layout(model)
    monkeypatch.setattr(attention, "attend", noting)
    inputs = packed_inputs(random_examples(5, 9))
    with torch.autocast("cpu", torch.bfloat16):
        model(**{key: inputs[key] for key in ("input_ids", "position_ids", "segments")}, use_cache=False)
    assert set(met) == {torch.bfloat16}


@pytest.mark.parametrize("name", PACKABLE)
def test_packed_losses_and_full_gradients_are_the_sum_over_examples_alone(name: str) -> None:
    model = tiny_model(name)
    own = copy.deepcopy(model)
    choose_layout(model)
    install_target_head(model)
    examples = random_examples(*LENGTHS)
    loss = model(**packed_inputs(examples))["loss"]
    loss.backward()
    expected = torch.stack([alone_loss(own, example) for example in examples if example.num_targets]).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_same(gradients(model), gradients(own), 1e-5)


@pytest.mark.parametrize("name", PACKABLE)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_packed_lora_gradients_are_the_sum_over_examples_alone(name: str, checkpointing: bool) -> None:
    model = tiny_model(name)
    own = with_plain_lora(copy.deepcopy(model))
    choose_layout(model)
    model = with_our_lora(model)
    install_target_head(model.get_base_model())
    if checkpointing:
        install_checkpointing(model.get_base_model(), Checkpointing(SHAPE["num_hidden_layers"]))
        model.train()
    examples = random_examples(*LENGTHS)
    model(**packed_inputs(examples))["loss"].backward()
    torch.stack([alone_loss(own, example) for example in examples if example.num_targets]).sum().backward()
    found, expected = gradients(model), gradients(own)
    assert all(".lora_" in key for key in found)
    assert_same(found, expected, 1e-5)


@pytest.mark.parametrize("name", WINDOWED)
def test_the_windows_of_these_tests_matter(name: str) -> None:
    (example,) = random_examples(WINDOW + 30)
    ids = torch.from_numpy(example.input_ids).long()[None]
    model = tiny_model(name)
    without = copy.deepcopy(model)
    without.config.sliding_window = 4096
    for module in without.modules():
        if getattr(module, "sliding_window", None):
            module.sliding_window = 4096
    with torch.no_grad():
        assert (model(ids).logits - without(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize("name", [*WINDOWED, "phimoe_window"])
def test_a_window_longer_than_the_probe_is_honoured_or_the_model_refused(name: str) -> None:
    model = tiny_model(name, sliding_window=64)
    own = copy.deepcopy(model)
    if choose_layout(model)[0] == "segments":
        (example,) = random_examples(110)
        install_target_head(model)
        with torch.no_grad():
            found, expected = model(**packed_inputs([example]))["loss"], alone_loss(own, example)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", PACKABLE)
def test_architectures_with_an_isolating_attention_are_packed(name: str) -> None:
    model = tiny_model(name)
    own = model.config._attn_implementation
    assert choose_layout(model) == ("segments", "")
    assert segmented(model) is not None
    assert model.config._attn_implementation == own


@pytest.mark.parametrize("name", SOLO)
def test_architectures_that_cannot_be_packed_run_solo_with_a_reason_and_their_own_attention(name: str) -> None:
    model = tiny_model(name)
    own = copy.deepcopy(model)
    layout, reason = choose_layout(model)
    assert layout == "solo"
    assert SOLO[name] in reason
    assert model.config._attn_implementation == own.config._attn_implementation
    install_target_head(model)
    examples = random_examples(20, 5)
    for example in examples:
        loss = model(**pack([example]).model_inputs(solo=True))["loss"]
        loss.backward()
        expected = alone_loss(own, example)
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_same(gradients(model), gradients(own), 1e-5)


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name", ["llama", "minicpm3", "deepseek_v3", "jetmoe"])
def test_in_bf16_a_packed_step_is_as_near_to_fp32_as_each_example_alone(name: str, mode: str) -> None:
    """Attention in bf16 takes other ways than in fp32, whose outputs have other layouts."""
    examples = [example for example in random_examples(*LENGTHS) if example.num_targets]
    exact, own, model = (tiny_model(name) for _ in range(3))
    if mode == "lora":
        exact, own, model = with_plain_lora(exact), with_plain_lora(own.bfloat16()), model.bfloat16()
    assert choose_layout(model) == ("segments", "")
    if mode == "lora":
        model = with_our_lora(model)
    install_target_head(transformers_model(model))
    torch.stack([alone_loss(exact, example) for example in examples]).sum().backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "full"):
        torch.stack([alone_loss(own, example) for example in examples]).sum().backward()
        model(**packed_inputs(examples))["loss"].backward()
    expected = gradients(exact)
    ours, theirs = (distance(gradients(each), expected) for each in (model, own))
    assert 1e-3 < theirs < 0.3
    assert ours < 2 * theirs


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of gradients, as a share of their length."""
    assert found.keys() == expected.keys()
    apart = sum((found[name].double() - value).square().sum() for name, value in expected.items())
    return float((apart / sum(value.double().square().sum() for value in expected.values())) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [(9,), (9, 20)], ids=["one segment", "two"])
def test_attention_returns_what_models_may_take_views_of(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    (inputs,) = [packed_inputs(random_examples(*lengths))]
    query, key, value = (torch.randn(1, 4, sum(lengths), width, dtype=dtype) for width in (16, 16, 8))
    model = attention.SegmentedModel()
    out = attention.attend_packed(nn.Module(), query, key, value, None, inputs["segments"], model)
    assert out.shape == (1, sum(lengths), 4, 8)
    assert out.is_contiguous()


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"position_bias": torch.zeros(1, 4, 9, 9)}, "position_bias"),
        ({"indices": torch.zeros(1, 9, 4)}, "indices"),
        ({"attention_mask": torch.zeros(1, 1, 9, 9)}, "attention_mask"),
        ({"is_causal": False}, "later tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_attention_that_is_more_than_causal_is_never_done_without_it(given: dict[str, Any], word: str) -> None:
    """An indexer chooses all tokens of a short example, so that a probe would find no difference."""
    heads = torch.randn(3, 1, 4, 9, 8)
    arguments = {"attention_mask": None, "segments": apart(0, 9), "used": attention.SegmentedModel()} | given
    with pytest.raises(attention.UnsupportedAttention, match=word):
        attention.attend_packed(nn.Module(), *heads, **arguments)


@pytest.mark.parametrize(
    ("family", "shape", "code"),
    [
        ("Roberta", SHAPE, "model.encoder"),
        ("Bert", SHAPE, "model.encoder"),
        ("XLNet", {"vocab_size": 264, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}, "model.not_causal"),
        ("XLM", SHAPE | {"emb_dim": 32}, "model.not_causal"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_whose_tokens_see_later_ones_is_refused_by_name(
    family: str, shape: dict[str, Any], code: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**shape)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with pytest.raises(UsageError) as caught:
        choose_layout(model)
    assert caught.value.code == code
    assert config.model_type in str(caught.value)


def test_a_causal_xlm_is_trained() -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.XLMConfig(**SHAPE, emb_dim=32, causal=True))
    assert choose_layout(model)[0] == "solo"


def test_a_layer_that_looks_ahead_by_one_token_is_found() -> None:
    model = tiny_model("llama").bfloat16()
    inner = model.model.layers[1].mlp
    original = inner.forward
    inner.forward = lambda x: original(x + 1e-3 * torch.roll(x, -1, dims=1))
    with pytest.raises(UsageError) as caught:
        choose_layout(model)
    assert caught.value.code == "model.not_causal"


def test_a_model_that_takes_more_than_tokens_is_refused_by_name() -> None:
    model = tiny_model("llama")
    original = type(model.model).forward

    def needing_an_image(*args: Any, pixels: Any = None, **kwargs: Any) -> Any:
        if pixels is None:
            raise ValueError("pixels are missing")
        return original(model.model, *args, **kwargs)

    model.model.forward = needing_an_image
    with pytest.raises(UsageError, match=r"llama.*pixels are missing"):
        choose_layout(model)


def test_a_model_whose_code_needs_fp32_says_so_in_16_bit() -> None:
    """xLSTM's cells."""
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("llama").to(dtype)
        inner = model.model.layers[0].mlp
        inner.forward = lambda x, own=inner.forward: own(x.float())
        if dtype == torch.float32:
            assert choose_layout(model)[0] == "segments"
        else:
            with pytest.raises(UsageError) as caught:
                choose_layout(model)
            assert caught.value.code == "precision.only_fp32"


def leaking(query: Tensor, key: Tensor, value: Tensor, segments: Any, *rest: Any) -> Tensor:
    return attend(query, key, value, apart(0, query.shape[1]), *rest)


def windowless(
    query: Tensor, key: Tensor, value: Tensor, segments: Any, scale: float, window: Any, *rest: Any
) -> Tensor:
    return attend(query, key, value, segments, scale, None, *rest)


def misscaled(query: Tensor, key: Tensor, value: Tensor, segments: Any, scale: float, *rest: Any) -> Tensor:
    return attend(query, key, value, segments, 1.02 * scale, *rest)


@pytest.mark.parametrize(
    ("name", "wrong", "verdict"),
    [
        ("llama", leaking, "neighbour"),
        ("gemma2", leaking, "neighbour"),
        ("mixtral", leaking, "neighbour"),
        ("mistral_window", windowless, "differs"),
        ("qwen2_window", windowless, "differs"),
        ("llama", misscaled, "differs"),
    ],
)
def test_the_probe_refuses_an_attention_that_leaks_or_is_another(
    name: str, wrong: Any, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "attend", wrong)
    model = tiny_model(name)
    own = model.config._attn_implementation
    layout, reason = choose_layout(model)
    assert layout == "solo"
    assert verdict in reason
    assert model.config._attn_implementation == own


@pytest.mark.parametrize("layer", [0, 2])
def test_the_probe_refuses_a_model_of_which_one_layer_ignores_the_segments(layer: int) -> None:
    model = tiny_model("llama")
    inner = model.model.layers[layer].self_attn
    original = inner.forward

    def one_segment(*args: Any, **kwargs: Any) -> Any:
        kwargs["segments"] = apart(0, args[0].shape[1] if args else kwargs["hidden_states"].shape[1])
        return original(*args, **kwargs)

    inner.forward = one_segment
    assert choose_layout(model) == ("solo", "a segment sees its neighbour")


def test_the_probe_refuses_a_model_that_drops_the_segments_on_the_way() -> None:
    model = tiny_model("llama")
    inner = model.model.layers[1].self_attn
    original = inner.forward

    def without_segments(*args: Any, segments: Any = None, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    inner.forward = without_segments
    layout, reason = choose_layout(model)
    assert layout == "solo"
    assert "pass on segments" in reason


@pytest.mark.parametrize("name", ["llama", "qwen2_window", "gemma2", "cohere"])
def test_the_probe_lets_bf16_models_pass_and_still_refuses_a_leak(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_layout(tiny_model(name).bfloat16())[0] == "segments"
    monkeypatch.setattr(attention, "attend", leaking)
    assert choose_layout(tiny_model(name).bfloat16()) == ("solo", "a segment sees its neighbour")


def test_the_probe_leaves_weights_mode_and_random_state_alone() -> None:
    model = tiny_model("llama", attention_dropout=0.3).train()
    weights = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert choose_layout(model)[0] == "segments"
    assert torch.equal(torch.rand(4), expected)
    assert model.training
    assert_same(model.state_dict(), weights, 0)
    assert not gradients(model)


def test_attention_dropout_is_active_in_training_only() -> None:
    model = tiny_model("llama", attention_dropout=0.3)
    choose_layout(model)
    inputs = {key: value for key, value in packed_inputs(random_examples(20, 8)).items() if "target" not in key}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)
        model.train()
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
