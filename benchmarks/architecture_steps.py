"""One training step of a tiny model, by Firefly and by plain transformers and peft, and how far they are apart.

Firefly's side goes the way of a run: `load_model`, `cached_layout`, `attach_adapter`, `install_training_forwards`, the
measurement of what a pass keeps, and a step of SFT in several packed microbatches. The plain side computes
each example alone through an untouched model, with the textbook's loss: the sum of the targets' negative
log-probabilities over their number, and the router loss of transformers where the architecture has one.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tiny_architectures import FIRST_ID, LAST_ID
from torch import Tensor

from firefly.config import AdapterConfig, Config, ModelConfig
from firefly.data.batching import StepSettings
from firefly.data.examples import INDEX, ExampleCounts, index_entry
from firefly.data.schema import IGNORE, Source, Tokens
from firefly.distributed.model import TrainableModel
from firefly.models.adapters import attach_adapter, transformers_model
from firefly.models.attention import use_crossover
from firefly.models.checkpointing import Checkpointing, decoder_layers, install_checkpointing
from firefly.models.forwards import install_training_forwards
from firefly.models.kernels.segment_attention import GEMM_LONGEST
from firefly.models.loading import load_model
from firefly.models.precision import Precision
from firefly.models.probe_cache import cached_activations, cached_layout
from firefly.models.router import SAMPLING_ROUTERS, disable_router_noise
from firefly.models.tuning import Choices
from firefly.setup.arguments import training_arguments
from firefly.tasks import TASKS
from firefly.tasks.base import ComputedStep, Forward

CPU = torch.device("cpu")
LENGTHS = (5, 33, 12, 48, 2, 21, 27, 9)
TOKENS_PER_MICROBATCH = 64
FLOOR = 1e-3
"""A tensor whose gradient is shorter than this share of the whole gradient's is judged by that share of it."""


@dataclass(frozen=True)
class Outcome:
    """Of one step.

    Attributes:
        loss: of the whole step.
        logps: (targets,) fp64, of all examples in their order.
        gradients: of what is trained.
    """

    loss: float
    logps: Tensor
    gradients: dict[str, Tensor]


class Listed:
    """Examples in a list, where a run's lie in a memory-mapped file."""

    def __init__(self, examples: list[Tokens]) -> None:
        self.examples = examples
        index = np.array([index_entry(example, 0, row) for row, example in enumerate(examples)], dtype=INDEX)
        self.names: list[str] = []
        self.counts = ExampleCounts.of(index, np.zeros(len(examples), np.int64))

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Tokens:
        return self.examples[index]

    def place(self, index: int) -> Source:
        return Source("listed", index + 1)


def random_rows(seed: int) -> list[Tokens]:
    """Rows of random ids, of which a random share is trained."""
    generator = np.random.default_rng(seed)
    rows = []
    for length in LENGTHS:
        ids = generator.integers(FIRST_ID, LAST_ID + 1, length).astype(np.int32)
        trained = generator.random(length) < 0.7
        trained[-1] = True
        rows.append(Tokens(ids, np.where(trained, ids, IGNORE).astype(np.int32)))
    return rows


# ---- Firefly ----


class Ours:
    """A model as a run prepares it."""

    def __init__(self, folder: Path, mode: str, compute: torch.dtype, scratch: Path) -> None:
        self.mode, self.compute, self.scratch = mode, compute, scratch
        precision = Precision(compute)
        config = ModelConfig(name_or_path=str(folder), add_tokens=None)
        self.config = Config(task_type="sft", model=config)
        model = load_model(config, mode, precision, CPU)
        self.layout, self.reason = cached_layout(model)
        self.model = attach_adapter(model, AdapterConfig(mode=mode, rank=4, alpha=8, dropout=0.0))
        disable_router_noise(self.model)
        if mode == "lora":
            randomise(self.model)
        self.head = install_training_forwards(self.model)
        self.inner = transformers_model(self.model)
        by_products = GEMM_LONGEST[compute]  # a run measures; our own kernel is tested here
        use_crossover(self.inner, by_products)
        autocast = compute if mode == "full" and compute != torch.float32 else None
        cached_activations(self.inner, self.layout, autocast, max(LENGTHS))
        self.choices = Choices(TOKENS_PER_MICROBATCH, attention_by_products=by_products)

    def step(self, rows: list[Tokens]) -> Outcome:
        """Loss, log-probabilities and gradients of one step."""
        arguments = {
            "output_dir": str(self.scratch),
            "per_device_train_batch_size": len(rows),
            "use_cpu": True,
            "report_to": "none",
            "dataloader_pin_memory": False,
        }
        model = TrainableModel(
            self.model,
            training_arguments(arguments),
            layout=self.layout,
            choices=self.choices,
            precision=Precision(self.compute),
        )
        task = TASKS["sft"](self.config)
        (step,) = list(task.steps(Listed(rows), StepSettings(len(rows)), model))  # type: ignore[arg-type]
        model.zero_gradients()
        computed = task.backward(model, step)
        assert isinstance(computed, ComputedStep)
        loss, forward = float(computed.loss), Forward(model)
        logps: dict[int, Tensor] = {}
        with torch.no_grad():
            for batch, numbers in zip(step.microbatches, step.example_ids, strict=True):
                parts = [forward(row, per_token=True)["logps"] for row in task.rows_of(batch, model.solo)]
                counts = [rows[number].num_targets for number in numbers]
                logps |= dict(zip(numbers, torch.cat(parts).double().split(counts), strict=True))
        return Outcome(loss, torch.cat([logps[number] for number in range(len(rows))]), gradients(self.model))

    def step_with_layers_computed_again(self, rows: list[Tokens]) -> Outcome | None:
        """As `step`, with every layer checkpointed, as a run does where memory is short; None without such layers."""
        layers = len(decoder_layers(self.inner))
        if not layers:
            return None
        install_checkpointing(self.inner, Checkpointing(layers))
        try:
            return self.step(rows)
        finally:
            install_checkpointing(self.inner, Checkpointing(0))


