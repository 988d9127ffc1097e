"""ggml's own quantiser, called in its library (the package `libggml-python`)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from firefly.errors import UsageError
from firefly.export.gguf_file import row_bytes

LIBRARY = ("libggml-base.so*", "libggml-base*.dylib", "ggml-base*.dll")
ROWS_AT_ONCE = 64
"""At least so many, as a call of the library costs something."""


def missing(package: str) -> UsageError:
    return UsageError(
        "export.missing",
        "this export needs the package {package}, which is not installed: pip install -e '.[export]'",
        package=package,
    )


class Ggml:
    """The library, with threads that share the rows of a tensor: its calls leave Python's lock free.

    Raises:
        UsageError: it is not installed, or cannot be loaded here.
    """

    def __init__(self, threads: int) -> None:
        path = next(_libraries(), None)
        if path is None:
            raise missing("libggml-python")
        try:
            library = ctypes.CDLL(str(path))
            self._quantize, self._valid = library.ggml_quantize_chunk, library.ggml_validate_row_data
        except (OSError, AttributeError) as error:
            raise UsageError(
                "export.ggml",
                "ggml's library {path} cannot be loaded: {problem}. pip install -e '.[export]' installs the one that "
                "this was tested with.",
                path=path,
                problem=error,
            ) from error
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._quantize.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
        self._quantize.restype = ctypes.c_size_t
        self._valid.argtypes, self._valid.restype = [ctypes.c_int, pointer, ctypes.c_size_t], ctypes.c_bool
        self.threads = threads

    def quantise(self, numbers: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
        """Rows of fp32, (rows, numbers), as bytes of that type, (rows, bytes of a row).

        Raises:
            ValueError: what came out cannot be read back: numbers that are not finite, or that overflow a scale.
        """
        numbers = np.ascontiguousarray(numbers, dtype=np.float32)
        count, row = numbers.shape
        out = np.empty((count, row_bytes(kind, row)), dtype=np.uint8)
        step = max(ROWS_AT_ONCE, -(-count // self.threads))

        def part(first: int) -> bool:
            rows, written = numbers[first : first + step], out[first : first + step]
            size = self._quantize(kind, rows.ctypes.data, written.ctypes.data, 0, len(rows), row, None)
            return size == written.nbytes and self._valid(kind, written.ctypes.data, size)

        if not np.isfinite(numbers).all():
            raise ValueError("not all of its numbers are finite")
        with ThreadPoolExecutor(self.threads) as pool:
            if not all(pool.map(part, range(0, count, step))):
                raise ValueError("its numbers are too large for the scales of this type")
        return out


def _libraries() -> Iterator[Path]:
    spec = find_spec("libggml")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for pattern in LIBRARY:
            yield from sorted(Path(place).rglob(pattern))
