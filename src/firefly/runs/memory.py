"""Memory of this process: its peak, and an allocator that keeps what a step frees for the next one."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

from firefly.files import read_proc

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h


def peak_memory(device: torch.device) -> int:
    """Bytes: peak allocation on a GPU, peak resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # getrusage's figure would start at the parent's peak: it survives exec.
    if (peak := read_proc("/proc/self/status", "VmHWM")) is not None:
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_in_use(device: torch.device) -> int:
    """Bytes: resident set now on a CPU; the peak on a GPU, where between steps little is allocated."""
    if device.type != "cuda" and (resident := read_proc("/proc/self/status", "VmRSS")) is not None:
        return resident
    return peak_memory(device)


KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""oneDNN's and, in front of it, torch's own (ideep); both read theirs at the first product."""


def cap_onednn_cache(count: int) -> None:
    """Let a CPU keep the code of `count` 16-bit products, unless the user has said how much.

    By default it keeps 1,024 pieces of 0.5 MB, one for every shape met; as microbatches differ in tokens, most are
    never asked for again, and they come to lie in the middle of the heap. To be called before the first product.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(count))


def keep_freed_memory(device: torch.device) -> bool:
    """On a CPU with glibc, let malloc serve activations from the heap and not give the heap back between steps.

    By default every large tensor is a fresh mapping whose pages the kernel has to clear at first touch; a training step
    frees and takes the same sizes again and again. Returns whether it was done.
    """
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))  # -1: never (mallopt(3))


def give_back_freed_memory() -> None:
    """Give the kernel the pages of the heap that hold nothing, also those in its middle, where glibc can.

    After work whose sizes do not come again, as answers before the first step: 0.15 GiB of SmolLM2-135M.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)


def map_large_arrays() -> None:
    """Let glibc take arrays of a MiB and more from the kernel, and give them back when they are freed.

    By default it puts arrays of up to 32 MiB on the heap once such a one was freed, where what stays, as shards do,
    keeps what was freed around it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 20)
