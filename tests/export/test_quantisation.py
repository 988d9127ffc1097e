"""A quantised GGUF has the types that its name promises, ggml's numbers, and nothing that was damaged since."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from firefly.errors import UsageError, VerificationError
from firefly.export import ggml, quantisation
from firefly.export.ggml import Ggml
from firefly.export.gguf_file import Head, TensorInfo, Value, read_head, set_metadata
from firefly.export.quantisation import (
    F16,
    F32,
    LIMITS,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    TYPES,
    check_numbers,
    choose_types,
    decoded,
    may_be_quantised,
    quantize,
)

NAMES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@pytest.fixture(scope="module")
def library() -> Ggml:
    pytest.importorskip("libggml", reason="ggml is not installed: pip install -e '.[export]'")
    return Ggml(2)


def described(
    architecture: str = "llama", layers: int = 32, row: int = 256, tied: bool = False, **settings: int
) -> Head:
    """A head as a converted model has it, of matrices with such rows."""
    values = {"block_count": layers} | {key.replace("__", "."): value for key, value in settings.items()}
    metadata = {f"{architecture}.{key}": Value.of(value) for key, value in values.items()}
    names = ["token_embd.weight", "output_norm.weight", *([] if tied else ["output.weight"])]
    names += [f"blk.{layer}.{name}.weight" for layer in range(layers) for name in NAMES]
    shapes = {"output_norm.weight": (row,)}
    tensors = tuple(TensorInfo(name, shapes.get(name, (64, row)), F16, 0) for name in names)
    return Head(Path(), metadata | {"general.architecture": Value.of(architecture)}, tensors, 32, 0)


def layers_with(types: dict[str, GGMLQuantizationType], name: str, kind: GGMLQuantizationType) -> list[int]:
    return [int(key.split(".")[1]) for key, found in types.items() if key.endswith(f"{name}.weight") and found == kind]


def write_gguf(path: Path, seed: int = 0, row: int = 512, **tensors: np.ndarray) -> Path:
    """A small file in fp32 with the names of a Llama."""
    generator = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_token_list(["a", "b", "</s>"])
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")
    for layer in range(2):
        for name in NAMES:
            writer.add_tensor(f"blk.{layer}.{name}.weight", generator.standard_normal((24, row)).astype(np.float32))
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", generator.standard_normal(row).astype(np.float32))
    writer.add_tensor("token_embd.weight", generator.standard_normal((32, row)).astype(np.float32))
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ---- which tensor gets which type ----


@pytest.mark.parametrize(("name", "usual"), [("q4_k_m", Q4_K), ("q5_k_m", Q5_K)])
def test_the_mixture_gives_more_bits_where_llama_cpp_does(name: str, usual: GGMLQuantizationType) -> None:
    types, fallbacks = choose_types(described(layers=32), name)
    more = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert layers_with(types, "attn_v", Q6_K) == more
    assert layers_with(types, "ffn_down", Q6_K) == more
    assert layers_with(types, "attn_q", usual) == layers_with(types, "ffn_up", usual) == list(range(32))
    assert types["output.weight"] == Q6_K
    assert types["token_embd.weight"] == usual
    assert types["output_norm.weight"] == F16  # as it was
    assert not fallbacks


def test_an_embedding_that_is_the_head_too_gets_the_heads_type() -> None:
    assert choose_types(described(tied=True), "q4_k_m")[0]["token_embd.weight"] == Q6_K
    assert choose_types(described(tied=True), "q8_0")[0]["token_embd.weight"] == Q8_0


def test_eight_experts_get_attention_in_more_bits() -> None:
    types, _ = choose_types(described(layers=4, expert_count=8), "q4_k_m")
    found = {types[f"blk.1.{name}.weight"] for name in ("attn_k", "attn_v")}
    assert found == {Q8_0}
    assert types["blk.1.attn_output.weight"] == Q5_K


def test_a_70b_has_five_bits_for_its_few_values() -> None:
    few = choose_types(described(layers=80, attention__head_count=64, attention__head_count_kv=8), "q4_k_m")[0]
    many = choose_types(described(layers=80, attention__head_count=64, attention__head_count_kv=64), "q4_k_m")[0]
    assert few["blk.11.attn_v.weight"] == Q5_K
    assert many["blk.11.attn_v.weight"] == Q4_K


def test_rows_that_are_no_multiple_of_256_get_another_type_and_it_is_said() -> None:
    types, fallbacks = choose_types(described(layers=8, row=576), "q4_k_m")
    assert types["blk.3.attn_q.weight"] == Q5_0
    assert types["blk.0.attn_v.weight"] == Q8_0
    assert fallbacks["blk.3.attn_q.weight"] == ("Q4_K", "Q5_0")
    assert fallbacks["blk.0.attn_v.weight"] == ("Q6_K", "Q8_0")
    assert choose_types(described(layers=8, row=576), "q5_k_m")[1]["blk.3.attn_q.weight"] == ("Q5_K", "Q5_1")
    assert choose_types(described(layers=8, row=24), "q8_0")[1]["blk.3.attn_q.weight"] == ("Q8_0", "F16")


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blk.0.ffn_gate_inp.weight", (8, 256), False),
        ("blk.0.attn_norm.weight", (2, 256), False),
        ("blk.0.attn_q.bias", (2, 256), False),
        ("blk.0.ffn_down.weight", (1, 256), False),
        ("blk.0.ffn_down_exps.weight", (8, 256, 256), True),
        ("blk.0.attn_q.weight", (256, 256), True),
    ],
)
def test_norms_routers_and_vectors_stay_as_they_are(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert may_be_quantised(TensorInfo(name, shape, F16, 0)) is expected


# ---- ggml's numbers ----


@pytest.mark.parametrize("kind", [Q8_0, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K])
def test_rows_that_threads_share_are_the_bytes_of_one_call(library: Ggml, kind: GGMLQuantizationType) -> None:
    numbers = np.random.default_rng(1).standard_normal((300, 512)).astype(np.float32)
    found = library.quantise(numbers, kind)
    expected = np.empty_like(found)
    size = library._quantize(int(kind), numbers.ctypes.data, expected.ctypes.data, 0, 300, 512, ctypes.c_void_p())
    assert size == expected.nbytes
    assert np.array_equal(found, expected)
    if kind in (Q8_0, Q5_0, Q5_1):  # those that there is another implementation of
        assert np.array_equal(found, gguf.quants.quantize(numbers, kind))


def test_a_file_keeps_its_metadata_and_the_order_of_its_tensors(library: Ggml, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "f32.gguf")
    written = quantize(source, tmp_path / "q.gguf", "q4_k_m")
    reader = gguf.GGUFReader(tmp_path / "q.gguf")
    assert [tensor.name for tensor in reader.tensors] == [tensor.name for tensor in read_head(source).tensors]
    assert written.types["blk.0.attn_q.weight"] == reader.tensors[0].tensor_type.name == "Q4_K"
    assert written.counts["F32"] == 2
    assert reader.get_field("general.file_type").contents() == 15
    assert reader.get_field("tokenizer.chat_template").contents() == "{{ messages }}"
    assert reader.get_field("tokenizer.ggml.tokens").contents() == ["a", "b", "</s>"]
    embedding = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    expected = library.quantise(decoded(read_head(source).read_rows(read_head(source).tensors[-1], 0, 32), F32), Q6_K)
    assert np.array_equal(embedding.data, expected)


def test_numbers_that_a_type_cannot_hold_are_refused_by_name(library: Ggml, tmp_path: Path) -> None:
    broken = np.ones((4, 512), dtype=np.float32)
    broken[2, 7] = np.nan
    source = write_gguf(tmp_path / "nan.gguf", **{"output.weight": broken})
    with pytest.raises(UsageError, match=r"output\.weight.*not all of its numbers are finite"):
        quantize(source, tmp_path / "q.gguf", "q8_0")
    source = write_gguf(tmp_path / "large.gguf", **{"output.weight": np.full((4, 512), 1e6, dtype=np.float32)})
    with pytest.raises(UsageError, match=r"output\.weight.*too large"):
        quantize(source, tmp_path / "q.gguf", "f16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.gguf", "nan.gguf"]


def test_a_quantised_file_is_not_quantised_again(library: Ggml, tmp_path: Path) -> None:
    quantize(write_gguf(tmp_path / "f32.gguf"), tmp_path / "q.gguf", "q8_0")
    with pytest.raises(UsageError, match="quantised already"):
        quantize(tmp_path / "q.gguf", tmp_path / "again.gguf", "q4_k_m")


def test_without_ggml_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ggml, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"libggml-python.*pip install -e '\.\[export\]'"):
        quantize(write_gguf(tmp_path / "f32.gguf"), tmp_path / "q.gguf", "q8_0")


# ---- what is damaged is found ----


@pytest.mark.parametrize("name", TYPES)
def test_a_healthy_file_passes_whatever_its_numbers_are_like(library: Ggml, tmp_path: Path, name: str) -> None:
    generator = np.random.default_rng(3)
    kinds = {
        "student": generator.standard_t(2, (64, 512)),
        "sparse": generator.standard_normal((64, 512)) * (generator.random((64, 512)) < 0.02),
        "tiny": generator.standard_normal((64, 512)) * 1e-6,
        "sizes": generator.standard_normal((64, 512)) * 10 ** generator.uniform(-5, 0, (64, 512)),
        "columns": generator.standard_normal((64, 512)) * 10 ** generator.uniform(-3, 0, (1, 512)),
        "offset": generator.standard_normal((64, 512)) + 5,
        "zero": np.zeros((8, 512)),
    }
    extra = {f"blk.{n}.attn_{kind}.weight": v.astype(np.float32) for n, (kind, v) in enumerate(kinds.items(), 2)}
    source = write_gguf(tmp_path / "f32.gguf", **extra)
    quantize(source, tmp_path / "q.gguf", name)
    figures = check_numbers(source, tmp_path / "q.gguf")
    assert sum(found.tensors for found in figures.values()) == len(read_head(source).tensors)
    main = figures[TYPES[name][0].name]
    assert 0 < main.of_block <= LIMITS[TYPES[name][0]].of_block


SCALES = {Q8_0: (0,), Q5_0: (0,), Q5_1: (0, 2), Q4_K: (0, 2), Q5_K: (0, 2), Q6_K: (208,)}
"""Where the fp16 scales of a block stand in its bytes."""


@pytest.mark.parametrize("what", ["sign", "half"])
@pytest.mark.parametrize("name", ["q8_0", "q4_k_m", "q5_k_m", "q6_k"])
@pytest.mark.parametrize("row", [512, 576])
def test_one_flipped_scale_of_one_block_is_found(library: Ggml, tmp_path: Path, name: str, what: str, row: int) -> None:
    source = write_gguf(tmp_path / "f32.gguf", row=row)
    quantize(source, tmp_path / "q.gguf", name)
    head = read_head(tmp_path / "q.gguf")
    whole = (tmp_path / "q.gguf").read_bytes()
    for tensor in (head.tensors[1], head.tensors[-1]):
        block, size = gguf.GGML_QUANT_SIZES[tensor.type]
        for place in SCALES[tensor.type]:
            data = bytearray(whole)
            at = head.data_start + tensor.offset + (tensor.rows * tensor.row // block // 2) * size + place
            scale = np.frombuffer(data[at : at + 2], dtype=np.float16)
            data[at : at + 2] = (-scale if what == "sign" else scale / 2).tobytes()
            (tmp_path / "q.gguf").write_bytes(data)
            with pytest.raises(VerificationError, match=tensor.name.replace(".", r"\.")):
                check_numbers(source, tmp_path / "q.gguf")
    (tmp_path / "q.gguf").write_bytes(whole)
    check_numbers(source, tmp_path / "q.gguf")


def test_another_number_in_a_16_bit_file_is_found(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "f32.gguf")
    quantize(source, tmp_path / "h.gguf", "f16")
    head, data = read_head(tmp_path / "h.gguf"), bytearray((tmp_path / "h.gguf").read_bytes())
    data[head.data_start + head.tensors[3].offset + 1] ^= 0x04  # one bit of an exponent
    (tmp_path / "h.gguf").write_bytes(data)
    with pytest.raises(VerificationError, match=r"blk\.0\.attn_output\.weight"):
        check_numbers(source, tmp_path / "h.gguf")


@pytest.mark.parametrize(
    ("key", "value"),
    [("tokenizer.chat_template", "{{ other }}"), ("tokenizer.ggml.eos_token_id", None), ("llama.block_count", 3)],
)
def test_other_metadata_is_found_by_name(library: Ggml, tmp_path: Path, key: str, value: Any) -> None:
    source = write_gguf(tmp_path / "f32.gguf")
    quantize(source, tmp_path / "q.gguf", "q8_0")
    set_metadata(tmp_path / "q.gguf", {key: value})
    with pytest.raises(VerificationError, match=key):
        check_numbers(source, tmp_path / "q.gguf")


def test_a_missing_tensor_and_another_shape_are_found(library: Ggml, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "f32.gguf", **{"output.weight": np.ones((4, 512), dtype=np.float32)})
    quantize(write_gguf(tmp_path / "less.gguf"), tmp_path / "q.gguf", "q8_0")
    with pytest.raises(VerificationError, match=r"output\.weight"):
        check_numbers(source, tmp_path / "q.gguf")
    other = write_gguf(tmp_path / "other.gguf", **{"output.weight": np.ones((5, 512), dtype=np.float32)})
    with pytest.raises(VerificationError, match=r"output\.weight"):
        check_numbers(source, other)


def test_a_file_that_is_cut_or_no_gguf_is_said_to_be(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "f32.gguf")
    whole = source.read_bytes()
    source.write_bytes(whole[:-64])
    with pytest.raises(UsageError, match="cut short"):
        read_head(source)
    for text in (whole[:90], b"GGUF", b"", b"no such thing at all, but long enough"):
        source.write_bytes(text)
        with pytest.raises(UsageError, match="not a GGUF file"):
            read_head(source)


def test_memory_is_bounded_by_a_part_of_a_tensor(
    library: Ggml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, seen = write_gguf(tmp_path / "f32.gguf"), []
    monkeypatch.setattr(quantisation, "NUMBERS_AT_ONCE", 1024)
    encode = quantisation.encoded
    monkeypatch.setattr(
        quantisation, "encoded", lambda t, k, data, g: seen.append(data.nbytes) or encode(t, k, data, g)
    )
    quantize(source, tmp_path / "parts.gguf", "q4_k_m")
    assert max(seen) <= 4 * 1024
    monkeypatch.undo()
    quantize(source, tmp_path / "whole.gguf", "q4_k_m")
    assert (tmp_path / "parts.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_a_file_that_cannot_be_written_is_the_users_to_mend(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "f32.gguf")
    with pytest.raises(UsageError, match=r"q\.gguf could not be written.* are free"):
        quantize(source, tmp_path / "nowhere" / "q.gguf", "f16")


def test_a_long_quantisation_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantisation, "SECONDS_OF_SILENCE", 0.0)
    quantize(write_gguf(tmp_path / "f32.gguf"), tmp_path / "q.gguf", "f16")
    assert "100% quantised" in capsys.readouterr().err


def test_new_metadata_leaves_the_tensors_as_they_are(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "f32.gguf")
    before = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(source).tensors}
    set_metadata(source, {"general.name": "a name", "tokenizer.ggml.eos_token_id": 1, "tokenizer.chat_template": None})
    reader = gguf.GGUFReader(source)
    assert reader.get_field("general.name").contents() == "a name"
    assert reader.get_field("tokenizer.ggml.eos_token_id").contents() == 1
    assert reader.get_field("tokenizer.chat_template") is None
    assert all(np.array_equal(tensor.data, before[tensor.name]) for tensor in reader.tensors)
