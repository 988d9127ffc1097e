"""Which of a run's processes this one is, as torchrun, deepspeed and accelerate launch tell it in variables.

Nothing here starts or needs a process group but `from_first` and `all_of`, which every rank has to call.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

T = TypeVar("T")


def rank() -> int:
    """This process's number among all of the run."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Its number on this machine: the card that it uses."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """How many of them share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


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
