"""On a CUDA GPU (`make test-gpu`): kernels against their definitions, runs against the same runs on the CPU."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from firefly.config import load_config
from firefly.console import take_notices
from firefly.models.checkpointing import Checkpointing, install_checkpointing
from firefly.models.compilation import OLDEST, TORCH
from firefly.models.kernels import segment_attention
from firefly.models.kernels.elementwise import implementation
from firefly.models.kernels.segment_attention import attend, describe_attention
from firefly.runs.metrics import read_metrics
from firefly.segments import Segment
from firefly.training import train
from models.test_segment_attention import SEGMENTS, naive, random_heads
from tasks import test_preference, test_steps
from tiny import assert_same, prepared, random_examples, save_tiny_model, write_rows
from trials import make_trial

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here"),
]
GPU = torch.device("cuda", 0)
Run = Callable[..., list[float]]


# ---- kernels ----


@pytest.mark.parametrize("window", [None, 1, 40, 300])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(4, 4, 64), (4, 2, 128), (3, 1, 8), (2, 1, 256)])
def test_attention_on_the_gpu_is_a_masked_softmax(heads: int, key_heads: int, width: int, window: int | None) -> None:
    inputs = random_heads(heads, key_heads, SEGMENTS[-1].end, width, torch.bfloat16)
    scale = width**-0.5
    expected = naive(*inputs, SEGMENTS, scale, window)
    weights = torch.linspace(-1, 1, expected.numel(), dtype=expected.dtype).view(expected.shape)
    wanted = [expected, *torch.autograd.grad((expected * weights).sum(), inputs)]
    moved = [x.detach().transpose(0, 1).to(GPU).transpose(0, 1).requires_grad_() for x in inputs]
    out = attend(*moved, SEGMENTS, scale, window)
    found = [out, *torch.autograd.grad((out * weights.to(GPU)).sum(), moved)]
    for name, one, other in zip(("output", "query", "key", "value"), found, wanted, strict=True):
        # A window of one token leaves the scores of its only key without a gradient.
        size = max(other.double().norm(), 1e-2 * wanted[3].double().norm())
        distance = (one.cpu().double() - other.double()).norm() / size
        assert distance < 1e-2, f"{name}: {distance}"


def test_the_gpu_s_own_kernels_are_the_ones_taken() -> None:
    take_notices()
    assert describe_attention(GPU, torch.bfloat16, 0) == "varlen_attn"
    if importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is not installed")
    assert implementation(GPU) == "liger", take_notices()


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name", ["llama_tied", "qwen2_window", "gemma2", "gemma3", "phi3", "gpt_neox", "mixtral"])
def test_a_step_on_the_gpu_is_the_step_of_the_cpu(name: str, mode: str, tmp_path: Path) -> None:
    model, layout, _ = prepared(name, mode)
    expected = make_trial(model, tmp_path, test_steps.EIGHT, 64, layout, mode).one_step()
    model.zero_grad()
    trial = make_trial(model, tmp_path, test_steps.EIGHT, 64, layout, mode, use_cpu=False)
    loss, found, _ = trial.one_step()
    torch.testing.assert_close(loss.cpu(), expected[0], rtol=1e-4, atol=0)
    assert_same({name: value.cpu() for name, value in found.items()}, expected[1], 1e-3)


@pytest.mark.parametrize(("heads", "key_heads", "width"), [(4, 4, 64), (4, 2, 128)])
def test_gathered_keys_get_the_gradients_of_every_segment_that_saw_them(heads: int, key_heads: int, width: int) -> None:
    segments = (Segment(0, 40), Segment(40, 70, 0, 40), Segment(70, 99, 0, 31), Segment(99, 130), Segment(130, 140))
    inputs = random_heads(heads, key_heads, 140, width, torch.bfloat16)
    expected = torch.autograd.grad(naive(*inputs, segments, 0.1).sum(), inputs)
    moved = [x.detach().to(GPU).requires_grad_() for x in inputs]
    found = torch.autograd.grad(attend(*moved, segments, 0.1).float().sum(), moved)
    for one, other in zip(found, expected, strict=True):
        assert (one.cpu().double() - other.double()).norm() < 2e-2 * other.double().norm() + 1e-2


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_layers_computed_again_leave_the_gradients_as_they_are(layers: int, offload: bool, tmp_path: Path) -> None:
    model, layout, _ = prepared("llama", "lora")
    trial = make_trial(model, tmp_path, test_steps.EIGHT, 64, layout, "lora", use_cpu=False)
    expected = trial.one_step()
    install_checkpointing(model.get_base_model(), Checkpointing(layers, offload))
    loss, found, _ = trial.one_step()
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    assert_same(found, expected[1], 1e-5)


# ---- steps ----


@pytest.fixture
def unforgiving() -> Iterator[Callable[[], None]]:
    """A function after whose call anything that waits for the GPU fails."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2_window"])
