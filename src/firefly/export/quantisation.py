"""A GGUF file in fewer bits, tensor by tensor, and the proof that its numbers are those of the source.

Which tensor gets which type is llama.cpp's choice (llama_tensor_get_type in src/llama-quant.cpp), so that a Q4_K_M is
what its name says everywhere; the numbers are written by ggml's own quantiser.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import dequantize
from gguf.quants import quantize as quantise_by_numpy

from firefly.console import notice
from firefly.errors import UsageError, VerificationError
from firefly.export.ggml import Ggml
from firefly.export.gguf_file import Head, TensorInfo, Value, lay_out, new_file, padded, read_head, write_head

F32, F16, BF16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16
Q8_0, Q5_0, Q5_1 = GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q5_0, GGMLQuantizationType.Q5_1
Q4_K, Q5_K, Q6_K = GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q5_K, GGMLQuantizationType.Q6_K
FLOATS = (F32, F16, BF16)

NUMBERS_AT_ONCE = 1 << 21
"""So many numbers of a tensor are held in fp32 at a time."""

SECONDS_OF_SILENCE = 15.0

FILE_TYPE, QUANTISED_BY = "general.file_type", "general.quantization_version"
QUANTISER = 2
"""GGML_QNT_VERSION: the layout of blocks, as it has been since May 2023."""

TYPES: dict[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f16": (F16, LlamaFileType.MOSTLY_F16),
    "bf16": (BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_k_m": (Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
    "q5_k_m": (Q5_K, LlamaFileType.MOSTLY_Q5_K_M),
    "q6_k": (Q6_K, LlamaFileType.MOSTLY_Q6_K),
}
"""What a file can be written in → the type of most tensors, and the file's own."""

INSTEAD = {Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0}
"""For rows that are no multiple of 256."""


@dataclass(frozen=True)
class QuantizedTypes:
    """What the tensors of a file were written in.

    Attributes:
        types: tensor → name of its type.
        fallbacks: tensor → (the type that the mixture has for it, the one it got as its rows do not fit), by name.
    """

    types: Mapping[str, str]
    fallbacks: Mapping[str, tuple[str, str]]

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors have each type."""
        return dict(Counter(self.types.values()).most_common())


# ---- which tensor gets which type ----

KEPT = (
    "_norm.weight ffn_gate_inp.weight ffn_gate_tid2eid.weight altup laurel per_layer_model_proj ssm_conv1d "
    "shortconv.conv.weight indexer.k_proj.weight indexer.q_proj.weight time_mix_first.weight time_mix_w0.weight "
    "time_mix_w1.weight time_mix_w2.weight time_mix_v0.weight time_mix_v1.weight time_mix_v2.weight time_mix_a0.weight "
    "time_mix_a1.weight time_mix_a2.weight time_mix_g1.weight time_mix_g2.weight time_mix_decay_w1.weight "
    "time_mix_decay_w2.weight time_mix_lerp_fused.weight attn_rel_b.weight position_embd token_types.weight"
).split()
"""Parts of names of tensors that stay as they are: norms, routers, and matrices too small to gain from it."""

VALUES = ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight")
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")


def choose_types(head: Head, name: str) -> tuple[dict[str, GGMLQuantizationType], dict[str, tuple[str, str]]]:
    """Each tensor's type in a file of the type `name`, and where its rows did not fit the one meant for it."""
    mixture = _Mixture(head, name)
    types, fallbacks = {}, {}
    for tensor in sorted(head.tensors, key=lambda tensor: (layer_of(tensor.name), tensor.name)):
        if not may_be_quantised(tensor):
            types[tensor.name] = tensor.type
            continue
        meant = mixture.choose(tensor)
        found = meant
        if tensor.row % GGML_QUANT_SIZES[found][0]:
            found = INSTEAD.get(found, F16)
        if tensor.row % GGML_QUANT_SIZES[found][0]:
            found = F16
        types[tensor.name] = found
        if found != meant:
            fallbacks[tensor.name] = (meant.name, found.name)
    return types, fallbacks


