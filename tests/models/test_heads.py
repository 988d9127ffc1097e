"""The head at target positions only: the loss and gradients of full logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firefly.data.batching import pack
from firefly.data.schema import IGNORE, Tokens
from firefly.models.attention import choose_layout
from firefly.models.heads import install_target_head
from firefly.models.kernels import token_nll
from firefly.models.kernels.token_nll import summed_nll, token_logps
from tiny import ARCHITECTURES, VOCABULARY, assert_same, gradients, random_examples, tiny_model

TRANSFORMS_LOGITS = ("gemma2", "granite", "cohere", "minicpm3")
HAS_A_LARGER_HEAD = ("roberta",)


def naive_nll(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="sum")


def head_inputs(tokens: int, biased: bool, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, 16), (VOCABULARY, 16)] + ([(VOCABULARY,)] if biased else [])
    made = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return made, torch.randint(VOCABULARY, (tokens,), generator=generator)


def loss_and_gradients(function: Any, inputs: list[Tensor], targets: Tensor, factor: float) -> dict[str, Tensor]:
    hidden, weight, *bias = inputs
    loss = function(hidden, weight, bias[0] if bias else None, targets)
    found = torch.autograd.grad(loss * factor, inputs)
    return {"loss": loss.detach()} | dict(zip(("hidden", "weight", "bias"), found, strict=False))


@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 64, 65, 200])
def test_the_summed_nll_in_chunks_is_the_one_of_full_logits(
    tokens: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_nll, "BYTES_PER_CHUNK", {"cpu": 4 * 32 * VOCABULARY})
    inputs, targets = head_inputs(tokens, biased)
    found = loss_and_gradients(summed_nll, inputs, targets, 0.37)
    assert_same(found, loss_and_gradients(naive_nll, inputs, targets, 0.37), 1e-5)


def test_no_more_logits_than_a_chunk_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_nll, "BYTES_PER_CHUNK", {"cpu": 4 * 40 * VOCABULARY})
    inputs, targets = head_inputs(100, biased=False)
    rows, worked_on = [], []
    product, softmax = token_nll._logits, token_nll._softmax
    monkeypatch.setattr(token_nll, "_logits", lambda part, *rest: rows.append(len(part)) or product(part, *rest))
    monkeypatch.setattr(token_nll, "_softmax", lambda part, *rest: worked_on.append(len(part)) or softmax(part, *rest))
    summed_nll(inputs[0], inputs[1], None, targets)
    assert rows == [40, 40, 20]
    assert sum(worked_on) == 100
    assert max(worked_on) == token_nll.ROWS_AT_A_TIME


def test_a_target_far_below_the_largest_logit_costs_its_whole_distance() -> None:
    """Its probability is 0 in fp32, its NLL is not."""
    weight = torch.zeros(VOCABULARY, 1)
    weight[0], weight[3] = 400.0, -300.0
    inputs = torch.ones(2, 1, requires_grad=True), weight
    loss = summed_nll(*inputs, None, torch.tensor([3, 0]))
    torch.testing.assert_close(loss.item(), 700.0)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs[0])[0], torch.tensor([[700.0], [0.0]]))


@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
def test_the_summed_nll_of_no_targets_is_zero_with_zero_gradients(biased: bool) -> None:
    inputs, targets = head_inputs(0, biased)
    found = loss_and_gradients(summed_nll, inputs, targets, 1.0)
    assert found["hidden"].shape == (0, 16)
    assert all(value.count_nonzero() == 0 for value in found.values())


def test_a_second_backward_through_the_same_pass_gives_the_same_gradients() -> None:
    inputs, targets = head_inputs(50, biased=True)
    loss = summed_nll(*inputs, targets)  # type: ignore[arg-type]
    first = [gradient.clone() for gradient in torch.autograd.grad(3 * loss, inputs, retain_graph=True)]
    for once, again in zip(first, torch.autograd.grad(3 * loss, inputs), strict=True):
        torch.testing.assert_close(again, once, rtol=0, atol=0)


def test_the_summed_nll_in_bf16_is_near_the_one_in_float64() -> None:
    inputs, targets = head_inputs(100, biased=True, dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found = loss_and_gradients(summed_nll, inputs, targets, 0.5)
    expected = loss_and_gradients(naive_nll, exact, targets, 0.5)
    assert found["loss"].dtype == torch.float32
    assert found["hidden"].dtype == found["weight"].dtype == torch.bfloat16
    assert_same({name: x.double() for name, x in found.items()}, {n: x.double() for n, x in expected.items()}, 4e-2)


@pytest.mark.parametrize("grad", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_target_logit_is_not_rounded_to_16_bit(dtype: torch.dtype, biased: bool, grad: bool) -> None:
    """Summed over an answer, that rounding is half of the variance of its log-probability's error."""
    (hidden, weight, *bias), targets = head_inputs(400, biased, dtype)
    with torch.no_grad():  # logits near 24, as models have them: bf16 has eight numbers between 24 and 25
        hidden /= 4
        hidden[:, 0], weight[:, 0] = 6.0, 4.0
    offset = bias[0] if bias else None
    exact = F.linear(hidden.double(), weight.double(), None if offset is None else offset.double())
    expected = torch.log_softmax(exact, -1).gather(1, targets[:, None])[:, 0]
    with torch.set_grad_enabled(grad):
        logps = token_logps(hidden, weight, offset, targets)
        total = summed_nll(hidden, weight, offset, targets)
    error, rounding = (logps - expected).detach(), (exact.to(dtype).double() - exact).gather(1, targets[:, None])
    assert error.std() < 0.35 * rounding.std()
    assert logps.requires_grad == grad
    torch.testing.assert_close(total, -logps.sum())