def test_an_sft_step_never_waits_for_the_gpu(name: str, mode: str, tmp_path: Path, unforgiving: Any) -> None:
    model, layout, _ = prepared(name, mode)
    pinned = {"use_cpu": False, "dataloader_pin_memory": True}
    trial = make_trial(model, tmp_path, test_steps.EIGHT, 64, layout, mode, **pinned)
    step = trial.step()
    trial.task.backward(trial.model, step)
    unforgiving()
    trial.task.backward(trial.model, step)


def test_a_step_that_really_runs_out_of_memory_is_finished_in_smaller_pieces(tmp_path: Path) -> None:
    take_notices()
    examples = random_examples(*[400] * 64)
    model, layout, _ = prepared("llama", "lora")
    trial = make_trial(model, tmp_path, examples, 10**6, layout, "lora", use_cpu=False)
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    expected = trial.one_step()
    needed = torch.cuda.max_memory_allocated() - base
    trial.model.zero_gradients()
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + int(0.7 * needed)
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    try:
        loss, found, _ = trial.one_step()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "memory.halved" in [entry["code"] for entry in take_notices()]
    assert trial.model.choices.tokens_per_microbatch < 64 * 400
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=0)
    assert_same(found, expected[1], 1e-4)


def test_a_preference_step_never_waits_for_the_gpu(tmp_path: Path, unforgiving: Any) -> None:
    model, layout, _ = prepared("llama", "lora")
    trial = test_preference.make_pairs_trial(model, tmp_path, layout=layout, use_cpu=False)
    step = trial.step()
    step = step.pin_memory()
    trial.task.backward(trial.model, step)
    unforgiving()
    trial.task.backward(trial.model, step)


