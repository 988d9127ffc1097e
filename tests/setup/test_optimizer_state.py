"""What an optimizer keeps is counted on the optimizer itself, which steps on arrays without numbers."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import trainer_optimizer

from firefly.config import load_config
from firefly.distributed.model import create_optimizer
from firefly.setup.plan import _optimizer_arguments
from firefly.setup.tuning import count_optimizer_state, optimizer_state_bytes
from tiny import tiny_model


class Model(nn.Module):
    """An embedding, weights of which bitsandbytes keeps some in 8 bit and small ones in 32, a bias and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, 64)
        self.wide = nn.Linear(64, 256)
        self.narrow = nn.Linear(256, 64, bias=False)
        self.norm = nn.LayerNorm(64)
        self.frozen = nn.Linear(64, 64).requires_grad_(False)


def arguments(**keys: Any) -> Any:
    return _optimizer_arguments(
        load_config({"model_name_or_path": "m", "train_file": "f", "output_dir": "o", "optim_args": None} | keys)
    )


def kept(value: Any) -> dict[int, int]:
    """Bytes by storage of what a real optimizer holds."""
    if isinstance(value, Tensor):
        return {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()}
    parts = value.values() if hasattr(value, "values") else value if isinstance(value, list | tuple) else ()
    return {address: size for part in parts for address, size in kept(part).items()}


def really_kept(args: Any) -> int:
    model = Model()
    optimizer = create_optimizer(model, args)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return sum(kept(list(optimizer.state.values())).values())


@pytest.mark.parametrize(
    "keys",
    [
        *({"optim": name} for name in ("adamw_torch", "adamw_torch_fused", "adafactor", "adagrad", "rmsprop", "sgd")),
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"optim": "rmsprop", "optim_args": "momentum=0.9,centered=true"},
        *({"optim": name} for name in ("adamw_8bit", "lion_8bit", "lion_32bit", "ademamix", "rmsprop_bnb_8bit")),
        *({"optim": name} for name in ("paged_adamw_32bit", "paged_adamw_8bit", "paged_lion_8bit")),
    ],
    ids=lambda keys: "-".join(keys.values()),
)
def test_the_bytes_counted_are_those_that_the_optimizer_keeps(keys: dict[str, str]) -> None:
    if "8bit" in keys["optim"] or "paged" in keys["optim"] or keys["optim"] in ("ademamix", "lion_32bit"):
        pytest.importorskip("bitsandbytes")
    args, model = arguments(**keys), Model()
    before = dict(model.named_parameters())
    assert count_optimizer_state(model, args, keys["optim"]) == really_kept(args)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in before.values())


def test_counting_leaves_no_settings_behind_for_the_weights_of_another_model() -> None:
    """bitsandbytes keeps what is special of a weight by the number of its object, for the whole process."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, args = Model(), arguments(optim="adamw_8bit")
    count_optimizer_state(model, args, "adamw_8bit")
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    assert manager.module_weight_config_triple == []
    assert manager.pid2config == manager.index2config == {}


def test_low_rank_state_counts_with_the_projector_that_belongs_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Projector:
        def __init__(self, weight: Tensor, rank: int) -> None:
            self.matrix = weight.new_empty(rank, weight.shape[1])

    class GaLoreAdamW(torch.optim.SGD):
        def __init__(self, groups: Any, **options: Any) -> None:
            super().__init__(groups, lr=1.0)

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    rank = group.get("rank")
                    if rank and p.grad is not None:
                        self.state[p] = {"seed": p.grad.sum().item(), "projector": Projector(p, rank)}
                        self.state[p]["exp_avg"] = p.new_empty(p.shape[0], rank)

    module = ModuleType("galore_torch")
    module.GaLoreAdamW = module.GaLoreAdamW8bit = module.GaLoreAdafactor = GaLoreAdamW  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "galore_torch", module)
    monkeypatch.setattr(trainer_optimizer, "is_galore_torch_available", lambda: True)
    args = arguments(optim="galore_adamw", optim_target_modules=["wide", "narrow"], optim_args="rank=4")
    assert count_optimizer_state(Model(), args, "galore_adamw") == 4 * 4 * (64 + 256 + 256 + 64)


def test_what_cannot_be_counted_is_taken_for_adam_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama")
    trained = sum(p.numel() for p in model.parameters())
    assert optimizer_state_bytes(model, arguments(optim="adamw_anyprecision")) == 8 * trained
    assert "optim adamw_anyprecision: what it keeps cannot be counted" in capsys.readouterr().err


def test_a_models_state_is_counted_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FIREFLY_CACHE", str(tmp_path))
    model = tiny_model("llama")
    found = [optimizer_state_bytes(model, arguments(optim=name)) for name in ("adamw_torch", "sgd")]
    monkeypatch.setattr("firefly.setup.tuning.count_optimizer_state", lambda *_: -1)
    again = [optimizer_state_bytes(model, arguments(optim=name)) for name in ("adamw_torch", "sgd", "adagrad")]
    assert again == [*found, -1]
