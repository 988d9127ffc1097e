"""A merge needs memory for a part of the model, and one that was stopped goes on with the parts that are written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from firefly.config import ModelConfig
from firefly.console import take_notices
from firefly.export import merge as merging
from firefly.export import shards
from firefly.export.merge import merge
from firefly.export.shards import JOURNAL, continue_folder, write_shards
from firefly.models.loading import load_model
from firefly.models.precision import Precision
from firefly.models.unread import open_weights
from tiny import randomise_adapters, tiny_model, tiny_tokenizer


def saved(folder: Path, name: str = "llama", shard: str = "20KB", dtype: torch.dtype = torch.bfloat16) -> ModelConfig:
    """A base in several files, and an adapter on it."""
    model = tiny_model(name).to(dtype)
    model.save_pretrained(folder / "base", max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder / "base")
    stacks = ["experts.gate_up_proj", "experts.down_proj"] if hasattr(model.config, "num_experts") else None
    settings = LoraConfig(r=4, target_modules="all-linear", target_parameters=stacks, task_type="CAUSAL_LM")
    randomise_adapters(get_peft_model(model, settings)).save_pretrained(folder / "adapter")
    return ModelConfig(name_or_path=str(folder / "base"))


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("model*"))}


class Killed(BaseException):
    """As a signal ends a process: nothing of ours handles it."""


def kill_after(count: int, patch: pytest.MonkeyPatch) -> None:
    """End the writing of files in the middle of the one after `count`."""
    write, written = shards._write, list[Path]()

    def limited(tensors: Any, path: Path) -> None:
        write(tensors, path)
        written.append(path)
        if len(written) > count:
            path.with_name(".left.1234").write_bytes(path.read_bytes()[:100])
            raise Killed

    patch.setattr(shards, "_write", limited)


@pytest.mark.parametrize("name", ["llama", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_a_merge_that_was_killed_goes_on_to_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = saved(tmp_path, name)
    whole = weights(merge(base, str(tmp_path / "adapter"), str(tmp_path / "whole")))
    assert len(whole) > 4
    target = tmp_path / "merged"
    with monkeypatch.context() as patch:
        kill_after(2, patch)
        with pytest.raises(Killed):
            merge(base, str(tmp_path / "adapter"), str(target))
    left = weights(target / "result.partial")
    assert len(left) == 2
    before = {name: (target / "result.partial" / name).stat().st_ino for name in left}
    take_notices()
    assert weights(merge(base, str(tmp_path / "adapter"), str(target))) == whole
    assert {name: (target / name).stat().st_ino for name in left} == before  # not written again
    codes = [each["code"] for each in take_notices()]
    assert codes.count("shards.kept") == 1
    assert codes.count("shards.written") == len(whole) - 1 - 2
    assert not [path for path in target.iterdir() if path.name in (JOURNAL, "result.partial", ".left.1234")]


def other_adapter(folder: Path) -> None:
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    save_file({name: 2 * x for name, x in tensors.items()}, folder / "adapter" / "adapter_model.safetensors")


def other_scale(folder: Path) -> None:
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(re.sub(r'"lora_alpha": \d+', '"lora_alpha": 16', path.read_text()))


def other_base(folder: Path) -> None:
    path = sorted((folder / "base").glob("*.safetensors"))[1]
    stat, tensors = path.stat(), load_file(path)
    save_file({name: 1.5 * x for name, x in tensors.items()}, path, metadata={"format": "pt"})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("change", [other_adapter, other_scale, other_base])
def test_files_that_were_merged_of_something_else_are_written_anew(
    change: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, target = saved(tmp_path), tmp_path / "merged"
    with monkeypatch.context() as patch:
        kill_after(2, patch)
        with pytest.raises(Killed):
            merge(base, str(tmp_path / "adapter"), str(target))
    change(tmp_path)
    take_notices()
    merged = merge(base, str(tmp_path / "adapter"), str(target))  # which is compared with the changed ones
    codes = [each["code"] for each in take_notices()]
    assert "shards.kept" not in codes
    assert codes.count("shards.written") == len(list(merged.glob("*.safetensors")))


def test_of_what_was_left_only_whole_files_of_the_same_inputs_are_kept(tmp_path: Path) -> None:
    tensors = {f"layer.{n}": torch.full((4, 4), float(n)) for n in range(4)}
    continue_folder(tmp_path / "out", {"base": 1})
    journal = (tmp_path / "out" / JOURNAL).read_text()
    write_shards(tensors, tmp_path / "out", limit=64)
    one, two = (tmp_path / "out" / f"model-0000{n}-of-00004.safetensors" for n in (1, 2))
    files = {path.name: path.stat().st_size for path in (one, two)}
    (tmp_path / "out" / JOURNAL).write_text(json.dumps(json.loads(journal) | {"files": files}))
    two.write_bytes(two.read_bytes()[:-1])
    (tmp_path / "out" / "other").mkdir()
    continue_folder(tmp_path / "out", {"base": 1})
    assert {path.name for path in (tmp_path / "out").iterdir()} == {JOURNAL, one.name}
    continue_folder(tmp_path / "out", {"base": 2})
    assert {path.name for path in (tmp_path / "out").iterdir()} == {JOURNAL}


def test_files_hold_what_they_are_given_as_safetensors_reads_it(tmp_path: Path) -> None:
    given = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(3, 5).bfloat16(),
        "transposed": torch.randn(6, 4).T,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "flags": torch.tensor([True, False]),
    }
    continue_folder(tmp_path / "one", {})
    write_shards(given, tmp_path / "one", limit=10**9)
    found = load_file(tmp_path / "one" / "model.safetensors")
    assert {name: (x.dtype, x.shape) for name, x in found.items()} == {
        name: (x.dtype, x.shape) for name, x in given.items()
    }
    assert all(torch.equal(found[name], x) for name, x in given.items())
    continue_folder(tmp_path / "again", {})
    del found["empty"], given["empty"]
    save_file(found, tmp_path / "theirs.safetensors")
    write_shards(open_weights([tmp_path / "theirs.safetensors"]), tmp_path / "again", limit=50)
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(given)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in given.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "again" / file)[name], given[name])


@pytest.mark.parametrize("name", ["llama", "llama_tied", "phi3", "mixtral", "jetmoe", "gpt_oss", "gpt2", "mamba"])
def test_weights_are_named_and_laid_out_as_transformers_saves_them(name: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path / "base")
    source, types = ModelConfig(name_or_path=str(tmp_path / "base")), Precision(torch.float32)
    load_model(source, "lora", types, torch.device("cpu")).save_pretrained(tmp_path / "theirs")
    ours = load_model(source, "lora", types, torch.device("cpu"), unread=True)
    continue_folder(tmp_path / "ours", {})
    write_shards(merging.weights_to_save(ours), tmp_path / "ours", limit=10**9)
    merging.save_settings(ours, tmp_path / "ours")
    found, expected = (load_file(tmp_path / place / "model.safetensors") for place in ("ours", "theirs"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "ours" / file).read_text() == (tmp_path / "theirs" / file).read_text()


def test_merged_files_are_about_as_large_as_those_of_the_base(tmp_path: Path) -> None:
    base = saved(tmp_path)
    merged = merge(base, str(tmp_path / "adapter"), str(tmp_path / "merged"))
    largest, count = (
        [f(path.stat().st_size for path in place.glob("*.safetensors")) for place in (merged, tmp_path / "base")]
        for f in (max, lambda sizes: len(list(sizes)))
    )
    assert largest[0] <= 1.1 * largest[1]  # headers differ
    assert abs(count[0] - count[1]) <= 1
    whole = AutoModelForCausalLM.from_pretrained(merged)
    assert whole.dtype == torch.bfloat16


MEASURED = """
import sys
from firefly.config import ModelConfig
from firefly.export.merge import merge
import peft, transformers.models.llama.modeling_llama

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

before = peak()
merge(ModelConfig(name_or_path=sys.argv[1]), sys.argv[2], sys.argv[3])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
def test_what_a_merge_takes_hardly_grows_with_the_layers(tmp_path: Path) -> None:
    """Of two models that differ in depth alone: what libraries, the verification and the heap take is the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def size_and_peak(layers: int) -> tuple[int, int]:
        folder = tmp_path / str(layers)
        shape = LlamaConfig(
            hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=8, vocab_size=4096
        )
        torch.manual_seed(0)
        model = LlamaForCausalLM(shape).bfloat16()
        model.save_pretrained(folder / "base", max_shard_size="60MB")
        tiny_tokenizer().save_pretrained(folder / "base")
        settings = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        randomise_adapters(get_peft_model(model, settings)).save_pretrained(folder / "adapter")
        size = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
        folders = [str(folder / name) for name in ("base", "adapter", "merged")]
        command = [sys.executable, "-c", MEASURED, *folders]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
        return size, int(done.stdout.split()[-1])

    (small, peak_of_small), (large, peak_of_large) = size_and_peak(6), size_and_peak(22)
    assert large - small > 400e6
    assert peak_of_large - peak_of_small < 0.5 * (large - small)
