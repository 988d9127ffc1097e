"""`train(load_config(...))` from a folder and a file to a folder: what is computed, what is left, what resumes."""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from firefly.cli import main
from firefly.config import load_config
from firefly.data.batching import StepPlan, StepSettings
from firefly.data.schema import IGNORE
from firefly.errors import UsageError
from firefly.runs.metrics import read_metrics
from firefly.tasks.base import Task
from firefly.training import train
from tiny import (
    ListedExamples,
    assert_same,
    by_hand,
    padded_loss,
    run_settings,
    save_tiny_model,
    tiny_tokenizer,
    write_rows,
)

ROWS, STEPS = 22, 6  # four examples a step: five full steps and a last one of two
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a training file and an evaluation file."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny_model(folder / "model", "llama_tied")
    write_rows(folder / "train.jsonl", ROWS)
    write_rows(folder / "eval.jsonl", 7, seed=9)
    return folder


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """accelerate collects garbage after each run: what was imported before need not be walked through every time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def settings(place: Path) -> dict[str, Any]:
    """The configuration that every run here starts from."""
    return run_settings(
        place / "model",
        place / "train.jsonl",
        place / "out",
        train_mode="lora",
        lora_rank=4,
        lora_dropout=0.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        tokens_per_microbatch=200,
        learning_rate=0.01,
        num_train_epochs=1,
        seed=1,
    )


def train_with(settings: dict[str, Any], pictures: bool = False) -> Path:
    """Train; draw loss.png only where it matters (it takes longer than the training)."""
    with pytest.MonkeyPatch.context() as patch:
        if not pictures:
            patch.setattr("firefly.runs.plots.draw_loss", lambda *_: None)
        return train(load_config(settings))


@pytest.fixture
def run(settings: dict[str, Any], tmp_path: Path) -> Run:
    def train_into(name: str = "out", pictures: bool = False, **changes: Any) -> Path:
        return train_with(settings | {"output_dir": str(tmp_path / name)} | changes, pictures)

    return train_into


def by_step(folder: Path, key: str = "loss") -> dict[int, float]:
    """A value of metrics.jsonl at every step that logged it; a step that stands there twice fails."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if key in line and "train_loss" not in line]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: line[key] for line in lines}


def losses(folder: Path) -> list[float]:
    return list(by_step(folder).values())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def notices(folder: Path) -> list[str]:
    return [item["code"] for item in json.loads((folder / "run.json").read_text())["notices"]]


def checkpoints(folder: Path) -> list[str]:
    return sorted((path.name for path in folder.glob("checkpoint-*")), key=lambda name: int(name.split("-")[1]))


def trained_model(folder: Path, place: Path) -> Any:
    """The result as transformers and peft load it, without the product."""
    if (folder / "adapter_config.json").exists():
        base = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
        return PeftModel.from_pretrained(base, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


# ---- what is computed ----


def test_full_training_is_the_textbook_loop(run: Run, place: Path) -> None:
    """Two epochs of AdamW, clipping and a linear schedule on padded batches, in the plan's order."""
    out = run(train_mode="full", num_train_epochs=2, warmup_steps=3, weight_decay=0.0, max_grad_norm=1.0)
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 3, 2 * STEPS)
    examples = by_hand(place / "train.jsonl")
    plan = StepPlan(ListedExamples(examples).counts, StepSettings(4, seed=1), budget=1)
    expected = []
    for epoch in range(2):
        plan.epoch = epoch
        for rows in np.split(plan.order(), range(4, ROWS, 4)):
            loss = padded_loss(model, [examples[row] for row in rows])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step(), schedule.step(), optimizer.zero_grad()
            expected.append(loss.item())
    assert losses(out) == pytest.approx(expected, rel=1e-4)
    found = {name: value for name, value in weights(out).items() if name != "lm_head.weight"}
    assert_same(found, {name: model.state_dict()[name] for name in found}, 2e-3)


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_training_lowers_the_loss_and_leaves_a_model_that_has_it(mode: str, run: Run, place: Path) -> None:
    out = run(train_mode=mode, num_train_epochs=3, eval_file=str(place / "eval.jsonl"))
    assert losses(out)[-1] < 0.9 * losses(out)[0]
    if mode != "qlora":  # whose adapter sits on 4-bit weights
        with torch.no_grad():
            expected = padded_loss(trained_model(out, place).eval(), by_hand(place / "eval.jsonl")).item()
        assert by_step(out, "eval_loss")[3 * STEPS] == pytest.approx(expected, rel=1e-5)