@pytest.mark.parametrize("function", [summed_nll, lambda *inputs: token_logps(*inputs).sum()], ids=["sum", "tokens"])
def test_the_factor_of_a_loss_is_not_rounded_before_it_scales_16_bit_gradients(function: Any) -> None:
    inputs, targets = head_inputs(60, biased=False, dtype=torch.bfloat16)
    frozen = [inputs[0], inputs[1].detach()]
    whole, scaled = (torch.autograd.grad(function(*frozen, None, targets) * f, frozen[0])[0] for f in (1, 1 / 1535))
    torch.testing.assert_close(scaled, (whole.float() / 1535).to(torch.bfloat16), rtol=0, atol=0)


def test_under_autocast_fp32_weights_get_fp32_gradients_from_16_bit_products() -> None:
    inputs, targets = head_inputs(50, biased=False)
    expected = loss_and_gradients(naive_nll, inputs, targets, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss_and_gradients(summed_nll, inputs, targets, 1.0)
    assert found["weight"].dtype == torch.float32
    assert_same(found, expected, 2e-2)
    assert not torch.allclose(found["weight"], expected["weight"], rtol=1e-6, atol=0)


def test_without_gradients_only_the_loss_is_computed() -> None:
    inputs, targets = head_inputs(50, biased=True)
    with torch.no_grad():
        loss = summed_nll(*inputs, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, naive_nll(*inputs, targets).detach())


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in TRANSFORMS_LOGITS + HAS_A_LARGER_HEAD])
def test_plain_heads_are_fused(name: str) -> None:
    model = tiny_model(name)
    choose_layout(model)
    assert install_target_head(model) == "fused"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [0.02, 0.1])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": 30.0}),
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.0625}),
        ("minicpm3", {"dim_model_base": 16}),
    ],
)
def test_heads_whose_logits_are_transformed_are_not_fused(
    name: str, changes: dict[str, Any], spread: float, dtype: torch.dtype
) -> None:
    """Whatever the logits' size: a freshly initialized model's are so small that a soft cap hardly bends them."""
    model = tiny_model(name, initializer_range=spread, **changes).to(dtype)
    choose_layout(model)
    assert install_target_head(model) == "logits"


def logits_loss(model: Any, example: Tokens) -> Tensor:
    ids, labels = (torch.from_numpy(x).long() for x in (example.input_ids, example.labels))
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return F.cross_entropy(logits[:-1].float(), labels[1:], ignore_index=IGNORE, reduction="sum")


def prepared(model: Any) -> Any:
    choose_layout(model)
    install_target_head(model)
    return model


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt_neox", *TRANSFORMS_LOGITS])
def test_a_prepared_model_has_the_loss_and_gradients_of_its_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(name)
    own = copy.deepcopy(model)
    prepared(model)
    monkeypatch.setattr(token_nll, "BYTES_PER_CHUNK", {"cpu": 4 * 32 * VOCABULARY})  # several chunks
    (example,) = random_examples(150)
    loss = model(**pack([example]).model_inputs())["loss"]
    loss.backward()
    expected = logits_loss(own, example)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_same(gradients(model), gradients(own), 1e-5)