def layer_of(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def may_be_quantised(tensor: TensorInfo) -> bool:
    matrix = any(size > 1 for size in tensor.shape[:-1])
    return matrix and tensor.name.endswith("weight") and not any(part in tensor.name for part in KEPT)


class _Mixture:
    """llama.cpp's rules for one file. They count tensors in the order of their layers, which is how it asks."""

    def __init__(self, head: Head, name: str) -> None:
        self.base, self.file_type = TYPES[name]
        self.medium = name in ("q4_k_m", "q5_k_m")
        names = {tensor.name for tensor in head.tensors}
        self.architecture = head.architecture
        self.layers: int = self.setting(head, "block_count", 0)
        self.experts: int = self.setting(head, "expert_count", 0)
        self.tied = "output.weight" not in names
        self.values = sum(any(part in name for part in VALUES) for name in names)
        self.seen_values = self.seen_down = 0
        heads, groups = (self.setting(head, f"attention.head_count{end}", 0) for end in ("", "_kv"))
        self.is_70b = (self.architecture, self.layers) in (
            ("qwen2", 80),
            ("deci", 80),
            ("olmo", 80),
            ("jais2", 68),
        ) or (self.architecture == "llama" and self.layers == 80 and heads != groups)

    @staticmethod
    def setting(head: Head, key: str, default: int) -> int:
        found = head.get(f"{head.architecture}.{key}", default)
        return max(found, default=default) if isinstance(found, list) else found

    def choose(self, tensor: TensorInfo) -> GGMLQuantizationType:
        name = tensor.name
        if self.base in FLOATS:
            return self.base
        if name == "output.weight" or (self.tied and name in EMBEDDINGS):
            fits = tensor.row % GGML_QUANT_SIZES[self.base][0] == 0
            return Q6_K if fits and self.architecture != "falcon" and self.base != Q8_0 else Q8_0
        if any(part in name for part in VALUES):
            return self.for_values("attn_qkv.weight" in name)
        if "attn_k.weight" in name:
            return Q8_0 if self.experts == 8 else self.base
        if "attn_output.weight" in name:
            five = self.base is Q4_K and self.experts == 8 and self.architecture != "falcon"
            return Q5_K if five else self.base
        if "ffn_down" in name:
            return self.for_down(name)
        return self.base

    def for_values(self, fused: bool) -> GGMLQuantizationType:
        position, self.seen_values = self.seen_values, self.seen_values + 1
        if self.experts == 8:
            return Q8_0
        found = Q6_K if self.medium and more_bits(position, self.values) else self.base
        return Q5_K if self.is_70b and found is Q4_K else found

    def for_down(self, name: str) -> GGMLQuantizationType:
        position, self.seen_down = self.seen_down, self.seen_down + 1
        layer = layer_of(name) if self.experts > 1 else position
        more = more_bits(layer, self.layers)
        if not self.medium:
            return self.base
        if self.architecture == "falcon" and self.base is Q4_K:
            return Q6_K if layer < self.layers // 16 else Q5_K if more else Q4_K
        return Q6_K if more else self.base


def more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth, and every third layer between them."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


# ---- writing ----


def quantize(source: Path, target: Path, type: str) -> QuantizedTypes:
    """Write a GGUF file in fewer bits; `type` is one of TYPES. Metadata and order of tensors stay.

    In memory at a time: one tensor as it is written, and a few million of its numbers in fp32.

    Raises:
        UsageError: `source` is quantised already or has numbers that the type cannot hold; ggml is not installed.
    """
    head = read_head(source)
    if quantised := next((tensor for tensor in head.tensors if tensor.type not in FLOATS), None):
        raise UsageError(
            "export.quantised_twice",
            "{path} is quantised already ({tensor} is {type}): quantise the model in its own number type.",
            path=source,
            tensor=quantised.name,
            type=quantised.type.name,
        )
    types, fallbacks = choose_types(head, type)
    ggml = Ggml(torch.get_num_threads()) if TYPES[type][0] not in FLOATS else None
    metadata = head.metadata | {
        FILE_TYPE: Value.of(int(TYPES[type][1])),
        QUANTISED_BY: Value.of(QUANTISER),
    }
    placed = lay_out(head.tensors, types, head.alignment)
    sizes = [sum(tensor.size for tensor in tensors) / 1e9 for tensors in (head.tensors, placed)]
    notice(
        "export.quantising",
        "quantising {path} to {type}: {before:.2f} GB become {after:.2f} GB …",
        path=source.name,
        type=type,
        before=sizes[0],
        after=sizes[1],
    )
    told, done = time.monotonic(), 0
    with new_file(target) as file:
        write_head(file, metadata, placed, head.alignment)
        for tensor, written in zip(head.tensors, placed, strict=True):
            for first, data in chunks(head, tensor):
                try:
                    written_data = encoded(tensor, written.type, data, ggml)
                except ValueError as error:
                    raise UsageError(
                        "export.unquantisable",
                        "{tensor} of {path} cannot be written as {type} (rows from {row}): {problem}.",
                        tensor=tensor.name,
                        path=source,
                        type=written.type.name,
                        row=first,
                        problem=error,
                    ) from error
                file.write(written_data.data)
                done += data.nbytes
                if time.monotonic() - told > SECONDS_OF_SILENCE:
                    told = time.monotonic()
                    notice("export.quantised", "{share:.0%} quantised …", share=done / sizes[0] / 1e9)
            file.write(bytes(padded(written.size, head.alignment) - written.size))
    return QuantizedTypes({tensor.name: tensor.type.name for tensor in placed}, fallbacks)


def chunks(head: Head, tensor: TensorInfo) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, bytes of some rows)."""
    step = max(1, NUMBERS_AT_ONCE // max(1, tensor.row))
    for first in range(0, tensor.rows, step):
        yield first, head.read_rows(tensor, first, min(step, tensor.rows - first))


def encoded(tensor: TensorInfo, kind: GGMLQuantizationType, data: np.ndarray, ggml: Ggml | None) -> np.ndarray:
    """Rows of a tensor as bytes of another type."""
    if kind == tensor.type:
        return data
    numbers = decoded(data, tensor.type)
    if kind not in FLOATS:
        assert ggml is not None
        return ggml.quantise(numbers, kind)
    with np.errstate(over="ignore"):
        written = quantise_by_numpy(numbers, kind).view(np.uint8)
    if not np.isfinite(decoded(written, kind)).all():
        raise ValueError("its numbers are too large for this type, or not finite")
    return written


def decoded(data: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """The numbers that rows of bytes stand for, in fp32."""
    if kind == F32:
        return data.view(np.float32)
    if kind == F16:
        return data.view(np.float16).astype(np.float32)
    return dequantize(data, kind)


# ---- checking ----


@dataclass(frozen=True)
class Limits:
    """How far numbers of a type may be from those they were made of.

    Attributes:
        block: numbers that share a scale, and are judged together.
        of_block: error of a block as a share of its size (both root mean square).
        of_tensor: the same of a whole tensor.
        floor: error of any number, however small: scales are fp16, whose smallest step is 2⁻²⁴.
    """

    block: int
    of_block: float
    of_tensor: float
    floor: float


STEP = 2.0**-25
"""Half of fp16's smallest step."""

