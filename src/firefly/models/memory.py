"""The memory forecast of a run: the same one for autotuning and for reports.

Weights, optimizer state and gradients follow from the model. The rest of a step comes from `dry_run`, measured
(`Activations`, from which `estimated_peak` makes the peak of any microbatch) or counted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firefly.control_groups import PROCESS, control_groups
from firefly.files import read_proc
from firefly.models.checkpointing import Checkpointing
from firefly.models.kernels.token_nll import ROWS_AT_A_TIME, chunk_bytes
from firefly.models.scores import scores
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
        """Bytes per token at the peak: the first layers are checkpointed, so when one of them is recomputed all
        later layers are through and their bytes free."""
        recomputed = min(checkpointing.layers, self.layers)
        kept = self.kept * max(self.layers - recomputed, min(recomputed, 1))
        entering = self.entering * (1 if checkpointing.offload and recomputed else recomputed)
        return kept + entering + self.outside


@dataclass(frozen=True)
class Peak:
    """Bytes that live at the peak of a step besides weights and optimizer.

    Attributes:
        activations: what layers keep and compute with.
        head: logits of a chunk and what else the head makes.
        gradients: of trained weights, as far as they are there.
    """

    activations: int
    head: int
    gradients: int

    @property
    def total(self) -> int:
        return self.activations + self.head + self.gradients


PARTS = {
    "weights": Phrase("weights"),
    "adapter": Phrase("adapter (fp32)"),
    "adapters": Phrase("adapters"),
    "optimizer": Phrase("optimizer state"),
    "gradients": Phrase("gradients"),
    "activations": Phrase("activations"),
    "head": Phrase("head: logits of a chunk"),
    "cache": Phrase("cache of 4-bit weights in 16 bit"),
    "reference": Phrase("reference model"),
    "kv_cache": Phrase("key-value cache"),
    "masks": Phrase("attention masks and indices of the cache"),
    "work": Phrase("a step's own arrays"),
    "libraries": Phrase("libraries"),
    "kernels": Phrase("oneDNN primitives"),
    "allocator": Phrase("unused between blocks (allocator)"),
}
"""The names of a forecast's parts."""


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
        """Bytes that the run has yet to allocate."""
        return self.total - self.loaded

    def beside(self, measured: int, kind: str) -> dict[str, int]:
        """What was forecast and what was measured, comparable: a GPU's allocator knows nothing of the context."""
        uncounted = self.parts.get("libraries", 0) if kind == "cuda" else 0
        return {"forecast_memory_bytes": self.total - uncounted, "run_memory_bytes": measured}


FRAGMENTATION = {"cpu": 1 / 3, "cuda": 0.0}
"""Heap that lies unused between blocks, as a share of what a step takes and gives back. On a CPU all of a run's memory
is on the heap and stays there (`runs.memory.keep_freed_memory`), and microbatches of other sizes leave holes in which
the next one's arrays do not fit. Of SmolLM2-135M's runs (glibc 2.36, torch 2.13) it was 0.33 to 0.51 after eight steps,
0.02 to 0.23 after two of nearly one size, once 0.7."""

LIBRARIES = {"cpu": 130 << 20, "cuda": 600 << 20}
"""What a process takes besides: on a CPU what a run loads after its imports (measured: 110 to 130 MiB); on a GPU the
CUDA context with its kernels, which no allocator counts (usual figure, not measured)."""

PRIMITIVES, PRIMITIVES_OF_SHORT_ROWS, SHORT = 192, 1024, 80
"""The most primitives for 16-bit matmuls that oneDNN caches on a CPU (`runs.memory.cap_onednn_cache`). Where segments
are shorter than SHORT tokens on average, one microbatch has so many lengths that it needs more of them. Measured with
SmolLM2-135M: 30 in any microbatch, and 6 for each length in it, of which 2,048 tokens have 26 at most then."""

PRIMITIVE_BYTES = 570_000
"""oneDNN compiles a primitive for every shape of a 16-bit matmul; 0.5 to 0.7 MB each, measured with torch 2.13 on a CPU
with AVX-512 BF16. Without 16-bit matmuls there is none."""


