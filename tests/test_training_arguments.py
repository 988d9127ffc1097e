"""What a run does with each field of transformers' TrainingArguments, against torch, transformers or arithmetic.

Whole runs alone: from a configuration to what they leave.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.optim import AdamW as BitsAdamW  # pyright: ignore[reportPrivateImportUsage]
from bitsandbytes.optim import Lion  # pyright: ignore[reportPrivateImportUsage]
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerState, TrainingArguments, get_scheduler, trainer_optimizer
from transformers.integrations import integration_utils
from transformers.optimization import GreedyLR
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_pt_utils import safe_globals

from firefly.config import load_config
from firefly.config.training_arguments import FIELDS, asks_for_something
from firefly.console import take_notices
from firefly.errors import UsageError
from firefly.runs.metrics import read_metrics
from firefly.training import train
from tiny import assert_same, by_hand, padded_loss, run_settings, save_tiny_model, tiny_tokenizer, write_rows

HERE = Path(__file__).resolve().parent
ROWS, STEPS = 16, 4  # four examples a step
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of two layers (its projections have biases), a training file and an evaluation file."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny_model(folder / "model", "qwen2", num_hidden_layers=2)
    write_rows(folder / "train.jsonl", ROWS)
    write_rows(folder / "eval.jsonl", 5, seed=9)
    return folder


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """accelerate collects garbage after each run: what was imported before need not be walked through every time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Train all weights on the rows in the file's order: one epoch of four steps, without pictures."""
    monkeypatch.setattr("firefly.runs.plots.draw_loss", lambda *_: None)

    def train_into(name: str = "out", **changes: Any) -> Path:
        settings = run_settings(
            place / "model",
            place / "train.jsonl",
            tmp_path / name,
            train_mode="full",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            tokens_per_microbatch=200,
            shuffle=False,
            learning_rate=0.01,
            num_train_epochs=1,
            seed=1,
        )
        return train(load_config(settings | changes))

    return train_into


@pytest.fixture
def evaluated(run: Run, place: Path) -> Run:
    """The same with rows to evaluate on."""
    return lambda name="out", **changes: run(name, eval_file=str(place / "eval.jsonl"), **changes)


def by_step(folder: Path, key: str = "loss") -> dict[int, float]:
    """A value of metrics.jsonl at every step that logged it."""
    return {line["step"]: line[key] for line in read_metrics(folder / "metrics.jsonl") if key in line}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def state_of(folder: Path) -> TrainerState:
    """The state of the newest checkpoint, as transformers reads it."""
    return TrainerState.load_from_json(str(folder / f"checkpoint-{checkpoints(folder)[-1]}" / "trainer_state.json"))


def base_model(place: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)


def textbook(
    place: Path,
    model: Any,
    optimizer: Any,
    steps: int = STEPS,
    clip: float = math.inf,
    schedule: Any = None,
    before: Callable[[], None] = lambda: None,
) -> tuple[list[float], list[float]]:
    """Train on padded batches in the file's order; the losses and the norms of the gradients."""
    examples, losses, norms = by_hand(place / "train.jsonl"), [], []
    for step in range(steps):
        before()
        first = 4 * (step % STEPS)
        loss = padded_loss(model, examples[first : first + 4])
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf).item())
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


def assert_trained_to(folder: Path, model: Any, tolerance: float = 2e-3) -> None:
    found = {name: value for name, value in weights(folder).items() if name in model.state_dict()}
    assert_same(found, {name: model.state_dict()[name] for name in found}, tolerance)


def decay_groups(model: Any, decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases, which have one dimension, do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]


def train_elsewhere(place: Path, folder: Path, flow: dict[str, Any]) -> None:
    """As many steps in transformers' own Trainer, on other rows."""
    rows: Any = [{"input_ids": torch.arange(3, 9), "labels": torch.arange(3, 9)}] * ROWS
    args = TrainingArguments(str(folder), per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, **flow)
    data = {"train_dataset": rows, "eval_dataset": rows[:4], "processing_class": tiny_tokenizer()}
    transformers.Trainer(base_model(place), args, **data).train()


# ---- the table ----


def test_every_field_is_in_the_table_once() -> None:
    installed = {field.name for field in fields(TrainingArguments) if field.init}
    assert FIELDS.keys() == installed, f"transformers {transformers.__version__}"


def test_every_honoured_field_names_a_test_that_is_there() -> None:
    for name, treatment in FIELDS.items():
        if treatment.how == "honoured":
            file, test = treatment.by.split("::")
            tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
            assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


# A value of each field that is refused or without effect which asks for something.
ASKING: dict[str, Any] = {
    "skip_memory_metrics": False,
    "average_tokens_across_devices": False,
    "label_smoothing_factor": 0.1,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "neftune_noise_alpha": 5.0,
    "torch_empty_cache_steps": 2,
    "auto_find_batch_size": True,
    "log_on_each_node": False,
    "logging_nan_inf_filter": None,  # on by default
    "log_level": "debug",
    "log_level_replica": "debug",
    "per_device_eval_batch_size": 3,
    "prediction_loss_only": True,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "eval_accumulation_steps": 2,
    "include_for_metrics": ["inputs"],
    "batch_eval_metrics": True,
    "push_to_hub": True,
    "hub_token": "secret",
    "hub_model_id": "who/what",
    "hub_strategy": "end",
    "hub_always_push": True,
    "hub_revision": "main",
    "accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}},
    "parallelism_config": {"tp_size": 2},
    "dataloader_multiprocessing_context": "spawn",
    "dataloader_in_order": False,
    "remove_unused_columns": None,  # either way, unknown keys of rows are the data's affair
    "label_names": ["labels"],
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "size",
    "ddp_find_unused_parameters": True,
    "ddp_static_graph": True,
    "save_on_each_node": True,
    "do_train": None,  # there is nothing else to do
    "do_eval": None,
    "do_predict": True,
}


def named(how: str) -> list[str]:
    return [name for name, treatment in FIELDS.items() if treatment.how == how]