def test_a_head_with_a_bias_trains_it() -> None:
    model = tiny_model("llama")
    model.lm_head = nn.Linear(32, VOCABULARY, bias=True)
    own = copy.deepcopy(model)
    choose_layout(model)
    assert install_target_head(model) == "fused"
    (example,) = random_examples(40)
    model(**pack([example]).model_inputs())["loss"].backward()
    logits_loss(own, example).backward()
    assert "lm_head.bias" in gradients(model)
    assert_same(gradients(model), gradients(own), 1e-5)


def test_a_tied_head_and_embedding_share_one_gradient() -> None:
    model = prepared(tiny_model("llama_tied"))
    model(**pack(random_examples(40)).model_inputs())["loss"].backward()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = prepared(tiny_model("llama_tied"))
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    untied(**pack(random_examples(40)).model_inputs())["loss"].backward()
    both = untied.lm_head.weight.grad + untied.model.embed_tokens.weight.grad
    assert untied.model.embed_tokens.weight.grad.abs().max() > 1e-3
    assert_same({"shared": model.lm_head.weight.grad}, {"shared": both}, 1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_microbatch_without_targets_has_loss_zero_and_can_go_backward(name: str) -> None:
    model = prepared(tiny_model(name))
    (example,) = random_examples(12)
    loss = model(**pack([Tokens(example.input_ids, example.labels * 0 + IGNORE)]).model_inputs())["loss"]
    loss.backward()
    assert loss.item() == 0
    assert all(value.count_nonzero() == 0 for value in gradients(model).values())


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma2"])
def test_a_prepared_model_in_bf16_is_near_its_fp32_loss(name: str) -> None:
    examples = random_examples(30, 50)
    inputs = pack(examples).model_inputs()
    with torch.no_grad():
        exact = prepared(tiny_model(name))(**inputs)["loss"]
        loss = prepared(tiny_model(name).bfloat16())(**inputs)["loss"]
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_without_targets_a_prepared_model_still_returns_its_logits_and_generates(name: str) -> None:
    model = tiny_model(name)
    own = copy.deepcopy(model)
    install_target_head(model)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, own(ids).logits)
        choices = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        assert torch.equal(model.generate(ids, **choices), own.generate(ids, **choices))


def test_preparing_the_head_changes_neither_the_state_dict_nor_the_mode() -> None:
    model = tiny_model("llama").train()
    before = copy.deepcopy(model.state_dict())
    install_target_head(model)
    assert model.training
    assert_same(model.state_dict(), before, 0)


def test_a_head_that_carries_an_adapter_is_not_fused() -> None:
    """peft's LoRA on the head is called Linear too, and has a forward of its own."""
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama")
    get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    choose_layout(model)
    assert install_target_head(model) == "logits"
    with torch.no_grad():  # not before: a fresh adapter adds nothing, so no comparison could tell
        model.lm_head.lora_B["default"].weight.normal_()
    (example,) = random_examples(20)
    loss = model(**pack([example]).model_inputs())["loss"]
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    model.set_attn_implementation("sdpa")
    expected = logits_loss(model, example)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert len(found) == 2
    assert_same(found, gradients(model), 1e-5)


@pytest.mark.parametrize("name", ["gemma2", "granite"])
def test_a_model_that_computes_the_logits_of_all_positions_has_the_same_loss(name: str) -> None:
    """ProphetNet, XLNet and others know no `logits_to_keep`."""
    model = tiny_model(name)
    own = copy.deepcopy(model)

    class Older(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
            assert "logits_to_keep" not in kwargs
            return super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)

    model.__class__ = Older
    choose_layout(model)
    assert install_target_head(model) == "logits"
    (example,) = random_examples(40)
    inputs = pack([example]).model_inputs()
    logps = model(**inputs, per_token=True)["logps"]
    loss = model(**inputs)["loss"]
    loss.backward()
    expected = logits_loss(own, example)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(logps.sum(), -expected, rtol=1e-5, atol=0)
    assert_same(gradients(model), gradients(own), 1e-5)