# ---- runs ----


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    # Wide enough for a 4-bit weight's blocks and for heads that the GPU's attention takes.
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    save_tiny_model(folder / "model", "qwen2", **shape)
    write_rows(folder / "sft.jsonl", 40)
    pairs = [
        {"prompt": f"question {i} " * (1 + i % 4), "chosen": "good " * (1 + i % 3), "rejected": "bad " * (1 + i % 5)}
        for i in range(40)
    ]
    (folder / "dpo.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    texts = [{"text": f"document {i} tells of " + "many things " * (3 + i % 9)} for i in range(60)]
    (folder / "pretrain.jsonl").write_text("\n".join(map(json.dumps, texts)), encoding="utf-8")
    return folder


@pytest.fixture
def run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr("firefly.runs.plots.draw_loss", lambda *_: None)

    def losses_of(name: str = "out", task: str = "sft", **changes: Any) -> list[float]:
        settings: dict[str, Any] = {
            "task_type": task,
            "model_name_or_path": str(place / "model"),
            "train_file": str(place / f"{task}.jsonl"),
            "output_dir": str(tmp_path / name),
            "train_mode": "lora",
            "lora_dropout": 0.0,
            "per_device_train_batch_size": 8,
            "max_seq_length": 64 if task == "pretrain" else 512,
            "learning_rate": 1e-3,
            "num_train_epochs": 1,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "compare": False,
            "seed": 1,
        }
        settings |= {"template_name": "chatml"} if task != "pretrain" else {}
        settings |= {"lora_rank": 8} if changes.get("train_mode") != "full" else {"lora_dropout": 0.0}
        train(load_config(settings | changes))
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        return [line["loss"] for line in lines if "loss" in line]

    return losses_of


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
@pytest.mark.parametrize("task", ["sft", "dpo", "pretrain"])
def test_a_run_on_the_gpu_has_the_losses_of_the_cpu(task: str, mode: str, run: Run, tmp_path: Path) -> None:
    expected = run("cpu", task, train_mode=mode, use_cpu=True, bf16=False)
    assert len(expected) >= 4
    exact = run("exact", task, train_mode=mode, bf16=False)
    assert exact == pytest.approx(expected, rel=2e-3 if mode == "qlora" else 2e-4)
    half = run("half", task, train_mode=mode)
    assert half == pytest.approx(expected, rel=2e-2)
    resolved = json.loads((tmp_path / "half" / "run.json").read_text())["resolved"]
    assert resolved["precision"] == "bfloat16"
    assert resolved["layout"] == "segments"


@pytest.mark.parametrize(
    "optimizer", ["paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit", "adamw_torch_fused", "adafactor"]
)
def test_an_optimizer_of_the_gpu_trains(optimizer: str, run: Run) -> None:
    losses = run(optim=optimizer, learning_rate=5e-3, num_train_epochs=3)
    assert losses[-1] < losses[0]


def test_a_paged_optimizer_s_update_is_the_fused_one(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"optim": "paged_adamw_32bit", "weight_decay": 0.1}
    fused = run("fused", **settings)
    manifest = json.loads((tmp_path / "fused" / "run.json").read_text())
    assert "optim.unpaged" in [entry["code"] for entry in manifest["notices"]]
    monkeypatch.setattr("firefly.models.tuning.fits", lambda forecast: False)
    assert run("paged", **settings) == pytest.approx(fused, rel=1e-3)


def test_copies_of_4_bit_weights_change_no_loss(run: Run, tmp_path: Path) -> None:
    kept = run("kept", train_mode="qlora", nf4_cache=False)
    copied = run("copied", train_mode="qlora", nf4_cache=True)
    assert copied == pytest.approx(kept, rel=1e-3)
    run("auto", train_mode="qlora")
    resolved = json.loads((tmp_path / "auto" / "run.json").read_text())["resolved"]
    assert resolved["cached_weights"] > 0


def test_a_run_goes_on_where_it_stopped(run: Run, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lora_dropout": 0.1, "save_strategy": "steps", "save_steps": 2}
    settings |= {"lr_scheduler_type": "constant"}  # the rate does not tell where a run was to end
    whole = run("whole", **settings)
    run("halves", max_steps=2, **settings)
    again = run("halves", resume_from_checkpoint=True, **settings)
    assert again == pytest.approx(whole, rel=1e-3)


def test_a_machine_with_a_gpu_trains_on_its_cpu_if_told_to(run: Run, tmp_path: Path) -> None:
    for use_cpu in (True, False):
        run(str(use_cpu), max_steps=1, use_cpu=use_cpu, bf16=False)
        device = json.loads((tmp_path / str(use_cpu) / "run.json").read_text())["hardware"]["device"]
        assert device == ("cpu" if use_cpu else "cuda")


@pytest.mark.parametrize("pinned", [True, False, None])
def test_what_goes_to_the_gpu_is_pinned_unless_it_is_switched_off(
    pinned: bool | None, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bool] = []
    init = torch.utils.data.DataLoader.__init__

    def noted(self: Any, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        made.append(self.pin_memory)

    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", noted)
    run(max_steps=1, **({} if pinned is None else {"dataloader_pin_memory": pinned}))
    assert (True in made) is (pinned is not False)


@pytest.mark.skipif(TORCH < OLDEST, reason="this torch compiles wrong gradients")
def test_what_is_compiled_trains_the_same(run: Run) -> None:
    assert run("compiled", torch_compile=True) == pytest.approx(run("eager"), rel=2e-2)


def test_sdpa_on_the_gpu_serves_what_the_kernel_does_not() -> None:
    inputs = [x.detach().to(GPU) for x in random_heads(4, 2, SEGMENTS[-1].end, 64)]
    found = segment_attention.attend(*inputs, SEGMENTS, 0.125)
    torch.testing.assert_close(
        found.cpu().double(), naive(*(x.cpu() for x in inputs), SEGMENTS, 0.125), rtol=0, atol=1e-4
    )
