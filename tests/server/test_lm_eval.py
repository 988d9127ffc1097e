"""lm-eval's `local-completions` against the server: log-likelihoods through `echo`, and generation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from serving import Running

from tiny import tiny_tokenizer

TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["a", "bc", "def"],
        "doc_to_target": 1,
        "metric_list": [{"metric": "acc"}],
    },
    "words": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{question}}",
        "generation_kwargs": {"until": ["!"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.mark.slow
def test_lm_eval_reads_the_log_likelihoods_that_the_model_has(served: Running, tmp_path: Path) -> None:
    program = os.environ.get("FIREFLY_LM_EVAL") or shutil.which("lm_eval")
    if program is None:
        pytest.skip("lm_eval[api] is not installed (FIREFLY_LM_EVAL may name its program in another environment)")
    questions = ["abc", "hello there", "天地"]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"question": each}, ensure_ascii=False) + "\n" for each in questions))
    source: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "target_delimiter": "",
        "metadata": {"version": 1},
    }
    for name, task in TASKS.items():
        # JSON is YAML
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": f"tiny_{name}"} | source | task))
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    options = {
        "base_url": f"{served.address}/v1/completions",
        "model": "tiny",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(tmp_path / "tokenizer"),
        "num_concurrent": 2,
        "max_retries": 1,
    }
    command = [program, "run", "--model", "local-completions", "--tasks", "tiny_choices", "tiny_words"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in options.items())]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": ""}
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("samples_tiny_choices*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == len(questions)
    tokenizer, engine = tiny_tokenizer(), served.service.generator.engine
    for row in rows:
        prompt = tokenizer.encode(row["doc"]["question"])
        for choice, response in zip(("a", "bc", "def"), row["filtered_resps"], strict=True):
            target = tokenizer.encode(choice)
            (scored,) = engine.score([[*prompt, *target]], "tiny", 1)
            expected = sum(token.logprob or 0.0 for token in scored[len(prompt) :])
            assert float(response[0]) == pytest.approx(expected, abs=1e-3)
