"""Memory of a training step before the run: what a pass keeps per token is measured on the model itself, the rest
follows from its weights.

Two questions are asked. What a run may choose (`forecast_memory`, for `choices`) needs the bytes that grow with a
microbatch. What a run will take at its peak (`assemble`, for people) adds what libraries and the allocator take.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from firefly.files import read_proc
from firefly.models.checkpointing import Checkpointing
from firefly.models.kernels.token_nll import ROWS_AT_A_TIME, chunk_bytes
from firefly.ranks import local_world_size
from firefly.translation import Phrase


@dataclass(frozen=True)
class Activations:
    """Bytes that a training pass keeps per token until backward.

    Attributes:
        layers: decoder layers that can be checkpointed.
        kept: of one layer, on average, when all that its gradient needs is kept.
        entering: of one layer's input, all that a checkpointed layer keeps.
        outside: of what lies before and after the layers (the last norm, the head's gradient).
    """

    layers: int
    kept: float
    entering: int
    outside: float

    def per_token(self, checkpointing: Checkpointing) -> float:
        """Bytes per token at the peak: the first layers are checkpointed, so when one of them is computed again all
        later layers are through and their bytes free."""
        again = min(checkpointing.layers, self.layers)
        kept = self.kept * max(self.layers - again, min(again, 1))
        entering = self.entering * (1 if checkpointing.offload and again else again)
        return kept + entering + self.outside


@dataclass(frozen=True)
class Peak:
    """Bytes that live at the peak of a step besides weights and optimizer.

    Attributes:
        activations: what layers keep and compute with.
        head: logits of a chunk and what else the head makes.
        gradients: of trained weights, as far as they are there.
        kernels: different products in 16 bit that a microbatch asks for: a CPU makes code for each.
    """

    activations: int
    head: int
    gradients: int
    kernels: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.head + self.gradients


PARTS = {
    "weights": Phrase("weights"),
    "adapter": Phrase("adapter (fp32)"),
    "optimizer": Phrase("optimizer state"),
    "gradients": Phrase("gradients"),
    "activations": Phrase("activations"),
    "head": Phrase("head: logits of a chunk"),
    "cache": Phrase("cache of 4-bit weights in 16 bit"),
    "reference": Phrase("reference model"),
    "libraries": Phrase("libraries"),
    "kernels": Phrase("code made for 16-bit products"),
    "allocator": Phrase("unused between blocks (allocator)"),
}
"""What the parts of a forecast are called."""


@dataclass(frozen=True)
class Forecast:
    """Bytes by part, what of them is on the device already, and what the device has free now."""

    parts: dict[str, int]
    loaded: int
    available: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def missing(self) -> int:
        """Bytes that the run still has to get."""
        return self.total - self.loaded

    def beside(self, measured: int, kind: str) -> dict[str, int]:
        """What was forecast and what was measured, comparable: a card's allocator knows nothing of the context."""
        uncounted = self.parts.get("libraries", 0) if kind == "cuda" else 0
        return {"forecast_memory_bytes": self.total - uncounted, "run_memory_bytes": measured}


def forecast_memory(
    model: Any,
    device: torch.device,
    activations: Activations,
    checkpointing: Checkpointing,
    tokens: int,
    optimizer_bytes: int = 8,
    weight_cache: int = 0,
    reference: int = 0,
    available: int | None = None,
) -> Forecast:
    """Forecast the peak of a training step on `model` (adapters attached) with `tokens` in a microbatch.

    Args:
        optimizer_bytes: state per trained number (see `optimizer_bytes_of`).
        weight_cache: bytes of 16-bit copies of 4-bit weights.
        reference: bytes of a second model that the loss compares with.
        available: bytes that the device has free; None: those it has now.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts = {
        "weights": weights,
        "masters": 4 * trained,
        "gradients": 4 * trained,
        "optimizer": optimizer_bytes * trained,
        "activations": int(activations.per_token(checkpointing) * tokens),
        "head": head_bytes(model, device, tokens, 2),
    }
    parts |= {name: size for name, size in {"weight cache": weight_cache, "reference": reference}.items() if size}
    # A CPU's weights may be pages of a file, which count as free until they are touched.
    loaded = weights + 4 * trained if device.type == "cuda" else 0
    return Forecast(parts, loaded, free_memory(device) if available is None else available)


HOLES, HOLES_OF_4_BIT, HOLES_MORE, HOLES_MOST = 0.12, 0.13, 0.012, 0.7
"""What a CPU's heap grows by beyond what lives on it, as a share of what a step takes and gives back: at first, more
where 4-bit weights are dequantised in between, more by each microbatch, and at most. All of a run's memory is on the
heap and stays there (`runs.memory.keep_freed_memory`), and microbatches of other sizes leave holes in which the next
one's arrays do not fit. Measured with glibc 2.36, torch 2.13 and SmolLM2-135M (benchmarks/results/plan.json)."""

KERNELS, KERNELS_OF_SHORT_ROWS, SHORT = 192, 1024, 80
"""Pieces of code for 16-bit products that a CPU keeps at most (`runs.memory.keep_few_kernels`); where segments are
shorter than so many tokens on average, one microbatch attends over so many lengths that it needs more of them. Measured
with SmolLM2-135M: 30 in any microbatch, and 6 for each length in it, of which 2,048 tokens have 26 at most then."""

KERNEL_BYTES = 570_000
"""oneDNN makes code for every shape of a 16-bit product; 0.5 to 0.7 MB each, measured with torch 2.13 on a CPU with
AVX-512 BF16. Without 16-bit products there is none."""

LIBRARIES = {"cpu": 130 << 20, "cuda": 600 << 20}
"""What a process takes besides: on a CPU what a run loads after its imports (measured: 110 to 130 MiB); on a card the
CUDA context with its kernels, which no allocator counts (usual figure, not measured)."""

PRODUCTS = 75
"""Different 16-bit products of a Llama with adapters in one microbatch, forward and backward."""


def kernels_kept(task: str, lengths: np.ndarray, targets: np.ndarray) -> int:
    """How many pieces of code for 16-bit products a CPU should keep: those of a microbatch, which every layer asks for
    again, with room to spare.

    Args:
        lengths, targets: tokens of each example and those that are trained.
    """
    # All of a block of documents is trained but each one's first token; a pair is a prompt and two answers.
    segments = int((lengths - targets).sum()) if task == "pretrain" else len(lengths) * (3 if task == "dpo" else 1)
    return KERNELS if lengths.sum() >= SHORT * segments else KERNELS_OF_SHORT_ROWS


def head_bytes(model: Any, device: torch.device, tokens: int, size: int) -> int:
    """At the head's peak: a chunk's logits, numbers of `size` bytes, and what is made of them in fp32."""
    vocabulary = model.config.get_text_config().vocab_size
    chunk = chunk_bytes(device, tokens, vocabulary, size)
    rows = chunk // (vocabulary * size)
    return chunk + 4 * vocabulary * (min(rows, ROWS_AT_A_TIME) if device.type == "cpu" else rows)


def assemble(
    model: Any,
    kind: str,
    peak: Peak,
    *,
    optimizer_bytes: int,
    cache: int = 0,
    reference: int = 0,
    microbatches: int = 1000,
    shapes: int = 1000,
    kernels: int = KERNELS,
    available: int,
) -> Forecast:
    """The peak of a run of `model` (adapters attached, on any device) by part; parts of no size are left out.

    Args:
        kind: "cpu" or "cuda".
        peak: of a step (see `dry_run`), or the run's own estimate of it (`estimated_peak`).
        optimizer_bytes, cache, reference: as for `forecast_memory`.
        microbatches: that the run computes.
        shapes: different numbers of tokens that they have, about.
        kernels: pieces of code for 16-bit products that are kept at most.
    """
    frozen = sum(_bytes_of(p) for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = not frozen
    # Weights change when all gradients are there and no activation is; mostly that takes less.
    updating = 4 * trained > peak.total
    activations, head = (0, 0) if updating else (peak.activations, peak.head)
    parts = {
        "weights": 4 * trained if whole else frozen,
        "adapter": 0 if whole else 4 * trained,
        "optimizer": optimizer_bytes * trained,
        "gradients": 4 * trained if updating else peak.gradients,
        "activations": activations,
        "head": head,
        "cache": cache,
        "reference": reference,
        "libraries": LIBRARIES[kind],
    }
    if kind == "cpu":
        parts["kernels"] = min(kernels, peak.kernels * min(microbatches, shapes)) * KERNEL_BYTES
        first = HOLES + (HOLES_OF_4_BIT if any(hasattr(p, "quant_state") for p in model.parameters()) else 0)
        parts["allocator"] = int(min(first + HOLES_MORE * microbatches, HOLES_MOST) * peak.total)
    return Forecast({name: size for name, size in parts.items() if size}, 0, available)


def estimated_peak(
    model: Any, device: torch.device, activations: Activations, checkpointing: Checkpointing, tokens: int, size: int
) -> Peak:
    """The peak of a step from what a pass was measured to keep, for a run that begins: nothing is computed for it.

    Args:
        tokens: of the largest microbatch.
        size: bytes of a number in the compute type.
    """
    return Peak(
        activations=int(activations.per_token(checkpointing) * tokens),
        head=head_bytes(model, device, tokens, size),
        gradients=sum(4 * p.numel() for p in model.parameters() if p.requires_grad),
        kernels=PRODUCTS if size == 2 else 0,
    )


def _bytes_of(parameter: Any) -> int:
    """Of a 4-bit weight with its constants: a byte for each block of 64, and 4 for 256 of those."""
    state = getattr(parameter, "quant_state", None)
    size = parameter.numel() * parameter.element_size()
    return size if state is None else size + sum(part.numel() * part.element_size() for part in _constants(state))


def _constants(state: Any) -> Iterator[Tensor]:
    nested = getattr(state, "state2", None)
    for part in (state.absmax, *(() if nested is None else _constants(nested))):
        if isinstance(part, Tensor):
            yield part


def optimizer_bytes_of(name: str) -> int:
    """Bytes of state per trained number: two moments in fp32 for Adam and its kin, in 8 bit where the name says so."""
    if "8bit" in name:
        return 2
    if name.startswith(("sgd", "adagrad", "rmsprop", "lion")):
        return 4
    return 8


def free_memory(device: torch.device) -> int:
    """Bytes that this rank could still take: on a CPU its part of what the machine and its control groups have free."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    available = read_proc("/proc/meminfo", "MemAvailable")
    if available is None:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([available, *cgroup_room()]) // local_world_size()


def cgroup_room(process: Path = Path("/proc/self")) -> Iterator[int]:
    """Bytes that each control group around a process (cgroup v1 or v2, from the innermost out) may still take: its
    limit without what it uses, of which the page cache can be taken back. Groups without a limit are left out.

    A container has a limit of its own, which /proc/meminfo, the whole machine's, does not show.
    """
    try:
        groups = [line.split(":", 2) for line in (process / "cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (process / "mountinfo").read_text().splitlines()]
    except OSError:
        return
    for fields in mounts:
        # 36 35 98:0 ROOT MOUNT_POINT OPTIONS … - TYPE SOURCE SUPER_OPTIONS
        root, mount = PurePosixPath(fields[3]), Path(fields[4])
        kind, _, options = fields[fields.index("-") + 1 :][:3]
        if kind == "cgroup2":
            path = next((path for number, _, path in groups if number == "0"), None)
            limits, usage, cached = ("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")
        elif kind == "cgroup" and "memory" in options.split(","):
            path = next((path for _, names, path in groups if "memory" in names.split(",")), None)
            limits, usage = ("memory.limit_in_bytes",), "memory.usage_in_bytes"
            cached = ("total_inactive_file", "total_active_file")
        else:
            continue
        # In a container without a namespace of its own the path is the host's, and only what lies below ROOT is shown.
        group = PurePosixPath(path or "/")
        inside = group.relative_to(root) if group.is_relative_to(root) else PurePosixPath()
        for level in (inside, *inside.parents):
            folder = mount / level
            try:
                found = [(folder / name).read_text().strip() for name in limits]
                used = int((folder / usage).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except OSError:  # the outermost group has no limit, and so no such files
                continue
            used -= sum(int(stat.get(name, 0)) for name in cached)
            yield from (max(int(limit) - used, 0) for limit in found if limit != "max")
