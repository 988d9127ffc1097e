"""What stands at the head of a GGUF file: metadata and where each tensor lies.

The `gguf` package reads it value by value into arrays, which for a vocabulary of 150,000 takes seconds and 200 MB. Here
a value stays the bytes that it is, so that copying metadata into another file changes none of it.

Layout (little endian, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, number of tensors
and of keys; per key its name, type and value; per tensor name, dimensions from the innermost, type and offset; padding;
data.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from firefly.errors import UsageError
from firefly.files import atomic_file, free_space

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT = "general.alignment"
COPIED_AT_ONCE = 16 << 20
"""Bytes."""

SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


@dataclass(frozen=True)
class Value:
    """One value of the metadata, as it is written."""

    type: GGUFValueType
    raw: bytes

    @classmethod
    def of(cls, value: bool | int | float | str) -> Value:
        """What llama.cpp reads such a value as: ids and counts are unsigned, of 32 bits."""
        if isinstance(value, bool):
            return cls(GGUFValueType.BOOL, struct.pack("<?", value))
        if isinstance(value, int):
            return cls(GGUFValueType.UINT32, struct.pack("<I", value))
        if isinstance(value, float):
            return cls(GGUFValueType.FLOAT32, struct.pack("<f", value))
        text = value.encode()
        return cls(GGUFValueType.STRING, struct.pack("<Q", len(text)) + text)

    def decode(self) -> Any:
        """A number, a text, or a list of them."""
        if self.type is not GGUFValueType.ARRAY:
            return _decode(self.type, self.raw, 0)[0]
        inner, count = struct.unpack_from("<IQ", self.raw)
        kind, position, items = GGUFValueType(inner), 12, []
        for _ in range(count):
            item, position = _decode(kind, self.raw, position)
            items.append(item)
        return items


def _decode(kind: GGUFValueType, raw: bytes, position: int) -> tuple[Any, int]:
    if kind is GGUFValueType.STRING:
        (length,) = struct.unpack_from("<Q", raw, position)
        start = position + 8
        return raw[start : start + length].decode("utf-8", errors="replace"), start + length
    return struct.unpack_from(SCALARS[kind], raw, position)[0], position + struct.calcsize(SCALARS[kind])


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        shape: from the outermost dimension to the row, as numpy and torch have it.
        offset: of its first byte, from the start of the data.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int

    @property
    def row(self) -> int:
        """Numbers in a row, which blocks are cut from."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.type, self.row)

    @property
    def size(self) -> int:
        """Bytes, without padding."""
        return self.rows * self.row_bytes


