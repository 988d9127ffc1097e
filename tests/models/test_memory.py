"""Memory of a step: what is measured on short passes holds for long ones, and leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from firefly.data.batching import pack
from firefly.models import memory
from firefly.models.adapters import transformers_model
from firefly.models.attention import use_crossover
from firefly.models.checkpointing import Checkpointing, install_checkpointing
from firefly.models.dry_run import measure_activations
from firefly.models.memory import (
    FRAGMENTATION,
    PRIMITIVE_BYTES,
    PRIMITIVES,
    PRIMITIVES_OF_SHORT_ROWS,
    Activations,
    Peak,
    cgroup_room,
    forecast_memory,
    free_memory,
    primitives_kept,
)
from tiny import SHAPE, prepared, random_examples

CPU = torch.device("cpu")


def kept_by(model: Any, layout: str, *lengths: int) -> int:
    """Bytes that a pass over examples of these lengths keeps, counted once a storage, without the model's own."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def count(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    batch = pack([replace(example, labels=example.input_ids) for example in random_examples(*lengths)])
    model.train()
    with saved_tensors_hooks(count, lambda tensor: tensor):
        result = model(**batch.model_inputs(layout == "solo"))
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del result
    return total


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt_neox", "phi3", "minicpm3"])
def test_what_is_measured_on_short_passes_is_what_a_longer_one_keeps_more(name: str, mode: str) -> None:
    model, layout, _ = prepared(name, mode)
    inner = transformers_model(model)
    found = measure_activations(inner, layout, None, 100)
    grown = (kept_by(inner, layout, *4 * [100]) - kept_by(inner, layout, 100, 100)) / 200
    assert found.per_token(Checkpointing(0)) == pytest.approx(grown, rel=0.05)
    for layers in (3,) if name == "gemma2" else (1, 2, 3):  # whose layers with a window keep less than the others
        install_checkpointing(inner, Checkpointing(layers))
        grown = (kept_by(inner, layout, *4 * [100]) - kept_by(inner, layout, 100, 100)) / 200
        expected = found.kept * (3 - layers) + found.entering * layers + found.outside
        assert expected == pytest.approx(grown, rel=0.15)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_examples_beyond_what_is_computed_by_matmuls_keep_no_probabilities(name: str) -> None:
    """But for soft caps, which keep them whatever the length."""
    model, layout, _ = prepared(name, "lora")
    inner = transformers_model(model)
    use_crossover(inner, 1024)
    at_most, short, beyond = (measure_activations(inner, layout, None, longest).kept for longest in (512, 100, 2048))
    assert short < at_most
    if name == "gemma2":
        assert beyond > 2 * at_most
    else:
        assert beyond == at_most
    use_crossover(inner, 0)
    assert (measure_activations(inner, layout, None, 2048).kept < at_most) is (name == "llama")


def test_a_frozen_llama_layer_keeps_the_inputs_of_its_layers_and_two_inner_arrays() -> None:
    model, layout, _ = prepared("llama", "lora")
    found = measure_activations(transformers_model(model), layout, None, 10)
    width, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    # Norm inputs and outputs (4), queries, keys, values (2: two heads of four), attention's output: 7 widths at least.
    assert 4 * (7 * width + 2 * inner) < found.kept < 4 * (10 * width + 2 * inner + 100)
    assert found.entering == 4 * width
    assert found.layers == 3


def test_measuring_leaves_random_state_gradients_and_mode_alone() -> None:
    model, layout, _ = prepared("llama", "lora")
    inner = transformers_model(model).eval()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    measure_activations(inner, layout, None, 10)
    assert torch.equal(torch.rand(4), expected)
    assert all(p.grad is None for p in inner.parameters())
    assert not inner.training
    assert not any(hooks for module in inner.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks))


