"""Which base model it is: names, shapes and sampled values of its tensors, whatever files they lie in.

A run records the base that it trained on, and whoever loads its adapter later compares: an adapter on other weights
answers something else, and nothing in its own files shows it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

WHOLE_TENSOR = 1 << 18
"""Tensors with no more values than this are read whole."""
RUNS, RUN_LENGTH = 64, 1 << 10
"""Of a larger one, so many runs of so many values, evenly spaced, the first and the last among them."""

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
COMPUTED = (".inv_freq", ".masked_bias", ".attn.bias")
"""Ends of names that old checkpoints hold although they follow from the configuration; saved anew, they are gone."""


def identify_weights(place: str, revision: str | None = None) -> dict[str, Any]:
    """Identify the weights in a folder, or those of a hub's model that are in the cache.

    Values count as numbers, not as bytes: the same base in another file name, in other shards, or widened to fp32 is
    the same base.

    Returns:
        `sha256` over everything, and `groups`: a digest for each decoder layer and for each tensor outside of them, by
        name. A digest does not depend on the name, so that a tensor that was renamed or tied is still found. For a
        hub's model whose files are not here: its name alone.
    """
    files = weight_files(place, revision)
    if not files:
        return {"method": "hub_commit", "name": place}
    groups: dict[str, list[str]] = {}
    for file in files:
        for name, digest in _digests(file):
            group, tail = _group_of(name)
            groups.setdefault(group, []).append(f"{tail} {digest}")
    found = {group: _sha256("\n".join(sorted(lines)))[:16] for group, lines in sorted(groups.items())}
    return {"method": "tensors", "sha256": _sha256(json.dumps(found)), "groups": found}


def differing_weights(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Names of the layers and tensors that were recorded and that `found` has with other values, or not at all."""
    if "groups" not in recorded or "groups" not in found:
        return []
    groups, digests = found["groups"], set(found["groups"].values())
    same_name = {name for name, digest in recorded["groups"].items() if groups.get(name) == digest}
    renamed = {name for name, digest in recorded["groups"].items() if name not in groups and digest in digests}
    return [name for name in recorded["groups"] if name not in same_name | renamed]


def weight_files(place: str, revision: str | None = None) -> list[Path]:
    """The safetensors files of a folder, or of a hub's model as the cache has it; none if there are none."""
    folder = Path(place)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        for name in ("model.safetensors.index.json", "model.safetensors"):
            found = try_to_load_from_cache(place, name, revision=revision)
            if isinstance(found, str):
                folder = Path(found).parent
                break
        else:
            return []
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))


def _digests(file: Path) -> list[tuple[str, str]]:
    """(name, digest of shape and values) of every tensor in a safetensors file."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(length))
    data = np.memmap(file, np.uint8, "r", offset=8 + length) if file.stat().st_size > 8 + length else np.zeros(0)
    found = []
    for name, entry in header.items():
        if name == "__metadata__" or name.endswith(COMPUTED):
            continue
        start, end = entry["data_offsets"]
        values = _sampled(data[start:end], entry["dtype"], entry["shape"])
        found.append((name, _sha256(f"{entry['shape']}".encode() + values)[:16]))
    return found


def _sampled(data: np.ndarray, dtype: str, shape: list[int]) -> bytes:
    """The values that stand for a tensor, floating-point ones as fp32."""
    count = int(np.prod(shape, dtype=np.int64))
    size = len(data) // max(count, 1)
    if count <= WHOLE_TENSOR:
        taken = np.asarray(data)
    else:
        starts = np.linspace(0, count - RUN_LENGTH, RUNS).astype(np.int64)
        taken = np.concatenate([data[start * size : (start + RUN_LENGTH) * size] for start in starts])
    if dtype not in FLOATS or not len(taken):
        return dtype.encode() + taken.tobytes()
    values: Tensor = torch.frombuffer(bytearray(taken.tobytes()), dtype=FLOATS[dtype])
    return values.to(torch.float32).numpy().tobytes()


def _group_of(name: str) -> tuple[str, str]:
    """(`model.layers.3`, `mlp.up_proj.weight`); a tensor outside of numbered layers is a group of its own."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        return name, parts[-1]
    return ".".join(parts[: number + 1]), ".".join(parts[number + 1 :])


def _sha256(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()
