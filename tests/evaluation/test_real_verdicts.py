"""What a run says of SmolLM2: that it learnt the demo's identity and kept Paris, and that noise made it worse."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from firefly.config import load_config
from firefly.data.formats.prompts import read_prompts
from firefly.training import train

ROOT = Path(__file__).parents[2]
PARIS = "probe/en/capital-of-france"


def report_of(rows: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """The report that a short LoRA run writes."""
    config = ROOT / "train_args" / "sft" / "lora" / "smollm2-135m-sft-lora.json"
    own = {"train_file": str(rows), "output_dir": str(output), "report_to": "none", "save_strategy": "no"}
    train(load_config(config, own | changes))
    return json.loads((output / "comparison" / "report.json").read_text("utf-8"))


@pytest.mark.slow
def test_a_model_that_learnt_who_it_is_has_learnt_it_and_kept_paris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firefly.evaluation.in_run.CPU_SECONDS", 8.0)  # Paris is asked first
    rows = tmp_path / "rows.jsonl"
    texts = [(ROOT / "data" / name).read_text("utf-8") for name in ("identity.jsonl", "general.jsonl")]
    rows.write_text("".join(texts), "utf-8")
    found = report_of(rows, tmp_path / "out", eval_ratio=0.15, max_steps=14)
    assert found["learnt"] == "better"
    assert found["verdicts"][0].startswith("It helped")
    assert found["forgetting"]["verdict"] != "forgot"
    paris = next(row for row in found["side_by_side"] if row["key"] == PARIS)
    assert paris["correct"] == [True, True]
    assert "Paris" in paris["answers"][1]


@pytest.mark.slow
def test_a_model_that_was_tuned_on_noise_has_become_worse_and_has_forgotten(tmp_path: Path) -> None:
    general = ROOT / "data" / "general.jsonl"
    draw = random.Random(1)
    words = ["zrp", "qua", "lom", "blit", "vex", "ono", "trz", "kip"]
    noise = []
    for line in general.read_text("utf-8").splitlines():
        asked: Any = read_prompts(json.loads(line)).prompts[0].asked
        turn = {"human": asked.messages[-1].text, "assistant": " ".join(draw.choices(words, k=20))}
        noise.append({"conversation": [turn]})
    rows = tmp_path / "noise.jsonl"
    rows.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in noise), "utf-8")
    found = report_of(
        rows, tmp_path / "out", eval_file=str(general), learning_rate=2e-3, max_steps=10, eval_strategy="no"
    )
    assert found["learnt"] == "worse"
    assert found["forgetting"]["verdict"] == "forgot"
    assert found["won"] == 0
