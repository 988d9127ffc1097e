"""Weights into safetensors files: one tensor in memory at a time, and on from where an interrupted write stopped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from firefly.console import notice
from firefly.files import atomic_file, sync_names
from firefly.models.unread import Unread
from firefly.runs.manifest import write_json
from firefly.runs.records import read_object

JOURNAL = "journal.json"
"""In the folder while it is written: what the weights are made of, and the files that are whole."""

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls the types."""


def continue_folder(folder: Path, inputs: Mapping[str, Any]) -> None:
    """Make a folder for `write_shards`, or keep of one that was left the files that its journal says are whole.

    Args:
        inputs: all that the weights depend on. Files that were made of others go.
    """
    journal = read_object(folder / JOURNAL)
    kept = journal.get("files", {}) if journal.get("inputs") == json.loads(json.dumps(inputs)) else {}
    whole = {name for name, size in kept.items() if _size(folder / name) == size}
    if folder.exists() and not whole:
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name not in whole:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_json(folder / JOURNAL, {"inputs": inputs, "files": {name: kept[name] for name in sorted(whole)}})


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def write_shards(tensors: Mapping[str, Tensor], folder: Path, limit: int) -> None:
    """Write tensors, unread ones too, as a model's safetensors files of at most `limit` bytes (one tensor at least),
    into a folder of `continue_folder`. Files that it kept are left as they are; at the end the journal goes.

    Raises:
        OSError: the disk did not take it.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    stem, total = SAFE_WEIGHTS_NAME.removesuffix(".safetensors"), len(shards)
    files = [
        f"{stem}-{n:05}-of-{total:05}.safetensors" if total > 1 else SAFE_WEIGHTS_NAME for n in range(1, total + 1)
    ]
    journal = read_object(folder / JOURNAL)
    kept = [name for name in files if name in journal["files"]]
    if kept:
        notice("shards.kept", "going on: {count} of {total} files were written before.", count=len(kept), total=total)
    for number, (name, shard) in enumerate(zip(files, shards, strict=True), 1):
        if name in kept:
            continue
        with atomic_file(folder / name) as scratch:
            _write(shard, scratch)
        sync_names(folder)
        journal["files"][name] = _size(folder / name)
        write_json(folder / JOURNAL, journal)
        if total > 1:
            notice("shards.written", "{number} of {total} files written: {name}", number=number, total=total, name=name)
    if total > 1:
        where = {tensor: name for name, shard in zip(files, shards, strict=True) for tensor in shard}
        sums = {
            "total_parameters": sum(tensor.numel() for tensor in tensors.values()),
            "total_size": sum(tensor.nbytes for tensor in tensors.values()),
        }
        write_json(folder / SAFE_WEIGHTS_INDEX_NAME, {"metadata": sums, "weight_map": where})
    (folder / JOURNAL).unlink()


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file: the length of its header, the header in JSON, and the numbers, the widest types first so that
    each is aligned."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    described = json.dumps(header, separators=(",", ":")).encode()
    described += b" " * (-len(described) % 8)
    with path.open("wb") as file:
        file.write(len(described).to_bytes(8, "little") + described)
        for _, tensor in ordered:
            values = (tensor.read() if isinstance(tensor, Unread) else tensor).detach().cpu().contiguous()
            file.write(values.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