def loaded(**changes: Any) -> list[dict[str, str]]:
    """What is said when a configuration is read."""
    take_notices()
    load_config({"model_name_or_path": "m", "train_file": "f", "output_dir": "o", "eval_ratio": 0.1} | changes)
    return take_notices()


@pytest.mark.parametrize("name", named("refused"))
def test_what_is_refused_is_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        loaded(**{name: ASKING[name]})
    for value in (None, *FIELDS[name].harmless):
        if value is not None or "None" in str(TrainingArguments.__dataclass_fields__[name].type):
            assert loaded(**{name: value}) == []


@pytest.mark.parametrize("name", named("without effect"))
def test_what_has_no_effect_is_said(name: str) -> None:
    said = loaded(**{name: ASKING[name]}) if ASKING[name] is not None else []
    assert [item["code"] for item in said] == ["key.unused"] * (ASKING[name] is not None)
    assert all(name in item["message"] for item in said)
    field = TrainingArguments.__dataclass_fields__[name]
    default = field.default if not callable(field.default_factory) else field.default_factory()
    for value in (default, *FIELDS[name].harmless):
        assert not asks_for_something(name, value)


def test_what_has_no_effect_has_none(evaluated: Run) -> None:
    """Nor any way into transformers, where some of it would stop the run."""
    changes = {name: ASKING[name] for name in named("without effect") if ASKING[name] is not None}
    plain, asked = evaluated("plain", train_mode="lora"), evaluated("asked", train_mode="lora", **changes)
    for key in ("loss", "grad_norm", "learning_rate", "eval_loss"):
        assert by_step(asked, key) == by_step(plain, key)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (asked, plain))
    assert_same(first, second, 0)


def test_a_field_of_a_later_transformers_is_handed_on_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FIELDS, "optim_args")  # as if this version did not know it
    (said,) = loaded(optim_args="x=1")
    assert said["code"] == "key.new"
    assert "optim_args" in said["message"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim": "lomo"}, "optim.*lomo"),
        ({"optim": "adalomo"}, "optim.*adalomo"),
        ({"optim": "galore_adamw_layerwise"}, "optim.*layerwise"),
        ({"optim": "apollo_adamw_layerwise"}, "optim.*layerwise"),
        ({"debug": "tpu_metrics_debug"}, "debug"),
    ],
)
def test_a_value_that_cannot_be_honoured_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        loaded(**changes)


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"optim_target_modules": ["mlp"]}, "optim adamw_torch_fused"),
        ({"project": "p"}, "report_to without trackio"),
        ({"trackio_space_id": "s"}, "report_to without trackio"),
        ({"hub_private_repo": True}, "report_to without trackio"),
    ],
)
def test_what_another_setting_leaves_without_effect_is_said(changes: dict[str, Any], setting: str) -> None:
    (said,) = loaded(**changes)
    assert next(iter(changes)) in said["message"]
    assert setting in said["message"]


# ---- how long a run is ----


@pytest.mark.parametrize(
    ("changes", "steps", "epochs"),
    [
        ({"num_train_epochs": 2}, 8, 2),
        ({"num_train_epochs": 1.4}, 6, 2),
        ({"num_train_epochs": 0.5}, 2, 1),
        ({"max_steps": 6}, 6, 2),
        ({"max_steps": 3, "num_train_epochs": 5}, 3, 1),
    ],
)
def test_a_run_has_as_many_steps_as_epochs_or_max_steps_say(
    changes: dict[str, Any], steps: int, epochs: int, run: Run
) -> None:
    out = run(save_strategy="steps", save_steps=100, **changes)
    assert list(by_step(out)) == list(range(1, steps + 1))
    state = state_of(out)
    assert (state.global_step, state.max_steps, state.num_train_epochs) == (steps, steps, epochs)
    assert state.epoch == steps / STEPS
    assert [entry["epoch"] for entry in state.log_history] == [step / STEPS for step in range(1, steps + 1)]


# ---- the learning rate ----


@pytest.mark.parametrize(
    ("kind", "warmup", "options"),
    [
        ("linear", 0, None),
        ("linear", 3, None),
        ("linear", 0.3, None),  # a share of all steps: 2.4, so 3
        ("cosine", 2, {"num_cycles": 1.0}),
        ("cosine_with_restarts", 0, {"num_cycles": 2}),
        ("cosine_with_min_lr", 1, {"min_lr": 1e-3}),
        ("polynomial", 1, {"power": 2.0, "lr_end": 1e-4}),
        ("constant", 0, None),
        ("constant_with_warmup", 0.5, None),
        ("inverse_sqrt", 2, {"timescale": 3}),
        ("warmup_stable_decay", 2, {"num_decay_steps": 3, "min_lr_ratio": 0.1}),
    ],
)
def test_the_rate_of_every_step_is_that_of_transformers_schedule(
    kind: str, warmup: float, options: dict[str, Any] | None, run: Run
) -> None:
    out = run(
        num_train_epochs=2,
        learning_rate=0.02,
        lr_scheduler_type=kind,
        warmup_steps=warmup,
        **({"lr_scheduler_kwargs": options} if options else {}),
    )
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.02)
    steps = math.ceil(warmup * 8) if warmup < 1 else int(warmup)
    schedule = get_scheduler(kind, optimizer, steps, 8, options)
    expected = []
    for _ in range(8):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert list(by_step(out, "learning_rate").values()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("metric", [None, "perplexity"])
@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_a_rate_that_follows_the_evaluations_is_stepped_by_them(kind: str, metric: str | None, evaluated: Run) -> None:
    """Each evaluation moves it, but that before the first step does not; a step itself never does."""
    options: dict[str, Any] = {"factor": 0.5, "patience": 0} if kind == "reduce_lr_on_plateau" else {"patience": 0}
    out = evaluated(
        num_train_epochs=2,
        learning_rate=0.2,
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=options,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=100,
        **({"metric_for_best_model": metric} if metric else {}),
    )
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.2)
    schedule: Any = (torch.optim.lr_scheduler.ReduceLROnPlateau if kind != "greedy" else GreedyLR)(optimizer, **options)
    values = by_step(out, f"eval_{metric or 'loss'}")
    assert 0 in values
    expected = []
    for step in range(1, 9):
        expected.append(optimizer.param_groups[0]["lr"])
        schedule.step(values[step])
    assert list(by_step(out, "learning_rate").values()) == pytest.approx(expected)
    assert len(set(expected)) > 2
    stored = torch.load(out / "checkpoint-8" / "scheduler.pt", weights_only=True)
    assert stored["best"] == pytest.approx(schedule.state_dict()["best"])


