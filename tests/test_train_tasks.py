"""Pretraining, DPO and KTO from files to a folder: exact resume, held-out data, best checkpoint, early stopping."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from firefly.config import load_config
from firefly.errors import UsageError
from firefly.runs.metrics import read_metrics
from firefly.training import train
from tiny import assert_same, run_settings, save_tiny_model, tiny_tokenizer

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_tiny_model(folder / "model", "llama_tied")
    (folder / "docs").mkdir()
    for number in range(2):
        texts = [f"document {number}-{i} tells of " + "many things " * (i % 5) for i in range(12)]
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / "docs" / f"{number}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    rows = [
        {"prompt": f"question {i} " * (1 + i % 4), "chosen": "good " * (1 + i % 3), "rejected": "bad " * (1 + i % 5)}
        for i in range(22)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    labelled = [
        {"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good}
        for number, row in enumerate(rows)
        for good in [number % 3 != 0]
    ]
    (folder / "labelled.jsonl").write_text("\n".join(map(json.dumps, labelled)), encoding="utf-8")
    return folder


@pytest.fixture
def run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr("firefly.runs.plots.draw_loss", lambda *_: None)

    def train_into(name: str = "out", **changes: Any) -> Path:
        task = changes.get("task_type", "dpo")
        settings = run_settings(
            place / "model",
            place / {"pretrain": "docs", "kto": "labelled.jsonl"}.get(task, "pairs.jsonl"),
            tmp_path / name,
            task_type=task,
            train_mode="lora",
            lora_rank=4,
            lora_dropout=0.0,
            per_device_train_batch_size=4,
            max_seq_length=64 if task == "pretrain" else 256,
            max_prompt_length=None,
            tokens_per_microbatch=200,
            learning_rate=0.01,
            num_train_epochs=2,
            seed=1,
        )
        return train(load_config(settings | changes))

    return train_into


def values(folder: Path, key: str = "loss") -> list[float]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [line[key] for line in lines if key in line and "train_loss" not in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("task", ["pretrain", "dpo", "kto"])
def test_a_run_resumed_in_the_middle_is_the_uninterrupted_one(task: str, mode: str, run: Run) -> None:
    options = {"task_type": task, "train_mode": mode, "save_strategy": "steps", "save_steps": 2, "eval_ratio": 0.2}
    whole = run("whole", **options)
    out = Path(shutil.copytree(whole, whole.with_name("cut")))
    for folder in out.glob("checkpoint-*"):
        if folder.name not in ("checkpoint-2", "checkpoint-4"):
            shutil.rmtree(folder)
    for name in ("adapter_model.safetensors", "model.safetensors"):
        (out / name).unlink(missing_ok=True)
    resumed = run("cut", **options, resume_from_checkpoint=True)
    assert values(resumed) == values(whole)
    assert values(resumed, "eval_loss") == values(whole, "eval_loss")
    assert_same(weights(resumed), weights(whole), 0)


def test_a_checkpoint_of_another_objective_is_refused(run: Run) -> None:
    run(save_strategy="steps", save_steps=4, max_steps=4)
    for changes, named in (
        ({"beta": 0.3}, "beta: 0.1 → 0.3"),
        ({"preference_loss": "ipo"}, "preference_loss: sigmoid → ipo"),
        ({"preference_loss": "simpo"}, "simpo_gamma: None → 0.5"),
    ):
        with pytest.raises(UsageError, match=named):
            run(resume_from_checkpoint=True, **changes)
    run(resume_from_checkpoint=True, precompute_reference=True, simpo_gamma=3.0, max_steps=4)


def test_preferences_are_learnt_and_measured_on_held_out_pairs(run: Run) -> None:
    out = run(eval_ratio=0.2, num_train_epochs=3, eval_on_start=True)
    assert values(out)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert values(out, "eval_loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert values(out, "eval_rewards/accuracies")[-1] == 1.0
    report = json.loads((out / "data_report.json").read_text())
    assert report["train_examples"] + report["held_out_examples"] == report["examples"] == 22


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_kto_learns_verdicts_and_takes_pairs_for_a_good_and_a_bad_answer(mode: str, run: Run, place: Path) -> None:
    out = run(task_type="kto", train_mode=mode, eval_ratio=0.2, num_train_epochs=3, eval_on_start=True)
    assert values(out)[0] == pytest.approx(0.5, abs=1e-5)  # nothing gained yet: 1 - σ(0)
    assert values(out, "eval_loss")[-1] < values(out, "eval_loss")[0] - 0.05
    assert values(out, "rewards/margins")[-1] > 0
    out = run("pairs", task_type="kto", train_file=str(place / "pairs.jsonl"), max_steps=2)
    report = json.loads((out / "data_report.json").read_text())
    assert (report["rows"], report["examples"]) == (22, 44)


def test_pretraining_lowers_the_held_out_loss_and_leaves_the_tokenizer_as_it_was(run: Run) -> None:
    out = run(task_type="pretrain", eval_ratio=0.2, eval_on_start=True)
    evaluated = values(out, "eval_loss")
    assert evaluated[-1] < evaluated[0] - 0.2
    manifest = json.loads((out / "run.json").read_text())
    assert manifest["template"] is None
    assert not (out / "template_certificate.json").exists()
    results = json.loads((out / "train_results.json").read_text())
    assert results["input_tokens"] > results["target_tokens"] > 0


def test_the_counts_of_pretraining_are_those_of_its_stream(run: Run, place: Path) -> None:
    out = run(task_type="pretrain", num_train_epochs=1)
    tokenizer = tiny_tokenizer()
    stream: list[int] = []
    starts = []
    for file in sorted((place / "docs").iterdir()):
        for line in file.read_text().splitlines():
            starts.append(len(stream))
            stream += [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
    segments = len({*starts, *range(0, len(stream), 64)})
    results = json.loads((out / "train_results.json").read_text())
    assert results["input_tokens"] == len(stream)
    assert results["target_tokens"] == len(stream) - segments
    assert results["examples"] == math.ceil(len(stream) / 64)


def test_the_losses_of_sources_are_told_apart(run: Run, place: Path, tmp_path: Path) -> None:
    rows = (place / "pairs.jsonl").read_text().splitlines()
    files = []
    for name, part in (("first", rows[:6]), ("second", rows[6:16])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(part))
        files.append({"path": str(path), "name": name})
    out = run(eval_file=files, num_train_epochs=1)
    (line,) = [line for line in read_metrics(out / "metrics.jsonl") if "eval_loss" in line]
    weighed = (6 * line["eval_loss/first"] + 10 * line["eval_loss/second"]) / 16
    assert line["eval_loss"] == pytest.approx(weighed, rel=1e-6)
    assert line["eval_loss/first"] != line["eval_loss/second"]


def test_training_that_gets_worse_stops_early_and_keeps_the_best(run: Run) -> None:
    options = {
        "eval_ratio": 0.3,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "learning_rate": 2.0,
        "num_train_epochs": 9,
    }
    options |= {"save_strategy": "steps", "save_steps": 1}
    out = run("early", task_type="pretrain", **options, early_stopping_patience=2, save_total_limit=1)
    evaluated = values(out, "eval_loss")
    best = min(range(len(evaluated)), key=evaluated.__getitem__)
    assert len(evaluated) == best + 1 + 2  # two more that were not better
    state = json.loads(next(out.glob(f"checkpoint-{best + 1}/trainer_state.json")).read_text())
    assert state["best_global_step"] == best + 1
    assert_same(weights(out), weights(out / f"checkpoint-{best + 1}"), 0)


def test_documents_are_kept_apart_in_the_solo_layout_too(run: Run, place: Path, tmp_path: Path) -> None:
    texts = ["Ice floats.", "Fireflies glow at night.", "Tea?", "One two three."]
    (tmp_path / "docs.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    for name in ("bloom", "llama_tied"):
        model = tmp_path / name
        save_tiny_model(model, name)
        options = {
            "model_name_or_path": str(model),
            "task_type": "pretrain",
            "train_file": str(tmp_path / "docs.jsonl"),
        }
        options |= {"train_mode": "full", "learning_rate": 0.0, "num_train_epochs": 1}
        (together,) = values(run(f"{name}-block", **options, max_seq_length=256))
        tokenizer, own = tiny_tokenizer(), AutoModelForCausalLM.from_pretrained(model)
        total, count = 0.0, 0
        for text in texts:
            ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
            with torch.no_grad():
                total += own(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        assert together == pytest.approx(total / count, rel=1e-5)


def test_a_precomputed_reference_changes_rounding_only(run: Run) -> None:
    for mode in ("lora", "full"):
        plain = values(run(f"plain-{mode}", train_mode=mode))
        first = values(run(f"first-{mode}", train_mode=mode, precompute_reference=True))
        again = values(run(f"again-{mode}", train_mode=mode, precompute_reference=True))
        assert first == pytest.approx(plain, rel=1e-4)
        assert again == first


def test_dropout_is_off_in_preference_training_and_said(run: Run) -> None:
    out = run(lora_dropout=0.3, num_train_epochs=1)
    assert values(out) == values(run("without", num_train_epochs=1))
    codes = [item["code"] for item in json.loads((out / "run.json").read_text())["notices"]]
    assert "preference.no_dropout" in codes


def test_a_full_fine_tune_in_bf16_moves_weights_that_pure_bf16_would_not(
    run: Run, monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    monkeypatch.setattr("firefly.models.precision.has_bf16", lambda device: True)
    out = run(task_type="pretrain", train_mode="full", learning_rate=1e-5, bf16=True, num_train_epochs=1)
    before, after = load_file(place / "model" / "model.safetensors"), weights(out)
    moved = kept = 0
    for name, value in after.items():
        assert value.dtype == torch.float32
        moved += int((value != before[name]).sum())
        kept += int((value.bfloat16() != before[name].bfloat16()).sum())
    total = sum(value.numel() for value in after.values())
    assert moved > 0.9 * total
    assert kept < 0.2 * total  # what would be left of the same updates in bf16 weights