def test_no_gradient_is_computed_below_the_first_trainable_layer() -> None:
    """Layers below the first adapter keep nothing at all for backward."""
    from firefly.config import AdapterConfig
    from firefly.models.adapters import attach_adapter
    from firefly.models.attention import choose_layout
    from firefly.models.forwards import install_training_forwards
    from tiny import tiny_model

    model = tiny_model("llama")
    layout, _ = choose_layout(model)
    wrapped = attach_adapter(model, AdapterConfig(mode="lora", rank=4, target=("layers.2.self_attn.q_proj",)))
    install_training_forwards(wrapped)
    inner = transformers_model(wrapped)
    lower: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda *seen: lower.append(seen[2])) for layer in inner.model.layers[:2]]
    whole = measure_activations(inner, layout, None, 10)
    for handle in handles:
        handle.remove()
    assert len(lower) == 2
    assert not any(hidden.requires_grad for hidden in lower)
    everywhere, layout, _ = prepared("llama", "lora")
    assert whole.kept < 0.4 * measure_activations(transformers_model(everywhere), layout, None, 10).kept


@pytest.mark.parametrize(
    ("layers", "offload", "expected"),
    [
        (0, False, 4 * 100 + 7),
        (1, False, 3 * 100 + 10 + 7),
        (3, False, 1 * 100 + 30 + 7),
        (4, False, 1 * 100 + 40 + 7),  # one layer at a time is whole again
        (4, True, 1 * 100 + 10 + 7),
    ],
)
def test_bytes_per_token_under_checkpointing(layers: int, offload: bool, expected: int) -> None:
    assert Activations(4, kept=100, entering=10, outside=7).per_token(Checkpointing(layers, offload)) == expected


GPU = torch.device("cuda", 0)


def test_a_forecast_adds_up_the_parts() -> None:
    model, _, _ = prepared("llama", "lora")
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = 4 * sum(p.numel() for p in model.parameters() if not p.requires_grad)
    peak = Peak(activations=10**6, head=10**5, gradients=trained)
    found = forecast_memory(model, CPU, peak, optimizer=456, cache=123, primitives=2, available=0)
    parts = found.parts
    assert (parts["weights"], parts["adapter"], parts["gradients"]) == (frozen, trained, trained)
    assert (parts["activations"], parts["head"], parts["optimizer"], parts["cache"]) == (10**6, 10**5, 456, 123)
    assert parts["allocator"] == int(FRAGMENTATION["cpu"] * peak.total)
    assert parts["kernels"] == 2 * PRIMITIVE_BYTES
    assert found.missing == found.total == sum(parts.values())
    assert "reference" not in parts


def test_of_what_is_on_a_gpu_already_nothing_is_missing() -> None:
    model, _, _ = prepared("llama", "lora")
    found = forecast_memory(model, GPU, Peak(10**6, 0, 0), optimizer=10, available=0)
    assert "allocator" not in found.parts
    assert found.missing == 10**6 + 10


def test_when_weights_change_gradients_may_take_more_than_activations() -> None:
    model, _, _ = prepared("llama", "full")
    parts = forecast_memory(model, GPU, Peak(10, 10, 10), optimizer=8, available=0).parts
    assert parts["gradients"] == 4 * sum(p.numel() for p in model.parameters())
    assert "activations" not in parts


@pytest.mark.parametrize(
    ("lengths", "segments", "kept"),
    [
        ([200, 100], [1, 1], PRIMITIVES),
        ([20, 30], [1, 1], PRIMITIVES_OF_SHORT_ROWS),
        ([400, 300], [3, 3], PRIMITIVES),  # pairs
        ([150, 150], [3, 3], PRIMITIVES_OF_SHORT_ROWS),
        ([1024, 1024], [4, 4], PRIMITIVES),  # blocks of documents
        ([1024, 1024], [44, 44], PRIMITIVES_OF_SHORT_ROWS),
    ],
)
def test_short_rows_need_the_code_of_more_matmuls(lengths: list[int], segments: list[int], kept: int) -> None:
    assert primitives_kept(sum(lengths), sum(segments)) == kept


# ---- control groups ----