# ---- optimizers ----


def test_adamw_is_torchs_with_these_settings(run: Run, place: Path) -> None:
    """Weights, and the whole state in optimizer.pt, as torch would have written it."""
    out = run(
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-5,
        weight_decay=0.3,
        max_grad_norm=0,
        lr_scheduler_type="constant",
        save_strategy="epoch",
    )
    model = base_model(place)
    optimizer = torch.optim.AdamW(decay_groups(model, 0.3), lr=0.01, betas=(0.8, 0.95), eps=1e-5, fused=True)
    schedule = get_scheduler("constant", optimizer)
    losses, norms = textbook(place, model, optimizer, schedule=schedule)
    assert list(by_step(out).values()) == pytest.approx(losses, rel=1e-4)
    assert list(by_step(out, "grad_norm").values()) == pytest.approx(norms, rel=1e-3)
    assert_trained_to(out, model)
    found = torch.load(out / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
    expected = optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for number, state in expected["state"].items():
        assert found["state"][number].keys() == state.keys()
        assert found["state"][number]["step"] == STEPS
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(found["state"][number][name], state[name], rtol=1e-2, atol=1e-5)
    stored = torch.load(out / f"checkpoint-{STEPS}" / "scheduler.pt", weights_only=True)
    assert stored.keys() == schedule.state_dict().keys()
    assert (stored["last_epoch"], stored["base_lrs"]) == (STEPS, [0.01, 0.01])


OPTIMIZERS: list[tuple[str, str | None, Callable[[Any], Any]]] = [
    ("adamw_torch", None, lambda groups: torch.optim.AdamW(groups, lr=0.01)),
    ("sgd", None, lambda groups: torch.optim.SGD(groups, lr=0.01)),
    (
        "sgd",
        "momentum=0.9, nesterov=true",
        lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True),
    ),
    ("adagrad", "lr_decay=0.1", lambda groups: torch.optim.Adagrad(groups, lr=0.01, lr_decay=0.1)),
    (
        "rmsprop",
        "alpha=0.9,centered=true",
        lambda groups: torch.optim.RMSprop(groups, lr=0.01, alpha=0.9, centered=True),
    ),
    (
        "adafactor",
        None,
        lambda groups: transformers.Adafactor(groups, lr=0.01, scale_parameter=False, relative_step=False),
    ),
    ("lion_32bit", None, lambda groups: Lion(groups, lr=0.01, betas=(0.9, 0.999), optim_bits=32)),
    ("adamw_bnb_8bit", None, lambda groups: BitsAdamW(groups, lr=0.01, optim_bits=8)),
]


@pytest.mark.parametrize(
    ("name", "options", "make"), OPTIMIZERS, ids=[f"{name} {options}" for name, options, _ in OPTIMIZERS]
)
def test_an_optimizer_is_the_one_of_its_library(
    name: str, options: str | None, make: Callable[[Any], Any], run: Run, place: Path
) -> None:
    out = run(
        optim=name,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        **({"optim_args": options} if options else {}),
    )
    model = base_model(place)
    losses, _ = textbook(place, model, make(decay_groups(model, 0.1)), clip=1.0)
    assert list(by_step(out).values()) == pytest.approx(losses, rel=1e-3)
    assert losses[0] != pytest.approx(losses[-1], rel=5e-3)