def test_the_adapter_of_qlora_has_its_loss_on_the_4_bit_base(
    run: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BitsAndBytesConfig

    # Elsewhere than in our loading, a CPU with bf16 instructions repacks weights.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    model_folder = save_tiny_model(tmp_path / "wide", "llama_tied", hidden_size=64, intermediate_size=128)
    out = run(train_mode="qlora", model_name_or_path=str(model_folder), eval_file=str(place / "eval.jsonl"))
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        model_folder, quantization_config=four_bit, dtype=torch.float32, device_map={"": "cpu"}
    )
    with torch.no_grad():
        model = PeftModel.from_pretrained(base, out).eval()
        expected = padded_loss(model, by_hand(place / "eval.jsonl")).item()
    assert by_step(out, "eval_loss")[STEPS] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_examples_per_device_times_accumulation_is_all_that_counts(mode: str, run: Run) -> None:
    shapes = {"1x8": (1, 8), "8x1": (8, 1), "4x2": (4, 2)}
    outs = [
        run(name, train_mode=mode, per_device_train_batch_size=device, gradient_accumulation_steps=accumulation)
        for name, (device, accumulation) in shapes.items()
    ]
    assert len(losses(outs[0])) == 3
    for out in outs[1:]:
        assert losses(out) == losses(outs[0])
        assert_same(weights(out), weights(outs[0]), 0)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_token_budget_changes_rounding_only(mode: str, run: Run) -> None:
    one_each = run("one_each", train_mode=mode, tokens_per_microbatch=1)
    for budget in (200, 100_000, "auto"):
        out = run(str(budget), train_mode=mode, tokens_per_microbatch=budget)
        assert losses(out) == pytest.approx(losses(one_each), rel=1e-5)
        assert_same(weights(out), weights(one_each), 1e-3)


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_gradient_checkpointing_changes_rounding_only(mode: str, run: Run) -> None:
    with_it, without = (run(str(on), train_mode=mode, gradient_checkpointing=on) for on in (True, False))
    assert losses(with_it) == pytest.approx(losses(without), rel=1e-5)


def test_gradient_checkpointing_really_recomputes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from firefly.models import attention

    calls, steps = [], []
    attend, one_step = attention.attend, Task.backward

    def counted_step(*args: Any) -> Any:
        before = len(calls)
        loss = one_step(*args)
        steps.append(len(calls) - before)
        return loss

    monkeypatch.setattr(attention, "attend", lambda *args: calls.append(1) or attend(*args))
    monkeypatch.setattr(Task, "backward", counted_step)
    counts = {}
    for on in (False, True):
        steps.clear()
        run(str(on), gradient_checkpointing=on, max_steps=2, tokens_per_microbatch=100_000)
        counts[on] = sum(steps)
    assert counts[False] == 2 * 3
    assert counts[True] == counts[False] + 2 * 3  # two steps of one microbatch through three layers


def test_dropout_with_checkpointing_draws_one_mask_for_both_passes(run: Run) -> None:
    with_it, without = (run(str(on), lora_dropout=0.3, gradient_checkpointing=on) for on in (True, False))
    assert losses(with_it) == pytest.approx(losses(without), rel=1e-5)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(run: Run) -> None:
    first, again = run("first", lora_dropout=0.1), run("again", lora_dropout=0.1)
    assert losses(first) == losses(again)
    assert_same(weights(again), weights(first), 0)
    other = run("other", lora_dropout=0.1, seed=2)
    assert all(abs(a - b) > 1e-4 for a, b in zip(losses(first), losses(other), strict=True))


def test_data_seed_moves_the_order_alone(run: Run) -> None:
    first, same, other = (run(str(seed), data_seed=seed) for seed in (None, 1, 2))
    assert losses(first) == losses(same)
    assert losses(first)[0] != losses(other)[0]


def test_without_shuffling_examples_come_in_the_order_of_the_file(run: Run, place: Path) -> None:
    out = run(shuffle=False, learning_rate=0.0)
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    examples = by_hand(place / "train.jsonl")
    with torch.no_grad():
        expected = [padded_loss(model, examples[start : start + 4]).item() for start in range(0, ROWS, 4)]
    assert losses(out) == pytest.approx(expected, rel=1e-5)


def test_two_data_workers_change_nothing(run: Run) -> None:
    alone = run("alone", lora_dropout=0.1, num_train_epochs=2)
    helped = run("helped", lora_dropout=0.1, num_train_epochs=2, dataloader_num_workers=2)
    assert losses(helped) == losses(alone)
    assert_same(weights(helped), weights(alone), 0)


def test_logging_seldom_averages_and_changes_nothing(run: Run) -> None:
    each, seldom = run("each"), run("seldom", logging_steps=3)
    every = losses(each)
    assert by_step(seldom) == pytest.approx({3: np.mean(every[:3]), 6: np.mean(every[3:])}, rel=1e-5)
    assert_same(weights(seldom), weights(each), 0)


@pytest.mark.parametrize("name", ["bloom", "gemma2", "qwen2_window", "mixtral", "granite_dense"])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_other_architectures_train_to_the_loss_that_transformers_reads(
    name: str, mode: str, run: Run, place: Path, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "model", name)
    out = run(
        train_mode=mode,
        model_name_or_path=str(tmp_path / "model"),
        eval_file=str(place / "eval.jsonl"),
        learning_rate=1e-3,
    )
    with torch.no_grad():
        expected = padded_loss(trained_model(out, tmp_path).eval(), by_hand(place / "eval.jsonl")).item()
    assert by_step(out, "eval_loss")[STEPS] == pytest.approx(expected, rel=1e-5)


