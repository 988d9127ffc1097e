"""The real small model, fetched from the package index: what tiny random models cannot show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from firefly.config import ModelConfig, load_config
from firefly.data.encoding import Encoder
from firefly.data.schema import Message
from firefly.data.templates import bind_template
from firefly.export.merge import merge
from firefly.generation import Generator
from firefly.models.loading import EMBEDDED, load_tokenizer
from firefly.training import train

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three QLoRA steps with the tutorial's configuration, on the embedded model and our own rows."""
    changes: dict[str, Any] = {
        "model_name_or_path": EMBEDDED,
        "train_file": str(ROOT / "data" / "dummy_data.jsonl"),
        "output_dir": str(tmp_path_factory.mktemp("tutorial")),
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "max_steps": 3,
        "logging_steps": 1,
        "dataloader_num_workers": 0,
        "compare": False,
    }
    return train(load_config(ROOT / "train_args/sft/qlora/qwen1.5-14b-sft-qlora.json", changes))


def test_the_tutorials_configuration_trains_on_this_machine(run: Path) -> None:
    results = json.loads((run / "train_results.json").read_text())
    assert results["steps"] == 3
    assert 0 < results["train_loss"] < 10
    assert (run / "adapter_model.safetensors").is_file()


def test_a_model_in_4_bit_answers_with_the_probabilities_of_the_one_that_was_trained(run: Path) -> None:
    from peft import PeftModel

    from firefly.models.adapters import attach_adapter
    from firefly.models.loading import load_model
    from firefly.models.precision import Precision, pick_device

    with Generator.load(ModelConfig(), str(run), load_in_4bit=True, dtype="float32") as generator:  # rounding apart
        ids = generator.encode([Message.of("user", "Who are you?")])
        (found,) = generator.engine.score([ids], generator.name, 5)
    config = load_config(run / "train_args.json")
    trained = attach_adapter(load_model(config.model, "qlora", Precision(torch.float32), pick_device()), config.adapter)
    assert isinstance(trained, PeftModel)
    trained.load_adapter(str(run), "default")
    trained.eval()
    with torch.no_grad():
        expected = trained(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    for place, token in enumerate(found[1:]):
        for likely, logprob in token.top:
            assert abs(logprob - expected[place, likely].item()) < 2e-3


def test_merging_in_bf16_keeps_a_small_update(run: Path, tmp_path: Path) -> None:
    merged = merge(ModelConfig(), str(run), str(tmp_path / "merged"))
    report = json.loads((merged / "merge_report.json").read_text())
    assert report["dtype"] == "torch.bfloat16"
    assert report["kl"] < 1e-3


def test_ids_equal_the_tokenizers_own_chat_template() -> None:
    tokenizer = load_tokenizer(ModelConfig(name_or_path=EMBEDDED))
    messages = [
        {"role": "user", "content": "Hello {x} 你好 🙂"},
        {"role": "assistant", "content": "  Hi! <b>"},
        {"role": "user", "content": "again"},
    ]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    for name in ("auto", "smollm2"):
        encoder = Encoder(tokenizer, bind_template(name, tokenizer))
        assert encoder.encode_prompt([Message.of(item["role"], item["content"]) for item in messages]) == expected  # type: ignore[arg-type]