LIMITS = {
    F32: Limits(1, 0, 0, 0),
    F16: Limits(1, 2.0**-11, 2.0**-11, STEP),
    BF16: Limits(1, 2.0**-8, 2.0**-8, 0),
    Q8_0: Limits(32, 0.025, 0.013, 127 * STEP),
    Q5_0: Limits(32, 0.19, 0.09, 16 * STEP),
    Q5_1: Limits(32, 0.15, 0.09, 32 * STEP),
    Q4_K: Limits(256, 0.25, 0.13, 63 * 16 * STEP),
    Q5_K: Limits(256, 0.17, 0.08, 63 * 32 * STEP),
    Q6_K: Limits(256, 0.10, 0.04, 127 * 32 * STEP),
}
"""Q8_0 and Q5: half a step of the scale that the largest number asks for, in a block that has one large number (√32 ×
its root mean square). K: twice the worst block of real and of random numbers (normal, uniform, Student's t with 1 and 2
degrees of freedom, sparse, columns and numbers of sizes from 1 to 10⁻⁵). A scale with another sign, or of twice or half
its size, is an error of 0.5 and more."""


@dataclass(frozen=True)
class Figures:
    """What was found of all tensors of one type: the largest errors, as shares of what they are errors of."""

    tensors: int
    of_tensor: float
    of_block: float