def randomise(wrapped: Any) -> None:
    """Give adapters numbers that do something: a fresh one's B is zero and hides gradients."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def gradients(model: Any) -> dict[str, Tensor]:
    """Those that are there, in fp64."""
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


# ---- plain transformers and peft ----


class Plain:
    """The untouched model, with peft's own layers and the numbers of our adapter where there is one."""

    def __init__(self, folder: Path, adapted: Any, compute: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        dtype = compute if adapted is not None else torch.float32
        self.autocast = compute if adapted is None and compute != torch.float32 else None
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.coefficient, self.balance = router_loss_of(self.model)
        if adapted is None:
            self.model.requires_grad_(True)
        else:
            from peft import get_peft_model

            self.model = get_peft_model(self.model, copy.deepcopy(adapted.peft_config["default"]))
            trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
            own = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            assert own.keys() == trained.keys(), sorted(own.keys() ^ trained.keys())[:4]
            with torch.no_grad():
                for name, parameter in own.items():
                    parameter.copy_(trained[name])
        self.model.train()  # as one trains; no architecture here has dropout
        for module in self.model.modules():
            if type(module).__name__ in SAMPLING_ROUTERS:
                module.eval()  # these draw experts at random, which Firefly rests

    def step(self, rows: list[Tokens]) -> Outcome:
        """The same for each example alone."""
        self.model.zero_grad()
        logps, router = [], []
        for row in rows:
            ids, labels = (torch.from_numpy(values).long() for values in (row.input_ids, row.labels))
            asked = {"output_router_logits": True} if self.coefficient else {}
            with torch.autocast("cpu", self.autocast or torch.bfloat16, enabled=self.autocast is not None):
                output = self.model(input_ids=ids[None], use_cache=False, **asked)
            kept = labels[1:] != IGNORE
            logits = output.logits[0, :-1].float()
            logps.append(-F.cross_entropy(logits[kept], labels[1:][kept], reduction="none"))
            router.append(getattr(output, "router_logits", None) or ())
        all_logps = torch.cat(logps)
        loss = -all_logps.mean()
        layers = [torch.cat([each.flatten(0, -2) for each in of_layer]) for of_layer in zip(*router, strict=True)]
        if layers:
            loss = loss + self.coefficient * self.balance(tuple(layers))
        loss.backward()
        return Outcome(float(loss.detach()), all_logps.detach().double(), gradients(self.model))


def router_loss_of(model: Any) -> tuple[float, Any]:
    """The coefficient of an architecture's router loss, and transformers' own function of the layers' logits.

    Families have a coefficient also where no layer has experts, and some record no logits: those have no such loss.
    """
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    coefficient = getattr(model, "router_aux_loss_coef", None) or getattr(model, "aux_loss_coef", None)
    if not coefficient or function is None:
        return 0.0, None
    with torch.no_grad():
        row = torch.arange(FIRST_ID, FIRST_ID + 4)[None]
        if not getattr(
            model.base_model(input_ids=row, use_cache=False, output_router_logits=True), "router_logits", None
        ):
            return 0.0, None
    return coefficient, lambda layers: function(layers, model.num_experts, model.num_experts_per_tok)


# ---- how far apart ----


def loss_gap(found: Outcome, expected: Outcome) -> float:
    """As a share of the loss."""
    return abs(found.loss - expected.loss) / abs(expected.loss)


def worst_gradient(found: Outcome, expected: Outcome) -> tuple[float, str]:
    """The largest distance of any trained tensor's gradient, as a share of its length, and the tensor's name.

    A tensor without a gradient counts as zero; see `FLOOR` for short ones.
    """
    whole = length(expected.gradients)
    worst = (0.0, "")
    for name in expected.gradients.keys() | found.gradients.keys():
        one, other = found.gradients.get(name), expected.gradients.get(name)
        size = 0.0 if other is None else float(other.norm())
        apart = float((one - other).norm()) if one is not None and other is not None else None
        if apart is None:
            present = one if one is not None else other
            assert present is not None
            apart = float(present.norm())
        share = apart / max(size, FLOOR * whole, 1e-30)
        worst = max(worst, (share if share == share else float("inf"), name))  # NaN is not equal to itself
    return worst


def gradient_gap(found: Outcome, expected: Outcome) -> float:
    """The distance of all gradients together, as a share of the expected ones' length."""
    names = expected.gradients.keys() | found.gradients.keys()
    zero = torch.zeros(())
    apart = {name: found.gradients.get(name, zero) - expected.gradients.get(name, zero) for name in names}
    return length(apart) / max(length(expected.gradients), 1e-30)


def logp_gap(found: Outcome, expected: Outcome) -> float:
    """Root mean square of the distance of a target's log-probability."""
    return float((found.logps - expected.logps).square().mean().sqrt())


def length(gradients: dict[str, Tensor]) -> float:
    """Of all tensors as one vector."""
    return float(sum(value.square().sum() for value in gradients.values()) ** 0.5)