V2 = "30 24 0:26 {root} {mount} rw,nosuid - cgroup2 cgroup2 rw"
V1 = "36 24 0:33 {root} {mount} rw,relatime shared:9 - cgroup cgroup rw,memory"
CPUACCT = "37 24 0:34 / {mount} rw,relatime - cgroup cgroup rw,cpuacct"
MEMORY = {
    V2: ("0::{group}", "memory.max", "memory.current", "inactive_file"),
    V1: ("4:memory:{group}", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def process_in(folder: Path, version: str, group: str, root: str, levels: dict[str, tuple[str, int, int]]) -> Path:
    """/proc/self of a process in a control group; of each level: its limit, what it uses, and page cache in that."""
    line, limit, usage, cache = MEMORY[version]
    mount = folder / "cgroup"
    for level, (most, used, cached) in levels.items():
        (mount / level).mkdir(parents=True, exist_ok=True)
        (mount / level / "memory.high").write_text("max\n")
        (mount / level / limit).write_text(f"{most}\n")
        (mount / level / usage).write_text(f"{used}\n")
        (mount / level / "memory.stat").write_text(f"anon 1\n{cache} {cached}\n")
    process = folder / "self"
    process.mkdir()
    (process / "cgroup").write_text(f"3:cpuacct:/elsewhere\n{line.format(group=group)}\n")
    mounts = [CPUACCT.format(mount=folder / "other"), version.format(root=root, mount=mount)]
    (process / "mountinfo").write_text("\n".join(mounts) + "\n")
    return process


@pytest.mark.parametrize("version", [V1, V2], ids=["v1", "v2"])
def test_each_level_of_control_groups_has_its_own_room(version: str, tmp_path: Path) -> None:
    """What a group uses counts without the page cache, which the kernel takes back."""
    levels = {"pod/box": ("5000", 3000, 500), "pod": ("16000", 15000, 1000)}
    process = process_in(tmp_path, version, "/pod/box", "/", levels)
    assert list(cgroup_room(process)) == [5000 - 2500, 16000 - 14000]


@pytest.mark.parametrize("version", [V1, V2], ids=["v1", "v2"])
def test_a_container_that_sees_the_hosts_path_has_its_own_group_at_the_mount(version: str, tmp_path: Path) -> None:
    process = process_in(tmp_path, version, "/docker/abc", "/docker/abc", {".": ("16000", 1000, 0)})
    assert list(cgroup_room(process)) == [15000]


def test_a_group_without_a_limit_takes_what_there_is(tmp_path: Path) -> None:
    assert list(cgroup_room(process_in(tmp_path, V2, "/pod", "/", {"pod": ("max", 1000, 0)}))) == []
    (tmp_path / "cgroup/pod/memory.high").write_text("7000")  # above it the kernel holds processes up
    assert list(cgroup_room(tmp_path / "self")) == [6000]
    assert list(cgroup_room(tmp_path / "no-linux")) == []


def test_a_group_over_its_limit_has_no_room(tmp_path: Path) -> None:
    assert list(cgroup_room(process_in(tmp_path, V2, "/pod", "/", {"pod": ("900", 1000, 0)}))) == [0]


@pytest.mark.parametrize("name", ["memory.max", "memory.current", "memory.stat"])
@pytest.mark.parametrize("written", [b"", b"many\n", b"\xff\n", b"inactive_file many\n"])
def test_a_group_whose_files_cannot_be_read_is_left_out(name: str, written: bytes, tmp_path: Path) -> None:
    levels = {"pod": ("5000", 3000, 500), ".": ("16000", 15000, 1000)}
    process = process_in(tmp_path, V2, "/pod", "/", levels)
    (tmp_path / "cgroup/pod" / name).write_bytes(written)
    unlimited_stat = name == "memory.stat" and not written  # then no page cache can be taken back
    assert list(cgroup_room(process)) == ([2000] if unlimited_stat else []) + [2000]


def test_a_container_of_16_gb_on_a_host_of_512_has_16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "read_proc", lambda *_: 512 << 30)
    monkeypatch.setattr(memory, "cgroup_room", lambda: iter([16 << 30, 40 << 30]))
    assert free_memory(CPU) == 16 << 30