def check_numbers(source: Path, written: Path) -> dict[str, Figures]:
    """Compare all that stands in a written GGUF file, read from disk, with the one that it was made from.

    Returns:
        Figures by the name of a type.

    Raises:
        VerificationError: another tensor, shape or metadata, or numbers that the type does not explain; it names the
            first tensor that is wrong.
    """
    before, after = read_head(source), read_head(written)
    differing = sorted(
        key
        for key in before.metadata.keys() | after.metadata.keys()
        if key not in (FILE_TYPE, QUANTISED_BY) and before.metadata.get(key) != after.metadata.get(key)
    )
    one, other = ({tensor.name: tensor.shape for tensor in head.tensors} for head in (before, after))
    differing += sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    if differing:
        raise VerificationError(
            "export.other_content",
            "{path} does not hold what it was made from: {names} differ.",
            path=written,
            names=", ".join(differing[:5]),
        )
    places = {tensor.name: tensor for tensor in after.tensors}
    found: dict[str, list[tuple[float, float]]] = {}
    for tensor in before.tensors:
        there = places[tensor.name]
        errors = _errors_of(before, tensor, after, there)
        limits = LIMITS[there.type]
        if not (errors[0] <= limits.of_tensor and errors[1] <= limits.of_block):  # NaN is wrong, too
            raise VerificationError(
                "export.wrong_numbers",
                "{tensor} in {path} is not what it was made from: its numbers are off by {error:.2%} ({type}: at most "
                "{limit:.2%}), those of its worst block, number {block}, by {worst:.2%} (at most {most:.2%}). The file "
                "is damaged; export it again.",
                tensor=tensor.name,
                path=written,
                type=there.type.name,
                error=errors[0],
                limit=limits.of_tensor,
                block=errors[2],
                worst=errors[1],
                most=limits.of_block,
            )
        found.setdefault(there.type.name, []).append(errors[:2])
    return {
        kind: Figures(len(errors), max(one for one, _ in errors), max(block for _, block in errors))
        for kind, errors in found.items()
    }


def _errors_of(before: Head, tensor: TensorInfo, after: Head, there: TensorInfo) -> tuple[float, float, int]:
    """(error of the tensor, error of its worst block, that block's number); what the floor allows is no error."""
    limits, worst, where = LIMITS[there.type], 0.0, 0
    squares = sizes = 0.0
    for first, data in chunks(before, tensor):
        copy = after.read_rows(there, first, len(data))
        if there.type == tensor.type and np.array_equal(data, copy):
            continue
        expected = decoded(data, tensor.type).reshape(-1, limits.block)
        found = decoded(copy, there.type).reshape(expected.shape)
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.square(found - expected, dtype=np.float64).mean(-1)
            size = np.square(expected, dtype=np.float64).mean(-1)
            over = np.maximum(np.sqrt(error) - limits.floor, 0)
            share = np.divide(over, np.sqrt(size), out=np.where(over > 0, np.inf, over), where=size > 0)
        share[np.isnan(error)] = np.inf
        at = int(share.argmax())
        if share[at] > worst:
            worst, where = float(share[at]), first * tensor.row // limits.block + at
        squares, sizes = squares + float(error.sum()), sizes + float(size.sum())
    count = max(1, tensor.rows * tensor.row // limits.block)
    off = max(0.0, (squares / count) ** 0.5 - limits.floor)
    if not off:
        return 0.0, worst, where
    return (off / (sizes / count) ** 0.5 if sizes else np.inf), worst, where