# ---- settings that transformers implements, seen to arrive ----


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [1 - step / STEPS for step in range(STEPS)]),
        ({"lr_scheduler_type": "constant"}, [1.0] * STEPS),
        ({"lr_scheduler_type": "cosine"}, [(1 + math.cos(math.pi * step / STEPS)) / 2 for step in range(STEPS)]),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4}, [0, 0.25, 0.5, 0.75, 1, 1]),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.5}, [0, 1 / 3, 2 / 3, 1, 1, 1]),
    ],
    ids=["linear", "constant", "cosine", "warmup steps", "warmup ratio"],
)
def test_the_learning_rate_follows_its_schedule(changes: dict[str, Any], expected: list[float], run: Run) -> None:
    found = list(by_step(run(**changes), "learning_rate").values())
    assert found == pytest.approx([0.01 * rate for rate in expected], abs=1e-9)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 6), (2, 12), (1.5, 9), (0.5, 3)])
def test_an_epoch_is_as_many_steps_as_its_examples_fill(epochs: float, steps: int, run: Run) -> None:
    out = run(num_train_epochs=epochs)
    assert list(by_step(out)) == list(range(1, steps + 1))


def test_max_steps_ends_a_run(run: Run) -> None:
    assert list(by_step(run(max_steps=8))) == list(range(1, 9))


def test_the_gradient_norm_is_clipped(run: Run, place: Path) -> None:
    changes = {"train_mode": "full", "optim": "sgd", "learning_rate": 1.0, "max_steps": 1, "weight_decay": 0.0}
    start = weights(place / "model")
    moved = {}
    for limit in (0.5, 1000.0):
        out = run(str(limit), lr_scheduler_type="constant", max_grad_norm=limit, **changes)
        after = weights(out)
        moved[limit] = sum((after[name] - start[name]).double().pow(2).sum() for name in start) ** 0.5
        assert by_step(out, "grad_norm")[1] > 1
    assert moved[0.5].item() == pytest.approx(0.5, rel=1e-3)
    assert moved[1000.0].item() == pytest.approx(by_step(out, "grad_norm")[1], rel=1e-3)


def test_weight_decay_pulls_matrices_and_spares_norms(run: Run, place: Path) -> None:
    start = weights(place / "model")
    changes = {"train_mode": "full", "max_steps": 1, "lr_scheduler_type": "constant", "optim": "adamw_torch"}
    with_it, without = (weights(run(str(decay), weight_decay=decay, **changes)) for decay in (0.2, 0.0))
    expected = {name: -0.01 * 0.2 * x if x.dim() > 1 else torch.zeros_like(x) for name, x in start.items()}
    for name, value in expected.items():
        torch.testing.assert_close(with_it[name] - without[name], value, rtol=0, atol=1e-6)


def test_a_paged_optimizer_runs_unpaged_on_a_cpu_and_says_so(run: Run) -> None:
    paged, plain = run("paged", optim="paged_adamw_32bit"), run("plain", optim="adamw_torch_fused")
    assert "optim.paged" in notices(paged)
    assert "optim.paged" not in notices(plain)
    assert losses(paged) == losses(plain)
    in_8_bit, unpaged = run("paged_8bit", optim="paged_adamw_8bit"), run("unpaged_8bit", optim="adamw_8bit")
    assert losses(in_8_bit) == losses(unpaged)