def forecast_memory(
    model: Any,
    device: torch.device,
    peak: Peak,
    *,
    optimizer: int,
    cache: int = 0,
    reference: int = 0,
    primitives: int = 0,
    available: int,
) -> Forecast:
    """The peak of a run of `model` (adapters attached, on any device) on `device`; parts of no size are left out.

    Args:
        peak: of a step (see `dry_run`), or the run's own estimate of it (`estimated_peak`).
        optimizer: bytes of its state.
        cache: bytes of 16-bit copies of 4-bit weights.
        reference: bytes of a second model that the loss compares with.
        primitives: oneDNN's, that are compiled and cached.
        available: bytes that the device has free.
    """
    frozen = sum(bytes_of(p) for p in model.parameters() if not p.requires_grad)
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Weights change when all gradients are there and no activation is; mostly that takes less.
    updating = trained > peak.total
    parts = {
        "weights": frozen or trained,
        "adapter": trained if frozen else 0,
        "optimizer": optimizer,
        "gradients": trained if updating else peak.gradients,
        "activations": 0 if updating else peak.activations,
        "head": 0 if updating else peak.head,
        "cache": cache,
        "reference": reference,
        "libraries": LIBRARIES[device.type],
        "kernels": primitives * PRIMITIVE_BYTES,
        "allocator": int(FRAGMENTATION[device.type] * peak.total),
    }
    # A CPU's weights may be pages of a file, which count as free until they are touched.
    there = ("weights", "adapter", "libraries") if device.type == "cuda" else ()
    found = {name: size for name, size in parts.items() if size}
    return Forecast(found, sum(parts[name] for name in there), available)


def estimated_peak(
    model: Any, device: torch.device, activations: Activations, checkpointing: Checkpointing, tokens: int, size: int
) -> Peak:
    """The peak of a step from what a pass was measured to keep, for a run that begins: nothing is computed for it.

    Args:
        tokens: of the largest microbatch.
        size: bytes of a number in the compute type.
    """
    # At the head's peak: a chunk's logits, and what is made of them in fp32.
    vocabulary = model.config.get_text_config().vocab_size
    chunk = chunk_bytes(device, tokens, vocabulary, size)
    rows = chunk // (vocabulary * size)
    wide = min(rows, ROWS_AT_A_TIME) if device.type == "cpu" else rows
    return Peak(
        activations=int(activations.per_token(checkpointing) * tokens),
        head=0 if scores(model) else chunk + 4 * vocabulary * wide,
        gradients=sum(4 * p.numel() for p in model.parameters() if p.requires_grad),
    )


def primitives_kept(tokens: int, segments: int) -> int:
    """How many of oneDNN's primitives for 16-bit matmuls a CPU should cache: those of a microbatch, which every layer
    uses again, with room to spare.

    Args:
        tokens, segments: of all examples.
    """
    return PRIMITIVES if tokens >= SHORT * segments else PRIMITIVES_OF_SHORT_ROWS


def bytes_of(parameter: Any) -> int:
    """Of a 4-bit weight with its constants: a byte for each block of 64, and 4 for 256 of those."""
    state = getattr(parameter, "quant_state", None)
    size = parameter.numel() * parameter.element_size()
    return size if state is None else size + sum(part.numel() * part.element_size() for part in _constants(state))


def _constants(state: Any) -> Iterator[Tensor]:
    nested = getattr(state, "state2", None)
    for part in (state.absmax, *(() if nested is None else _constants(nested))):
        if isinstance(part, Tensor):
            yield part


# ---- what is free ----


def free_memory(device: torch.device) -> int:
    """Bytes that this rank could still take: on a CPU its part of what the machine and its control groups have free."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    available = read_proc("/proc/meminfo", "MemAvailable")
    if available is None:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([available, *cgroup_room()]) // local_world_size()


def cgroup_room(process: Path = PROCESS) -> Iterator[int]:
    """Bytes that each control group around a process (cgroup v1 or v2, from the innermost out) may still take: its
    limit without what it uses, of which the page cache can be taken back. Groups without a limit are left out.

    A container has a limit of its own, which /proc/meminfo, the whole machine's, does not show.
    """
    for group in control_groups("memory", process):
        if group.version == 2:
            limits, usage, cached = ("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")
        else:
            limits, usage = ("memory.limit_in_bytes",), "memory.usage_in_bytes"
            cached = ("total_inactive_file", "total_active_file")
        folder = group.folder
        try:
            found = [(folder / name).read_text().strip() for name in limits]
            used = int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used -= sum(int(stat.get(name, 0)) for name in cached)
            room = [max(int(limit) - used, 0) for limit in found if limit != "max"]
        except (OSError, ValueError):  # no files, as in the outermost group, or none that can be read
            continue
        yield from room
