"""Which of a run's processes this one is, as torchrun, deepspeed and accelerate launch tell it in variables.

Nothing here starts or needs a process group but `from_first` and `all_of`, which every rank has to call.
"""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


def rank() -> int:
    """This process's number among all of the run."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Its number on this machine: the GPU that it uses."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """How many of them share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def started_alone() -> bool:
    """Whether `accelerate launch` started this process and no other: without a GPU it does so for any number asked
    for, unless told --multi_gpu."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ


def is_first() -> bool:
    """Whether this process speaks to the user and writes files."""
    return rank() == 0


def from_first(value: T) -> T:
    """The first rank's value, on every rank."""
    return all_of(value)[0]


def all_of(value: T) -> list[T]:
    """Every rank's value, in the order of ranks."""
    import torch.distributed as dist

    if world_size() == 1 or not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def leave(failed: bool = False) -> None:
    """Close the process group, if there is one. After a failure NCCL is left alone, since closing it waits for ranks
    that may be waiting for this one."""
    if world_size() == 1:
        return
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and not (failed and dist.get_backend() != "gloo"):
        dist.destroy_process_group()


def end(code: int) -> NoReturn:
    """End the process, one of several without taking the interpreter apart.

    Even behind a closed group gloo's threads live on where something still holds it, DistributedDataParallel for one.
    One that lets go of its last collective's tensors while the interpreter is taken apart aborts a process whose work
    is done (pytorch/pytorch#179291): up to a third of those that ended right after a collective.

    What was registered with atexit is run by a private function, as nothing public runs it without ending the
    interpreter. Both go when gloo no longer aborts.
    """
    if world_size() == 1:
        sys.exit(code)
    atexit._run_exitfuncs()
    with suppress(OSError):  # whoever read it has gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