def test_half_precision_that_a_cpu_lacks_is_replaced_and_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firefly.models.precision.has_bf16", lambda device: False)
    half, single = run("half", fp16=True, bf16=None), run("single")
    assert "precision.replaced" in notices(half)
    assert losses(half) == losses(single)


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_in_bf16_a_run_stays_near_fp32(mode: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the hardware has it; this one emulates it."""
    monkeypatch.setattr("firefly.models.precision.has_bf16", lambda device: True)
    half, single = run("half", train_mode=mode, bf16=True), run("single", train_mode=mode, bf16=False)
    assert json.loads((half / "run.json").read_text())["resolved"]["precision"] == "bfloat16"
    assert losses(half) != losses(single)
    assert losses(half) == pytest.approx(losses(single), rel=2e-2)
    assert {value.dtype for value in weights(half).values()} == {torch.float32}


# ---- evaluation ----


def test_evaluation_happens_when_asked_and_changes_nothing(run: Run, place: Path) -> None:
    file = str(place / "eval.jsonl")
    without = run("without", lora_dropout=0.1)
    each = run("each", lora_dropout=0.1, eval_file=file, eval_steps=2)
    assert list(by_step(each, "eval_loss")) == [2, 4, 6]
    assert list(by_step(run("epoch", eval_file=file, num_train_epochs=2), "eval_loss")) == [STEPS, 2 * STEPS]
    assert losses(each) == losses(without)
    assert_same(weights(each), weights(without), 0)


@pytest.mark.parametrize("metric", [None, "perplexity", "eval_loss"])
def test_the_best_model_is_the_one_that_stays(metric: str | None, run: Run, place: Path) -> None:
    """The rate is so high that the loss rises again."""
    out = run(
        train_mode="full",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        eval_file=str(place / "eval.jsonl"),
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        **({"metric_for_best_model": metric} if metric else {}),
    )
    values = by_step(out, "eval_loss")
    best = min(values, key=values.__getitem__)
    assert best != STEPS
    assert_same(weights(out), weights(out / f"checkpoint-{best}"), 0)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("cosine_with_min_lr", {}), ("cosine", {"num_cycle": 2}), ("warmup_stable_decay", {"min_lr_ratio": 0.1})],
)
def test_a_schedule_that_cannot_be_built_is_said_before_weights_are_loaded(
    kind: str, options: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firefly.setup.build.load_for_training", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(UsageError, match=f"lr_scheduler_type = '{kind}'.*lr_scheduler_kwargs"):
        run(lr_scheduler_type=kind, lr_scheduler_kwargs=options)


def test_a_metric_that_no_evaluation_has_is_refused_before_training(run: Run, place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'metric_for_best_model.*"accuracy".*"perplexity"'):
        run(eval_file=str(place / "eval.jsonl"), load_best_model_at_end=True, metric_for_best_model="accuracy")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


# ---- what a run leaves ----


def test_a_lora_run_leaves_everything_it_promises(run: Run, place: Path, settings: dict[str, Any]) -> None:
    changes = {"save_strategy": "steps", "save_steps": 3, "report_to": "tensorboard", "num_train_epochs": 2}
    out = run(pictures=True, **changes, eval_file=str(place / "eval.jsonl"))
    for name in (
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "loss.png",
    ):
        assert (out / name).stat().st_size > 0
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list(out.rglob("events.out.tfevents.*"))
    given = settings | {"output_dir": str(out), "eval_file": str(place / "eval.jsonl")} | changes
    assert json.loads((out / "train_args.json").read_text()) == given
    assert AutoTokenizer.from_pretrained(out).chat_template == (out / "chat_template.jinja").read_text().rstrip("\n")
    assert checkpoints(out) == [f"checkpoint-{step}" for step in (3, 6, 9, 12)]
    for name in checkpoints(out):
        plan = json.loads((out / name / "plan.json").read_text())
        assert plan["examples_per_step"] == 4
        assert plan["seed"] == 1
        assert plan["choices"]["tokens_per_microbatch"] == 200
        assert plan["world_size"] == 1
        assert plan["data"] == json.loads((out / "run.json").read_text())["hashes"]["data"]


def test_a_full_run_leaves_a_whole_model(run: Run) -> None:
    out = run(train_mode="full")
    names = {path.name for path in out.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    } <= names
    assert not [name for name in names if name.startswith("adapter")]
    generation = json.loads((out / "generation_config.json").read_text())
    assert tiny_tokenizer().eos_token_id in generation["eos_token_id"]


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_base_whose_sampling_values_lack_do_sample_is_trained_and_saved(
    mode: str, run: Run, place: Path, tmp_path: Path
) -> None:
    """As vicuna's and many others; transformers refuses to write such a file once its stop tokens were changed."""
    base = tmp_path / "base"
    shutil.copytree(place / "model", base)
    values = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": [1, 5], "pad_token_id": -1}
    (base / "generation_config.json").write_text(json.dumps(values))
    out = run(model_name_or_path=str(base), train_mode=mode, save_strategy="epoch", num_train_epochs=1)
    saved = json.loads((out / "generation_config.json").read_text())
    assert (saved["temperature"], saved["top_p"], saved["do_sample"]) == (0.9, 0.6, True)
    stop = tiny_tokenizer().convert_tokens_to_ids(
        json.loads((out / "template_certificate.json").read_text())["stop_token"]
    )
    assert saved["eos_token_id"] == list(dict.fromkeys([stop, 1, 5]))  # the base's others stay
    merged = tmp_path / "merged"
    if mode == "lora":
        words = ("--model_name_or_path", str(base), "--adapter_name_or_path", str(out), "--save_path", str(merged))
        assert main(["merge", *words]) == 0
        assert json.loads((merged / "generation_config.json").read_text())["eos_token_id"] == saved["eos_token_id"]


def test_a_result_leaves_nothing_of_another_kind_of_model_behind(run: Run) -> None:
    """A whole model beside an adapter would be served with it."""
    run()
    out = run(train_mode="full")
    assert not list(out.glob("adapter_*"))
    assert (out / "model.safetensors").is_file()
    assert (out / "template_certificate.json").is_file()
    out = run()
    assert not list(out.glob("model*.safetensors"))
    assert (out / "adapter_model.safetensors").is_file()


def test_a_pretrained_model_has_no_certificate_of_an_earlier_run(run: Run, tmp_path: Path) -> None:
    run()
    (tmp_path / "docs.jsonl").write_text("\n".join(json.dumps({"text": f"document {i} " * 20}) for i in range(8)))
    out = run(task_type="pretrain", train_file=str(tmp_path / "docs.jsonl"), max_seq_length=64)
    assert not (out / "template_certificate.json").exists()


def test_another_optimizer_is_said_and_the_checkpoints_own_goes_on(
    run: Run, out: Path, uninterrupted: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(out / f"checkpoint-{2 * STEPS}")
    run(resume_from_checkpoint=True, optim="adafactor", **SAVING)
    assert_continues(out, uninterrupted)
    assert "optim" in capfd.readouterr().err


def test_a_best_step_without_a_checkpoint_is_said(run: Run, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    common: dict[str, Any] = {"eval_file": str(place / "eval.jsonl"), "eval_strategy": "steps", "eval_steps": 1}
    settings = {"save_strategy": "steps", "save_steps": 5, "max_steps": 4, "learning_rate": 0.0}
    run(load_best_model_at_end=True, **settings, **common)  # no step is better than the first
    assert "of which there is no checkpoint: the result is what the last step left" in " ".join(
        capfd.readouterr().err.split()
    )
    unsaid = {"eval_steps": None, "logging_steps": 2, "save_strategy": "steps"}
    out = run("early", early_stopping_patience=1, max_steps=4, **common | unsaid)
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}


def test_the_manifest_names_all_that_shaped_the_run(run: Run) -> None:
    manifest = json.loads((run() / "run.json").read_text())
    assert manifest["seed"] == 1
    assert manifest["resolved"] == {
        "precision": "float32",
        "layout": "segments",
        "tokens_per_microbatch": 200,
        "checkpointed_layers": 0,
        "offload": False,
        "cached_weights": 0,
        "attention_by_products": 0,
        "unpaged_optimizer": False,
        "examples_per_step": 4,
        "engine": "single",
    }
    assert set(manifest["hashes"]) >= {"data", "tokenizer", "base_weights"}
    assert torch.__version__.startswith(manifest["versions"]["torch"].split("+")[0])
    assert manifest["config"]["lora_rank"] == 4
    assert {"cpu", "memory_bytes"} <= manifest["hardware"].keys()


def test_tokens_targets_and_examples_are_counted_right(run: Run, place: Path) -> None:
    out = run(num_train_epochs=2)
    examples = by_hand(place / "train.jsonl")
    tokens = sum(len(example.input_ids) for example in examples)
    targets = sum(int((example.labels != IGNORE).sum()) for example in examples)
    results = json.loads((out / "train_results.json").read_text())
    assert results["steps"] == 2 * STEPS
    assert results["examples"] == 2 * ROWS
    assert results["input_tokens"] == 2 * tokens
    assert results["target_tokens"] == 2 * targets
    assert results["train_loss"] == pytest.approx(np.mean(losses(out)), rel=1e-4)
    assert results["input_tokens_per_second"] == pytest.approx(2 * tokens / results["train_runtime"], rel=1e-3)
    assert results["examples_per_second"] == pytest.approx(2 * ROWS / results["train_runtime"], rel=1e-3)
    assert results["peak_memory_bytes"] > 1 << 20
    assert results["seconds_to_first_step"] > 0
    ledger = json.loads((out / "data_report.json").read_text())
    assert (ledger["rows"], ledger["kept"], ledger["tokens"], ledger["target_tokens"]) == (ROWS, ROWS, tokens, targets)


def test_only_the_last_checkpoints_are_kept(run: Run) -> None:
    out = run(save_strategy="steps", save_steps=1, save_total_limit=2)
    assert checkpoints(out) == ["checkpoint-5", "checkpoint-6"]
    assert all((out / name / "plan.json").is_file() for name in checkpoints(out))


# ---- resuming ----

SAVING = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2, "lora_dropout": 0.1}


@pytest.fixture(scope="module")
def uninterrupted(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run of twelve steps with a checkpoint at every second one."""
    return train_with(settings | SAVING | {"output_dir": str(tmp_path_factory.mktemp("uninterrupted") / "out")})


@pytest.fixture
def out(uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy of it, where `run` writes by default."""
    return Path(shutil.copytree(uninterrupted, tmp_path / "out"))


def stopped_at(folder: Path, step: int) -> None:
    """Make a finished run look as if it had been killed after the checkpoint at `step`."""
    for name in checkpoints(folder):
        if int(name.split("-")[1]) > step:
            shutil.rmtree(folder / name)
    for file in (*folder.glob("*.safetensors"), folder / "train_results.json"):
        file.unlink()


def assert_continues(folder: Path, uninterrupted: Path) -> None:
    """Same loss at every step, each step once, and the same bits at the end."""
    assert by_step(folder) == by_step(uninterrupted)
    assert_same(weights(folder), weights(uninterrupted), 0)


@pytest.mark.parametrize("step", [4, 6, 8], ids=["in the first epoch", "at its end", "in the second"])
def test_a_resumed_run_is_the_uninterrupted_one(step: int, run: Run, out: Path, uninterrupted: Path) -> None:
    stopped_at(out, step)
    run(resume_from_checkpoint=True, **SAVING)
    assert "resume.from" in notices(out)
    assert json.loads((out / "train_results.json").read_text())["steps"] == 2 * STEPS - step
    assert_continues(out, uninterrupted)


@pytest.mark.parametrize("mode", ["full", "qlora"])
def test_a_resumed_run_of_another_mode_is_the_uninterrupted_one(mode: str, run: Run, tmp_path: Path) -> None:
    whole = run("whole", train_mode=mode, **SAVING)
    stopped = Path(shutil.copytree(whole, tmp_path / "stopped"))
    stopped_at(stopped, 4)
    run("stopped", train_mode=mode, resume_from_checkpoint=True, **SAVING)
    assert_continues(stopped, whole)


def test_a_run_resumed_with_data_workers_and_evaluation_is_the_uninterrupted_one(
    run: Run, uninterrupted: Path, place: Path, tmp_path: Path
) -> None:
    more = SAVING | {"dataloader_num_workers": 2, "eval_file": str(place / "eval.jsonl"), "eval_steps": 3}
    whole = run("whole", **more)
    stopped = Path(shutil.copytree(whole, tmp_path / "stopped"))
    stopped_at(stopped, 4)
    run("stopped", resume_from_checkpoint=True, **more)
    assert list(by_step(whole, "eval_loss")) == [3, 6, 9, 12]
    assert by_step(stopped, "eval_loss") == by_step(whole, "eval_loss")
    assert_continues(stopped, whole)
    assert_continues(stopped, uninterrupted)


def test_a_run_that_max_steps_ended_goes_on_without_it(run: Run, tmp_path: Path) -> None:
    changes = SAVING | {"lr_scheduler_type": "constant"}
    whole = run("whole", **changes)
    run("stopped", max_steps=5, **changes)
    assert json.loads((tmp_path / "stopped" / "train_results.json").read_text())["steps"] == 5
    stopped = run("stopped", resume_from_checkpoint=True, **changes)
    assert json.loads((stopped / "train_results.json").read_text())["steps"] == 2 * STEPS - 5
    assert_continues(stopped, whole)


def test_new_logging_and_evaluation_steps_take_effect_on_resuming(
    run: Run, out: Path, uninterrupted: Path, place: Path
) -> None:
    stopped_at(out, 4)
    more = {"logging_steps": 4, "eval_file": str(place / "eval.jsonl"), "eval_steps": 3, "save_steps": 5}
    run(resume_from_checkpoint=True, **SAVING | more)
    assert list(by_step(out)) == [1, 2, 3, 4, 8, 12]
    assert list(by_step(out, "eval_loss")) == [6, 9, 12]
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-4", "checkpoint-5", "checkpoint-10", "checkpoint-12"]
    assert_same(weights(out), weights(uninterrupted), 0)


@pytest.mark.parametrize("changes", [{"learning_rate": 1e-5}, {"weight_decay": 0.5}], ids=str)
def test_a_changed_optimizer_setting_is_not_ignored_in_silence_on_resuming(
    changes: dict[str, Any], run: Run, out: Path, uninterrupted: Path
) -> None:
    """It is followed, or named in a notice or in a refusal."""
    stopped_at(out, 4)
    try:
        run(resume_from_checkpoint=True, **SAVING | changes)
    except UsageError as refusal:
        said = str(refusal)
    else:
        said = (out / "run.json").read_text().partition('"notices"')[2]
    assert next(iter(changes)) in said or losses(out)[5:] != losses(uninterrupted)[5:]


def test_a_checkpoint_given_by_its_path_is_the_one_that_is_continued(run: Run, uninterrupted: Path) -> None:
    second = run("second", resume_from_checkpoint=str(uninterrupted / "checkpoint-4"), **SAVING)
    assert list(by_step(second)) == list(range(5, 13))
    assert losses(second) == losses(uninterrupted)[4:]
    assert_same(weights(second), weights(uninterrupted), 0)


def test_a_run_that_is_refused_sets_no_checkpoint_aside(run: Run) -> None:
    """Not even where the fault is found behind the model, as that of an optimizer's modules is."""
    out = run(save_strategy="steps", save_steps=1)
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(UsageError):
        run(resume_from_checkpoint=str(out / "checkpoint-2"), optim_target_modules=["nowhere"], optim="galore_adamw")
    assert sorted(path.name for path in out.iterdir()) == before


def test_checkpoints_behind_the_one_that_is_continued_by_its_path_are_set_aside(
    run: Run, out: Path, uninterrupted: Path
) -> None:
    """Or the next `resume_from_checkpoint: true` would go on with what this run left behind."""
    run(resume_from_checkpoint=str(out / "checkpoint-4"), **SAVING | {"max_steps": 6})
    (aside,) = out.glob("earlier-*")
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert checkpoints(aside) == ["checkpoint-6", "checkpoint-8", "checkpoint-10", "checkpoint-12"]
    assert "resume.set_aside" in notices(out)


def test_a_finished_run_resumed_trains_nothing_more_and_keeps_its_results(
    run: Run, out: Path, uninterrupted: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(resume_from_checkpoint=True, **SAVING)
    assert_continues(out, uninterrupted)
    for name in ("train_results.json", "metrics.jsonl"):
        assert (out / name).read_text() == (uninterrupted / name).read_text()
    assert f"is the last of the {2 * STEPS} steps already" in " ".join(capfd.readouterr().err.split())


def test_a_prolonged_run_goes_on_at_the_rate_of_its_new_schedule(run: Run, out: Path, uninterrupted: Path) -> None:
    whole = by_step(run("whole", **SAVING | {"num_train_epochs": 4}), "learning_rate")
    assert by_step(uninterrupted, "learning_rate")[2 * STEPS] < whole[2 * STEPS]
    prolonged = by_step(run(resume_from_checkpoint=True, **SAVING | {"num_train_epochs": 4}), "learning_rate")
    assert {step: prolonged[step] for step in range(2 * STEPS + 1, 4 * STEPS + 1)} == pytest.approx(
        {step: whole[step] for step in range(2 * STEPS + 1, 4 * STEPS + 1)}
    )


@pytest.mark.parametrize("key", ["model_name_or_path", "adapter_name_or_path"])
def test_a_run_does_not_write_over_what_it_starts_from(
    key: str, run: Run, settings: dict[str, Any], out: Path, tmp_path: Path
) -> None:
    if key == "model_name_or_path":
        shutil.rmtree(out)
        shutil.copytree(settings[key], out)
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    for place in ("out", "out/checkpoint-4"):
        with pytest.raises(UsageError, match=f"{key} is output_dir"):
            run(**{key: f"{tmp_path}/./{place}"})
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()} == before


def test_resuming_where_there_is_nothing_starts_anew_and_says_so(run: Run) -> None:
    folder = run("new", resume_from_checkpoint=True)
    assert "resume.none" in notices(folder)
    assert len(losses(folder)) == STEPS


@pytest.mark.parametrize(
    "lost",
    ["trainer_state.json", "optimizer.pt", "scheduler.pt", "plan.json", "rng_state.pth", "adapter_model.safetensors"],
)
def test_a_checkpoint_that_was_never_finished_is_passed_over(
    lost: str, run: Run, out: Path, uninterrupted: Path
) -> None:
    stopped_at(out, 10)
    (out / "checkpoint-10" / lost).unlink()
    run(resume_from_checkpoint=True, **SAVING)
    assert [code for code in notices(out) if code.startswith("resume")] == ["resume.skipped", "resume.from"]
    assert json.loads((out / "train_results.json").read_text())["steps"] == 2 * STEPS - 8
    assert_continues(out, uninterrupted)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"gradient_accumulation_steps": 1}, "examples_per_step: 4 → 2"),
        ({"seed": 7}, "seed: 1 → 7"),
        ({"shuffle": False}, "shuffle"),
        ({"train_mode": "qlora"}, "train_mode: lora → qlora"),
        ({"max_seq_length": 60, "max_lost_share": 1.0}, "data"),
        ({"lora_rank": 8}, "rank"),
        ({"lora_alpha": 32}, "alpha"),
        ({"use_rslora": True}, "use_rslora: False → True"),
        ({"use_dora": True}, "use_dora: False → True"),
        ({"lora_target": ["q_proj"]}, "lora_target: all-linear → ['q_proj']"),
        ({"modules_to_save": "norm"}, "modules_to_save: [] → ['norm']"),
        ({"add_tokens": ["<x>"]}, "add_tokens: [] → ['<x>']"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_a_different_run_is_refused(changes: dict[str, Any], named: str, run: Run, out: Path) -> None:
    stopped_at(out, 10)
    before = (out / "metrics.jsonl").read_text()
    with pytest.raises(UsageError) as refusal:
        run(resume_from_checkpoint=True, **SAVING | changes)
    assert refusal.value.exit_code == 2
    assert named in str(refusal.value)
    assert (out / "metrics.jsonl").read_text() == before
    assert checkpoints(out)[-1] == "checkpoint-10"


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True, "use_rslora": True},
        {"modules_to_save": "embed_tokens"},
        {"add_tokens": ["<x>"], "lora_target": ["q_proj"]},
    ],
    ids=["dora", "saved", "tokens"],
)
def test_a_resumed_run_of_another_adapter_is_the_uninterrupted_one(
    changes: dict[str, Any], run: Run, tmp_path: Path
) -> None:
    whole = run("whole", **SAVING | changes)
    stopped = Path(shutil.copytree(whole, tmp_path / "stopped"))
    stopped_at(stopped, 4)
    run("stopped", resume_from_checkpoint=True, **SAVING | changes)
    assert_continues(stopped, whole)


