"""Odd architectures through one step, and the verdicts and tables of the battery they belong to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

TRICKY = [
    "bert",  # an encoder with a switch
    "cpmant",  # a prompt of its own before the tokens
    "ctrl",  # sinusoidal positions
    "gemma3",  # text alone in a model for images, which asks for token types in training
    "gemma3n_text",  # outputs changed in place, values shared by layers
    "got_ocr2",  # logits_to_keep handed through to attention
    "jetmoe",  # views of attention's outputs
    "mpt",  # positions as biases
    "roberta",  # positions that begin behind the padding's
    "youtu",  # latent attention
]
SLOWER = [
    "deepseek_v4",  # a projection that is a linear layer by its class alone, streams of hidden states
    "longcat_flash",  # latent attention twice a layer
    "qwen3_next",  # linear attention beside full
    "rwkv",  # no attention
]
CELLS = [(mode, kind) for mode in ("full", "lora") for kind in ("fp32", "bf16")]


@pytest.fixture
def record_of(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """The battery's record of an architecture, computed in this process."""
    import architecture_steps
    import architectures

    whole = request.node.get_closest_marker("slow") is not None
    if not whole:
        monkeypatch.setattr(architecture_steps, "LENGTHS", (5, 33, 12, 21))  # fewer rows, in two microbatches

    def compute(name: str) -> dict[str, Any]:
        monkeypatch.setenv("FIREFLY_CACHE", os.environ["FIREFLY_CACHE"])  # the battery sets one of its own
        return architectures.record_of(name, draws=(architectures.DRAWS if whole else 1, architectures.MORE_DRAWS))

    return compute


@pytest.mark.parametrize("name", [*TRICKY, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOWER)])
def test_a_step_of_a_tricky_architecture_is_that_of_plain_transformers(name: str, record_of: Any) -> None:
    import architectures

    record = record_of(name)
    found = {cell: architectures.verdict(record, *cell) for cell in CELLS}
    assert set(found.values()) == {"right"}, architectures.words_of(record)


@pytest.mark.slow
def test_every_architecture_of_a_sample_is_right_or_refused(record_of: Any) -> None:
    """Every eighth one; the whole battery is a program of its own."""
    import architectures

    names = [name for name in architectures.all_architectures()[::8] if name not in (*TRICKY, *SLOWER)]
    wrong = {}
    for name in names:
        record = record_of(name)
        if any(architectures.verdict(record, *cell) == "wrong" for cell in CELLS):
            wrong[name] = architectures.words_of(record)
    assert len(names) > 15
    assert not wrong


@pytest.mark.parametrize(
    ("name", "code"),
    [("xlnet", "model.not_causal"), ("prophetnet", "model.not_causal"), ("reformer", "model.reversible")],
)
def test_an_architecture_that_cannot_be_right_is_refused_in_every_cell(name: str, code: str, record_of: Any) -> None:
    record = record_of(name)
    assert [record[f"{mode}_{kind}"]["refused"] for mode, kind in CELLS] == [code] * 4


def test_what_does_not_run_under_autocast_is_refused_there_alone(record_of: Any) -> None:
    import architectures

    record = record_of("dbrx")
    assert record["full_bf16"]["refused"] == "precision.no_autocast"
    assert [architectures.verdict(record, *cell) for cell in CELLS] == ["right", "refused", "right", "right"]


def exact(loss: float = 0.0, gradient: float = 0.0, **others: Any) -> dict[str, Any]:
    return {"loss": loss, "gradient": gradient, "tensor": "w"} | others


def rounded(logps: float, gradient: float) -> dict[str, Any]:
    return {"logps_ratio": logps, "gradient_ratio": gradient}


@pytest.mark.parametrize(
    ("record", "kind", "expected"),
    [
        ({"full_fp32": exact(9e-5, 9e-5)}, "fp32", "right"),
        ({"full_fp32": exact(2e-4, 0)}, "fp32", "wrong"),
        ({"full_fp32": exact(0, 2e-4)}, "fp32", "wrong"),
        ({"full_fp32": exact(0, 0, checkpointed=exact(0, 2e-4))}, "fp32", "wrong"),
        ({"full_bf16": rounded(1.9, 1.9)}, "bf16", "right"),
        ({"full_bf16": rounded(2.1, 1.0)}, "bf16", "wrong"),
        ({"full_bf16": rounded(1.0, 2.1)}, "bf16", "wrong"),
        ({"full_bf16": {"error": "RuntimeError"}}, "bf16", "wrong"),
        ({"full_bf16": {"refused": "model.encoder"}}, "bf16", "refused"),
        ({"error": "took too long"}, "fp32", "wrong"),
        ({"not_built": "ImportError"}, "fp32", "not built"),
    ],
)
def test_a_verdict_follows_from_the_distances(record: dict[str, Any], kind: str, expected: str) -> None:
    import architectures

    assert architectures.verdict(record, "full", kind) == expected


def test_a_gradient_that_is_missing_or_not_a_number_is_a_distance() -> None:
    from architecture_steps import Outcome, worst_gradient

    there = Outcome(1.0, torch.zeros(1), {"w": torch.ones(4), "v": torch.ones(1)})
    assert worst_gradient(there, there)[0] == 0
    assert worst_gradient(Outcome(1.0, torch.zeros(1), {"w": torch.ones(4)}), there) == (1.0, "v")
    broken = Outcome(1.0, torch.zeros(1), {"w": torch.full((4,), float("nan")), "v": torch.ones(1)})
    assert worst_gradient(broken, there) == (float("inf"), "w")


@pytest.mark.parametrize("page", ["docs/models.md", "docs/zh/models.md"])
def test_the_recorded_results_are_the_table_of_the_docs(page: str) -> None:
    import json

    import architectures

    root = Path(architectures.HERE).parent
    report = json.loads((root / "benchmarks/results/architectures.json").read_text(encoding="utf-8"))
    assert len(report["architectures"]) == len(architectures.all_architectures())
    language = "zh" if "/zh/" in page else "en"
    text = (root / page).read_text(encoding="utf-8")
    assert architectures.tables(report, architectures.WORDS[language]) in text
    for record in report["architectures"].values():
        assert all(architectures.verdict(record, *cell) != "wrong" for cell in CELLS)