def test_embeddings_keep_32_bits_of_an_8_bit_optimizers_state(run: Run, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "wide", "llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    out = run(model_name_or_path=str(tmp_path / "wide"), optim="adamw_bnb_8bit", save_strategy="epoch", max_steps=1)
    states = torch.load(out / "checkpoint-1" / "optimizer.pt", weights_only=True)["state"].values()
    moments = [state["__bnb_optimizer_quant_state__"]["state1"] for state in states]
    kinds = [(tuple(moment.shape), moment.dtype) for moment in moments]
    assert ((264, 64), torch.float32) in kinds
    assert ((128, 64), torch.uint8) in kinds


def test_an_optimizer_that_a_factory_builds_is_built_by_it(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Muon and Dion are: the factory is made, and called with the model."""
    built = []

    class Factory:
        def __call__(self, model: Any, lr: float) -> torch.optim.Optimizer:
            built.append(sorted(name for name, _ in model.named_parameters()))
            return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5)

    handlers = trainer_optimizer._OPTIMIZER_HANDLERS
    monkeypatch.setitem(handlers, "sgd", lambda context: (Factory, {"lr": context.args.learning_rate}))
    out = run(optim="sgd", lr_scheduler_type="constant", max_grad_norm=0)
    model = base_model(place)
    textbook(place, model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5))
    every = sorted(name for name, _ in model.named_parameters())
    assert built in ([every], [every, every])  # twice where the forecast has not counted this state before
    assert_trained_to(out, model)


class ScheduleFree(torch.optim.Optimizer):
    """SGD without a schedule (Defazio et al. 2024): trains at y, and the model is x, the mean of all z."""

    def __init__(self, params: Any, lr: float, **_: Any) -> None:
        super().__init__(params, {"lr": lr, "train_mode": False, "k": 0})

    def _switch(self, train: bool) -> None:
        """y = 0.9 x + 0.1 z in place of x, or back."""
        for group in self.param_groups:
            if group["train_mode"] != train:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.data.lerp_(self.state[p]["z"], 0.1 if train else 1 - 1 / 0.9)
                group["train_mode"] = train

    def train(self) -> None:
        self._switch(True)

    def eval(self) -> None:
        self._switch(False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("not in train mode")
            share = 1 / (group["k"] + 1)
            for p in (p for p in group["params"] if p.grad is not None):
                z = self.state[p].setdefault("z", p.detach().clone())
                p.lerp_(z, share).add_(p.grad, alpha=group["lr"] * (0.9 * (1 - share) - 1))
                z.sub_(p.grad, alpha=group["lr"])
            group["k"] += 1


@pytest.fixture
def schedulefree(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("schedulefree")
    module.AdamWScheduleFree = module.SGDScheduleFree = ScheduleFree  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "schedulefree", module)
    monkeypatch.setattr(trainer_optimizer, "is_schedulefree_available", lambda *_: True)


@pytest.mark.parametrize("every", [1, None])
def test_a_schedule_free_optimizer_trains_one_model_and_leaves_the_other(
    every: int | None, run: Run, evaluated: Run, place: Path, schedulefree: None
) -> None:
    """What is evaluated, saved at a step and left at the end is its average; what is trained is not."""
    settings = {"optim": "schedule_free_sgd", "lr_scheduler_type": "constant", "learning_rate": 0.1, "max_grad_norm": 0}
    saving = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    evaluations = {"eval_strategy": "steps", "eval_steps": every}
    out = evaluated(**settings, **saving, **evaluations) if every else run(**settings, **saving)
    model = base_model(place)
    optimizer = ScheduleFree(model.parameters(), 0.1)
    textbook(place, model, optimizer, 2, before=optimizer.train)
    optimizer.eval()
    assert_trained_to(out / "checkpoint-2", model)
    if every:
        held_out = padded_loss(model, by_hand(place / "eval.jsonl")).item()
        assert by_step(out, "eval_loss")[2] == pytest.approx(held_out, rel=1e-4)
    model = base_model(place)
    optimizer = ScheduleFree(model.parameters(), 0.1)
    losses, _ = textbook(place, model, optimizer, 8, before=optimizer.train)
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.eval()
    assert list(by_step(out).values()) == pytest.approx(losses, rel=1e-3)
    assert_trained_to(out, model)
    moved = max((trained[name] - value).abs().max().item() for name, value in model.state_dict().items())
    assert moved > 1e-3  # so the two are told apart


def test_a_run_with_a_schedule_free_optimizer_goes_on_where_it_stopped(run: Run, schedulefree: None) -> None:
    settings = {"optim": "schedule_free_sgd", "lr_scheduler_type": "constant", "learning_rate": 0.1}
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = run("whole", **settings, **saving)
    run("parts", max_steps=2, **settings, **saving)
    parts = run("parts", resume_from_checkpoint=True, **settings, **saving)
    assert_same(weights(parts), weights(whole), 1e-6)


@pytest.fixture
def galore(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, Any]]]:
    """A package of that name; the groups that its optimizers are given."""
    groups: list[list[dict[str, Any]]] = []

    class GaLoreAdamW(torch.optim.AdamW):
        def __init__(self, params: Any, **options: Any) -> None:
            groups.append([{**group, "params": [tuple(p.shape) for p in group["params"]]} for group in params])
            super().__init__(params, **options)

    module = ModuleType("galore_torch")
    module.GaLoreAdamW = module.GaLoreAdamW8bit = module.GaLoreAdafactor = GaLoreAdamW  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "galore_torch", module)
    monkeypatch.setattr(trainer_optimizer, "is_galore_torch_available", lambda: True)
    return groups


@pytest.mark.parametrize(("modules", "count"), [(["mlp"], 6), (r".*\.q_proj", 2), ("all-linear", 15)])
def test_low_rank_optimizers_get_the_modules_that_are_named(
    modules: Any, count: int, run: Run, galore: list[list[dict[str, Any]]]
) -> None:
    run(optim="galore_adamw", optim_target_modules=modules, optim_args="rank=4,scale=0.5", max_steps=1)
    others, targets = galore[-1]
    assert len(targets["params"]) == count
    assert (targets["rank"], targets["scale"], targets["update_proj_gap"]) == (4, 0.5, 200)
    assert "rank" not in others


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim": "galore_adamw", "optim_target_modules": ["mlp"]}, "galore_adamw.*install `galore_torch`"),
        ({"optim": "apollo_adamw", "optim_target_modules": ["mlp"]}, "apollo_adamw.*install `apollo_torch`"),
        ({"optim": "schedule_free_adamw"}, "schedule_free_adamw.*install `schedulefree`"),
        ({"optim": "grokadamw"}, "grokadamw.*install grokadamw"),
        ({"optim": "stable_adamw"}, "stable_adamw.*torch-optimi"),
        ({"optim": "sgd", "optim_args": "momentum"}, "sgd.*unpack"),
        ({"optim": "nothing"}, "nothing"),
    ],
)
def test_an_optimizer_that_cannot_be_had_is_said_before_weights_are_loaded(
    changes: dict[str, Any], words: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firefly.setup.build.load_for_training", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(UsageError, match=words):
        run(**changes)


def test_modules_that_the_model_does_not_have_are_said(run: Run, galore: Any) -> None:
    with pytest.raises(UsageError, match="No target modules found"):
        run(optim="galore_adamw", optim_target_modules=["nowhere"])


@pytest.mark.parametrize("limit", [0, 0.5, 100.0])
def test_gradients_are_clipped_and_their_norm_is_logged(limit: float, run: Run, place: Path) -> None:
    out = run(optim="sgd", max_grad_norm=limit, lr_scheduler_type="constant", learning_rate=0.1)
    model = base_model(place)
    _, norms = textbook(place, model, torch.optim.SGD(model.parameters(), lr=0.1), clip=limit)
    assert list(by_step(out, "grad_norm").values()) == pytest.approx(norms, rel=1e-3)
    assert min(norms) > 0.5
    assert_trained_to(out, model)


# ---- logs ----


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"logging_steps": 3}, [3, 6]),
        ({"logging_steps": 0.25}, [2, 4, 6, 8]),
        ({"logging_steps": 0.3}, [3, 6]),  # 2.4 steps, so 3
        ({"logging_steps": 5, "logging_first_step": True}, [1, 5]),
        ({"logging_strategy": "epoch"}, [4, 8]),
        ({"logging_strategy": "epoch", "logging_first_step": True}, [1, 4, 8]),
        ({"logging_strategy": "no"}, []),
    ],
)
def test_logs_come_when_they_are_asked_for(changes: dict[str, Any], steps: list[int], run: Run) -> None:
    each = by_step(run("each", num_train_epochs=2))
    out = run(num_train_epochs=2, **changes)
    found = by_step(out)
    assert list(found) == steps
    for before, step in zip([0, *steps], steps, strict=False):  # the mean since the last log
        assert found[step] == pytest.approx(sum(each[at] for at in range(before + 1, step + 1)) / (step - before))
    assert by_step(out, "train_loss") == pytest.approx({8: sum(each.values()) / 8})


@pytest.mark.parametrize("value", [True, "all", "non_padding", False, "no"])
def test_tokens_are_logged_when_they_are_asked_for(value: Any, run: Run, place: Path) -> None:
    out = run(include_num_input_tokens_seen=value, save_strategy="epoch")
    lengths = [len(example.input_ids) for example in by_hand(place / "train.jsonl")]
    seen = {step: sum(lengths[: 4 * step]) for step in range(1, STEPS + 1)}
    assert {step: by_step(out, "num_input_tokens_seen").get(step) for step in seen} == (
        dict.fromkeys(seen) if value in (False, "no") else seen
    )
    assert bool(by_step(out, "train_tokens_per_second")) is (value not in (False, "no"))
    assert state_of(out).num_input_tokens_seen == seen[STEPS]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("off", [True, False, None])
def test_a_bar_is_shown_on_a_terminal_unless_it_is_switched_off(
    off: bool | None, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    transformers.logging.set_verbosity_warning()  # as in a process of its own; below it the default is off
    run(**({} if off is None else {"disable_tqdm": off}))
    assert (f"{STEPS}/{STEPS} [" in screen.getvalue()) is not bool(off)


# ---- evaluations ----


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"eval_strategy": "steps", "eval_steps": 3}, [3, 6, 8]),  # the last step's, too
        ({"eval_strategy": "steps", "eval_steps": 0.25}, [2, 4, 6, 8]),
        ({"eval_strategy": "steps", "logging_steps": 4}, [4, 8]),  # logging_steps, where nothing is said
        ({"eval_strategy": "epoch"}, [4, 8]),
        ({"eval_strategy": "no"}, []),
        ({"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 5}, [6, 8]),
        ({"eval_strategy": "epoch", "eval_delay": 2}, [8]),
        ({"eval_strategy": "epoch", "eval_on_start": True}, [0, 4, 8]),
        ({"eval_strategy": "no", "eval_on_start": True}, [0]),
    ],
)
def test_evaluations_come_when_they_are_asked_for(changes: dict[str, Any], steps: list[int], evaluated: Run) -> None:
    out = evaluated(num_train_epochs=2, **changes)
    assert list(by_step(out, "eval_loss")) == steps
    if 0 in steps:
        assert by_step(out, "eval_loss")[0] != by_step(out, "eval_loss").get(8)


# ---- checkpoints ----


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"save_strategy": "steps", "save_steps": 3}, [3, 6, 8]),  # the last step's, too
        ({"save_strategy": "steps", "save_steps": 0.25}, [2, 4, 6, 8]),
        ({"save_strategy": "epoch"}, [4, 8]),
        ({"save_strategy": "no"}, []),
        ({"save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}, [6, 7, 8]),
    ],
)
def test_checkpoints_come_when_they_are_asked_for(changes: dict[str, Any], steps: list[int], run: Run) -> None:
    assert checkpoints(run(num_train_epochs=2, **changes)) == steps


def rising(evaluated: Run, **changes: Any) -> tuple[Path, dict[int, float]]:
    """A run of eight steps whose rate is so high that its evaluations go up and down; and their losses."""
    settings = {"num_train_epochs": 2, "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    out = evaluated(**settings | {"eval_strategy": "steps", "eval_steps": 1} | changes)
    return out, by_step(out, "eval_loss")


def bests(values: dict[int, float]) -> list[int]:
    """The steps that are better than all before them."""
    return [step for step in values if all(values[step] < values[at] for at in values if at < step)]


def test_a_checkpoint_is_kept_of_each_best_evaluation_alone(evaluated: Run) -> None:
    out, values = rising(evaluated, save_strategy="best", metric_for_best_model="loss")
    assert checkpoints(out) == bests(values)
    assert 1 <= len(bests(values)) < 8
    assert state_of(out).best_metric == min(values.values())


@pytest.mark.parametrize(
    ("metric", "greater"), [(None, None), ("perplexity", None), ("perplexity", True), ("eval_loss", False)]
)
def test_the_best_model_is_the_result_by_either_direction(
    metric: str | None, greater: bool | None, evaluated: Run
) -> None:
    out, values = rising(
        evaluated,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        **({"metric_for_best_model": metric} if metric else {}),
        **({} if greater is None else {"greater_is_better": greater}),
    )
    best = (max if greater else min)(values, key=values.__getitem__)
    assert_same(weights(out), weights(out / f"checkpoint-{best}"), 0)
    state = state_of(out)
    assert state.best_global_step == best
    assert state.best_metric == by_step(out, f"eval_{(metric or 'loss').removeprefix('eval_')}")[best]
    assert Path(str(state.best_model_checkpoint)) == out / f"checkpoint-{best}"


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_the_best_checkpoint_and_the_last_ones_are_kept(limit: int, evaluated: Run) -> None:
    out, values = rising(
        evaluated, save_strategy="steps", save_steps=1, load_best_model_at_end=True, save_total_limit=limit
    )
    best = min(values, key=values.__getitem__)
    assert best < 6
    assert checkpoints(out) == {1: [best], 2: [best, 8], 3: [best, 7, 8]}[limit]


def test_a_checkpoint_of_the_model_alone_has_no_optimizer(run: Run) -> None:
    names = {}
    for alone in (True, False):
        out = run(str(alone), save_strategy="epoch", save_only_model=alone)
        names[alone] = {path.name for path in (out / f"checkpoint-{STEPS}").iterdir()}
    assert names[False] - names[True] == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert {"model.safetensors", "config.json", "tokenizer.json", "trainer_state.json"} <= names[True]


@pytest.mark.parametrize("threshold", [0.0, 3.0])
def test_a_run_whose_evaluations_no_longer_get_better_stops(threshold: float, evaluated: Run) -> None:
    """And counts on where it was when it is taken up again."""
    stopping = {
        "early_stopping_patience": 2,
        "early_stopping_threshold": threshold,
        "num_train_epochs": 6,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    out, values = rising(evaluated, **stopping)
    best, bad, expected = math.inf, 0, 24
    for step, value in values.items():
        bad = 0 if best == math.inf or (value < best and best - value > threshold) else bad + 1
        best = min(best, value)
        if bad == 2:
            expected = step
            break
    assert list(values) == list(range(1, expected + 1))
    assert expected < 24
    assert_same(weights(out), weights(out / f"checkpoint-{min(values, key=values.__getitem__)}"), 0)
    shutil.rmtree(out / f"checkpoint-{expected}")  # one bad evaluation is behind the one before it
    _, resumed = rising(evaluated, resume_from_checkpoint=True, **stopping)
    assert resumed == values


# ---- resuming ----


def test_a_resumed_run_begins_its_epoch_anew_if_told_to(run: Run) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 0.0}
    each = by_step(run("each", **saving))
    for skip, expected in ((False, [3, 4]), (True, [1, 2])):
        run(str(skip), max_steps=2, **saving)
        out = run(str(skip), resume_from_checkpoint=True, ignore_data_skip=skip, **saving)
        assert [by_step(out)[step] for step in (3, 4)] == [each[step] for step in expected]


# ---- chance, devices, data ----


def test_full_determinism_is_switched_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode, **_: asked.append(mode))
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", torch.backends.cudnn.deterministic)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    run("without", max_steps=1)
    assert not asked
    run("with", max_steps=1, full_determinism=True)
    assert True in asked


def test_tf32_is_switched(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    switched: list[bool] = []
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    monkeypatch.setattr("transformers.training_args.enable_tf32", switched.append)
    for value in (None, True, False):
        run(str(value), max_steps=1, tf32=value)
    assert switched == [True, False]


def test_tf32_is_refused_where_it_cannot_be(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: False)
    with pytest.raises(UsageError, match="tf32"):
        run(tf32=True)


def test_the_last_incomplete_step_can_be_left_out(run: Run, tmp_path: Path) -> None:
    file = str(write_rows(tmp_path / "rows.jsonl", 18))
    assert list(by_step(run("all", train_file=file))) == [1, 2, 3, 4, 5]
    assert list(by_step(run("whole", train_file=file, dataloader_drop_last=True))) == [1, 2, 3, 4]


@pytest.fixture
def loaders(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every data loader that is made."""
    made: list[Any] = []
    init = torch.utils.data.DataLoader.__init__

    def noted(self: Any, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        made.append(self)

    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", noted)
    return made


def test_the_data_loader_is_given_its_settings(run: Run, loaders: list[Any]) -> None:
    """(What is pinned for a GPU, a test on GPUs looks at.)"""
    plain = run("plain")
    assert {(loader.num_workers, loader.pin_memory) for loader in loaders} == {(0, False)}
    loaders.clear()
    settings = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 3, "dataloader_persistent_workers": True}
    helped = run("helped", **settings)
    found = {(loader.num_workers, loader.prefetch_factor, loader.persistent_workers) for loader in loaders}
    assert (1, 3, True) in found
    assert by_step(helped) == by_step(plain)


def test_the_saved_model_says_whether_it_caches(run: Run) -> None:
    for asked in (True, False):
        out = run(str(asked), use_cache=asked, max_steps=1)
        assert json.loads((out / "config.json").read_text())["use_cache"] is asked


def test_debug_names_the_module_whose_numbers_overflow(
    run: Run, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = base_model(place)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match="inf/nan detected"):
        run("debug", model_name_or_path=str(tmp_path / "broken"), debug="underflow_overflow")
    assert "model.layers.1.mlp" in capsys.readouterr().out
    with pytest.raises(UsageError, match="infinite or not a number"):
        run("plain", model_name_or_path=str(tmp_path / "broken"))


# ---- trackers ----


def test_tensorboard_holds_what_was_logged(evaluated: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = evaluated(report_to="tensorboard")
    (file,) = out.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    for tag, key in (
        ("train/loss", "loss"),
        ("train/grad_norm", "grad_norm"),
        ("train/learning_rate", "learning_rate"),
        ("train/epoch", "epoch"),
        ("eval/loss", "eval_loss"),
        ("train/train_loss", "train_loss"),
    ):
        found = {event.step: event.value for event in events.Scalars(tag)}
        assert found == pytest.approx(by_step(out, key), rel=1e-6), tag
    assert {"args/text_summary", "model_config/text_summary", "run.json/text_summary"} <= set(events.Tags()["tensors"])
    assert "none" not in json.loads((out / "run.json").read_text())["config"]["report_to"]


class Artifact(SimpleNamespace):
    def new_file(self, name: str, mode: str) -> Any:
        self.files[name] = io.BytesIO()
        return contextlib.nullcontext(self.files[name])


class Tracker(ModuleType):
    """A tracker's package that remembers what it is told."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.__version__ = "9.9"
        self.begun: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.artifacts: list[tuple[Any, list[str]]] = []
        self.config: Any = type("Table", (dict,), {"update": lambda table, values, **_: dict.update(table, values)})()
        self.summary: dict[str, Any] = {}
        self.run: Any = None
        self.ended = False
        self.context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: self.begun[-1]["space_id"]))
        self.frozen: list[dict[str, Any]] = []

    def init(self, **options: Any) -> None:
        self.begun.append(options)
        log = lambda artifact, aliases: self.artifacts.append((artifact, aliases))  # noqa: E731
        name = options["name"]
        self.run = SimpleNamespace(id="7", name=name, url="u", summary=self.summary, log_artifact=log, _label=dict)

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.ended = True

    def freeze(self, **options: Any) -> str:
        self.frozen.append(options)
        return options["new_space_id"]

    def Artifact(self, **options: Any) -> Artifact:
        return Artifact(files={}, **options)


def put_in(module: Tracker, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Tracker:
    for name in ("wandb.sdk", "wandb.sdk.lib"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    errors = ModuleType("wandb.sdk.lib.config_util")
    errors.ConfigError = KeyError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, errors.__name__, errors)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return put_in(Tracker("wandb"), monkeypatch)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_wandb_is_given_what_it_asks_a_trainer_for(
    mode: str, evaluated: Run, wandb: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of the run, its arguments, the model's configuration and size, each log, and the model at the end."""
    monkeypatch.setenv("WANDB_LOG_MODEL", "end")
    out = evaluated(report_to=["wandb"], run_name="a name", train_mode=mode)
    assert [begun["name"] for begun in wandb.begun] == ["a name"]
    assert wandb.config["learning_rate"] == 0.01
    assert wandb.config["model_type"] == "qwen2"
    assert wandb.config["model/num_parameters"] > 10_000
    assert wandb.config["firefly/template_name"] == "default"
    losses = {line["train/global_step"]: line["train/loss"] for line in wandb.logged if "train/loss" in line}
    assert losses == by_step(out)
    assert [line["eval/loss"] for line in wandb.logged if "eval/loss" in line] == list(
        by_step(out, "eval_loss").values()
    )
    assert wandb.summary["train_loss"] == by_step(out, "train_loss")[STEPS]
    artifact, aliases = wandb.artifacts[-1]
    assert aliases == ["final_model"]
    file = "adapter_model.safetensors" if mode == "lora" else "model.safetensors"
    assert artifact.files.keys() >= {file, "tokenizer.json"}
    assert artifact.name == "model-a name"
    assert not [item for item in json.loads((out / "run.json").read_text())["notices"] if "report" in item["code"]]


def test_without_a_name_a_run_has_that_of_its_folder(run: Run, wandb: Tracker) -> None:
    run("folder", report_to="wandb", max_steps=1)
    assert [begun["name"] for begun in wandb.begun] == ["folder"]


def test_trackio_is_given_its_project_and_spaces(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = put_in(Tracker("trackio"), monkeypatch)
    run(
        report_to="trackio",
        run_name="a name",
        project="ours",
        trackio_space_id="space",
        trackio_bucket_id="bucket",
        trackio_static_space_id="still",
        hub_private_repo=True,
        max_steps=2,
    )
    (begun,) = trackio.begun
    assert (
        begun.items()
        >= {
            "project": "ours",
            "name": "a name",
            "space_id": "space",
            "bucket_id": "bucket",
            "private": True,
        }.items()
    )
    assert [line["train/global_step"] for line in trackio.logged] == [1, 2, 2]
    assert trackio.ended
    assert trackio.frozen == [{"space_id": "space", "project": "ours", "new_space_id": "still", "private": True}]


# ---- several ranks ----

RANK = """
import json, sys, torch
from firefly import ranks
from firefly.cli import main

told = {}
init, join = torch.nn.parallel.DistributedDataParallel.__init__, torch.distributed.init_process_group

def noted(self, *arguments, **options):
    names = ("find_unused_parameters", "bucket_cap_mb", "broadcast_buffers", "static_graph")
    told.update({name: options.get(name) or False for name in names})
    init(self, *arguments, **options)

def joined(*arguments, **options):
    told.update(backend=arguments[0] if arguments else options.get("backend"))
    return join(*arguments, **options)

torch.nn.parallel.DistributedDataParallel.__init__ = noted
torch.distributed.init_process_group = joined
code = main(sys.argv[1:])
with open(f"told-{ranks.rank()}.json", "w") as file:
    json.dump(told, file)
ranks.leave()
ranks.end(code)
"""


@pytest.mark.slow
def test_ranks_exchange_gradients_with_the_settings_of_ddp(place: Path, tmp_path: Path) -> None:
    settings = {
        "model_name_or_path": str(place / "model"),
        "train_file": str(place / "train.jsonl"),
        "output_dir": "out",
        "template_name": "default",
        "train_mode": "full",
        "per_device_train_batch_size": 2,
        "tokens_per_microbatch": 60,  # several microbatches, of which the last alone exchanges gradients
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "compare": False,
        "use_cpu": True,
        "bf16": False,
        "ddp_backend": "gloo",
        "ddp_timeout": 177,
        "ddp_bucket_cap_mb": 7,
        "ddp_broadcast_buffers": False,
        "ddp_find_unused_parameters": True,
    }
    (tmp_path / "run.json").write_text(json.dumps(settings), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    (tmp_path / "rank.py").write_text(RANK)
    done = subprocess.run(
        [sys.executable, *launcher, "rank.py", "train", "run.json"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "told-1.json").read_text()) == {
        "find_unused_parameters": False,
        "bucket_cap_mb": 7,
        "broadcast_buffers": False,
        "static_graph": False,
        "backend": "gloo",
    }
    said = " ".join(done.stderr.split())
    assert "ddp_find_unused_parameters has no effect" in said
    assert "ddp_timeout has no effect with use_cpu" in said


# ---- callbacks ----


class Watcher(TrainerCallback):
    """In TensorBoard's place, the one door through which a callback comes: notes the events, and steers."""

    events: list[tuple[str, int]]
    steer: Callable[[str, Any, Any], None]
    seen: dict[str, set[str]]


def _watched(event: str) -> Callable[..., Any]:
    def call(self: Any, args: Any, state: Any, control: Any, **given: Any) -> Any:
        type(self).events.append((event, state.global_step))
        type(self).seen.setdefault(event, set()).update(name for name, value in given.items() if value is not None)
        type(self).steer(event, state, control)
        return control

    return call


for _event in [name for name in dir(TrainerCallback) if name.startswith("on_")]:
    setattr(Watcher, _event, _watched(_event))


@pytest.fixture
def watcher(monkeypatch: pytest.MonkeyPatch) -> type[Watcher]:
    class Own(Watcher):
        events: list[tuple[str, int]] = []  # noqa: RUF012
        seen: dict[str, set[str]] = {}  # noqa: RUF012
        steer = staticmethod(lambda event, state, control: None)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Own)
    return Own


def test_callbacks_are_called_as_transformers_calls_them(
    evaluated: Run, place: Path, tmp_path: Path, watcher: type[Watcher]
) -> None:
    """The same events at the same steps with the same things as from a Trainer with as many steps."""
    flow = {
        "num_train_epochs": 2,
        "logging_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_on_start": True,
        "save_strategy": "epoch",
        "report_to": ["tensorboard"],
    }
    evaluated(**flow)
    ours, seen = list(watcher.events), {name: set(found) for name, found in watcher.seen.items()}
    watcher.events.clear()
    watcher.seen.clear()
    train_elsewhere(place, tmp_path / "reference", flow)
    apart = ("on_prediction_step", "on_substep_end")
    assert [event for event in ours if event[0] not in apart] == [e for e in watcher.events if e[0] not in apart]
    assert any(event == "on_prediction_step" for event, _ in ours)
    for event, names in watcher.seen.items():
        if event not in apart:
            assert seen[event] >= names, event


def test_a_callback_steers_the_run(evaluated: Run, watcher: type[Watcher]) -> None:
    def steer(event: str, state: Any, control: Any) -> None:
        if event == "on_step_end":
            control.should_log |= state.global_step == 1
            control.should_save |= state.global_step == 2
            control.should_evaluate |= state.global_step == 2
            control.should_epoch_stop |= state.global_step == 3
            control.should_training_stop |= state.global_step == 5

    watcher.steer = staticmethod(steer)
    out = evaluated(
        num_train_epochs=3, logging_strategy="epoch", eval_strategy="no", save_strategy="no", report_to="tensorboard"
    )
    assert list(by_step(out)) == [1, 3, 5]
    assert list(by_step(out, "eval_loss")) == [2]
    assert checkpoints(out) == [2]
    epochs = {line["step"]: line["epoch"] for line in read_metrics(out / "metrics.jsonl")}
    assert epochs == {1: 0.25, 2: 0.5, 3: 0.75, 5: 1.5}


def test_the_best_model_of_a_schedule_free_optimizer_is_not_moved_again(
    evaluated: Run, watcher: type[Watcher], schedulefree: None
) -> None:
    """Not even where the run ends right behind a step, when other weights are still in its place."""

    def stop(event: str, state: Any, control: Any) -> None:
        control.should_training_stop |= event == "on_step_end" and state.global_step == 5

    watcher.steer = staticmethod(stop)
    out = evaluated(
        optim="schedule_free_sgd",
        lr_scheduler_type="constant",
        learning_rate=1.0,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        num_train_epochs=3,
        load_best_model_at_end=True,
        report_to="tensorboard",
    )
    assert list(by_step(out)) == [1, 2, 3, 4, 5]
    best = state_of(out).best_global_step
    assert_same(weights(out), weights(out / f"checkpoint-{best}"), 0)


# ---- what a checkpoint holds ----


def test_the_state_of_a_checkpoint_is_the_one_that_transformers_would_leave(
    evaluated: Run, place: Path, tmp_path: Path
) -> None:
    """The same fields, and the same names of values at the same steps of its history."""
    flow = {
        "num_train_epochs": 2,
        "logging_steps": 3,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "include_num_input_tokens_seen": "all",
    }
    out = evaluated(**flow)
    train_elsewhere(place, tmp_path / "reference", flow)
    found, expected = (
        json.loads((folder / "checkpoint-8" / "trainer_state.json").read_text())
        for folder in (out, tmp_path / "reference")
    )
    assert found.keys() == expected.keys()
    same = (
        *("epoch", "global_step", "max_steps", "num_train_epochs", "train_batch_size"),
        *("logging_steps", "eval_steps", "save_steps", "is_hyper_param_search", "is_world_process_zero"),
        *("is_local_process_zero", "trial_name", "trial_params"),
    )
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}
    assert found["stateful_callbacks"].keys() >= expected["stateful_callbacks"].keys()
    assert found["stateful_callbacks"]["TrainerControl"]["args"].keys() == (
        expected["stateful_callbacks"]["TrainerControl"]["args"].keys()
    )
    assert [(entry["step"], entry["epoch"]) for entry in found["log_history"]] == [
        (entry["step"], entry["epoch"]) for entry in expected["log_history"]
    ]
    for ours, theirs in zip(found["log_history"], expected["log_history"], strict=True):
        assert ours.keys() >= theirs.keys()
    assert found["total_flos"] > 0
    lengths = [len(example.input_ids) for example in by_hand(place / "train.jsonl")]
    assert found["num_input_tokens_seen"] == 2 * sum(lengths)


def test_the_files_of_a_checkpoint_are_read_by_torch_and_transformers(run: Run, place: Path) -> None:
    out = run(save_strategy="epoch", train_mode="lora", lora_rank=4, lora_dropout=0.0)
    folder = out / f"checkpoint-{STEPS}"
    assert {path.name for path in folder.iterdir()} >= {
        *("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"),
        *("adapter_model.safetensors", "adapter_config.json", "tokenizer.json"),
    }
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    assert [len(group["params"]) for group in optimizer["param_groups"]] == [28, 0]
    assert len(optimizer["state"]) == 28
    schedule = get_scheduler("linear", torch.optim.AdamW([torch.zeros(1)]), 0, STEPS)
    assert torch.load(folder / "scheduler.pt", weights_only=True).keys() == schedule.state_dict().keys()
    with safe_globals():
        chance = torch.load(folder / "rng_state.pth", weights_only=True)
    assert {"python", "numpy", "cpu"} <= chance.keys()
    arguments = torch.load(folder / "training_args.bin", weights_only=False)
    assert isinstance(arguments, TrainingArguments)
    assert arguments.learning_rate == 0.01
