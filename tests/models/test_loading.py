"""What a loaded model is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit

from firefly.config import ModelConfig
from firefly.models.kernels.lora_linear import dense
from firefly.models.loading import load_model
from firefly.models.precision import Precision
from tiny import save_tiny_model


def test_a_forward_pass_leaves_4_bit_weights_as_they_were_quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the CPU: with bf16 instructions bitsandbytes would repack them in place."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    folder = save_tiny_model(tmp_path, "llama", hidden_size=64, intermediate_size=128)
    model = load_model(ModelConfig(name_or_path=str(folder)), "qlora", Precision(torch.bfloat16), torch.device("cpu"))
    layer = model.model.layers[0].mlp.up_proj
    before = layer.weight.data.clone()
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.arange(12)[None])
    assert torch.equal(layer.weight.data, before)
    assert layer.weight.quant_state.nested


@pytest.mark.parametrize("width", [64, 96, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_4_bit_weight_is_near_the_one_that_was_quantized(width: int, dtype: torch.dtype) -> None:
    """Whatever the CPU's instructions, also where a block of scales crosses a row's end."""
    weight = torch.randn(48, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    stored: Any = packed
    stored.quant_state = state
    error = (dense(stored, dtype) - weight).float().abs().mean() / weight.float().abs().mean()
    assert error < 0.12


def test_a_layer_whose_rows_are_no_whole_blocks_computes_with_its_weight(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, "llama", hidden_size=96, num_attention_heads=4, head_dim=8)
    model = load_model(ModelConfig(name_or_path=str(folder)), "qlora", Precision(torch.float32), torch.device("cpu"))
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 3, 96, requires_grad=True)
    out = layer(x)
    expected = x @ dense(layer.weight, torch.float32).T
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each.square().sum(), x)[0] for each in (out, expected)))
