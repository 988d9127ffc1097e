"""Data workers are started anew (spawn, forkserver) on what they are sent, and pack what the process itself would."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from firefly.config import DataConfig, RecordKind
from firefly.data.batching import PackedExamples, RowPacking, StepPlan, StepSettings, step_loader
from firefly.data.dataset import load_split
from firefly.data.encoding import Encoder
from firefly.data.templates import bind_template, plain_template
from firefly.tasks.kto import LabelledPacking
from firefly.tasks.preference import PairPacking
from firefly.tasks.reward import ScorePacking

PAIRS = [{"prompt": f"q{n}", "chosen": "good " * n, "rejected": "bad " * (n + 1)} for n in range(1, 10)]
KINDS: list[tuple[RecordKind, Any, list[dict[str, Any]]]] = [
    ("document", RowPacking(share=True), [{"text": f"text {n} " * n} for n in range(1, 10)]),
    ("conversation", RowPacking(share=True), [{"instruction": f"q{n}", "output": "a " * n} for n in range(1, 10)]),
    ("pair", PairPacking(True, True, None), PAIRS),
    ("pair", ScorePacking(False), PAIRS),
    ("labelled", LabelledPacking(64), PAIRS),
]


def tensors(batch: Any) -> list[torch.Tensor]:
    return [tensor for row in batch.rows for tensor in (row.input_ids, row.targets, *row.channels.values())]


@pytest.mark.parametrize(
    "method", [None, pytest.param("spawn", marks=pytest.mark.slow), pytest.param("forkserver", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("kind", "packer", "rows"), KINDS, ids=[f"{kind}-{n}" for n, (kind, *_) in enumerate(KINDS)])
def test_a_worker_that_was_started_anew_packs_the_same(
    method: str | None, kind: RecordKind, packer: Any, rows: list[dict[str, Any]], tmp_path: Path, chatml_tokenizer: Any
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    template = plain_template() if kind == "document" else bind_template("qwen", chatml_tokenizer)
    config = DataConfig(train_file=str(path), max_seq_length=64)
    examples = load_split(config, Encoder(chatml_tokenizer, template), kind).train
    plan = StepPlan(examples.counts, StepSettings(4), 40)
    data = PackedExamples(examples, packer)
    expected = [tensors(batch) for step in step_loader(data, plan) for batch in step.microbatches]
    if method is None:
        sent = pickle.loads(pickle.dumps(data))
        found = [tensors(batch) for step in step_loader(sent, plan) for batch in step.microbatches]
    else:
        context = multiprocessing.get_context(method)
        loader = step_loader(data, plan, num_workers=1, multiprocessing_context=context)
        found = [tensors(batch) for step in loader for batch in step.microbatches]
    assert len(found) == len(expected) > 2
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