def row_bytes(kind: GGMLQuantizationType, numbers: int) -> int:
    """Bytes of a row of so many numbers."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return numbers // block * block_bytes


@dataclass(frozen=True)
class Head:
    """All that a GGUF file says before its data."""

    path: Path
    metadata: dict[str, Value]
    tensors: tuple[TensorInfo, ...]
    alignment: int
    data_start: int

    def get(self, key: str, default: Any = None) -> Any:
        value = self.metadata.get(key)
        return default if value is None else value.decode()

    @property
    def architecture(self) -> str:
        return self.get("general.architecture", "")

    def read_rows(self, tensor: TensorInfo, first: int, count: int) -> np.ndarray:
        """The bytes of some rows, (count, bytes of a row). Read, not mapped: mapped pages would count as ours."""
        with open(self.path, "rb") as file:
            file.seek(self.data_start + tensor.offset + first * tensor.row_bytes)
            data = np.fromfile(file, dtype=np.uint8, count=count * tensor.row_bytes)
        return data.reshape(count, tensor.row_bytes)


def read_head(path: Path) -> Head:
    """Read the head of a GGUF file.

    Raises:
        UsageError: it is none, or does not hold all that it lists.
    """
    try:
        with open(path, "rb") as file:
            head = _Reading(file).head(path)
    except (OSError, struct.error, ValueError, UnicodeDecodeError, MemoryError) as error:
        raise UsageError(
            "export.not_gguf", "{path} is not a GGUF file that can be read: {problem}.", path=path, problem=error
        ) from error
    ends = [head.data_start + tensor.offset + tensor.size for tensor in head.tensors]
    if (size := path.stat().st_size) < max(ends, default=0):
        raise UsageError(
            "export.cut_gguf",
            "{path} is cut short: its tensors end at byte {end:,}, and it has {size:,}.",
            path=path,
            end=max(ends),
            size=size,
        )
    return head


class _Reading:
    """Reads on in an open file."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def take(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) < count:
            raise ValueError("it ends within its head")
        return data

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> bytes:
        return self.take(self.number("<Q"))

    def value(self, kind: GGUFValueType) -> bytes:
        if kind is GGUFValueType.STRING:
            length = self.take(8)
            return length + self.take(struct.unpack("<Q", length)[0])
        if kind is not GGUFValueType.ARRAY:
            return self.take(struct.calcsize(SCALARS[kind]))
        beginning = self.take(12)
        inner, count = struct.unpack("<IQ", beginning)
        if (inner := GGUFValueType(inner)) in SCALARS:
            return beginning + self.take(count * struct.calcsize(SCALARS[inner]))
        return beginning + b"".join(self.value(inner) for _ in range(count))

    def head(self, path: Path) -> Head:
        if self.take(4) != MAGIC or self.number("<I") not in VERSIONS:
            raise ValueError("it does not begin as one")
        tensors, keys = self.number("<Q"), self.number("<Q")
        metadata: dict[str, Value] = {}
        for _ in range(keys):
            name = self.text().decode()
            kind = GGUFValueType(self.number("<I"))
            metadata[name] = Value(kind, self.value(kind))
        infos = []
        for _ in range(tensors):
            name = self.text().decode()
            shape = tuple(self.number("<Q") for _ in range(self.number("<I")))
            kind = GGMLQuantizationType(self.number("<I"))
            infos.append(TensorInfo(name, shape[::-1], kind, self.number("<Q")))
        alignment = metadata[ALIGNMENT].decode() if ALIGNMENT in metadata else 32
        return Head(path, metadata, tuple(infos), alignment, padded(self.file.tell(), alignment))


def padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def lay_out(
    tensors: Sequence[TensorInfo], types: Mapping[str, GGMLQuantizationType], alignment: int
) -> tuple[TensorInfo, ...]:
    """The same tensors, in the same order, with these types, and where they then lie."""
    offset, placed = 0, []
    for tensor in tensors:
        placed.append(replace(tensor, type=types.get(tensor.name, tensor.type), offset=offset))
        offset = padded(offset + placed[-1].size, alignment)
    return tuple(placed)


def write_head(file: IO[bytes], metadata: Mapping[str, Value], tensors: Sequence[TensorInfo], alignment: int) -> None:
    """Write a head, and its padding: data begins where the file then stands."""
    parts = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(metadata))]
    for name, value in metadata.items():
        parts += [_counted(name), struct.pack("<I", value.type), value.raw]
    for tensor in tensors:
        shape = tensor.shape[::-1]
        parts += [
            _counted(tensor.name),
            struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, tensor.type, tensor.offset),
        ]
    head = b"".join(parts)
    file.write(head)
    file.write(bytes(padded(len(head), alignment) - len(head)))


def _counted(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def set_metadata(path: Path, changes: Mapping[str, bool | int | float | str | None]) -> None:
    """Give a GGUF file other metadata; None takes a key away. Its tensors stay as they are.

    The file is written anew beside itself, and takes its own place when it is whole.
    """
    head = read_head(path)
    metadata = dict(head.metadata)
    for key, value in changes.items():
        if value is None:
            metadata.pop(key, None)
        else:
            metadata[key] = Value.of(value)
    if metadata == head.metadata:
        return
    with new_file(path) as out:
        write_head(out, metadata, head.tensors, head.alignment)
        for piece in _pieces(path, head.data_start):
            out.write(piece)


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of `path` when it is whole and on the disk.

    Raises:
        UsageError: the disk did not take it.
    """
    try:
        with atomic_file(path) as partial, open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise write_failed(path, error) from error


def write_failed(path: Path, problem: object) -> UsageError:
    folder = next((place for place in path.parents if place.is_dir()), Path("/"))
    return UsageError(
        "export.write_failed",
        "{path} could not be written: {problem}; {free} are free. Free some space, or choose another folder.",
        path=path,
        problem=problem,
        free=free_space(folder),
    )


def _pieces(path: Path, start: int) -> Iterator[bytes]:
    with open(path, "rb") as source:
        source.seek(start)
        while piece := source.read(COPIED_AT_ONCE):
            yield piece
