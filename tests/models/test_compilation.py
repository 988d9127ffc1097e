"""Compiled layers: the numbers of uncompiled ones, and no compilation for each step's packing.

Dynamo's own part is what is tested: the backend that runs its graphs as they are takes seconds, not minutes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from firefly.data.batching import pack
from firefly.data.pair_batching import pack_pairs
from firefly.errors import UsageError
from firefly.models import compilation
from firefly.models.attention import choose_layout
from firefly.models.compilation import compile_layers
from firefly.models.forwards import install_training_forwards
from tiny import assert_same, gradients, random_examples, random_pairs, tiny_model, with_our_lora

SFT_STEPS = [(10, 20, 5), (7, 30), (33, 12, 4, 9), (50,), (11, 11, 11, 11, 11), (40, 3), (8, 9, 21), (17,)]
DPO_STEPS = [[(5, 9, 4)], [(7, 3, 6), (12, 5, 5)], [(4, 4, 4), (3, 8, 2), (9, 2, 7)], [(20, 6, 3)], [(6, 5, 9)] * 2]
SETTLED = 3
"""Steps after which nothing new is compiled: by then there was one segment, and there were several."""


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def trained(name: str) -> Any:
    model = tiny_model(name)
    assert choose_layout(model)[0] == "segments"
    wrapped = with_our_lora(model)
    install_training_forwards(wrapped)
    return wrapped.train()


def passes(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one step; before it, what a preference's reference computes."""
    model.zero_grad()
    if batch.get("per_token"):
        with torch.no_grad(), model.disable_adapter():
            reference = model(**batch)["logps"]
        loss = (model(**batch)["logps"] - reference).square().sum()
    else:
        loss = model(**batch)["loss"]
    loss.backward()
    return loss.detach(), gradients(model)


def steps(task: str) -> list[dict[str, Any]]:
    if task.startswith("sft"):
        packed = [pack(random_examples(*lengths, seed=n)) for n, lengths in enumerate(SFT_STEPS)]
        return [batch.model_inputs(False) for batch in packed]
    pairs = [pack_pairs(random_pairs(*shapes, seed=n), shared=True) for n, shapes in enumerate(DPO_STEPS)]
    return [row.model_inputs(False) | {"per_token": True} for batch in pairs for row in batch.rows]


@pytest.mark.parametrize(
    ("task", "backend"),
    [
        ("sft", "eager"),
        ("dpo", "eager"),
        ("sft, checkpointed", "eager"),
        pytest.param("sft", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_layers_compute_the_same_and_are_not_compiled_anew_for_every_packing(task, backend):
    plain, compiled = trained("llama"), trained("llama")
    if "checkpointed" in task:
        compiled.get_base_model().gradient_checkpointing_enable()
    assert compile_layers(compiled, backend=backend) == 3
    graphs = []
    for batch in steps(task):
        expected, found = passes(plain, batch), passes(compiled, batch)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
        assert_same(found[1], expected[1], 1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[-1] == graphs[SETTLED], graphs


def test_compiled_layers_leave_weights_and_their_names_alone():
    model = trained("llama")
    before = list(model.state_dict())
    compile_layers(model, backend="eager")
    assert list(model.state_dict()) == before


def test_a_torch_that_compiles_wrong_gradients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "TORCH", (2, 11))
    with pytest.raises(UsageError, match=r"torch_compile needs torch 2\.13"):
        compilation.compile_layers(tiny_model("llama"))