def test_a_run_goes_on_from_an_adapter_and_is_bound_to_its_numbers(
    run: Run, uninterrupted: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    start = Path(shutil.copytree(uninterrupted, tmp_path / "start"))
    changes = {"adapter_name_or_path": str(start), "num_train_epochs": 1, "save_steps": 2, "save_strategy": "steps"}
    second = run("second", **changes)
    assert losses(second)[0] < losses(uninterrupted)[0]
    assert_same(weights(start), weights(uninterrupted), 0)
    shutil.copytree(second, tmp_path / "resumed")
    stopped_at(tmp_path / "resumed", 4)
    run("resumed", resume_from_checkpoint=True, **changes)
    assert_continues(tmp_path / "resumed", second)
    changed = {name: value + 1 for name, value in weights(start).items()}
    save_file(changed, start / "adapter_model.safetensors")
    with pytest.raises(UsageError, match="adapter: "):
        run("second", resume_from_checkpoint=True, **changes)


def test_added_tokens_go_with_the_adapter_that_a_run_starts_from(run: Run, tmp_path: Path) -> None:
    first = run("first", add_tokens=["<x>"])
    second = run("second", adapter_name_or_path=str(first))
    assert AutoTokenizer.from_pretrained(second).get_vocab()["<x>"] == len(tiny_tokenizer())
    rows = [name for name in weights(second) if "trainable_tokens" in name]
    assert len(rows) == 1
    with pytest.raises(UsageError, match="1 tokens are new to the adapter"):
        run("third", adapter_name_or_path=str(first), add_tokens=["<x>", "<y>"])


def test_full_training_grows_the_model_by_added_tokens(run: Run) -> None:
    tokens = [f"<{number}>" for number in range(8)]
    out = run(train_mode="full", add_tokens=tokens)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert (
        model.get_input_embeddings().weight.shape[0]
        == len(tiny_tokenizer()) + 8
        == len(AutoTokenizer.from_pretrained(out))
    )


def test_a_checkpoint_on_another_base_model_is_refused(run: Run, out: Path, tmp_path: Path) -> None:
    stopped_at(out, 10)
    save_tiny_model(tmp_path / "model", "llama_tied", seed=7)
    with pytest.raises(UsageError, match="different run"):
        run(resume_from_checkpoint=True, **SAVING | {"model_name_or_path": str(tmp_path / "model")})


def test_the_refusal_reaches_the_shell_as_one_message_and_exit_code_2(
    out: Path, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(settings | SAVING | {"output_dir": str(out)}))
    arguments = ["--resume_from_checkpoint", "true", "--per_device_train_batch_size", "1"]
    assert main(["train", str(file), *arguments]) == 2
    shown = capsys.readouterr().err
    assert "examples_per_step: 4 → 2" in shown
    assert "Traceback" not in shown


def test_a_path_that_is_no_checkpoint_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no complete checkpoint"):
        run(resume_from_checkpoint=str(tmp_path / "empty"))
    with pytest.raises(UsageError, match=r"nowhere does not exist\. Complete checkpoints in .*: –"):
        run(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_a_resumed_run_keeps_the_budget_that_its_checkpoint_measured(run: Run, out: Path, uninterrupted: Path) -> None:
    stopped_at(out, 8)
    run(resume_from_checkpoint=True, **SAVING | {"tokens_per_microbatch": "auto"})
    assert_continues(out, uninterrupted)
    assert json.loads((out / "run.json").read_text())["resolved"]["tokens_per_microbatch"] == 200
    assert json.loads((out / "checkpoint-12" / "plan.json").read_text())["choices"]["tokens_per_microbatch"] == 200


def test_a_resumed_run_does_what_its_configuration_names_outright(run: Run, out: Path, uninterrupted: Path) -> None:
    stopped_at(out, 8)
    run(resume_from_checkpoint=True, **SAVING | {"tokens_per_microbatch": 100, "gradient_checkpointing": True})
    plan = json.loads((out / "checkpoint-12" / "plan.json").read_text())
    assert plan["choices"]["tokens_per_microbatch"] == 100
    assert plan["choices"]["checkpointed_layers"] == 3


def test_a_run_that_starts_anew_moves_earlier_checkpoints_aside(run: Run, out: Path) -> None:
    (out / "checkpoint-4" / "mark").touch()
    run(**SAVING | {"save_steps": 5})
    assert checkpoints(out) == ["checkpoint-5", "checkpoint-10", "checkpoint-12"]
    (aside,) = out.glob("earlier-*")
    assert checkpoints(aside) == [f"checkpoint-{step}" for step in (2, 4, 6, 8, 10, 12)]
    assert (aside / "checkpoint-4" / "mark").is_file()
    assert "resume.set_aside" in notices(out)
    assert list(by_step(out)) == list(range(1, 13))
